"""The learner's side of the exchange with actor jobs: an inbox of unrolls, a board of weights.

Both objects belong to the process and have names. Graphs that other machines send to the
`tf.distribute.Server` of this process look them up by name; `impala.cluster.transport` builds those
graphs. Tensors pass by reference: an unroll is copied once, into its batch, and weights are not
copied at all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dynamic_batching.op_library import load_ops
from impala.trajectory import UnrollArray

_ops = load_ops('impala.cluster')

INBOX = 'unrolls'
BOARD = 'weights'


class Batch(NamedTuple):
    """A batch of unrolls.

    Attributes:
      actors: i32 `[B]`, numbers of the actors that put the unrolls.
      components: list of `[T+1, B, ...]` or `[B, ...]`, in the order of the inbox's arrays.
    """

    actors: tf.Tensor
    components: list[tf.Tensor]


class Reservation(NamedTuple):
    """The reservation of an actor number.

    Attributes:
      is_own: whether the client that asked holds it.
      host: host of the holder.
      seconds_since_seen: seconds since the holder last reserved it.
    """

    is_own: bool
    host: str
    seconds_since_seen: float

    @classmethod
    def of(cls, is_own: Any, host: Any, seconds_since_seen: Any) -> 'Reservation':
        """Converts the outputs of the op: tensors, or values from a session."""
        name = np.asarray(host).item()
        return cls(bool(is_own), name.decode(errors='replace'), float(seconds_since_seen))


@dataclasses.dataclass(frozen=True)
class ActorStatistics:
    """What one actor has sent since the inbox was made.

    Attributes:
      host: host on which it runs.
      level: level of its last unroll.
      notes: the actor's notes on its last unroll.
      accepted: unrolls that entered the queue.
      rejected: invalid unrolls.
      duplicates: unrolls that arrived again after they had been accepted.
      last_version: policy version of its last unroll, -1 before the first.
      seconds_since_seen: seconds since its last put; 0 while it waits for room in the queue.
      last_rejection: why its last invalid unroll was rejected.
    """

    host: str
    level: str
    notes: str
    accepted: int
    rejected: int
    duplicates: int
    last_version: int
    seconds_since_seen: float
    last_rejection: str


@dataclasses.dataclass(frozen=True)
class InboxStatistics:
    """The state of an inbox.

    Attributes:
      actors: actor number -> statistics, for each actor that has sent anything.
      queued: unrolls in the queue.
      waiting: unrolls that have arrived and wait for room in the queue.
      copy_seconds: seconds spent so far on copying unrolls into batches.
    """

    actors: dict[int, ActorStatistics]
    queued: int
    waiting: int
    copy_seconds: float


class UnrollInbox:
    """A bounded FIFO queue of unrolls that other processes fill.

    Only complete and valid unrolls enter: with the right shapes and dtypes, finite floats, integers
    within their bounds, and a policy version that the learner has published. All methods are
    thread-safe; `take` and `set_latest_version` also work inside a `tf.function`.
    """

    def __init__(
        self,
        capacity: int,
        components: Sequence[UnrollArray],
        version_component: str,
        name: str = INBOX,
    ):
        """Makes the queue.

        Args:
          capacity: maximum number of unrolls in the queue; actors wait while it is full.
          components: the arrays of an unroll.
          version_component: name of the array, an int64 scalar, that holds the policy version; its
            greatest valid value is set by `set_latest_version`, initially 0.
          name: name by which processes that put unrolls find the inbox.

        Raises:
          tf.errors.AlreadyExistsError: an open inbox has this name.
          tf.errors.InvalidArgumentError: the components are invalid.
        """
        self._name = name
        self._layout = {
            'types': [tf.as_dtype(component.dtype) for component in components],
            'shapes': [list(component.shape) for component in components],
            'time_major': [component.time_major for component in components],
        }
        names = [component.name for component in components]
        with tf.device('/cpu:0'):
            _ops.unroll_inbox(
                object=name,
                capacity=capacity,
                names=names,
                lows=[component.bounds[0] for component in components],
                highs=[component.bounds[1] for component in components],
                version_component=names.index(version_component),
                **self._layout,
            )

    def put(
        self,
        unroll: Sequence[tf.Tensor],
        actor: int,
        client: int,
        sequence: int,
        host: str = '',
        level: str = '',
        notes: str = '',
    ) -> tf.Tensor:
        """Puts an unroll from within this process; waits while the queue is full.

        Args:
          unroll: the arrays.
          actor: the actor's number.
          client: i64, id of the client that counts `sequence`.
          sequence: i64, greater than that of the client's previous unroll; unchanged if the same
            unroll is put again.
          host: host on which the actor runs.
          level: the level that it plays.
          notes: further information for `statistics`; at most 4,096 bytes.

        Returns:
          bool scalar, False if the unroll was a duplicate.

        Raises:
          tf.errors.InvalidArgumentError: the unroll is invalid; the message says why.
          tf.errors.CancelledError: the inbox is closed.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_put(
                actor, host, level, notes, client, sequence, unroll, object=self._name
            )

    def reserve(self, actor: int, client: int, host: str, seconds: float) -> 'Reservation':
        """Reserves an actor number for a client, unless another client holds it.

        Args:
          actor: the number.
          client: i64, id of the client, which may renew its reservation at any time.
          host: the client's host, shown to clients that are refused.
          seconds: duration from now, at most 3600; 0 releases the number.

        Returns:
          The reservation of whichever client holds the number.

        Raises:
          tf.errors.InvalidArgumentError: an argument is invalid.
          tf.errors.CancelledError: the inbox is closed.
        """
        with tf.device('/cpu:0'):
            return Reservation.of(
                *_ops.unroll_inbox_reserve(
                    actor, client, host, tf.constant(seconds, tf.float64), object=self._name
                )
            )

    def take(self, batch_size: int) -> Batch:
        """Waits for `batch_size` unrolls and returns them as one batch.

        Raises:
          tf.errors.CancelledError: the inbox is closed.
        """
        with tf.device('/cpu:0'):
            return Batch(
                *_ops.unroll_inbox_take(object=self._name, batch_size=batch_size, **self._layout)
            )

    def set_latest_version(self, version: tf.Tensor) -> tf.Operation | None:
        """Makes unrolls of policy versions up to this one valid.

        Call this before the weights are published: a fast actor may return an unroll at once.

        Args:
          version: i64 scalar.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_set_latest_version(version, object=self._name)

    def statistics(self) -> InboxStatistics:
        """Returns what each actor has sent so far, and how full the queue is."""
        numbers, hosts, levels, notes, counts, seconds, rejections, queue, copy_seconds = (
            output.numpy() for output in _ops.unroll_inbox_statistics(object=self._name)
        )
        actors = {}
        for i, number in enumerate(numbers.tolist()):
            accepted, rejected, duplicates, last_version = counts[i].tolist()
            actors[number] = ActorStatistics(
                host=hosts[i].decode(errors='replace'),
                level=levels[i].decode(errors='replace'),
                notes=notes[i].decode(errors='replace'),
                accepted=accepted,
                rejected=rejected,
                duplicates=duplicates,
                last_version=last_version,
                seconds_since_seen=float(seconds[i]),
                last_rejection=rejections[i].decode(errors='replace'),
            )
        queued, waiting = queue.tolist()
        return InboxStatistics(actors, queued, waiting, float(copy_seconds))

    def close(self) -> None:
        """Fails all waiting calls, here and elsewhere, and drops the queue. May be called again."""
        _ops.unroll_inbox_close(object=self._name)


class WeightsBoard:
    """Weights that other processes may read at any time.

    All methods are thread-safe; `publish` also works inside a `tf.function`.
    """

    def __init__(self, settings: str, name: str = BOARD):
        """Makes the board, without weights.

        Args:
          settings: text for the readers, such as the settings of the network.
          name: name by which readers find the board.

        Raises:
          tf.errors.AlreadyExistsError: an open board has this name.
        """
        self._name = name
        with tf.device('/cpu:0'):
            _ops.weights_board(settings, object=name)

    def publish(
        self, weights: Sequence[tf.Tensor | tf.Variable], version: tf.Tensor
    ) -> tf.Operation | None:
        """Replaces all weights at once.

        Args:
          weights: values on the CPU are shared, not copied; a later assignment to a variable
            allocates new memory for it.
          version: i64 scalar, learner updates behind the weights.
        """
        values = [tf.convert_to_tensor(weight) for weight in weights]
        with tf.device('/cpu:0'):
            return _ops.weights_board_publish(version, values, object=self._name)

    def version(self) -> tuple[int, bool]:
        """Returns the latest version, -1 before the first, and whether it is final."""
        version, finished = _ops.weights_board_version(object=self._name)
        return int(version), bool(finished)

    def read(self, specs: Sequence[tf.TensorSpec]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the latest version, i64 scalar, and its weights.

        Args:
          specs: specs of the weights.

        Raises:
          tf.errors.InvalidArgumentError: the weights do not have these shapes and dtypes.
          tf.errors.NotFoundError: none have been published yet.
        """
        return _ops.weights_board_read(
            object=self._name,
            types=[spec.dtype for spec in specs],
            shapes=[spec.shape for spec in specs],
        )

    def finish(self) -> None:
        """Tells readers that training is complete."""
        _ops.weights_board_finish(object=self._name)

    def close(self) -> None:
        """Fails all further reads and drops the weights. May be called again."""
        _ops.weights_board_close(object=self._name)
