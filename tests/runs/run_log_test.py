"""Tests of impala/runs/run_log.py; they read its files by other means."""

import gc
import io
import os
import sys

import numpy as np
import pytest
import tensorflow as tf
from run_logs import (
    HEADER,
    LEVELS,
    Clock,
    create,
    episodes,
    file_size_limit,
    metrics,
    record,
    write,
)

from impala.runs import run_log
from impala.runs.files import LogdirError
from impala.runs.log import TestResult
from impala.runs.run_log import Counters
from impala.suites import Level, Suite
from impala.trajectory import EpisodeEnd


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_curves_leave_nothing_in_memory(logdir, clock):
    gc.collect()
    gc.disable()  # In a process as large as a learner it runs too late.
    try:
        with create(logdir, clock) as log:
            record(log, [1.0])
            clock.now += 1000.0
            assert write(log, 10)
            assert os.path.exists(os.path.join(logdir, run_log.CURVE_FILE))
            assert not [each for each in gc.get_objects() if type(each).__name__ == 'Figure']
    finally:
        gc.enable()


def test_lines_leave_nothing_in_memory(logdir, clock):
    """Each line has 20 new numbers."""
    lines = 50
    with open(os.devnull, 'w') as stream, create(logdir, clock, stream) as log:

        def write_lines(numbers):
            for number in numbers:
                clock.now += 10.0 + number / 7
                values = {f'loss/{i}': number + i / 13 for i in range(20)}
                log.record_update(values)
                assert write(log, number, number)

        write_lines(range(1, lines + 1))
        before = sys.getallocatedblocks()
        write_lines(range(lines + 1, 2 * lines + 1))
        assert sys.getallocatedblocks() - before < 5 * lines


def test_takes_tensors(logdir, clock):
    with create(logdir, clock) as log:
        log.record_update({'loss/total': tf.constant(1.5), 'skipped': tf.constant(True)})
        write(log, 10, 1)
    (line,) = metrics(logdir)
    assert line['loss/total'] == 1.5 and line['updates_skipped'] == 1


def test_episodes_of_a_whole_batch(logdir, clock):
    ends = np.array(
        [
            [EpisodeEnd.NOT_ENDED, EpisodeEnd.TERMINATED],
            [EpisodeEnd.LIFE_LOST, EpisodeEnd.NOT_ENDED],
            [EpisodeEnd.TRUNCATED, EpisodeEnd.TERMINATED],
        ]
    )
    returns = np.array([[9.0, -21.0], [9.0, 9.0], [0.1, 1e9]], np.float32)
    frames = np.array([[36, 400], [36, 36], [4000, 11]], np.int32)
    with create(logdir, clock, log_secs=1000) as log:
        clock.now += 1.5
        log.record_episodes(np.array([1, 0]), returns, frames, ends)
        # A row has the counters of its batch's update and is written before any line.
        write(log, 6, 1)
        rows = episodes(logdir)
    assert [list(row.values()) for row in rows] == [
        ['1.5', '24', '6', 'ALE/Pong-v5', '-21.0', '400', 'terminated'],
        ['1.5', '24', '6', LEVELS[1], '0.1', '4000', 'truncated'],
        ['1.5', '24', '6', 'ALE/Pong-v5', '1000000000.0', '11', 'terminated'],
    ]
    with open(os.path.join(logdir, 'episodes.csv')) as file:
        assert file.readline() == HEADER + '\n'


def test_close_writes_what_is_left_and_repeats_safely(logdir, clock):
    with create(logdir, clock) as log:
        clock.now += 1
        write(log, 10, 1)
        record(log, [4.0])
        log.close()
    assert [line['agent_steps'] for line in metrics(logdir)] == [10]
    assert len(episodes(logdir)) == 1
    with open(os.path.join(logdir, 'learning_curve.png'), 'rb') as file:
        assert file.read(4) == b'\x89PNG'
    assert not [name for name in os.listdir(logdir) if 'tmp' in name]


def test_a_failing_run_is_logged_and_its_error_propagates(logdir, clock):
    with pytest.raises(KeyError), create(logdir, clock) as log:
        write(log, 10, 1)
        raise KeyError
    assert len(metrics(logdir)) == 1


def test_the_first_seconds_have_no_curve(logdir, clock):
    with create(logdir, clock, log_secs=3) as log:
        drawn = []
        for i in range(1, 5):
            record(log, [1.0])
            clock.now += 3
            write(log, i)
            drawn.append(os.path.exists(os.path.join(logdir, 'learning_curve.png')))
    assert drawn == [False, False, False, True]


def test_curve_is_drawn_from_time_to_time(logdir, clock):
    path = os.path.join(logdir, 'learning_curve.png')
    log = create(logdir, clock, log_secs=10)
    clock.now += 10
    write(log, 10)
    assert not os.path.exists(path)
    record(log, [1.0])
    drawn = []
    for i in range(2, 40):
        clock.now += 10
        write(log, 10 * i)
        if os.path.exists(path):
            drawn.append(10 * i)
            os.remove(path)
    assert drawn == [20, 320]
    log.close()
    assert os.path.exists(path)


