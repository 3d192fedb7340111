"""A loss of one's own: V-trace, with a penalty for policies that differ from the behaviour policy.

How to run it: docs/examples/own_loss.md.
"""

import tensorflow as tf

from impala.learning.losses import Loss, vtrace_loss

PENALTY_COST = 0.1


def penalized_loss(inputs, config):
    """Returns the loss of section 4.2 plus `PENALTY_COST * KL(mu || pi)`, summed over the rows.

    Args:
      inputs: `impala.learning.losses.LossInputs` of a batch.
      config: `impala.config.LossConfig`, which has the flags.
    """
    loss = vtrace_loss(inputs, config)
    # Row t + 1 of the agent's outputs is what the behaviour policy made of row t.
    divergences = inputs.actions.kl_divergence(
        tf.stop_gradient(inputs.agent_outputs.policy[1:]), inputs.learner_outputs.policy[:-1]
    )
    # With --bootstrap_truncated some transitions are not steps, and must not count.
    penalty = inputs.sum_over_steps(divergences)
    return Loss(
        total=loss.total + PENALTY_COST * penalty,
        parts=loss.parts | {'penalty': penalty},  # Logged as loss/penalty.
        targets=loss.targets,
    )
