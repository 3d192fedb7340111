"""Tests of benchmarks/numbered_level.py: lost and duplicated episodes are found."""

import pytest

from benchmarks import numbered_level
from impala.environments import EnvironmentConfig
from impala.trajectory import EpisodeEnd


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(numbered_level.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(numbered_level, '_BLOCK', 16)
    return str(tmp_path)


def play(environment, count):
    """Plays episodes; returns their rows of `episodes.csv`."""
    rows = []
    total, frames = 0.0, 0
    while len(rows) < count:
        reward, end, _ = environment.step(frames % 2)
        total, frames = total + reward, frames + 1
        if end:
            rows.append(
                {
                    'episode_return': str(total),
                    'episode_frames': str(frames),
                    'ended_by': end.name.lower(),
                }
            )
            total, frames = 0.0, 0
    return rows


def start():
    environment = numbered_level.cart_pole(0, EnvironmentConfig())
    environment.reset()
    return environment


def test_several_blocks_of_two_environments_lose_nothing(folder):
    first, second = start(), start()
    rows = []
    for _ in range(3):
        rows += play(first, 25) + play(second, 25)
    result = numbered_level.account(rows, folder)
    assert (result.episodes, result.duplicates, result.gaps, result.missing) == (150, 0, {}, 0)
    # Alternating left and right keeps the pole up for about 40 steps; a truncation is not a fall.
    assert max(int(row['episode_frames']) for row in rows) == numbered_level.EPISODE_STEPS
    assert {row['ended_by'] for row in rows} == {'terminated', 'truncated'}
    assert result.frames_per_fall > numbered_level.EPISODE_STEPS


def test_lost_and_duplicated_episodes_are_found(folder):
    rows = play(start(), 60)
    other = play(start(), 10)
    # An environment's last episodes do not count, as they may not have been sent.
    result = numbered_level.account(rows[3:20] + rows[21:40] + rows[50:] + other[:5], folder)
    assert result.duplicates == 0
    assert result.gaps == {0: 3}
    assert result.missing == 3 + 1 + 10
    result = numbered_level.account([*rows, rows[4], rows[50]], folder)
    assert (result.duplicates, result.gaps) == (2, {})


def test_clipped_rewards_are_those_of_the_game(folder):
    environment = start()
    rewards = [environment.step(0)[:2] for _ in range(200)]
    assert {min(reward, 1) for reward, _ in rewards} == {1.0}
    assert any(end is EpisodeEnd.TERMINATED for _, end in rewards)
