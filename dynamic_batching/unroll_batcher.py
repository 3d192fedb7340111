"""The dynamic batcher for callers in other processes, which never load TensorFlow.

Actor processes write their rows into shared memory and sleep until their action is there; the
batcher gathers the rows of all that wait into one batch of tensors, scatters the results back, and
hands over full unrolls, first in, first out. `dynamic_batching/cc/shared_segment.h` says who writes
what; the actors' end is `dynamic_batching.actor_client.ActorClient`.
"""

import enum
import os
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dynamic_batching.actor_client import ArraySpec
from dynamic_batching.op_library import load_ops

_ops = load_ops('dynamic_batching')


class Requests(NamedTuple):
    """One batch of rows that wait for an action; N is the number of actors in it.

    Attributes:
      tickets: what `set_outputs` must be given back: actors i32 `[N]`, epochs i64 `[N]`.
      inputs: list of `[N, ...]`, in the order of the batcher's inputs.
      last_action: i32 `[N]`, the action that led to the row; 0 before the first.
      states: list of `[N, ...]`, what `set_outputs` was given for these actors last, or zeros.
    """

    tickets: tuple[tf.Tensor, tf.Tensor]
    inputs: list[tf.Tensor]
    last_action: tf.Tensor
    states: list[tf.Tensor]


class Unrolls(NamedTuple):
    """One batch of full unrolls; T is the unroll length, B the batch size.

    Attributes:
      level_ids: i32 `[B]`.
      actors: i32 `[B]`.
      policy_versions: i64 `[B]`, of the weights that answered row 0.
      states: list of `[B, ...]`, before row 0.
      inputs: list of `[T+1, B, ...]`.
      outputs: list of `[T+1, B, ...]`; row t is what led to row t of `inputs`.
    """

    level_ids: tf.Tensor
    actors: tf.Tensor
    policy_versions: tf.Tensor
    states: list[tf.Tensor]
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]


class Statistics(NamedTuple):
    """What happened since the batcher was made.

    Attributes:
      stage_seconds: stage -> seconds; those of actors are summed over actors.
      completed_unrolls: of each actor, since its last reset.
      batches: handed out.
      rows: in those batches.
      queued_unrolls: full unrolls that were queued for the learner.
      discarded_unrolls: full unrolls that were not, for a row with values that are not finite.
      discarded_in_a_row: of these, those since the last one that was queued, but for those that
        came while the queue was full.
      non_finite: of the last row with such values, the actor, what it was (0 the reward, i + 1
        observation i) and the value; None if there was no such row.
    """

    stage_seconds: dict[str, float]
    completed_unrolls: list[int]
    batches: int
    rows: int
    queued_unrolls: int
    discarded_unrolls: int
    discarded_in_a_row: int
    non_finite: tuple[int, int, float] | None


class ActorState(enum.IntEnum):
    """What an actor is doing: `RequestState` of `dynamic_batching/cc/shared_segment.h`."""

    IDLE = 0  # Nobody has sent a row since the batcher was made or the actor was reset.
    REQUESTED = 1  # A row waits for its action.
    SLEEPING = 2  # The same, and the process does nothing else.
    ANSWERED = 3  # The action is there, and was not taken yet.
    ACTING = 4  # The environment has the turn.


class Activity(NamedTuple):
    """What actors are doing.

    Attributes:
      states: of each actor.
      progress: of each actor, a number that changes with each row sent and each action taken.
      closed: whether the batcher is.
    """

    states: list[ActorState]
    progress: list[int]
    closed: bool


