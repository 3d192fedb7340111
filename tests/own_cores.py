"""Cores as users write them, for `--core=own_cores:...`."""

import sonnet as snt
import tensorflow as tf


class Stack(snt.DeepRNN):
    """Two layers whose states are of different kinds."""

    def __init__(self):
        super().__init__([snt.LSTM(4), tf.tanh, snt.VanillaRNN(4)])


class Started(snt.Module):
    """Adds its inputs up; an episode begins with learned numbers, not with zeros."""

    def __init__(self):
        super().__init__()
        self._embed = snt.Linear(4)
        self.start = tf.Variable(tf.range(1.0, 5.0))

    def initial_state(self, batch_size):
        return {'sum': tf.tile(self.start[tf.newaxis], [batch_size, 1])}

    def __call__(self, inputs, state):
        total = state['sum'] + self._embed(inputs)
        return total, {'sum': total}


@snt.allow_empty_variables
class Stateless(snt.Module):
    """Remembers nothing."""

    def initial_state(self, batch_size):
        return ()

    def __call__(self, inputs, state):
        return inputs[:, :4], state


class Fixed(snt.Module):
    """Random features, which are not trained, and a layer on them, which is."""

    def __init__(self):
        super().__init__()
        self._features = tf.Variable(tf.random.normal([1, 8]), trainable=False)
        self._layer = snt.Linear(4)

    def initial_state(self, batch_size):
        return ()

    def __call__(self, inputs, state):
        return self._layer(tf.sin(tf.reduce_sum(inputs, 1, keepdims=True) * self._features)), state
