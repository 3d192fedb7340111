"""Ends a run cleanly on SIGINT, SIGTERM or SIGHUP."""

import bdb
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from impala import exit_codes

# Printed when a run was interrupted before there was anything to save.
INTERRUPTED = 'Interrupted before anything was done.'

# A second signal within this time is a copy of the first: `timeout` and job schedulers send a
# signal both to a process and to its group.
SAME_SIGNAL_SECONDS = 1.0
# Seconds that a process with nothing to lose gets to end: TensorFlow may be in a call that takes
# longer and cannot be interrupted.
START_SECONDS = 4.0


class StopSignal:
    """Ends a run cleanly on SIGINT, SIGTERM or SIGHUP. A context manager, main thread only.

    Before `then` is called, the signal raises KeyboardInterrupt. After that, it calls the function
    given to `then`, once and on another thread: the main thread may be waiting for data inside
    TensorFlow, where Python's handlers do not run, and the function must make that wait return. A
    second signal, at least `SAME_SIGNAL_SECONDS` after the first, ends the process at once.

    Until there is something to lose, the process ends `START_SECONDS` after the signal if the block
    has not been left by then.

    Attributes:
      received: whether a signal has come.
      raised: what the signal may raise in the main thread.
    """

    raised: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._stop: Callable[[], Any] | None = None
        self._interrupts = True
        self._has_interrupted = False
        self._may_be_lost = True
        self.received = False

    def then(self, stop: Callable[[], Any], nothing_to_lose: bool = False) -> None:
        """Makes the signal call a function from now on.

        Args:
          stop: function without arguments, called on another thread.
          nothing_to_lose: whether the process may be killed until `begun` is called.
        """
        self._may_be_lost = nothing_to_lose
        self._stop = stop
        self._interrupts = False
        if self.received:  # The signal came during the lines above and may have missed `stop`.
            stop()

    def begun(self) -> None:
        """Declares that from now on there is something to lose."""
        self._may_be_lost = False

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes the signal raise KeyboardInterrupt within the block, as before `then`.

        For long work of the main thread that may be left unfinished.
        """
        self._interrupts = True
        try:
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def __enter__(self) -> 'StopSignal':
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._numbers = _not_ignored(self._SIGNALS)
        self._thread = threading.Thread(target=self._watch, name='stop signal', daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._handlers = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *unused: Any) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        # Otherwise it does nothing, and only replaces the default action: `_watch` handles the
        # signal.
        if self._interrupts and not self._has_interrupted:
            self._has_interrupted = True
            self.received = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        received_at: float | None = None
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while True:
            milliseconds = None
            if received_at is not None and self._may_be_lost:
                seconds = received_at + START_SECONDS - time.monotonic()
                milliseconds = max(0.0, 1000 * seconds)
            if not poll.poll(milliseconds):
                # `begun` may have been called in the meantime.
                if self._may_be_lost:
                    with contextlib.suppress(OSError):
                        os.write(2, f'{INTERRUPTED}\n'.encode())
                    os._exit(exit_codes.INTERRUPTED)
                continue
            number = os.read(self._read, 1)
            if not number:
                return
            if number[0] not in self._numbers:
                continue
            if received_at is None:
                received_at = time.monotonic()
                self.received = True
                if self._stop is not None:
                    self._stop()
            elif time.monotonic() - received_at >= SAME_SIGNAL_SECONDS:
                os._exit(128 + number[0])


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. Debuggers do not catch it, unlike KeyboardInterrupt."""


class RaisedStopSignal(StopSignal):
    """A `StopSignal` that always raises an exception in the main thread, for debugging.

    The main thread must never wait inside TensorFlow. No other thread watches the signals and there
    are no deadlines, so a debugger can wait for input and handle SIGINT itself: pdb cancels its
    input line, or stops the program where it is.

    Whoever catches one of `raised` sets `received`. BdbQuit, by which the user leaves a debugger,
    is one of them. What leaves the block is a KeyboardInterrupt.
    """

    raised = (KeyboardInterrupt, Terminated, bdb.BdbQuit)

    def then(self, stop: Callable[[], Any], nothing_to_lose: bool = False) -> None:
        """Does nothing: the signal interrupts every wait."""

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Does nothing: the signal always interrupts."""
        yield

    def __enter__(self) -> 'RaisedStopSignal':
        self._handlers = {
            number: signal.signal(number, self._raise) for number in _not_ignored(self._SIGNALS)
        }
        return self

    def __exit__(self, kind: Any, error: Any, *unused: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Terminated | bdb.BdbQuit):
            raise KeyboardInterrupt from error

    def _raise(self, number: int, frame: Any) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _not_ignored(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Returns all but SIGHUP if it is ignored: with `nohup`, a run survives its terminal.

    A shell that starts a command in the background makes it ignore SIGINT. The run handles it
    nevertheless, because a user or a script may send it.
    """
    return [
        number
        for number in numbers
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
