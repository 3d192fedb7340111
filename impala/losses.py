"""The IMPALA loss: V-trace policy gradient, baseline and entropy terms.

Espeholt et al. 2018, section 4.2, with the sums of the paper's experiments: every term is summed
over time and batch, not averaged. Letters: T unroll length, B batch size, A number of actions.
"""

import dataclasses
from typing import Literal, get_args

import tensorflow as tf

import vtrace
from impala.trajectory import AgentOutput, StepOutput

RewardClipping = Literal['abs_one', 'soft_asymmetric', 'none']


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What shapes the loss.

    Attributes:
      discounting: gamma, per agent step.
      entropy_cost: weight of the negative entropy.
      baseline_cost: weight of the baseline's squared error.
      reward_clipping: see `clip_rewards`.
      clip_rho_threshold: rho-bar of V-trace; None does not clip.
      clip_c_threshold: c-bar of V-trace; None does not clip.
      clip_pg_rho_threshold: rho-bar of the policy gradient; None does not clip.
      lambda_: lambda of V-trace.
    """

    discounting: float = 0.99
    entropy_cost: float = 0.00025
    baseline_cost: float = 0.5
    reward_clipping: RewardClipping = 'abs_one'
    clip_rho_threshold: float | None = 1.0
    clip_c_threshold: float | None = 1.0
    clip_pg_rho_threshold: float | None = 1.0
    lambda_: float = 1.0


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
      ValueError: `clipping` is none of these.
    """
    if clipping == 'abs_one':
        return tf.clip_by_value(rewards, -1.0, 1.0)
    if clipping == 'soft_asymmetric':
        squeezed = tf.tanh(rewards / 5.0)
        return 5.0 * tf.where(rewards < 0.0, 0.3 * squeezed, squeezed)
    if clipping == 'none':
        return rewards
    raise ValueError(
        f'reward_clipping must be one of {", ".join(get_args(RewardClipping))}, not {clipping!r}'
    )


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


def entropy_loss(policy_logits: tf.Tensor) -> tf.Tensor:
    """Returns the sum of negative entropies, `pi(a|x) log pi(a|x)`, in nats.

    Args:
      policy_logits: f32 `[T, B, A]`.

    Returns:
      f32 scalar.
    """
    log_probs = tf.nn.log_softmax(policy_logits)
    return tf.reduce_sum(tf.exp(log_probs) * log_probs)


def vtrace_loss(
    agent_outputs: AgentOutput,
    learner_outputs: AgentOutput,
    env_outputs: StepOutput,
    config: LossConfig,
    value_stddev: tf.Tensor | None = None,
) -> tuple[tf.Tensor, dict[str, tf.Tensor], tf.Tensor]:
    """Computes the loss of a batch of unrolls.

    The rows are those of `impala.trajectory`: what is estimated at row t is compared with what was
    done and received at row t + 1, and the last baseline bootstraps the rest of the return.

    Args:
      agent_outputs: of the behaviour policy, `[T+1, B, ...]`.
      learner_outputs: of the policy being learned on the same rows, `[T+1, B, ...]`; `action` is
        not used.
      env_outputs: `[T+1, B, ...]`; `reward` and `done` alone are used.
      config: weights, discount and thresholds.
      value_stddev: f32 `[B]`, sigma of `impala.popart`: baseline errors and advantages count in
        this unit. None is 1.

    Returns:
      f32 scalar, `policy_gradient + baseline_cost * baseline + entropy_cost * entropy`; these
      three terms, f32 scalars, not weighted, under those names; and the V-trace targets, f32
      `[T, B]`, in the units of the rewards.

    Raises:
      ValueError: shapes do not fit together; or an unknown reward clipping.
    """
    rewards = clip_rewards(env_outputs.reward[1:], config.reward_clipping)
    discounts = (1.0 - tf.cast(env_outputs.done[1:], tf.float32)) * config.discounting
    policy_logits = learner_outputs.policy_logits[:-1]
    baseline = learner_outputs.baseline[:-1]

    targets = vtrace.from_logits(
        behaviour_policy_logits=agent_outputs.policy_logits[1:],
        target_policy_logits=policy_logits,
        actions=agent_outputs.action[1:],
        discounts=discounts,
        rewards=rewards,
        values=baseline,
        bootstrap_value=learner_outputs.baseline[-1],
        clip_rho_threshold=config.clip_rho_threshold,
        clip_c_threshold=config.clip_c_threshold,
        clip_pg_rho_threshold=config.clip_pg_rho_threshold,
        lambda_=config.lambda_,
    )

    errors, advantages = targets.vs - baseline, targets.pg_advantages
    if value_stddev is not None:
        errors, advantages = errors / value_stddev, advantages / value_stddev

    parts = {
        'policy_gradient': policy_gradient_loss(targets.target_action_log_probs, advantages),
        'baseline': baseline_loss(errors),
        'entropy': entropy_loss(policy_logits),
    }
    total = (
        parts['policy_gradient']
        + config.baseline_cost * parts['baseline']
        + config.entropy_cost * parts['entropy']
    )
    return total, parts, targets.vs
