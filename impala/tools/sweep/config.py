"""The settings of a sweep, from a JSON file: its members and the space of their hyperparameters.

The paper's spaces are in Espeholt et al. 2018, Table D.1.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from impala.config import all_settings
from impala.runs import flag_file, flags

METHODS = ('random', 'pbt')

# Flags that a sweep sets itself, or that a member cannot have.
_RESERVED_FLAGS = (
    *(name for name, known in all_settings().items() if known.setting.on_resume == 'not_stored'),
    'job_name',
    'task',
    'learner_address',
    'learner_addresses',
)
# The flags of members, which are other processes.
_MEMBER_FLAGS = absl_flags.FlagValues()
flags.define(_MEMBER_FLAGS)
# Settings that may change when a run is resumed, and stay in range however often they are
# multiplied.
PBT_FLAGS = ('entropy_cost', 'learning_rate', 'epsilon', 'baseline_cost', 'gradient_clip_norm')


class SweepConfigError(Exception):
    """A sweep's file is invalid; the text is one sentence that names file and key."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The distribution of a hyperparameter at the start.

    Attributes:
      kind: `'uniform'` or `'log_uniform'` between two numbers, or `'choice'` among several values.
      values: lowest and highest number, or all choices.
    """

    kind: str
    values: tuple[Any, ...]

    def sample(self, random: np.random.Generator) -> Any:
        """Returns a value: a float from a range, or a choice as given."""
        if self.kind == 'choice':
            return self.values[random.integers(len(self.values))]
        low, high = self.values
        if self.kind == 'uniform':
            return float(random.uniform(low, high))
        return float(math.exp(random.uniform(math.log(low), math.log(high))))


@dataclasses.dataclass(frozen=True)
class PBTConfig:
    """Population based training (Appendix F).

    Attributes:
      round_frames: frames between two comparisons of a member with another.
      burn_in_frames: frames before which nothing is copied or changed.
      margin: how much fitter another member must be to be copied; in percentage points if fitness
        is human-normalized, else in units of the return.
      perturb_probability: of changing a hyperparameter, after each comparison.
      perturb_factor: by which a hyperparameter is multiplied or divided.
    """

    round_frames: int
    burn_in_frames: int = 0
    margin: float = 0.0
    perturb_probability: float = 0.33
    perturb_factor: float = 1.2


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep.

    Attributes:
      method: `'random'` or `'pbt'`.
      members: number of runs.
      parallel: number of runs at a time.
      seed: of the sampling; member i plays with seed + i, unless `flags` has a seed.
      flags: common to all members, name -> value.
      total_frames: each member's `--total_environment_frames`.
      space: name of a flag -> where its values come from.
      fitness_episodes: number of episodes, the last of each level, that make a member's fitness.
      pbt: settings of population based training; None for a random search.
      identity: what must not change when the sweep is resumed, JSON-serializable.
    """

    method: str
    members: int
    parallel: int
    seed: int
    flags: Mapping[str, Any]
    total_frames: int
    space: Mapping[str, Distribution]
    fitness_episodes: int
    pbt: PBTConfig | None
    identity: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """How often each member is started if nothing interrupts the sweep."""
        return 1 if self.pbt is None else math.ceil(self.total_frames / self.pbt.round_frames)

    def round_end(self, index: int) -> int:
        """Returns the frames at which a round, counted from 0, ends."""
        if self.pbt is None:
            return self.total_frames
        return min((index + 1) * self.pbt.round_frames, self.total_frames)

    def sample(self, member: int) -> dict[str, Any]:
        """Returns the hyperparameters that a member starts with; always the same."""
        random = np.random.default_rng([self.seed, 0, member])
        return {name: distribution.sample(random) for name, distribution in self.space.items()}


