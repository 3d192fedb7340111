"""Says what a run is doing before it trains, if that takes long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

# A start that takes no longer says nothing.
_FIRST_SECONDS = 2.0
# The first pause between two lines, and what each is longer than the one before.
_PAUSE_SECONDS = 4.0
_GROWTH = 1.5


class StartProgress:
    """Reports how far something is, at growing intervals."""

    def __init__(self, report: Callable[[str], None], state: Callable[[], str]):
        """Begins now.

        Args:
          report: told lines.
          state: returns how far it is.
        """
        self._report = report
        self._state = state
        self._next = time.monotonic() + _FIRST_SECONDS
        self._pause = _PAUSE_SECONDS
        self.has_reported = False

    def look(self, now: float) -> None:
        """Reports if it is time to; `now` is of `time.monotonic`."""
        if now >= self._next:
            self.tell()
            self._next = now + self._pause
            self._pause *= _GROWTH

    def tell(self) -> None:
        """Reports in any case."""
        self._report(f'Starting: {self._state()}')
        self.has_reported = True


@contextlib.contextmanager
def starting(
    report: Callable[[str], None], what: str, seconds: float | None = None
) -> Iterator[None]:
    """Reports what is being done in the block, if that takes long.

    Args:
      report: told a line.
      what: is being done.
      seconds: after which it is reported; None for those after which a start is long.
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
