"""Trains CartPole from Python, collects the returns, and tests the result."""

import impala


class Returns(impala.Hook):
    """Collects the return of every episode, and prints the mean of the last 100."""

    def __init__(self):
        self.returns = []

    def after_update(self, update):
        rows = update.batch[0].actor_output.env_outputs
        # Row 0 is the last row of the unroll before.
        ended, returns = rows.done[1:].numpy(), rows.info.episode_return[1:].numpy()
        self.returns += returns[ended].tolist()
        if update.updates % 100 == 0:
            last = self.returns[-100:]
            print(f'{update.frames:,} frames, mean return {sum(last) / len(last):.1f}')


config = impala.Config.of(
    level_name='CartPole-v1',
    logdir='runs/cartpole',
    total_environment_frames=50_000,
    num_actors=8,
    batch_size=8,
    unroll_length=20,
    learning_rate=0.003,
    epsilon=0.01,
    entropy_cost=0.01,
    gradient_clip_norm=40,
)
returns = Returns()
checkpoint = impala.train(config, hooks=[returns])
tested = impala.evaluate(config.replace(mode='test', test_num_episodes=20))
print(f'{checkpoint}: mean return {sum(tested["CartPole-v1"]) / 20:.1f}')
