import io
import re
import sys
import threading

from impala.runs.progress import Progress


class Stream(io.StringIO):
    """Sets `written` after `number` flushes."""

    def __init__(self, number, is_terminal):
        super().__init__()
        self.left, self.written, self.is_terminal = number, threading.Event(), is_terminal

    def isatty(self):
        return self.is_terminal

    def flush(self):
        super().flush()
        self.left -= 1
        if self.left == 0:
            self.written.set()


def test_lines_are_printed_periodically_even_without_progress(monkeypatch):
    stream = Stream(3, is_terminal=False)
    monkeypatch.setattr(sys, 'stderr', stream)
    with Progress(2000, 'episode', lambda: '; and so on', line_seconds=0.01) as progress:
        progress.update()
        progress.update(1499)
        assert stream.written.wait(60)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3
    assert re.fullmatch(r'1,500 of 2,000 episodes in \d s; and so on', lines[-1])


def test_short_work_prints_nothing(monkeypatch):
    stream = Stream(1, is_terminal=False)
    monkeypatch.setattr(sys, 'stderr', stream)
    with Progress(1, 'episode') as progress:
        progress.update()
    assert stream.getvalue() == ''


def test_a_bar_on_a_terminal(monkeypatch):
    stream = Stream(1, is_terminal=True)
    monkeypatch.setattr(sys, 'stderr', stream)
    with Progress(4, 'episode', line_seconds=0.001) as progress:
        progress.update(4)
    assert '4/4' in stream.getvalue() and ' of 4 ' not in stream.getvalue()
