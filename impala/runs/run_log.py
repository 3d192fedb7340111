"""What a run tells while it trains: `metrics.jsonl`, `episodes.csv`, TensorBoard, the terminal.

Counters are totals of the whole run, over all resumptions; `wall_seconds` is time spent training,
not time of the calendar. A run that was killed goes on from its last checkpoint, so rows written
after that checkpoint tell of weights that are lost: when the run is resumed they are moved to
`metrics.dropped.jsonl` and `episodes.dropped.csv`, and the curve is that of the weights that
survived.

A full disk does not end a run: rows that cannot be written are kept and tried again.
"""

import contextlib
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
from typing import Any, TextIO

import numpy as np
import tensorflow as tf
import tqdm

from impala.runs import learning_curve
from impala.runs.files import (
    EPISODES_FILE,
    EPISODES_HEADER,
    METRICS_FILE,
    LogdirError,
    damage_text,
    is_header,
    parse_episode,
    parse_metrics,
    read_episodes,
    read_rows,
    write_atomically,
)
from impala.suites import Suite, scores
from impala.trajectory import EpisodeEnd

CURVE_FILE = 'learning_curve.png'
SUMMARIES_FOLDER = 'summaries'
# The learner's time without a batch.
WAIT_STAGE = 'learner/wait'

_CURVE_SECS = 300.0
_PICTURE_SECS = 60.0
_SUMMARIES_RETRY_SECS = 300.0
_MAX_UNWRITTEN_BYTES = 16 << 20
_ENDED_BY = {EpisodeEnd.TERMINATED: 'terminated', EpisodeEnd.TRUNCATED: 'truncated'}


