"""The files of a run's `--logdir`, for those who read them without TensorFlow."""

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

# Less than any checkpoint has; where there is no room for this there is none for one.
_TRIED_BYTES = 4096
# Counters of TensorFlow are 64 bits wide. All numbers of a log are smaller.
_LARGEST_NUMBER = 2**62


class LogdirError(Exception):
    """What lies in the log directory cannot be used, or nothing can be written there."""


def lock_logdir(logdir: str) -> int:
    """Makes this process the only run that writes to a log directory, until it ends in any way.

    Two runs that share a directory, easily done with a default one, would delete each other's
    checkpoints and mix their logs.

    Args:
      logdir: the directory; created if missing.

    Returns:
      The file descriptor that holds the lock; `os.close` releases it.

    Raises:
      LogdirError: if another run holds it, or the directory cannot be made.
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
        # Some network file systems cannot lock directories; that is no reason not to train there.
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
    """Makes sure, before anything is trained, that checkpoints can be written.

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
        # Unless it holds checkpoints, nothing is left if the run is refused after all.
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    except OSError as error:
        raise LogdirError(
            f'Cannot write checkpoints in {folder}: {error.strerror}. Make room there, or give '
            'another --logdir.'
        ) from error


def run_id(logdir: str) -> str:
    """Returns what tells the run in a log directory from all others, for who serves several runs.

    It is made when it is first asked for, and stays with the directory.

    Args:
      logdir: the log directory; created if missing.

    Raises:
      LogdirError: if it cannot be read or written.
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
    """Returns the path of the newest checkpoint that seems to be complete, None without any."""
    complete = complete_checkpoints(logdir)
    return complete[-1] if complete else None


def complete_checkpoints(logdir: str, after: str | None = None) -> list[str]:
    """Returns the checkpoints that seem to be complete, oldest first.

    Args:
      logdir: the log directory.
      after: path of a checkpoint, there or not; only newer ones are returned.
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
    """Returns the checkpoints, oldest first; one that lacks a file is listed too."""
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
    """Replaces a file as a whole; its folder is made if missing.

    Raises:
      LogdirError: if it cannot be written; a file from before is left as it was.
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
    """Yields the episodes of a run, in their order.

    Args:
      logdir: the log directory.
      report: told of damaged lines, in a sentence.

    Yields:
      `wall_seconds`, `frames`, `agent_steps`, `level` and `return` (not always finite).

    Raises:
      LogdirError: if there is no run there.
    """
    path = os.path.join(logdir, EPISODES_FILE)
    try:
        yield from read_rows(path, parse_episode, missing_ok=False, report=report)
    except OSError as error:
        raise LogdirError(
            f'Cannot read the logs of a run in {logdir}: {error.strerror}.'
        ) from error


def read_metrics(logdir: str, report: Callable[[str], Any] | None = None) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`; none if it is not there yet.

    Args:
      logdir: folder of a run, which may go on.
      report: told of damaged lines, in a sentence.

    Raises:
      OSError: the file cannot be read.
    """
    return list(read_rows(os.path.join(logdir, METRICS_FILE), parse_metrics, report=report))


def parse_episode(line: bytes) -> dict[str, Any]:
    """Parses a row of episodes.csv; raises ValueError if it is none."""
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
    """Parses a line of metrics.jsonl; raises ValueError if it is none.

    All values are finite numbers, but for `actors`, a list of objects.
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
                raise ValueError('actors are no list of objects')
        elif type(value) not in (int, float) or not abs(value) < _LARGEST_NUMBER:
            raise ValueError(f'{name} is no number')
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
    """Yields the rows of a file, without its header and a last line that was cut.

    Args:
      path: of the file.
      parse: raises ValueError for a line that is damaged, which is left out.
      missing_ok: whether a file that is not there has no rows, in place of an error.
      report: told of damaged lines, in a sentence, after the last row.
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
      numbers: of the lines, from 1.
    """
    more = f' (and {len(numbers) - 1} more)' if len(numbers) > 1 else ''
    return f'WARNING: {path}, line {numbers[0]}{more} is damaged and left out.'


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f'{value!r:.40} is no count')
    return value


def _seconds(value: float) -> float:
    if not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f'{value!r:.40} are no seconds')
    return value
