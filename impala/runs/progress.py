"""Shows the progress of a long task: a bar on a terminal, occasional lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import tqdm

# Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0
_BAR_SECONDS = 1.0


def report_to_stderr(text: str) -> None:
    """Prints a line to stderr above a progress bar, if there is one."""
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(text, file=sys.stderr)


class Progress:
    """Shows progress on stderr while the block of this context manager runs.

    A separate thread shows it, so that the display is updated even when no unit is completed.

    Attributes:
      done: units completed.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        detail: Callable[[], str] = lambda: '',
        line_seconds: float | None = None,
    ):
        """Prepares; nothing is shown yet.

        Args:
          total: number of units.
          unit: name of a unit, in the singular.
          detail: returns text to append to a line; called on another thread.
          line_seconds: seconds between two lines where there is no terminal; None for
            `LINE_SECONDS`.
        """
        self.done = 0
        self._total = total
        self._unit = unit
        self._detail = detail
        self._line_seconds = LINE_SECONDS if line_seconds is None else line_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._show, name='progress', daemon=True)
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> 'Progress':
        self._started = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=self._total, unit=self._unit)
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._is_over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def update(self, number: int = 1) -> None:
        """Counts `number` more units as done."""
        self.done += number
        if self._bar is not None:
            self._bar.update(number)

    def _show(self) -> None:
        while not self._is_over.wait(_BAR_SECONDS if self._bar else self._line_seconds):
            if self._bar is not None:
                self._bar.refresh()
                continue
            seconds = time.monotonic() - self._started
            plural = '' if self._total == 1 else 's'
            line = f'{self.done:,} of {self._total:,} {self._unit}{plural} in {seconds:.0f} s'
            print(line + self._detail(), file=sys.stderr, flush=True)