class RunLog:
    """Collects what happens in a run and writes it down every `log_secs`.

    A context manager: leaving it writes the last line and draws the curve. Used by one thread.
    """

    def __init__(
        self,
        logdir: str,
        level_names: Sequence[str],
        num_action_repeats: int,
        total_frames: int,
        log_secs: float = 10.0,
        *,
        frames: int = 0,
        agent_steps: int = 0,
        updates: int = 0,
        wall_seconds: float = 0.0,
        suite: Suite | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Goes on with the files in `logdir`.

        Args:
          logdir: the log directory; created if missing.
          level_names: names that level ids stand for.
          num_action_repeats: frames per agent step.
          total_frames: frames at which the run will end.
          log_secs: seconds between lines.
          frames: of the checkpoint that the run goes on from, as the next three; 0 at the start.
          agent_steps: see `frames`; rows of more agent steps are moved away.
          updates: see `frames`.
          wall_seconds: see `frames`.
          suite: of the levels; its scores are told if it has a name and they can be normalised.
          stream: where progress is shown, stderr by default: a bar on a terminal, else plain lines.
          clock: returns seconds.

        Raises:
          LogdirError: if the directory or files in it cannot be written or read.
        """
        self._logdir = logdir
        self._level_names = list(level_names)
        self._num_action_repeats = num_action_repeats
        self._total_frames = total_frames
        self._log_secs = log_secs
        self._clock = clock
        self._curves = {name: learning_curve.LearningCurve() for name in self._level_names}
        self._all_levels = learning_curve.LearningCurve()
        self._terminal = _Terminal(
            sys.stderr if stream is None else stream, frames, total_frames, num_action_repeats
        )
        self._frames, self._agent_steps, self._updates = frames, agent_steps, updates
        self._scored_suite = suite if suite and suite.name and suite.has_scores else None
        self._suite_returns: dict[str, list[float]] = {}
        # Frames that the learner has taken in; of a single level they are those of the run.
        self._total_level_frames = dict.fromkeys(
            self._level_names if len(self._level_names) > 1 else (), 0
        )
        self._episodes: list[tuple[str, float, int, str]] = []
        self._actors: dict[int, list[Mapping[str, Any]]] = {}
        self._stage_seconds: dict[str, float] = {}
        self._reported_stage_seconds: dict[str, float] = {}
        self._clear_interval()
        try:
            os.makedirs(logdir, exist_ok=True)
            last_wall_seconds = self._read_back(agent_steps)
            self._metrics_file = _RowFile(self._path(METRICS_FILE))
            self._episodes_file = _RowFile(self._path(EPISODES_FILE))
        except OSError as error:
            self._terminal.close()
            raise LogdirError(f'Cannot use the logs in {logdir}: {error.strerror}.') from error
        if not self._episodes_file.size:
            self._append(self._episodes_file, _csv_text([EPISODES_HEADER]))
        self._summaries: tf.summary.SummaryWriter | None = None
        self._summaries_not_before = -math.inf
        self._wall_seconds_before = max(wall_seconds, last_wall_seconds)
        self._started = clock()
        self._line_wall_seconds = self._wall_seconds_before
        self._line_frames, self._line_agent_steps = frames, agent_steps
        self._line_level_frames = dict(self._total_level_frames)
        self._curve_wall_seconds = -math.inf
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
        """Mean return of the last 100 episodes of any level; NaN before the first."""
        return self._all_levels.mean

    def record_update(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of one update of the learner.

        Args:
          metrics: name -> scalar. The next line has the mean over updates, except of names that
            end in `_max` (their maximum), `learning_rate` (the last one) and `skipped` (their sum,
            as `updates_skipped`). Values that are not finite are left out and counted.
        """
        for name, value in metrics.items():
            value = float(value)
            if not math.isfinite(value):
                self._num_non_finite += 1
            elif name == 'skipped':
                self._updates_skipped += int(value)
            elif name == 'learning_rate':
                self._values[name] = [value]
            elif name.endswith('_max'):
                self._values[name] = [max([value, *self._values.get(name, ())])]
            else:
                self._values.setdefault(name, []).append(value)

    def record_episodes(
        self, level_ids: np.ndarray, returns: np.ndarray, frames: np.ndarray, ends: np.ndarray
    ) -> None:
        """Takes the episodes of one batch; they are written by the next `maybe_write`.

        All have the same shape or are broadcast to it, so that rows of a whole batch `[T, B]` may
        be given with level ids `[B]`: only those that ended by `TERMINATED` or `TRUNCATED` count.

        Args:
          level_ids: integer `[N]`, index into the level names.
          returns: f32 `[N]`, undiscounted and unclipped.
          frames: i32 `[N]`, lengths.
          ends: integer `[N]`, values of `EpisodeEnd`.
        """
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
        """Takes in which levels the learner's agent steps were made.

        Args:
          level_ids: integer `[B]`, index into the level names, one for each unroll.
          steps: agent steps of each of them.
        """
        if self._total_level_frames:
            for level_id in level_ids:
                name = self._level_names[level_id]
                self._total_level_frames[name] += steps * self._num_action_repeats

    def record_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Takes how long each stage has worked or waited; lines have the time since the last line.

        Args:
          seconds: stage -> seconds in total since the process started, summed over its threads or
            actors. A stage that restarts may go back to zero.
        """
        self._stage_seconds.update(seconds)

    def record_actor_restart(self, count: int = 1) -> None:
        """Counts actors that died and were started again."""
        self._actor_restarts += count

    def record_discarded_unrolls(self, count: int) -> None:
        """Counts unrolls that are not learned from, for values that are not finite."""
        self._unrolls_discarded += count
        self._terminal.unrolls_discarded += count

    def record_actors(self, rows: Sequence[Mapping[str, Any]], learner: int = 0) -> None:
        """Takes the state of actor jobs, which lines have as `actors` until there is another.

        Args:
          rows: JSON-serialisable, one for each.
          learner: whose actors they are, of several learners.
        """
        self._actors[learner] = list(rows)

    @property
    def line_is_due(self) -> bool:
        """Whether the next `maybe_write` will write a line."""
        return self.wall_seconds - self._line_wall_seconds >= self._log_secs

    @property
    def picture_is_due(self) -> bool:
        """Whether the next line may have a picture, as one a minute does."""
        return self.line_is_due and self.wall_seconds - self._picture_wall_seconds >= _PICTURE_SECS

    def record_picture(self, name: str, pixels: np.ndarray) -> None:
        """Takes a picture, for TensorBoard with the next line, and at once as the file NAME.png.

        Args:
          name: of the picture; the file of one of the same name is replaced.
          pixels: uint8 `[H, W, C]`, C 1 for grey or 3 for RGB.
        """
        self._picture_wall_seconds = self.wall_seconds
        with tf.device('/cpu:0'):
            png = tf.io.encode_png(pixels).numpy()
        height, width, _ = pixels.shape
        self._pictures[name] = (width, height, png)
        path = self._path(f'{name}.png')
        try:
            write_atomically(path, png)
        except LogdirError as error:
            self.message(f'WARNING: {error}')

    def message(self, text: str) -> None:
        """Shows a line without tearing the progress bar."""
        self._terminal.print(text)

    def maybe_write(self, frames: int, agent_steps: int, updates: int) -> bool:
        """Writes the episodes recorded, and a line if `log_secs` have passed. Call every update.

        Args:
          frames: of the whole run, as the next two.
          agent_steps: see `frames`.
          updates: of the learner.

        Returns:
          Whether a line was written.
        """
        self._frames, self._agent_steps, self._updates = frames, agent_steps, updates
        wall_seconds = self.wall_seconds
        self._write_episodes(wall_seconds)
        self._terminal.advance(frames, self._all_levels)
        if not self.line_is_due:
            return False
        self._write_line(wall_seconds)
        if self._all_levels.num_episodes and wall_seconds - self._curve_wall_seconds >= _CURVE_SECS:
            self._draw_curve()
            # A figure is full of reference cycles. Python looks for those once there are many new
            # objects in proportion to the old ones, and TensorFlow's are close to a million: dozens
            # of figures, of megabytes each, would gather until then.
            gc.collect()
        return True

    def close(self) -> None:
        """Writes what is left, draws the learning curve, ends the progress bar. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        wall_seconds = self.wall_seconds
        self._write_episodes(wall_seconds)
        if self._agent_steps > self._line_agent_steps or self._unrolls_discarded:
            self._write_line(wall_seconds)
        self._draw_curve()
        self._terminal.close()
        for file in (self._episodes_file, self._metrics_file):
            lost = file.close()
            if lost:
                self.message(f'WARNING: {lost} bytes could not be written to {file.path}.')
        if self._summaries is not None:
            with contextlib.suppress(tf.errors.OpError):
                self._summaries.close()

    def _path(self, name: str) -> str:
        return os.path.join(self._logdir, name)

    def _clear_interval(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._level_returns: dict[str, list[float]] = {}
        self._level_frames: dict[str, list[int]] = {}
        self._num_non_finite = 0
        self._updates_skipped = 0
        self._actor_restarts = 0
        self._unrolls_discarded = 0
        self._pictures: dict[str, tuple[int, int, bytes]] = {}

    def _read_back(self, agent_steps: int) -> float:
        """Repairs the files, takes over their episodes; returns the last row's wall seconds."""
        wall_seconds = 0.0
        num_dropped = 0
        path = self._path(EPISODES_FILE)
        num_dropped += self._keep_rows(path, parse_episode, agent_steps)
        for row in read_rows(path, parse_episode):
            self._take_episode(row['level'], row['agent_steps'], row['wall_seconds'], row['return'])
            wall_seconds = max(wall_seconds, row['wall_seconds'])
        path = self._path(METRICS_FILE)
        num_dropped += self._keep_rows(path, parse_metrics, agent_steps)
        for row in read_rows(path, parse_metrics):
            wall_seconds = max(wall_seconds, row['wall_seconds'])
            for name in self._total_level_frames:
                frames = row.get(f'level_frames/{name}', self._total_level_frames[name])
                self._total_level_frames[name] = int(frames)
        if num_dropped:
            self.message(
                f'Moved {num_dropped} rows of the logs that lie behind agent step {agent_steps:,}, '
                'where this run goes on, to files *.dropped.*'
            )
        return wall_seconds

    def _keep_rows(
        self, path: str, parse: Callable[[bytes], dict[str, Any]], agent_steps: int
    ) -> int:
        """Keeps the rows up to `agent_steps`; returns how many there were beyond.

        Damaged lines are moved with those, and told by themselves.
        """
        damaged = []

        def keep(number: int, line: bytes) -> bool:
            if is_header(line):
                return True
            try:
                return line.endswith(b'\n') and parse(line)['agent_steps'] <= agent_steps
            except ValueError:
                damaged.append(number)
                return False

        num_dropped = _keep_lines(path, keep)
        if damaged:
            self.message(damage_text(path, damaged))
        return num_dropped - len(damaged)

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
            self._level_frames.setdefault(level, []).append(episode_frames)
            if math.isfinite(episode_return):
                self._level_returns.setdefault(level, []).append(episode_return)
                self._suite_returns.setdefault(level, []).append(episode_return)
            else:
                self._num_non_finite += 1
        self._episodes.clear()
        self._append(self._episodes_file, _csv_text(rows))

    def _write_line(self, wall_seconds: float) -> None:
        # Two lines within the clock's resolution still have finite speeds.
        seconds = max(wall_seconds - self._line_wall_seconds, 1e-9)
        means: dict[str, float] = {
            'frames_per_second': (self._frames - self._line_frames) / seconds,
            'agent_steps_per_second': (self._agent_steps - self._line_agent_steps) / seconds,
        }
        for name, values in self._values.items():
            means[name] = _mean(values)
        for level, returns in self._level_returns.items():
            means[f'episode_return/{level}'] = _mean(returns)
        for level, lengths in self._level_frames.items():
            means[f'episode_frames/{level}'] = _mean(lengths)
        for stage, total in self._stage_seconds.items():
            before = self._reported_stage_seconds.get(stage, 0.0)
            means[f'stage_seconds/{stage}'] = total - before if total >= before else total
        if WAIT_STAGE in self._stage_seconds:
            means['learner_idle_share'] = means[f'stage_seconds/{WAIT_STAGE}'] / seconds
        line: dict[str, float] = {
            'wall_seconds': round(wall_seconds, 3),
            'frames': self._frames,
            'agent_steps': self._agent_steps,
            'updates': self._updates,
            'updates_skipped': self._updates_skipped,
            'unrolls_discarded': self._unrolls_discarded,
            'actor_restarts': self._actor_restarts,
        }
        for level, total in self._total_level_frames.items():
            line[f'level_frames/{level}'] = total
            frames = total - self._line_level_frames[level]
            means[f'level_frames_per_second/{level}'] = frames / seconds
        means |= self._suite_score()
        for name, value in means.items():
            if math.isfinite(value):
                line[name] = float(f'{value:.7g}')
            else:
                self._num_non_finite += 1
        line['non_finite_values'] = self._num_non_finite
        row: dict[str, Any] = dict(line)
        if self._actors:
            actors = [actor for rows in self._actors.values() for actor in rows]
            row['actors'] = sorted(actors, key=operator.itemgetter('task'))
        self._append(self._metrics_file, json.dumps(row, allow_nan=False) + '\n')
        self._write_summaries(line)
        self._terminal.line(line, self._all_levels)
        self._line_wall_seconds = wall_seconds
        self._line_frames, self._line_agent_steps = self._frames, self._agent_steps
        self._line_level_frames = dict(self._total_level_frames)
        self._reported_stage_seconds = dict(self._stage_seconds)
        self._clear_interval()

    def _suite_score(self) -> dict[str, float]:
        """Returns the suite's scores, if every level has an episode since they were last told."""
        suite = self._scored_suite
        if suite is None or any(name not in self._suite_returns for name in suite.level_names):
            return {}
        score = scores.suite_score(self._suite_returns, suite.levels)
        self._suite_returns.clear()
        return {
            # The first two under the names of the released code.
            f'{suite.name}/training_no_cap': score.mean_no_cap,
            f'{suite.name}/training_cap_100': score.mean_cap_100,
            f'{suite.name}/training_median_no_cap': score.median_no_cap,
            f'{suite.name}/training_median_cap_100': score.median_cap_100,
        }

    def _write_summaries(self, line: Mapping[str, float]) -> None:
        # tf.summary.scalar and image exist only where TensorBoard is installed, which a machine
        # that trains does not need; these are the same records.
        of_scalars = _summary_metadata('scalars', 'DATA_CLASS_SCALAR')
        of_images = _summary_metadata('images', 'DATA_CLASS_BLOB_SEQUENCE')
        try:
            if self._summaries is None:
                if line['wall_seconds'] < self._summaries_not_before:
                    return
                self._summaries = tf.summary.create_file_writer(self._path(SUMMARIES_FOLDER))
            # Of each Python number that it is given TensorFlow keeps a tensor for ever; of NumPy's
            # it does not.
            step = tf.constant(np.int64(self._agent_steps))
            with self._summaries.as_default(step), tf.device('/cpu:0'):
                for name, value in line.items():
                    tf.summary.write(name, tf.constant(np.float32(value)), metadata=of_scalars)
                for name, (width, height, png) in self._pictures.items():
                    image = tf.constant([str(width).encode(), str(height).encode(), png])
                    tf.summary.write(name, image, metadata=of_images)
            self._summaries.flush()
        except (OSError, tf.errors.OpError):
            # The same numbers are in metrics.jsonl. The file may be cut in a record, so a new one
            # is begun, though not at every line as long as the disk is full.
            self._summaries = None
            self._summaries_not_before = line['wall_seconds'] + _SUMMARIES_RETRY_SECS

    def _draw_curve(self) -> None:
        try:
            learning_curve.draw(self._path(CURVE_FILE), self._curves)
        except OSError as error:
            self.message(f'WARNING: cannot write {self._path(CURVE_FILE)}: {error.strerror}.')
        self._curve_wall_seconds = self.wall_seconds

    def _append(self, file: '_RowFile', text: str) -> None:
        was_failing = file.num_unwritten > 0
        try:
            file.append(text)
        except OSError as error:
            if not was_failing:
                self.message(
                    f'WARNING: cannot write {file.path}: {error.strerror}. Training goes on; what '
                    'is missing will be written when that is possible again.'
                )


def read_summary(logdir: str) -> dict[str, Any]:
    """Sums up a run from its files.

    Args:
      logdir: the log directory.

    Returns:
      JSON-serialisable: `wall_seconds`, `frames`, `agent_steps`, `updates` and
      `agent_steps_per_second` over the whole run; `episodes`; `mean_return_last_100` over episodes
      of any level, None without any; `episodes_not_finite`: further episodes, whose returns are not
      finite; `updates_skipped` and `unrolls_discarded` of the whole run; `levels`: name -> its
      `episodes` and `mean_return_last_100`.

    Raises:
      LogdirError: if there is no run there.
    """
    curves: dict[str, learning_curve.LearningCurve] = {}
    together = learning_curve.LearningCurve()
    line: dict[str, Any] = {}
    skipped = discarded = 0
    try:
        for row in read_episodes(logdir):
            curve = curves.setdefault(row['level'], learning_curve.LearningCurve())
            for each in (curve, together):
                each.add(row['agent_steps'], row['wall_seconds'], row['return'])
        for row in read_rows(os.path.join(logdir, METRICS_FILE), parse_metrics):
            line = row
            skipped += row.get('updates_skipped', 0)
            discarded += row.get('unrolls_discarded', 0)
    except OSError as error:
        raise LogdirError(
            f'Cannot read the logs of a run in {logdir}: {error.strerror}.'
        ) from error
    wall_seconds = line.get('wall_seconds', 0.0)
    return {
        'wall_seconds': wall_seconds,
        'frames': line.get('frames', 0),
        'agent_steps': line.get('agent_steps', 0),
        'updates': line.get('updates', 0),
        'agent_steps_per_second': line['agent_steps'] / wall_seconds if wall_seconds else 0.0,
        'episodes': together.num_episodes,
        'mean_return_last_100': together.mean if together.num_episodes else None,
        'episodes_not_finite': together.num_not_finite,
        'updates_skipped': skipped,
        'unrolls_discarded': discarded,
        'levels': {
            level: {'episodes': curve.num_episodes, 'mean_return_last_100': curve.mean}
            for level, curve in curves.items()
        },
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Returns what `read_summary` found out, in sentences; lines but for the last one's end."""
    mean_return, not_finite = summary['mean_return_last_100'], summary['episodes_not_finite']
    discarded, skipped = summary['unrolls_discarded'], summary['updates_skipped']
    if mean_return is not None:
        returns = f'{mean_return:.2f}'
        if not_finite:
            returns += f' ({not_finite:,} with returns that are not finite left out)'
    elif not_finite:
        returns = f'none is finite, of {not_finite:,}'
    elif discarded:
        returns = 'none has ended in an unroll that was learned from'
    else:
        returns = 'none has ended yet'
    lines = [
        f'{summary["agent_steps"]:,} agent steps ({summary["frames"]:,} frames) in '
        f'{summary["wall_seconds"]:.0f} s; mean return of the last 100 episodes: {returns}.'
    ]
    if discarded:
        lines.append(
            f'Not learned from: {discarded:,} unrolls with values of the environment that are not '
            'finite.'
        )
    if skipped:
        lines.append(
            f'Skipped: {skipped:,} of {summary["updates"]:,} updates, whose loss or gradient was '
            'not finite.'
        )
    return '\n'.join(lines)


class _Terminal:
    """Shows progress: a bar where somebody looks at it, plain lines in a file or pipe.

    A terminal that goes away does not end the run.

    Attributes:
      unrolls_discarded: since the process started; shown unless it is 0.
    """

    def __init__(self, stream: TextIO, frames: int, total_frames: int, num_action_repeats: int):
        self.unrolls_discarded = 0
        self._stream = stream
        self._total_frames = total_frames
        self._num_action_repeats = num_action_repeats
        self._bar: tqdm.tqdm | None = None
        if _has_width(stream):
            self._bar = _Bar(
                total=total_frames,
                initial=min(frames, total_frames),
                unit=' frames',
                unit_scale=True,
                file=stream,
                dynamic_ncols=True,
                mininterval=0.5,
                miniters=1,
                smoothing=0.05,
                bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames, '
                '{rate_noinv_fmt}{postfix}, {remaining} left',
            )

    def print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def advance(self, frames: int, curve: learning_curve.LearningCurve) -> None:
        """Moves the bar; it redraws itself twice a second at most."""
        if self._bar is None:
            return
        parts = []
        rate = self._bar.format_dict['rate']
        if rate and self._num_action_repeats > 1:
            parts.append(f'{rate / self._num_action_repeats:,.0f} steps/s')
        parts += _shown_return(curve) + self._shown_discarded()
        self._bar.set_postfix_str(', '.join(parts), refresh=False)
        self._bar.update(min(frames, self._total_frames) - self._bar.n)

    def line(self, line: Mapping[str, float], curve: learning_curve.LearningCurve) -> None:
        """Prints the plain line that belongs to a line of metrics, unless there is a bar."""
        if self._bar is not None:
            return
        frames, speed = int(line['frames']), line['frames_per_second']
        parts = [
            f'{frames:,} of {self._total_frames:,} frames '
            f'({100 * frames / max(self._total_frames, 1):.1f}%)',
            f'{speed:,.0f} frames/s',
            f'{line["agent_steps_per_second"]:,.0f} steps/s',
        ]
        parts += _shown_return(curve) + self._shown_discarded()
        if 'loss/total' in line:
            parts.append(f'loss {line["loss/total"]:.4g}')
        if speed > 0:
            left = max(self._total_frames - frames, 0) / speed
            parts.append(f'{tqdm.tqdm.format_interval(left)} left')
        self.print(', '.join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _shown_discarded(self) -> list[str]:
        count = self.unrolls_discarded
        return [f'{count:,} unrolls not learned from'] if count else []


def _shown_return(curve: learning_curve.LearningCurve) -> list[str]:
    """Returns what a line says of the mean return; nothing before an episode has ended."""
    if curve.num_episodes:
        return [f'return {curve.mean:.4g}']
    return ['no return is finite'] if curve.num_not_finite else []


def _has_width(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal that has columns; some in containers have none."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _Bar(tqdm.tqdm):
    """A progress bar without tqdm's watching thread, which would outlive the run."""

    monitor_interval = 0


class _RowFile:
    """A file to which whole rows are appended: of every call all bytes get there, or none.

    What cannot be written is kept and goes first with the next call.
    """

    def __init__(self, path: str):
        self.path = path
        self._unwritten = b''
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    @property
    def num_unwritten(self) -> int:
        return len(self._unwritten)

    def append(self, text: str) -> None:
        # On a disk that stays full for days the newest rows are given up, not the memory.
        if len(self._unwritten) < _MAX_UNWRITTEN_BYTES:
            self._unwritten += text.encode()
        size = self.size
        rest = memoryview(self._unwritten)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._unwritten = b''

    def close(self) -> int:
        """Tries once more what is unwritten; returns how many bytes are lost."""
        with contextlib.suppress(OSError):
            self.append('')
        os.close(self._descriptor)
        return len(self._unwritten)


def _summary_metadata(plugin: str, data_class: str) -> tf.compat.v1.SummaryMetadata:
    """Returns what tells TensorBoard how to show a record."""
    metadata = tf.compat.v1.SummaryMetadata
    return metadata(plugin_data=metadata.PluginData(plugin_name=plugin), data_class=data_class)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _csv_text(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    return buffer.getvalue()


def _keep_lines(path: str, keep: Callable[[int, bytes], bool]) -> int:
    """Moves the lines that are not to be kept to `<stem>.dropped<extension>`; returns how many.

    A last line without its end, of a run that was killed while writing it, is just removed. The
    file is replaced as a whole, and only if something is to be moved.

    Args:
      path: of the file.
      keep: returns whether a line, given with its number from 1, stays; called once for each.
    """
    if not os.path.exists(path):
        return 0
    with open(path, 'rb') as file:
        kept = [keep(number, line) for number, line in enumerate(file, 1)]
    if all(kept):
        return 0
    temporary = f'{path}.{os.getpid()}.tmp'
    stem, extension = os.path.splitext(path)
    num_dropped = 0
    try:
        with (
            open(path, 'rb') as file,
            open(temporary, 'wb') as rest,
            open(f'{stem}.dropped{extension}', 'ab') as dropped,
        ):
            for line, stays in zip(file, kept, strict=True):
                if stays:
                    rest.write(line)
                elif line.endswith(b'\n'):
                    dropped.write(line)
                    num_dropped += 1
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    return num_dropped
