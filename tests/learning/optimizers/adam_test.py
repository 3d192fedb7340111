"""Tests of impala/learning/optimizers/adam.py."""

import numpy as np
import pytest
import tensorflow as tf

from impala.learning.optimizers.adam import Adam

_SHAPES = [(3, 5), (7,), (), (300, 70)]


def _random(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in _SHAPES]


@pytest.mark.parametrize('compiled', [False, True])
def test_follows_algorithm_1(compiled):
    """With the bias-corrected moments of the paper's algorithm 1, in float64; epsilon is tiny."""
    parameters = [tf.Variable(p) for p in _random(0)]
    optimizer = Adam(parameters, beta1=0.8, beta2=0.95, epsilon=1e-9)
    apply = optimizer.apply
    if compiled:
        apply = tf.function(lambda gradients, rate: optimizer.apply(gradients, parameters, rate))
    expected = [np.float64(p) for p in _random(0)]
    m = [np.zeros_like(p) for p in expected]
    v = [np.zeros_like(p) for p in expected]
    for t in range(1, 8):
        gradients, rate = _random(t), 0.1 / t
        arguments = ([tf.constant(g) for g in gradients], tf.constant(rate, tf.float32))
        apply(*arguments) if compiled else apply(arguments[0], parameters, arguments[1])
        for i, g in enumerate(gradients):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * np.float64(g) ** 2
            expected[i] -= rate * (m[i] / (1 - 0.8**t)) / np.sqrt(v[i] / (1 - 0.95**t))
    for actual, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-3, atol=2e-5)
    assert optimizer.updates.numpy() == 7


def test_epsilon_is_added_outside_the_root():
    """At t = 1: rate sqrt(1 - b2) / (1 - b1) (1 - b1) g / (sqrt(1 - b2) g + epsilon)."""
    parameter = tf.Variable([1.0])
    Adam([parameter], beta1=0.9, beta2=0.75, epsilon=2.0).apply(
        [tf.constant([6.0])], [parameter], 0.1
    )
    np.testing.assert_allclose(parameter, [1 - 0.1 * 0.5 * 6 / (0.5 * 6 + 2)], rtol=1e-6)


def test_sparse_gradients_count_as_dense_ones_and_none_is_skipped():
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    slices = tf.IndexedSlices(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([2, 0]), [3, 2])
    dense = tf.constant([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]])
    results = []
    for gradient in (slices, dense):
        parameters = [tf.Variable(table), tf.Variable([5.0])]
        optimizer = Adam(parameters)
        for _ in range(2):
            optimizer.apply([gradient, None], parameters, 0.1)
        results.append(parameters[0].numpy())
        np.testing.assert_array_equal(parameters[1], [5.0])
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0], table)


def test_mismatched_updates_and_parameters_are_refused():
    parameters = [tf.Variable([1.0]), tf.Variable([2.0], name='other')]
    optimizer = Adam(parameters[:1])
    with pytest.raises(ValueError, match='1 updates for 2 parameters'):
        optimizer.apply([tf.constant([1.0])], parameters, 0.1)
    with pytest.raises(ValueError, match='no slots for the parameter other'):
        optimizer.apply([tf.constant([1.0])], parameters[1:], 0.1)
    assert optimizer.updates.numpy() == 0
