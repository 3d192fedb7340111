"""Tests of benchmarks/numbered_level.py: what is lost or doubled is found."""

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
    """Rows of `episodes.csv` of so many episodes."""
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


def test_nothing_lost_over_several_blocks_of_two_environments(folder):
    first, second = start(), start()
    rows = []
    for _ in range(3):
        rows += play(first, 25) + play(second, 25)
    result = numbered_level.account(rows, folder)
    assert (result.episodes, result.duplicates, result.gaps, result.missing) == (150, 0, {}, 0)
    # Left and right in turn keeps the pole up for some 40 steps; a cut is no fall.
    assert max(int(row['episode_frames']) for row in rows) == numbered_level.EPISODE_STEPS
    assert {row['ended_by'] for row in rows} == {'terminated', 'truncated'}
    assert result.frames_per_fall > numbered_level.EPISODE_STEPS


def test_what_is_lost_or_doubled_is_found(folder):
    rows = play(start(), 60)
    other = play(start(), 10)
    # Of what an environment did last, nobody can tell whether it was lost or never sent.
    result = numbered_level.account(rows[3:20] + rows[21:40] + rows[50:] + other[:5], folder)
    assert result.duplicates == 0
    assert result.gaps == {0: 3}
    assert result.missing == 3 + 1 + 10
    result = numbered_level.account([*rows, rows[4], rows[50]], folder)
    assert (result.duplicates, result.gaps) == (2, {})


def test_learning_sees_the_game_as_it_is(folder):
    environment = start()
    rewards = [environment.step(0)[:2] for _ in range(200)]
    assert {min(reward, 1) for reward, _ in rewards} == {1.0}
    assert any(end is EpisodeEnd.TERMINATED for _, end in rewards)
