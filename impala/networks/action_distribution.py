"""The distributions of actions, one for each action space.

A policy is a vector of parameters: the logits of all categorical components, then the means and the
logarithms of the standard deviations of all continuous components. Components are independent of
each other, so log-probabilities, entropies and divergences are sums over components.

A continuous component is a normal distribution. If it is bounded, its samples are mapped to the
open interval between the bounds by a hyperbolic tangent (Haarnoja et al. 2018, appendix C,
https://arxiv.org/abs/1801.01290). Actions are the samples before that; see
`impala.trajectory.ActionSpec.to_environment`. Densities are those of the environment's action.

Letters: K number of components, D number of continuous ones, P number of parameters. The dots are
any leading dimensions.
"""

import itertools
import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from impala.trajectory import ActionSpec

# Beyond these, a standard deviation neither explores nor has useful gradients.
MIN_LOG_STDDEV, MAX_LOG_STDDEV = -5.0, 2.0
_NUM_QUADRATURE_NODES = 32
# The logit of a category that must not be chosen: its probability is exactly 0, and unlike minus
# infinity it gives a finite entropy.
_MASKED_LOGIT = -1e9


@tf.custom_gradient
def bounded_log_stddev(log_stddev: tf.Tensor) -> Any:
    """Clips logarithms of standard deviations to `MIN_LOG_STDDEV` and `MAX_LOG_STDDEV`.

    A gradient that would move a value further out is zero, as with any clipping. One that moves it
    back passes, so that no value is stuck beyond its bound.

    Args:
      log_stddev: f32 of any shape.
    """

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        # Descent moves against the gradient.
        moves_out = ((log_stddev > MAX_LOG_STDDEV) & (upstream < 0)) | (
            (log_stddev < MIN_LOG_STDDEV) & (upstream > 0)
        )
        return tf.where(moves_out, tf.zeros_like(upstream), upstream)

    return tf.clip_by_value(log_stddev, MIN_LOG_STDDEV, MAX_LOG_STDDEV), gradient