def test_one_picture_a_minute_goes_to_a_file_and_tensorboard(logdir, clock):
    pixels = np.random.default_rng(0).integers(256, size=(6, 10, 3), dtype=np.uint8)
    due = []
    with create(logdir, clock, log_secs=10) as log:
        for i in range(10):
            clock.now += 10
            due.append(log.picture_is_due)
            if due[-1]:
                log.record_picture('frames', pixels + i)
            write(log, 10 * (i + 1))
        clock.now += 59
        assert not create(logdir + '2', clock).picture_is_due
    assert due == [i % 6 == 0 for i in range(10)]
    newest = tf.io.decode_png(tf.io.read_file(os.path.join(logdir, 'frames.png')))
    np.testing.assert_array_equal(newest, pixels + 6)
    folder = os.path.join(logdir, 'summaries')
    (name,) = os.listdir(folder)
    seen = {}
    for record_ in tf.data.TFRecordDataset(os.path.join(folder, name)):
        event = tf.compat.v1.Event.FromString(record_.numpy())
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == 'images':
                assert value.tag == 'frames'
                seen[event.step] = list(tf.make_ndarray(value.tensor))
    assert seen.keys() == {10, 70}
    for step, (width, height, png) in seen.items():
        assert (width, height) == (b'10', b'6')
        np.testing.assert_array_equal(tf.io.decode_png(png), pixels + (step - 10) // 10)


def test_a_picture_that_cannot_be_written_does_not_end_the_run(logdir, clock):
    stream = io.StringIO()
    with create(logdir, clock, stream) as log:
        with file_size_limit(0):
            log.record_picture('frames', np.zeros((6, 10, 1), np.uint8))
        assert 'WARNING: Cannot write' in stream.getvalue()
        assert os.listdir(logdir).count('frames.png') == 0


def test_a_resumed_run_continues_its_log(logdir, clock):
    with create(logdir, clock) as log:
        record(log, [1.0] * 60)
        clock.now += 100
        write(log, 500, 5)
    clock.now += 5000
    with create(logdir, clock, begin=Counters(2000, 500, 5, 101.5)) as log:
        assert log.mean_return == 1.0
        clock.now += 8.5
        record(log, [4.0] * 60)
        write(log, 600, 6)
        assert log.mean_return == (40 * 1 + 60 * 4) / 100
    lines = metrics(logdir)
    assert [line['wall_seconds'] for line in lines] == [100.0, 110.0]
    assert lines[1]['agent_steps_per_second'] == pytest.approx(100 / 8.5, rel=1e-6)
    rows = episodes(logdir)
    assert [row['wall_seconds'] for row in rows] == ['100.0'] * 60 + ['110.0'] * 60
    assert all(row['level'] != 'level' for row in rows)
    assert not [name for name in os.listdir(logdir) if 'dropped' in name]


def test_tests_are_in_the_next_line_in_tensorboard_and_in_the_curve(logdir, clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        run_log.learning_curve, 'draw', lambda path, curves, tests: drawn.append(dict(tests))
    )
    result = TestResult(400, 100, 2.5, {LEVELS[0]: -20.5, LEVELS[1]: 3.0}, {'own/test_no_cap': 7.5})
    with create(logdir, clock, log_secs=0) as log:
        log.record_test(result)
        write(log, 300, 3)
        write(log, 310, 4)
        # The last of two in one line.
        log.record_test(result._replace(frames=800, agent_steps=200, mean_returns={LEVELS[0]: 1.0}))
        log.record_test(result._replace(frames=900, agent_steps=225, mean_returns={LEVELS[0]: 2.0}))
        write(log, 320, 5)
    lines = metrics(logdir)
    tested = {name for name in lines[0] if 'test' in name}
    assert tested == {
        f'test_return/{LEVELS[0]}', f'test_return/{LEVELS[1]}', 'own/test_no_cap',
        'test/frames', 'test/agent_steps', 'test/wall_seconds',
    }  # fmt: skip
    assert lines[0][f'test_return/{LEVELS[0]}'] == -20.5 and lines[0]['own/test_no_cap'] == 7.5
    assert (lines[0]['test/frames'], lines[0]['test/agent_steps']) == (400, 100)
    assert not [name for name in lines[1] if 'test' in name]
    assert lines[2][f'test_return/{LEVELS[0]}'] == 2.0 and lines[2]['test/agent_steps'] == 225
    folder = os.path.join(logdir, 'summaries')
    (name,) = os.listdir(folder)
    written = tf.data.TFRecordDataset(os.path.join(folder, name))
    events = [tf.compat.v1.Event.FromString(record_.numpy()) for record_ in written]
    tags = {(event.step, value.tag) for event in events for value in event.summary.value}
    assert {(300, f'test_return/{LEVELS[0]}'), (320, 'test/agent_steps')} <= tags
    first = {LEVELS[0]: [(100, 2.5, -20.5), (200, 2.5, 1.0), (225, 2.5, 2.0)],
             LEVELS[1]: [(100, 2.5, 3.0)]}  # fmt: skip
    assert drawn.pop() == first
    # A resumed run reads them from the lines that its checkpoint keeps.
    with create(logdir, clock, begin=Counters(1240, 310, 4, 3.0)) as log:
        write(log, 330, 5)
    assert drawn.pop() == {LEVELS[0]: [(100, 2.5, -20.5)], LEVELS[1]: [(100, 2.5, 3.0)]}


def test_tests_of_hold_out_levels_are_drawn_with_the_trained_ones(logdir, clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        run_log.learning_curve, 'draw', lambda path, curves, tests: drawn.append(dict(tests))
    )
    suite = Suite('own', (Level('trained', 'held_out'), Level('same', 'same')))
    with create(logdir, clock, suite=suite) as log:
        log.record_test(TestResult(400, 100, 2.5, {'held_out': 1.0, 'same': 2.0}, {}))
        write(log, 300, 3)
    assert drawn == [{'trained': [(100, 2.5, 1.0)], 'same': [(100, 2.5, 2.0)]}]
    assert 'test_return/held_out' in metrics(logdir)[0]


def test_unusable_logdir(tmp_path, clock):
    path = tmp_path / 'file'
    path.write_text('')
    with pytest.raises(LogdirError, match='file'):
        create(str(path), clock)
