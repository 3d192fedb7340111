"""The jobs of a run on several machines, as far as they talk to each other.

The learner runs TensorFlow's own server, an actor job is a client of it: it sends a graph once, and
runs it with an unroll to be fed or weights to be fetched. Nothing listens on the actor's machine.
A replay job runs such a server, too, and the learner is a client of that. This module alone knows
of sessions and servers; what the graphs find in the server's process is
`impala.cluster.exchange`.

TensorFlow's server knows no authentication and listens on all interfaces: whoever reaches its port
may run anything in that process.
"""

import contextlib
import ctypes
import errno
import secrets
import socket
import textwrap
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from dynamic_batching.op_library import load_ops
from impala.cluster.exchange import BOARD, INBOX, Reservation
from impala.config import split_address
from impala.trajectory import UnrollArray

_ops = load_ops('impala.cluster')

_JOB = 'learner'
# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_DEVICE = f'/job:{_JOB}/task:0/device:CPU:0'
_LONGEST_SENTENCE = 300
# For a number to be given back, before a connection is closed without that.
_RELEASE_MS = 1000
# For a connection to be accepted, before TensorFlow makes one.
_PROBE_SECONDS = 3.0

AnyConnection = TypeVar('AnyConnection', bound='Connection')


class RemoteError(Exception):
    """A call between two jobs that failed; its text is one sentence."""


class Disconnected(RemoteError):
    """The other end does not answer, or is a new one; the call may be repeated."""


class Rejected(RemoteError):
    """The other end refuses this unroll, or these weights are not the network's."""


class WrongPeer(RemoteError):
    """What answers is no job of the kind that is wanted."""


class Closed(RemoteError):
    """The connection was closed at this end."""


class ServerError(RemoteError):
    """A job cannot listen."""


class Server:
    """Lets other machines run graphs in this process.

    TensorFlow cannot stop a server: the port stays open until the process ends, whatever becomes of
    this object, and a process can listen on an address once only.

    Attributes:
      port: on which it listens.
    """

    _kind = 'job'

    def __init__(self, address: str):
        """Starts the server.

        Args:
          address: `host:port`; port 0 is a free one. TensorFlow listens on all interfaces, whatever
            the host.

        Raises:
          ServerError: the address makes no sense or is in use.
        """
        host, port = split_address(address)
        _keep_memory()
        # Before the server: whichever comes first settles the sizes of thread pools that both use.
        tf.config.list_logical_devices()
        config = tf.compat.v1.ConfigProto(device_count={'GPU': 0})
        try:
            server = tf.distribute.Server(
                {_JOB: [f'{host}:{port}']}, job_name=_JOB, task_index=0, config=config
            )
        except tf.errors.OpError as error:
            raise ServerError(
                f'The {self._kind} cannot listen on {address}: '
                f'{"another process does" if is_in_use(port) else _sentence(error)}.'
            ) from error
        self.port = split_address(server.target.removeprefix('grpc://'))[1]


class LearnerServer(Server):
    """The learner's."""

    _kind = 'learner'


class ReplayServer(Server):
    """That of a replay job."""

    _kind = 'replay job'


