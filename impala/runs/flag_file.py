"""Flag files: what is in them, what their lines stand for on a command line, and whose they are.

A line is a flag as on the command line; empty lines and those that start with `#` or `//` are
comments. A flag file may include others with `--flagfile`. The flag file of a run stands in the
run's folder, so the run can be moved: its own `--flagfile` goes on with it wherever it is now.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence

from impala.runs.files import CHECKPOINT_FOLDER, FLAG_FILE, METRICS_FILE, NETWORK_FILE

# How Python and absl begin to say that a value is not of a flag's type, and what it is to the user.
_REASONS = {
    'invalid literal for int()': 'is not a whole number',
    'Exceeds the limit': 'has too many digits',
    'could not convert string to float': 'is not a number',
    "('Non-boolean argument": 'is not true or false',
}
_LONGEST_VALUE = 80

# A flag file has some kilobytes; a device or a picture does not end or has far more.
_MAX_BYTES = 1 << 20


class FlagFileError(Exception):
    """A flag file cannot be used; its text is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the command line.

    Attributes:
      text: of it.
      origin: `FILE, line N`; '' if it stands on the command line itself.
    """

    text: str
    origin: str = ''

    @property
    def name(self) -> str:
        """Name of the flag as it is written, `nopopart` for instance; '' if it is none."""
        if not self.text.startswith('-'):
            return ''
        return self.text.lstrip('-').partition('=')[0]


def read(path: str) -> list[Argument]:
    """Returns the flags in a file; `--flagfile` in it stands for itself.

    Raises:
      FlagFileError: it cannot be read, or a line is no flag.
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
            raise FlagFileError(f'{origin} is not UTF-8 text: this is no flag file.') from None
        if not text or text.startswith(('#', '//')):
            continue
        if '\0' in text or not text.startswith('-'):
            raise FlagFileError(f'{origin}: {text[:80]!r} is not a flag: flags start with --.')
        arguments.append(Argument(text, origin))
    return arguments


def expand(arguments: Sequence[str]) -> list[Argument]:
    """Puts what is in flag files in the place of each `--flagfile`.

    The flag file of a run stands for the run in its folder, whatever the folder was called when it
    was written, unless `--logdir` is given.

    Args:
      arguments: of the command line, without the program.

    Raises:
      FlagFileError: a flag file cannot be used.
    """
    given = [Argument(text) for text in arguments]
    has_logdir = any(argument.name == 'logdir' for argument in given)
    return list(_expand(given, has_logdir, ()))


def folder_of_run(path: str) -> str | None:
    """Returns the folder of the run whose flag file this is; None if it is not a run's."""
    folder, name = os.path.split(os.path.abspath(path))
    others = (NETWORK_FILE, CHECKPOINT_FOLDER, METRICS_FILE)
    if name == FLAG_FILE and any(os.path.exists(os.path.join(folder, other)) for other in others):
        return folder
    return None


def plainly(message: str) -> str:
    """Returns what absl says of a flag as a sentence that says what would be right, on one line."""
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
