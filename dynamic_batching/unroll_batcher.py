"""The dynamic batcher for callers in other processes, which never load TensorFlow.

Actor processes write their rows into shared memory and sleep until their action arrives. The
batcher gathers the rows of all waiting actors into one batch of tensors, scatters the results back,
and hands over full unrolls, first in, first out. `dynamic_batching/cc/shared_segment.h` documents
which side writes what; actors use `dynamic_batching.actor_client.ActorClient`.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dynamic_batching.activity import Activity, ActorState
from dynamic_batching.actor_client import ArraySpec
from dynamic_batching.op_library import load_ops

_ops = load_ops('dynamic_batching')


class Requests(NamedTuple):
    """One batch of rows that wait for an action; N is the number of actors in it.

    Attributes:
      tickets: to be passed back to `set_outputs`: actors i32 `[N]`, epochs i64 `[N]`.
      inputs: list of `[N, ...]`, in the order of the batcher's inputs.
      last_action: `[N, ...]`, the action that led to the row; zeros before the first action.
      states: list of `[N, ...]`, recurrent states from these actors' last `set_outputs`, or zeros.
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
      policy_versions: i64 `[B]`, version of the weights that answered row 0.
      states: list of `[B, ...]`, recurrent states before row 0.
      inputs: list of `[T+1, B, ...]`.
      outputs: list of `[T+1, B, ...]`; row t led to row t of `inputs`.
    """

    level_ids: tf.Tensor
    actors: tf.Tensor
    policy_versions: tf.Tensor
    states: list[tf.Tensor]
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]


class Statistics(NamedTuple):
    """Counts and times since the batcher was made.

    Attributes:
      stage_seconds: stage -> seconds; actors' stages are summed over actors.
      completed_unrolls: for each actor, full unrolls since its last reset.
      batches: batches handed out.
      rows: total rows of those batches.
      queued_unrolls: full unrolls queued for the learner.
      discarded_unrolls: full unrolls discarded because of non-finite values.
      discarded_in_a_row: unrolls discarded since the last one was queued, not counting those
        discarded while the queue was full.
      non_finite: for the last row with non-finite values: the actor, the source (0 the reward,
        i + 1 observation i) and the value; None if there was no such row.
    """

    stage_seconds: dict[str, float]
    completed_unrolls: list[int]
    batches: int
    rows: int
    queued_unrolls: int
    discarded_unrolls: int
    discarded_in_a_row: int
    non_finite: tuple[int, int, float] | None


class UnrollBatcher:
    """Batches the requests of actor processes and records their unrolls.

    All methods are thread-safe. All but those on single actors, `statistics`, `activity` and
    `close` also work inside a `tf.function`.
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
          inputs: specs of a row: reward f32, episode return f32, episode step i32, episode frames
            i32, end u8, all scalars, then the observations.
          outputs: specs of the answer to a row; the first is the action.
          states: specs of the recurrent state of one actor.
          level_ids: level id of each actor; its length is the number of actors.
          unroll_length: T, agent steps.
          queue_capacity: full unrolls that may be queued; actors wait while the queue is full.
          minimum_batch_size: rows that must wait before a batch is handed out. Proportionally fewer
            suffice while some actors wait for the learner or have finished.
          maximum_batch_size: maximum number of rows in a batch.
          timeout_ms: milliseconds after which a batch with fewer rows than the minimum is handed
            out, if at least one row waits.
          max_discarded_in_a_row: the batcher closes itself when this many unrolls were discarded in
            a row while the queue had room, lest the learner wait forever. 0 means no limit.

        Raises:
          tf.errors.OpError: a size is invalid or there is not enough memory.
        """
        self.unroll_length = unroll_length
        self.num_actors = len(level_ids)
        self._inputs = _types_and_shapes(inputs, 'input')
        self._outputs = _types_and_shapes(outputs, 'output')
        self._states = _types_and_shapes(states, 'state')
        # Anonymous memory: the kernel frees it with the last process that holds it, even if that
        # crashes.
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
        self._action = {
            'action_type': self._outputs['output_types'][0],
            'action_shape': self._outputs['output_shapes'][0],
        }

    def get_inputs(self) -> Requests:
        """Waits for the next batch of requests.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        with tf.device('/cpu:0'):
            actors, epochs, inputs, last_action, states = _ops.unroll_batcher_get(
                self._handle, **self._inputs, **self._action, **self._states
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
          tickets: the batch's tickets.
          policy_version: i64 scalar, version of the weights that computed the outputs.
          outputs: list of `[N, ...]`.
          states: list of `[N, ...]`, recurrent states after the batch's rows.

        Raises:
          tf.errors.InvalidArgumentError: a shape or dtype differs from the spec.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_batcher_set(
                self._handle, *tickets, policy_version, outputs=outputs, states=states
            )

    def dequeue(self, batch_size: int, num_inputs: int | None = None) -> Unrolls:
        """Waits for `batch_size` full unrolls and frees their memory for new ones.

        Args:
          batch_size: B, unrolls.
          num_inputs: how many of the inputs to return, counted from the first; None for all. The
            others are not copied, which saves most of the time if they are observations.

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
        """Discards the unfinished unroll of an actor, whose process must have ended."""
        _ops.unroll_batcher_reset_actor(self._handle, actor)

    def assign_actor(self, actor: int, level_id: int) -> None:
        """Resets an actor that a `GroupClient` serves, for another environment or for none.

        No batch waits for the actor until its next row.

        Args:
          actor: its index.
          level_id: of its unrolls from now on.
        """
        _ops.unroll_batcher_assign_actor(self._handle, actor, level_id)

    def policy_versions(self) -> list[int]:
        """Returns, for each actor, the version of the weights that began its last full unroll.

        It is -1 if there is none since the actor was reset.
        """
        return _ops.unroll_batcher_policy_versions(self._handle).numpy().tolist()

    def segment_of(self, actor: int) -> tuple[int, int]:
        """Returns what an actor's client needs: the segment's file descriptor, and its index."""
        return self.fd, actor

    def completed_unrolls(self) -> list[int]:
        """Returns, for each actor, the full unrolls since its last reset."""
        return self.statistics().completed_unrolls

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
        """Returns the present activity of all actors."""
        states, progress, closed = _ops.unroll_batcher_activity(self._handle)
        return Activity(
            states=[ActorState(state) for state in states.numpy().tolist()],
            progress=progress.numpy().tolist(),
            closed=bool(closed),
        )

    def close(self) -> None:
        """Fails all waiting calls here and in the actor processes. May be called again."""
        _ops.unroll_batcher_close(self._handle)

    def __del__(self):
        if hasattr(self, '_handle'):
            os.close(self.fd)


def _types_and_shapes(specs: Sequence[ArraySpec], name: str) -> dict[str, list]:
    return {
        f'{name}_types': [tf.as_dtype(spec.dtype) for spec in specs],
        f'{name}_shapes': [list(spec.shape) for spec in specs],
    }