class Status(NamedTuple):
    """What the learner has on show.

    Attributes:
      version: learner updates behind the weights, -1 while there are none.
      finished: whether training has come to its end.
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


class Connection:
    """A client's end of the line to a server, of which it wants what an actor wants of the learner.

    It connects with the first call and, after `Disconnected`, with the next one; no call hangs,
    though it may take the system a while to look up a name. It may be closed by any thread; the
    other methods may be called from several threads, but unrolls have an order.
    """

    _kind = 'job'

    def __init__(
        self,
        address: str,
        components: Sequence[UnrollArray] = (),
        weights: Sequence[tf.TensorSpec] = (),
        deadline_seconds: float = 10.0,
        inbox: str = INBOX,
        board: str = BOARD,
    ):
        """Prepares the graphs that the learner will run.

        Args:
          address: of the learner, `host:port`.
          components: what an unroll consists of, as the learner's inbox has it; without them there
            is no `put`.
          weights: shapes and dtypes of the network's weights; without them there is no `weights`.
          deadline_seconds: after which a call to a learner that does not answer has failed.
          inbox: name of the learner's `UnrollInbox`.
          board: name of the learner's `WeightsBoard`.

        Raises:
          ServerError: the address makes no sense.
        """
        split_address(address)
        self.address = address
        self._peer = f'The {self._kind} at {address}'
        # Of this process and object, so that the learner knows an unroll that comes twice.
        self.client = secrets.randbits(62)
        self._components = list(components)
        self._inbox = inbox
        self._deadline_ms = round(deadline_seconds * 1000)
        self._session: tf.compat.v1.Session | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._graph = tf.Graph()
        with self._graph.as_default(), tf.device(_DEVICE):
            self._settings = _ops.weights_board_settings(object=board)
            self._status = _ops.weights_board_version(object=board)
            # Only what is asked for: an actor of another version shall get as far as the settings.
            if weights:
                self._weights = _ops.weights_board_read(
                    object=board,
                    types=[spec.dtype for spec in weights],
                    shapes=[spec.shape for spec in weights],
                )
            if components:
                self._actor = tf.compat.v1.placeholder(tf.int32, [])
                self._level = tf.compat.v1.placeholder(tf.string, [])
                self._notes = tf.compat.v1.placeholder(tf.string, [])
                self._sequence = tf.compat.v1.placeholder(tf.int64, [])
                # Without shapes: it is the learner who judges them.
                self._unroll = [
                    tf.compat.v1.placeholder(component.dtype) for component in components
                ]
                accepted = _ops.unroll_inbox_put(
                    self._actor,
                    socket.gethostname(),
                    self._level,
                    self._notes,
                    tf.constant(self.client, tf.int64),
                    self._sequence,
                    self._unroll,
                    object=inbox,
                )
                with tf.control_dependencies([accepted]):
                    self._put = _ops.weights_board_version(object=board)
            self._build()
        self._graph.finalize()

    def settings(self) -> str:
        """Returns the text that the learner has for its actors.

        Raises:
          WrongPeer: what is there is no learner.
          Disconnected, Closed: see there.
        """
        return self._run(self._settings).decode()

    def status(self) -> Status:
        """Returns the version of the learner's weights.

        Raises:
          Disconnected, Closed: see there.
        """
        version, finished = self._run(self._status)
        return Status(int(version), bool(finished))

    def weights(self) -> Weights:
        """Reads the learner's weights.

        Raises:
          Disconnected: also as long as there are no weights.
          Rejected: they are not of the shapes and types that were given.
          Closed: see there.
        """
        version, values = self._run(self._weights)
        return Weights(int(version), values)

    def put(
        self, unroll: Sequence[Any], actor: int, level: str, sequence: int, notes: str = ''
    ) -> Status:
        """Sends an unroll and waits until it is in the learner's queue.

        It waits for room in the queue for as long as the learner answers.

        Args:
          unroll: the components. Eager tensors, and views of them, are serialized from where they
            are; NumPy's own arrays and what `.numpy()` returns are copied first, because they are
            not aligned as TensorFlow wants it.
          actor: the number of the actor.
          level: what it plays.
          sequence: greater than that of the unroll before. The same unroll has the same number when
            it is sent again, since it may be the answer that was lost.
          notes: what else the learner may like to know of the actor; at most 4,096 bytes.

        Returns:
          The learner's status at that moment; once it has finished, it takes no more unrolls.

        Raises:
          Rejected: the unroll is not as the learner wants it.
          Disconnected: it may be in the queue or not. Also while a learner ends that has not
            finished, and so may come back.
          Closed: see there.
        """
        feeds: dict[tf.Tensor, Any] = {
            self._actor: actor,
            self._level: level,
            self._sequence: sequence,
            self._notes: notes,
        }
        for component, placeholder, value in zip(
            self._components, self._unroll, unroll, strict=True
        ):
            array = np.asarray(value)
            if array.dtype != placeholder.dtype.as_numpy_dtype:
                # A session would convert it in silence.
                raise Rejected(
                    f"unroll of actor {actor} refused: component '{component.name}' is "
                    f'{array.dtype}, not {component.dtype}'
                )
            feeds[placeholder] = array
        while True:
            try:
                version, finished = self._run(self._put, feeds)
                return Status(int(version), bool(finished))
            except _DeadlineExceeded:
                # No room in the queue, or no learner?
                self.status()
            except _Ending:
                # Because all is done, or only for now?
                status = self.status()
                if not status.finished:
                    raise
                return status

    def close(self) -> None:
        """Ends the connection; calls that other threads wait for fail with `Closed`."""
        with self._lock:
            self._closed = True
            session = self._session
        if session is not None:
            self._discard(session)

    def __enter__(self: AnyConnection) -> AnyConnection:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def _build(self) -> None:
        """Adds to the graph what a class of its own has."""

    def _run(self, fetches: Any, feeds: dict[tf.Tensor, Any] | None = None) -> Any:
        session = self._connect()
        try:
            return session.run(
                fetches, feeds, tf.compat.v1.RunOptions(timeout_in_ms=self._deadline_ms)
            )
        except tf.errors.InvalidArgumentError as error:
            raise Rejected(_sentence(error)) from error
        except tf.errors.DeadlineExceededError as error:
            if feeds is None:
                self._discard(session)
            raise _DeadlineExceeded(f'{self._peer} does not answer.') from error
        except (tf.errors.OpError, RuntimeError) as error:
            # RuntimeError: the session was closed meanwhile.
            self._discard(session)
            if self._closed:
                raise self._closed_error() from error
            sentence = _sentence(error)
            if isinstance(error, tf.errors.NotFoundError) and _is_wrong_peer(sentence):
                raise WrongPeer(
                    f'What listens at {self.address} is no {self._kind} of this program.'
                ) from error
            if sentence.endswith('is closed'):
                raise _Ending(f'{self._peer} is ending: {sentence}.') from error
            raise Disconnected(f'{self._peer} is not there: {sentence}.') from error

    def _connect(self) -> tf.compat.v1.Session:
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._session is not None:
                return self._session
        try:
            _probe(self.address, min(_PROBE_SECONDS, self._deadline_ms / 1000))
        except OSError as error:
            if self._closed:
                raise self._closed_error() from error
            reason = error.strerror or str(error)
            raise Disconnected(f'{self._peer} is not there: {reason}.') from error
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._session is None:
                config = tf.compat.v1.ConfigProto(operation_timeout_in_ms=self._deadline_ms)
                # A connection of its own: one that the network has swallowed is not found dead
                # before minutes have passed, and would be used again.
                config.rpc_options.disable_session_connection_sharing = True
                config.rpc_options.use_rpc_for_inprocess_master = True
                # A handful of operations: there is nothing to optimize.
                config.graph_options.rewrite_options.disable_meta_optimizer = True
                self._session = _Session(f'grpc://{self.address}', graph=self._graph, config=config)
            return self._session

    def _closed_error(self) -> Closed:
        return Closed(f'The connection to the {self._kind} at {self.address} is closed.')

    def _discard(self, session: tf.compat.v1.Session) -> None:
        """Lets go of a session without waiting for a learner that may not be there."""
        with self._lock:
            if self._session is session:
                self._session = None
        # No daemon: one that returns from TensorFlow while Python ends takes the process down with
        # it. The process ends at most a deadline later for that.
        threading.Thread(target=_close, args=(session,)).start()


class LearnerConnection(Connection):
    """An actor job's end of the line to the learner."""

    _kind = 'learner'
    _reserved_actor: int | None = None

    def reserve(self, actor: int, seconds: float) -> Reservation:
        """Makes a number that of this job alone, until so many seconds from now or its end.

        Returns:
          Who has it: this job, or another one that asked before.

        Raises:
          Disconnected, Closed: see there.
        """
        holder = Reservation.of(*self._run(self._reserve, self._reservation(actor, seconds)))
        if holder.is_own:
            self._reserved_actor = actor
        return holder

    def close(self) -> None:
        """Gives the number back, if the learner is there to take it, and ends the connection."""
        with self._lock:
            session, actor = self._session, self._reserved_actor
            self._reserved_actor = None
        if session is not None and actor is not None:
            options = tf.compat.v1.RunOptions(timeout_in_ms=_RELEASE_MS)
            with contextlib.suppress(tf.errors.OpError, RuntimeError):
                session.run(self._reserve, self._reservation(actor, 0), options)
        super().close()

    def _build(self) -> None:
        if self._components:
            self._seconds = tf.compat.v1.placeholder(tf.float64, [])
            self._reserve = _ops.unroll_inbox_reserve(
                self._actor,
                tf.constant(self.client, tf.int64),
                socket.gethostname(),
                self._seconds,
                object=self._inbox,
            )

    def _reservation(self, actor: int, seconds: float) -> dict[tf.Tensor, Any]:
        return {self._actor: actor, self._seconds: seconds}