class UnrollBatcher:
    """Batches the requests of actor processes and records their unrolls.

    All methods may be called from any thread, and all but `reset_actor`, `statistics`, `activity`
    and `close` inside a `tf.function`, too.
    """

    def __init__(
        self,
        inputs: Sequence[ArraySpec],
        outputs: Sequence[ArraySpec],
        states: Sequence[ArraySpec],
        level_ids: Sequence[int],
        unroll_length: int,
        queue_capacity: int,
        minimum_batch_size: int = 1,
        maximum_batch_size: int = 1024,
        timeout_ms: float = 100,
        max_discarded_in_a_row: int = 0,
    ):
        """Makes the shared memory and starts the batcher's two threads.

        Args:
          inputs: what an actor sends with each row: reward f32, episode return f32, episode step
            i32, episode frames i32, end u8, all scalars, then the observations.
          outputs: what answers a row; the first is the action, an i32 scalar.
          states: the recurrent state of one actor.
          level_ids: the level of each actor; as many as there are actors.
          unroll_length: T, agent steps.
          queue_capacity: full unrolls that may wait for the learner before actors wait for it.
          minimum_batch_size: a batch is handed out when so many rows wait (fewer, in proportion,
            while some actors wait for the learner or have finished),
          maximum_batch_size: and holds at most so many;
          timeout_ms: or when at least one waits and so many milliseconds are over.
          max_discarded_in_a_row: when that many unrolls were discarded since one was queued, while
            there was room in the queue, the batcher closes itself: nobody may be waiting in vain
            for the next. 0 for no limit.

        Raises:
          tf.errors.OpError: for sizes that make no sense or memory that is not to be had.
        """
        self.unroll_length = unroll_length
        self.num_actors = len(level_ids)
        self._inputs = _types_and_shapes(inputs, 'input')
        self._outputs = _types_and_shapes(outputs, 'output')
        self._states = _types_and_shapes(states, 'state')
        # Anonymous memory: it is gone with the last process that holds it, however that ends.
        self.fd = os.memfd_create('unrolls')
        try:
            with tf.device('/cpu:0'):
                self._handle = _ops.unroll_batcher(
                    fd=self.fd,
                    level_ids=list(level_ids),
                    num_unrolls=self.num_actors + queue_capacity,
                    rows=unroll_length + 1,
                    minimum_batch_size=minimum_batch_size,
                    maximum_batch_size=maximum_batch_size,
                    timeout_ms=timeout_ms,
                    max_discarded_in_a_row=max_discarded_in_a_row,
                    **self._inputs,
                    **self._outputs,
                    **self._states,
                )
        except Exception:
            os.close(self.fd)
            raise

    def get_inputs(self) -> Requests:
        """Waits for the next batch of requests.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        with tf.device('/cpu:0'):
            actors, epochs, inputs, last_action, states = _ops.unroll_batcher_get(
                self._handle, **self._inputs, **self._states
            )
        return Requests((actors, epochs), inputs, last_action, states)

    def set_outputs(
        self,
        tickets: tuple[tf.Tensor, tf.Tensor],
        policy_version: tf.Tensor,
        outputs: Sequence[tf.Tensor],
        states: Sequence[tf.Tensor],
    ) -> tf.Operation | None:
        """Answers a batch of requests.

        Args:
          tickets: those of the batch.
          policy_version: i64 scalar, of the weights that were used.
          outputs: list of `[N, ...]`.
          states: list of `[N, ...]`, after the batch's rows.

        Raises:
          tf.errors.InvalidArgumentError: a shape or dtype is not that of the spec.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_batcher_set(
                self._handle, *tickets, policy_version, outputs=outputs, states=states
            )

    def dequeue(self, batch_size: int, num_inputs: int | None = None) -> Unrolls:
        """Waits for `batch_size` full unrolls and frees their places.

        Args:
          batch_size: B, unrolls.
          num_inputs: only the first so many inputs are wanted; None for all. What is not is not
            copied, and of an unroll the observations are nearly all.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        with tf.device('/cpu:0'):
            return Unrolls(
                *_ops.unroll_batcher_dequeue(
                    self._handle,
                    batch_size=batch_size,
                    rows=self.unroll_length + 1,
                    **{name: values[:num_inputs] for name, values in self._inputs.items()},
                    **self._outputs,
                    **self._states,
                )
            )

    def reset_actor(self, actor: int) -> None:
        """Throws away the unfinished unroll of an actor, whose process must have ended."""
        _ops.unroll_batcher_reset_actor(self._handle, actor)

    def statistics(self) -> Statistics:
        """Returns counts and times so far."""
        names, seconds, completed, batches, rows, unrolls, non_finite, value = (
            _ops.unroll_batcher_statistics(self._handle)
        )
        queued, discarded, discarded_in_a_row = unrolls.numpy().tolist()
        actor, what = non_finite.numpy().tolist()
        return Statistics(
            stage_seconds=dict(
                zip(names.numpy().astype(str), seconds.numpy().tolist(), strict=True)
            ),
            completed_unrolls=completed.numpy().tolist(),
            batches=int(batches),
            rows=int(rows),
            queued_unrolls=queued,
            discarded_unrolls=discarded,
            discarded_in_a_row=discarded_in_a_row,
            non_finite=(
                (actor, (what & -what).bit_length() - 1, float(value)) if actor >= 0 else None
            ),
        )

    def activity(self) -> Activity:
        """Returns what the actors are doing now."""
        states, progress, closed = _ops.unroll_batcher_activity(self._handle)
        return Activity(
            states=[ActorState(state) for state in states.numpy().tolist()],
            progress=progress.numpy().tolist(),
            closed=bool(closed),
        )

    def close(self) -> None:
        """Fails whoever waits here and in the actor processes; may be called again."""
        _ops.unroll_batcher_close(self._handle)

    def __del__(self):
        if hasattr(self, '_handle'):
            os.close(self.fd)


def _types_and_shapes(specs: Sequence[ArraySpec], name: str) -> dict[str, list]:
    return {
        f'{name}_types': [tf.as_dtype(spec.dtype) for spec in specs],
        f'{name}_shapes': [list(spec.shape) for spec in specs],
    }
