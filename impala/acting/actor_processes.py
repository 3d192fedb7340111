"""Starts and ends actor processes on this machine, and finds out the specs of their levels."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from impala.acting.actor import STACK_SIGNAL
from impala.acting.silence import SilenceWatch, since
from impala.config import ActorsConfig, ConfigError, EnvironmentConfig
from impala.errors import LevelError
from impala.runs.progress import report_to_stderr
from impala.runs.start_progress import StartProgress
from impala.trajectory import ArraySpec, EnvironmentSpec

# Seconds that a process gets to end by itself before it is killed.
GRACE_SECONDS = 2.0
# Seconds between two checks for signs of life, and the most that such a pause counts as silence.
WATCH_SECONDS = 1.0
LONGEST_GAP_SECONDS = 5.0
# How much of an actor's output is passed on when it dies.
ERROR_BYTES = 4000
# Open files that an actor process costs, and those kept free for everything else.
_FILES_PER_PROCESS = 2
_SPARE_FILES = 64
_GROUPS_FOLDER = 'process_groups'
_LIMITS = {
    errno.EAGAIN: "processes (`ulimit -u`, or a container's limit)",
    errno.EMFILE: 'open files (`ulimit -n`)',
    errno.ENFILE: 'open files (`sysctl fs.file-max`)',
    errno.ENOMEM: 'memory',
}


class ActorError(Exception):
    """Actors died too often; the text includes the last one's error."""


