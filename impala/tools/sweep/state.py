"""The state of a sweep, in one JSON file of its folder."""

import dataclasses
import json
import math
import os
from typing import Any

from impala.runs.files import LogdirError, write_atomically
from impala.tools.sweep.config import SweepConfig

STATE_FILE = 'sweep.json'


@dataclasses.dataclass
class Member:
    """The progress of a member.

    Attributes:
      name: of its folder.
      values: its present hyperparameters.
      trained: whether it has finished the present round.
      frames: that it was trained on.
      fitness: after the last round that it finished; None before that, if too few episodes ended in
        that round, or after a failure.
      episodes: number that have ended.
      error: why it could not finish the present round; empty if nothing is wrong.
    """

    name: str
    values: dict[str, Any]
    trained: bool = False
    frames: int = 0
    fitness: float | None = None
    episodes: int = 0
    error: str = ''


@dataclasses.dataclass
class State:
    """The whole state of a sweep.

    Attributes:
      identity: of its `SweepConfig`.
      round: the present one, from 0.
      members: of the sweep.
      copies: checkpoints that are still to be copied, target -> source.
      history: a row for every member and round: `round`, `member`, `frames`, `fitness`, `error`,
        the `values` in that round, and `copied_from`, the member whose weights and values it copied
        at its end, None if it kept its own.
    """

    identity: dict[str, Any]
    round: int
    members: list[Member]
    copies: dict[str, str]
    history: list[dict[str, Any]]

    def save(self, logdir: str) -> None:
        """Replaces the file in a sweep's folder.

        Raises:
          LogdirError: it cannot be written; the earlier file is left as it was.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + '\n'
        write_atomically(os.path.join(logdir, STATE_FILE), text)

    def lineage(self, name: str) -> list[str]:
        """Returns the members from which a member's weights descend, one for each round so far."""
        sources = {(row['round'], row['member']): row['copied_from'] for row in self.history}
        last = max((row['round'] for row in self.history), default=0)
        names = [name]
        for number in range(last - 1, -1, -1):
            names.append(sources[number, names[-1]] or names[-1])
        return names[::-1]


def _check_types(state: State) -> None:
    """Raises TypeError or ValueError if a value is not one that a sweep writes."""
    rows: list[tuple[Any, Any]] = [
        (state.identity, dict),
        (state.round, int),
        (state.copies, dict),
        (state.history, list),
        *((text, str) for copy in state.copies.items() for text in copy),
        *((row, dict) for row in state.history),
    ]
    for member in state.members:
        rows += [(member.name, str), (member.values, dict), (member.trained, bool)]
        rows += [(member.frames, int), (member.episodes, int), (member.error, str)]
        if member.fitness is not None:
            rows.append((member.fitness, (int, float)))
    for row in state.history:
        rows += [(row['round'], int), (row['member'], str), (row['values'], dict)]
        rows += [(row['frames'], int), (row['error'], str)]
        rows.append((row['copied_from'], (str, type(None))))
        rows.append((row['fitness'], (int, float, type(None))))
    for values in [*(member.values for member in state.members),
                   *(row['values'] for row in state.history)]:  # fmt: skip
        rows += [(value, (int, float, str, bool)) for value in values.values()]
    for value, types in rows:
        if not isinstance(value, types):
            raise TypeError(f'{value!r} has the wrong type')
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{value} is not finite')
    if state.round < 0 or not state.members:
        raise ValueError('no round or no members')


def load(logdir: str, config: SweepConfig) -> State:
    """Returns the state of the sweep in a folder, or that of a new one.

    Raises:
      LogdirError: the folder holds another sweep, or a state that cannot be read.
    """
    path = os.path.join(logdir, STATE_FILE)
    identity = json.loads(json.dumps(config.identity))
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        members = [Member(**member) for member in content.pop('members')]
        state = State(members=members, **content)
        _check_types(state)
        stored = state.identity
    except FileNotFoundError:
        width = max(2, len(str(config.members - 1)))
        return State(
            identity=identity,
            round=0,
            members=[
                Member(f'{index:0{width}}', config.sample(index)) for index in range(config.members)
            ],
            copies={},
            history=[],
        )
    except OSError as error:
        raise LogdirError(f'Cannot read {path}: {error.strerror}.') from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LogdirError(
            f'{path} is not the state of a sweep: give another --logdir, or remove the folder.'
        ) from error
    different = sorted(key for key in {*identity, *stored} if identity.get(key) != stored.get(key))
    if different:
        raise LogdirError(
            f'The sweep in {logdir} was started with another value of {", ".join(different)}: set '
            'it back, or give another --logdir.'
        )
    return state
