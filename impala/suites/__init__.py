"""Suites of levels as data: what `--level_name` means, with human and random scores.

`dmlab30` and `atari57` are the CSV files next to this module. A user's own file has the same
columns: `level`, `random`, `human` and optionally `test_level` (the level that test mode plays, if
it is a different one). Each further column holds the scores of a published agent of that name;
`published_name` says how it is called in pictures.

Actor processes may import this module: it never imports TensorFlow.
"""

import csv
import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence

from impala.errors import LevelError

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_COLUMNS = ('level', 'test_level', 'random', 'human')
# Columns of the packaged suites, as pictures name them.
_PUBLISHED_NAMES = {
    'impala_shallow': 'IMPALA, shallow network',
    'impala_deep': 'IMPALA, deep network',
    'impala_multitask': 'IMPALA, one for all games',
    'impala_experts': 'IMPALA, one for each level',
    'impala_deep_pbt': 'IMPALA, deep network, PBT',
}


@dataclasses.dataclass(frozen=True)
class Level:
    """A level and what others score in it.

    Attributes:
      name: as in `environments.create_environment`.
      test_name: name of the level that test mode plays.
      random: mean return of random actions; None if unknown.
      human: mean return of a human; None if unknown.
      published: name of an agent -> its mean return.
    """

    name: str
    test_name: str
    random: float | None = None
    human: float | None = None
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_scores(self) -> bool:
        """Whether returns can be human-normalized."""
        return self.random is not None and self.human is not None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Levels that one agent plays.

    Attributes:
      name: `'dmlab30'`, `'atari57'`, the name of a file without its ending, or `''` for a level or
        a list of levels.
      levels: at least one, all with different names.
    """

    name: str
    levels: tuple[Level, ...]

    @property
    def level_names(self) -> tuple[str, ...]:
        """The names of all levels, in order."""
        return tuple(level.name for level in self.levels)

    @property
    def text(self) -> str:
        """What is played, in a few words."""
        if len(self.levels) <= 3:
            return ', '.join(self.level_names)
        return f'{len(self.levels)} levels{" of " if self.name else ""}{self.name}'

    @property
    def has_scores(self) -> bool:
        """Whether the returns of every level can be human-normalized."""
        return all(level.has_scores for level in self.levels)

    def for_testing(self) -> 'Suite':
        """Returns the suite that test mode plays.

        A list of levels stays as it is.
        """
        if not self.name:
            return self
        levels = [dataclasses.replace(level, name=level.test_name) for level in self.levels]
        return Suite(self.name, tuple(levels))


def packaged_suites() -> list[str]:
    """Returns the names of the suites in this package."""
    return sorted(file[:-4] for file in os.listdir(_FOLDER) if file.endswith('.csv'))


def load(level_name: str) -> Suite:
    """Returns the suite that a `--level_name` means.

    Args:
      level_name: a packaged suite, a path that ends in `.csv`, a level, or several levels separated
        by commas.

    Raises:
      LevelError: the file is missing or has a mistake, or a level is named twice.
    """
    packaged = packaged_suites()
    if level_name in packaged:
        return read(os.path.join(_FOLDER, f'{level_name}.csv'))
    if level_name.endswith('.csv'):
        return read(level_name)
    names = [name.strip() for name in level_name.split(',')]
    if '' in names:
        raise LevelError(
            f'--level_name={level_name} has an empty name in it: give one level, several with '
            f'commas between, the path of a suite (.csv), or one of {", ".join(packaged)}.'
        )
    for name in names:
        if name in packaged or name.endswith('.csv'):
            raise LevelError(
                f'--level_name={level_name}: {name} is a suite, and a list takes levels only: '
                f'give --level_name={name}, or name its levels.'
            )
    if len(names) == 1 and not set(level_name) & set('/:-_'):
        close = difflib.get_close_matches(level_name.lower(), packaged, n=1, cutoff=0.6)
        if close:
            raise LevelError(
                f'There is no level and no suite {level_name!r}. Did you mean {close[0]!r}?'
            )
    _refuse_repetition(names, f'--level_name={level_name}')
    return Suite('', tuple(known_level(name) for name in names))


def published_name(column: str) -> str:
    """Returns a name to show for the published agent of a column."""
    return f'{_PUBLISHED_NAMES.get(column) or column.replace("_", " ")} (published)'


def known_level(name: str) -> Level:
    """Returns a level, with its scores if it is in a packaged suite."""
    for suite in packaged_suites():
        for level in read(os.path.join(_FOLDER, f'{suite}.csv')).levels:
            if name in (level.name, level.test_name):
                return dataclasses.replace(level, name=name)
    return Level(name, name)


def read(path: str) -> Suite:
    """Reads a suite from a CSV file.

    Raises:
      LevelError: the file is missing or has a mistake; the text names the line.
    """
    levels = []
    try:
        # Files from spreadsheets begin with a byte-order mark.
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            for column in ('level', 'random', 'human'):
                if column not in columns:
                    raise LevelError(
                        f'The suite {path} has no column {column!r}: its first line must name the '
                        'columns level, test_level (if tests are played in another one), random '
                        'and human.'
                    )
            for row in reader:
                levels.append(_level(row, f'{path}, line {reader.line_num}'))
    except OSError as error:
        raise LevelError(f'Cannot read the suite {path}: {error.strerror}.') from error
    except (UnicodeError, csv.Error) as error:
        raise LevelError(f'The suite {path} is not a CSV file: {error}.') from error
    if not levels:
        raise LevelError(f'The suite {path} has no level.')
    _refuse_repetition([level.name for level in levels], f'The suite {path}')
    tested: dict[str, str] = {}
    for level in levels:
        # Otherwise the episodes of both would be mixed.
        other = tested.setdefault(level.test_name, level.name)
        if other != level.name:
            raise LevelError(
                f'The suite {path} has {level.test_name} as the test_level of both {other} and '
                f'{level.name}: each needs one of its own.'
            )
    return Suite(os.path.splitext(os.path.basename(path))[0], tuple(levels))


def _level(row: Mapping[str, str | None], where: str) -> Level:
    name = (row['level'] or '').strip()
    if not name:
        raise LevelError(f'{where}: there is no level.')
    random, human = (_number(row, column, where) for column in ('random', 'human'))
    if random is not None and random == human:
        raise LevelError(
            f'{where}: random and human score of {name} are both {random:g}, which leaves nothing '
            'to normalize by.'
        )
    published = {}
    for column in row:
        if column and column not in _COLUMNS:
            value = _number(row, column, where)
            if value is not None:
                published[column] = value
    return Level(name, (row.get('test_level') or '').strip() or name, random, human, published)


def _number(row: Mapping[str, str | None], column: str, where: str) -> float | None:
    text = (row[column] or '').strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LevelError(f'{where}: {column} is {text!r}, which is not a number.')
    return value


def _refuse_repetition(names: Sequence[str], who: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise LevelError(f'{who} names the level {name} twice.')
