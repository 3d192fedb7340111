"""Tells which actor processes have shown no sign of life, and since when.

It knows neither processes nor batchers, only keys and what they were last seen doing.
"""

import dataclasses
import datetime
from collections.abc import Hashable, Mapping
from typing import NamedTuple

from impala.config import ActorsConfig

# A line that is due takes in whoever has been silent for nearly as long: what hangs together is
# told together.
_NEARLY = 0.75


class Silences(NamedTuple):
    """What a look at all keys has shown.

    Attributes:
      due: key -> seconds of silence, of those to be reported now.
      back: key -> seconds of a silence that was reported and is over.
      timed_out: key -> seconds of silence, of those that have been silent for too long.
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

    Only so much of the time between two looks counts: when this process was stopped, or the machine
    asleep, so may the others have been.
    """

    def __init__(self, config: ActorsConfig, longest_gap: float):
        """Begins with no keys.

        Args:
          config: `silence_secs` after which silence is reported, and again after twice as many,
            and so on; `actor_timeout` after which it has lasted too long; 0 for never.
          longest_gap: seconds that count between two looks, at most.
        """
        self._config = config
        self._longest_gap = longest_gap
        self._states: dict[int, _KeyState] = {}
        self._looked_at: float | None = None

    def look(self, now: float, signs: Mapping[int, Hashable]) -> Silences:
        """Compares signs of life with those of the last look.

        Args:
          now: seconds of a clock that never goes back.
          signs: of each key; the same again is silence, and None says that silence is in order.
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
        """Begins anew with a key, whose process was replaced."""
        self._states.pop(key, None)


def since(seconds: float) -> str:
    """Returns a duration and when it began, as `60 s, since 14:03:12`."""
    began = datetime.datetime.now() - datetime.timedelta(seconds=seconds)
    return f'{seconds:.0f} s, since {began:%H:%M:%S}'
