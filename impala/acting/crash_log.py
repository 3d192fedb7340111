"""Shows each error of the actors once, then how often it recurred."""

import re

# `faulthandler` prints this above the stack of a process that hung.
STACK = 'Stack (most recent call first):'
_NUMBER = re.compile(r'0x[0-9a-fA-F]+|\d+(\.\d+)?')
_PLACE = re.compile(r'^ *File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)


class CrashLog:
    """Remembers the errors with which actor processes ended.

    Two errors are the same if they come from the same line of code and their last lines differ only
    in numbers, such as seeds.

    Attributes:
      count: processes that ended so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts: dict[int, int] = {}
        self._last = ''

    def take(self, who: str, how: str, error: str) -> str | None:
        """Records the end of a process.

        Args:
          who: 'Actor 3 (Pong)', or 'Actors 3-5 (Pong)'.
          how: 'ended with exit code 1'.
          error: the last output of the process; may be empty.

        Returns:
          The text to show: the whole error the first time, one line the 2nd, 4th, 8th, ... time
          that the same error occurs, and None in between.
        """
        self.count += 1
        line, place = _essence(error)
        key = hash((how, _NUMBER.sub('#', line), place))
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if line and place:
            place = f' ({place})'
        self._last = f'{who} {how}{": " if line or place else ""}{line}{place}'
        if count == 1:
            are = 'are' if who.startswith('Actors ') else 'is'
            return f'{who} {how} and {are} restarted.\n{error}'.rstrip()
        if count & (count - 1):
            return None
        return f'{self._last} (as before, {count} times so far)'

    def summary(self) -> str | None:
        """Returns one line about all ends, None if there was none."""
        if not self.count:
            return None
        times = 'once' if self.count == 1 else f'{self.count} times'
        return f'Actor processes died and were restarted {times}. The last: {self._last}'


def _essence(error: str) -> tuple[str, str]:
    """Returns the last line of an error and its place in the code, '' for what is missing."""
    _, mark, stack = error.rpartition(STACK)
    places = [f'{match["file"]}, line {match["line"]}' for match in _PLACE.finditer(error)]
    if mark and 'Traceback' not in stack:
        # A process that hung has no message, and its innermost call comes first.
        places = [f'{match["file"]}, line {match["line"]}' for match in _PLACE.finditer(stack)]
        return '', places[0] if places else ''
    lines = error.strip().splitlines()
    return lines[-1].strip() if lines else '', places[-1] if places else ''
