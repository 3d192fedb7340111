"""A core of one's own: attention to the last steps of the episode.

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, with one head and one layer.

How to run it: docs/examples/own_core.md.
"""

import sonnet as snt
import tensorflow as tf

STEPS = 8
WIDTH = 32


class AttentionMemory(snt.RNNCore):
    """Remembers the features of the last `STEPS` steps; its outputs are the new ones and a mean.

    The mean is weighted by the products of a query, from the new features, and the keys of all.
    """

    def __init__(self, name=None):
        super().__init__(name)
        self._embed = snt.Linear(WIDTH, name='embed')
        self._query = snt.Linear(WIDTH, with_bias=False, name='query')
        self._key = snt.Linear(WIDTH, with_bias=False, name='key')
        self._value = snt.Linear(WIDTH, with_bias=False, name='value')
        self._position = tf.Variable(tf.random.normal([STEPS, WIDTH], stddev=0.1), name='position')

    def initial_state(self, batch_size):
        """Returns an empty memory of B rows."""
        return {
            'features': tf.zeros([batch_size, STEPS, WIDTH]),
            'is_filled': tf.zeros([batch_size, STEPS]),
        }

    def __call__(self, inputs, state):
        """Takes a step; see `impala.networks.core.Core`.

        Args:
          inputs: f32 `[B, F]`.
          state: dict of `features`, f32 `[B, 8, 32]`, the newest last, and `is_filled`, f32
            `[B, 8]`, 0 or 1.

        Returns:
          Outputs, f32 `[B, 64]`, and the new state.
        """
        new = tf.nn.relu(self._embed(inputs))
        features = tf.concat([state['features'][:, 1:], new[:, tf.newaxis]], 1)
        is_filled = tf.concat([state['is_filled'][:, 1:], tf.ones_like(new[:, :1])], 1)
        keys = snt.BatchApply(self._key)(features) + self._position
        logits = tf.einsum('bw,bsw->bs', self._query(new), keys) / WIDTH**0.5
        # Steps before the episode have no weight.
        weights = tf.nn.softmax(logits - 1e9 * (1.0 - is_filled))
        mean = tf.einsum('bs,bsw->bw', weights, snt.BatchApply(self._value)(features))
        return tf.concat([new, mean], 1), {'features': features, 'is_filled': is_filled}
