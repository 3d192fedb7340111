"""Settings of small runs, and specs of small environments."""

from impala import config as run_config
from impala import environments
from impala.learning.learner import LearnerConfig
from impala.trajectory import ArraySpec, EnvironmentSpec

IMAGE = EnvironmentSpec({'frame': ArraySpec((72, 96, 3), 'uint8')}, 9, 4, 'dmlab')

STACK = EnvironmentSpec({'frame': ArraySpec((84, 84, 4), 'uint8')}, 6, 4, 'atari')

VECTOR = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)


def config(logdir, **changes):
    values = {
        'logdir': str(logdir),
        'level_names': ('levels:short',),
        'seed': 1,
        'num_actors': 2,
        'envs_per_process': 1,
        'total_environment_frames': 100,
        'torso': 'auto',
        'use_lstm': None,
        'compute_dtype': 'float32',
        'learner': LearnerConfig(batch_size=2, unroll_length=10),
        'environment': environments.EnvironmentConfig(),
        'inference_batch_size': 0,
        'inference_timeout_ms': 20.0,
        'queue_capacity': 1,
        'max_actor_restarts': 0,
        'save_checkpoint_secs': 600.0,
        'log_secs': 0.0,
    }
    return run_config.TrainingConfig(**(values | changes))
