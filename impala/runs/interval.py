"""What happened in a run between two lines of its log."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from impala.suites import Suite, scores

# The learner's time without a batch.
WAIT_STAGE = 'learner/wait'


class Interval:
    """Collects events since the last line and computes the numbers of the next line.

    Attributes:
      wall_seconds: of the last line.
      agent_steps: of the last line.
      level_frames: level name -> frames of this level trained on in the whole run; empty with a
        single level, whose frames are those of the run.
      unrolls_discarded: since the last line.
    """

    def __init__(self, suite: Suite, num_action_repeats: int):
        """Starts empty.

        Args:
          suite: the levels, in the order of their ids; lines include its scores if it has a name
            and reference scores.
          num_action_repeats: frames per agent step.
        """
        self._level_names = suite.level_names
        self._num_action_repeats = num_action_repeats
        self._suite = suite if suite.name and suite.has_scores else None
        self._suite_returns: dict[str, list[float]] = {}
        self._stage_seconds: dict[str, float] = {}
        self._reported_stage_seconds: dict[str, float] = {}
        self.level_frames = dict.fromkeys(suite.level_names if len(suite.levels) > 1 else (), 0)
        self.begin(0.0, 0, 0)

    def begin(self, wall_seconds: float, frames: int, agent_steps: int) -> None:
        """Starts a new interval at a line with these counters."""
        self.wall_seconds = wall_seconds
        self._frames = frames
        self.agent_steps = agent_steps
        self._line_level_frames = dict(self.level_frames)
        self._reported_stage_seconds = dict(self._stage_seconds)
        self._values: dict[str, list[float]] = {}
        self._returns: dict[str, list[float]] = {}
        self._lengths: dict[str, list[int]] = {}
        self._num_non_finite = 0
        self._updates_skipped = 0
        self._actor_restarts = 0
        self.unrolls_discarded = 0

    def add_update(self, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of an update; see `Log.record_update`."""
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

    def set_values(self, values: Mapping[str, float]) -> None:
        """Sets values of the next line, which has the last ones."""
        for name, value in values.items():
            self._values[name] = [float(value)]

    def add_episode(self, level: str, episode_return: float, frames: int) -> None:
        """Adds an episode that has ended."""
        self._lengths.setdefault(level, []).append(frames)
        if math.isfinite(episode_return):
            self._returns.setdefault(level, []).append(episode_return)
            self._suite_returns.setdefault(level, []).append(episode_return)
        else:
            self._num_non_finite += 1

    def add_agent_steps(self, level_ids: np.ndarray, steps: int) -> None:
        """Adds agent steps to their levels; see `Log.record_agent_steps`."""
        if self.level_frames:
            for level_id in level_ids:
                self.level_frames[self._level_names[level_id]] += steps * self._num_action_repeats

    def set_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Stores the total seconds of stages; see `Log.record_stage_seconds`."""
        self._stage_seconds.update(seconds)

    def add_actor_restarts(self, count: int) -> None:
        """Counts actors that were restarted."""
        self._actor_restarts += count

    def add_discarded_unrolls(self, count: int) -> None:
        """Counts discarded unrolls."""
        self.unrolls_discarded += count

    def line(
        self, wall_seconds: float, frames: int, agent_steps: int, updates: int
    ) -> dict[str, float]:
        """Returns the numbers of a line; values that are not finite are left out and counted.

        Args:
          wall_seconds: seconds of training so far, over all resumptions.
          frames: of the whole run.
          agent_steps: of the whole run.
          updates: of the learner in the whole run.
        """
        # Two lines within the clock's resolution still have finite speeds.
        seconds = max(wall_seconds - self.wall_seconds, 1e-9)
        means: dict[str, float] = {
            'frames_per_second': (frames - self._frames) / seconds,
            'agent_steps_per_second': (agent_steps - self.agent_steps) / seconds,
        }
        for name, values in self._values.items():
            means[name] = _mean(values)
        for level, returns in self._returns.items():
            means[f'episode_return/{level}'] = _mean(returns)
        for level, lengths in self._lengths.items():
            means[f'episode_frames/{level}'] = _mean(lengths)
        means |= self._stage_means(seconds)
        line: dict[str, float] = {
            'wall_seconds': round(wall_seconds, 3),
            'frames': frames,
            'agent_steps': agent_steps,
            'updates': updates,
            'updates_skipped': self._updates_skipped,
            'unrolls_discarded': self.unrolls_discarded,
            'actor_restarts': self._actor_restarts,
        }
        for level, total in self.level_frames.items():
            line[f'level_frames/{level}'] = total
            since = total - self._line_level_frames[level]
            means[f'level_frames_per_second/{level}'] = since / seconds
        means |= self._suite_score()
        for name, value in means.items():
            if math.isfinite(value):
                line[name] = float(f'{value:.7g}')
            else:
                self._num_non_finite += 1
        line['non_finite_values'] = self._num_non_finite
        return line

    def _stage_means(self, seconds: float) -> dict[str, float]:
        means = {}
        for stage, total in self._stage_seconds.items():
            before = self._reported_stage_seconds.get(stage, 0.0)
            means[f'stage_seconds/{stage}'] = total - before if total >= before else total
        if WAIT_STAGE in self._stage_seconds:
            means['learner_idle_share'] = means[f'stage_seconds/{WAIT_STAGE}'] / seconds
        return means

    def _suite_score(self) -> dict[str, float]:
        """Returns the suite's scores, if every level has had an episode since the last ones."""
        suite = self._suite
        if suite is None or any(name not in self._suite_returns for name in suite.level_names):
            return {}
        score = scores.suite_score(self._suite_returns, suite.levels)
        self._suite_returns.clear()
        return {
            # The first two names are those of the released code.
            f'{suite.name}/training_no_cap': score.mean_no_cap,
            f'{suite.name}/training_cap_100': score.mean_cap_100,
            f'{suite.name}/training_median_no_cap': score.median_no_cap,
            f'{suite.name}/training_median_cap_100': score.median_cap_100,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
