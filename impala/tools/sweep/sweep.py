"""Sweeps: many runs of experiment.py that differ in their hyperparameters.

    python -m impala.tools.sweep configs/sweep_random.json [--logdir=runs/sweep_random]

Random search, and population based training as in Espeholt et al. 2018, Appendix F. Every member is
an ordinary run in a folder of its own, `LOGDIR/members/NAME`. The same command resumes a sweep that
was stopped. Exit codes: 0 done or stopped by a signal, 1 no member could be trained, 2 bad input.
"""

import argparse
import contextlib
import ctypes
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import impala
from impala import exit_codes, suites
from impala.errors import LevelError
from impala.runs.files import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_PREFIX,
    FLAG_FILE,
    LogdirError,
    checkpoint_paths,
    lock_logdir,
    newest_checkpoint,
    read_metrics,
)
from impala.suites import scores
from impala.tools import plot
from impala.tools.sweep import report as sweep_report
from impala.tools.sweep import state as sweep_state
from impala.tools.sweep.config import PBTConfig, SweepConfig, SweepConfigError, flag_text, read
from impala.tools.sweep.state import Member

MEMBERS_FOLDER = 'members'
OUTPUT_FILE = 'output.txt'

_POLL_SECONDS = 0.1
# Between two lines about the members' progress.
_PROGRESS_SECONDS = 30.0
_PREDECESSOR_SECONDS = 60.0
# If this many members are rejected and none has trained, what they have in common is wrong.
_MAX_REFUSED = 10
_PR_SET_PDEATHSIG = 1


class SweepError(Exception):
    """The sweep cannot continue; the text is for the user.

    Attributes:
      exit_code: of the process.
    """

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def evolve(
    fitness: Sequence[float | None],
    failed: Sequence[bool],
    values: Sequence[Mapping[str, Any]],
    is_burning_in: bool,
    config: PBTConfig,
    random: np.random.Generator,
) -> list[tuple[int | None, dict[str, Any]]]:
    """Exploits and explores (Appendix F).

    Each member is compared with another, drawn at random, and copies the other's weights and
    hyperparameters if the other is fitter by more than the margin. Then, in any case, each of its
    hyperparameters is changed with the configured probability: multiplied or divided by the
    factor, with equal chances. A failed member has no usable weights, so it always copies another.

    Args:
      fitness: of every member; None if unknown, which excludes it from comparisons.
      failed: whether each member failed to train; at least one did not.
      values: hyperparameters of every member.
      is_burning_in: whether only failed members change.
      config: of population based training.
      random: source of all decisions.

    Returns:
      For each member the index of the one it copies, None for none, and its new hyperparameters.
    """
    result: list[tuple[int | None, dict[str, Any]]] = []
    for index, own in enumerate(fitness):
        others = [i for i in range(len(fitness)) if i != index and not failed[i]]
        source = None
        if others and (failed[index] or not is_burning_in):
            drawn = others[random.integers(len(others))]
            other = fitness[drawn]
            is_better = own is not None and other is not None and other > own + config.margin
            if failed[index] or is_better:
                source = drawn
        new = dict(values[index if source is None else source])
        if failed[index] or not is_burning_in:
            for name in new:
                if random.random() < config.perturb_probability:
                    up = random.random() < 0.5
                    new[name] *= config.perturb_factor if up else 1 / config.perturb_factor
        result.append((source, new))
    return result


def fitness_of(run: plot.Run, after_frames: int, last_episodes: int) -> float | None:
    """Returns the fitness of a run, a mean over its levels.

    Args:
      run: of a member.
      after_frames: episodes that ended earlier do not count: other weights may have played them.
      last_episodes: number of episodes, the last of each level, that count.

    Returns:
      For a suite with known scores, the mean human-normalized score in percent, each level capped
      at 100 (Appendix F); else the mean return. None if a level has no episode.

    Raises:
      LevelError: the run's suite cannot be read.
      LogdirError: its flag file does not say what was played.
    """
    returns = {
        level: rows[rows[:, 0] > after_frames][-last_episodes:, 3].tolist()
        for level, rows in run.episodes.items()
    }
    if 'level_name' not in run.flags:
        raise LogdirError(f'{os.path.join(run.logdir, FLAG_FILE)} is damaged: no --level_name.')
    suite = suites.load(run.flags['level_name'])
    if any(not returns.get(name) for name in suite.level_names):
        return None
    if len(suite.levels) > 1 and suite.has_scores:
        return scores.suite_score(returns, suite.levels).mean_cap_100
    return float(np.mean([np.mean(returns[name]) for name in suite.level_names]))


