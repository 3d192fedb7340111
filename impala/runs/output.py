"""Output that may lose its reader: a pipe into `head`, a closed terminal, a full disk."""

import contextlib
import io
import os
import select
import sys
from typing import Any


class _LastingFile(io.FileIO):
    """An output descriptor that drops what cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
            if written is None:
                # Another process has made the terminal or pipe non-blocking, and it is full.
                select.select([], [self], [])
            return written or 0
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Makes the process independent of whether its output can be written.

    Replaces `sys.stdout` and `sys.stderr`. Otherwise a line that cannot be written would raise an
    error in the middle of the work, and unwritten text in the buffer would change Python's exit
    code to 120.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file opened would get this number and receive the output. `open`
            # takes the lowest free number, which is this one.
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
