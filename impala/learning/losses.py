"""The losses: IMPALA's V-trace policy gradient, and asynchronous PPO on V-trace advantages.

`vtrace_loss` is that of Espeholt et al. 2018, section 4.2. `appo_loss` replaces its policy gradient
by the clipped surrogate of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equation (7),
on V-trace advantages, optionally with the target network of IMPACT, Luo et al. 2020
(https://arxiv.org/abs/1912.00167).

The learner adds `autoencoder_loss` to either if the network has a decoder.

As in IMPALA's experiments, every term is summed over time and batch, not averaged.
Letters: T unroll length, B batch size, P number of parameters of a policy, H, W, C frame height,
width, channels.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import tensorflow as tf

import vtrace
from impala.config import LossConfig
from impala.errors import TrainingError
from impala.networks.action_distribution import ActionDistribution
from impala.trajectory import AgentOutput, StepOutput
from impala.user_code import UserCodeError, describe_failure, is_own, load


def clip_rewards(rewards: tf.Tensor, clipping: str) -> tf.Tensor:
    """Clips rewards.

    `'abs_one'` clips to [-1, 1]. `'soft_asymmetric'` is `5 * (0.3 if r < 0 else 1) * tanh(r / 5)`,
    the form of the paper's released code; the paper's appendix writes
    `0.3 min(tanh r, 0) + 5 max(tanh r, 0)`. `'none'` leaves them as they are.

    Args:
      rewards: f32, any shape.
      clipping: `'abs_one'`, `'soft_asymmetric'` or `'none'`.

    Returns:
      f32, same shape.

    Raises:
      ValueError: `clipping` is not one of these.
    """
    if clipping == 'abs_one':
        return tf.clip_by_value(rewards, -1.0, 1.0)
    if clipping == 'soft_asymmetric':
        squeezed = tf.tanh(rewards / 5.0)
        return 5.0 * tf.where(rewards < 0.0, 0.3 * squeezed, squeezed)
    if clipping == 'none':
        return rewards
    raise ValueError(f'reward_clipping must be abs_one, soft_asymmetric or none, not {clipping!r}')


def policy_gradient_loss(action_log_probs: tf.Tensor, advantages: tf.Tensor) -> tf.Tensor:
    """Returns the sum of `-advantage * log pi(a|x)`, whose gradient is the policy gradient.

    Args:
      action_log_probs: f32 `[T, B]`, log pi(a|x) of the actions taken.
      advantages: f32 `[T, B]`; no gradient flows into them.

    Returns:
      f32 scalar.
    """
    return -tf.reduce_sum(tf.stop_gradient(advantages) * action_log_probs)


def baseline_loss(errors: tf.Tensor) -> tf.Tensor:
    """Returns half the sum of squared errors.

    Args:
      errors: f32 `[T, B]`, V-trace targets minus baseline.

    Returns:
      f32 scalar.
    """
    return 0.5 * tf.reduce_sum(tf.square(errors))


def autoencoder_loss(frames: tf.Tensor, reconstructions: tf.Tensor) -> tf.Tensor:
    """Returns the squared error of pixels, averaged over a frame and summed over frames.

    `1/2 sum_n 1/(HWC) sum_i (x_ni / 255 - y_ni)^2`, with frames x and reconstructions y. The mean
    over pixels makes it independent of the size of the frames; the sum over time and batch keeps
    its proportion to the other terms.

    Args:
      frames: uint8 `[N, H, W, C]`.
      reconstructions: f32 `[N, H, W, C]`, pixels from 0 to 1.

    Returns:
      f32 scalar.
    """
    errors = tf.cast(frames, tf.float32) / 255.0 - reconstructions
    return tf.nn.l2_loss(errors) / math.prod(frames.shape[1:])


def clipped_surrogate_loss(
    log_ratios: tf.Tensor, advantages: tf.Tensor, clip_epsilon: float
) -> tf.Tensor:
    """Returns the sum of `-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A)`.

    Schulman et al. 2017, equation (7), summed. No gradient flows where the ratio has already left
    the interval on the side to which the advantage would move it.

    Args:
      log_ratios: f32 `[T, B]`, log(pi(a|x) / pi_old(a|x)).
      advantages: f32 `[T, B]`, A; no gradient flows into them.
      clip_epsilon: positive.

    Returns:
      f32 scalar.
    """
    advantages = tf.stop_gradient(advantages)
    ratios = tf.exp(log_ratios)
    clipped = tf.clip_by_value(ratios, 1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return -tf.reduce_sum(tf.minimum(ratios * advantages, clipped * advantages))


def normalize(
    values: tf.Tensor,
    sum_over_replicas: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
    is_counted: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns values shifted and scaled to mean 0 and standard deviation 1.

    Args:
      values: f32, any shape.
      sum_over_replicas: sums an f32 scalar over all replicas, each with a part of the batch.
      is_counted: bool, same shape: the values that count; the others become 0. None: all do.

    Returns:
      f32, same shape; zeros if all values are equal.
    """
    if is_counted is not None:
        count = sum_over_replicas(tf.reduce_sum(tf.cast(is_counted, tf.float32)))
        # A short unroll may have no value that counts.
        count = tf.maximum(count, 1.0)
        mean = sum_over_replicas(_sum(values, is_counted)) / count
        deviations = tf.where(is_counted, values - mean, 0.0)
        variance = sum_over_replicas(tf.reduce_sum(tf.square(deviations))) / count
        return deviations / (tf.sqrt(variance) + 1e-8)
    count = sum_over_replicas(tf.cast(tf.size(values), tf.float32))
    deviations = values - sum_over_replicas(tf.reduce_sum(values)) / count
    variance = sum_over_replicas(tf.reduce_sum(tf.square(deviations))) / count
    return deviations / (tf.sqrt(variance) + 1e-8)


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What the loss of a batch of unrolls is computed from; rows are as in `impala.trajectory`.

    Attributes:
      actions: the distributions of actions.
      agent_outputs: of the behaviour policy, `[T+1, B, ...]`.
      learner_outputs: of the policy being learned on the same rows, `[T+1, B, ...]`; its `action`
        is not used.
      env_outputs: `[T+1, B, ...]`; only `reward`, `done` and `is_step` are used.
      value_stddev: f32 `[B]`, sigma of `impala.networks.popart`: baseline errors and advantages
        count in this unit. None stands for 1.
      entropy_cost: f32 scalar that replaces the configured one, if that changes over the run.
      target_outputs: of the target network on the same rows, `[T+1, B, ...]`; its `action` is not
        used, and no gradient flows into it. None without a target network.
      sum_over_replicas: sums an f32 scalar over all replicas, each with a part of the batch.
      intrinsic_reward: f32 `[T, B]`, of the action at each row but the last, and added to the
        clipped reward. None without intrinsic rewards.
    """

    actions: ActionDistribution
    agent_outputs: AgentOutput
    learner_outputs: AgentOutput
    env_outputs: StepOutput
    value_stddev: tf.Tensor | None = None
    entropy_cost: tf.Tensor | float | None = None
    target_outputs: AgentOutput | None = None
    sum_over_replicas: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    intrinsic_reward: tf.Tensor | None = None

    @property
    def is_step(self) -> tf.Tensor | None:
        """Whether the environment made a step between rows t and t + 1, bool `[T, B]`.

        Where it did not, row t has the last observation of a truncated episode, whose value the
        return continues with, and row t + 1 the first observation of the next episode. No term of
        a loss may count such a transition. None if all are steps: without `bootstrap_truncated`.
        """
        return steps(self.env_outputs)

    def sum_over_steps(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sum of values f32 `[T, B]` over the transitions that are steps."""
        return tf.reduce_sum(values) if self.is_step is None else _sum(values, self.is_step)


