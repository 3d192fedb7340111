"""Starts the actor processes, restarts those that die, and ends them all."""

import contextlib
import dataclasses
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from dynamic_batching.unroll_batcher import UnrollBatcher
from environments import EnvironmentConfig, LevelError
from impala.actor import BAD_INPUT_EXIT_CODE, CLOSED_EXIT_CODE
from impala.episode_series import Episodes, Schedule
from impala.seeds import derived_seed
from impala.trajectory import EnvironmentSpec

# What an actor gets to end by itself, in seconds, before it is killed.
GRACE_SECONDS = 2.0
# Of what an actor prints so much is passed on when it dies, and not much more is kept until then.
ERROR_BYTES = 4000
MAX_PRINTED_BYTES = 1_000_000
CUT_SECONDS = 5.0


class ActorError(Exception):
    """Actors died too often; the text holds the last one's own error."""


class Workplace:
    """What actor processes share: a temporary folder, and a pipe that tells them of our end.

    Both go when the block is left. If this process is killed instead, the pipe is closed by the
    kernel, whereupon the actors exit and a shell that waited for that removes the folder.
    """

    def __init__(self, config: EnvironmentConfig):
        """Prepares for actors.

        Args:
          config: of their environments; its `temp_folder` is replaced.
        """
        self._lifeline, self._held_end = os.pipe()
        self._temp_folder = tempfile.mkdtemp(prefix='impala-')
        # A job scheduler's signal to all processes of a run is not for this one. Once more a moment
        # later: an actor may just have been writing.
        remove = 'trap "" HUP INT TERM; read _; rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }'
        self._janitor = subprocess.Popen(
            ['/bin/sh', '-c', remove, self._temp_folder],
            stdin=self._lifeline,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.config = dataclasses.replace(config, temp_folder=self._temp_folder)

    def __enter__(self) -> 'Workplace':
        return self

    def __exit__(self, *unused: Any) -> None:
        os.close(self._held_end)
        os.close(self._lifeline)
        self._janitor.wait()
        # In case somebody killed it.
        shutil.rmtree(self._temp_folder, ignore_errors=True)

    def start(
        self, settings: dict[str, Any], descriptors: Sequence[int], errors: IO[bytes]
    ) -> subprocess.Popen:
        """Starts an actor process.

        Args:
          settings: for `impala.actor.main`, but for `lifeline` and `environment`.
          descriptors: that it inherits, under their own numbers.
          errors: file for what it prints.
        """
        settings = settings | {
            'lifeline': self._lifeline,
            'environment': dataclasses.asdict(self.config),
        }
        # One environment per core: threads of its libraries would only take it from the others.
        threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
        with tempfile.TemporaryFile('w+') as settings_file:
            json.dump(settings, settings_file)
            settings_file.seek(0)
            return subprocess.Popen(
                [sys.executable, '-m', 'impala.actor'],
                stdin=settings_file,
                stdout=errors,
                stderr=errors,
                pass_fds=(self._lifeline, *descriptors),
                # What a terminal or a job scheduler sends to all processes of a run is for this
                # one.
                start_new_session=True,
                # A level may be a callable of the user's own, found wherever this process finds it.
                env=os.environ
                | threads
                | {'LP_NUM_THREADS': '0', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
            )

    def environment_spec(self, level_name: str, seed: int) -> EnvironmentSpec:
        """Returns the spec of one level; see `common_spec`."""
        return self.common_spec([level_name], seed)

    def common_spec(self, level_names: Sequence[str], seed: int) -> EnvironmentSpec:
        """Returns the spec that all levels have, asked of a process that tries each of them.

        Args:
          level_names: at least one; repetitions do not matter.
          seed: of the environments that are made for it.

        Raises:
          LevelError: levels cannot be played, or not by one agent; all of them are named.
          ActorError: an environment failed; the text is its traceback.
        """
        names = list(dict.fromkeys(level_names))
        answers = self._describe(names, seed)
        errors = {name: answer['error'] for name, answer in answers.items() if 'error' in answer}
        if len(names) == 1 and errors:
            raise LevelError(errors[names[0]])
        if errors:
            reasons: dict[str, list[str]] = {}
            for name, reason in errors.items():
                reasons.setdefault(reason.replace(repr(name), 'this level'), []).append(name)
            sentences = [
                f'{", ".join(who)}: {reason if len(who) > 1 else errors[who[0]]}'
                for reason, who in reasons.items()
            ]
            raise LevelError(
                f'{len(errors)} of the {len(names)} levels cannot be played here. '
                + ' '.join(sentences)
            )
        specs = {
            name: EnvironmentSpec.from_json(answer['spec']) for name, answer in answers.items()
        }
        common = specs[names[0]]
        for what, value_of in (
            ('observations', lambda spec: spec.observation),
            ('actions', lambda spec: spec.num_actions),
            ('frames per action', lambda spec: spec.num_action_repeats),
        ):
            others = [name for name in names if value_of(specs[name]) != value_of(common)]
            if others:
                raise LevelError(
                    f'One agent cannot play levels that differ in their {what}: {names[0]} has '
                    f'{_shown(value_of(common))}, but '
                    + ', '.join(f'{name} {_shown(value_of(specs[name]))}' for name in others)
                    + '.'
                )
        return common

    def _describe(self, level_names: list[str], seed: int) -> dict[str, Any]:
        """Returns level name -> what `impala.actor` tells of it, in a process of its own."""
        read_end, write_end = os.pipe()
        with tempfile.TemporaryFile() as errors, os.fdopen(read_end) as pipe:
            process = self.start(
                {'level_names': level_names, 'seed': seed, 'spec_pipe': write_end},
                [write_end],
                errors,
            )
            os.close(write_end)
            lines = pipe.read().splitlines()
            process.wait()
            if len(lines) < len(level_names):
                raise ActorError(
                    f'The environment {level_names[len(lines)]} failed:\n{_tail(errors)}'
                )
        return dict(zip(level_names, map(json.loads, lines), strict=True))


class _LinePipe:
    """What actor processes write, line by line."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self._unfinished = b''

    def read_lines(self) -> list[bytes]:
        """Returns all lines that have been written."""
        text = self._unfinished
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.read_end, 65536):
                text += part
        *lines, self._unfinished = text.split(b'\n')
        return lines

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


@dataclasses.dataclass
class _ActorProcess:
    actors: Sequence[int]
    process: subprocess.Popen
    errors: IO[bytes]
    descriptor: int  # Readable when the process has ended.
    num_episodes: int  # That it was given.
    restarts_in_a_row: int = 0


class ActorPool:
    """Keeps the actor processes of a batcher alive. A context manager."""

    def __init__(
        self,
        workplace: Workplace,
        batcher: UnrollBatcher,
        level_names: Sequence[str],
        seed: int,
        max_restarts: int,
        report: Callable[[str], None],
        envs_per_process: int = 1,
        schedule: Schedule | None = None,
    ):
        """Prepares; processes start with the `with` block.

        Args:
          workplace: where they run.
          batcher: what they connect to; closed when the pool gives up or ends.
          level_names: of each actor.
          seed: of the run; every actor and every restart has one of its own that follows from it.
          max_restarts: of one process without a full unroll in between, or, with a schedule, an
            episode, before the pool gives up.
          report: told, in a few lines, of every process that died, and once of what environments
            warn of.
          envs_per_process: consecutive actors that share a process, and its fate.
          schedule: of the episodes to be played, told of their results on another thread; None for
            actors that play until the batcher is closed.
        """
        self._workplace = workplace
        self._batcher = batcher
        self._level_names = level_names
        self._seed = seed
        self._max_restarts = max_restarts
        self._report = report
        self._schedule = schedule
        self._failure: Exception | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._results = _LinePipe()
        self._warnings = _LinePipe()
        # No actor waits for a pool that is not listening any more.
        os.set_blocking(self._warnings.write_end, False)
        self._reported_warnings: set[bytes] = set()
        actors = range(len(level_names))
        self._groups = [
            actors[first : first + envs_per_process]
            for first in range(0, len(actors), envs_per_process)
        ]
        self._processes: dict[int, _ActorProcess] = {}
        self._supervisor = threading.Thread(target=self._supervise, name='actor pool', daemon=True)
        self.restarts = 0

    def __enter__(self) -> 'ActorPool':
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._selector.register(
            self._warnings.read_end, selectors.EVENT_READ, self._pass_warnings_on
        )
        self._selector.register(self._results.read_end, selectors.EVENT_READ, self._record_results)
        try:
            for index in range(len(self._groups)):
                self._start(index, restarts_in_a_row=0)
        except BaseException:
            self._end_processes()
            raise
        self._supervisor.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        os.write(self._wake_write, b'.')
        self._supervisor.join()
        self._batcher.close()
        self._end_processes()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._warnings.close()
        self._results.close()

    @property
    def process_ids(self) -> list[int]:
        """Of the actors, in their order; one that is being replaced is left out."""
        processes = self._processes.copy()  # At once: the supervisor may be replacing one.
        return [processes[index].process.pid for index in sorted(processes)]

    def check(self) -> None:
        """Raises the error that made the pool give up, if it has.

        Raises:
          LevelError: an environment cannot be played as asked.
          ActorError: an actor died more than `max_restarts` times in a row.
        """
        if self._failure is not None:
            raise self._failure

    def _start(self, index: int, restarts_in_a_row: int) -> None:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # What is printed after a cut goes to the new end.
        fcntl.fcntl(errors, fcntl.F_SETFL, fcntl.fcntl(errors, fcntl.F_GETFL) | os.O_APPEND)
        actors = self._groups[index]
        settings: dict[str, Any] = {
            'level_names': [self._level_names[actor] for actor in actors],
            'segment': self._batcher.fd,
            'actors': list(actors),
            'warnings': self._warnings.write_end,
        }
        descriptors = [self._batcher.fd, self._warnings.write_end]
        episodes = self._episodes(index)
        if self._schedule is None:
            # The same episodes again might well end in the same crash.
            settings['seeds'] = [derived_seed(self._seed, self.restarts, actor) for actor in actors]
        else:
            settings |= {
                'episodes': [each.to_json() for each in episodes],
                'results': self._results.write_end,
                'series': self._schedule.series_settings,
            }
            descriptors.append(self._results.write_end)
        process = self._workplace.start(settings, descriptors, errors)
        descriptor = os.pidfd_open(process.pid)
        self._processes[index] = _ActorProcess(
            actors, process, errors, descriptor, sum(map(len, episodes)), restarts_in_a_row
        )
        self._selector.register(descriptor, selectors.EVENT_READ, index)

    def _episodes(self, index: int) -> list[Episodes]:
        """Returns those without a result, of each actor of a process; none without a schedule."""
        if self._schedule is None:
            return []
        return [self._schedule.episodes_of(actor) for actor in self._groups[index]]

    def _supervise(self) -> None:
        while True:
            for key, _ in self._selector.select(CUT_SECONDS):
                if key.data is None:
                    return
                try:
                    if callable(key.data):
                        key.data()
                    else:
                        self._replace(key.data)
                except Exception as error:  # Raised again where the training loop looks.
                    self._failure = error
                    self._batcher.close()
                    return
            for each in self._processes.values():
                if os.fstat(each.errors.fileno()).st_size > MAX_PRINTED_BYTES:
                    end = _tail(each.errors).encode()
                    os.ftruncate(each.errors.fileno(), 0)
                    os.write(each.errors.fileno(), end + b'\n')

    def _pass_warnings_on(self) -> None:
        for line in self._warnings.read_lines():
            # All actors have much the same to say.
            if line not in self._reported_warnings:
                self._reported_warnings.add(line)
                self._report(f'WARNING: {line.decode(errors="replace")}')

    def _record_results(self) -> None:
        for line in self._results.read_lines():
            assert self._schedule is not None  # Or nobody would have written.
            self._schedule.record(*json.loads(line))

    def _replace(self, index: int) -> None:
        ended = self._processes[index]
        code = ended.process.wait()
        # What it has written before its end counts.
        self._record_results()
        num_episodes = sum(map(len, self._episodes(index)))
        # Soon this pool is closed, too, or the test is over for this one.
        if code == CLOSED_EXIT_CODE or num_episodes == 0 < ended.num_episodes:
            self._selector.unregister(ended.descriptor)
            return
        text = _tail(ended.errors)
        if code == BAD_INPUT_EXIT_CODE:
            raise LevelError(text.splitlines()[-1])
        if self._schedule is None:
            completed = self._batcher.statistics().completed_unrolls
            has_worked = any(completed[actor] > 0 for actor in ended.actors)
        else:
            # Full unrolls prove nothing: an episode that was begun is played again from its start.
            has_worked = num_episodes < ended.num_episodes
        in_a_row = 1 if has_worked else ended.restarts_in_a_row + 1
        what = f'signal {-code}' if code < 0 else f'exit code {code}'
        who = ', '.join(f'{actor} ({self._level_names[actor]})' for actor in ended.actors)
        if in_a_row > self._max_restarts:
            raise ActorError(
                f'Actor {who} ended with {what} and was restarted '
                f'{self._max_restarts} times in a row before. Its own error:\n{text}'
            )
        self._report(f'Actor {who} ended with {what} and is restarted.\n{text}'.rstrip())
        self._forget(index)
        self.restarts += 1
        for actor in ended.actors:
            self._batcher.reset_actor(actor)
        self._start(index, in_a_row)

    def _forget(self, index: int) -> None:
        ended = self._processes.pop(index)
        with contextlib.suppress(KeyError):
            self._selector.unregister(ended.descriptor)
        os.close(ended.descriptor)
        ended.errors.close()

    def _end_processes(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        for index, each in list(self._processes.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, deadline - time.monotonic()))
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
            self._forget(index)


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ' and '.join(
        f'{name} {spec.dtype} {"x".join(map(str, spec.shape))}' for name, spec in value.items()
    )


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - ERROR_BYTES))
    return errors.read().decode(errors='replace').strip() or '(it printed nothing)'
