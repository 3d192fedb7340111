"""Tests of the cores against Sonnet's, one step at a time."""

import inspect

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from impala.networks.core import OwnCore, create_core
from impala.networks.gru import GRU
from impala.networks.lstm import LSTM

T, B, INPUTS, HIDDEN = 6, 3, 5, 4


OWN = ('Stack', 'Started', 'Stateless')


def step_by_step(core, inputs, reset, state):
    """Returns outputs and last state of a core of Sonnet's kind, which begins where `reset`."""
    outputs = []
    for inputs_t, reset_t in zip(tf.unstack(inputs), np.asarray(reset), strict=True):
        fresh = core.initial_state(B)
        state = tf.nest.map_structure(
            lambda f, s, r=reset_t: tf.stack([f[b] if r[b] else s[b] for b in range(B)]),
            fresh,
            state,
        )
        output, state = core(inputs_t, state)
        outputs.append(output)
    return tf.stack(outputs), state


@pytest.fixture(params=['lstm', 'gru', *OWN])
def cores(request):
    """Returns a core of ours, one of Sonnet's kind, and their weights, which are equal."""
    tf.random.set_seed(1)
    is_own = request.param in OWN
    name = f'own_cores:{request.param}' if is_own else request.param
    ours = create_core(name, INPUTS, HIDDEN)
    if is_own:
        return ours, ours._core, *[ours._core.trainable_variables] * 2
    ours.b.assign(tf.random.normal(ours.b.shape))
    theirs = {'lstm': snt.LSTM, 'gru': snt.GRU}[request.param](HIDDEN)
    theirs(tf.zeros([1, INPUTS]), theirs.initial_state(1))
    weights = [ours.w_i, ours.w_h, ours.b]
    their_weights = [theirs.input_to_hidden, theirs.hidden_to_hidden, theirs.b]
    for mine, other in zip(weights, their_weights, strict=True):
        other.assign(mine)
    return ours, theirs, weights, their_weights


RESET = tf.constant(
    [
        [True, False, False],
        [False, False, False],
        [False, True, False],
        [False, True, False],
        [False, False, False],
        [True, False, False],
    ]
)


@pytest.fixture
def sequence(cores):
    """Returns inputs, resets and a random state."""
    rng = np.random.default_rng(2)

    def normal(*shape):
        return tf.constant(rng.normal(size=shape), tf.float32)

    state = tf.nest.map_structure(lambda spec: normal(B, *spec.shape), cores[0].state_spec)
    return normal(T, B, INPUTS), RESET, state


def project(core, inputs):
    return tf.reshape(core.project(tf.reshape(inputs, [-1, INPUTS])), [*inputs.shape[:2], -1])


def our_unroll(core, inputs, reset, state):
    return core.unroll(project(core, inputs), reset, state)


def loss_of(outputs, last):
    """Every output takes part, each with its own weight."""
    weights = tf.random.stateless_normal([T, B, HIDDEN], [3, 4])
    return tf.reduce_sum(outputs * weights) + sum(
        tf.reduce_sum(tf.sin(each)) for each in tf.nest.flatten(last)
    )


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    tf.nest.assert_same_structure(actual, expected)
    for mine, other in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)


def test_a_step_equals_sonnets(cores, sequence):
    ours, theirs, *_ = cores
    inputs, _, state = sequence
    assert_close(ours.step(ours.project(inputs[0]), state), theirs(inputs[0], state))