class Loss(NamedTuple):
    """The loss of a batch.

    Attributes:
      total: f32 scalar, to be minimized.
      parts: name -> f32 scalar, its terms without their weights.
      targets: f32 `[T, B]`, V-trace targets in the units of the rewards, for PopArt.
    """

    total: tf.Tensor
    parts: dict[str, tf.Tensor]
    targets: tf.Tensor


def steps(env_outputs: StepOutput) -> tf.Tensor | None:
    """Returns `LossInputs.is_step` of environment outputs `[T+1, B, ...]`."""
    is_step = env_outputs.is_step
    return None if isinstance(is_step, tuple) else is_step[1:]


class LossFunction(Protocol):
    """What `--loss=my_module:my_loss` names; `vtrace_loss` and `appo_loss` are such functions."""

    def __call__(self, inputs: LossInputs, config: LossConfig) -> Loss:
        """Computes the loss of a batch in a graph.

        Args:
          inputs: of a batch, `[T+1, B, ...]`; a term may count only what is a step, see `is_step`.
          config: the settings of the loss.

        Returns:
          The sum over the T x B steps. No gradient should flow into the targets.
        """


def vtrace_loss(inputs: LossInputs, config: LossConfig) -> Loss:
    """Computes the loss of section 4.2; a target network is not used.

    The learner's outputs at row t are compared with the action and the reward at row t + 1, and
    the last baseline bootstraps the return. Where `inputs.is_step` is False, rho and c are 0: the
    target is the baseline, and no term counts the transition.

    Args:
      inputs: of a batch.
      config: weights, discount and thresholds.

    Returns:
      As total, `policy_gradient + baseline_cost * baseline + entropy_cost * entropy`; the parts
      have these names. `entropy` is negative entropy.

    Raises:
      ValueError: shapes do not fit together; or an unknown reward clipping.
    """
    learner_outputs = inputs.learner_outputs
    baseline = learner_outputs.baseline[:-1]
    rewards, discounts = rewards_and_discounts(inputs, config)
    log_probs, behaviour_log_probs = _log_probs(inputs, learner_outputs)
    targets = vtrace.from_importance_weights(
        log_rhos=_log_rhos(log_probs - behaviour_log_probs, inputs.is_step),
        discounts=discounts,
        rewards=rewards,
        values=baseline,
        bootstrap_value=learner_outputs.baseline[-1],
        clip_rho_threshold=config.clip_rho_threshold,
        clip_c_threshold=config.clip_c_threshold,
        clip_pg_rho_threshold=config.clip_pg_rho_threshold,
        lambda_=config.vtrace_lambda,
    )

    errors, advantages = targets.vs - baseline, targets.pg_advantages
    if inputs.value_stddev is not None:
        errors, advantages = errors / inputs.value_stddev, advantages / inputs.value_stddev

    parts = {
        'policy_gradient': policy_gradient_loss(log_probs, advantages),
        'baseline': baseline_loss(errors),
        'entropy': -_sum_of_entropies(inputs, learner_outputs.policy[:-1]),
    }
    return Loss(_weighted(parts, config, inputs.entropy_cost), parts, targets.vs)


