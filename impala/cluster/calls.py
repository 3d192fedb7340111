"""Calls of named functions between the jobs of a run.

A job that serves others has a `Server` with a table of functions; nothing else can be reached
through its port. Arguments and results are a JSON object and bytes, see `impala.cluster.channel`.
Neither this module nor `channel` uses TensorFlow.
"""

import contextlib
import ctypes
import errno
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from impala.cluster.channel import (
    Buffer,
    Channel,
    Closed,
    Disconnected,
    Rejected,
    RemoteError,
    ServerError,
    Silent,
    Values,
    WrongPeer,
    WrongSecret,
    accept,
    connect,
    printable,
)
from impala.config import split_address

# A client of a function that takes longer hears this often that the server is there.
_BUSY_SECONDS = 1.0
# The deadline of a server for the rest of a message.
_DEADLINE_SECONDS = 30.0
_MAX_CONNECTIONS = 1024
# Callers that have not greeted yet; one more replaces the oldest.
_MAX_NEWCOMERS = 256
# Strangers are reported at once, then no more often than this.
_REPORT_SECONDS = 600.0
_MAX_WARNINGS = 100
_JOIN_SECONDS = 10.0
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

T = TypeVar('T')


class Refused(Exception):
    """Raised by a function that rejects its arguments; the text is one sentence for the caller."""


class Function(NamedTuple):
    """A function that others may call.

    Attributes:
      call: takes the values and the body, u8 `[N]`, of a call, and returns those of the answer. It
        may keep the body, and may block: each connection has a thread of its own. May raise
        `Refused`, or `Disconnected` if the caller should try again later.
      max_bytes: greatest length of the body.
    """

    call: Callable[[Values, np.ndarray], tuple[Values, Sequence[Buffer]]]
    max_bytes: int = 0


class Server:
    """Answers calls. A context manager.

    Attributes:
      port: port on which it listens.
    """

    def __init__(
        self,
        address: str,
        functions: Mapping[str, Function],
        kind: str,
        secret: bytes | None,
        report: Callable[[str], None],
    ):
        """Starts to listen.

        Args:
          address: `host:port`. The name or address of the loopback interface makes it listen there
            only, any other host on all interfaces; port 0 selects a free port.
          functions: name -> function. A function may be replaced at any time, for instance by the
            same one for longer bodies.
          kind: kind of this job, for instance `'learner'`; at most 16 bytes.
          secret: the secret that callers must have; None to serve any caller.
          report: takes a line when a stranger was refused, and one when a function has failed.

        Raises:
          ServerError: the address is in use or invalid.
        """
        _keep_memory()
        self._max_connections = _max_connections()
        self._max_newcomers = max(1, min(_MAX_NEWCOMERS, self._max_connections // 4))
        self._functions = functions
        self._kind = kind
        self._secret = secret
        self._report = report
        self._listener = listen(address, kind)
        self.port: int = self._listener.getsockname()[1]
        # Guards everything below.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._newcomers: dict[socket.socket, str] = {}
        self._served: dict[_Served, None] = {}
        self._threads: set[threading.Thread] = set()
        self._warnings: dict[str, _Warning] = {}
        for target in (self._accept, self._tell_busy):
            self._start(target)

    def __enter__(self) -> 'Server':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections. Functions that block must end soon. May be called again."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._newcomers:
                _shut(connection)
            for served in self._served:
                served.channel.shut()
            threads = list(self._threads)
        ends_at = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, ends_at - time.monotonic()))

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        """Starts a thread; raises RuntimeError if the system has no more."""

        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=f'{self._kind} server', daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
            raise

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, (peer, *_) = self._listener.accept()
            except OSError as error:
                # For instance, there are too many open files.
                if not self._closed.wait(0.1):
                    self._warn(f'port {self.port} cannot take a connection: {error.strerror}')
                continue
            # IPv4 addresses come with a prefix on a socket of both.
            peer = peer.removeprefix('::ffff:')
            oldest = None
            with self._lock:
                is_full = len(self._served) >= self._max_connections
                if len(self._newcomers) >= self._max_newcomers:
                    oldest = next(iter(self._newcomers))
                    # Its thread ends without a report.
                    _shut(oldest)
                    oldest_peer = self._newcomers.pop(oldest)
                if not is_full:
                    self._newcomers[connection] = peer
            if oldest is not None:
                self._refuse('it says nothing', oldest_peer)
            if is_full:
                connection.close()
                self._refuse(f'there are {self._max_connections:,} already', peer)
                continue
            try:
                self._start(self._serve, connection, peer)
            except RuntimeError:
                with self._lock:
                    self._newcomers.pop(connection, None)
                connection.close()
                self._refuse('there is no room for another thread', peer)

    def _serve(self, connection: socket.socket, peer: str) -> None:
        """Greets a caller and answers its calls until one end closes the connection."""
        try:
            try:
                channel = accept(connection, self._kind, self._secret)
            finally:
                with self._lock:
                    self._newcomers.pop(connection, None)
            served = _Served(channel)
            with self._lock:
                if self._closed.is_set():
                    channel.close()
                    return
                self._served[served] = None
            try:
                channel.set_deadline(_DEADLINE_SECONDS)
                while True:
                    self._answer(served)
            finally:
                with self._lock:
                    del self._served[served]
                served.close()
        except (WrongPeer, WrongSecret) as error:
            self._refuse(str(error), peer)
        except (Disconnected, OSError):
            pass
        # For instance, there is no memory for a message.
        except Exception as error:
            self._warn(
                f'a connection to port {self.port} failed: {type(error).__name__}: {error}', peer
            )

    def _answer(self, served: '_Served') -> None:
        """Answers a call.

        Raises:
          RemoteError: the connection cannot be used further.
        """
        values, body = served.channel.receive(self._max_bytes, waits=True)
        name = values.pop('call')
        buffers: Sequence[Buffer] = ()
        with served.busy():
            try:
                answer, buffers = self._functions[name].call(values, body)
                answer = {'answer': answer}
            except Refused as error:
                answer = {'refused': printable(str(error))}
            except Disconnected as error:
                answer = {'later': str(error)}
            except Exception as error:
                # Without an answer, so that the caller tries again later.
                self._warn(f"call '{name}' failed: {type(error).__name__}: {error}")
                raise Disconnected('the function failed') from error
        del body
        with served.sending:
            served.channel.send(answer, buffers)

    def _max_bytes(self, values: Values) -> int:
        name = values.get('call')
        if not isinstance(name, str) or name not in self._functions:
            raise WrongPeer('it calls a function that does not exist')
        return self._functions[name].max_bytes

    def _tell_busy(self) -> None:
        """Tells clients that wait for a function that the server is there."""
        while not self._closed.wait(_BUSY_SECONDS):
            now = time.monotonic()
            with self._lock:
                served = [each for each in self._served if now - each.since > _BUSY_SECONDS]
            for each in served:
                each.tell_busy()

    def _refuse(self, reason: str, peer: str) -> None:
        """Reports that a connection was refused."""
        self._warn(f'connection to port {self.port} refused: {reason}', peer)

    def _warn(self, text: str, peer: str = '') -> None:
        """Reports a warning: the first time at once, then a count now and then."""
        # It may hold what a stranger has sent.
        text, now = printable(text), time.monotonic()
        with self._lock:
            if text not in self._warnings and len(self._warnings) >= _MAX_WARNINGS:
                return
            warning = self._warnings.setdefault(text, _Warning())
            warning.count += 1
            if now < warning.next_report:
                return
            count, warning.count, warning.next_report = warning.count, 0, now + _REPORT_SECONDS
        times = f' ({count:,} times since the last report)' if count > 1 else ''
        # Where nothing can be reported, the server must go on.
        with contextlib.suppress(Exception):
            self._report(f'WARNING: {text}{f" (from {peer})" if peer else ""}{times}')


