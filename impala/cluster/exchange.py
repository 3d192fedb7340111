"""The learner's side of what it exchanges with actor jobs: unrolls come in, weights are on show.

Both objects belong to the process and have a name, by which the graphs that other machines send to
the `tf.distribute.Server` of this process find them; `impala.cluster.transport` has those graphs.
Tensors pass by reference: an unroll is copied once, into its batch, and weights are not copied at
all.
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
      actors: i32 `[B]`, numbers of the actors that put them.
      components: list of `[T+1, B, ...]` or `[B, ...]`, in the order of the inbox's components.
    """

    actors: tf.Tensor
    components: list[tf.Tensor]


class Reservation(NamedTuple):
    """Who is an actor.

    Attributes:
      is_own: whoever asked.
      host: where the one that is runs.
      seconds_since_seen: since it asked to be.
    """

    is_own: bool
    host: str
    seconds_since_seen: float

    @classmethod
    def of(cls, is_own: Any, host: Any, seconds_since_seen: Any) -> 'Reservation':
        """Reads what the op returns, as tensors or, from a session, as values."""
        name = np.asarray(host).item()
        return cls(bool(is_own), name.decode(errors='replace'), float(seconds_since_seen))


@dataclasses.dataclass(frozen=True)
class ActorStatistics:
    """What one actor has sent since the inbox was made.

    Attributes:
      host: where it runs.
      level: that of its last unroll.
      notes: what it told of itself with that.
      accepted: unrolls that entered the queue.
      rejected: unrolls that were not valid.
      duplicates: unrolls that came again after they had been accepted.
      last_version: of the policy behind its last unroll, -1 while there is none.
      seconds_since_seen: since its last put; 0 while it waits for room in the queue.
      last_rejection: why its last unroll that was not valid was not.
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
      actors: by their numbers, those that have sent anything.
      queued: unrolls in the queue.
      waiting: unrolls that have arrived and for which there is no room in the queue.
      copy_seconds: spent so far on copying unrolls into batches.
    """

    actors: dict[int, ActorStatistics]
    queued: int
    waiting: int
    copy_seconds: float


class UnrollInbox:
    """A bounded queue of unrolls that other processes fill, first in, first out.

    Only whole and valid unrolls enter: of the right shapes and dtypes, with finite floats, integers
    within their bounds, and a policy version that the learner has published. All methods may be
    called from any thread, `take` and `set_latest_version` inside a `tf.function`, too.
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
          capacity: unrolls that may wait for the learner before actors wait for it.
          components: what an unroll consists of.
          version_component: name of the one, an int64 scalar, that is the policy version; its
            greatest valid value is what `set_latest_version` says, 0 at first.
          name: by which the processes that put unrolls find it.

        Raises:
          tf.errors.AlreadyExistsError: there is one of that name that is not closed.
          tf.errors.InvalidArgumentError: components that make no sense.
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
        """Puts an unroll from within this process, which waits while the queue is full.

        Args:
          unroll: the components.
          actor: its number.
          client: whose `sequence` it is, i64.
          sequence: i64, greater than that of the client's unroll before; the same if the unroll is
            the same.
          host: where the actor runs.
          level: what it plays.
          notes: what else there is to know of it, for `statistics`; at most 4,096 bytes.

        Returns:
          bool scalar, False if it was there already.

        Raises:
          tf.errors.InvalidArgumentError: the unroll is not valid; says what is wrong with it.
          tf.errors.CancelledError: the inbox is closed.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_put(
                actor, host, level, notes, client, sequence, unroll, object=self._name
            )

    def reserve(self, actor: int, client: int, host: str, seconds: float) -> 'Reservation':
        """Has a client be the only one that is an actor for a while, unless another one is.

        Args:
          actor: its number.
          client: who wants to be it, i64; may ask again at any time.
          host: where it runs, for those who come in vain.
          seconds: from now, up to 3600; 0 gives the number back.

        Returns:
          Who is that actor.

        Raises:
          tf.errors.InvalidArgumentError: these make no sense.
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
        """Makes unrolls of policies up to this version, i64 scalar, valid.

        To be called before those weights are published: actors may be fast.
        """
        with tf.device('/cpu:0'):
            return _ops.unroll_inbox_set_latest_version(version, object=self._name)

    def statistics(self) -> InboxStatistics:
        """Returns who has sent what so far, and how full the queue is."""
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
        """Fails whoever waits, here and elsewhere; what is queued is gone. May be called again."""
        _ops.unroll_inbox_close(object=self._name)


class WeightsBoard:
    """Weights that other processes may read whenever they like.

    All methods may be called from any thread, `publish` inside a `tf.function`, too.
    """

    def __init__(self, settings: str, name: str = BOARD):
        """Makes the board, without weights.

        Args:
          settings: text for the readers, such as what shapes the network.
          name: by which they find it.

        Raises:
          tf.errors.AlreadyExistsError: there is one of that name that is not closed.
        """
        self._name = name
        with tf.device('/cpu:0'):
            _ops.weights_board(settings, object=name)

    def publish(
        self, weights: Sequence[tf.Tensor | tf.Variable], version: tf.Tensor
    ) -> tf.Operation | None:
        """Replaces the weights as a whole.

        Args:
          weights: on the CPU their values are shared, not copied: later assignments to a variable
            go to memory of its own.
          version: i64 scalar, learner updates behind them.
        """
        values = [tf.convert_to_tensor(weight) for weight in weights]
        with tf.device('/cpu:0'):
            return _ops.weights_board_publish(version, values, object=self._name)

    def version(self) -> tuple[int, bool]:
        """Returns the last version, -1 before the first, and whether it will stay the last."""
        version, finished = _ops.weights_board_version(object=self._name)
        return int(version), bool(finished)

    def read(self, specs: Sequence[tf.TensorSpec]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the last version, i64 scalar, and its weights.

        Args:
          specs: of the weights.

        Raises:
          tf.errors.InvalidArgumentError: the weights are not of these shapes and types.
          tf.errors.NotFoundError: none have been published yet.
        """
        return _ops.weights_board_read(
            object=self._name,
            types=[spec.dtype for spec in specs],
            shapes=[spec.shape for spec in specs],
        )

    def finish(self) -> None:
        """Tells readers that training has come to its end."""
        _ops.weights_board_finish(object=self._name)

    def close(self) -> None:
        """Fails readers from now on and lets go of the weights. May be called again."""
        _ops.weights_board_close(object=self._name)