class ActorHost:
    """What all actor processes of this machine share: a temporary folder and a lifeline.

    A context manager. The lifeline is a pipe that closes when this process ends. Leaving the block
    closes it and removes the folder. If this process is killed, the kernel closes the pipe: the
    actors exit, and a shell that waits for this kills what they leave behind and removes the
    folder.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        limits: ActorsConfig = ActorsConfig(),  # noqa: B008 (frozen)
        report: Callable[[str], None] = report_to_stderr,
    ):
        """Makes the folder and the lifeline.

        Args:
          config: settings of the environments; `temp_folder` is replaced.
          limits: when silent processes are reported or given up.
          report: takes a line for each level whose environment takes long to make.
        """
        self._lifeline, self._held_end = os.pipe()
        self._temp_folder = tempfile.mkdtemp(prefix='impala-')
        self._groups_folder = os.path.join(self._temp_folder, _GROUPS_FOLDER)
        os.mkdir(self._groups_folder)
        # The shell ignores the signals that a job scheduler sends to all processes of a run. It
        # removes the folder a second time because an actor may still have been writing.
        clean_up = (
            'trap "" HUP INT TERM; read _; '
            f'for group in "$0"/{_GROUPS_FOLDER}/*; do kill -KILL "-${{group##*/}}"; done; '
            'rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }'
        )
        self._janitor = subprocess.Popen(
            ['/bin/sh', '-c', clean_up, self._temp_folder],
            stdin=self._lifeline,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.config = dataclasses.replace(config, temp_folder=self._temp_folder)
        self.limits = limits
        self._report = report

    def __enter__(self) -> 'ActorHost':
        return self

    def __exit__(self, *unused: Any) -> None:
        os.close(self._held_end)
        os.close(self._lifeline)
        self._janitor.wait()
        # In case the shell was killed.
        shutil.rmtree(self._temp_folder, ignore_errors=True)

    def start(
        self, settings: dict[str, Any], descriptors: Sequence[int], errors: IO[bytes]
    ) -> subprocess.Popen:
        """Starts an actor process in its own session; `end` must end it.

        Args:
          settings: for `impala.acting.actor.main`, without those that all processes share.
          descriptors: file descriptors that it inherits, with unchanged numbers.
          errors: file that receives its output.

        Raises:
          ConfigError: the system permits no more processes or open files; one sentence.
        """
        settings = settings | {
            'lifeline': self._lifeline,
            'process_groups': self._groups_folder,
            'environment': dataclasses.asdict(self.config),
        }
        # Environments already use all cores: more threads in their libraries would only compete.
        threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
        with limits_in_words(), tempfile.TemporaryFile('w+') as settings_file:
            json.dump(settings, settings_file)
            settings_file.seek(0)
            return subprocess.Popen(
                [sys.executable, '-m', 'impala.acting.actor'],
                stdin=settings_file,
                stdout=errors,
                stderr=errors,
                pass_fds=(self._lifeline, *descriptors),
                # Signals of a terminal or job scheduler then reach only this process, and the
                # processes that an environment starts can be ended as a group.
                start_new_session=True,
                # A level may be the user's callable: search for it where this process would.
                env=os.environ
                | threads
                | {'LP_NUM_THREADS': '0', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
            )

    def end(self, process: subprocess.Popen, grace_seconds: float = 0.0) -> int:
        """Ends a process of `start` and everything that its environments have started.

        No other code may wait for the process or poll it: until someone waits, its group id cannot
        be reused.

        Args:
          process: returned by `start`.
          grace_seconds: time it gets to end by itself.

        Returns:
          Its exit code, or minus the signal's number if a signal ended it.
        """
        if grace_seconds:
            with _descriptor(process) as descriptor:
                have_ended([descriptor], grace_seconds)
        self.signal(process, signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self._groups_folder, str(process.pid)))
        return process.wait()

    def signal(self, process: subprocess.Popen, number: int) -> None:
        """Sends a signal to a process and its group, unless `end` has ended it."""
        # After that the system may have reused its group id.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def environment_spec(self, level_name: str, seed: int) -> EnvironmentSpec:
        """Returns the spec of one level; see `common_spec`."""
        return self.common_spec([level_name], seed)

    def common_spec(self, level_names: Sequence[str], seed: int) -> EnvironmentSpec:
        """Returns the spec that all levels share. A process makes each environment to find out.

        Args:
          level_names: at least one; may have duplicates.
          seed: for these environments.

        Raises:
          LevelError: some levels cannot be played, or one agent cannot play them all; names them.
          ActorError: an environment failed or took too long; the text includes its traceback.
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
                f'{", ".join(levels)}: {reason if len(levels) > 1 else errors[levels[0]]}'
                for reason, levels in reasons.items()
            ]
            raise LevelError(
                f'{len(errors)} of the {len(names)} levels cannot be played here. '
                + ' '.join(sentences)
            )
        return shared_spec(
            {name: EnvironmentSpec.from_json(answer['spec']) for name, answer in answers.items()}
        )

    def _describe(self, level_names: list[str], seed: int) -> dict[str, Any]:
        """Returns level name -> its description by `impala.acting.actor`, run in a process."""
        lines: list[bytes] = []
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(tempfile.TemporaryFile())
            pipe = stack.enter_context(contextlib.closing(LinePipe()))
            process = self.start(
                {'level_names': level_names, 'seed': seed, 'spec_pipe': pipe.write_end},
                [pipe.write_end],
                errors,
            )
            try:
                reason = self._read_descriptions(process, pipe, level_names, lines)
            except BaseException:
                self.end(process)
                raise
            code = self.end(process, 0.0 if reason else GRACE_SECONDS)
            if len(lines) < len(level_names):
                reason = reason or f'It {how_ended(code)}.'
                raise ActorError(
                    f'The environment {level_names[len(lines)]} failed. {reason} Its own error:\n'
                    f'{tail(errors) or NOTHING}'
                )
        return dict(zip(level_names, map(json.loads, lines), strict=True))

    def _read_descriptions(
        self,
        process: subprocess.Popen,
        pipe: 'LinePipe',
        level_names: list[str],
        lines: list[bytes],
    ) -> str:
        """Reads one line per level, until all are there, the process ends or the time is up.

        It does not wait for the end of the pipe: a process that an environment starts may keep the
        pipe open.

        Returns:
          A sentence that says why the wait was given up; '' if the process ended or all lines are
          there.
        """
        progress = StartProgress(
            self._report,
            lambda: (
                f'{level_names[len(lines)]} is tried, level {len(lines) + 1} of {len(level_names)}'
            ),
        )
        watch = SilenceWatch(self.limits, LONGEST_GAP_SECONDS)
        has_asked = False
        while len(lines) < len(level_names):
            with _descriptor(process) as descriptor:
                is_over = have_ended([descriptor], WATCH_SECONDS, pipe.read_end)
            if new := pipe.read_lines():
                lines += new
                continue
            if is_over:
                return ''
            progress.look(time.monotonic())
            level = level_names[len(lines)]
            silences = watch.look(time.monotonic(), {0: len(lines)})
            for seconds in silences.due.values():
                self._report(
                    f'The environment {level}, which is tried before the start, has not answered '
                    f'for {since(seconds)}{self.consequence("the run ends")}'
                )
            for seconds in silences.timed_out.values():
                if has_asked:
                    return f'It did not answer for {seconds:.0f} seconds (--actor_timeout).'
                # Makes it print where it hangs, which then serves as the error.
                os.kill(process.pid, STACK_SIGNAL)
                has_asked = True
        return ''

    def consequence(self, what: str) -> str:
        """Returns the end of a sentence about silence: its consequence, '' without a timeout."""
        timeout = self.limits.actor_timeout
        return f': {what} after {timeout:g} s (--actor_timeout)' if timeout else ''


