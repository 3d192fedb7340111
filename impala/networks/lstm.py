"""An LSTM that computes everything but its recurrence for all time steps at once.

The equations and parameters are those of `snt.LSTM` (Zaremba et al., 2014, forget bias 1). It is
split in two: `project` handles the inputs of any number of steps in one matrix product, and
`step` or `unroll` add what depends on the state. Letters: T steps, B batch size, H hidden size.
"""

from typing import Any, NamedTuple

import sonnet as snt
import tensorflow as tf

from impala.trajectory import ArraySpec


class LSTM(snt.Module):
    """An LSTM with `snt.LSTM`'s parameters; an `impala.networks.core.UnrolledCore`.

    Attributes:
      output_size: H.
      state_spec: `snt.LSTMState` of `ArraySpec` `[H]`.
      w_i: f32 `[input_size, 4 H]`: input gate, forget gate, cell update, output gate.
      w_h: f32 `[H, 4 H]`, of the previous hidden state.
      b: f32 `[4 H]`.
    """

    def __init__(self, input_size: int, hidden_size: int, name: str | None = None):
        super().__init__(name)
        self.output_size = hidden_size
        array = ArraySpec((hidden_size,), 'float32')
        self.state_spec = snt.LSTMState(hidden=array, cell=array)
        normal = snt.initializers.TruncatedNormal
        self.w_i = tf.Variable(
            normal(stddev=input_size**-0.5)([input_size, 4 * hidden_size], tf.float32), name='w_i'
        )
        self.w_h = tf.Variable(
            normal(stddev=hidden_size**-0.5)([hidden_size, 4 * hidden_size], tf.float32), name='w_h'
        )
        zeros = tf.zeros([hidden_size])
        self.b = tf.Variable(tf.concat([zeros, zeros + 1.0, zeros, zeros], 0), name='b')

    def initial_state(self, batch_size: int | tf.Tensor) -> snt.LSTMState:
        """Returns zeros, f32 `[B, H]` each."""
        zeros = tf.zeros([batch_size, self.output_size])
        return snt.LSTMState(hidden=zeros, cell=zeros)

    def project(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns what inputs, f32 `[N, input_size]`, add to all gates, f32 `[N, 4 H]`."""
        return tf.nn.bias_add(tf.matmul(inputs, self.w_i), self.b)

    def step(self, projected: tf.Tensor, state: snt.LSTMState) -> tuple[tf.Tensor, snt.LSTMState]:
        """Returns the output, f32 `[B, H]`, and the state after one step.

        Args:
          projected: f32 `[B, 4 H]`, from `project`.
          state: f32 `[B, H]` each, before the step.
        """
        hidden, cell, _ = _step(projected, state.hidden, state.cell, self.w_h)
        return hidden, snt.LSTMState(hidden=hidden, cell=cell)

    def unroll(
        self, projected: tf.Tensor, reset: tf.Tensor, state: snt.LSTMState
    ) -> tuple[tf.Tensor, snt.LSTMState]:
        """Runs over a sequence, restarting wherever `reset` is set.

        Args:
          projected: f32 `[T, B, 4 H]`, from `project`.
          reset: bool `[T, B]`; where True the state is zero before that step, even if it was NaN
            or infinite.
          state: f32 `[B, H]` each, before the first step.

        Returns:
          The outputs, f32 `[T, B, H]`, and the state after the last step.
        """
        keep = tf.cast(tf.logical_not(reset), tf.float32)[..., tf.newaxis]
        w_h = tf.convert_to_tensor(self.w_h)
        outputs, hidden, cell = _unroll(projected, keep, state.hidden, state.cell, w_h)
        return outputs, snt.LSTMState(hidden=hidden, cell=cell)


def _step(
    projected: tf.Tensor, hidden: tf.Tensor, cell: tf.Tensor, w_h: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns hidden state and cell after a step, and the gates before their nonlinearities."""
    gates = projected + tf.matmul(hidden, w_h)
    i, f, g, o = tf.split(gates, 4, axis=-1)
    cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
    return tf.sigmoid(o) * tf.tanh(cell), cell, gates


# Automatic differentiation would compute all derivatives, and add up a gradient of the weights,
# step by step. Here only the errors of hidden state and cell go back step by step; everything else
# is one operation over all steps. This takes less than half of the time.
@tf.custom_gradient
def _unroll(
    projected: tf.Tensor, keep: tf.Tensor, hidden_0: tf.Tensor, cell_0: tf.Tensor, w_h: tf.Tensor
) -> Any:
    """Returns the outputs `[T, B, H]`, and hidden state and cell after the last step `[B, H]`.

    Args:
      projected: f32 `[T, B, 4 H]`.
      keep: f32 `[T, B, 1]`, factor of the state before each step, 0 or 1; where 0, neither state
        nor gradient passes, not even NaN. No gradient flows into `keep`.
      hidden_0: f32 `[B, H]`, before the first step.
      cell_0: f32 `[B, H]`.
      w_h: f32 `[H, 4 H]`.
    """
    size = w_h.shape[0]
    hiddens, cells, gates, hidden_last, cell_last = _forward(projected, keep, hidden_0, cell_0, w_h)

    def gradient(d_hiddens, d_hidden_last, d_cell_last):
        hiddens_before = select(tf.concat([hidden_0[tf.newaxis], hiddens[:-1]], 0), keep)
        cells_before = select(tf.concat([cell_0[tf.newaxis], cells[:-1]], 0), keep)
        derivatives = _derivatives(gates, cells, cells_before, keep)
        d_projected, d_hidden_0, d_cell_0 = _backward(
            derivatives, keep, w_h, d_hiddens, d_hidden_last, d_cell_last
        )
        d_w_h = tf.matmul(
            tf.reshape(hiddens_before, [-1, size]),
            tf.reshape(d_projected, [-1, 4 * size]),
            transpose_a=True,
        )
        return d_projected, None, d_hidden_0, d_cell_0, d_w_h

    return (hiddens, hidden_last, cell_last), gradient


def select(value: tf.Tensor, keep: tf.Tensor) -> tf.Tensor:
    """Returns `value * keep`, or 0 where `keep` is 0, even if the value is NaN or infinite.

    There a product would be NaN: what is not finite must not pass from one episode to another.
    """
    return tf.math.multiply_no_nan(value, keep)


def _forward(
    projected: tf.Tensor, keep: tf.Tensor, hidden_0: tf.Tensor, cell_0: tf.Tensor, w_h: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Runs over all steps; the arguments are those of `_unroll`.

    Returns:
      After each step the hidden state and the cell, f32 `[T, B, H]`, and the gates before their
      nonlinearities, f32 `[T, B, 4 H]`; hidden state and cell after the last step, f32 `[B, H]`.
    """
    steps = tf.shape(projected)[0]
    row = tf.TensorShape([None, w_h.shape[0]])

    def step(t, hidden, cell, hiddens, cells, gates):
        hidden, cell, gates_t = _step(
            projected[t], select(hidden, keep[t]), select(cell, keep[t]), w_h
        )
        return (
            t + 1,
            hidden,
            cell,
            hiddens.write(t, hidden),
            cells.write(t, cell),
            gates.write(t, gates_t),
        )

    arrays = [tf.TensorArray(tf.float32, steps) for _ in range(3)]
    _, hidden_last, cell_last, *arrays = tf.while_loop(
        lambda t, *_: t < steps,
        step,
        (0, hidden_0, cell_0, *arrays),
        shape_invariants=(tf.TensorShape([]), row, row, *[tf.TensorShape(None)] * 3),
        parallel_iterations=1,
    )
    hiddens, cells, gates = (array.stack() for array in arrays)
    return hiddens, cells, gates, hidden_last, cell_last


class _Derivatives(NamedTuple):
    """Derivatives within each step.

    Attributes:
      by_gates: f32 `[T, B, 4 H]`, of the cell by its three gates, and of the hidden state by the
        output gate.
      hidden_by_cell: f32 `[T, B, H]`, of the hidden state by the cell.
      cell_by_cell: f32 `[T, B, H]`, of the cell by the previous cell.
    """

    by_gates: tf.Tensor
    hidden_by_cell: tf.Tensor
    cell_by_cell: tf.Tensor


def _derivatives(
    gates: tf.Tensor, cells: tf.Tensor, cells_before: tf.Tensor, keep: tf.Tensor
) -> _Derivatives:
    """Computes the derivatives of all steps at once.

    Args:
      gates: f32 `[T, B, 4 H]`, before their nonlinearities.
      cells: f32 `[T, B, H]`, after each step.
      cells_before: f32 `[T, B, H]`, before each step.
      keep: see `_unroll`.
    """
    i, f, g, o = tf.split(gates, 4, axis=-1)
    i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
    tanh_cells = tf.tanh(cells)
    by_gates = tf.concat(
        [
            g * i * (1 - i),
            cells_before * f * (1 - f),
            i * (1 - g * g),
            tanh_cells * o * (1 - o),
        ],
        -1,
    )
    return _Derivatives(by_gates, o * (1 - tanh_cells * tanh_cells), select(f, keep))


def _backward(
    derivatives: _Derivatives,
    keep: tf.Tensor,
    w_h: tf.Tensor,
    d_hiddens: tf.Tensor,
    d_hidden_last: tf.Tensor,
    d_cell_last: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Propagates the errors of hidden state and cell from the last step to the first.

    Args:
      derivatives: from `_derivatives`.
      keep: see `_unroll`.
      w_h: see `_unroll`.
      d_hiddens: f32 `[T, B, H]`, error of each output.
      d_hidden_last: f32 `[B, H]`, error of the hidden state after the last step.
      d_cell_last: f32 `[B, H]`, error of the cell after the last step.

    Returns:
      The errors of the gates, f32 `[T, B, 4 H]`, and of hidden state and cell before the first
      step, f32 `[B, H]`.
    """
    steps = tf.shape(d_hiddens)[0]
    row = tf.TensorShape([None, w_h.shape[0]])
    w_h_transposed = tf.transpose(w_h)

    def step(t, d_hidden, d_cell, d_gates):
        d_hidden += d_hiddens[t]
        d_cell += d_hidden * derivatives.hidden_by_cell[t]
        d_gates_t = tf.concat([d_cell, d_cell, d_cell, d_hidden], -1) * derivatives.by_gates[t]
        return (
            t - 1,
            select(tf.matmul(d_gates_t, w_h_transposed), keep[t]),
            select(d_cell, derivatives.cell_by_cell[t]),
            d_gates.write(t, d_gates_t),
        )

    _, d_hidden_0, d_cell_0, d_gates = tf.while_loop(
        lambda t, *_: t >= 0,
        step,
        (steps - 1, d_hidden_last, d_cell_last, tf.TensorArray(tf.float32, steps)),
        shape_invariants=(tf.TensorShape([]), row, row, tf.TensorShape(None)),
        parallel_iterations=1,
    )
    return d_gates.stack(), d_hidden_0, d_cell_0