def appo_loss(inputs: LossInputs, config: LossConfig) -> Loss:
    """Computes the loss of asynchronous PPO; rows are compared as in `vtrace_loss`.

    The surrogate's advantage is that of V-trace, `r_s + gamma_s v_{s+1} - V(x_s)`, without the
    weight rho_s, which the ratio replaces. Without a target network, ratio and rho are both pi/mu,
    where mu is the behaviour policy. Where nothing is clipped, the gradient is therefore that of
    `vtrace_loss` with the same rho. With `gae_advantages` the advantage is
    `r_s + gamma_s ((1 - lambda) V(x_{s+1}) + lambda v_{s+1}) - V(x_s)`. On-policy, this is
    generalized advantage estimation (Schulman et al. 2016, equation (16)); V-trace's advantage is
    that for lambda = 1 only.

    With a target network, as in IMPACT (maximal target-worker clipping, the objective J_AIS), the
    ratio is `min(mu / pi_target, rho) pi / mu = pi / max(pi_target, mu / rho)`, and V-trace uses
    pi_target and its baseline.

    Where `inputs.is_step` is False, rho and c are 0, and no term counts the transition.

    Args:
      inputs: of a batch.
      config: weights, discount and thresholds.

    Returns:
      As total, `policy_gradient + baseline_cost * baseline + entropy_cost * entropy
      + kl_cost * kl`; the parts have these names. `policy_gradient` is the surrogate, `entropy` is
      negative entropy, and `kl` is KL(pi_target || pi), or KL(mu || pi) without a target network.

    Raises:
      ValueError: shapes do not fit together; or an unknown reward clipping.
    """
    actions, learner_outputs = inputs.actions, inputs.learner_outputs
    target_outputs, is_step = inputs.target_outputs, inputs.is_step
    policy = learner_outputs.policy[:-1]
    old = learner_outputs if target_outputs is None else target_outputs
    values = tf.stop_gradient(old.baseline[:-1])
    bootstrap_value = tf.stop_gradient(old.baseline[-1])
    rewards, discounts = rewards_and_discounts(inputs, config)
    old_log_probs, behaviour_log_probs = _log_probs(inputs, old)
    targets = vtrace.from_importance_weights(
        log_rhos=_log_rhos(old_log_probs - behaviour_log_probs, is_step),
        discounts=discounts,
        rewards=rewards,
        values=values,
        bootstrap_value=bootstrap_value,
        clip_rho_threshold=config.clip_rho_threshold,
        clip_c_threshold=config.clip_c_threshold,
        lambda_=config.vtrace_lambda,
    )
    later = tf.concat([targets.vs[1:], bootstrap_value[tf.newaxis]], axis=0)
    if config.gae_advantages:
        next_values = tf.concat([values[1:], bootstrap_value[tf.newaxis]], axis=0)
        later = next_values + config.vtrace_lambda * (later - next_values)
    advantages = rewards + discounts * later - values
    errors = targets.vs - learner_outputs.baseline[:-1]
    if inputs.value_stddev is not None:
        errors, advantages = errors / inputs.value_stddev, advantages / inputs.value_stddev
    if is_step is not None:
        errors, advantages = (tf.where(is_step, each, 0.0) for each in (errors, advantages))
    if config.normalize_advantages:
        advantages = normalize(advantages, inputs.sum_over_replicas, is_step)

    if target_outputs is None:
        log_ratios = old_log_probs - behaviour_log_probs
        old_policy = inputs.agent_outputs.policy[1:]
    else:
        # pi / max(pi_target, mu / rho), the ratio of IMPACT.
        log_rho = math.log(config.clip_target_rho_threshold)
        denominators = tf.maximum(old_log_probs, behaviour_log_probs - log_rho)
        log_probs = actions.log_prob(policy, inputs.agent_outputs.action[1:])
        log_ratios = log_probs - tf.stop_gradient(denominators)
        old_policy = target_outputs.policy[:-1]

    parts = {
        'policy_gradient': clipped_surrogate_loss(log_ratios, advantages, config.clip_epsilon),
        'baseline': baseline_loss(errors),
        'entropy': -_sum_of_entropies(inputs, policy),
        'kl': _sum_of_kl_divergences(inputs, tf.stop_gradient(old_policy), policy),
    }
    total = _weighted(parts, config, inputs.entropy_cost)
    # Without a weight, the divergence needs no backward pass.
    if config.kl_cost:
        total += config.kl_cost * parts['kl']
    return Loss(total, parts, targets.vs)