class ActionDistribution:
    """The distributions of one action space.

    Attributes:
      spec: the action space.
    """

    def __init__(self, spec: ActionSpec):
        """Takes the action space."""
        self.spec = spec
        self._num_categorical = len(spec.categories)
        self._num_continuous = len(spec.bounds)
        # Runs of components with equally many categories, which are computed together.
        self._groups = [
            (len(list(group)), size) for size, group in itertools.groupby(spec.categories)
        ]
        self._is_bounded = np.array([bounds is not None for bounds in spec.bounds], bool)
        half_widths = [(each[1] - each[0]) / 2 if each else 1.0 for each in spec.bounds]
        self._log_half_widths = np.log(np.array(half_widths, np.float32))

    @property
    def num_features(self) -> int:
        """F, see `features`; also the number of logits and means."""
        return self.spec.num_logits + self._num_continuous

    def masked(self, policy: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Returns a policy that chooses only allowed categories.

        Args:
          policy: f32 `[..., P]`.
          mask: bool `[..., N]` for N logits, whether a category is allowed.
        """
        logits, normals = policy[..., : self.spec.num_logits], policy[..., self.spec.num_logits :]
        return tf.concat([tf.where(mask, logits, _MASKED_LOGIT), normals], -1)

    def sample(self, policy: tf.Tensor) -> tf.Tensor:
        """Draws actions.

        Args:
          policy: f32 `[..., P]`.

        Returns:
          i32 or f32, `[...]` or `[..., K]`; see `ActionSpec`. Always an action, even if parameters
          are not finite, which the learner deals with.
        """
        categories = [
            # If logits are not finite, the sample is the number of categories.
            tf.minimum(
                tfp.distributions.Categorical(logits=logits, dtype=tf.int32).sample(),
                logits.shape[-1] - 1,
            )
            for logits in self._logits(policy)
        ]
        if not self._num_continuous:
            return self._join(categories)
        mean, log_stddev = self._normals(policy)
        noise = tf.random.normal(tf.shape(mean))
        return self._join(categories, mean + tf.exp(log_stddev) * noise)

    def sample_by_noise(self, policy: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """Returns the actions that a given noise leads to.

        Args:
          policy: f32 `[..., P]`.
          noise: f32 `[..., N]`, of the standard Gumbel distribution for each logit, then of the
            standard normal distribution for each continuous component.

        Returns:
          As `sample` does. If the noise is random, the actions have the distribution of `sample`.
        """
        categories = [
            tf.argmax(logits + gumbel, -1, tf.int32)
            for logits, gumbel in zip(self._logits(policy), self._logits(noise), strict=True)
        ]
        if not self._num_continuous:
            return self._join(categories)
        mean, log_stddev = self._normals(policy)
        normal = noise[..., self.spec.num_logits :]
        return self._join(categories, mean + tf.exp(log_stddev) * normal)

    def mode(self, policy: tf.Tensor) -> tf.Tensor:
        """Returns the most probable categories and the means, in the form of `sample`.

        For a bounded component this is the median, at which the density need not be the greatest.
        """
        categories = [tf.argmax(logits, -1, tf.int32) for logits in self._logits(policy)]
        if not self._num_continuous:
            return self._join(categories)
        return self._join(categories, self._normals(policy)[0])

    def log_prob(self, policy: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
        """Returns the logarithms of the probabilities (or densities) of actions.

        Args:
          policy: f32 `[..., P]`.
          action: as from `sample`.

        Returns:
          f32 `[...]`, in nats.
        """
        if self.spec.is_scalar:
            return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=action, logits=policy)
        terms = []
        for logits, chosen in zip(self._logits(policy), self._one_hot(action), strict=True):
            terms.append(tf.reduce_sum(chosen * tf.nn.log_softmax(logits), [-2, -1]))
        if self._num_continuous:
            mean, log_stddev = self._normals(policy)
            samples = action[..., self._num_categorical :]
            deviations = (samples - mean) * tf.exp(-log_stddev)
            densities = -0.5 * tf.square(deviations) - log_stddev - 0.5 * math.log(2 * math.pi)
            terms.append(tf.reduce_sum(densities - self._log_slopes(samples), -1))
        return tf.add_n(terms)

    def entropy(self, policy: tf.Tensor) -> tf.Tensor:
        """Returns entropies; the differential ones of continuous components.

        The entropy of a bounded component has no closed form. It is the normal distribution's plus
        the expected log-derivative of the bijection. Gauss-Hermite quadrature with 32 nodes
        computes this expectation: without randomness, differentiable, and to 0.01 nats up to a
        standard deviation of 3.5 (0.1 nats at the greatest, `exp(MAX_LOG_STDDEV)`).

        Args:
          policy: f32 `[..., P]`.

        Returns:
          f32 `[...]`, in nats.
        """
        return tf.add_n([tf.reduce_sum(term, -1) for term in self._entropy_terms(policy)])

    def sum_of_entropies(self, policy: tf.Tensor) -> tf.Tensor:
        """Returns the sum of `entropy` over all rows, an f32 scalar."""
        return tf.add_n([tf.reduce_sum(term) for term in self._entropy_terms(policy)])

    def kl_divergence(self, policy: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """Returns KL(policy || other), f32 `[...]`, in nats.

        A bijection of both distributions leaves it unchanged, so bounds do not matter.

        Args:
          policy: f32 `[..., P]`.
          other: f32 `[..., P]`.
        """
        return tf.add_n([tf.reduce_sum(term, -1) for term in self._kl_terms(policy, other)])

    def sum_of_kl_divergences(self, policy: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """Returns the sum of `kl_divergence` over all rows, an f32 scalar."""
        return tf.add_n([tf.reduce_sum(term) for term in self._kl_terms(policy, other)])

    def features(self, action: tf.Tensor) -> tf.Tensor:
        """Returns actions as inputs of the network.

        Args:
          action: as from `sample`.

        Returns:
          f32 `[..., F]` for F logits and continuous components: a one-hot vector for each
          categorical component, the tangents of bounded samples, and other samples clipped to
          [-10, 10].
        """
        if self.spec.is_scalar:
            return tf.one_hot(action, self.spec.num_logits)
        parts = [_flat(each, action) for each in self._one_hot(action)]
        if self._num_continuous:
            samples = action[..., self._num_categorical :]
            clipped = tf.clip_by_value(samples, -10.0, 10.0)
            parts.append(tf.where(self._is_bounded, tf.tanh(samples), clipped))
        return tf.concat(parts, -1)

    def to_environment(self, action: tf.Tensor) -> tf.Tensor:
        """Does what `ActionSpec.to_environment` does, for actions `[..., K]`."""
        if not self._is_bounded.any():
            return action
        bounds = np.array([each or (0.0, 0.0) for each in self.spec.bounds], np.float32)
        categories, samples = tf.split(action, [self._num_categorical, self._num_continuous], -1)
        low, high = bounds[:, 0], bounds[:, 1]
        bounded = tf.clip_by_value(low + (high - low) * 0.5 * (1.0 + tf.tanh(samples)), low, high)
        return tf.concat([categories, tf.where(self._is_bounded, bounded, samples)], -1)

    def _entropy_terms(self, policy: tf.Tensor) -> list[tf.Tensor]:
        """Returns tensors `[..., n]`, whose sums over the last dimension add up to the entropy."""
        terms = []
        for logits in self._logits(policy):
            log_probs = tf.nn.log_softmax(logits)
            terms.append(-_flat(tf.exp(log_probs) * log_probs, policy))
        if self._num_continuous:
            mean, log_stddev = self._normals(policy)
            entropies = log_stddev + 0.5 * math.log(2 * math.pi * math.e)
            if self._is_bounded.any():
                nodes, weights = np.polynomial.hermite_e.hermegauss(_NUM_QUADRATURE_NODES)
                nodes = nodes.reshape([-1, *[1] * mean.shape.rank]).astype(np.float32)
                weights = (weights / weights.sum()).astype(np.float32)
                log_slopes = self._log_slopes(mean + tf.exp(log_stddev) * nodes)
                entropies += tf.tensordot(weights, log_slopes, 1)
            terms.append(entropies)
        return terms

    def _kl_terms(self, policy: tf.Tensor, other: tf.Tensor) -> list[tf.Tensor]:
        """Returns tensors `[..., n]`, whose sums over the last dimension add up to the KL."""
        terms = []
        for logits, other_logits in zip(self._logits(policy), self._logits(other), strict=True):
            log_probs = tf.nn.log_softmax(logits)
            differences = log_probs - tf.nn.log_softmax(other_logits)
            terms.append(_flat(tf.exp(log_probs) * differences, policy))
        if self._num_continuous:
            mean, log_stddev = self._normals(policy)
            other_mean, other_log_stddev = self._normals(other)
            squares = tf.exp(2 * log_stddev) + tf.square(mean - other_mean)
            squares *= 0.5 * tf.exp(-2 * other_log_stddev)
            terms.append(other_log_stddev - log_stddev + squares - 0.5)
        return terms

    def _logits(self, values: tf.Tensor) -> list[tf.Tensor]:
        """Returns each group's logits, f32 `[..., n, A]`; those of `Discrete` are `[..., A]`."""
        if self.spec.is_scalar:
            return [values]
        groups, begin = [], 0
        for number, size in self._groups:
            logits = values[..., begin : begin + number * size]
            groups.append(tf.reshape(logits, [*_leading(values), number, size]))
            begin += number * size
        return groups

    def _one_hot(self, action: tf.Tensor) -> list[tf.Tensor]:
        """Returns each group's categories, f32 `[..., n, A]`; zeros if one does not exist."""
        groups, begin = [], 0
        for number, size in self._groups:
            categories = tf.cast(action[..., begin : begin + number], tf.int32)
            groups.append(tf.one_hot(categories, size))
            begin += number
        return groups

    def _normals(self, policy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns means and log standard deviations, f32 `[..., D]` each."""
        mean, log_stddev = tf.split(policy[..., self.spec.num_logits :], 2, -1)
        return mean, log_stddev

    def _log_slopes(self, samples: tf.Tensor) -> tf.Tensor:
        """Returns the log-derivative of the environment's action by the sample, f32 `[..., D]`."""
        # log(1 - tanh(x)^2), in a form that neither overflows nor cancels.
        slopes = 2.0 * (math.log(2.0) - samples - tf.nn.softplus(-2.0 * samples))
        return tf.where(self._is_bounded, slopes, 0.0) + self._log_half_widths

    def _join(self, categories: list[tf.Tensor], samples: tf.Tensor | None = None) -> tf.Tensor:
        """Returns actions of the categories of each group and the samples, if there are any."""
        if self.spec.is_scalar:
            return categories[0]
        if samples is None:
            return tf.concat(categories, -1)
        samples = tf.where(tf.math.is_finite(samples), samples, 0.0)
        return tf.concat([*(tf.cast(each, tf.float32) for each in categories), samples], -1)


def _leading(values: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns all dimensions but the last, as integers where they are known."""
    dynamic = tf.shape(values)
    return [dynamic[i] if d is None else d for i, d in enumerate(values.shape[:-1])]


def _flat(values: tf.Tensor, policy: tf.Tensor) -> tf.Tensor:
    """Returns values, of as many leading dimensions as `policy` has, as `[..., n]`."""
    if len(values.shape) == len(policy.shape):
        return values
    return tf.reshape(values, [*_leading(policy), -1])
