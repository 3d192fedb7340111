"""An LSTM whose time steps share everything that does not wait for the step before.

The equations and parameters are those of `snt.LSTM` (Zaremba et al., 2014, forget bias 1). It is
split in two: `project` handles the inputs of any number of steps in one matrix product, and
`step` or `unroll` add what depends on the state. Letters: T steps, B batch size, H hidden size.
"""

import sonnet as snt
import tensorflow as tf


class LSTM(snt.Module):
    """An LSTM with `snt.LSTM`'s parameters.

    Attributes:
      w_i: f32 `[input_size, 4 H]`: input gate, forget gate, cell update, output gate.
      w_h: f32 `[H, 4 H]`, of the hidden state before.
      b: f32 `[4 H]`.
    """

    def __init__(self, input_size: int, hidden_size: int, name: str | None = None):
        super().__init__(name)
        self.hidden_size = hidden_size
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
        zeros = tf.zeros([batch_size, self.hidden_size])
        return snt.LSTMState(hidden=zeros, cell=zeros)

    def project(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the share of inputs, f32 `[N, input_size]`, in all gates, f32 `[N, 4 H]`."""
        return tf.nn.bias_add(tf.matmul(inputs, self.w_i), self.b)

    def step(self, projected: tf.Tensor, state: snt.LSTMState) -> snt.LSTMState:
        """Returns the state, whose `hidden` is the output, after one step.

        Args:
          projected: f32 `[B, 4 H]`, from `project`.
          state: f32 `[B, H]` each, before the step.
        """
        return _step(projected, state, tf.convert_to_tensor(self.w_h))

    def unroll(
        self, projected: tf.Tensor, reset: tf.Tensor, state: snt.LSTMState
    ) -> tuple[tf.Tensor, snt.LSTMState]:
        """Runs over a sequence, starting afresh wherever `reset` is set.

        Args:
          projected: f32 `[T, B, 4 H]`, from `project`; T must be known.
          reset: bool `[T, B]`; where True the state is zero before that step.
          state: f32 `[B, H]` each, before the first step.

        Returns:
          The outputs, f32 `[T, B, H]`, and the state after the last step.
        """
        w_h = tf.convert_to_tensor(self.w_h)
        keep = tf.cast(tf.logical_not(reset), tf.float32)[..., tf.newaxis]
        outputs = []
        for projected_t, keep_t in zip(tf.unstack(projected), tf.unstack(keep), strict=True):
            state = snt.LSTMState(hidden=state.hidden * keep_t, cell=state.cell * keep_t)
            state = _step(projected_t, state, w_h)
            outputs.append(state.hidden)
        return tf.stack(outputs), state


def _step(projected: tf.Tensor, state: snt.LSTMState, w_h: tf.Tensor) -> snt.LSTMState:
    i, f, g, o = tf.split(projected + tf.matmul(state.hidden, w_h), 4, axis=-1)
    cell = tf.sigmoid(f) * state.cell + tf.sigmoid(i) * tf.tanh(g)
    return snt.LSTMState(hidden=tf.sigmoid(o) * tf.tanh(cell), cell=cell)
