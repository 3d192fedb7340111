"""Saves checkpoints of a run during training."""

import contextlib
from collections.abc import Iterator, Sequence

from impala.errors import TrainingError
from impala.learning.learner import Learner
from impala.runs.checkpoint import Checkpointer
from impala.runs.files import LogdirError
from impala.runs.log import Log
from impala.runs.run_settings import checkpoint_settings, counted_by, store_settings
from impala.training.hooks import Hook, Update, modules_of
from impala.training.run import Run


class Checkpoints(Hook):
    """Restores a run, and saves it at intervals and when it ends.

    Of several learners only the first one does so; the others receive its variables.
    """

    def __init__(self, run: Run, learner: Learner, hooks: Sequence[Hook] = ()):
        """Restores the newest checkpoint, if there is one, and stores the settings of the run.

        Args:
          run: the run.
          learner: newly made.
          hooks: whose modules are saved and restored, too.

        Raises:
          LogdirError: one sentence for the user.
        """
        self._stop = run.stop
        self._learner = learner
        self._checkpointer: Checkpointer | None = None
        if run.config.cluster.is_first:
            config = run.config
            self._checkpointer = Checkpointer(
                config.run.logdir,
                learner,
                config.run.save_checkpoint_secs,
                extras=modules_of(hooks),
            )
            self._checkpointer.restore()
            settings = checkpoint_settings(config, run.network, run.spec)
            store_settings(config.run.logdir, settings, counted_by(run.suite.level_names, run.spec))
        self._restored_updates, _ = learner.counts()

    @property
    def latest(self) -> str | None:
        """Path of the checkpoint saved or restored last; None if this learner has none."""
        return None if self._checkpointer is None else self._checkpointer.latest

    @property
    def wall_seconds(self) -> float:
        """Seconds of training at `latest`; 0 if this learner has none."""
        return 0.0 if self._checkpointer is None else self._checkpointer.wall_seconds

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        if self._checkpointer is not None:
            self._checkpointer.maybe_save(update.log.wall_seconds)

    @contextlib.contextmanager
    def saved_at_the_end(self, log: Log) -> Iterator[None]:
        """Saves the run when the block ends, also after an error.

        The weights are always valid, because updates that are not finite are skipped.

        Args:
          log: of the run.

        Raises:
          TrainingError: the block ended without an error, but the checkpoint cannot be written.
        """
        try:
            yield
        except BaseException:
            try:
                self._save(log.wall_seconds)
            except LogdirError as error:
                log.message(f'WARNING: {error}')
            raise
        try:
            self._save(log.wall_seconds)
        except LogdirError as error:
            raise TrainingError(str(error)) from error

    def _save(self, wall_seconds: float) -> None:
        # A run that fails at every start must not replace its good checkpoints.
        if self._checkpointer is not None and self._learner.counts()[0] > self._restored_updates:
            # The signal may have come at the end of the first train step, before its `begun`.
            self._stop.begun()
            self._checkpointer.save(wall_seconds)
