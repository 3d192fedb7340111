"""Reports what a run does before it trains, if this takes long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

# A start that takes less than this is not reported.
_FIRST_SECONDS = 2.0
# The first pause between two lines, and the factor by which each later one grows.
_PAUSE_SECONDS = 4.0
_GROWTH = 1.5


class StartProgress:
    """Reports progress at growing intervals.

    Attributes:
      has_reported: whether it has reported at least once.
    """

    def __init__(self, report: Callable[[str], None], state: Callable[[], str]):
        """Starts the clock.

        Args:
          report: takes lines.
          state: returns the progress in words.
        """
        self._report = report
        self._state = state
        self._next = time.monotonic() + _FIRST_SECONDS
        self._pause = _PAUSE_SECONDS
        self.has_reported = False

    def look(self, now: float) -> None:
        """Reports if it is time to; `now` comes from `time.monotonic`."""
        if now >= self._next:
            self.report()
            self._next = now + self._pause
            self._pause *= _GROWTH

    def report(self) -> None:
        """Reports now."""
        self._report(f'Starting: {self._state()}')
        self.has_reported = True


@contextlib.contextmanager
def starting(
    report: Callable[[str], None], what: str, seconds: float | None = None
) -> Iterator[None]:
    """Reports the work of the block, if it takes long.

    Args:
      report: takes a line.
      what: a clause that describes the work.
      seconds: time after which it is reported; None for the default, 2 s.
    """
    seconds = _FIRST_SECONDS if seconds is None else seconds
    timer = threading.Timer(seconds, report, [f'Starting: {what}'])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
