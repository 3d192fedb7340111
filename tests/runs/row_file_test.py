"""Tests of impala/runs/row_file.py, through the files of a log."""

import io
import os

import pytest
from run_logs import (
    Clock,
    create,
    episodes,
    file_size_limit,
    metrics,
    record,
    write,
)

from impala.runs.run_log import Counters


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_rows_after_the_checkpoint_are_moved_away(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        for agent_steps in (100, 200, 300):
            record(log, [agent_steps], level_id=1)
            clock.now += 10
            write(log, agent_steps)
    stream = io.StringIO()
    with create(logdir, clock, stream, begin=Counters(800, 200, 0, 20.5)) as log:
        assert log.mean_return == 150.0
        assert 'Moved 2 rows' in stream.getvalue()
        assert log.wall_seconds == 20.5
        record(log, [7], level_id=1)
        write(log, 250)
    assert [line['agent_steps'] for line in metrics(logdir)] == [100, 200, 250]
    assert [row['agent_steps'] for row in episodes(logdir)] == ['100', '200', '250']
    assert [line['agent_steps'] for line in metrics(logdir, 'metrics.dropped.jsonl')] == [300]
    with open(os.path.join(logdir, 'episodes.dropped.csv')) as file:
        assert '300' in file.read()


def test_damaged_lines_are_reported_and_left_out(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        record(log, [5], level_id=1)
        clock.now += 10
        write(log, 100)
    path = os.path.join(logdir, 'metrics.jsonl')
    with open(path, 'a') as file:
        file.write('{"agent_steps": null, "wall_seconds": 3}\n{"agent_steps": \n')
    stream = io.StringIO()
    with create(logdir, clock, stream, begin=Counters(400, 100, 0, 10.0)):
        pass
    assert f'WARNING: {path}, line 2 (and 1 more) is damaged and left out.\n' in stream.getvalue()
    assert 'Moved' not in stream.getvalue()
    assert [line['agent_steps'] for line in metrics(logdir)] == [100]
    with open(os.path.join(logdir, 'metrics.dropped.jsonl')) as file:
        assert 'null' in file.read()


@pytest.mark.parametrize('cut', [1, 7, 40])
def test_a_truncated_last_line_is_repaired(logdir, clock, cut):
    with create(logdir, clock, log_secs=1) as log:
        for agent_steps in (100, 200):
            record(log, [agent_steps])
            clock.now += 10
            write(log, agent_steps)
    for name in ('metrics.jsonl', 'episodes.csv'):
        path = os.path.join(logdir, name)
        os.truncate(path, os.path.getsize(path) - cut)
    with create(logdir, clock, begin=Counters(800, 200)) as log:
        assert log.mean_return == 100.0
        record(log, [300])
        write(log, 300)
    assert [line['agent_steps'] for line in metrics(logdir)] == [100, 300]
    assert [row['episode_return'] for row in episodes(logdir)] == ['100.0', '300.0']


def test_a_truncated_header_is_repaired(logdir, clock):
    create(logdir, clock).close()
    os.truncate(os.path.join(logdir, 'episodes.csv'), 20)
    with create(logdir, clock) as log:
        record(log, [3])
        write(log, 10)
    assert [row['level'] for row in episodes(logdir)] == ['ALE/Pong-v5']


def test_a_full_disk_neither_loses_nor_truncates_rows(logdir, clock):
    stream = io.StringIO()
    with create(logdir, clock, stream, log_secs=1) as log:
        agent_steps = 0

        def play(count):
            nonlocal agent_steps
            for _ in range(count):
                agent_steps += 10
                record(log, [agent_steps])
                log.record_update({'loss/total': 1.0})
                clock.now += 1
                write(log, agent_steps)

        play(3)
        # Rows have different lengths, so some limit falls into the middle of a row.
        size = os.path.getsize(os.path.join(logdir, 'metrics.jsonl'))
        for space in (size + 1, size + 100, size + 700):
            with file_size_limit(space):
                play(5)
                metrics(logdir)
                with open(os.path.join(logdir, 'episodes.csv')) as file:
                    assert file.read().endswith('\n')
        warnings = [line for line in stream.getvalue().splitlines() if 'WARNING' in line]
        assert any('metrics.jsonl: File too large' in line for line in warnings)
        play(2)
    expected = list(range(10, agent_steps + 1, 10))
    assert [line['agent_steps'] for line in metrics(logdir)] == expected
    assert [int(row['agent_steps']) for row in episodes(logdir)] == expected
    assert len(os.listdir(os.path.join(logdir, 'summaries'))) == 1


def test_closing_on_a_full_disk_reports_what_is_lost(logdir, clock):
    stream = io.StringIO()
    log = create(logdir, clock, stream)
    record(log, [1.0])
    with file_size_limit(0):
        write(log, 10)
        log.close()
    text = stream.getvalue()
    assert 'bytes could not be written' in text and 'learning_curve.png' in text
    assert episodes(logdir) == []
