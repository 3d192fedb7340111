"""PopArt: values normalized per level, so that levels with large rewards do not dominate.

Hessel et al., "Multi-task Deep Reinforcement Learning with PopArt", 2019
(https://arxiv.org/abs/1809.04474), after van Hasselt et al., "Learning values across many orders of
magnitude", 2016. Letters: T unroll length, B batch size, L levels, F features, N rows.
"""

from collections.abc import Sequence

import sonnet as snt
import tensorflow as tf

from impala.networks import torsos
from impala.networks.normalizer import assign

STEP_SIZE = 3e-4
MIN_STDDEV = 1e-4
MAX_STDDEV = 1e6


class PopArt(snt.Module):
    """The last layer of the baseline, with one output and its statistics for each level.

    An output n stands for the value `stddev * n + mean` of its level. Whenever the statistics
    change, the layer's weights change so that these values stay the same.

    Attributes:
      mean: f64 variable `[L]`, mu, of the V-trace targets of each level; starts at 0.
      second_moment: f64 variable `[L]`, nu, mean of their squares; starts at 1. Both are float64
        because the variance is a small difference of large numbers.
    """

    def __init__(self, input_size: int, num_levels: int, name: str = 'popart'):
        """Makes all variables.

        Args:
          input_size: F.
          num_levels: L, at least 1.
          name: of the module.
        """
        super().__init__(name)
        self._num_levels = num_levels
        self._linear = torsos.Linear(input_size, num_levels)
        self.mean = tf.Variable(tf.zeros([num_levels], tf.float64), trainable=False, name='mean')
        self.second_moment = tf.Variable(
            tf.ones([num_levels], tf.float64), trainable=False, name='second_moment'
        )

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Returns normalized values for each level, f32 `[N, L]`, of features f32 `[N, F]`."""
        return self._linear(x)

    def stddev(self, level_id: tf.Tensor) -> tf.Tensor:
        """Returns sigma of the levels i32 `[B]`, f32 `[B]`."""
        return tf.cast(tf.gather(_stddev(self.mean, self.second_moment), level_id), tf.float32)

    def statistics(self, level_names: Sequence[str]) -> dict[str, float]:
        """Returns mu and sigma of each level as `popart/mean/LEVEL` and `popart/stddev/LEVEL`.

        Args:
          level_names: L names, in the order of the level ids.
        """
        mean = self.mean.numpy()
        stddev = _stddev(self.mean, self.second_moment).numpy()
        return {
            f'popart/{what}/{name}': float(value)
            for what, values in (('mean', mean), ('stddev', stddev))
            for name, value in zip(level_names, values, strict=True)
        }

    def values(self, normalized: tf.Tensor, level_id: tf.Tensor) -> tf.Tensor:
        """Returns the values that outputs stand for.

        Args:
          normalized: f32 `[T, B, L]`, outputs of the layer.
          level_id: i32 `[B]`, level of each unroll.

        Returns:
          f32 `[T, B]`, values in the units of the rewards; differentiable.
        """
        own = tf.reduce_sum(normalized * tf.one_hot(level_id, self._num_levels), -1)
        mean = tf.cast(tf.gather(self.mean, level_id), tf.float32)
        return self.stddev(level_id) * own + mean

    def moments(
        self, targets: tf.Tensor, level_id: tf.Tensor, is_counted: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Sums up the targets of each level; the caller adds the moments of all replicas.

        Args:
          targets: f32 `[T, B]`, V-trace targets in the units of the rewards.
          level_id: i32 `[B]`.
          is_counted: bool `[T, B]`, the targets that count; None if all do.

        Returns:
          f64 `[L, 3]`: number, sum and sum of squares.
        """
        targets = tf.cast(targets, tf.float64)
        powers = tf.stack([tf.ones_like(targets), targets, tf.square(targets)], -1)
        if is_counted is not None:
            powers = tf.where(is_counted[..., tf.newaxis], powers, 0.0)
        return tf.math.unsorted_segment_sum(tf.reduce_sum(powers, 0), level_id, self._num_levels)

    def update(self, moments: tf.Tensor) -> None:
        """Moves the statistics towards those of a batch, and preserves the values.

        With step size beta, `mu <- (1 - beta) mu + beta E[v]`, `nu <- (1 - beta) nu + beta E[v^2]`
        for the targets v of each level in the batch, and `sigma = sqrt(nu - mu^2)`. Then, for the
        weights and the bias of the level's output, `w <- sigma w / sigma'` and
        `b <- (sigma b + mu - mu') / sigma'`, where ' marks new statistics.

        Args:
          moments: f64 `[L, 3]`, from `moments`.
        """
        old_mean, old_second_moment = self.mean.read_value(), self.second_moment.read_value()
        number, total, squares = tf.unstack(moments, axis=-1)
        step = tf.where(number > 0, tf.constant(STEP_SIZE, tf.float64), 0)
        mean = old_mean + step * (tf.math.divide_no_nan(total, number) - old_mean)
        second_moment = old_second_moment + step * (
            tf.math.divide_no_nan(squares, number) - old_second_moment
        )
        old_stddev, stddev = _stddev(old_mean, old_second_moment), _stddev(mean, second_moment)
        w, b = (tf.cast(v.read_value(), tf.float64) for v in (self._linear.w, self._linear.b))
        assign(self._linear.w, w * (old_stddev / stddev))
        assign(self._linear.b, (old_stddev * b + old_mean - mean) / stddev)
        assign(self.mean, mean)
        assign(self.second_moment, second_moment)


def _stddev(mean: tf.Tensor, second_moment: tf.Tensor) -> tf.Tensor:
    # Rounding may make the variance of equal targets a little negative.
    variance = tf.maximum(second_moment - tf.square(mean), 0.0)
    return tf.clip_by_value(tf.sqrt(variance), MIN_STDDEV, MAX_STDDEV)
