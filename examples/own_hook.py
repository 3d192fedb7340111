"""A hook of one's own: records how sure the policy is, and stops a run whose entropy has collapsed.

How to run it: docs/examples/own_hook.md.
"""

from impala import Hook

LEAST_ENTROPY = 0.01


class EntropyWatch(Hook):
    """Adds the mean entropy of the policy to metrics.jsonl, in nats, for a run of one learner."""

    def after_update(self, update):
        """Called after every update; see `impala.training.hooks.Hook`."""
        # The loss is a sum over all steps of the batch, which has a part for each device.
        shapes = [part.actor_output.env_outputs.reward.shape for part in update.batch]
        steps = sum((rows - 1) * columns for rows, columns in shapes)
        entropy = -update.metrics['loss/entropy'] / steps
        update.log.record_update({'mean_entropy': entropy})
        if entropy < LEAST_ENTROPY:
            update.stop()
