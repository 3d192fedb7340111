"""Short runs with a choice of settings, for processes that must not import a whole test module."""

from configs import config
from impala import training
from impala.learning import devices as learner_devices


def num_devices(choice):
    return max(1, len(choice['learner_devices']))


def num_frames(choice):
    """Debug mode is slow."""
    return num_devices(choice) * (100 if choice['debug'] else 200)


def run_of(logdir, choice):
    return config(
        logdir,
        **choice,
        # There all settings of spaces have an effect.
        level_name='space_levels:crowded',
        width=35,
        height=33,
        batch_size=2 * num_devices(choice),
        total_environment_frames=num_frames(choice),
    )


def train(logdir, choice, shard):
    """Trains with one of the choices; returns the last checkpoint."""
    run = run_of(logdir, choice)
    if run.cluster.replay_addresses:
        run = run.replace(replay_addresses=(shard,))
    return training.train(run)


def train_on_devices(logdir, choice, shard):
    """Does what `train` does, in a separate process, since a process can have one strategy."""
    learner_devices.prepare(choice['learner_devices'], are_shared_with_others=False)
    train(logdir, choice, shard)