def copy_checkpoint(source: str, target: str) -> None:
    """Copies a checkpoint to another path; an interrupted copy may be repeated.

    Args:
      source: path without file extension.
      target: see `source`; its folder is made if missing.

    Raises:
      OSError: it cannot be read or written.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    files = glob.glob(f'{glob.escape(source)}.data-*')
    # The index comes last: a checkpoint without it does not count.
    for path in [*files, f'{source}.index']:
        final = target + path.removeprefix(source)
        shutil.copyfile(path, f'{final}.tmp')
        os.replace(f'{final}.tmp', final)


class Sweep:
    """Runs a sweep and keeps its files up to date."""

    def __init__(
        self,
        config: SweepConfig,
        logdir: str,
        report: Callable[[str], Any],
        stop_requests: Callable[[], int],
    ):
        """Resumes the sweep in a folder, or starts one there.

        Args:
          config: of the sweep.
          logdir: folder of the sweep; locked by the caller.
          report: takes a line for the user.
          stop_requests: returns how many signals have asked to stop.

        Raises:
          LogdirError: the folder holds another sweep, or cannot be read or written.
        """
        self._config = config
        self._logdir = os.path.abspath(logdir)
        self._report = report
        self._stop_requests = stop_requests
        self._refused = 0  # Members whose flags were rejected.
        self.state = sweep_state.load(self._logdir, config)

    def run(self) -> bool:
        """Trains all members; returns True when done, False if stopped.

        Raises:
          SweepError: no member can be trained.
          LogdirError: a file cannot be read or written.
          LevelError: a level or suite is not known.
        """
        self._finish_copies()
        for member in self.state.members:
            # A failure may have been the machine's fault.
            member.error = ''
        self._save()
        while True:
            if not self._train_round():
                return False
            self._end_round()
            if self.state.round == self._config.rounds:
                return True

    @property
    def num_trained(self) -> int:
        """Number of members that have finished all rounds."""
        if self.state.round < self._config.rounds - 1:
            return 0
        return sum(member.trained for member in self.state.members)

    def _save(self) -> None:
        self.state.save(self._logdir)
        sweep_report.write_tables(self._logdir, self.state)

    def member_logdir(self, member: Member) -> str:
        """Returns the folder of a member's run."""
        return os.path.join(self._logdir, MEMBERS_FOLDER, member.name)

    def _train_round(self) -> bool:
        """Trains every member to the end of the round; returns False if stopped."""
        waiting = [m for m in self.state.members if not m.trained and not m.error]
        running: list[_Process] = []
        last_report = time.monotonic()
        try:
            while waiting or running:
                if self._stop_requests():
                    return False
                while waiting and len(running) < self._config.parallel:
                    running.append(self._start(waiting.pop(0)))
                time.sleep(_POLL_SECONDS)
                for process in [p for p in running if p.exit_code is not None]:
                    running.remove(process)
                    self._take_in(process)
                if running and time.monotonic() - last_report >= _PROGRESS_SECONDS:
                    last_report = time.monotonic()
                    self._report(self._progress_text([each.member for each in running]))
        finally:
            self._stop(running)
        return True

    def _start(self, member: Member) -> '_Process':
        config, index = self._config, self.state.members.index(member)
        logdir = self.member_logdir(member)
        given = {'seed': config.seed + index, **config.flags, **member.values}
        # The flag file comes first, so that the other flags override it.
        flags = [flag_text(name, given.pop(name)) for name in ('flagfile',) if name in given]
        flags += [flag_text(name, value) for name, value in given.items()]
        flags.append(flag_text('logdir', logdir))
        if config.pbt is not None:
            flags.append(flag_text('stop_at_frames', config.round_end(self.state.round)))
        self._report(f'{member.name}: {self._round_text}trains with {_values_text(member.values)}')
        return _Process(member, logdir, flags)

    @property
    def _round_text(self) -> str:
        if self._config.pbt is None:
            return ''
        return f'round {self.state.round + 1} of {self._config.rounds}, '

    def _progress_text(self, running: Sequence[Member]) -> str:
        """Returns how many members are done, and the progress of those that are training."""
        end = self._config.round_end(self.state.round)
        parts = []
        for member in running:
            frames = 0
            with contextlib.suppress(OSError, LogdirError):
                lines = read_metrics(self.member_logdir(member))
                frames = int(lines[-1].get('frames', 0)) if lines else 0
            parts.append(f'{member.name} is at {frames / end:.0%} of {end:,} frames')
        done = sum(member.trained for member in self.state.members)
        return (
            f'{self._round_text}{done} of {len(self.state.members)} members done: '
            f'{", ".join(parts)}'
        )

    def _take_in(self, process: '_Process') -> None:
        """Records the outcome of a member whose process has ended."""
        member = process.member
        end = self._config.round_end(self.state.round)
        run = self._note_frames(member)
        if process.exit_code == exit_codes.BAD_INPUT:
            member.error = f'was refused: {(process.said().splitlines() or [""])[-1]}'
            self._refused += 1
        elif run is None or process.exit_code != 0:
            said = process.said().splitlines()
            reason = f': {said[-1]}' if said else ''
            member.error = f'ended with exit code {process.exit_code}{reason}'
        elif member.frames < end:
            member.error = 'was stopped'
        else:
            # Weights may have come from another member at the end of the last round.
            before = [row for row in self.state.history if row['round'] == self.state.round - 1]
            start = max((row['frames'] for row in before), default=0)
            member.fitness = fitness_of(run, start, self._config.fitness_episodes)
            member.episodes = sum(map(len, run.episodes.values()))
            member.trained = True
        if member.error:
            member.fitness = None
            self._report(f'{member.name}: {member.error} (see {process.output_path})')
        else:
            fitness = 'no episode' if member.fitness is None else f'{member.fitness:.4g}'
            self._report(f'{member.name}: {member.frames:,} frames, fitness {fitness}')
        self._save()
        if self._refused == min(_MAX_REFUSED, len(self.state.members)) and not any(
            each.frames for each in self.state.members
        ):
            raise SweepError(f'{member.name} {member.error}', exit_codes.BAD_INPUT)
        if self._config.pbt is None:
            self._draw()

    def _note_frames(self, member: Member) -> plot.Run | None:
        run = self._read_run(member)
        member.frames = int(run.metrics[-1].get('frames', 0)) if run and run.metrics else 0
        return run

    def _read_run(self, member: Member) -> plot.Run | None:
        logdir = self.member_logdir(member)
        if not os.path.exists(os.path.join(logdir, FLAG_FILE)):
            return None
        with contextlib.suppress(LogdirError):
            return plot.read_run(logdir)
        return None

    def _stop(self, processes: Sequence['_Process']) -> None:
        """Ends processes as Ctrl-C does, so that they save checkpoints."""
        for process in processes:
            process.send(signal.SIGINT)
        requests = self._stop_requests()
        for process in processes:
            while process.exit_code is None:
                if self._stop_requests() > requests:
                    process.send(signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
            self._note_frames(process.member)
        if processes:
            self._save()

    def _end_round(self) -> None:
        """Compares the members and prepares the next round, in one change of the state file."""
        state, config = self.state, self._config
        if all(member.error for member in state.members):
            raise SweepError(
                f'None of the {len(state.members)} members could be trained; the first one '
                f'{state.members[0].error}',
                1,
            )
        is_last = state.round == config.rounds - 1
        decisions: list[tuple[int | None, dict[str, Any]]]
        decisions = [(None, member.values) for member in state.members]
        if config.pbt is not None and not is_last:
            decisions = evolve(
                [member.fitness for member in state.members],
                [bool(member.error) for member in state.members],
                [member.values for member in state.members],
                config.round_end(state.round) < config.pbt.burn_in_frames,
                config.pbt,
                np.random.default_rng([config.seed, 1, state.round]),
            )
        for member, (source, _) in zip(state.members, decisions, strict=True):
            copied_from = None if source is None else state.members[source]
            state.history.append(
                {
                    'round': state.round,
                    'member': member.name,
                    'frames': member.frames,
                    'fitness': member.fitness,
                    'error': member.error,
                    'copied_from': copied_from.name if copied_from else None,
                    'values': member.values,
                }
            )
            if copied_from:
                state.copies[self._next_checkpoint(member)] = self._last_checkpoint(copied_from)
                self._report(f'{member.name}: takes over {copied_from.name}')
        state.round += 1
        if not is_last:
            for member, (_, values) in zip(state.members, decisions, strict=True):
                member.values = values
                member.trained, member.error = False, ''
        self._save()
        self._finish_copies()
        if config.pbt is not None:
            self._draw()

    def _last_checkpoint(self, member: Member) -> str:
        path = newest_checkpoint(self.member_logdir(member))
        if path is None:
            raise LogdirError(f'{self.member_logdir(member)} has lost its checkpoints.')
        return path

    def _next_checkpoint(self, member: Member) -> str:
        logdir = self.member_logdir(member)
        paths = checkpoint_paths(logdir)
        number = int(paths[-1].rpartition('-')[2]) if paths else 0
        return os.path.join(logdir, CHECKPOINT_FOLDER, f'{CHECKPOINT_PREFIX}-{number + 1}')

    def _finish_copies(self) -> None:
        """Makes the copies that are listed in the state.

        No member runs meanwhile, and each copy gets a new number, so nothing that is still to be
        copied is overwritten.
        """
        for target, source in self.state.copies.items():
            try:
                copy_checkpoint(source, target)
            except OSError as error:
                raise LogdirError(f'Cannot copy {source} to {target}: {error.strerror}.') from error
        if self.state.copies:
            self.state.copies = {}
            self._save()

    def _draw(self) -> None:
        runs = {member.name: self._read_run(member) for member in self.state.members}
        sweep_report.draw(self._logdir, self.state, self._config, runs)


def _program() -> str:
    """Returns the path of experiment.py, which stands next to this package."""
    return os.path.join(os.path.dirname(os.path.dirname(impala.__file__)), 'experiment.py')


class _Process:
    """A member's process, in a session of its own; it gets SIGTERM if the sweep dies."""

    def __init__(self, member: Member, logdir: str, flags: Sequence[str]):
        self.member = member
        _wait_for_predecessor(logdir)
        self.output_path = os.path.join(logdir, OUTPUT_FILE)
        library, parent = ctypes.CDLL(None), os.getpid()

        def prepare() -> None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with open(self.output_path, 'ab') as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, _program(), *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is for the sweep, which passes it on.
                start_new_session=True,
                # The sweep has no threads, so that this is safe.
                preexec_fn=prepare,
            )

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def said(self) -> str:
        """Returns what it has printed so far."""
        with open(self.output_path, 'rb') as file:
            file.seek(self._start)
            return file.read().decode(errors='replace').strip()

    def send(self, number: int) -> None:
        if self.exit_code is None:
            self._process.send_signal(number)


