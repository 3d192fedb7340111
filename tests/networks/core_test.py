"""Tests of the LSTM against `snt.LSTM`, one step at a time."""

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from impala.networks import core as lstm

T, B, INPUTS, HIDDEN = 6, 3, 5, 4


def sonnet_unroll(core, inputs, reset, state):
    """Returns outputs and last state of `snt.LSTM`, with the state reset where `reset` is set."""
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


@pytest.fixture
def cores():
    """Returns our LSTM and Sonnet's with the same random weights."""
    tf.random.set_seed(1)
    ours = lstm.LSTM(INPUTS, HIDDEN)
    ours.b.assign(tf.random.normal([4 * HIDDEN]))
    theirs = snt.LSTM(HIDDEN)
    theirs(tf.zeros([1, INPUTS]), theirs.initial_state(1))
    theirs.input_to_hidden.assign(ours.w_i)
    theirs.hidden_to_hidden.assign(ours.w_h)
    theirs.b.assign(ours.b)
    return ours, theirs


@pytest.fixture
def sequence():
    """Returns inputs, resets and a random state."""
    rng = np.random.default_rng(2)
    inputs = tf.constant(rng.normal(size=(T, B, INPUTS)), tf.float32)
    reset = tf.constant(
        [
            [True, False, False],
            [False, False, False],
            [False, True, False],
            [False, True, False],
            [False, False, False],
            [True, False, False],
        ]
    )
    state = snt.LSTMState(*(tf.constant(rng.normal(size=(2, B, HIDDEN)), tf.float32)))
    return inputs, reset, state


def our_unroll(core, inputs, reset, state):
    projected = core.project(tf.reshape(inputs, [-1, INPUTS]))
    return core.unroll(tf.reshape(projected, [*inputs.shape[:2], -1]), reset, state)


def test_a_step_equals_sonnets(cores, sequence):
    ours, theirs = cores
    inputs, _, state = sequence
    new_state = ours.step(ours.project(inputs[0]), state)
    output, expected = theirs(inputs[0], state)
    np.testing.assert_allclose(new_state.hidden, output, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_state.cell, expected.cell, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('in_graph', [False, True])
def test_unroll_and_its_gradients_equal_sonnets_steps(cores, sequence, in_graph):
    ours, theirs = cores
    inputs, reset, state = sequence
    weights = tf.random.stateless_normal([T, B, HIDDEN], [3, 4])

    def run(unroll, core, variables):
        def compute(inputs, state):
            with tf.GradientTape() as tape:
                sources = (variables, inputs, tuple(state))
                tape.watch(sources)
                outputs, last = unroll(core, inputs, reset, state)
                # Every output takes part, each with its own weight.
                loss = tf.reduce_sum(outputs * weights)
                loss += tf.reduce_sum(tf.sin(last.hidden)) + tf.reduce_sum(last.cell**2)
            return outputs, last, tape.gradient(loss, sources)

        return (tf.function(compute) if in_graph else compute)(inputs, state)

    actual = run(our_unroll, ours, [ours.w_i, ours.w_h, ours.b])
    expected = run(
        sonnet_unroll, theirs, [theirs.input_to_hidden, theirs.hidden_to_hidden, theirs.b]
    )
    for mine, other in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_nan_does_not_spread_beyond_resets(cores, sequence):
    ours, _ = cores
    inputs, _, state = sequence
    # The second column is reset only right before and right after its broken row.
    reset = np.zeros([T, B], bool)
    reset[2, 1] = reset[3, 1] = True
    projected = ours.project(tf.reshape(inputs, [-1, INPUTS])).numpy().reshape([T, B, -1])
    broken = projected.copy()
    broken[2, 1] = np.nan

    @tf.function
    def run(projected):
        with tf.GradientTape() as tape:
            tape.watch([projected, *state])
            outputs, last = ours.unroll(projected, tf.constant(reset), state)
            loss = tf.reduce_sum(tf.sin(outputs)) + tf.reduce_sum(last.cell**2)
        return outputs, last, tape.gradient(loss, [projected, *state])

    outputs, last, (d_projected, *d_state) = run(tf.constant(broken))
    expected, expected_last, (expected_d_projected, *expected_d_state) = run(tf.constant(projected))
    assert np.isnan(outputs[2, 1]).all() and np.isnan(d_projected[2, 1]).all()
    others = np.ones([T, B], bool)
    others[2, 1] = False
    np.testing.assert_allclose(outputs[others], expected[others], rtol=1e-6)
    np.testing.assert_allclose(d_projected[others], expected_d_projected[others], rtol=1e-5)
    for mine, other in zip([*last, *d_state], [*expected_last, *expected_d_state], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_broken_state_does_not_matter_after_a_reset(cores, sequence, bad):
    ours, _ = cores
    inputs, reset, state = sequence
    assert reset[0, 0] and not reset[0, 1]
    broken = snt.LSTMState(
        *(tf.tensor_scatter_nd_update(s, [[0]], [[bad] * HIDDEN]) for s in state)
    )

    def run(state):
        with tf.GradientTape() as tape:
            sources = [ours.w_i, ours.w_h, ours.b, *state]
            tape.watch(sources)
            outputs, last = our_unroll(ours, inputs, reset, state)
            loss = tf.reduce_sum(tf.sin(outputs)) + tf.reduce_sum(last.cell**2)
        return outputs, last, tape.gradient(loss, sources)

    for mine, other in zip(tf.nest.flatten(run(broken)), tf.nest.flatten(run(state)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_unroll_takes_unknown_sizes(cores, sequence):
    ours, _ = cores
    inputs, reset, state = sequence
    projected = tf.reshape(ours.project(tf.reshape(inputs, [-1, INPUTS])), [T, B, -1])
    specs = [
        tf.TensorSpec([None, None, 4 * HIDDEN]),
        tf.TensorSpec([None, None], tf.bool),
        snt.LSTMState(*[tf.TensorSpec([None, HIDDEN])] * 2),
    ]
    outputs, last = tf.function(ours.unroll, input_signature=specs)(projected, reset, state)
    expected, expected_last = ours.unroll(projected, reset, state)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last.cell, expected_last.cell, rtol=1e-5, atol=1e-6)


def test_initial_weights_are_distributed_like_sonnets():
    ours = lstm.LSTM(100, 25)
    for weights, fan_in in ((ours.w_i, 100), (ours.w_h, 25)):
        assert np.std(weights) == pytest.approx(0.88 / np.sqrt(fan_in), rel=0.1)
    np.testing.assert_array_equal(ours.b, np.repeat([0.0, 1.0, 0.0, 0.0], 25))
