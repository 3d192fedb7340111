"""The files of a run's `--logdir`, for readers without TensorFlow."""

import contextlib
import csv
import fcntl
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CHECKPOINT_FOLDER = 'checkpoints'
CHECKPOINT_PREFIX = 'ckpt'
FLAG_FILE = 'flags.txt'
NETWORK_FILE = 'network.json'
METRICS_FILE = 'metrics.jsonl'
EPISODES_FILE = 'episodes.csv'
RUN_ID_FILE = 'run_id.txt'
EPISODES_HEADER = (
    'wall_seconds',
    'frames',
    'agent_steps',
    'level',
    'episode_return',
    'episode_frames',
    'ended_by',
)

# Less than any checkpoint: without room for this there is none for a checkpoint.
_TRIED_BYTES = 4096
# TensorFlow's counters have 64 bits; larger numbers in a log are damage.
_LARGEST_NUMBER = 2**62


class LogdirError(Exception):
    """The contents of the log directory cannot be used, or it is not writable."""


def lock_logdir(logdir: str) -> int:
    """Makes this process the only run that writes to a log directory, until it ends.

    Two runs in one directory, a likely mistake with the default one, would delete each other's
    checkpoints and mix their logs.

    Args:
      logdir: the directory; created if missing.

    Returns:
      The file descriptor that holds the lock; `os.close` releases it.

    Raises:
      LogdirError: another run holds the lock, or the directory cannot be made.
    """
    try:
        os.makedirs(logdir, exist_ok=True)
        descriptor = os.open(logdir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise LogdirError(f'Cannot use {logdir} as log directory: {error.strerror}.') from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LogdirError(
            f'Another run is writing to {logdir}: stop it, or give this one another --logdir.'
        ) from None
    except OSError:
        # Some network file systems cannot lock directories; train there anyway.
        pass
    return descriptor


@contextlib.contextmanager
def locked(logdir: str) -> Iterator[None]:
    """Holds the lock of a log directory within its block; see `lock_logdir`."""
    descriptor = lock_logdir(logdir)
    try:
        yield
    finally:
        os.close(descriptor)


def try_checkpoint_folder(logdir: str) -> None:
    """Checks before training that checkpoints can be written.

    Args:
      logdir: the log directory, which exists.

    Raises:
      LogdirError: nothing can be written there.
    """
    folder = os.path.join(logdir, CHECKPOINT_FOLDER)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
        # A run that another check rejects leaves no empty folder.
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    except OSError as error:
        raise LogdirError(
            f'Cannot write checkpoints in {folder}: {error.strerror}. Make room there, or give '
            'another --logdir.'
        ) from error


def run_id(logdir: str) -> str:
    """Returns the unique id of the run in a log directory, by which replay jobs know it.

    The first call makes the id; it is stored in the directory.

    Args:
      logdir: the log directory; created if missing.

    Raises:
      LogdirError: it cannot be read or written.
    """
    path = os.path.join(logdir, RUN_ID_FILE)
    try:
        with open(path, encoding='ascii', errors='replace') as file:
            text = file.read().strip()
    except FileNotFoundError:
        text = ''
    except OSError as error:
        raise LogdirError(f'Cannot read {path}: {error.strerror}.') from error
    if not re.fullmatch('[0-9a-f]{32}', text):
        text = secrets.token_hex(16)
        write_atomically(path, f'{text}\n')
    return text


def newest_checkpoint(logdir: str) -> str | None:
    """Returns the path of the newest checkpoint that seems complete, None if there is none."""
    complete = complete_checkpoints(logdir)
    return complete[-1] if complete else None


def complete_checkpoints(logdir: str, after: str | None = None) -> list[str]:
    """Returns the checkpoints that seem complete, oldest first.

    Args:
      logdir: the log directory.
      after: path of a checkpoint, which need not exist; only newer ones are returned.
    """
    return [
        path
        for path in checkpoint_paths(logdir)
        if os.path.exists(f'{path}.index')
        and (after is None or checkpoint_number(path) > checkpoint_number(after))
    ]


def checkpoint_number(path: str) -> int:
    """Returns the number at the end of a checkpoint's path."""
    return int(path.rpartition('-')[2])


def checkpoint_paths(logdir: str) -> list[str]:
    """Returns all checkpoints, oldest first, including incomplete ones."""
    folder = os.path.join(logdir, CHECKPOINT_FOLDER)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LogdirError(f'Cannot read {folder}: {error.strerror}.') from error
    pattern = re.compile(rf'{CHECKPOINT_PREFIX}-([0-9]{{1,15}})\.(index|data-\d+-of-\d+)')
    numbers = {int(match[1]) for match in map(pattern.fullmatch, names) if match}
    return [os.path.join(folder, f'{CHECKPOINT_PREFIX}-{number}') for number in sorted(numbers)]


def write_atomically(path: str, content: str | bytes) -> None:
    """Replaces a file as a whole; makes its folder if missing.

    Raises:
      LogdirError: it cannot be written; an earlier file is unchanged.
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, 'wb') as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
    except OSError as error:
        raise LogdirError(f'Cannot write {path}: {error.strerror}.') from error


def read_episodes(
    logdir: str, report: Callable[[str], Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the episodes of a run, oldest first.

    Args:
      logdir: the log directory.
      report: takes a sentence about damaged lines.

    Yields:
      `wall_seconds`, `frames`, `agent_steps`, `level` and `return` (not always finite).

    Raises:
      LogdirError: there is no run there.
    """
    path = os.path.join(logdir, EPISODES_FILE)
    try:
        yield from read_rows(path, parse_episode, missing_ok=False, report=report)
    except OSError as error:
        raise LogdirError(
            f'Cannot read the logs of a run in {logdir}: {error.strerror}.'
        ) from error


def read_metrics(logdir: str, report: Callable[[str], Any] | None = None) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`, an empty list if it does not exist yet.

    Args:
      logdir: folder of a run, which may still be training.
      report: takes a sentence about damaged lines.

    Raises:
      OSError: the file cannot be read.
    """
    return list(read_rows(os.path.join(logdir, METRICS_FILE), parse_metrics, report=report))


def parse_episode(line: bytes) -> dict[str, Any]:
    """Parses a row of episodes.csv; raises ValueError if it is damaged."""
    try:
        (fields,) = csv.reader([line.decode()])
    except csv.Error as error:
        raise ValueError(str(error)) from error
    wall_seconds, frames, agent_steps, level, episode_return, _, _ = fields
    return {
        'wall_seconds': _seconds(float(wall_seconds)),
        'frames': _count(int(frames)),
        'agent_steps': _count(int(agent_steps)),
        'level': level,
        'return': float(episode_return),
    }


def parse_metrics(line: bytes) -> dict[str, Any]:
    """Parses a line of metrics.jsonl; raises ValueError if it is damaged.

    All values are finite numbers, except `actors`, which is a list of objects.
    """
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    if not isinstance(row, dict) or not {'agent_steps', 'wall_seconds'} <= row.keys():
        raise ValueError('not a line of metrics')
    for name, value in row.items():
        if name == 'actors':
            if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                raise ValueError('actors are not a list of objects')
        elif type(value) not in (int, float) or not abs(value) < _LARGEST_NUMBER:
            raise ValueError(f'{name} is not a number')
    for name in ('agent_steps', 'frames', 'updates'):
        _count(row.get(name, 0))
    _seconds(row['wall_seconds'])
    return row


def read_rows(
    path: str,
    parse: Callable[[bytes], dict[str, Any]],
    missing_ok: bool = True,
    report: Callable[[str], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, without its header and an incomplete last line.

    Args:
      path: of the file.
      parse: raises ValueError for a damaged line, which is left out.
      missing_ok: whether a missing file counts as empty instead of raising an error.
      report: takes a sentence about damaged lines, after the last row.
    """
    if missing_ok and not os.path.exists(path):
        return
    damaged = []
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b'\n') and not is_header(line):
                try:
                    row = parse(line)
                except ValueError:
                    damaged.append(number)
                else:
                    yield row
    if damaged and report is not None:
        report(damage_text(path, damaged))


def is_header(line: bytes) -> bool:
    """Returns whether a line is the header of episodes.csv."""
    return line.rstrip(b'\r\n') == ','.join(EPISODES_HEADER).encode()


def damage_text(path: str, numbers: Sequence[int]) -> str:
    """Returns a sentence about damaged lines that are left out.

    Args:
      path: of the file.
      numbers: their line numbers, from 1.
    """
    more = f' (and {len(numbers) - 1} more)' if len(numbers) > 1 else ''
    return f'WARNING: {path}, line {numbers[0]}{more} is damaged and left out.'


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f'{value!r:.40} is not a count')
    return value


def _seconds(value: float) -> float:
    if not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f'{value!r:.40} is not a number of seconds')
    return value
