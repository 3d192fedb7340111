"""Finds out which actor processes show no sign of life, and for how long.

It knows neither processes nor batchers, only keys and their last signs of life.
"""

import dataclasses
import datetime
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from impala.config import ActorsConfig

# A report that is due includes keys that have been silent for nearly as long: processes that hang
# for one reason appear in one report.
_NEARLY = 0.75


class Silences(NamedTuple):
    """Result of a look at all keys.

    Attributes:
      due: key -> seconds of silence that must be reported now.
      back: key -> seconds of a reported silence that is over.
      timed_out: key -> seconds of silence, for keys that have reached the timeout.
    """

    due: dict[int, float]
    back: dict[int, float]
    timed_out: dict[int, float]


@dataclasses.dataclass
class _KeyState:
    signs: Hashable
    seconds: float = 0.0
    next_report: float = 0.0
    is_reported: bool = False


class SilenceWatch:
    """Adds up silence from look to look.

    The time that counts between two looks is limited: if this process was stopped or the machine
    asleep, the others probably were, too.
    """

    def __init__(self, config: ActorsConfig, longest_gap: float):
        """Begins with no keys.

        Args:
          config: silence is reported after `silence_secs`, then each time it has doubled, and times
            out after `actor_timeout`; 0 for never.
          longest_gap: most seconds that count between two looks.
        """
        self._config = config
        self._longest_gap = longest_gap
        self._states: dict[int, _KeyState] = {}
        self._looked_at: float | None = None

    def look(self, now: float, signs: Mapping[int, Hashable]) -> Silences:
        """Compares signs of life with those of the last look.

        Args:
          now: seconds of a monotonic clock.
          signs: key -> sign of life. An unchanged sign is silence; None means that silence is
            expected.
        """
        gap = 0.0 if self._looked_at is None else min(now - self._looked_at, self._longest_gap)
        self._looked_at = now
        report_secs, timeout = self._config.silence_secs, self._config.actor_timeout
        result = Silences({}, {}, {})
        for key in self._states.keys() - signs.keys():
            self.forget(key)
        for key, sign in signs.items():
            state = self._states.get(key)
            if state is not None and sign is not None and state.signs == sign:
                state.seconds += gap
                if timeout and state.seconds >= timeout:
                    result.timed_out[key] = state.seconds
                continue
            if state is not None and state.is_reported:
                result.back[key] = state.seconds + gap
            self._states[key] = _KeyState(sign, next_report=report_secs)
        if report_secs and any(each.seconds >= each.next_report for each in self._states.values()):
            for key, each in self._states.items():
                if each.seconds >= _NEARLY * each.next_report:
                    result.due[key] = each.seconds
                    each.is_reported = True
                    each.next_report = 2 * max(each.seconds, each.next_report)
        return result

    def forget(self, key: int) -> None:
        """Forgets a key, whose process was replaced."""
        self._states.pop(key, None)


def since(seconds: float) -> str:
    """Returns a duration and its start: `60 s, since 14:03:12`."""
    began = datetime.datetime.now() - datetime.timedelta(seconds=seconds)
    return f'{seconds:.0f} s, since {began:%H:%M:%S}'
