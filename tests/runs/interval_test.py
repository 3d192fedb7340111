"""Tests of impala/runs/interval.py, through the lines of a log."""

import math

import numpy as np
import pytest
from run_logs import (
    LEVELS,
    Clock,
    create,
    metrics,
    record,
    write,
)

from impala import suites
from impala.runs.run_log import Counters


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_a_line_covers_the_time_since_the_last(logdir, clock):
    with create(logdir, clock, log_secs=10) as log:
        for i, lag in enumerate([1.0, 5.0, 3.0]):
            log.record_update(
                {
                    'loss/total': 2.0 * i,
                    'policy_lag_mean': lag,
                    'policy_lag_max': lag + 1,
                    'learning_rate': 0.1 / (i + 1),
                    'skipped': False,
                }
            )
        record(log, [1.0, 2.0, 6.0], frames=100)
        log.record_stage_seconds(
            {'actor/environment': 12.5, 'learner/train_step': 3.0, 'learner/wait': 0.5}
        )
        clock.now += 9.99
        assert not write(log, 60, 3)
        clock.now += 0.01
        log.record_actor_restart()
        log.record_discarded_unrolls(3)
        assert write(log, 80, 4)

        log.record_update({'loss/total': 7.0, 'policy_lag_max': 2.0, 'skipped': True})
        log.record_stage_seconds(
            {'actor/environment': 14.0, 'learner/train_step': 1.0, 'learner/wait': 15.5}
        )
        clock.now += 20
        assert write(log, 180, 5)
    first, second = metrics(logdir)
    assert first == {
        'wall_seconds': 10.0,
        'frames': 320,
        'agent_steps': 80,
        'updates': 4,
        'frames_per_second': 32.0,
        'agent_steps_per_second': 8.0,
        'policy_lag_mean': 3.0,
        'policy_lag_max': 6.0,
        'loss/total': 2.0,
        'learning_rate': pytest.approx(0.1 / 3, rel=1e-6),
        'episode_return/ALE/Pong-v5': 3.0,
        'episode_frames/ALE/Pong-v5': 100.0,
        'stage_seconds/actor/environment': 12.5,
        'stage_seconds/learner/train_step': 3.0,
        'stage_seconds/learner/wait': 0.5,
        'learner_idle_share': 0.05,
        'updates_skipped': 0,
        'unrolls_discarded': 3,
        'actor_restarts': 1,
        'non_finite_values': 0,
        **{f'level_frames/{name}': 0 for name in LEVELS},
        **{f'level_frames_per_second/{name}': 0 for name in LEVELS},
    }
    assert second == {
        'wall_seconds': 30.0,
        'frames': 720,
        'agent_steps': 180,
        'updates': 5,
        'frames_per_second': 20.0,
        'agent_steps_per_second': 5.0,
        'policy_lag_max': 2.0,
        'loss/total': 7.0,
        'stage_seconds/actor/environment': 1.5,
        # This stage restarted at zero with its process.
        'stage_seconds/learner/train_step': 1.0,
        'stage_seconds/learner/wait': 15.0,
        'learner_idle_share': 0.75,
        'updates_skipped': 1,
        'unrolls_discarded': 0,
        'actor_restarts': 0,
        'non_finite_values': 0,
        **{f'level_frames/{name}': 0 for name in LEVELS},
        **{f'level_frames_per_second/{name}': 0 for name in LEVELS},
    }


def test_levels_have_their_own_frames_and_speeds(logdir, clock):
    pong, other = (f'level_frames/{name}' for name in LEVELS)
    with create(logdir, clock) as log:
        log.record_agent_steps(np.array([0, 1, 0]), 20)
        clock.now += 10
        write(log, 60)
        log.record_agent_steps(np.array([1, 1, 1]), 20)
        clock.now += 20
        write(log, 120)
    first, second = metrics(logdir)
    assert (first[pong], first[other]) == (160, 80)
    assert (second[pong], second[other]) == (160, 320)
    assert first[f'level_frames_per_second/{LEVELS[0]}'] == 16
    assert second[f'level_frames_per_second/{LEVELS[0]}'] == 0
    assert second[f'level_frames_per_second/{LEVELS[1]}'] == 12
    # The run resumes from the first line.
    with create(logdir, clock, begin=Counters(agent_steps=60, frames=240)) as log:
        log.record_agent_steps(np.array([0]), 20)
        clock.now += 10
        write(log, 80)
    resumed = metrics(logdir)[-1]
    assert (resumed[pong], resumed[other]) == (240, 80)
    assert resumed[f'level_frames_per_second/{LEVELS[0]}'] == 8


def test_a_suite_is_scored_when_every_level_has_an_episode(logdir, clock):
    levels = [suites.Level(LEVELS[0], '', 0.0, 10.0), suites.Level(LEVELS[1], '', -1.0, 1.0)]
    with create(logdir, clock, suite=suites.Suite('both', tuple(levels))) as log:
        for agent_steps, returns in enumerate(([[4, 6], []], [[5], [0, 4]], [[], [0]]), 1):
            for level_id, of_level in enumerate(returns):
                record(log, of_level, level_id)
            clock.now += 10
            write(log, agent_steps)
    first, second, third = metrics(logdir)
    assert not [name for line in (first, third) for name in line if name.startswith('both/')]
    # 50 percent and 150.
    assert second['both/training_no_cap'] == 100
    assert second['both/training_cap_100'] == 75
    assert second['both/training_median_no_cap'] == 100
    assert second['both/training_median_cap_100'] == 75


def test_never_nan(logdir, clock):
    with create(logdir, clock) as log:
        for value in (math.nan, math.inf, 3.0, -math.inf):
            log.record_update({'loss/total': value, 'policy_lag_max': value})
        log.record_update({'gradient_norm': math.nan})
        log.record_update({'loss/baseline': 1e308})
        log.record_update({'loss/baseline': 1e308})
        record(log, [math.nan, math.inf])
        record(log, [2.0, math.nan], level_id=1)
        write(log, 10, 6)
    (line,) = metrics(logdir)
    assert line['loss/total'] == 3.0 and line['policy_lag_max'] == 3.0
    assert 'gradient_norm' not in line and 'loss/baseline' not in line
    assert 'episode_return/ALE/Pong-v5' not in line
    assert line[f'episode_return/{LEVELS[1]}'] == 2.0
    # 6 of the first loop, the gradient norm, a mean beyond float64 and 3 returns.
    assert line['non_finite_values'] == 11
    assert log.mean_return == 2.0
