"""The log of a training run: `metrics.jsonl`, `episodes.csv`, TensorBoard, the terminal.

Counters are totals of the whole run, over all resumptions; `wall_seconds` is time spent training,
not calendar time. A killed run resumes from its last checkpoint, so rows written after that
checkpoint describe lost weights. They are then moved to `metrics.dropped.jsonl` and
`episodes.dropped.csv`, and the learning curve shows only weights that survived.

A full disk does not end a run: rows that cannot be written are kept and tried again.
"""

import csv
import gc
import io
import json
import math
import operator
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from impala.runs import learning_curve
from impala.runs.console import Console
from impala.runs.files import (
    EPISODES_FILE,
    EPISODES_HEADER,
    METRICS_FILE,
    LogdirError,
    parse_episode,
    parse_metrics,
    read_rows,
    write_atomically,
)
from impala.runs.interval import Interval
from impala.runs.log import Log, TestResult
from impala.runs.row_file import RowFile, keep_rows
from impala.runs.summaries import Summaries, encode_png
from impala.suites import Suite
from impala.trajectory import EpisodeEnd

CURVE_FILE = 'learning_curve.png'
SUMMARIES_FOLDER = 'summaries'

# Seconds of this start before the curve is drawn, and between drawings.
_FIRST_CURVE_SECS = 10.0
_CURVE_SECS = 300.0
_PICTURE_SECS = 60.0
_TEST_RETURN, _TEST_COUNTER = 'test_return/', 'test/'
_TEST_COUNTERS = ('frames', 'agent_steps', 'wall_seconds')
_ENDED_BY = {EpisodeEnd.TERMINATED: 'terminated', EpisodeEnd.TRUNCATED: 'truncated'}


class Counters(NamedTuple):
    """The progress of a run, over all resumptions.

    Attributes:
      frames: trained on.
      agent_steps: trained on.
      updates: of the learner.
      wall_seconds: seconds of training.
    """

    frames: int = 0
    agent_steps: int = 0
    updates: int = 0
    wall_seconds: float = 0.0


START = Counters()