class _Warning:
    """A warning that may be repeated.

    Attributes:
      count: times since the last report.
      next_report: time before which it is only counted.
    """

    def __init__(self) -> None:
        self.count = 0
        self.next_report = 0.0


class _Served:
    """A connection of a client.

    Attributes:
      channel: the connection.
      sending: held while something is sent.
      since: time at which the current call began; infinity without one.
    """

    def __init__(self, channel: Channel):
        self.channel = channel
        self.sending = threading.Lock()
        self.since = float('inf')

    @contextlib.contextmanager
    def busy(self):
        """Marks a call as being worked on during the block."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = float('inf')

    def tell_busy(self) -> None:
        """Tells the client that its call is being worked on."""
        if self.sending.acquire(blocking=False):
            try:
                # The call may have ended meanwhile; clients skip the message.
                self.channel.send_now({'busy': True})
            except (Disconnected, OSError):
                # An answer must not follow a part of the message.
                self.channel.shut()
            finally:
                self.sending.release()

    def close(self) -> None:
        """Ends the connection and frees it."""
        self.channel.shut()
        # Not while a notice is being sent, which could reach the next owner of the file descriptor.
        with self.sending:
            self.channel.close()


class Client:
    """Calls functions of a server over a connection. A context manager.

    It connects on the first call and, after `Disconnected`, again on the next one. Any thread may
    call; the calls wait for each other. Any thread may close it.
    """

    def __init__(
        self, address: str, kind: str, secret: bytes | None = None, deadline_seconds: float = 10.0
    ):
        """Does not connect yet.

        Args:
          address: `host:port` of the server.
          kind: kind of the job that should listen there.
          secret: the secret of the run; None without one.
          deadline_seconds: seconds after which a call fails if nothing arrives, not even the notice
            that the server is working on it; more than 2.

        Raises:
          ConfigError: the address is invalid.
        """
        split_address(address)
        self.address = address
        self._peer = f'The {kind} at {address}'
        self._kind = kind
        self._secret = secret
        self._deadline_seconds = deadline_seconds
        # Held during a call.
        self._calling = threading.Lock()
        # Guards the two below.
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._closed = False

    def __enter__(self) -> 'Client':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def call(
        self,
        name: str,
        values: Values | None = None,
        buffers: Sequence[Buffer] = (),
        max_bytes: int = 0,
    ) -> tuple[Values, np.ndarray]:
        """Calls a function and waits for its answer.

        Args:
          name: of the function.
          values: JSON-serializable arguments.
          buffers: bytes of the body, in order, each C-contiguous; sent without a copy.
          max_bytes: greatest length of the answer's body.

        Returns:
          The answer's values, and its body, u8 `[N]`.

        Raises:
          Rejected: the function rejects the arguments.
          Disconnected: there is no answer, and the function may have been executed or not; or the
            function says that the caller should try again later.
          WrongPeer: what listens at the address is no job of the expected kind.
          WrongSecret: it does not have the same secret.
          Closed: this client is closed.
        """
        with self._calling:
            try:
                channel = self._connected()
                channel.send({**(values or {}), 'call': name}, buffers)
                while True:
                    answer, body = channel.receive(lambda _: max_bytes)
                    if 'busy' not in answer:
                        break
                if not isinstance(answer.get('answer', {}), dict):
                    raise WrongPeer('an answer is not a JSON object')
            except BaseException as error:
                # What is left of this answer must not be taken for the next one.
                self._drop()
                if not isinstance(error, RemoteError):
                    raise
                if self._closed:
                    raise Closed(f'The connection to {self._peer.lower()} is closed.') from error
                if str(error).startswith(('The ', 'What ')):
                    raise
                if isinstance(error, Silent):
                    raise Silent(f'{self._peer} does not answer.') from error
                # Both ends have proved that they have the secret, so the network is at fault.
                kind = Disconnected if isinstance(error, WrongSecret) else type(error)
                raise kind(f'{self._peer} is not there: {error}.') from error
        if 'refused' in answer:
            raise Rejected(printable(str(answer['refused'])))
        if 'answer' not in answer:
            later = printable(str(answer.get('later')))
            raise Disconnected(f'{self._peer} is not there: {later}.')
        return answer['answer'], body

    def close(self) -> None:
        """Closes the connection; pending calls of other threads fail with `Closed`."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.shut()
        if self._calling.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._calling.release()

    def _connected(self) -> Channel:
        with self._lock:
            if self._closed:
                raise Closed('it is closed')
            if self._channel is not None:
                return self._channel
        channel = connect(self.address, self._kind, self._secret, self._deadline_seconds)
        with self._lock:
            if self._closed:
                channel.close()
                raise Closed('it is closed')
            self._channel = channel
        return channel

    def _drop(self) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = None


