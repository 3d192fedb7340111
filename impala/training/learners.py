"""What a learner asks of the others that train the same model, if there are any."""

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from impala.runs.log import Log


class Learners(Protocol):
    """All learners of a run; `impala.cluster.learner_group.LearnerGroup` connects several.

    Attributes:
      run_id: of the run, as replay jobs know it.
    """

    run_id: str

    def then(self, stop: Callable[[], Any]) -> None:
        """From now on, the end of another learner calls a function."""

    def stop(self) -> None:
        """Ends the training of all learners, since this one was told to. From any thread."""

    def explain(self, error: tf.errors.OpError) -> None:
        """Finds out, for `check`, why a step failed."""

    def check(self) -> None:
        """Raises what ended the training, if it was not `stop`."""

    def finish(self) -> None:
        """Waits until all learners have taken their last step."""

    def collect(self, log: Log) -> None:
        """Hands what the other learners have told to the log."""


class OnlyLearner:
    """A learner without others."""

    def __init__(self, run_id: str = ''):
        """Keeps the id of the run."""
        self.run_id = run_id

    def then(self, stop: Callable[[], Any]) -> None:
        """Does nothing: there is no other to end."""

    def stop(self) -> None:
        """Does nothing: there is no other to be told."""

    def explain(self, error: tf.errors.OpError) -> None:
        """Raises the error: it is this learner's own."""
        raise error

    def check(self) -> None:
        """Does nothing: no other has ended."""

    def finish(self) -> None:
        """Does nothing: there is no other to wait for."""

    def collect(self, log: Log) -> None:
        """Does nothing: nobody has told anything."""
