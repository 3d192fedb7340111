"""How the learner and actor jobs on other machines communicate.

The learner runs TensorFlow's own server and each actor job is a client: it sends a graph once, then
runs it to feed an unroll or to fetch weights. Nothing listens on the actor's machine. Only this
module uses sessions and servers; the objects that the graphs access in the server's process are in
`impala.cluster.exchange`.

TensorFlow's server has no authentication and listens on all interfaces: whoever reaches its port
can run any code in that process.
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
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_DEVICE = f'/job:{_JOB}/task:0/device:CPU:0'
_LONGEST_SENTENCE = 300
# How long closing a connection waits for the learner to release the actor's number.
_RELEASE_MS = 1000
# How long a probe waits for the peer to accept a connection.
_PROBE_SECONDS = 3.0

AnyConnection = TypeVar('AnyConnection', bound='Connection')


class RemoteError(Exception):
    """A call between two jobs failed; the text is one sentence."""


class Disconnected(RemoteError):
    """The other end does not answer or has restarted; the call may be repeated."""


class Rejected(RemoteError):
    """The other end rejects this unroll, or its weights do not fit the network."""


class WrongPeer(RemoteError):
    """The process that answers is not a job of the expected kind."""


class Closed(RemoteError):
    """The connection was closed at this end."""


class ServerError(RemoteError):
    """A job cannot listen."""


class Server:
    """Lets other machines run graphs in this process.

    TensorFlow cannot stop a server: the port stays open until the process ends, even if this object
    is deleted, and a process can listen on an address only once.

    Attributes:
      port: port on which it listens.
    """

    _kind = 'job'

    def __init__(self, address: str):
        """Starts the server.

        Args:
          address: `host:port`; port 0 selects a free one. TensorFlow listens on all interfaces,
            whatever the host.

        Raises:
          ServerError: the address is invalid or in use.
        """
        host, port = split_address(address)
        _keep_memory()
        # Must precede the server: whichever comes first sets the size of the shared thread pools.
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
    """The learner's server."""

    _kind = 'learner'


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