def compute(inputs: LossInputs, config: LossConfig) -> Loss:
    """Computes the loss that `config.loss` names.

    Raises:
      TrainingError: the user's own loss fails or returns something else; one sentence.
      ValueError: see `loss_function`, `vtrace_loss` and `appo_loss`.
    """
    function = loss_function(config.loss)
    if not is_own(config.loss):
        return function(inputs, config)
    try:
        loss = function(inputs, config)
    except Exception as error:
        raise TrainingError(f'--loss={config.loss} fails: {describe_failure(error)}.') from error
    if not isinstance(loss, Loss):
        raise TrainingError(
            f'--loss={config.loss} returns {type(loss).__name__}, and it must return an '
            'impala.learning.losses.Loss.'
        )
    return loss


def loss_function(name: str) -> LossFunction:
    """Returns a loss: `'vtrace'`, `'appo'`, or the user's own, `my_module:my_loss`.

    The user's own is called as `vtrace_loss` is, and may use it and all functions of this module.
    Its `targets` are used only by PopArt.

    Raises:
      ValueError: there is no such loss.
    """
    known = {'vtrace': vtrace_loss, 'appo': appo_loss}
    if name in known:
        return known[name]
    try:
        return load(name)
    except UserCodeError as error:
        raise ValueError(f'--loss={name}: {error}.') from error


