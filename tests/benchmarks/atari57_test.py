"""Each of the 57 Atari games, trained and tested by the real commands.

Slow, about twenty minutes: `python -m pytest -m slow`.
"""

import math

import pytest

from benchmarks import atari57
from impala import suites

# Agent steps: a few unrolls of every actor.
FEW = 1000


@pytest.mark.slow
@pytest.mark.parametrize('level_name', suites.load('atari57').level_names)
def test_a_game_trains_and_is_tested(level_name):
    row = atari57.measure(level_name, seconds=3)
    assert row['level'] == level_name
    assert row['agent_steps'] >= FEW
    assert row['agent_steps_per_second'] > 0
    assert math.isfinite(row['test_return'])
