"""Starts the actor processes, restarts those that die, and ends them all."""

import contextlib
import dataclasses
import fcntl
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import IO, Any, Protocol

from dynamic_batching.activity import Activity, ActorState
from impala.acting import actor_processes
from impala.acting.actor import BAD_INPUT_EXIT_CODE, STACK_SIGNAL, sentence_of
from impala.acting.actor_processes import ActorError, ActorHost, LinePipe
from impala.acting.crash_log import CrashLog
from impala.acting.episode_series import Episodes, Schedule
from impala.acting.silence import SilenceWatch, since
from impala.config import ConfigError
from impala.errors import LevelError
from impala.runs.start_progress import StartProgress
from impala.seeds import derived_seed

# An actor's output is cut when it grows beyond this.
MAX_PRINTED_BYTES = 1_000_000
# How much of the output is searched for a sentence, which may be longer than the tail shown.
_SENTENCE_BYTES = 100_000


class UnrollsLostError(Exception):
    """Actors kept dying, and most of their unrolls were lost; the text is one sentence.

    Attributes:
      checkpoint: path of the last checkpoint, None if there is none.
    """

    checkpoint: str | None = None


class Batcher(Protocol):
    """What actors connect to: `UnrollBatcher`, or what passes their rows on to another machine."""

    def segment_of(self, actor: int) -> tuple[int, int]:
        """Returns the file descriptor of an actor's segment, and the actor's index in it."""

    def activity(self) -> Activity:
        """Returns the present activity of all actors."""

    def completed_unrolls(self) -> list[int]:
        """Returns, for each actor, the full unrolls since its last reset."""

    def reset_actor(self, actor: int) -> None:
        """Forgets what an actor has begun, whose process must have ended."""

    def close(self) -> None:
        """Ends all actors' waits for actions."""


@dataclasses.dataclass
class _ActorProcess:
    actors: Sequence[int]
    process: subprocess.Popen
    errors: IO[bytes]
    descriptor: int  # Readable when the process has ended.
    num_episodes: int  # Given to it at its start.
    restarts_in_a_row: int = 0
    is_up: bool = False  # All its environments have been made and reset.
    silent_seconds: float = 0.0  # Length of its silence when it was given up.


