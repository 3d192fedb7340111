"""A torso and a loss as users write them, for `--torso` and `--loss`."""

import sonnet as snt
import tensorflow as tf

from impala.learning.losses import appo_loss


class Flat(snt.Module):
    """A linear layer on all pixels or numbers."""

    def __init__(self):
        super().__init__()
        self._layer = snt.Sequential([snt.Flatten(), snt.Linear(16), tf.nn.relu])

    def __call__(self, observations):
        return self._layer(observations)


def renamed_loss(inputs, config):
    """Asynchronous PPO's loss, with one more part."""
    loss = appo_loss(inputs, config)
    return loss._replace(parts={**loss.parts, 'own': loss.total})
