"""Tests of impala/learning/optimizers/rmsprop.py."""

import numpy as np
import pytest
import tensorflow as tf

from impala.learning.optimizers.rmsprop import RMSProp, sum_duplicates

# The last is large enough for several threads.
_SHAPES = [(3, 5), (7,), (), (300, 700)]


def _random(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _tensorflow_1(initial, gradients, learning_rates, **hyperparameters):
    """Returns parameters and slots of TensorFlow 1's own optimizer after the same gradients."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        parameters = [
            tf.compat.v1.get_variable(f'p{i}', initializer=p, use_resource=True)
            for i, p in enumerate(initial)
        ]
        rate = tf.compat.v1.placeholder(tf.float32, [])
        optimizer = tf.compat.v1.train.RMSPropOptimizer(rate, **hyperparameters)
        feeds = [
            tf.nest.map_structure(
                lambda g: tf.compat.v1.placeholder(g.dtype, g.shape),
                gradient,
                expand_composites=True,
            )
            for gradient in gradients[0]
        ]
        train = optimizer.apply_gradients(zip(feeds, parameters, strict=True))
        slots = [[optimizer.get_slot(p, name) for p in parameters] for name in ('rms', 'momentum')]
        session.run(tf.compat.v1.global_variables_initializer())
        for step, rate_now in zip(gradients, learning_rates, strict=True):
            fed = tf.nest.flatten(feeds, expand_composites=True)
            values = [np.asarray(x) for x in tf.nest.flatten(step, expand_composites=True)]
            session.run(train, {rate: rate_now, **dict(zip(fed, values, strict=True))})
        return session.run([parameters, *slots])


def _ours(initial, gradients, learning_rates, compiled, **hyperparameters):
    parameters = [tf.Variable(p) for p in initial]
    optimizer = RMSProp(parameters, **hyperparameters)

    def apply(gradient, rate):
        unique = [sum_duplicates(g) if isinstance(g, tf.IndexedSlices) else g for g in gradient]
        optimizer.apply(unique, parameters, rate)

    if compiled:
        apply = tf.function(apply)
    for gradient, rate in zip(gradients, learning_rates, strict=True):
        apply(gradient, tf.constant(rate))
    return [
        [v.numpy() for v in variables]
        for variables in (parameters, optimizer.mean_squares, optimizer.steps)
    ]


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize(
    'hyperparameters',
    [
        {'decay': 0.99, 'momentum': 0.0, 'epsilon': 0.1},
        {'decay': 0.9, 'momentum': 0.7, 'epsilon': 0.01},
    ],
)
def test_equals_tensorflow_1_bit_for_bit(hyperparameters, compiled):
    initial = _random(_SHAPES, seed=0)
    gradients = [[tf.constant(g) for g in _random(_SHAPES, seed)] for seed in range(1, 11)]
    rates = np.linspace(6e-2, 0, 10, dtype=np.float32)
    expected = _tensorflow_1(initial, gradients, rates, **hyperparameters)
    actual = _ours(initial, gradients, rates, compiled, **hyperparameters)
    # Without momentum the last step does not matter.
    compared = 3 if hyperparameters['momentum'] else 2
    for ours, theirs in zip(actual[:compared], expected, strict=False):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(actual[0][0], initial[0])


@pytest.mark.parametrize('compiled', [False, True])
def test_rows_of_an_embedding_equal_tensorflow_1_bit_for_bit(compiled):
    hyperparameters = {'decay': 0.9, 'momentum': 0.3, 'epsilon': 0.01}
    initial = _random([(6, 4)], seed=0)
    gradients = []
    for seed, indices in enumerate([[2, 0, 2], [5, 5, 5], [0, 1, 2]]):
        (values,) = _random([(3, 4)], seed=seed + 1)
        gradients.append(
            [tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([6, 4]))]
        )
    rates = np.float32([0.1, 0.05, 0.01])
    expected = _tensorflow_1(initial, gradients, rates, **hyperparameters)
    actual = _ours(initial, gradients, rates, compiled, **hyperparameters)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(actual[0][0][3:5], initial[0][3:5])
    assert not np.array_equal(actual[0][0][5], initial[0][5])


def test_first_step_by_hand():
    # mean square: 0.9 * 1 + 0.1 * 2^2 = 1.3; step: 0.5 * 2 / sqrt(1.3 + 0.25).
    parameter = tf.Variable([3.0])
    optimizer = RMSProp([parameter], decay=0.9, momentum=0.0, epsilon=0.25)
    optimizer.apply([tf.constant([2.0])], [parameter], 0.5)
    np.testing.assert_allclose(optimizer.mean_squares[0], [1.3], rtol=1e-6)
    np.testing.assert_allclose(parameter, [3.0 - 1.0 / np.sqrt(1.55)], rtol=1e-6)


def test_a_gradient_of_none_leaves_a_parameter_and_its_slots_unchanged():
    parameters = [tf.Variable([1.0, 2.0]), tf.Variable([3.0])]
    optimizer = RMSProp(parameters, momentum=0.9)
    optimizer.apply([None, tf.constant([1.0])], parameters, 0.1)
    np.testing.assert_array_equal(parameters[0], [1.0, 2.0])
    np.testing.assert_array_equal(optimizer.mean_squares[0], [1.0, 1.0])
    np.testing.assert_array_equal(optimizer.steps[0], [0.0, 0.0])
    assert parameters[1].numpy() < 3.0


def test_slots_are_restored_before_the_first_update(tmp_path):
    def make():
        parameter = tf.Variable([1.0, 2.0])
        optimizer = RMSProp([parameter], momentum=0.9)
        return parameter, optimizer, tf.train.Checkpoint(parameter=parameter, optimizer=optimizer)

    parameter, optimizer, checkpoint = make()
    optimizer.apply([tf.constant([1.0, -3.0])], [parameter], 0.1)
    path = checkpoint.save(str(tmp_path / 'checkpoint'))
    restored_parameter, restored, checkpoint = make()
    checkpoint.restore(path).assert_consumed()
    for _ in range(2):
        optimizer.apply([tf.constant([0.5, 0.5])], [parameter], 0.1)
        restored.apply([tf.constant([0.5, 0.5])], [restored_parameter], 0.1)
    np.testing.assert_array_equal(parameter, restored_parameter)
    np.testing.assert_array_equal(optimizer.mean_squares[0], restored.mean_squares[0])
    np.testing.assert_array_equal(optimizer.steps[0], restored.steps[0])


def test_summed_duplicates_are_the_same_gradient():
    values = tf.constant([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    summed = sum_duplicates(tf.IndexedSlices(values, tf.constant([4, 1, 4]), tf.constant([5, 2])))
    np.testing.assert_array_equal(summed.indices, [4, 1])
    np.testing.assert_array_equal(summed.values, [[101.0, 202.0], [10.0, 20.0]])
    np.testing.assert_array_equal(
        tf.convert_to_tensor(summed), [[0, 0], [10, 20], [0, 0], [0, 0], [101, 202]]
    )


def test_unknown_parameters_are_refused():
    parameter = tf.Variable([1.0], name='known')
    optimizer = RMSProp([parameter])
    with pytest.raises(ValueError, match='stranger'):
        optimizer.apply([tf.constant([1.0])], [tf.Variable([1.0], name='stranger')], 0.1)
    with pytest.raises(ValueError, match='2 updates for 1 parameters'):
        optimizer.apply([tf.constant([1.0])] * 2, [parameter], 0.1)
