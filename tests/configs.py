"""Settings of small runs, specs of small environments, and what the metrics of a run must show."""

import json

import numpy as np

from impala.config import Config
from impala.trajectory import ArraySpec, EnvironmentSpec

IMAGE = EnvironmentSpec({'frame': ArraySpec((72, 96, 3), 'uint8')}, 9, 4, 'dmlab')

STACK = EnvironmentSpec({'frame': ArraySpec((84, 84, 4), 'uint8')}, 6, 4, 'atari')

VECTOR = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)

# Settings of short runs that learn an easy level, to be completed by the test.
LEARNING = {
    'total_environment_frames': 16_000,
    'num_actors': 16,
    'envs_per_process': 8,
    'batch_size': 16,
    'loss': 'appo',
    'normalize_advantages': True,
    'optimizer': 'adam',
    'entropy_cost': 0.0001,
    'sample_reuse': 2,
    'log_secs': 0.5,
}


def config(logdir, **changes):
    """Returns settings of a run with two actors and short episodes, with `changes` applied."""
    values = {
        'logdir': str(logdir),
        'level_name': 'levels:short',
        'num_actors': 2,
        # Each process takes a quarter of a second of processor time to start.
        'envs_per_process': 2,
        'total_environment_frames': 100,
        'batch_size': 2,
        'unroll_length': 10,
        'max_actor_restarts': 0,
        'log_secs': 0.0,
        'level_cache_dir': '',
    }
    return Config.of(**(values | changes))


def assert_sound(logdir):
    """Checks the metrics of a short run: no update was skipped, and all losses are finite."""
    lines = [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    losses = [line[name] for line in lines for name in line if name.startswith('loss/')]
    assert losses and np.isfinite(losses).all()
    assert lines[-1]['frames'] >= 100