def _wait_for_predecessor(logdir: str) -> None:
    """Waits for the member's process of a sweep that was killed; it may still be saving."""
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    while time.monotonic() < deadline:
        try:
            os.close(lock_logdir(logdir))
            return
        except LogdirError:
            time.sleep(_POLL_SECONDS)


def _values_text(values: Mapping[str, Any]) -> str:
    return ', '.join(
        f'{name} {value:.3g}' if isinstance(value, float) else f'{name} {value}'
        for name, value in values.items()
    )


@contextlib.contextmanager
def _counted_signals() -> Iterator[Callable[[], int]]:
    """Counts signals that ask to stop instead of acting on them."""
    received: list[float] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    # `nohup` ignores SIGHUP so that what it starts outlives its terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def note(number: int, frame: Any) -> None:
        # The same signal may be sent to a process and to its group.
        if not received or time.monotonic() - received[-1] >= 1:
            received.append(time.monotonic())

    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: len(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Runs the sweep of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m impala.tools.sweep',
        description='Searches hyperparameters, or resumes a search that was stopped.',
    )
    parser.add_argument('config', metavar='SWEEP.json', help='what to search; see configs/')
    parser.add_argument('--logdir', help='folder of the sweep; runs/SWEEP by default')
    arguments = parser.parse_args(argv)
    stem = os.path.splitext(os.path.basename(arguments.config))[0]
    logdir = os.path.expanduser(arguments.logdir or os.path.join('runs', stem))

    def report(text: str) -> None:
        print(text, flush=True)

    try:
        config = read(arguments.config)
        lock = lock_logdir(logdir)
        try:
            with _counted_signals() as stop_requests:
                sweep = Sweep(config, logdir, report, stop_requests)
                complete = sweep.state.round == config.rounds or sweep.run()
        finally:
            os.close(lock)
    except (SweepConfigError, LogdirError, LevelError) as error:
        print(error, file=sys.stderr)
        return exit_codes.BAD_INPUT
    except SweepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(sweep_report.table(sweep.state))
    if complete:
        print(f'Written to {logdir}')
    else:
        print(
            f'Stopped; {sweep.num_trained} of {config.members} members are complete, and what the '
            'others have learned is saved. The same command resumes from there.'
        )
    return 0
