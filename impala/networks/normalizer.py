"""Vector observations, normalized by the mean and variance of all that was learned from.

The statistics of batches are merged as in Chan, Golub and LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979, equation (2.1), here divided by the number
of samples. Letters: T rows, B batch size, N rows (merged time and batch), D numbers of all vectors
together.
"""

from typing import NamedTuple

import numpy as np
import sonnet as snt
import tensorflow as tf

from impala.trajectory import EnvironmentSpec

# Normalized values are clipped to plus or minus this.
CLIP = 10.0
# An entry counts as constant if its standard deviation is at most this share of its mean: float32
# values that close to each other differ by little more than their rounding.
_CONSTANT = 1e-6
# Greatest factor; float32 can hold it.
_MAX_SCALE = 1e30


class Vector(NamedTuple):
    """A vector observation.

    Attributes:
      name: of the observation.
      shape: of the observation.
      is_number: of each of its numbers, in order, whether it is normalized. Categories, which are
        one-hot, and bits are not.
    """

    name: str
    shape: tuple[int, ...]
    is_number: tuple[bool, ...]


def vectors_of(spec: EnvironmentSpec) -> tuple[Vector, ...]:
    """Returns the vector observations, sorted by name.

    They are those of float32 that are not in the shape of an image, `[H, W, C]`, and have at least
    one number that is neither category nor bit.
    """
    vectors = []
    for name, array in sorted(spec.observation.items()):
        if array.dtype != 'float32' or len(array.shape) == 3:
            continue
        is_number = [part.kind == 'numbers' for part in array.parts for _ in range(part.size)]
        is_number = is_number or [True] * int(np.prod(array.shape))
        if any(is_number):
            vectors.append(Vector(name, tuple(array.shape), tuple(is_number)))
    return tuple(vectors)


class Normalizer(snt.Module):
    """Subtracts the mean of each number, divides by its standard deviation, and clips the result.

    Before the first update the mean is 0 and the variance 1. Entries that have been constant so far
    are only shifted.

    Attributes:
      count: f64 variable `[]`, rows that the statistics are of.
      mean: f64 variable `[D]`, of the numbers of all vectors, one after the other.
      variance: f64 variable `[D]`, mean squared deviation from the mean. All are float64 because
        each update changes them less than the ones before.

    Args:
      spec: of the environment, with at least one of `vectors_of`.
    """

    def __init__(self, spec: EnvironmentSpec, name: str = 'normalizer'):
        super().__init__(name)
        self._vectors = vectors_of(spec)
        self._sizes = [len(vector.is_number) for vector in self._vectors]
        size = sum(self._sizes)
        self.count = tf.Variable(tf.zeros([], tf.float64), trainable=False, name='count')
        self.mean = tf.Variable(tf.zeros([size], tf.float64), trainable=False, name='mean')
        self.variance = tf.Variable(tf.ones([size], tf.float64), trainable=False, name='variance')

    def __call__(self, observation: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns observations `[N, ...]` with normalized vectors; all others are unchanged."""
        variance = self.variance.read_value()
        mean = self.mean.read_value()
        is_constant = variance <= tf.square(_CONSTANT * mean)
        # The variance is replaced, too, so that nothing is divided by 0.
        scale = tf.math.rsqrt(tf.where(is_constant, tf.ones_like(variance), variance))
        scale = tf.cast(tf.minimum(scale, _MAX_SCALE), tf.float32)
        normalized = dict(observation)
        for vector, center, factor in zip(
            self._vectors,
            tf.split(tf.cast(mean, tf.float32), self._sizes),
            tf.split(scale, self._sizes),
            strict=True,
        ):
            x = observation[vector.name]
            center, factor = tf.reshape(center, vector.shape), tf.reshape(factor, vector.shape)
            y = tf.clip_by_value((x - center) * factor, -CLIP, CLIP)
            if not all(vector.is_number):
                y = tf.where(np.reshape(vector.is_number, vector.shape), y, x)
            normalized[vector.name] = y
        return normalized

    def summary(self, observation: dict[str, tf.Tensor], is_counted: tf.Tensor) -> tf.Tensor:
        """Returns number, means and variances of a batch's observations.

        Args:
          observation: tensors `[T, B, ...]`.
          is_counted: bool `[B]`, which unrolls count.

        Returns:
          f64 `[1 + 2 * D]`: number of rows, then mean and variance of each number.
        """
        first = observation[self._vectors[0].name]
        flat = [
            tf.reshape(observation[vector.name], tf.concat([tf.shape(first)[:2], [size]], 0))
            for vector, size in zip(self._vectors, self._sizes, strict=True)
        ]
        x = tf.cast(tf.concat(flat, -1), tf.float64)
        counts = is_counted[:, tf.newaxis]
        number = tf.shape(x)[0] * tf.math.count_nonzero(is_counted, dtype=tf.int32)
        count = tf.cast(number, tf.float64)

        def mean_of(values: tf.Tensor) -> tf.Tensor:
            # Faster than a tensor with only the unrolls that count.
            total = tf.reduce_sum(tf.where(counts, values, tf.zeros([], tf.float64)), [0, 1])
            return tf.math.divide_no_nan(total, count)

        mean = mean_of(x)
        # In two passes, since a difference of mean squares would lose the digits they share.
        return tf.concat([count[tf.newaxis], mean, mean_of(tf.square(x - mean))], 0)

    def update(self, summaries: tf.Tensor) -> None:
        """Merges observations into the statistics; none leave them as they are.

        Args:
          summaries: f64 `[R, 1 + 2 * D]`, the result of `summary` of each of R replicas.
        """
        size = self.mean.shape[0]
        old_count, old_mean, old_variance = (
            variable.read_value() for variable in (self.count, self.mean, self.variance)
        )
        counts, means, variances = tf.split(summaries, [1, size, size], -1)
        counts = tf.concat([old_count[tf.newaxis, tf.newaxis], counts], 0)
        means = tf.concat([old_mean[tf.newaxis], means], 0)
        variances = tf.concat([old_variance[tf.newaxis], variances], 0)
        count = tf.reduce_sum(counts)
        shares = tf.math.divide_no_nan(counts, count)
        mean = old_mean + tf.reduce_sum(shares * (means - old_mean), 0)
        variance = tf.reduce_sum(shares * (variances + tf.square(means - mean)), 0)
        assign(self.count, count)
        assign(self.mean, mean)
        assign(self.variance, tf.where(count > 0, variance, old_variance))


def assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns to the variable of the replica that is computing, which `assign` cannot do."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tf.cast(value, variable.dtype))