class Connection:
    """The client's end of a connection to a server that has an inbox and a board.

    It connects on the first call and, after `Disconnected`, again on the next one. No call hangs,
    although looking up a host name may take the system a while. Any thread may close it. The other
    methods are thread-safe too, but unrolls must be put in order.
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
        """Builds the graphs that the learner will run.

        Args:
          address: the learner's address, `host:port`.
          components: the arrays of an unroll, as in the learner's inbox; `put` needs them.
          weights: shapes and dtypes of the network's weights; `weights` needs them.
          deadline_seconds: seconds after which a call fails if the learner does not answer.
          inbox: name of the learner's `UnrollInbox`.
          board: name of the learner's `WeightsBoard`.

        Raises:
          ServerError: the address is invalid.
        """
        split_address(address)
        self.address = address
        self._peer = f'The {self._kind} at {address}'
        # Identifies this object, so that the learner recognizes an unroll that arrives twice.
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
            # Only what is needed: an actor of another version must still be able to read the
            # settings.
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
                # Without shapes: the learner checks them.
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
        """Returns the settings that the learner publishes for its actors.

        Raises:
          WrongPeer: the process at the address is not a learner.
          Disconnected, Closed: see there.
        """
        return self._run(self._settings).decode()

    def status(self) -> Status:
        """Returns the version of the learner's weights and whether training is complete.

        Raises:
          Disconnected, Closed: see there.
        """
        version, finished = self._run(self._status)
        return Status(int(version), bool(finished))

    def weights(self) -> Weights:
        """Reads the learner's weights.

        Raises:
          Disconnected: see there; also raised before any weights are published.
          Rejected: the weights do not have the given shapes and dtypes.
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
          unroll: the arrays. Eager tensors and views of them are serialized in place; NumPy's own
            arrays and the results of `.numpy()` are copied first, because they lack the alignment
            that TensorFlow needs.
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
                # A session would convert it silently.
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
                # Either the queue is full, or the learner is gone and this call raises.
                self.status()
            except _Ending:
                # Either training is complete or the learner is shutting down early.
                status = self.status()
                if not status.finished:
                    raise
                return status

    def close(self) -> None:
        """Closes the connection; pending calls of other threads fail with `Closed`."""
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
        """Adds the operations of a subclass to the graph."""

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
            # RuntimeError: another thread has closed the session.
            self._discard(session)
            if self._closed:
                raise self._closed_error() from error
            sentence = _sentence(error)
            if isinstance(error, tf.errors.NotFoundError) and _is_wrong_peer(sentence):
                raise WrongPeer(
                    f'What listens at {self.address} is not a {self._kind} of this program.'
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
                # Do not share connections: TensorFlow takes minutes to notice that one is dead and
                # would reuse it until then.
                config.rpc_options.disable_session_connection_sharing = True
                config.rpc_options.use_rpc_for_inprocess_master = True
                # The graph has a handful of operations: nothing to optimize.
                config.graph_options.rewrite_options.disable_meta_optimizer = True
                self._session = _Session(f'grpc://{self.address}', graph=self._graph, config=config)
            return self._session

    def _closed_error(self) -> Closed:
        return Closed(f'The connection to the {self._kind} at {self.address} is closed.')

    def _discard(self, session: tf.compat.v1.Session) -> None:
        """Closes a session in the background, since the learner may not answer."""
        with self._lock:
            if self._session is session:
                self._session = None
        # Not a daemon: a daemon thread that returns from TensorFlow while Python shuts down crashes
        # the process. The price is that the process may end one deadline later.
        threading.Thread(target=_close, args=(session,)).start()


class LearnerConnection(Connection):
    """An actor job's end of its connection to the learner."""

    _kind = 'learner'
    _reserved_actor: int | None = None

    def reserve(self, actor: int, seconds: float) -> Reservation:
        """Reserves an actor number for this job.

        Args:
          actor: the number.
          seconds: how long the reservation lasts from now; `close` ends it early.

        Returns:
          The holder of the number: this job, or another one that reserved it earlier.

        Raises:
          Disconnected, Closed: see there.
        """
        holder = Reservation.of(*self._run(self._reserve, self._reservation(actor, seconds)))
        if holder.is_own:
            self._reserved_actor = actor
        return holder

    def close(self) -> None:
        """Releases the reserved number if the learner answers, and closes the connection."""
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


class _DeadlineExceeded(Disconnected):
    """The other end did not answer in time."""


class _Ending(Disconnected):
    """The other end accepts no more unrolls."""


def _is_wrong_peer(sentence: str) -> bool:
    """Returns whether a server's error says that it lacks the ops or objects of the wanted job."""
    return sentence.endswith('does not exist') or sentence.startswith('Op type not registered')


def _close(session: tf.compat.v1.Session) -> None:
    with contextlib.suppress(tf.errors.OpError):
        session.close()


def _probe(address: str, seconds: float = _PROBE_SECONDS) -> None:
    """Checks that a process listens at an address; a session would try until its deadline.

    Raises:
      OSError: no process listens there.
    """
    host, port = split_address(address)
    try:
        socket.create_connection((host.strip('[]'), port), seconds).close()
    except UnicodeError as error:  # For instance, a part of the name is empty.
        raise OSError(f"'{host}' is not the name of a machine ({error})") from error


def _keep_memory() -> None:
    """Makes the C library keep freed memory for the next unrolls.

    By default it returns large blocks to the system, and the page faults of mapping them again cost
    as much as receiving an unroll. This has no effect unless the C library is GNU's.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def is_in_use(port: int) -> bool:
    """Returns whether a process on this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class _Session(tf.compat.v1.Session):
    """A session that does not parse error messages and closes at once if its peer is gone.

    TensorFlow searches error messages for names of operations, in time quadratic in their length.
    Some messages contain the whole request, such as an unroll of a megabyte that a broken
    connection delivered twice; parsing one of them takes hours.
    """

    _closed: bool

    def close(self) -> None:
        """Closes the session, also at the other end if that still listens."""
        if not self._closed:
            try:
                _probe(tf.compat.as_str(self.sess_str).removeprefix('grpc://'))
            except OSError:
                self._closed = True
        super().close()

    def _do_call(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)


def _sentence(error: Exception) -> str:
    """Returns the first line of an error message, shortened."""
    message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    # The message may contain a whole request.
    lines = [
        line for line in message[:2000].splitlines() if line and not line.startswith('From /job:')
    ]
    if not lines:
        return type(error).__name__
    return textwrap.shorten(lines[0].rstrip('.'), _LONGEST_SENTENCE, placeholder=' ...')


def warn_of_network(port: int, report: Callable[[str], None]) -> None:
    """Reports that other machines can reach this process, unless it has only a loopback interface.

    Args:
      port: port on which the process listens.
      report: takes the warning.
    """
    if any(name != 'lo' for _, name in socket.if_nameindex()):
        report(
            f'WARNING: whoever reaches port {port} of this machine can run code in this process: '
            'see docs/distributed.md, then say --trusted_network.'
        )