def read(path: str) -> SweepConfig:
    """Reads a sweep.

    Raises:
      SweepConfigError: one sentence.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file, parse_constant=_refuse_constant)
    except OSError as error:
        raise SweepConfigError(f'Cannot read the sweep {path}: {error.strerror}.') from error
    except ValueError as error:
        raise SweepConfigError(f'The sweep {path} is not JSON: {error}.') from error
    section = _Section(path, '', content)
    method = section.choice('method', METHODS)
    members = section.integer('members', minimum=2 if method == 'pbt' else 1)
    parallel = section.integer('parallel', minimum=1, default=1)
    seed = section.integer('seed', minimum=0, default=1)
    fitness_episodes = section.integer('fitness_episodes', minimum=1, default=100)
    common = section.section('flags')
    total_frames = common.integer('total_environment_frames', minimum=1)
    for name in common.content:
        common.flag(name, [common.content[name]])
    space = _read_space(section.section('space'), common.content, method)
    pbt = None
    if method == 'pbt':
        pbt = _read_pbt(section.section('pbt'))
        if pbt.round_frames >= total_frames:
            section.fail(
                'pbt.round_frames',
                f'{pbt.round_frames} frames are all of the training: give less than '
                f'flags.total_environment_frames={total_frames}',
            )
    section.finish()
    return SweepConfig(
        method=method,
        members=members,
        parallel=parallel,
        seed=seed,
        flags=common.content,
        total_frames=total_frames,
        space=space,
        fitness_episodes=fitness_episodes,
        pbt=pbt,
        identity={key: value for key, value in content.items() if key != 'parallel'},
    )


def _read_space(
    section: '_Section', common: Mapping[str, Any], method: str
) -> dict[str, Distribution]:
    space = {}
    for name in section.content:
        if name in common:
            section.fail(name, 'it stands among the flags common to all members, too')
        if method == 'pbt' and name not in PBT_FLAGS:
            section.fail(
                name,
                'population based training can change '
                f'{", ".join(PBT_FLAGS[:-1])} and {PBT_FLAGS[-1]} only',
            )
        given = section.section(name)
        if len(given.content) != 1:
            section.fail(name, 'give one of uniform, log_uniform and choice')
        ((kind, values),) = given.content.items()
        given.one_of(kind, ('uniform', 'log_uniform', 'choice'))
        if not isinstance(values, list) or not values:
            given.fail(kind, 'give a list of values')
        if kind != 'choice':
            if len(values) != 2 or not all(map(_is_number, values)) or not values[0] < values[1]:
                given.fail(kind, 'give the lowest and the highest number, as [0.1, 0.5]')
            if kind == 'log_uniform' and values[0] <= 0:
                given.fail(kind, f'{values[0]} has no logarithm: the lowest must be above 0')
            values = [float(value) for value in values]
        elif method == 'pbt' and not all(_is_number(value) and value > 0 for value in values):
            given.fail(kind, 'population based training multiplies: give numbers above 0')
        section.flag(name, values)
        space[name] = Distribution(kind, tuple(values))
    if not space:
        section.fail('', 'name at least one hyperparameter')
    return space


def _read_pbt(section: '_Section') -> PBTConfig:
    config = PBTConfig(
        round_frames=section.integer('round_frames', minimum=1),
        burn_in_frames=section.integer('burn_in_frames', minimum=0, default=0),
        margin=section.number('margin', PBTConfig.margin, 0),
        perturb_probability=section.number(
            'perturb_probability', PBTConfig.perturb_probability, 0, 1
        ),
        perturb_factor=section.number('perturb_factor', PBTConfig.perturb_factor, 1),
    )
    section.finish()
    return config


def flag_text(name: str, value: Any) -> str:
    """Returns a flag as written on a command line."""
    if isinstance(value, bool):
        value = 'true' if value else 'false'
    elif isinstance(value, float):
        value = repr(value)
    return f'--{name}={value}'


class _Section:
    """An object in the file, which knows its place for error messages."""

    def __init__(self, path: str, place: str, content: Any):
        self._path, self._place = path, place
        if not isinstance(content, dict):
            self.fail('', 'give an object, as {"name": value}')
        self.content: dict[str, Any] = content
        self._taken: set[str] = set()

    def fail(self, key: str, reason: str) -> None:
        place = '.'.join(filter(None, (self._place, key)))
        raise SweepConfigError(
            f'The sweep {self._path}{f", key {place}" if place else ""}: {reason}.'
        )

    def one_of(self, name: str, known: Sequence[str], where: str = '') -> None:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {close[0]!r}?' if close else f'known are {", ".join(known)}'
            self.fail(where, f'{name!r} is not known; {hint}'.removesuffix('?'))

    def section(self, key: str) -> '_Section':
        return _Section(self._path, '.'.join(filter(None, (self._place, key))), self._take(key))

    def choice(self, key: str, known: Sequence[str]) -> str:
        value = self._take(key)
        self.one_of(str(value), known, key)
        return value

    def integer(self, key: str, minimum: int, default: int | None = None) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(key, f'{json.dumps(value)} should be a whole number from {minimum} on')
        return value

    def number(self, key: str, default: float, low: float, high: float = math.inf) -> float:
        value = self._take(key, default)
        if not _is_number(value) or not low <= value <= high:
            limits = f'of {low} or more' if high == math.inf else f'from {low} to {high}'
            self.fail(key, f'{json.dumps(value)} should be a number {limits}')
        return value

    def flag(self, name: str, values: Sequence[Any]) -> None:
        """Fails unless experiment.py has this flag and it accepts all the values."""
        self.one_of(name, [*all_settings(), 'flagfile'], '')
        if name in _RESERVED_FLAGS:
            self.fail(name, 'a sweep sets this flag itself, or has no use for it')
        for value in values:
            if isinstance(value, (dict, list)) or value is None:
                self.fail(name, f'{json.dumps(value)} should be a text, a number, true or false')
            if name == 'flagfile':
                if not os.path.isfile(str(value)):
                    self.fail(name, f'there is no file {value}')
                continue
            try:
                text = flag_text(name, value).partition('=')[2]
                _MEMBER_FLAGS[name].parser.parse(text)
            except ValueError as error:
                reason = flag_file.plainly(f'flag --{name}={text}: {error}')
                self.fail(name, reason.removesuffix('.'))

    def finish(self) -> None:
        for key in self.content:
            if key not in self._taken:
                self.one_of(key, sorted(self._taken), key)

    def _take(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        value = self.content.get(key, default)
        if value is None:
            self.fail(key, 'it is missing')
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not a number')
