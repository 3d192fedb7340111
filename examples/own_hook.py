"""A hook of one's own: records how sure the policy is, and stops a run whose entropy has collapsed.

How to run it: docs/examples/own_hook.md.
"""

from impala import Hook

LEAST_ENTROPY = 0.01


class EntropyWatch(Hook):
    """Adds the mean entropy of the policy to metrics.jsonl, in nats."""

    def after_update(self, update):
        """Called after every update; see `impala.training.hooks.Hook`."""
        steps = update.batch[0].actor_output.env_outputs.reward.shape
        entropy = -update.metrics['loss/entropy'] / ((steps[0] - 1) * steps[1])
        update.log.record_update({'mean_entropy': entropy})
        if entropy < LEAST_ENTROPY:
            update.stop()