def argument(values: Values, name: str, kind: type[T]) -> T:
    """Returns an argument of a call, which may come from a stranger.

    Args:
      values: the arguments.
      name: of the argument.
      kind: its type. A bool is no int here; an int is a float, too.

    Raises:
      Refused: it is missing, of another type, or an integer of more than 64 bits.
    """
    value = values.get(name)
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    is_long = type(value) is int and not -(1 << 63) <= value < 1 << 63
    if type(value) is not kind or is_long:
        what = 'an int of 64 bits' if kind is int else f'a {kind.__name__}'
        raise Refused(f"the argument '{name}' is not {what}")
    return value


def listen(address: str, kind: str) -> socket.socket:
    """Returns a socket that listens; see `Server` for the arguments.

    Raises:
      ServerError: the address is in use or invalid.
    """
    host, port = split_address(address)
    host = host.strip('[]')
    try:
        if _is_loopback(host):
            family = socket.AF_INET6 if host == '::1' else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=256)
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256
            )
        return socket.create_server(('', port), backlog=256)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = 'another process does' if in_use else (error.strerror or str(error))
        raise ServerError(f'The {kind} cannot listen on {address}: {reason}.') from error


def warn_of_strangers(
    address: str, port: int, secret: bytes | None, report: Callable[[str], None]
) -> None:
    """Reports that strangers can take part in the run, if there is no secret and they can connect.

    Args:
      address: of the server, see `Server`.
      port: on which it listens.
      secret: see `Server`.
      report: takes the warning.
    """
    has_network = any(name != 'lo' for _, name in socket.if_nameindex())
    if secret is None and has_network and not _is_loopback(split_address(address)[0].strip('[]')):
        report(
            f'WARNING: whoever reaches port {port} of this machine can take part in the run: give '
            'all jobs the same --cluster_secret_file, or say --trusted_network if nobody else can; '
            'see docs/distributed.md.'
        )


def port_of(address: str, port: int) -> str:
    """Returns words for the port of a server, which say if only this machine reaches it.

    Args:
      address: of the server, see `Server`.
      port: on which it listens.
    """
    if _is_loopback(split_address(address)[0].strip('[]')):
        return f'port {port}, of this machine only (--learner_address={address})'
    return f'port {port}'


def _is_loopback(host: str) -> bool:
    return host in ('localhost', '::1') or host.startswith('127.')


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _max_connections() -> int:
    """Returns the maximum number of connections, at which the process can still open files.

    Raises the limit of open files as far as the system lets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * _MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < most:
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, soft // 2)


def _keep_memory() -> None:
    """Makes the C library keep freed memory for the next messages.

    By default it returns large blocks to the system, and the page faults of mapping them again cost
    as much as receiving an unroll. This has no effect unless the C library is GNU's.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)