class ReplayConnection(Connection):
    """A learner's end of the line to a replay job."""

    _kind = 'replay job'

    def __init__(self, *args: Any, outbox: str = '', num_taken: int = 1, **kwargs: Any):
        """Prepares the graphs that the replay job will run.

        Args:
          *args: as of `Connection`.
          outbox: name of the job's `UnrollInbox` out of which unrolls are taken, which are of the
            given components; without it there is no `take`.
          num_taken: unrolls that are taken at once, N.
          **kwargs: as of `Connection`.

        Raises:
          ServerError: the address makes no sense.
        """
        self._outbox = outbox
        self._num_taken = num_taken
        super().__init__(*args, **kwargs)

    def take(self) -> list[np.ndarray]:
        """Waits for N unrolls; returns their components, `[N, ...]`, or time-major `[T+1, N, ...]`.

        Raises:
          Disconnected: also if there are not so many in time.
          Closed: see there.
        """
        return self._run(self._taken)

    def _build(self) -> None:
        if self._outbox:
            self._taken = _ops.unroll_inbox_take(
                object=self._outbox,
                batch_size=self._num_taken,
                types=[tf.as_dtype(component.dtype) for component in self._components],
                shapes=[list(component.shape) for component in self._components],
                time_major=[component.time_major for component in self._components],
            ).components


