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
        argument = json.dumps(
            settings | {'lifeline': self._lifeline, 'environment': dataclasses.asdict(self.config)}
        )
        # One environment per core: threads of its libraries would only take it from the others.
        threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
        return subprocess.Popen(
            [sys.executable, '-m', 'impala.actor', argument],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=(self._lifeline, *descriptors),
            # What a terminal or a job scheduler sends to all processes of a run is for this one.
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


@dataclasses.dataclass
class _ActorProcess:
    actors: Sequence[int]
    process: subprocess.Popen
    errors: IO[bytes]
    descriptor: int  # Readable when the process has ended.
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
        episodes: Callable[[int], dict[str, Any]] | None = None,
    ):
        """Prepares; processes start with the `with` block.

        Args:
          workplace: where they run.
          batcher: what they connect to; closed when the pool gives up or ends.
          level_names: of each actor.
          seed: of the run; every actor and every restart has one of its own that follows from it.
          max_restarts: of one process without a full unroll in between, before the pool gives up.
          report: told, in a few lines, of every process that died, and once of what environments
            warn of.
          envs_per_process: consecutive actors that share a process, and its fate.
          episodes: asked, whenever an actor is started, for the arguments of its `EpisodeSeries`;
            None for actors that play until the batcher is closed.
        """
        self._workplace = workplace
        self._batcher = batcher
        self._level_names = level_names
        self._seed = seed
        self._max_restarts = max_restarts
        self._report = report
        self._episodes = episodes
        self._failure: Exception | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._warnings_read, self._warnings_write = os.pipe()
        for end in (self._warnings_read, self._warnings_write):
            # No actor waits for a pool that is not listening any more.
            os.set_blocking(end, False)
        self._unfinished_warning = b''
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
        self._selector.register(self._warnings_read, selectors.EVENT_READ, self._pass_warnings_on)
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
        for descriptor in (
            self._wake_read,
            self._wake_write,
            self._warnings_read,
            self._warnings_write,
        ):
            os.close(descriptor)

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
        # The same episodes again might well end in the same crash.
        first_seed = self._seed + len(self._level_names) * self.restarts
        settings: dict[str, Any] = {
            'level_names': [self._level_names[actor] for actor in actors],
            'segment': self._batcher.fd,
            'actors': list(actors),
            'warnings': self._warnings_write,
        }
        if self._episodes is None:
            settings['seeds'] = [(first_seed + actor) % 2**31 for actor in actors]
        else:
            settings['episodes'] = [self._episodes(actor) for actor in actors]
        process = self._workplace.start(
            settings,
            [self._batcher.fd, self._warnings_write],
            errors,
        )
        descriptor = os.pidfd_open(process.pid)
        self._processes[index] = _ActorProcess(
            actors, process, errors, descriptor, restarts_in_a_row
        )
        self._selector.register(descriptor, selectors.EVENT_READ, index)

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
        *lines, self._unfinished_warning = (
            self._unfinished_warning + os.read(self._warnings_read, 65536)
        ).split(b'\n')
        for line in lines:
            # All actors have much the same to say.
            if line not in self._reported_warnings:
                self._reported_warnings.add(line)
                self._report(f'WARNING: {line.decode(errors="replace")}')

    def _replace(self, index: int) -> None:
        ended = self._processes[index]
        code = ended.process.wait()
        if code == CLOSED_EXIT_CODE:  # Soon this pool is, too, or the test is over for this one.
            self._selector.unregister(ended.descriptor)
            return
        text = _tail(ended.errors)
        if code == BAD_INPUT_EXIT_CODE:
            raise LevelError(text.splitlines()[-1])
        completed = self._batcher.statistics().completed_unrolls
        # Fixed episodes are played again from the first: what was done before proves nothing.
        has_worked = self._episodes is None and any(completed[actor] > 0 for actor in ended.actors)
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
