"""The interface of a run's log."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class TestResult(NamedTuple):
    """A test of the weights that a run had at some time.

    Attributes:
      frames: of the run at that time.
      agent_steps: of the run at that time.
      wall_seconds: of the run at that time.
      mean_returns: name of a tested level -> mean return.
      scores: name -> other scores.
    """

    frames: int
    agent_steps: int
    wall_seconds: float
    mean_returns: Mapping[str, float]
    scores: Mapping[str, float]


class Log(Protocol):
    """Records the events of a run; see `impala.runs.run_log.RunLog`. Used by one thread.

    Letters: T unroll length, B batch size, N episodes.
    """

    @property
    def wall_seconds(self) -> float:
        """Seconds spent training so far."""

    @property
    def line_is_due(self) -> bool:
        """Whether the next `maybe_write` will write a line."""

    @property
    def picture_is_due(self) -> bool:
        """Whether the next line may have a picture."""

    def message(self, text: str) -> None:
        """Shows a line to the user."""

    def record_update(self, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of one learner update.

        Args:
          metrics: name -> scalar. The next line has their means over updates, except for names that
            end in `_max` (the maximum), `learning_rate` (the last value) and `skipped` (the sum, as
            `updates_skipped`).
        """

    def record_episodes(
        self, level_ids: np.ndarray, returns: np.ndarray, frames: np.ndarray, ends: np.ndarray
    ) -> None:
        """Records the episodes of one batch.

        The arguments are broadcast to a common shape, for instance all rows `[T, B]` of a batch
        with level ids `[B]`. Only rows whose end is `TERMINATED` or `TRUNCATED` count.

        Args:
          level_ids: integer `[N]`, indices into the level names.
          returns: f32 `[N]`, undiscounted and unclipped.
          frames: i32 `[N]`, lengths.
          ends: integer `[N]`, values of `EpisodeEnd`.
        """

    def record_agent_steps(self, level_ids: np.ndarray, steps: int) -> None:
        """Records the levels of the agent steps that the learner trained on.

        Args:
          level_ids: integer `[B]`, the level of each unroll, as index into the level names.
          steps: agent steps per unroll.
        """

    def record_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Records how long each stage has worked or waited.

        Args:
          seconds: stage -> total seconds since the process started, summed over its threads or
            actors. A stage that restarts may start again at zero.
        """

    def record_actor_restart(self, count: int = 1) -> None:
        """Counts actors that died and were restarted."""

    def record_discarded_unrolls(self, count: int) -> None:
        """Counts unrolls that were discarded for values that are not finite."""

    def record_actors(self, rows: Sequence[Mapping[str, Any]], learner: int = 0) -> None:
        """Records the state of actor jobs.

        Args:
          rows: JSON-serializable, one for each actor job.
          learner: index of the learner that they serve.
        """

    def record_picture(self, name: str, pixels: np.ndarray) -> None:
        """Records a picture.

        Args:
          name: of the picture.
          pixels: uint8 `[H, W, C]`, C is 1 for grey or 3 for RGB.
        """

    def record_test(self, result: TestResult) -> None:
        """Records a test. The next line has it as `test_return/LEVEL`, `test/agent_steps`, ..."""

    def maybe_write(self, frames: int, agent_steps: int, updates: int) -> bool:
        """Writes a line if one is due. Called after every update.

        Args:
          frames: of the whole run.
          agent_steps: of the whole run.
          updates: of the learner in the whole run.

        Returns:
          Whether a line was written.
        """