class _DeadlineExceeded(Disconnected):
    """It did not answer in time."""


class _Ending(Disconnected):
    """It takes no more unrolls."""


def _is_wrong_peer(sentence: str) -> bool:
    """Whether a server says that it lacks what the jobs of that kind have from their start."""
    return sentence.endswith('does not exist') or sentence.startswith('Op type not registered')


def _close(session: tf.compat.v1.Session) -> None:
    with contextlib.suppress(tf.errors.OpError):
        session.close()


def _probe(address: str, seconds: float = _PROBE_SECONDS) -> None:
    """Returns if somebody listens there: a session tries until its deadline, also if nobody does.

    Raises:
      OSError: nobody does.
    """
    host, port = split_address(address)
    try:
        socket.create_connection((host.strip('[]'), port), seconds).close()
    except UnicodeError as error:  # An empty part of the name, for one.
        raise OSError(f"'{host}' is no name of a machine ({error})") from error


def _keep_memory() -> None:
    """Has the C library keep what is freed for the unrolls that come next.

    By default it gives large blocks back to the system, and the page faults of mapping them anew
    cost as much as receiving an unroll. Without effect where the C library is not GNU's.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def is_in_use(port: int) -> bool:
    """Returns whether a process of this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class _Session(tf.compat.v1.Session):
    """A session that leaves the messages of errors as they are, and ends at once if it is alone.

    TensorFlow looks for names of operations in them, in a time that grows with the square of their
    length, and some hold the whole request: an unroll that a broken connection has delivered twice
    is an error of a megabyte, on which a job spent hours.
    """

    _closed: bool

    def close(self) -> None:
        """Ends the session, at both ends if there is still another."""
        if not self._closed:
            try:
                _probe(tf.compat.as_str(self.sess_str).removeprefix('grpc://'))
            except OSError:
                self._closed = True
        super().close()

    def _do_call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)


def _sentence(error: Exception) -> str:
    """What the learner has to say, but for the data that it may have put into it."""
    message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    # Only the start of it: all of it may be long.
    lines = [
        line for line in message[:2000].splitlines() if line and not line.startswith('From /job:')
    ]
    if not lines:
        return type(error).__name__
    return textwrap.shorten(lines[0].rstrip('.'), _LONGEST_SENTENCE, placeholder=' ...')


def warn_of_network(port: int, report: Callable[[str], None]) -> None:
    """Says that a process that listens can be reached, unless this machine has loopback only."""
    if any(name != 'lo' for _, name in socket.if_nameindex()):
        report(
            f'WARNING: whoever reaches port {port} of this machine can run code in this process: '
            'see docs/distributed.md, then say --trusted_network.'
        )
