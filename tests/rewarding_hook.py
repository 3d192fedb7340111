"""A hook with an intrinsic reward, by name (`--hooks=rewarding_hook:RewardingHook`)."""

import tensorflow as tf

from impala import Hook


class RewardingHook(Hook):
    """Rewards every action with 0.25."""

    def intrinsic_reward(self, batch):
        """See `Hook`."""
        return tf.fill(batch.actor_output.env_outputs.reward[1:].shape, 0.25)
