"""The interface of a run's log."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Log(Protocol):
    """Takes what happens in a run; see `impala.runs.run_log.RunLog`. Used by one thread.

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
        """Takes the metrics of one update of the learner.

        Args:
          metrics: name -> scalar. The next line has the mean over updates, except of names that
            end in `_max` (their maximum), `learning_rate` (the last one) and `skipped` (their sum,
            as `updates_skipped`).
        """

    def record_episodes(
        self, level_ids: np.ndarray, returns: np.ndarray, frames: np.ndarray, ends: np.ndarray
    ) -> None:
        """Takes the episodes of one batch.

        All have the same shape or are broadcast to it, so that rows of a whole batch `[T, B]` may
        be given with level ids `[B]`: only those that ended by `TERMINATED` or `TRUNCATED` count.

        Args:
          level_ids: integer `[N]`, index into the level names.
          returns: f32 `[N]`, undiscounted and unclipped.
          frames: i32 `[N]`, lengths.
          ends: integer `[N]`, values of `EpisodeEnd`.
        """

    def record_agent_steps(self, level_ids: np.ndarray, steps: int) -> None:
        """Takes in which levels the learner's agent steps were made.

        Args:
          level_ids: integer `[B]`, index into the level names, one for each unroll.
          steps: agent steps of each of them.
        """

    def record_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Takes how long each stage has worked or waited.

        Args:
          seconds: stage -> seconds in total since the process started, summed over its threads or
            actors. A stage that restarts may go back to zero.
        """

    def record_actor_restart(self, count: int = 1) -> None:
        """Counts actors that died and were started again."""

    def record_discarded_unrolls(self, count: int) -> None:
        """Counts unrolls that are not learned from, for values that are not finite."""

    def record_actors(self, rows: Sequence[Mapping[str, Any]], learner: int = 0) -> None:
        """Takes the state of actor jobs.

        Args:
          rows: JSON-serialisable, one for each.
          learner: whose actors they are, of several learners.
        """

    def record_picture(self, name: str, pixels: np.ndarray) -> None:
        """Takes a picture.

        Args:
          name: of the picture.
          pixels: uint8 `[H, W, C]`, C 1 for grey or 3 for RGB.
        """

    def maybe_write(self, frames: int, agent_steps: int, updates: int) -> bool:
        """Writes what was recorded, if it is time to. Called after every update.

        Args:
          frames: of the whole run, as the next two.
          agent_steps: see `frames`.
          updates: of the learner.

        Returns:
          Whether a line was written.
        """
