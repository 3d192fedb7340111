"""Tests of impala/runs/run_log.py: the files are read by other means than they were written."""

import contextlib
import csv
import fcntl
import gc
import io
import json
import math
import os
import pty
import resource
import select
import struct
import sys
import termios

import numpy as np
import pytest
import tensorflow as tf

from impala import suites
from impala.runs import run_log
from impala.runs.checkpoint import LogdirError
from impala.trajectory import EpisodeEnd

LEVELS = ['ALE/Pong-v5', 'a "level", with commas']
HEADER = 'wall_seconds,frames,agent_steps,level,episode_return,episode_frames,ended_by'


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1e6

    def __call__(self):
        return self.now


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def create(logdir, clock, stream=None, **kwargs):
    return run_log.RunLog(
        logdir, LEVELS, 4, 4000, clock=clock, stream=stream or io.StringIO(), **kwargs
    )


def write(log, agent_steps, updates=0):
    return log.maybe_write(4 * agent_steps, agent_steps, updates)


def record(log, returns, level_id=0, end=EpisodeEnd.TERMINATED, frames=40):
    n = len(returns)
    log.record_episodes(
        np.full([n], level_id, np.int32),
        np.array(returns, np.float32),
        np.full([n], frames, np.int32),
        np.full([n], end, np.int32),
    )


def refuse_constant(name):
    raise ValueError(f'{name} is no JSON')


def metrics(logdir, name='metrics.jsonl'):
    with open(os.path.join(logdir, name)) as file:
        content = file.read()
    assert content == '' or content.endswith('\n')
    return [json.loads(line, parse_constant=refuse_constant) for line in content.splitlines()]


