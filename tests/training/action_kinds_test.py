"""Short runs on every kind of action space, through real actor processes."""

import numpy as np
import pytest

from configs import LEARNING, assert_sound, config
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
        core='lstm' if level == 'mixture' else 'none',
        **LOSSES[LEVELS.index(level) % 2],
    )
    training.train(run)
    assert_sound(tmp_path)


@pytest.mark.parametrize(('level', 'least'), [('mixture', 7.0), ('masked_in_dict', 8.0)])
def test_mixed_and_masked_actions_are_learned(tmp_path, level, least):
    run = config(
        tmp_path,
        level_name=f'space_levels:{level}',
        **LEARNING,
        learning_rate=0.005,
        discounting=0.5,
    )
    training.train(run)
    returns = [row['return'] for row in run_files.read_episodes(str(tmp_path))]
    assert np.mean(returns[:100]) < least - 3
    assert np.mean(returns[-200:]) > least
