"""An intrinsic reward: random network distillation, for environments with rare rewards.

Burda et al. 2018, https://arxiv.org/abs/1810.12894. A predictor learns to compute what a random
network computes. Where it fails, the observation is new.

How to run it: docs/examples/random_network_distillation.md.
"""

import math

import sonnet as snt
import tensorflow as tf

from impala import Hook
from impala.learning.optimizers.adam import Adam

WEIGHT = 0.2  # Of the intrinsic rewards, whose standard deviation is about 1 before.
LEARNING_RATE = 0.001
SIZES = [128, 128, 64]


class RandomNetworkDistillation(Hook):
    """Adds the predictor's error to the rewards. Of an observation, only `frame` counts."""

    def at_start(self, spec, config):
        """Makes the networks; see `impala.Hook`."""
        self._networks = Networks(math.prod(spec.observation['frame'].shape))

    @property
    def module(self):
        """Saved with the run, so that what is known stays known."""
        return self._networks

    def intrinsic_reward(self, batch):
        """Returns rewards, f32 `[T, B]`."""
        rows = batch.actor_output.env_outputs
        return self._networks.reward(rows.observation['frame'], rows.done)

    def after_update(self, update):
        """Learns once from every new unroll."""
        if update.is_fresh:
            for part in update.batch:
                frames = part.actor_output.env_outputs.observation['frame']
                self._networks.learn(tf.boolean_mask(frames, ~part.is_replayed, axis=1))


class Networks(tf.Module):
    """The random network, its predictor, and the statistics that scale inputs and errors."""

    def __init__(self, num_inputs):
        super().__init__()
        self._random, self._predictor = snt.nets.MLP(SIZES), snt.nets.MLP(SIZES)
        self._inputs, self._errors = Moments([num_inputs]), Moments([])
        self._error(tf.zeros([1, 1, num_inputs]))  # The first call makes the weights.
        self._optimizer = Adam(self._predictor.trainable_variables, 0.9, 0.999, 1e-8)

    @tf.function(autograph=False)
    def reward(self, frames, done):
        """Returns rewards, f32 `[T, B]`, of rows `[T+1, B, ...]`."""
        rewards = WEIGHT * self._error(frames[1:]) / self._errors.stddev()
        # Where an episode has ended, the frame is the first of the next one.
        return tf.where(done[1:], 0.0, rewards)

    @tf.function(autograph=False, reduce_retracing=True)
    def learn(self, frames):
        """Trains the predictor once on frames `[T+1, B, ...]`."""
        self._inputs.add(self._flat(frames[1:]))
        weights = self._predictor.trainable_variables
        with tf.GradientTape() as tape:
            errors = self._error(frames[1:])
            loss = tf.reduce_mean(errors)
        self._errors.add(errors)
        self._optimizer.apply(tape.gradient(loss, weights), weights, LEARNING_RATE)

    def _error(self, frames):
        """Returns mean squared errors, f32 `[T, B]`, of frames `[T, B, ...]`."""
        inputs = self._flat(frames) - self._inputs.mean
        inputs = tf.clip_by_value(inputs / self._inputs.stddev(), -5.0, 5.0)
        differences = snt.BatchApply(self._predictor)(inputs) - tf.stop_gradient(
            snt.BatchApply(self._random)(inputs)
        )
        return tf.reduce_mean(tf.square(differences), -1)

    def _flat(self, frames):
        return tf.cast(snt.Flatten(preserve_dims=2)(frames), tf.float32)


class Moments(tf.Module):
    """The mean and the standard deviation of all values `[T, B, *shape]` so far."""

    def __init__(self, shape):
        super().__init__()
        self._count = tf.Variable(1e-4)
        self.mean, self._variance = tf.Variable(tf.zeros(shape)), tf.Variable(tf.ones(shape))

    def add(self, values):
        """Adds values; Chan et al. 1979, equation (1.5)."""
        mean, variance = tf.nn.moments(values, [0, 1])
        number = tf.cast(tf.reduce_prod(tf.shape(values)[:2]), tf.float32)
        total = self._count + number
        share = number / total
        change = mean - self.mean
        self._variance.assign(
            (1 - share) * self._variance + share * variance + share * (1 - share) * change**2
        )
        self.mean.assign_add(share * change)
        self._count.assign(total)

    def stddev(self):
        """Returns the standard deviation, f32 of the shape."""
        return tf.sqrt(self._variance + 1e-8)
