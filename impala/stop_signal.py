"""Ends a run cleanly on the signals that ask for it."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# A second signal this soon is the first one once more: `timeout` and job schedulers send theirs to
# a process and to its group.
SAME_SIGNAL_SECONDS = 1.0


class StopSignal:
    """Ends a run cleanly on SIGINT, SIGTERM or SIGHUP. A context manager, main thread only.

    As long as nothing runs that must be brought to an end, the signal raises KeyboardInterrupt.
    Afterwards it calls the function given to `then`, once and on a thread of its own: the main
    thread may well be inside TensorFlow, waiting for data, where Python's own handlers do not run,
    and the function must be what lets it return. A second signal, more than `SAME_SIGNAL_SECONDS`
    after the first, then ends the process at once.

    Attributes:
      received: whether a signal has come.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._stop: Callable[[], Any] | None = None
        self.received = False

    def then(self, stop: Callable[[], Any]) -> None:
        """From now on the signal calls a function.

        Args:
          stop: function without arguments, called on another thread.
        """
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._thread = threading.Thread(target=self._watch, name='stop signal', daemon=True)
        self._thread.start()
        self._stop = stop
        if self.received:  # It came in the lines above.
            stop()

    def __enter__(self) -> 'StopSignal':
        # `nohup` ignores SIGHUP so that a run outlives its terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._handlers = {
            number: signal.signal(number, self._handle)
            for number in self._SIGNALS
            if number not in ignored
        }
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._stop is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        # Later on it exists only so that the signal does nothing here: `_watch` acts on it.
        if self._stop is None and not self.received:
            self.received = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        received_at = 0.0
        while numbers := os.read(self._read, 1):
            if numbers[0] not in self._handlers:
                continue
            if not self.received:
                received_at = time.monotonic()
                self.received = True
                if self._stop is not None:
                    self._stop()
            elif time.monotonic() - received_at >= SAME_SIGNAL_SECONDS:
                os._exit(128 + numbers[0])
