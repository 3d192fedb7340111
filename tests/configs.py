"""Settings of small runs, and specs of small environments."""

from impala.config import Config
from impala.trajectory import ArraySpec, EnvironmentSpec

IMAGE = EnvironmentSpec({'frame': ArraySpec((72, 96, 3), 'uint8')}, 9, 4, 'dmlab')

STACK = EnvironmentSpec({'frame': ArraySpec((84, 84, 4), 'uint8')}, 6, 4, 'atari')

VECTOR = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)


def config(logdir, **changes):
    """Returns settings of a run with two actors and short episodes, with `changes` applied."""
    values = {
        'logdir': str(logdir),
        'level_name': 'levels:short',
        'num_actors': 2,
        'total_environment_frames': 100,
        'batch_size': 2,
        'unroll_length': 10,
        'max_actor_restarts': 0,
        'log_secs': 0.0,
        'level_cache_dir': '',
    }
    return Config.of(**(values | changes))