def _log_probs(inputs: LossInputs, outputs: AgentOutput) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns log-probabilities of the actions taken, f32 `[T, B]` each.

    The first are by the policy of `outputs` and differentiable, the second by the behaviour policy.
    """
    actions, agent_outputs = inputs.agent_outputs.action[1:], inputs.agent_outputs
    behaviour_log_probs = inputs.actions.log_prob(agent_outputs.policy[1:], actions)
    log_probs = inputs.actions.log_prob(outputs.policy[:-1], actions)
    return log_probs, tf.stop_gradient(behaviour_log_probs)


def rewards_and_discounts(inputs: LossInputs, config: LossConfig) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns rewards and discounts of the actions, f32 `[T, B]` each.

    The rewards are clipped; then the intrinsic ones, if there are any, are added.
    """
    env_outputs = inputs.env_outputs
    rewards = clip_rewards(env_outputs.reward[1:], config.reward_clipping)
    if inputs.intrinsic_reward is not None:
        rewards += inputs.intrinsic_reward
    return rewards, (1.0 - tf.cast(env_outputs.done[1:], tf.float32)) * config.discounting


def _log_rhos(log_rhos: tf.Tensor, is_step: tf.Tensor | None) -> tf.Tensor:
    """Returns log importance weights f32 `[T, B]` whose rho is 0 where there was no step."""
    return log_rhos if is_step is None else tf.where(is_step, log_rhos, -math.inf)


def _sum_of_entropies(inputs: LossInputs, policy: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the steps of a policy f32 `[T, B, P]`."""
    if inputs.is_step is None:
        return inputs.actions.sum_of_entropies(policy)
    return inputs.sum_over_steps(inputs.actions.entropy(policy))


def _sum_of_kl_divergences(inputs: LossInputs, policy: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the steps of policies f32 `[T, B, P]`."""
    if inputs.is_step is None:
        return inputs.actions.sum_of_kl_divergences(policy, other)
    return inputs.sum_over_steps(inputs.actions.kl_divergence(policy, other))


def _sum(values: tf.Tensor, is_counted: tf.Tensor) -> tf.Tensor:
    """Returns the sum of those values that count."""
    return tf.reduce_sum(tf.where(is_counted, values, 0.0))


def _weighted(
    parts: dict[str, tf.Tensor], config: LossConfig, entropy_cost: tf.Tensor | float | None
) -> tf.Tensor:
    """Returns the weighted sum of the terms that both losses have."""
    return (
        parts['policy_gradient']
        + config.baseline_cost * parts['baseline']
        + (config.entropy_cost if entropy_cost is None else entropy_cost) * parts['entropy']
    )