class RunLog(Log):
    """Collects the events of a run and writes a line every `log_secs`.

    A context manager: leaving it writes the last line and draws the curve. Used by one thread.
    """

    def __init__(
        self,
        logdir: str,
        suite: Suite,
        num_action_repeats: int,
        total_frames: int,
        log_secs: float = 10.0,
        *,
        begin: Counters = START,
        stream: TextIO | None = None,
        shows_bar: bool = True,
        on_line: Callable[[Mapping[str, float]], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the files in `logdir`, and continues them if they exist.

        Args:
          logdir: the log directory; created if missing.
          suite: the levels, in the order of their ids; lines include its scores if it has a name
            and reference scores.
          num_action_repeats: frames per agent step.
          total_frames: frames at which the run ends.
          log_secs: seconds between lines.
          begin: counters of the checkpoint from which the run resumes; later rows are moved away.
          stream: shows progress, as a bar on a terminal, else in plain lines; None for stderr.
          shows_bar: whether a terminal has a bar; a debugger's prompt would stand next to it.
          on_line: called with the numbers of each line, also of the last one, when it is written.
          clock: returns seconds.

        Raises:
          LogdirError: the directory or files in it cannot be written or read.
        """
        self._logdir = logdir
        self._level_names = suite.level_names
        self._log_secs = log_secs
        self._on_line = on_line
        self._clock = clock
        self._curves = {name: learning_curve.LearningCurve() for name in self._level_names}
        self._all_levels = learning_curve.LearningCurve()
        self._tests: learning_curve.Tests = {}
        # Some suites test other levels than they train on.
        self._trained_level = dict(
            zip(suite.for_testing().level_names, suite.level_names, strict=True)
        )
        self._console = Console(
            sys.stderr if stream is None else stream,
            begin.frames,
            total_frames,
            num_action_repeats,
            shows_bar,
        )
        self._frames, self._agent_steps, self._updates, wall_seconds = begin
        self._interval = Interval(suite, num_action_repeats)
        self._episodes: list[tuple[str, float, int, str]] = []
        self._actors: dict[int, list[Mapping[str, Any]]] = {}
        self._pictures: dict[str, tuple[int, int, bytes]] = {}
        try:
            os.makedirs(logdir, exist_ok=True)
            last_wall_seconds = self._read_back(begin.agent_steps)
            self._metrics_file = RowFile(self._path(METRICS_FILE))
            self._episodes_file = RowFile(self._path(EPISODES_FILE))
        except OSError as error:
            self._console.close()
            raise LogdirError(f'Cannot use the logs in {logdir}: {error.strerror}.') from error
        if not self._episodes_file.size:
            self._append(self._episodes_file, _csv_text([EPISODES_HEADER]))
        self._summaries = Summaries(self._path(SUMMARIES_FOLDER))
        self._wall_seconds_before = max(wall_seconds, last_wall_seconds)
        self._started = clock()
        self._interval.begin(self._wall_seconds_before, begin.frames, begin.agent_steps)
        self._next_curve_seconds = self._wall_seconds_before + _FIRST_CURVE_SECS
        self._picture_wall_seconds = -math.inf
        self._closed = False

    def __enter__(self) -> 'RunLog':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def wall_seconds(self) -> float:
        """Seconds spent training so far, over all resumptions."""
        return self._wall_seconds_before + self._clock() - self._started

    @property
    def mean_return(self) -> float:
        """Mean return of the last 100 episodes over all levels; NaN before the first."""
        return self._all_levels.mean

    def record_update(self, metrics: Mapping[str, Any]) -> None:
        """See `Log`; values that are not finite are left out and counted."""
        self._interval.add_update(metrics)

    def record_episodes(
        self, level_ids: np.ndarray, returns: np.ndarray, frames: np.ndarray, ends: np.ndarray
    ) -> None:
        """See `Log`; the next `maybe_write` writes the episodes."""
        ends = np.asarray(ends)
        is_end = (ends == EpisodeEnd.TERMINATED) | (ends == EpisodeEnd.TRUNCATED)
        if not is_end.any():
            return
        columns = np.broadcast_arrays(level_ids, returns, frames, ends, is_end)
        chosen = [column[columns[-1]] for column in columns[:-1]]
        for level_id, episode_return, length, end in zip(*chosen, strict=True):
            # float(str(x)) is the shortest decimal of a float32; float(x) shows its binary tail.
            self._episodes.append(
                (
                    self._level_names[level_id],
                    float(str(episode_return)),
                    int(length),
                    _ENDED_BY[EpisodeEnd(int(end))],
                )
            )

    def record_agent_steps(self, level_ids: np.ndarray, steps: int) -> None:
        """See `Log`."""
        self._interval.add_agent_steps(level_ids, steps)

    def record_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """See `Log`; each line has the seconds since the line before."""
        self._interval.set_stage_seconds(seconds)

    def record_actor_restart(self, count: int = 1) -> None:
        """Counts actors that died and were restarted."""
        self._interval.add_actor_restarts(count)

    def record_discarded_unrolls(self, count: int) -> None:
        """Counts unrolls that were discarded for values that are not finite."""
        self._interval.add_discarded_unrolls(count)
        self._console.unrolls_discarded += count

    def record_actors(self, rows: Sequence[Mapping[str, Any]], learner: int = 0) -> None:
        """See `Log`; lines have the latest state as `actors`."""
        self._actors[learner] = list(rows)

    @property
    def line_is_due(self) -> bool:
        """Whether the next `maybe_write` will write a line."""
        return self.wall_seconds - self._interval.wall_seconds >= self._log_secs

    @property
    def picture_is_due(self) -> bool:
        """Whether the next line may have a picture; at most one line per minute does."""
        return self.line_is_due and self.wall_seconds - self._picture_wall_seconds >= _PICTURE_SECS

    def record_picture(self, name: str, pixels: np.ndarray) -> None:
        """See `Log`; writes the file NAME.png now, and to TensorBoard with the next line."""
        self._picture_wall_seconds = self.wall_seconds
        png = encode_png(pixels)
        height, width, _ = pixels.shape
        self._pictures[name] = (width, height, png)
        path = self._path(f'{name}.png')
        try:
            write_atomically(path, png)
        except LogdirError as error:
            self.message(f'WARNING: {error}')

    def record_test(self, result: TestResult) -> None:
        """See `Log`; also draws the tests into the learning curve."""
        values = {
            f'{_TEST_RETURN}{level}': value for level, value in result.mean_returns.items()
        } | dict(result.scores)
        for name in _TEST_COUNTERS:
            values[f'{_TEST_COUNTER}{name}'] = getattr(result, name)
        self._interval.set_values(values)
        self._take_test(values)

    def _take_test(self, values: Mapping[str, Any]) -> None:
        """Takes a test, as it is in a line of metrics, into the learning curve."""
        if not all(f'{_TEST_COUNTER}{name}' in values for name in _TEST_COUNTERS):
            return
        steps, seconds = (values[f'{_TEST_COUNTER}{n}'] for n in ('agent_steps', 'wall_seconds'))
        for name, value in values.items():
            if name.startswith(_TEST_RETURN):
                level = name.removeprefix(_TEST_RETURN)
                level = self._trained_level.get(level, level)
                self._tests.setdefault(level, []).append((steps, seconds, value))

    def message(self, text: str) -> None:
        """Shows a line above the progress bar."""
        self._console.print(text)

    def maybe_write(self, frames: int, agent_steps: int, updates: int) -> bool:
        """See `Log`; writes the recorded episodes, and a line if `log_secs` have passed."""
        self._frames, self._agent_steps, self._updates = frames, agent_steps, updates
        wall_seconds = self.wall_seconds
        self._write_episodes(wall_seconds)
        self._console.advance(frames, self._all_levels)
        if not self.line_is_due:
            return False
        self._write_line(wall_seconds)
        if self._all_levels.num_episodes and wall_seconds >= self._next_curve_seconds:
            self._draw_curve()
            # A figure is full of reference cycles. Python collects them only when new objects are
            # numerous compared with old ones, of which TensorFlow has nearly a million. Before
            # that, dozens of figures of several megabytes would pile up.
            gc.collect()
        return True

    def close(self) -> None:
        """Writes what is left, draws the learning curve, closes the progress bar. Idempotent."""
        if self._closed:
            return
        self._closed = True
        wall_seconds = self.wall_seconds
        self._write_episodes(wall_seconds)
        if self._agent_steps > self._interval.agent_steps or self._interval.unrolls_discarded:
            self._write_line(wall_seconds)
        self._draw_curve()
        self._console.close()
        for file in (self._episodes_file, self._metrics_file):
            lost = file.close()
            if lost:
                self.message(f'WARNING: {lost} bytes could not be written to {file.path}.')
        self._summaries.close()

    def _path(self, name: str) -> str:
        return os.path.join(self._logdir, name)

    def _read_back(self, agent_steps: int) -> float:
        """Repairs the files, reads their episodes; returns the last row's wall seconds."""
        wall_seconds = 0.0
        num_dropped = 0
        path = self._path(EPISODES_FILE)
        num_dropped += keep_rows(path, parse_episode, agent_steps, self.message)
        for row in read_rows(path, parse_episode):
            self._take_episode(row['level'], row['agent_steps'], row['wall_seconds'], row['return'])
            wall_seconds = max(wall_seconds, row['wall_seconds'])
        path = self._path(METRICS_FILE)
        num_dropped += keep_rows(path, parse_metrics, agent_steps, self.message)
        for row in read_rows(path, parse_metrics):
            wall_seconds = max(wall_seconds, row['wall_seconds'])
            self._take_test(row)
            for name, frames in self._interval.level_frames.items():
                frames = row.get(f'level_frames/{name}', frames)
                self._interval.level_frames[name] = int(frames)
        if num_dropped:
            self.message(
                f'Moved {num_dropped} rows of the logs after agent step {agent_steps:,}, from '
                'which this run resumes, to files *.dropped.*'
            )
        return wall_seconds

    def _take_episode(
        self, level: str, agent_steps: int, wall_seconds: float, episode_return: float
    ) -> None:
        curve = self._curves.setdefault(level, learning_curve.LearningCurve())
        for each in (curve, self._all_levels):
            each.add(agent_steps, wall_seconds, episode_return)

    def _write_episodes(self, wall_seconds: float) -> None:
        if not self._episodes:
            return
        rows = []
        for level, episode_return, episode_frames, ended_by in self._episodes:
            rows.append(
                (
                    round(wall_seconds, 3),
                    self._frames,
                    self._agent_steps,
                    level,
                    episode_return,
                    episode_frames,
                    ended_by,
                )
            )
            self._take_episode(level, self._agent_steps, wall_seconds, episode_return)
            self._interval.add_episode(level, episode_return, episode_frames)
        self._episodes.clear()
        self._append(self._episodes_file, _csv_text(rows))

    def _write_line(self, wall_seconds: float) -> None:
        line = self._interval.line(wall_seconds, self._frames, self._agent_steps, self._updates)
        row: dict[str, Any] = dict(line)
        if self._actors:
            actors = [actor for rows in self._actors.values() for actor in rows]
            row['actors'] = sorted(actors, key=operator.itemgetter('task'))
        self._append(self._metrics_file, json.dumps(row, allow_nan=False) + '\n')
        self._summaries.write(self._agent_steps, line, self._pictures)
        self._console.line(line, self._all_levels)
        self._interval.begin(wall_seconds, self._frames, self._agent_steps)
        self._pictures.clear()
        self._on_line(line)

    def _draw_curve(self) -> None:
        try:
            learning_curve.draw(self._path(CURVE_FILE), self._curves, tests=self._tests)
        except OSError as error:
            self.message(f'WARNING: cannot write {self._path(CURVE_FILE)}: {error.strerror}.')
        self._next_curve_seconds = self.wall_seconds + _CURVE_SECS

    def _append(self, file: RowFile, text: str) -> None:
        was_failing = file.num_unwritten > 0
        try:
            file.append(text)
        except OSError as error:
            if not was_failing:
                self.message(
                    f'WARNING: cannot write {file.path}: {error.strerror}. Training continues; '
                    'what is missing is written as soon as that is possible.'
                )


def _csv_text(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    return buffer.getvalue()
