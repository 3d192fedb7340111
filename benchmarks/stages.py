"""Reports on stderr what a benchmark is doing, since tables are only printed at the end."""

import sys
import time

_STARTED = time.monotonic()


def begin(text: str) -> None:
    """Prints the next stage, with the time since the start of the program."""
    seconds = int(time.monotonic() - _STARTED)
    print(f'{seconds // 60}:{seconds % 60:02d} {text}', file=sys.stderr, flush=True)
