"""V-trace targets, for actors that lag behind the policy being learned.

From "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures",
Espeholt et al. 2018, section 4 (https://arxiv.org/abs/1802.01561). All tensors are time-major.
Letters: T unroll length, B batch size, A number of actions, C... any further dimensions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf


class VTraceReturns(NamedTuple):
    """V-trace targets; no gradient flows through either.

    Attributes:
      vs: f32 `[T, B, C...]`, v_s of equation (1), what the baseline should be.
      pg_advantages: f32 `[T, B, C...]`, what the gradient of log pi(a_s|x_s) is multiplied by.
    """

    vs: tf.Tensor
    pg_advantages: tf.Tensor


class VTraceFromLogitsReturns(NamedTuple):
    """V-trace targets and the log-probabilities they came from.

    Attributes:
      vs: f32 `[T, B, C...]`, as in `VTraceReturns`; no gradient.
      pg_advantages: f32 `[T, B, C...]`, as in `VTraceReturns`; no gradient.
      log_rhos: f32 `[T, B, C...]`, log(pi(a|x) / mu(a|x)); no gradient.
      behaviour_action_log_probs: f32 `[T, B, C...]`, log mu(a|x); no gradient.
      target_action_log_probs: f32 `[T, B, C...]`, log pi(a|x). Differentiable, so that the policy
        gradient need not compute it a second time.
    """

    vs: tf.Tensor
    pg_advantages: tf.Tensor
    log_rhos: tf.Tensor
    behaviour_action_log_probs: tf.Tensor
    target_action_log_probs: tf.Tensor


def from_logits(
    behaviour_policy_logits: Any,
    target_policy_logits: Any,
    actions: Any,
    discounts: Any,
    rewards: Any,
    values: Any,
    bootstrap_value: Any,
    clip_rho_threshold: float | None = 1.0,
    clip_c_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    lambda_: float = 1.0,
) -> VTraceFromLogitsReturns:
    """Computes V-trace targets for softmax policies.

    Args:
      behaviour_policy_logits: float `[T, B, C..., A]`, of mu, the policy that acted.
      target_policy_logits: float `[T, B, C..., A]`, of pi, the policy being learned.
      actions: integer `[T, B, C...]`, sampled from mu.
      discounts: float `[T, B, C...]`, gamma, or 0 where the step ended an episode.
      rewards: float `[T, B, C...]`, of the actions.
      values: float `[T, B, C...]`, V(x_s) under the baseline.
      bootstrap_value: float `[B, C...]`, V(x_T).
      clip_rho_threshold: rho-bar; None does not clip.
      clip_c_threshold: c-bar; None does not clip.
      clip_pg_rho_threshold: rho-bar of the policy gradient; None does not clip.
      lambda_: the lambda of remark 2, which scales every c.

    Returns:
      `VTraceFromLogitsReturns`.

    Raises:
      ValueError: an argument's rank or shape does not fit the others'; the message names it.
    """
    behaviour = _as_float32(behaviour_policy_logits, 'behaviour_policy_logits')
    target = _as_float32(target_policy_logits, 'target_policy_logits')
    actions = tf.convert_to_tensor(actions, name='actions')
    if not actions.dtype.is_integer:
        raise ValueError(f'actions must be integers, but they are {actions.dtype.name}')
    for name, logits in (('behaviour_policy_logits', behaviour), ('target_policy_logits', target)):
        if logits.shape.rank is not None and logits.shape.rank < 3:
            raise ValueError(
                f'{name} must have rank 3 or more, [T, B, ..., A], but its shape is {logits.shape}'
            )
        if not logits.shape.is_compatible_with(behaviour.shape):
            raise ValueError(
                f'{name} has shape {logits.shape}, but behaviour_policy_logits has shape '
                f'{behaviour.shape}'
            )
        if not actions.shape.is_compatible_with(logits.shape[:-1]):
            raise ValueError(
                f'actions must have shape {logits.shape[:-1]}, that of {name} without its last '
                f'dimension, but its shape is {actions.shape}'
            )

    behaviour_log_probs = tf.stop_gradient(_action_log_probs(behaviour, actions))
    target_log_probs = _action_log_probs(target, actions)
    log_rhos = tf.stop_gradient(target_log_probs - behaviour_log_probs)
    targets = from_importance_weights(
        log_rhos=log_rhos,
        discounts=discounts,
        rewards=rewards,
        values=values,
        bootstrap_value=bootstrap_value,
        clip_rho_threshold=clip_rho_threshold,
        clip_c_threshold=clip_c_threshold,
        clip_pg_rho_threshold=clip_pg_rho_threshold,
        lambda_=lambda_,
    )
    return VTraceFromLogitsReturns(
        vs=targets.vs,
        pg_advantages=targets.pg_advantages,
        log_rhos=log_rhos,
        behaviour_action_log_probs=behaviour_log_probs,
        target_action_log_probs=target_log_probs,
    )


def from_importance_weights(
    log_rhos: Any,
    discounts: Any,
    rewards: Any,
    values: Any,
    bootstrap_value: Any,
    clip_rho_threshold: float | None = 1.0,
    clip_c_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    lambda_: float = 1.0,
) -> VTraceReturns:
    """Computes V-trace targets from log importance weights.

    With delta_t = min(rho-bar, rho_t) (r_t + gamma_t V(x_{t+1}) - V(x_t)) and
    c_t = lambda min(c-bar, rho_t), equation (1) in the recursive form of remark 1 is
    `v_s - V(x_s) = delta_s + gamma_s c_s (v_{s+1} - V(x_{s+1}))`, and the advantage of the policy
    gradient (section 4.2) is `min(pg rho-bar, rho_s) (r_s + gamma_s v_{s+1} - V(x_s))`.

    Computes in float32, whatever the float type of the arguments. `log_rhos`, `discounts` and
    `rewards` may have size 1 in dimensions C... where `values` has more.

    Args:
      log_rhos: float `[T, B, C...]`, log(pi(a|x) / mu(a|x)).
      discounts: float `[T, B, C...]`, gamma, or 0 where the step ended an episode.
      rewards: float `[T, B, C...]`.
      values: float `[T, B, C...]`, V(x_s) under the baseline.
      bootstrap_value: float `[B, C...]`, V(x_T).
      clip_rho_threshold: rho-bar; None does not clip.
      clip_c_threshold: c-bar; None does not clip.
      clip_pg_rho_threshold: rho-bar of the policy gradient; None does not clip.
      lambda_: the lambda of remark 2, which scales every c.

    Returns:
      `VTraceReturns`.

    Raises:
      ValueError: an argument's rank or shape does not fit that of `values`; the message names it.
    """
    # Stopped here, so that a gradient tape records nothing of what follows.
    log_rhos = tf.stop_gradient(_as_float32(log_rhos, 'log_rhos'))
    discounts = tf.stop_gradient(_as_float32(discounts, 'discounts'))
    rewards = tf.stop_gradient(_as_float32(rewards, 'rewards'))
    values = tf.stop_gradient(_as_float32(values, 'values'))
    bootstrap_value = tf.stop_gradient(_as_float32(bootstrap_value, 'bootstrap_value'))
    _check_shapes(
        values,
        bootstrap_value,
        {'log_rhos': log_rhos, 'discounts': discounts, 'rewards': rewards},
    )

    rhos = tf.exp(log_rhos)
    next_values = tf.concat([values[1:], bootstrap_value[tf.newaxis]], axis=0)
    deltas = _clip(rhos, clip_rho_threshold) * (rewards + discounts * next_values - values)
    decays = discounts * (lambda_ * _clip(rhos, clip_c_threshold))
    vs = values + _accumulate_backwards(decays, deltas)

    next_vs = tf.concat([vs[1:], bootstrap_value[tf.newaxis]], axis=0)
    pg_advantages = _clip(rhos, clip_pg_rho_threshold) * (rewards + discounts * next_vs - values)
    return VTraceReturns(vs=vs, pg_advantages=pg_advantages)


def _accumulate_backwards(decays: tf.Tensor, deltas: tf.Tensor) -> tf.Tensor:
    """Solves `y_t = deltas_t + decays_t y_{t+1}`, `y_T = 0`, along the first dimension.

    Where T is known, by recursive doubling: after the round with stride s, `sums_t` covers steps t
    to t + 2s - 1 and `products_t` is the product of their decays. That takes log2(T) rounds of a
    few operations on whole tensors. A loop over time takes T rounds of operations on single rows,
    and on tensors this small the cost of an operation is that of starting it.
    """
    length = deltas.shape[0]
    if length is None:
        decays = tf.broadcast_to(decays, tf.shape(deltas))
        return tf.scan(
            lambda later, row: row[1] + row[0] * later,
            (decays, deltas),
            initializer=tf.zeros_like(deltas[0]),
            reverse=True,
        )
    sums, stride = deltas, 1
    # Nothing follows the last row. Its decay may have overflowed, so it must not be multiplied,
    # not even by 0.
    products = decays[:-1]
    while stride < length:
        sums = tf.concat(
            [sums[:-stride] + products * sums[stride:], sums[length - stride :]], axis=0
        )
        products = products[:-stride] * products[stride:]
        stride *= 2
    return sums


def _action_log_probs(logits: tf.Tensor, actions: tf.Tensor) -> tf.Tensor:
    return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=actions, logits=logits)


def _clip(rhos: tf.Tensor, threshold: float | None) -> tf.Tensor:
    return rhos if threshold is None else tf.minimum(rhos, threshold)


def _as_float32(value: Any, name: str) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(value, name=name), tf.float32)


def _check_shapes(
    values: tf.Tensor, bootstrap_value: tf.Tensor, others: Mapping[str, tf.Tensor]
) -> None:
    """Raises ValueError for shapes that do not fit that of `values`; unknown sizes fit any."""
    shape = values.shape
    if shape.rank is not None and shape.rank < 2:
        raise ValueError(f'values must have rank 2 or more, [T, B, ...], but its shape is {shape}')
    if shape.rank is not None and shape[0] == 0:
        raise ValueError('values has no time step: its first dimension is 0')
    if not bootstrap_value.shape.is_compatible_with(shape[1:]):
        raise ValueError(
            f'bootstrap_value must have shape {shape[1:]}, that of values without its first '
            f'dimension, but its shape is {bootstrap_value.shape}'
        )
    for name, tensor in others.items():
        other = tensor.shape
        if shape.rank is None or other.rank is None:
            continue
        if other.rank != shape.rank:
            raise ValueError(
                f'{name} must have rank {shape.rank} as values has, but its shape is {other}'
            )
        sizes = zip(other.as_list(), shape.as_list(), strict=True)
        for axis, (size, expected) in enumerate(sizes):
            stretches = axis >= 2 and size == 1
            if None not in (size, expected) and size != expected and not stretches:
                raise ValueError(
                    f'{name} must have the shape of values, {shape}, but it is {other}'
                )
