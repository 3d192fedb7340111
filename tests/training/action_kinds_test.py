"""Short runs on every kind of action space, through real actor processes."""

import json

import numpy as np
import pytest

from configs import config
from impala import training
from impala.runs import files as run_files

LOSSES = [
    {'loss': 'vtrace', 'replay_fraction': 0.5},
    {'loss': 'appo', 'kl_cost': 0.1, 'target_update_steps': 2, 'sample_reuse': 2},
]
LEVELS = [
    'multi_discrete', 'multi_binary', 'box', 'unbounded', 'mixture', 'masked', 'masked_in_dict',
]  # fmt: skip


@pytest.mark.parametrize('level', LEVELS)
def test_every_action_space_trains(tmp_path, level):
    run = config(
        tmp_path,
        level_name=f'space_levels:{level}',
        info_action_mask=level == 'masked',
        clip_actions=level == 'unbounded',
        use_lstm='true' if level == 'mixture' else 'false',
        **LOSSES[LEVELS.index(level) % 2],
    )
    training.train(run)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    losses = [line[name] for line in lines for name in line if name.startswith('loss/')]
    assert np.isfinite(losses).all()
    assert lines[-1]['frames'] >= 100


@pytest.mark.parametrize(('level', 'least'), [('mixture', 7.0), ('masked_in_dict', 8.0)])
def test_mixed_and_masked_actions_are_learned(tmp_path, level, least):
    run = config(
        tmp_path,
        level_name=f'space_levels:{level}',
        total_environment_frames=16_000,
        num_actors=16,
        envs_per_process=8,
        batch_size=16,
        loss='appo',
        normalize_advantages=True,
        optimizer='adam',
        learning_rate=0.005,
        entropy_cost=0.0001,
        discounting=0.5,
        sample_reuse=2,
    )
    training.train(run)
    returns = [row['return'] for row in run_files.read_episodes(str(tmp_path))]
    assert np.mean(returns[:100]) < least - 3
    assert np.mean(returns[-200:]) > least