def episodes(logdir, name='episodes.csv'):
    with open(os.path.join(logdir, name), newline='') as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """Lets the operating system refuse to write beyond `num_bytes` of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_curves_leave_nothing_in_memory(logdir, clock):
    gc.collect()
    gc.disable()  # For it comes too late in a process as large as a learner.
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
    """Each has 20 numbers that were never there before."""
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


def test_a_line_has_what_happened_since_the_last(logdir, clock):
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
        # This stage went back to zero: its process was started again.
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


def test_levels_have_frames_and_speeds_of_their_own(logdir, clock):
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
    # The run goes on from the first line.
    with create(logdir, clock, agent_steps=60, frames=240) as log:
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


def test_takes_tensors(logdir, clock):
    with create(logdir, clock) as log:
        log.record_update({'loss/total': tf.constant(1.5), 'skipped': tf.constant(True)})
        write(log, 10, 1)
    (line,) = metrics(logdir)
    assert line['loss/total'] == 1.5 and line['updates_skipped'] == 1


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
        # Written with the counters of the update whose batch they came in, before any line.
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


def test_a_failing_run_is_logged_and_its_error_passes(logdir, clock):
    with pytest.raises(KeyError), create(logdir, clock) as log:
        write(log, 10, 1)
        raise KeyError
    assert len(metrics(logdir)) == 1


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


def test_tensorboard_has_the_same_numbers(logdir, clock):
    with create(logdir, clock) as log:
        for i in (1, 2):
            log.record_update({'loss/total': 0.25 * i})
            clock.now += 10
            write(log, 10 * i, i)
    folder = os.path.join(logdir, 'summaries')
    (name,) = os.listdir(folder)
    seen = {}
    for record_ in tf.data.TFRecordDataset(os.path.join(folder, name)):
        event = tf.compat.v1.Event.FromString(record_.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == 'scalars'
            seen[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    expected = {}
    for line in metrics(logdir):
        expected.update({(line['agent_steps'], key): value for key, value in line.items()})
    assert seen == pytest.approx(expected)


def test_a_picture_a_minute_is_a_file_and_in_tensorboard(logdir, clock):
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


def test_a_picture_that_cannot_be_written_ends_nothing(logdir, clock):
    stream = io.StringIO()
    with create(logdir, clock, stream) as log:
        with file_size_limit(0):
            log.record_picture('frames', np.zeros((6, 10, 1), np.uint8))
        assert 'WARNING: Cannot write' in stream.getvalue()
        assert os.listdir(logdir).count('frames.png') == 0


def test_resumed_run_goes_on(logdir, clock):
    with create(logdir, clock) as log:
        record(log, [1.0] * 60)
        clock.now += 100
        write(log, 500, 5)
    clock.now += 5000
    with create(logdir, clock, frames=2000, agent_steps=500, updates=5, wall_seconds=101.5) as log:
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


def test_rows_behind_the_checkpoint_are_moved_away(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        for agent_steps in (100, 200, 300):
            record(log, [agent_steps], level_id=1)
            clock.now += 10
            write(log, agent_steps)
    stream = io.StringIO()
    with create(logdir, clock, stream, frames=800, agent_steps=200, wall_seconds=20.5) as log:
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


def test_damaged_lines_are_told_and_left_out(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        record(log, [5], level_id=1)
        clock.now += 10
        write(log, 100)
    path = os.path.join(logdir, 'metrics.jsonl')
    with open(path, 'a') as file:
        file.write('{"agent_steps": null, "wall_seconds": 3}\n{"agent_steps": \n')
    stream = io.StringIO()
    with create(logdir, clock, stream, frames=400, agent_steps=100, wall_seconds=10.0):
        pass
    assert f'WARNING: {path}, line 2 (and 1 more) is damaged and left out.\n' in stream.getvalue()
    assert 'Moved' not in stream.getvalue()
    assert [line['agent_steps'] for line in metrics(logdir)] == [100]
    with open(os.path.join(logdir, 'metrics.dropped.jsonl')) as file:
        assert 'null' in file.read()


@pytest.mark.parametrize('cut', [1, 7, 40])
def test_a_cut_last_line_is_repaired(logdir, clock, cut):
    with create(logdir, clock, log_secs=1) as log:
        for agent_steps in (100, 200):
            record(log, [agent_steps])
            clock.now += 10
            write(log, agent_steps)
    for name in ('metrics.jsonl', 'episodes.csv'):
        path = os.path.join(logdir, name)
        os.truncate(path, os.path.getsize(path) - cut)
    with create(logdir, clock, frames=800, agent_steps=200) as log:
        assert log.mean_return == 100.0
        record(log, [300])
        write(log, 300)
    assert [line['agent_steps'] for line in metrics(logdir)] == [100, 300]
    assert [row['episode_return'] for row in episodes(logdir)] == ['100.0', '300.0']


def test_a_cut_header_is_repaired(logdir, clock):
    create(logdir, clock).close()
    os.truncate(os.path.join(logdir, 'episodes.csv'), 20)
    with create(logdir, clock) as log:
        record(log, [3])
        write(log, 10)
    assert [row['level'] for row in episodes(logdir)] == ['ALE/Pong-v5']


def test_full_disk_loses_no_row_and_never_cuts_one(logdir, clock):
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
        # Rows have different lengths, so that some limit falls into the middle of one.
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


def test_summaries_are_tried_again_in_a_new_file(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        for i in range(1, 10):
            clock.now += 100
            with file_size_limit(1 << 40 if i > 2 else 0):
                write(log, 10 * i, i)
    folder = os.path.join(logdir, 'summaries')
    steps = set()
    for name in os.listdir(folder):
        for record_ in tf.data.TFRecordDataset(os.path.join(folder, name)):
            event = tf.compat.v1.Event.FromString(record_.numpy())
            steps.update([event.step] * len(event.summary.value))
    assert steps == {40, 50, 60, 70, 80, 90}
    assert len(os.listdir(folder)) <= 2


def test_closing_on_a_full_disk_says_what_is_lost(logdir, clock):
    stream = io.StringIO()
    log = create(logdir, clock, stream)
    record(log, [1.0])
    with file_size_limit(0):
        write(log, 10)
        log.close()
    text = stream.getvalue()
    assert 'bytes could not be written' in text and 'learning_curve.png' in text
    assert episodes(logdir) == []


def test_unusable_logdir(tmp_path, clock):
    path = tmp_path / 'file'
    path.write_text('')
    with pytest.raises(LogdirError, match='file'):
        create(str(path), clock)


def test_plain_lines_when_no_terminal(logdir, clock):
    stream = io.StringIO()
    with create(logdir, clock, stream) as log:
        record(log, [-20.0, -19.0])
        log.record_update({'loss/total': 12.0})
        clock.now += 10
        write(log, 250, 1)
        log.message('hello')
        log.record_discarded_unrolls(3)
        clock.now += 1
        write(log, 251, 2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        '1,000 of 4,000 frames (25.0%), 100 frames/s, 25 steps/s, return -19.5, loss 12, 00:30 left'
    )
    assert lines[1] == 'hello'
    assert 'return -19.5, 3 unrolls not learned from' in lines[2]
    assert len(lines) == 3 and '\r' not in stream.getvalue()


@pytest.mark.parametrize('columns', [0, 100])
def test_bar_on_a_terminal(logdir, clock, columns):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack('HHHH', 30, columns, 0, 0))
    output = b''

    def drain():
        nonlocal output
        while select.select([reader], [], [], 0)[0]:
            output += os.read(reader, 65536)

    try:
        with os.fdopen(writer, 'w') as stream:
            with create(logdir, clock, stream) as log:
                record(log, [18.5])
                log.record_discarded_unrolls(3)
                clock.now += 10
                write(log, 250, 1)
                log.message('hello')
                # More than was asked for must not break the bar.
                write(log, 1001, 2)
                drain()
            drain()
    finally:
        os.close(reader)
    text = output.decode()
    if not columns:
        assert '%|' not in text and '1,000 of 4,000 frames (25.0%)' in text
        return
    assert '\r' in text and '100%|' in text and '4.00k/4.00k frames' in text
    assert 'return 18.5, 3 unrolls not learned from' in text and 'left' in text
    assert 'hello\r\n' in text
    assert 'frames (25.0%)' not in text


def test_a_stream_that_breaks_does_not_end_the_run(logdir, clock):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, 'w')
    os.close(reader)
    with create(logdir, clock, stream) as log:
        clock.now += 10
        write(log, 250, 1)
    assert len(metrics(logdir)) == 1
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_summary(logdir, clock):
    with pytest.raises(LogdirError):
        run_log.read_summary(logdir)
    with create(logdir, clock) as log:
        clock.now += 5
        record(log, [0.0] * 50 + [1.0] * 100)
        write(log, 500, 5)
        record(log, [5.0, math.inf, math.nan], level_id=1)
        log.record_update({'skipped': True})
        log.record_discarded_unrolls(1200)
        clock.now += 5
        write(log, 1000, 10)
        # Of the last moments, in which nothing was learned.
        log.record_discarded_unrolls(7)
    summary = run_log.read_summary(logdir)
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

    assert run_log.describe_summary(summary) == (
        '1,000 agent steps (4,000 frames) in 10 s; mean return of the last 100 episodes: 1.04 '
        '(2 with returns that are not finite left out).\n'
        'Not learned from: 1,207 unrolls with values of the environment that are not finite.\n'
        'Skipped: 1 of 10 updates, whose loss or gradient was not finite.'
    )


def test_summary_of_a_run_without_episodes(logdir, clock):
    create(logdir, clock).close()
    summary = run_log.read_summary(logdir)
    assert run_log.describe_summary(summary) == (
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
def test_no_run_says_that_no_episode_has_ended_when_one_has(
    logdir, clock, returns, discarded, text
):
    stream = io.StringIO()
    with create(logdir, clock, stream) as log:
        record(log, returns)
        log.record_discarded_unrolls(discarded)
        clock.now += 10
        write(log, 10, 1)
    assert ('no return is finite' in stream.getvalue()) == bool(returns)
    sentence = run_log.describe_summary(run_log.read_summary(logdir)).splitlines()[0]
    assert sentence.endswith(f'mean return of the last 100 episodes: {text}')
