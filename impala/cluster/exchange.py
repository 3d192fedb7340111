"""The learner's inbox of unrolls from actor jobs. An unroll is copied once, into its batch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dynamic_batching.op_library import load_ops
from impala.cluster.unroll_format import UnrollFormat
from impala.private_tensorflow import shared_tensor
from impala.trajectory import UnrollArray

_ops = load_ops('impala.cluster')

# Of the tensors that hold an actor's texts, one per actor is in use.
_NUM_CACHED_TEXTS = 1024
# The inbox rejects texts of so many characters.
_TOO_LONG = 4097


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
    def of(cls, is_own: tf.Tensor, host: tf.Tensor, seconds_since_seen: tf.Tensor) -> 'Reservation':
        """Converts the outputs of the op."""
        name = host.numpy()
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
    """A bounded FIFO queue of unrolls from other processes.

    Only complete and valid unrolls enter: with the right number of bytes, finite floats, integers
    within their bounds, and a policy version that the learner has published. All methods are
    thread-safe; `take` and `set_latest_version` also work inside a `tf.function`.

    Attributes:
      max_nbytes: bytes of an unroll in the larger of its forms.
    """

    def __init__(
        self,
        capacity: int,
        components: Sequence[UnrollArray],
        version_component: str,
        stack: str | None = None,
    ):
        """Makes the queue.

        Args:
          capacity: maximum number of unrolls in the queue; actors wait while it is full.
          components: the arrays of an unroll.
          version_component: name of the array, an int64 scalar, that holds the policy version; its
            greatest valid value is set by `set_latest_version`, initially 0.
          stack: name of the array, uint8 `[T+1, ..., C]`, that may arrive packed; see
            `UnrollFormat`.

        Raises:
          tf.errors.InvalidArgumentError: the components are invalid.
        """
        self.max_nbytes = UnrollFormat(components, stack).max_nbytes
        self._layout = {
            'types': [tf.as_dtype(component.dtype) for component in components],
            'shapes': [list(component.shape) for component in components],
            'time_major': [component.time_major for component in components],
        }
        # Making a tensor of strings takes longer than putting an unroll.
        self._texts = functools.lru_cache(_NUM_CACHED_TEXTS)(_eager_constant)
        names = [component.name for component in components]
        with tf.device('/cpu:0'):
            self._inbox = _ops.unroll_inbox(
                capacity=capacity,
                names=names,
                lows=[component.bounds[0] for component in components],
                highs=[component.bounds[1] for component in components],
                version_component=names.index(version_component),
                stack=-1 if stack is None else names.index(stack),
                **self._layout,
            )

    def put(
        self,
        unroll: np.ndarray | tf.Tensor,
        actor: int,
        client: int,
        sequence: int,
        host: str = '',
        level: str = '',
        notes: str = '',
    ) -> tf.Tensor:
        """Puts an unroll; waits while the queue is full.

        Args:
          unroll: u8 `[N]`, the joined `UnrollFormat.buffers` of the unroll. A tensor, or an array
            whose address is a multiple of 64 bytes, is not copied and must not be written to;
            other arrays are copied.
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
        numbers = shared_tensor(np.array([actor, client, sequence], np.int64))
        if isinstance(unroll, np.ndarray):
            unroll = shared_tensor(unroll)
        # Cut, so that what strangers send cannot fill the cache.
        texts = self._texts((host[:_TOO_LONG], level[:_TOO_LONG], notes[:_TOO_LONG]))
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_put(self._inbox, texts, numbers, unroll)

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
                    self._inbox, actor, client, host, tf.constant(seconds, tf.float64)
                )
            )

    def take(self, batch_size: int) -> Batch:
        """Waits for `batch_size` unrolls and returns them as one batch.

        Raises:
          tf.errors.CancelledError: the inbox is closed.
        """
        with tf.device('/cpu:0'):
            return Batch(
                *_ops.unroll_inbox_take(self._inbox, batch_size=batch_size, **self._layout)
            )

    def set_latest_version(self, version: tf.Tensor) -> tf.Operation | None:
        """Makes unrolls of policy versions up to this one valid.

        Call this before the weights are published: a fast actor may return an unroll at once.

        Args:
          version: i64 scalar.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_set_latest_version(self._inbox, version)

    def statistics(self) -> InboxStatistics:
        """Returns what each actor has sent so far, and how full the queue is."""
        numbers, hosts, levels, notes, counts, seconds, rejections, queue, copy_seconds = (
            output.numpy() for output in _ops.unroll_inbox_statistics(self._inbox)
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
        """Fails all waiting calls and drops the queue. May be called again."""
        _ops.unroll_inbox_close(self._inbox)


def _eager_constant(values: tuple[str, ...]) -> tf.Tensor:
    # Also eager within a function, since it outlives that.
    with tf.init_scope(), tf.device('/cpu:0'):
        return tf.constant(values)