@pytest.mark.parametrize('in_graph', [False, True])
def test_unroll_and_its_gradients_equal_sonnets_steps(cores, sequence, in_graph):
    ours, theirs, weights, their_weights = cores
    inputs, reset, state = sequence

    def run(unroll, core, variables):
        def compute(inputs, state):
            with tf.GradientTape() as tape:
                sources = tf.nest.flatten((variables, inputs, state))
                tape.watch(sources)
                outputs, last = unroll(core, inputs, reset, state)
                loss = loss_of(outputs, last)
            gradients = tape.gradient(
                loss, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            return outputs, last, gradients

        return (tf.function(compute) if in_graph else compute)(inputs, state)

    actual = run(our_unroll, ours, weights)
    expected = run(step_by_step, theirs, their_weights)
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # The gradient of each weight is another number.
    assert all(np.any(gradient) for gradient in actual[2][: len(weights)])


def test_nan_does_not_spread_beyond_resets(cores, sequence):
    ours, *_ = cores
    inputs, _, state = sequence
    # The second column is reset only right before and right after its broken row.
    reset = np.zeros([T, B], bool)
    reset[2, 1] = reset[3, 1] = True
    projected = project(ours, inputs).numpy()
    broken = projected.copy()
    broken[2, 1] = np.nan

    @tf.function
    def run(projected):
        with tf.GradientTape() as tape:
            sources = [projected, *tf.nest.flatten(state)]
            tape.watch(sources)
            outputs, last = ours.unroll(projected, tf.constant(reset), state)
            # Weights would multiply what is zero by NaN.
            loss = tf.reduce_sum(tf.sin(outputs))
            loss += sum(tf.reduce_sum(each**2) for each in tf.nest.flatten(last))
        return outputs, last, tape.gradient(loss, sources)

    outputs, last, (d_projected, *d_state) = run(tf.constant(broken))
    expected, expected_last, (expected_d_projected, *expected_d_state) = run(tf.constant(projected))
    assert np.isnan(outputs[2, 1]).all() and np.isnan(d_projected[2, 1]).any()
    others = np.ones([T, B], bool)
    others[2, 1] = False
    np.testing.assert_allclose(outputs[others], expected[others], rtol=1e-6)
    np.testing.assert_allclose(d_projected[others], expected_d_projected[others], rtol=1e-5)
    assert_close((last, d_state), (expected_last, expected_d_state))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_broken_state_does_not_matter_after_a_reset(cores, sequence, bad):
    ours, _, weights, _ = cores
    inputs, reset, state = sequence
    assert reset[0, 0] and not reset[0, 1]
    broken = tf.nest.map_structure(
        lambda s: tf.tensor_scatter_nd_update(s, [[0]], tf.fill([1, s.shape[1]], bad)), state
    )

    def run(state):
        with tf.GradientTape() as tape:
            sources = [*weights, *tf.nest.flatten(state)]
            tape.watch(sources)
            outputs, last = our_unroll(ours, inputs, reset, state)
            loss = loss_of(outputs, last)
        return outputs, last, tape.gradient(loss, sources)

    assert_close(run(broken), run(state))


def test_unroll_takes_unknown_sizes(cores, sequence):
    ours, *_ = cores
    inputs, reset, state = sequence
    projected = project(ours, inputs)
    specs = [
        tf.TensorSpec([None, None, projected.shape[-1]]),
        tf.TensorSpec([None, None], tf.bool),
        tf.nest.map_structure(lambda spec: tf.TensorSpec([None, *spec.shape]), ours.state_spec),
    ]
    unroll = tf.function(ours.unroll, input_signature=specs)
    assert_close(unroll(projected, reset, state), ours.unroll(projected, reset, state))


@pytest.mark.parametrize(('kind', 'gates'), [(LSTM, 4), (GRU, 3)])
def test_initial_weights_are_distributed_like_sonnets_lstm(kind, gates):
    ours = kind(100, 25)
    for weights, fan_in in ((ours.w_i, 100), (ours.w_h, 25)):
        assert weights.shape == [fan_in, gates * 25]
        assert np.std(weights) == pytest.approx(0.88 / np.sqrt(fan_in), rel=0.1)
    # The forget gate of an LSTM begins open.
    np.testing.assert_array_equal(ours.b, np.repeat([0.0, 1.0, 0.0, 0.0][:gates], 25) * (gates > 3))


def own(step, initial_state=lambda batch_size: tf.zeros([batch_size, 2])):
    """Returns a class of cores from its two functions."""

    class Own(snt.Module):
        def initial_state(self, batch_size):
            return initial_state(batch_size)

        def __call__(self, inputs, state):
            return step(inputs, state)

    return Own


class KerasCore(snt.Module):
    def __init__(self):
        super().__init__()
        self._layer = tf.keras.layers.Dense(3)

    def initial_state(self, batch_size):
        return ()

    def __call__(self, inputs, state):
        return self._layer(inputs), state


def _branches(inputs, state):
    if tf.reduce_sum(inputs) > 0:
        return inputs, state
    return -inputs, state


MISTAKES = {
    'no_module': (lambda: lambda inputs, state: (inputs, state), 'makes function, and it must be'),
    'keras': (KerasCore, r"has the variable '.*kernel.*' outside of Sonnet modules"),
    'raises': (
        own(lambda inputs, state: (inputs @ inputs, state)),
        r'fails with features of float32 \[2, 5\]: InvalidArgumentError: .* \(core_test.py, line ',
    ),
    'initial_state_raises': (
        own(lambda inputs, state: (inputs, state), lambda size: [][size]),
        r'fails with a batch of 2: IndexError: .* \(core_test.py, line \d+\)',
    ),
    'a_state_without_rows': (
        own(lambda inputs, state: (inputs, state), lambda size: tf.zeros([7])),
        r'has an initial state of float32 \[7\] for a batch of 2.* \[2, \.\.\.\] \(core_test.py, ',
    ),
    'a_state_of_integers': (
        own(lambda inputs, state: (inputs, state), lambda size: (tf.zeros([size], tf.int32),)),
        r'has an initial state of \(int32 \[2\],\) for',
    ),
    'no_pair': (
        own(lambda inputs, state: inputs),
        'returns EagerTensor, and it must return a pair',
    ),
    'outputs_of_rank_3': (
        own(lambda inputs, state: (inputs[..., tf.newaxis], state)),
        r'returns outputs of float32 \[2, 5, 1\] for .*must be float32 \[2, H\] \(core_test.py, li',
    ),
    'outputs_of_the_wrong_type': (
        own(lambda inputs, state: (tf.cast(inputs, tf.bfloat16), state)),
        r'returns outputs of bfloat16 \[2, 5\] for',
    ),
    'a_state_that_grows': (
        own(lambda inputs, state: (inputs, tf.concat([state, inputs], 1))),
        r'turns a state of float32 \[2, 2\] into one of float32 \[2, 7\], and .* \(core_test.py, l',
    ),
    'another_structure': (
        own(lambda inputs, state: (inputs, {'a': state})),
        r'turns a state of float32 \[2, 2\] into one of \{a: float32 \[2, 2\]\}, and structure',
    ),
    'a_branch': (
        own(_branches),
        'fails with batches of unknown size in a graph: .* '
        rf'\(core_test.py, line {inspect.getsourcelines(_branches)[1] + 1}\)',
    ),
    'a_known_batch': (
        own(lambda inputs, state: (inputs + tf.zeros([int(inputs.shape[0]), 1]), state)),
        r'fails with batches of unknown size in a graph: TypeError: .* \(core_test.py, line \d+\)',
    ),
}
for _name, (_make, _) in MISTAKES.items():
    globals()[_name] = _make


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_in_own_cores_are_one_sentence(name):
    sentence = rf'^--core={__name__}:{name} {MISTAKES[name][1]}.*\.$'
    with pytest.raises(ValueError, match=sentence) as caught:
        OwnCore(f'{__name__}:{name}', 5)
    assert '\n' not in str(caught.value)


def test_unknown_cores_are_refused():
    with pytest.raises(ValueError, match="Unknown core 'big'; choose one of lstm, gru, none."):
        create_core('big', 5, 4)
    with pytest.raises(ValueError, match="--core=math:Missing: the Python module 'math' has no"):
        create_core('math:Missing', 5, 4)
    assert create_core('none', 5, 4) is None
