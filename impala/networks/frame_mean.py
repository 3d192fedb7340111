"""The mean of all frames that were learned from: what a game's background looks like.

Letters: T rows, B batch size, H, W, C frame height, width and channels.
"""

import math

import sonnet as snt
import tensorflow as tf

from impala.networks.normalizer import assign
from impala.trajectory import ArraySpec


class FrameMean(snt.Module):
    """The running mean of the newest frame of a stack.

    Attributes:
      count: f64 variable `[]`, frames that the mean is of.
      mean: f64 variable `[H, W]`, in the unit of the pixels; 0 before the first update. Both are
        float64 because each update changes them less than the ones before.

    Args:
      frame: `[H, W, C]`, whose channels are the last frames, the newest last.
    """

    def __init__(self, frame: ArraySpec, name: str = 'frame_mean'):
        super().__init__(name)
        self.count = tf.Variable(tf.zeros([], tf.float64), trainable=False, name='count')
        self.mean = tf.Variable(tf.zeros(frame.shape[:2], tf.float64), trainable=False, name='mean')

    def summary(self, frames: tf.Tensor, is_counted: tf.Tensor) -> tf.Tensor:
        """Returns the number of a batch's frames and their mean.

        Args:
          frames: `[T, B, H, W, C]`.
          is_counted: bool `[B]`, which unrolls count.

        Returns:
          f64 `[1 + H * W]`: number of frames, then the mean of each pixel.
        """
        # Exact for bytes, up to 65,000 rows.
        sums = tf.cast(tf.reduce_sum(tf.cast(frames[..., -1], tf.float32), 0), tf.float64)
        total = tf.einsum('bhw,b->hw', sums, tf.cast(is_counted, tf.float64))
        rows = tf.shape(frames)[0] * tf.math.count_nonzero(is_counted, dtype=tf.int32)
        number = tf.cast(rows, tf.float64)
        mean = tf.math.divide_no_nan(total, number)
        return tf.concat([number[tf.newaxis], tf.reshape(mean, [-1])], 0)

    def no_summary(self) -> tf.Tensor:
        """Returns the `summary` of no frames."""
        return tf.zeros([1 + math.prod(self.mean.shape)], tf.float64)

    def update(self, summaries: tf.Tensor) -> None:
        """Merges frames into the mean; none leave it as it is.

        Args:
          summaries: f64 `[R, 1 + H * W]`, the result of `summary` of each of R replicas.
        """
        counts, means = summaries[:, 0], tf.reshape(summaries[:, 1:], [-1, *self.mean.shape])
        count = self.count.read_value() + tf.reduce_sum(counts)
        mean = self.mean.read_value()
        shares = tf.math.divide_no_nan(counts, count)
        assign(self.mean, mean + tf.einsum('r,rhw->hw', shares, means - mean))
        assign(self.count, count)
