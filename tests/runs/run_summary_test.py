"""Tests of impala/runs/run_summary.py."""

import io
import json
import math

import pytest
from run_logs import (
    LEVELS,
    Clock,
    create,
    record,
    write,
)

from impala.runs import run_summary
from impala.runs.files import LogdirError


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_summary(logdir, clock):
    with pytest.raises(LogdirError):
        run_summary.read_summary(logdir)
    with create(logdir, clock) as log:
        clock.now += 5
        record(log, [0.0] * 50 + [1.0] * 100)
        write(log, 500, 5)
        record(log, [5.0, math.inf, math.nan], level_id=1)
        log.record_update({'skipped': True})
        log.record_discarded_unrolls(1200)
        clock.now += 5
        write(log, 1000, 10)
        # Discarded after the last update.
        log.record_discarded_unrolls(7)
    summary = run_summary.read_summary(logdir)
    json.dumps(summary, allow_nan=False)
    assert summary == {
        'wall_seconds': 10.0,
        'frames': 4000,
        'agent_steps': 1000,
        'updates': 10,
        'agent_steps_per_second': 100.0,
        'episodes': 151,
        'mean_return_last_100': (99 * 1 + 5) / 100,
        'episodes_not_finite': 2,
        'updates_skipped': 1,
        'unrolls_discarded': 1207,
        'levels': {
            LEVELS[0]: {'episodes': 150, 'mean_return_last_100': 1.0},
            LEVELS[1]: {'episodes': 1, 'mean_return_last_100': 5.0},
        },
    }

    assert run_summary.describe_summary(summary) == (
        '1,000 agent steps (4,000 frames) in 10 s; mean return of the last 100 episodes: 1.04 '
        '(2 with returns that are not finite left out).\n'
        'Not learned from: 1,207 unrolls with values of the environment that are not finite.\n'
        'Skipped: 1 of 10 updates, whose loss or gradient was not finite.'
    )


def test_summary_of_a_run_without_episodes(logdir, clock):
    create(logdir, clock).close()
    summary = run_summary.read_summary(logdir)
    assert run_summary.describe_summary(summary) == (
        '0 agent steps (0 frames) in 0 s; mean return of the last 100 episodes: none has ended yet.'
    )
    assert summary['episodes'] == 0 and summary['mean_return_last_100'] is None
    assert summary['agent_steps_per_second'] == 0.0


@pytest.mark.parametrize(
    ('returns', 'discarded', 'text'),
    [
        ([math.inf, math.nan], 0, 'none is finite, of 2.'),
        ([], 3, 'none has ended in an unroll that was learned from.'),
    ],
)
def test_a_missing_mean_return_is_explained(logdir, clock, returns, discarded, text):
    stream = io.StringIO()
    with create(logdir, clock, stream) as log:
        record(log, returns)
        log.record_discarded_unrolls(discarded)
        clock.now += 10
        write(log, 10, 1)
    assert ('no return is finite' in stream.getvalue()) == bool(returns)
    sentence = run_summary.describe_summary(run_summary.read_summary(logdir)).splitlines()[0]
    assert sentence.endswith(f'mean return of the last 100 episodes: {text}')
