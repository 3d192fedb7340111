"""A GRU that computes everything but its recurrence for all time steps at once.

The equations and parameters are those of `snt.GRU` (Chung et al., 2014,
https://arxiv.org/abs/1412.3555): with the state h, the update gate z and the reset gate r,

    z, r = sigmoid(x W_i + h W_h + b)
    a = tanh(x W_i + (r h) W_h + b)
    h' = (1 - z) h + z a

with the columns of `W_i`, `W_h` and `b` that belong to each. It is split like `LSTM`: `project`
handles the inputs of any number of steps in one matrix product, and `step` or `unroll` add what
depends on the state. Letters: T steps, B batch size, H hidden size.
"""

from typing import Any, NamedTuple

import sonnet as snt
import tensorflow as tf

from impala.networks.lstm import select
from impala.trajectory import ArraySpec


class GRU(snt.Module):
    """A GRU with `snt.GRU`'s parameters; an `impala.networks.core.UnrolledCore`.

    Weights start as those of `LSTM` do, biases with zeros.

    Attributes:
      output_size: H.
      state_spec: `ArraySpec` `[H]`.
      w_i: f32 `[input_size, 3 H]`: update gate, reset gate, candidate.
      w_h: f32 `[H, 3 H]`, of the previous state.
      b: f32 `[3 H]`.
    """

    def __init__(self, input_size: int, hidden_size: int, name: str | None = None):
        super().__init__(name)
        self.output_size = hidden_size
        self.state_spec = ArraySpec((hidden_size,), 'float32')
        normal = snt.initializers.TruncatedNormal
        self.w_i = tf.Variable(
            normal(stddev=input_size**-0.5)([input_size, 3 * hidden_size], tf.float32), name='w_i'
        )
        self.w_h = tf.Variable(
            normal(stddev=hidden_size**-0.5)([hidden_size, 3 * hidden_size], tf.float32), name='w_h'
        )
        self.b = tf.Variable(tf.zeros([3 * hidden_size]), name='b')

    def initial_state(self, batch_size: int | tf.Tensor) -> tf.Tensor:
        """Returns zeros, f32 `[B, H]`."""
        return tf.zeros([batch_size, self.output_size])

    def project(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns what inputs, f32 `[N, input_size]`, add to gates and candidate, `[N, 3 H]`."""
        return tf.nn.bias_add(tf.matmul(inputs, self.w_i), self.b)

    def step(self, projected: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the output, f32 `[B, H]`, and the state after one step, which are the same.

        Args:
          projected: f32 `[B, 3 H]`, from `project`.
          state: f32 `[B, H]`, before the step.
        """
        hidden, _, _ = _step(projected, state, *self._recurrent_weights())
        return hidden, hidden

    def unroll(
        self, projected: tf.Tensor, reset: tf.Tensor, state: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs over a sequence, restarting wherever `reset` is set.

        Args:
          projected: f32 `[T, B, 3 H]`, from `project`.
          reset: bool `[T, B]`; where True the state is zero before that step, even if it was NaN
            or infinite.
          state: f32 `[B, H]`, before the first step.

        Returns:
          The outputs, f32 `[T, B, H]`, and the state after the last step.
        """
        keep = tf.cast(tf.logical_not(reset), tf.float32)[..., tf.newaxis]
        return _unroll(projected, keep, state, *self._recurrent_weights())

    def _recurrent_weights(self) -> list[tf.Tensor]:
        """Returns the weights of the gates, f32 `[H, 2 H]`, and of the candidate, f32 `[H, H]`."""
        return tf.split(self.w_h, [2 * self.output_size, self.output_size], axis=-1)


def _step(
    projected: tf.Tensor, hidden: tf.Tensor, w_gates: tf.Tensor, w_candidate: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the state after a step, its gates f32 `[B, 2 H]`, and its candidate f32 `[B, H]`."""
    size = hidden.shape[-1]
    of_gates, of_candidate = tf.split(projected, [2 * size, size], axis=-1)
    gates = tf.sigmoid(of_gates + tf.matmul(hidden, w_gates))
    z, r = tf.split(gates, 2, axis=-1)
    candidate = tf.tanh(of_candidate + tf.matmul(r * hidden, w_candidate))
    return (1 - z) * hidden + z * candidate, gates, candidate


# As in the LSTM, only the error of the state goes back step by step; the gradients of the weights
# are each one product over all steps.
@tf.custom_gradient
def _unroll(
    projected: tf.Tensor,
    keep: tf.Tensor,
    hidden_0: tf.Tensor,
    w_gates: tf.Tensor,
    w_candidate: tf.Tensor,
) -> Any:
    """Returns the outputs `[T, B, H]`, and the state after the last step `[B, H]`.

    Args:
      projected: f32 `[T, B, 3 H]`.
      keep: f32 `[T, B, 1]`, factor of the state before each step, 0 or 1; where 0, neither state
        nor gradient passes, not even NaN. No gradient flows into `keep`.
      hidden_0: f32 `[B, H]`, before the first step.
      w_gates: f32 `[H, 2 H]`.
      w_candidate: f32 `[H, H]`.
    """
    size = w_candidate.shape[0]
    hiddens, gates, candidates, hidden_last = _forward(
        projected, keep, hidden_0, w_gates, w_candidate
    )

    def gradient(d_hiddens, d_hidden_last):
        before = select(tf.concat([hidden_0[tf.newaxis], hiddens[:-1]], 0), keep)
        z, r = tf.split(gates, 2, axis=-1)
        derivatives = _Derivatives(
            by_z=(candidates - before) * z * (1 - z),
            by_candidate=z * (1 - candidates * candidates),
            by_hidden=1 - z,
            reset_by_r=before * r * (1 - r),
            reset_by_hidden=r,
        )
        d_projected, d_hidden_0 = _backward(
            derivatives, keep, w_gates, w_candidate, d_hiddens, d_hidden_last
        )
        d_gates, d_candidates = tf.split(d_projected, [2 * size, size], axis=-1)

        def product(inputs, errors):
            errors = tf.reshape(errors, [-1, errors.shape[-1]])
            return tf.matmul(tf.reshape(inputs, [-1, size]), errors, transpose_a=True)

        d_w_gates, d_w_candidate = product(before, d_gates), product(r * before, d_candidates)
        return d_projected, None, d_hidden_0, d_w_gates, d_w_candidate

    return (hiddens, hidden_last), gradient


def _forward(
    projected: tf.Tensor,
    keep: tf.Tensor,
    hidden_0: tf.Tensor,
    w_gates: tf.Tensor,
    w_candidate: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Runs over all steps; the arguments are those of `_unroll`.

    Returns:
      Of each step the state after it, f32 `[T, B, H]`, the gates, f32 `[T, B, 2 H]`, and the
      candidate, f32 `[T, B, H]`; and the state after the last step, f32 `[B, H]`.
    """
    steps = tf.shape(projected)[0]

    def step(t, hidden, hiddens, gates, candidates):
        hidden, gates_t, candidate = _step(
            projected[t], select(hidden, keep[t]), w_gates, w_candidate
        )
        return (
            t + 1,
            hidden,
            hiddens.write(t, hidden),
            gates.write(t, gates_t),
            candidates.write(t, candidate),
        )

    arrays = [tf.TensorArray(tf.float32, steps) for _ in range(3)]
    _, hidden_last, *arrays = tf.while_loop(
        lambda t, *_: t < steps,
        step,
        (0, hidden_0, *arrays),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, w_candidate.shape[0]]),
            *[tf.TensorShape(None)] * 3,
        ),
        parallel_iterations=1,
    )
    hiddens, gates, candidates = (array.stack() for array in arrays)
    return hiddens, gates, candidates, hidden_last


class _Derivatives(NamedTuple):
    """Derivatives within each step, f32 `[T, B, H]` each.

    Attributes:
      by_z: of the state after the step, by the update gate's input.
      by_candidate: the same, by the candidate's input.
      by_hidden: the same, by the state before the step, directly.
      reset_by_r: of `r h`, by the reset gate's input.
      reset_by_hidden: of `r h`, by the state before the step.
    """

    by_z: tf.Tensor
    by_candidate: tf.Tensor
    by_hidden: tf.Tensor
    reset_by_r: tf.Tensor
    reset_by_hidden: tf.Tensor


def _backward(
    derivatives: _Derivatives,
    keep: tf.Tensor,
    w_gates: tf.Tensor,
    w_candidate: tf.Tensor,
    d_hiddens: tf.Tensor,
    d_hidden_last: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Propagates the error of the state from the last step to the first.

    Args:
      derivatives: of all steps.
      keep: see `_unroll`.
      w_gates: see `_unroll`.
      w_candidate: see `_unroll`.
      d_hiddens: f32 `[T, B, H]`, error of each output.
      d_hidden_last: f32 `[B, H]`, error of the state after the last step.

    Returns:
      The errors of the inputs of gates and candidate, f32 `[T, B, 3 H]`, and of the state before
      the first step, f32 `[B, H]`.
    """
    steps = tf.shape(d_hiddens)[0]
    w_gates, w_candidate = tf.transpose(w_gates), tf.transpose(w_candidate)

    def step(t, d_hidden, d_projected):
        d_hidden += d_hiddens[t]
        d_candidate = d_hidden * derivatives.by_candidate[t]
        # Of the product `r h`, which only the candidate depends on.
        d_reset = tf.matmul(d_candidate, w_candidate)
        d_gates = tf.concat(
            [d_hidden * derivatives.by_z[t], d_reset * derivatives.reset_by_r[t]], -1
        )
        d_before = d_hidden * derivatives.by_hidden[t] + d_reset * derivatives.reset_by_hidden[t]
        d_before += tf.matmul(d_gates, w_gates)
        return (
            t - 1,
            select(d_before, keep[t]),
            d_projected.write(t, tf.concat([d_gates, d_candidate], -1)),
        )

    _, d_hidden_0, d_projected = tf.while_loop(
        lambda t, *_: t >= 0,
        step,
        (steps - 1, d_hidden_last, tf.TensorArray(tf.float32, steps)),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, w_candidate.shape[0]]),
            tf.TensorShape(None),
        ),
        parallel_iterations=1,
    )
    return d_projected.stack(), d_hidden_0