def shared_spec(specs: Mapping[str, EnvironmentSpec]) -> EnvironmentSpec:
    """Returns the spec that all levels share.

    Args:
      specs: level name -> its spec; at least one.

    Raises:
      LevelError: one agent cannot play them all; names those that differ from the first.
    """
    (first, common), *_ = specs.items()
    for what, value_of in (
        ('observations', lambda spec: spec.observation),
        ('actions', lambda spec: spec.action),
        ('frames per action', lambda spec: spec.num_action_repeats),
    ):
        others = [name for name, spec in specs.items() if value_of(spec) != value_of(common)]
        if others:
            raise LevelError(
                f'One agent cannot play levels that differ in their {what}: {first} has '
                f'{_shown(value_of(common))}, but '
                + ', '.join(f'{name} {_shown(value_of(specs[name]))}' for name in others)
                + '.'
            )
    return common


class LinePipe:
    """A pipe from actor processes, read line by line without blocking."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self._unfinished = b''

    def read_lines(self) -> list[bytes]:
        """Returns the complete lines that were written since the last call."""
        text = self._unfinished
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.read_end, 65536):
                text += part
        *lines, self._unfinished = text.split(b'\n')
        return lines

    def close(self) -> None:
        """Closes both ends."""
        os.close(self.read_end)
        os.close(self.write_end)


def require_files(num_processes: int, flag: str, value: int) -> None:
    """Checks that the open files suffice for the actor processes, and raises the limit if needed.

    Args:
      num_processes: actor processes that will start.
      flag: name of the flag that asks for them.
      value: the flag's value.

    Raises:
      ConfigError: they need more open files than this process may have; one sentence.
    """
    taken = len(os.listdir('/proc/self/fd')) + _SPARE_FILES
    needed = taken + _FILES_PER_PROCESS * num_processes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    possible = max(0, hard - taken) // _FILES_PER_PROCESS
    raise ConfigError(
        f'--{flag}={value} needs {needed} open files, and this system permits {hard} '
        f'(`ulimit -n`): raise that, or have no more than {possible} actor processes, by a '
        f'smaller --{flag} or a larger --envs_per_process.'
    )


def have_ended(descriptors: Sequence[int], seconds: float, wake_up: int | None = None) -> bool:
    """Waits until all given processes have ended; returns whether they have.

    Args:
      descriptors: the processes, as returned by `os.pidfd_open`.
      seconds: longest wait.
      wake_up: a descriptor that ends the wait early as soon as it is readable.
    """
    deadline = time.monotonic() + seconds
    poll = select.poll()
    left = set(descriptors)
    for descriptor in left if wake_up is None else left | {wake_up}:
        poll.register(descriptor, select.POLLIN)
    while left:
        ready = dict(poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))))
        for descriptor in left & ready.keys():
            poll.unregister(descriptor)
        left -= ready.keys()
        if not ready or wake_up in ready:
            break
    return not left


@contextlib.contextmanager
def _descriptor(process: subprocess.Popen) -> Iterator[int]:
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def how_ended(code: int) -> str:
    """Returns an exit code in words, for instance 'ended with signal 9'."""
    return f'ended with signal {-code}' if code < 0 else f'ended with exit code {code}'


# Stands for the error where a process printed none.
NOTHING = '(it printed nothing)'


def tail(errors: IO[bytes], num_bytes: int = ERROR_BYTES) -> str:
    """Returns the end of a process's output, at most `num_bytes` of it."""
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - num_bytes))
    return errors.read().decode(errors='replace').strip()


@contextlib.contextmanager
def limits_in_words() -> Iterator[None]:
    """Turns errors about limits of the system, raised in the block, into one sentence.

    Raises:
      ConfigError: instead of the `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _LIMITS:
            raise
        raise ConfigError(
            'Another actor process cannot be started, as the system permits no more '
            f'{_LIMITS[error.errno]}: have fewer, by a smaller --num_actors or a larger '
            '--envs_per_process, or raise the limit.'
        ) from error


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ' and '.join(map(_shown_array, value, value.values()))


def _shown_array(name: str, spec: ArraySpec) -> str:
    text = f'{name} {spec.dtype} {"x".join(map(str, spec.shape))}'
    parts = ', '.join(f'{part.kind} {"+".join(map(str, part.sizes))}' for part in spec.parts)
    return f'{text} ({parts})' if parts else text