class ActorPool:
    """Keeps the actor processes of a batcher alive. A context manager."""

    def __init__(
        self,
        actor_host: ActorHost,
        batcher: Batcher,
        level_names: Sequence[str],
        seed: int,
        max_restarts: int,
        report: Callable[[str], None],
        envs_per_process: int = 1,
        schedule: Schedule | None = None,
    ):
        """Prepares; processes start when the block is entered.

        Args:
          actor_host: starts the processes.
          batcher: the actors connect to it; closed when the pool gives up or ends.
          level_names: the level of each actor.
          seed: of the run; every actor and every restart derives its own seed from it.
          max_restarts: consecutive restarts of a process before the pool gives up. A full unroll,
            or with a schedule an episode, resets the count.
          report: takes a few lines for every process that died, and each warning of an environment
            once.
          envs_per_process: consecutive actors that share a process; they die together.
          schedule: the episodes to play; receives their results on another thread. None: actors
            play until the batcher is closed.
        """
        self._actor_host = actor_host
        self._batcher = batcher
        self._level_names = level_names
        self._seed = seed
        self._max_restarts = max_restarts
        self._report = report
        self._schedule = schedule
        self._failure: Exception | None = None
        self._crashes = CrashLog()
        self._silence = SilenceWatch(actor_host.limits, actor_processes.LONGEST_GAP_SECONDS)
        self._start_progress: StartProgress | None = None
        self._looked_at = 0.0
        self._unrolls_completed, self._unrolls_lost = 0, 0  # By processes that have died.
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._results = LinePipe()
        self._warnings = LinePipe()
        # An actor must not block on a pool that no longer reads.
        os.set_blocking(self._warnings.write_end, False)
        self._reported_warnings: set[bytes] = set()
        actors = range(len(level_names))
        self._groups = [
            actors[first : first + envs_per_process]
            for first in range(0, len(actors), envs_per_process)
        ]
        self._processes: dict[int, _ActorProcess] = {}
        self._num_done = 0
        self._supervisor = threading.Thread(target=self._supervise, name='actor pool', daemon=True)
        self.restarts = 0

    def __enter__(self) -> 'ActorPool':
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._selector.register(
            self._warnings.read_end, selectors.EVENT_READ, self._pass_warnings_on
        )
        self._selector.register(self._results.read_end, selectors.EVENT_READ, self._record_results)
        self._start_progress = StartProgress(
            self._report,
            lambda: f'{self._num_up()} of {len(self._groups)} actor processes are up',
        )
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
        summary = self._crashes.summary()
        if summary is not None and self._failure is None:
            self._report(summary)

    @property
    def process_ids(self) -> list[int]:
        """Ids of the actor processes, in order; one that is being replaced is left out."""
        # One atomic copy: the supervisor may be replacing a process.
        processes = self._processes.copy()
        return [processes[index].process.pid for index in sorted(processes)]

    def check(self) -> None:
        """Raises the error that made the pool give up, if any.

        Raises:
          LevelError: an environment cannot be played with these settings.
          ConfigError: the system permits no more processes.
          ActorError: an actor died more than `max_restarts` times in a row.
        """
        if self._failure is not None:
            raise self._failure

    def check_losses(self) -> None:
        """Raises an error if most unrolls were lost.

        An unroll is lost if its actor's process died before it was full.

        Raises:
          UnrollsLostError: processes died more than once, and more unrolls were lost than
            completed.
        """
        completed = self._unrolls_completed + sum(self._batcher.completed_unrolls())
        if self.restarts > 1 and completed < self._unrolls_lost:
            raise UnrollsLostError(
                f'Actors kept dying: {completed:,} unrolls were completed, and '
                f'{self._unrolls_lost:,} were lost when the processes that played them died '
                f'({self.restarts:,} times).'
            )

    def _start(self, index: int, restarts_in_a_row: int) -> None:
        actors = self._groups[index]
        segments = [self._batcher.segment_of(actor) for actor in actors]
        settings: dict[str, Any] = {
            'level_names': [self._level_names[actor] for actor in actors],
            'segments': [descriptor for descriptor, _ in segments],
            'actors': [position for _, position in segments],
            'warnings': self._warnings.write_end,
        }
        descriptors = [*{*settings['segments']}, self._warnings.write_end]
        episodes = self._episodes(index)
        if self._schedule is None:
            # The same seed might lead to the same crash.
            settings['seeds'] = [derived_seed(self._seed, self.restarts, actor) for actor in actors]
        else:
            settings |= {
                'episodes': [each.to_json() for each in episodes],
                'results': self._results.write_end,
                'series': self._schedule.series_settings,
            }
            descriptors.append(self._results.write_end)
        with actor_processes.limits_in_words(), contextlib.ExitStack() as stack:
            errors = stack.enter_context(tempfile.TemporaryFile())
            # After a cut, the process continues at the new end of the file.
            fcntl.fcntl(errors, fcntl.F_SETFL, fcntl.fcntl(errors, fcntl.F_GETFL) | os.O_APPEND)
            process = self._actor_host.start(settings, descriptors, errors)
            stack.callback(self._actor_host.end, process)
            descriptor = os.pidfd_open(process.pid)
            self._processes[index] = _ActorProcess(
                actors, process, errors, descriptor, sum(map(len, episodes)), restarts_in_a_row
            )
            stack.pop_all()  # `_forget` closes them from here on.
        self._selector.register(descriptor, selectors.EVENT_READ, index)

    def _episodes(self, index: int) -> list[Episodes]:
        """Returns the unfinished episodes of each actor of a process; empty without a schedule."""
        if self._schedule is None:
            return []
        return [self._schedule.episodes_of(actor) for actor in self._groups[index]]

    def _supervise(self) -> None:
        try:
            for index in range(len(self._groups)):
                if self._batcher.activity().closed:
                    break
                self._start(index, restarts_in_a_row=0)
                if not self._attend(0.0):
                    return
            while self._attend(actor_processes.WATCH_SECONDS):
                pass
        except Exception as error:  # `check` raises it in the training loop.
            self._failure = error
            self._batcher.close()

    def _attend(self, seconds: float) -> bool:
        """Waits for events and handles them; returns False when the pool must end."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                return False
            if callable(key.data):
                key.data()
            else:
                self._replace(key.data)
        now = time.monotonic()
        if now - self._looked_at >= actor_processes.WATCH_SECONDS:
            self._looked_at = now
            self._cut_output()
            self._watch(now)
        return True

    def _cut_output(self) -> None:
        for each in self._processes.values():
            if os.fstat(each.errors.fileno()).st_size > MAX_PRINTED_BYTES:
                end = actor_processes.tail(each.errors).encode()
                os.ftruncate(each.errors.fileno(), 0)
                os.write(each.errors.fileno(), end + b'\n')

    def _watch(self, now: float) -> None:
        """Reports processes that show no sign of life, and kills them after the timeout."""
        activity = self._batcher.activity()
        if activity.closed:
            return
        signs: dict[int, Hashable] = {}
        for index, each in self._processes.items():
            states = [activity.states[actor] for actor in each.actors]
            each.is_up = each.is_up or ActorState.IDLE not in states
            # A sleeping actor waits for the policy or the learner, which may take any time. The
            # process sleeps for one of its actors; others may already have their answers.
            is_waiting = ActorState.SLEEPING in states
            progress = [activity.progress[actor] for actor in each.actors]
            signs[index] = None if is_waiting else (each.process.pid, *states, *progress)
        if self._start_progress is not None:
            if self._num_up() == len(self._groups):
                if self._start_progress.has_reported:
                    self._start_progress.report()
                self._start_progress = None
            else:
                self._start_progress.look(now)
        silences = self._silence.look(now, signs)
        if silences.due:
            self._report(self._silence_report(silences.due, activity))
        for index, seconds in silences.back.items():
            who = self._actor_names(self._processes[index].actors)
            self._report(f'A sign of life after {seconds:.0f} s of silence, of {who}')
        for index, seconds in silences.timed_out.items():
            each = self._processes[index]
            if each.silent_seconds:
                self._actor_host.signal(each.process, signal.SIGKILL)
            else:
                # Makes it print where it hangs, which then serves as the error. Next time it is
                # killed.
                os.kill(each.process.pid, STACK_SIGNAL)
            each.silent_seconds = seconds
        for index, each in self._processes.items():
            if index not in silences.timed_out:
                each.silent_seconds = 0.0

    def _num_up(self) -> int:
        # Processes that have played all their episodes count, too.
        return self._num_done + sum(each.is_up for each in self._processes.values())

    def _silence_report(self, silent: dict[int, float], activity: Activity) -> str:
        actors: list[int] = []
        for index in silent:
            group = self._processes[index].actors
            # Only one environment of a process runs at a time, unless none has started.
            for state in (ActorState.ACTING, ActorState.IDLE, ActorState.ANSWERED):
                if those := [actor for actor in group if activity.states[actor] == state]:
                    actors += those
                    break
        return (
            f'No sign of life for {since(max(silent.values()))}, of the environment of '
            f'{self._actor_names(actors)}'
            + self._actor_host.consequence('its process is killed and restarted')
        )

    def _pass_warnings_on(self) -> None:
        for line in self._warnings.read_lines():
            # All actors tend to give the same warnings.
            if line not in self._reported_warnings:
                self._reported_warnings.add(line)
                self._report(f'WARNING: {line.decode(errors="replace")}')

    def _record_results(self) -> None:
        for line in self._results.read_lines():
            assert self._schedule is not None  # Otherwise no actor writes results.
            self._schedule.record(*json.loads(line))

    def _replace(self, index: int) -> None:
        ended = self._processes[index]
        code = self._actor_host.end(ended.process)
        # Results that it wrote before it ended count.
        self._record_results()
        num_episodes = sum(map(len, self._episodes(index)))
        is_over = self._batcher.activity().closed
        # The pool is about to close, or this process has played all its episodes.
        if is_over or (self._schedule is not None and num_episodes == 0):
            self._forget(index)
            self._num_done += 1
            return
        # The environment may use the same exit code: require the sentence, too.
        sentence = sentence_of(actor_processes.tail(ended.errors, _SENTENCE_BYTES))
        if code == BAD_INPUT_EXIT_CODE and sentence is not None:
            raise LevelError(sentence)
        text = sentence or actor_processes.tail(ended.errors)
        completed = self._batcher.completed_unrolls()
        num_completed = sum(completed[actor] for actor in ended.actors)
        if self._schedule is None:
            has_worked = num_completed > 0
        else:
            # Full unrolls prove nothing: an unfinished episode is played again from its start.
            has_worked = num_episodes < ended.num_episodes
        in_a_row = 1 if has_worked else ended.restarts_in_a_row + 1
        how = actor_processes.how_ended(code)
        if ended.silent_seconds:
            how = f'was silent for {ended.silent_seconds:.0f} s (--actor_timeout), was killed'
        who = self._actor_names(ended.actors)
        who = who[0].upper() + who[1:]
        if in_a_row > self._max_restarts:
            raise ActorError(
                f'{who} {how}, though restarted {self._max_restarts} times in a row before. The '
                f'error:\n{text or actor_processes.NOTHING}'
            )
        shown = self._crashes.take(who, how, text)
        if shown is not None:
            self._report(shown)
        self._forget(index)
        self.restarts += 1
        self._unrolls_completed += num_completed
        self._unrolls_lost += len(ended.actors)
        for actor in ended.actors:
            self._batcher.reset_actor(actor)
        try:
            self._start(index, in_a_row)
        except ConfigError as error:  # The settings worked so far, so they are not at fault.
            raise ActorError(str(error)) from error

    def _forget(self, index: int) -> None:
        ended = self._processes.pop(index)
        self._silence.forget(index)
        with contextlib.suppress(KeyError):
            self._selector.unregister(ended.descriptor)
        os.close(ended.descriptor)
        ended.errors.close()

    def _end_processes(self) -> None:
        states = self._batcher.activity().states
        for each in self._processes.values():
            # It would notice the end only after its environments are made.
            if all(states[actor] == ActorState.IDLE for actor in each.actors):
                self._actor_host.signal(each.process, signal.SIGTERM)
        actor_processes.have_ended(
            [each.descriptor for each in self._processes.values()], actor_processes.GRACE_SECONDS
        )
        for each in self._processes.values():
            self._actor_host.signal(each.process, signal.SIGKILL)
        for index, each in list(self._processes.items()):
            self._actor_host.end(each.process)
            self._forget(index)

    def _actor_names(self, actors: Sequence[int]) -> str:
        """Returns actors with their levels: 'actors 0-3, 7 (Pong), 4 (Breakout)'."""
        numbers: dict[str, list[int]] = {}
        for actor in sorted(actors):
            numbers.setdefault(self._level_names[actor], []).append(actor)
        parts = [f'{_ranges(those)} ({level})' for level, those in numbers.items()]
        return f'actor{"" if len(actors) == 1 else "s"} {", ".join(parts)}'


def _ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as text: '0-3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ', '.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)
