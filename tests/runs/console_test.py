"""Tests of impala/runs/console.py, through what a log shows."""

import contextlib
import fcntl
import io
import os
import pty
import select
import struct
import termios

import pytest
from run_logs import (
    Clock,
    create,
    metrics,
    record,
    write,
)


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines_without_a_terminal(logdir, clock):
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
                # More steps than requested must not break the bar.
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


def test_a_broken_stream_does_not_end_the_run(logdir, clock):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, 'w')
    os.close(reader)
    with create(logdir, clock, stream) as log:
        clock.now += 10
        write(log, 250, 1)
    assert len(metrics(logdir)) == 1
    with contextlib.suppress(BrokenPipeError):
        stream.close()
