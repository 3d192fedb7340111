"""Files of rows: a run appends to them, and repairs them when it is resumed."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from impala.runs.files import damage_text, is_header

_MAX_UNWRITTEN_BYTES = 16 << 20


class RowFile:
    """A file to which whole rows are appended: each call writes all of its bytes or none.

    Text that cannot be written is kept and written first by the next call.
    """

    def __init__(self, path: str):
        """Opens the file; makes it if missing.

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
        """Bytes kept because they could not be written."""
        return len(self._unwritten)

    def append(self, text: str) -> None:
        """Appends text, after earlier text that could not be written.

        Raises:
          OSError: it cannot be written; it is kept.
        """
        # If the disk stays full for days, the newest rows are dropped to bound the memory.
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
        """Tries once more to write what is left; returns how many bytes are lost."""
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
    """Keeps the rows of a file up to an agent step; moves later ones, see `_keep_lines`.

    Damaged lines are moved, too.

    Args:
      path: of the file.
      parse: returns a row with its `agent_steps`; raises ValueError for a damaged line.
      agent_steps: of the last row that stays.
      report: takes a sentence about damaged lines.

    Returns:
      How many later rows were moved.
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
    """Moves the lines that `keep` rejects to `<stem>.dropped<extension>`; returns how many.

    An incomplete last line, of a run that was killed while it wrote the line, is removed. The file
    is replaced as a whole, and only if a line leaves it.

    Args:
      path: of the file.
      keep: takes a line's number, from 1, and the line; returns whether it stays. Called once per
        line.
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
