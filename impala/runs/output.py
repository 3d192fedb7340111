"""Output that may lose its reader: a pipe into `head`, a terminal that is gone, a full disk."""

import contextlib
import io
import os
import select
import sys
from typing import Any


class _LastingFile(io.FileIO):
    """A descriptor for output; what cannot be written to it is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
            if written is None:
                # Somebody else has made the terminal or pipe non-blocking, and it is full.
                select.select([], [self], [])
            return written or 0
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """From now on the process does its work and ends as it would whether its output is read or not.

    Replaces `sys.stdout` and `sys.stderr`. Without it, a line that cannot be written raises an
    error somewhere in the middle of the work, and what is left in the buffer has Python end with
    exit code 120.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file to be opened would get its number, and be printed into. This gets the
            # lowest one that is free, and lower ones are not.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _stream(1, sys.stdout, 'strict')
    sys.stderr = _stream(2, sys.stderr, 'backslashreplace')


def _stream(descriptor: int, replaced: Any, errors: str) -> io.TextIOWrapper:
    if replaced is not None:
        with contextlib.suppress(OSError):
            replaced.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, 'wb', closefd=False)),
        encoding=getattr(replaced, 'encoding', None),
        errors=getattr(replaced, 'errors', errors),
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )
