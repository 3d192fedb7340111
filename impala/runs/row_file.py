"""Files of rows, which a run appends to and repairs when it is resumed."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from impala.runs.files import damage_text, is_header

_MAX_UNWRITTEN_BYTES = 16 << 20


class RowFile:
    """A file to which whole rows are appended: of every call all bytes get there, or none.

    What cannot be written is kept and goes first with the next call.
    """

    def __init__(self, path: str):
        """Opens the file, which is made if missing.

        Raises:
          OSError: it cannot be opened.
        """
        self.path = path
        self._unwritten = b''
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    @property
    def num_unwritten(self) -> int:
        """Bytes that could not be written so far."""
        return len(self._unwritten)

    def append(self, text: str) -> None:
        """Appends text, after what could not be written before.

        Raises:
          OSError: it cannot be written; it is kept.
        """
        # On a disk that stays full for days the newest rows are given up, not the memory.
        if len(self._unwritten) < _MAX_UNWRITTEN_BYTES:
            self._unwritten += text.encode()
        size = self.size
        rest = memoryview(self._unwritten)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._unwritten = b''

    def close(self) -> int:
        """Tries once more what is unwritten; returns how many bytes are lost."""
        with contextlib.suppress(OSError):
            self.append('')
        os.close(self._descriptor)
        return len(self._unwritten)


def keep_rows(
    path: str,
    parse: Callable[[bytes], dict[str, Any]],
    agent_steps: int,
    report: Callable[[str], Any],
) -> int:
    """Keeps the rows of a file up to an agent step; moves the others, see `_keep_lines`.

    Damaged lines are moved with those.

    Args:
      path: of the file.
      parse: returns a row with its `agent_steps`; raises ValueError for a line that is damaged.
      agent_steps: of the last row that stays.
      report: told of damaged lines, in a sentence.

    Returns:
      How many rows lay beyond.
    """
    damaged = []

    def keep(number: int, line: bytes) -> bool:
        if is_header(line):
            return True
        try:
            return line.endswith(b'\n') and parse(line)['agent_steps'] <= agent_steps
        except ValueError:
            damaged.append(number)
            return False

    num_dropped = _keep_lines(path, keep)
    if damaged:
        report(damage_text(path, damaged))
    return num_dropped - len(damaged)


def _keep_lines(path: str, keep: Callable[[int, bytes], bool]) -> int:
    """Moves the lines that are not to be kept to `<stem>.dropped<extension>`; returns how many.

    A last line without its end, of a run that was killed while writing it, is just removed. The
    file is replaced as a whole, and only if something is to be moved.

    Args:
      path: of the file.
      keep: returns whether a line, given with its number from 1, stays; called once for each.
    """
    if not os.path.exists(path):
        return 0
    with open(path, 'rb') as file:
        kept = [keep(number, line) for number, line in enumerate(file, 1)]
    if all(kept):
        return 0
    temporary = f'{path}.{os.getpid()}.tmp'
    stem, extension = os.path.splitext(path)
    num_dropped = 0
    try:
        with (
            open(path, 'rb') as file,
            open(temporary, 'wb') as rest,
            open(f'{stem}.dropped{extension}', 'ab') as dropped,
        ):
            for line, stays in zip(file, kept, strict=True):
                if stays:
                    rest.write(line)
                elif line.endswith(b'\n'):
                    dropped.write(line)
                    num_dropped += 1
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    return num_dropped
