"""What a learner offers its actor jobs, and an actor job's end of it.

Five functions can be called: `settings`, `status`, `weights`, `reserve` a number, and `put` an
unroll. All but `put` are answered at once; `put` when the unroll is in the learner's queue.
"""

import contextlib
import re
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from impala.cluster.calls import Client, Function, Refused, Server, argument
from impala.cluster.channel import (
    Buffer,
    Disconnected,
    Rejected,
    RemoteError,
    Values,
    printable,
)
from impala.cluster.compression import Compressor, decompress
from impala.cluster.exchange import Reservation, UnrollInbox
from impala.cluster.unroll_format import UnrollFormat
from impala.cluster.weights_format import WeightsFormat
from impala.trajectory import ArraySpec, UnrollArray

KIND = 'learner'
# How long closing a connection waits for the learner to release the actor's number.
_RELEASE_SECONDS = 1.0


class Status(NamedTuple):
    """The state of the learner.

    Attributes:
      version: learner updates behind the published weights, -1 before the first ones.
      finished: whether training is complete.
    """

    version: int
    finished: bool


class Weights(NamedTuple):
    """Weights of the network.

    Attributes:
      version: learner updates behind them.
      values: in the order in which the learner published them.
    """

    version: int
    values: list[np.ndarray]


class LearnerService:
    """The learner's end.

    Attributes:
      port: port on which the learner listens.
    """

    def __init__(
        self,
        address: str,
        inbox: UnrollInbox,
        settings: Values,
        secret: bytes | None,
        report: Callable[[str], None],
    ):
        """Starts to listen.

        Args:
          address: see `Server`.
          inbox: takes the unrolls. Close it before this object.
          settings: JSON-serializable settings for the actor jobs.
          secret: see `Server`.
          report: see `Server`.

        Raises:
          ServerError: the address is in use or invalid.
        """
        self._inbox = inbox
        self._settings = settings
        self._published: tuple[int, Sequence[tf.Tensor]] = (-1, ())
        # Of the weights that were read last, as bfloat16 or not.
        self._buffers: dict[bool, tuple[int, list[np.ndarray]]] = {}
        self._finished = False
        functions = {
            'settings': Function(lambda values, body: (self._settings, ())),
            'status': Function(lambda values, body: (self.status()._asdict(), ())),
            'weights': Function(self._weights),
            'reserve': Function(self._reserve),
            'put': Function(self._put, inbox.max_nbytes),
        }
        self._server = Server(address, functions, KIND, secret, report)
        self.port = self._server.port

    def publish(self, version: int, weights: Sequence[tf.Tensor]) -> None:
        """Replaces all weights at once.

        Args:
          version: learner updates behind them.
          weights: values in the memory of the CPU; shared, not copied.
        """
        self._published = version, weights

    def status(self) -> Status:
        """Returns the latest version, and whether it is final."""
        return Status(self._published[0], self._finished)

    def finish(self) -> None:
        """Tells the actor jobs that training is complete."""
        self._finished = True

    def close(self) -> None:
        """Ends all connections."""
        self._server.close()

    def _weights(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        version, weights = self._published
        if version < 0:
            raise Disconnected('it has no weights yet')
        as_bfloat16 = argument(values, 'bfloat16', bool)
        theirs = [
            ''.join(map(str, spec)) if isinstance(spec, list) else str(spec)
            for spec in argument(values, 'specs', list)
        ]
        own = [f'{weight.dtype.name}{[*weight.shape]}' for weight in weights]
        if len(theirs) != len(own):
            raise Refused(f'the network has {len(own)} weights, not {len(theirs)}')
        for i, (one, other) in enumerate(zip(own, theirs, strict=True)):
            if one != other:
                raise Refused(f'weight {i} of the network is {one}, not {other}')
        laid_out, buffers = self._buffers.get(as_bfloat16, (-1, []))
        if laid_out != version:
            specs = [ArraySpec(tuple(weight.shape), weight.dtype.name) for weight in weights]
            buffers = WeightsFormat(specs, as_bfloat16).buffers(weights)
            self._buffers[as_bfloat16] = version, buffers
        return {'version': version}, buffers

    def _reserve(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        actor, client, host = _who(values)
        if not 0 <= actor < 1 << 31:
            raise Refused(f'an actor cannot have the number {actor}')
        try:
            holder = self._inbox.reserve(actor, client, host, argument(values, 'seconds', float))
        except tf.errors.InvalidArgumentError as error:
            raise Refused(_reason(error)) from error
        except tf.errors.CancelledError as error:
            raise Disconnected('it is ending') from error
        return holder._asdict(), ()

    def _put(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        actor, client, host = _who(values)
        level, notes = argument(values, 'level', str), argument(values, 'notes', str)
        sequence = argument(values, 'sequence', int)
        try:
            if argument(values, 'is_compressed', bool):
                body = decompress(body, self._inbox.max_nbytes)
            self._inbox.put(body, actor, client, sequence, host, printable(level), notes)
        except tf.errors.InvalidArgumentError as error:
            raise Refused(_reason(error)) from error
        except ValueError as error:
            raise Refused(str(error)) from error
        except tf.errors.CancelledError as error:
            # Either training is complete or the learner is shutting down early.
            if not self._finished:
                raise Disconnected('it is ending') from error
        return self.status()._asdict(), ()


def _who(values: Values) -> tuple[int, int, str]:
    """Returns actor, client and host of a call; the names of hosts appear in logs."""
    host = printable(argument(values, 'host', str))
    return argument(values, 'actor', int), argument(values, 'client', int), host


def _reason(error: tf.errors.OpError) -> str:
    """Returns the message of an op without the names that TensorFlow puts around it."""
    return re.sub(r'^\{\{.*?\}\} | \[Op:.*', '', error.message)


class LearnerConnection:
    """An actor job's end. A context manager.

    It connects on the first call and, after `Disconnected`, again on the next one. No call hangs,
    although looking up a host name may take the system a while. All methods are thread-safe, but
    unrolls must be put in order. They have a connection of their own, so that the other calls need
    not wait until there is room in the queue.
    """

    def __init__(
        self,
        address: str,
        components: Sequence[UnrollArray] = (),
        weights: Sequence[tf.TensorSpec] = (),
        *,
        stack: str | None = None,
        compression: str = 'auto',
        bfloat16_weights: bool = False,
        secret: bytes | None = None,
        deadline_seconds: float = 10.0,
    ):
        """Does not connect yet.

        Args:
          address: the learner's address, `host:port`.
          components: the arrays of an unroll, as in the learner's inbox; `put` needs them.
          weights: shapes and dtypes of the network's weights; `weights` needs them.
          stack: see `UnrollFormat`.
          compression: of unrolls, see `Compressor`.
          bfloat16_weights: see `WeightsFormat`.
          secret: the secret of the run; None without one.
          deadline_seconds: see `Client`.

        Raises:
          ConfigError: the address is invalid.
        """
        self.address = address
        self._data = Client(address, KIND, secret, deadline_seconds)
        self._control = Client(address, KIND, secret, deadline_seconds)
        self._format = UnrollFormat(components, stack) if components else None
        self._compressor = Compressor(compression)
        self._specs = [ArraySpec(tuple(spec.shape), spec.dtype.name) for spec in weights]
        self._bfloat16 = bfloat16_weights
        self._weights_format = WeightsFormat(self._specs, bfloat16_weights)
        # Identifies this object, so that the learner recognizes an unroll that arrives twice.
        self._client = secrets.randbits(62)
        self._reserved_actor: int | None = None

    def __enter__(self) -> 'LearnerConnection':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def settings(self) -> Values:
        """Returns the settings that the learner publishes for its actors.

        Raises:
          WrongPeer, WrongSecret, Disconnected, Closed: see `Client.call`.
        """
        return self._control.call('settings')[0]

    def status(self) -> Status:
        """Returns the version of the learner's weights and whether training is complete.

        Raises:
          WrongPeer, WrongSecret, Disconnected, Closed: see `Client.call`.
        """
        return Status(**self._control.call('status')[0])

    def weights(self) -> Weights:
        """Reads the learner's weights.

        Raises:
          Disconnected: see `Client.call`; also raised before any weights are published.
          Rejected: the weights do not have the given shapes and dtypes.
          WrongPeer, WrongSecret, Closed: see `Client.call`.
        """
        values = {
            'specs': [(spec.dtype, spec.shape) for spec in self._specs],
            'bfloat16': self._bfloat16,
        }
        layout = self._weights_format
        answer, body = self._control.call('weights', values, max_bytes=layout.nbytes)
        return Weights(answer['version'], layout.weights(body))

    def put(
        self, unroll: Sequence[Any], actor: int, level: str, sequence: int, notes: str = ''
    ) -> Status:
        """Sends an unroll and waits until it is in the learner's queue.

        It waits for room in the queue for as long as the learner answers.

        Args:
          unroll: the arrays.
          actor: the actor's number.
          level: the level that it plays.
          sequence: greater than that of the previous unroll. An unroll that is sent again keeps its
            number, since perhaps only the answer was lost.
          notes: further information on the actor for the learner; at most 4,096 bytes.

        Returns:
          The learner's status when the unroll was queued. A learner that has finished accepts no
          more unrolls.

        Raises:
          Rejected: the learner rejects the unroll.
          Disconnected: the unroll may or may not be in the queue. Also raised while a learner shuts
            down before training is complete, since it may come back.
          WrongPeer, WrongSecret, Closed: see `Client.call`.
        """
        assert self._format is not None
        try:
            arrays = self._format.buffers([np.asarray(array) for array in unroll])
        except ValueError as error:
            raise Rejected(f'unroll of actor {actor} refused: {error}') from error
        buffers, is_compressed = self._compressor.compress(arrays)
        values = self._who(actor) | {'level': level, 'notes': notes, 'sequence': sequence}
        values['is_compressed'] = is_compressed
        answer, _ = self._data.call('put', values, buffers)
        return Status(**answer)

    def reserve(self, actor: int, seconds: float) -> Reservation:
        """Reserves an actor number for this job.

        Args:
          actor: the number.
          seconds: how long the reservation lasts from now; `close` ends it early.

        Returns:
          The holder of the number: this job, or another one that reserved it earlier.

        Raises:
          WrongPeer, WrongSecret, Disconnected, Closed: see `Client.call`.
        """
        answer, _ = self._control.call('reserve', self._who(actor) | {'seconds': seconds})
        holder = Reservation(**answer)
        if holder.is_own:
            self._reserved_actor = actor
        return holder

    def close(self) -> None:
        """Releases the reserved number if the learner answers, and closes the connection.

        Pending calls of other threads fail with `Closed`.
        """
        self._data.close()
        actor, self._reserved_actor = self._reserved_actor, None
        if actor is not None:
            # Not a daemon: it must end before the process does. The learner may not answer.
            release = threading.Thread(target=self._release, args=(actor,))
            release.start()
            release.join(_RELEASE_SECONDS)
        self._control.close()

    def _release(self, actor: int) -> None:
        # Otherwise the reservation expires by itself.
        with contextlib.suppress(RemoteError):
            self.reserve(actor, 0)

    def _who(self, actor: int) -> Values:
        return {'actor': actor, 'client': self._client, 'host': socket.gethostname()}
