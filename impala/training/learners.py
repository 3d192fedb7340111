"""The interface between a learner and the others that train the same model, if any."""

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from impala.runs.log import Log


class Learners(Protocol):
    """All learners of a run; `impala.cluster.learner_group.LearnerGroup` connects several.

    Attributes:
      run_id: the id by which replay jobs know the run.
    """

    run_id: str

    def then(self, stop: Callable[[], Any]) -> None:
        """Makes the end of another learner call a function from now on."""

    def stop(self) -> None:
        """Ends the training of all learners, after a signal to this one. Thread-safe."""

    def explain(self, error: tf.errors.OpError) -> None:
        """Finds out why a train step failed, so that `check` can raise the reason."""

    def check(self) -> None:
        """Raises the error that ended the training, unless `stop` did."""

    def finish(self) -> None:
        """Waits until all learners have taken their last step."""

    def collect(self, log: Log) -> None:
        """Records in the log what the other learners have reported."""


class OnlyLearner:
    """A learner without others."""

    def __init__(self, run_id: str = ''):
        """Takes the id of the run."""
        self.run_id = run_id

    def then(self, stop: Callable[[], Any]) -> None:
        """Does nothing: there is no other learner that could end."""

    def stop(self) -> None:
        """Does nothing: there is no other learner to stop."""

    def explain(self, error: tf.errors.OpError) -> None:
        """Raises the error, which is this learner's own."""
        raise error

    def check(self) -> None:
        """Does nothing: no other learner can have ended."""

    def finish(self) -> None:
        """Does nothing: there is no other learner to wait for."""

    def collect(self, log: Log) -> None:
        """Does nothing: no other learner reports anything."""
