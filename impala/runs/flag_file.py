"""Reads flag files and puts their lines into the command line.

A line is a flag as on the command line; empty lines and those that start with `#` or `//` are
comments. A flag file may include others with `--flagfile`. The flag file of a run lies in the
run's folder: given as `--flagfile`, it resumes the run there, even if the folder was moved.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence

from impala.runs.files import CHECKPOINT_FOLDER, FLAG_FILE, METRICS_FILE, NETWORK_FILE

# Start of Python's or absl's message about a value of the wrong type -> reason for the user.
_REASONS = {
    'invalid literal for int()': 'is not a whole number',
    'Exceeds the limit': 'has too many digits',
    'could not convert string to float': 'is not a number',
    "('Non-boolean argument": 'is not true or false',
}
_LONGEST_VALUE = 80

# A flag file has a few kilobytes; a picture has far more, and a device may never end.
_MAX_BYTES = 1 << 20


class FlagFileError(Exception):
    """A flag file cannot be used; its text is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the command line.

    Attributes:
      text: the argument as written.
      origin: `FILE, line N`; '' for the command line itself.
    """

    text: str
    origin: str = ''

    @property
    def name(self) -> str:
        """Name of the flag as written, for instance `nopopart`; '' if it is not a flag."""
        if not self.text.startswith('-'):
            return ''
        return self.text.lstrip('-').partition('=')[0]


def read(path: str) -> list[Argument]:
    """Returns the flags in a file, without expanding `--flagfile` in it.

    Raises:
      FlagFileError: it cannot be read, or a line is not a flag.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise FlagFileError(f'Cannot read the flag file {path}: {error.strerror}.') from error
    if len(content) > _MAX_BYTES:
        raise FlagFileError(f'{path} is too long for a flag file: it has more than 1 MB.')
    arguments = []
    for number, line in enumerate(content.removeprefix(b'\xef\xbb\xbf').split(b'\n'), 1):
        origin = f'{path}, line {number}'
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise FlagFileError(f'{origin} is not UTF-8 text: this is not a flag file.') from None
        if not text or text.startswith(('#', '//')):
            continue
        if '\0' in text or not text.startswith('-'):
            raise FlagFileError(f'{origin}: {text[:80]!r} is not a flag: flags start with --.')
        arguments.append(Argument(text, origin))
    return arguments


def expand(arguments: Sequence[str]) -> list[Argument]:
    """Replaces each `--flagfile` by the contents of the file.

    The flag file of a run also sets `--logdir` to its folder, unless `--logdir` is given.

    Args:
      arguments: the command line without the program.

    Raises:
      FlagFileError: a flag file cannot be used.
    """
    given = [Argument(text) for text in arguments]
    has_logdir = any(argument.name == 'logdir' for argument in given)
    return list(_expand(given, has_logdir, ()))


def folder_of_run(path: str) -> str | None:
    """Returns the folder of the run whose flag file this is; None if it belongs to no run."""
    folder, name = os.path.split(os.path.abspath(path))
    others = (NETWORK_FILE, CHECKPOINT_FOLDER, METRICS_FILE)
    if name == FLAG_FILE and any(os.path.exists(os.path.join(folder, other)) for other in others):
        return folder
    return None


def plainly(message: str) -> str:
    """Returns absl's message about a flag as a plain sentence on one line."""
    message = message.removeprefix('ERROR:: ')
    for beginning, reason in _REASONS.items():
        match = re.match(rf'flag --(\w+)=(.*?): {re.escape(beginning)}', message, re.DOTALL)
        if match:
            name, value = match.groups()
            if len(value) > _LONGEST_VALUE:
                value = f'{value[:_LONGEST_VALUE]}...'
            message = f'--{name}={value} {reason}.'
    return ' '.join(message.split())


def _expand(
    arguments: Sequence[Argument], has_logdir: bool, within: tuple[str, ...]
) -> Iterator[Argument]:
    remaining = iter(arguments)
    for argument in remaining:
        if argument.text == '--':
            yield argument
            yield from remaining
        elif argument.name == 'flagfile':
            path = argument.text.partition('=')[2]
            if '=' not in argument.text:
                path = next(remaining, Argument('')).text
            yield from _included(os.path.expanduser(path.strip()), argument, has_logdir, within)
        else:
            yield argument


def _included(
    path: str, argument: Argument, has_logdir: bool, within: tuple[str, ...]
) -> Iterator[Argument]:
    if not path:
        where = f' ({argument.origin})' if argument.origin else ''
        raise FlagFileError(f'--flagfile names no file{where}: give the path of one.')
    identity = os.path.realpath(path)
    if identity in within:
        raise FlagFileError(f'{argument.origin}: the flag file {path} includes itself.')
    lines = read(path)
    folder = folder_of_run(path)
    yield from _expand(lines, has_logdir, (*within, identity))
    if folder is not None and not has_logdir:
        yield Argument(f'--logdir={folder}', path)
