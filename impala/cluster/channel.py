"""A connection between two jobs that carries messages: a JSON object and bytes.

Both ends greet each other before anything else. With a shared secret, each end proves that it has
it, and every message carries an authentication code: HMAC-SHA256 (RFC 2104) under a key derived
from the secret and a random nonce of either end, over the number of the message and all of its
bytes. So a stranger's message, a changed one, and one recorded from this or another connection are
refused. Nothing is encrypted.

A connection, in bytes:

    listener  magic 8, kind 16, secret? 1, nonce 16
    caller    magic 8, nonce 16, code 32
    listener  verdict 1, code 32
    either    values' length 4, body's length 8, values (JSON), body, code 32 (with a secret only)
"""

import contextlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from impala.config import split_address
from impala.experience.replay import aligned

# JSON-serializable.
Values: TypeAlias = dict[str, Any]
# Anything with the buffer protocol, C-contiguous.
Buffer: TypeAlias = Any

# Changes when two versions could misunderstand each other.
_MAGIC = b'impala\x00\x02'
_GREETING = struct.Struct('<8s16s?16s')
_REPLY = struct.Struct('<8s16s32s')
_VERDICT = struct.Struct('<B32s')
_HEADER = struct.Struct('<IQ')
_NONCE_BYTES = 16
_CODE_BYTES = 32
_NO_CODE = bytes(_CODE_BYTES)
_ACCEPTED, _WRONG_SECRET = 0, 1
# The greetings are short: an end that takes longer is no job.
_GREETING_SECONDS = 5.0
# Longest JSON text of a message.
_MAX_VALUES_BYTES = 1 << 20
# Linux accepts 1,024 buffers per call.
_MAX_BUFFERS = 1000
# Longest text of another job in a message to the user.
_MAX_TEXT = 500


class RemoteError(Exception):
    """Communication between two jobs failed; the text is one sentence."""


class Disconnected(RemoteError):
    """The other end does not answer or has restarted; the call may be repeated."""


class Silent(Disconnected):
    """Nothing has arrived until the deadline."""


class Rejected(RemoteError):
    """The other end rejects these arguments."""


class WrongPeer(RemoteError):
    """What answers is not a job of the expected kind."""


class WrongSecret(RemoteError):
    """The two ends do not have the same secret."""


class Closed(RemoteError):
    """The connection was closed at this end."""


class ServerError(RemoteError):
    """A job cannot listen."""


class Channel:
    """One end of a connection. One thread may send while another receives."""

    def __init__(self, connection: socket.socket, keys: tuple[bytes, bytes] | None):
        """Takes a connection on which both ends have greeted each other.

        Args:
          connection: the connection; this object closes it.
          keys: keys of what this end sends and receives; None without a secret.
        """
        self._connection = connection
        self._codes = (
            None if keys is None else tuple(hmac.new(key, digestmod='sha256') for key in keys)
        )
        self._num_sent = 0
        self._num_received = 0

    def set_deadline(self, seconds: float) -> None:
        """Sets the time after which sending or receiving fails if not a byte gets through."""
        _set_deadline(self._connection, seconds)

    def send(self, values: Values, buffers: Sequence[Buffer] = ()) -> None:
        """Sends a message.

        Args:
          values: JSON-serializable.
          buffers: bytes of the body, in order; sent without a copy.

        Raises:
          Disconnected: the connection is broken, or the deadline has passed.
        """
        self._send(_parts(values, buffers), 0)

    def send_now(self, values: Values) -> None:
        """Sends a short message if the connection has room for it; else the other end is busy.

        Raises:
          Disconnected: the connection is broken, or had room for a part only.
        """
        with contextlib.suppress(BlockingIOError):
            self._send(_parts(values, ()), socket.MSG_DONTWAIT)

    def receive(
        self, max_bytes: Callable[[Values], int], waits: bool = False
    ) -> tuple[Values, np.ndarray]:
        """Receives a message.

        Args:
          max_bytes: returns the greatest length of a body with these values, checked before memory
            is allocated for it. May raise what `receive` then raises.
          waits: whether the message may begin later than the deadline.

        Returns:
          The values, and the body as u8 `[N]` in memory of its own, which TensorFlow can use
          without a copy.

        Raises:
          Disconnected: the connection has ended or is broken; `Silent`: the deadline has passed.
          WrongPeer: the message is malformed or too long.
          WrongSecret: the message does not come from the other end, or was changed.
        """
        header = bytearray(_HEADER.size)
        self._receive(header, waits)
        values_bytes, body_bytes = _HEADER.unpack(header)
        if values_bytes > _MAX_VALUES_BYTES:
            raise WrongPeer(f'a message has {values_bytes:,} bytes of values')
        text = bytearray(values_bytes)
        self._receive(text)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise WrongPeer('the values of a message are not a JSON object')
        limit = max_bytes(values)
        if body_bytes > limit:
            raise WrongPeer(f'a message has a body of {body_bytes:,} bytes, more than {limit:,}')
        body = aligned((body_bytes,), np.dtype('uint8'))
        self._receive(body)
        if self._codes is not None:
            code = bytearray(_CODE_BYTES)
            self._receive(code)
            if not hmac.compare_digest(
                code, self._code(1, self._num_received, (header, text, body))
            ):
                raise WrongSecret('a message does not have the code of its sender')
        self._num_received += 1
        return values, body

    def shut(self) -> None:
        """Ends the connection: pending calls of any thread fail with `Disconnected`."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and frees it; no other thread may be using it."""
        self.shut()
        self._connection.close()

    def _code(self, end: int, number: int, parts: Sequence[Buffer]) -> bytes:
        assert self._codes is not None
        code = self._codes[end].copy()
        code.update(number.to_bytes(8, 'little'))
        for part in parts:
            code.update(part)
        return code.digest()

    def _send(self, parts: list[Buffer], flags: int) -> None:
        if self._codes is not None:
            parts = [*parts, self._code(0, self._num_sent, parts)]
        has_begun = False
        try:
            while parts:
                sent = self._connection.sendmsg(parts[:_MAX_BUFFERS], (), flags)
                has_begun = True
                while parts and sent >= len(parts[0]):
                    sent -= len(parts[0])
                    parts = parts[1:]
                if sent:
                    parts = [memoryview(parts[0])[sent:], *parts[1:]]
        except BlockingIOError as error:
            if flags and not has_begun:
                raise
            raise Disconnected('it takes no more data') from error
        except OSError as error:
            raise Disconnected(_reason(error)) from error
        self._num_sent += 1

    def _receive(self, buffer: Buffer, waits: bool = False) -> None:
        """Fills a buffer; with `waits`, its first byte may come after the deadline."""
        view = memoryview(buffer)
        while view:
            try:
                count = self._connection.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError as error:
                if waits and len(view) == len(buffer):
                    continue
                raise Silent('it does not answer') from error
            except OSError as error:
                raise Disconnected(_reason(error)) from error
            if not count:
                raise Disconnected('it has ended the connection')
            view = view[count:]


def accept(connection: socket.socket, kind: str, secret: bytes | None) -> Channel:
    """Greets a caller.

    Args:
      connection: an accepted connection; closed if this fails.
      kind: kind of this job, at most 16 bytes.
      secret: the secret that the caller must have; None for any caller.

    Raises:
      Disconnected: the caller has ended the connection without a word.
      WrongPeer: the caller is no job of this program.
      WrongSecret: the caller does not have the secret.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        _prepare(connection)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        try:
            connection.sendall(_GREETING.pack(_MAGIC, kind.encode(), secret is not None, nonce))
            reply = connection.recv(_REPLY.size, socket.MSG_WAITALL)
            if not reply:
                raise Disconnected('it has ended the connection')
            if len(reply) < _REPLY.size or not reply.startswith(_MAGIC):
                raise WrongPeer('it is no job of this program')
            _, caller_nonce, code = _REPLY.unpack(reply)
            keys = None
            if secret is not None:
                keys = _keys(secret, nonce + caller_nonce)
                if not hmac.compare_digest(code, _proof(keys[1])):
                    connection.sendall(_VERDICT.pack(_WRONG_SECRET, _NO_CODE))
                    raise WrongSecret('it does not have the secret of this run')
            proof = _NO_CODE if keys is None else _proof(keys[0])
            connection.sendall(_VERDICT.pack(_ACCEPTED, proof))
        except BlockingIOError as error:
            raise WrongPeer('it says nothing') from error
        except OSError as error:
            raise Disconnected(_reason(error)) from error
        channel = Channel(connection, keys)
        stack.pop_all()
    return channel


def connect(address: str, kind: str, secret: bytes | None, deadline_seconds: float) -> Channel:
    """Connects to a job and greets it.

    Args:
      address: `host:port`.
      kind: kind of the job that should listen there.
      secret: the secret of the run; None without one.
      deadline_seconds: see `Channel.set_deadline`; connecting takes no longer either.

    Raises:
      Disconnected: nothing listens there, or it does not answer.
      WrongPeer: what listens there is no job of this kind and program.
      WrongSecret: it has another secret, or only one of the two ends has one.
    """
    host, port = split_address(address)
    peer = f'The {kind} at {address}'
    try:
        connection = socket.create_connection(
            (host.strip('[]'), port), min(deadline_seconds, _GREETING_SECONDS)
        )
    except UnicodeError as error:  # For instance, a part of the name is empty.
        raise Disconnected(
            f"{peer} is not there: '{host}' is not the name of a machine."
        ) from error
    except OSError as error:
        raise Disconnected(f'{peer} is not there: {_reason(error)}.') from error
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        _prepare(connection)
        try:
            greeting = connection.recv(_GREETING.size, socket.MSG_WAITALL)
            if not greeting:
                raise Disconnected(f'{peer} is not there: it has ended the connection.')
            their_kind = b''
            if len(greeting) == _GREETING.size and greeting.startswith(_MAGIC):
                _, their_kind, has_secret, nonce = _GREETING.unpack(greeting)
            if their_kind.rstrip(b'\0') != kind.encode():
                raise WrongPeer(
                    f'What listens at {address} is not a {kind} of this version of the program.'
                )
            if has_secret != (secret is not None):
                raise WrongSecret(
                    f'{peer} has {"a" if has_secret else "no"} secret, and this job has '
                    f'{"none" if has_secret else "one"}: give all jobs the same '
                    '--cluster_secret_file.'
                )
            own_nonce = secrets.token_bytes(_NONCE_BYTES)
            keys = None if secret is None else _keys(secret, nonce + own_nonce)[::-1]
            connection.sendall(
                _REPLY.pack(_MAGIC, own_nonce, _NO_CODE if keys is None else _proof(keys[0]))
            )
            verdict = connection.recv(_VERDICT.size, socket.MSG_WAITALL)
        except BlockingIOError as error:
            raise Silent(f'{peer} does not answer.') from error
        except OSError as error:
            raise Disconnected(f'{peer} is not there: {_reason(error)}.') from error
        if len(verdict) < _VERDICT.size:
            raise Disconnected(f'{peer} is not there: it has ended the connection.')
        answer, proof = _VERDICT.unpack(verdict)
        is_proved = keys is None or hmac.compare_digest(proof, _proof(keys[1]))
        if answer != _ACCEPTED or not is_proved:
            raise WrongSecret(
                f'{peer} has another secret: give all jobs the same --cluster_secret_file.'
            )
        channel = Channel(connection, keys)
        channel.set_deadline(deadline_seconds)
        stack.pop_all()
    return channel


def printable(text: str) -> str:
    """Returns a text from elsewhere as one line without control characters, cut if it is long."""
    text = text if len(text) <= _MAX_TEXT else f'{text[:_MAX_TEXT]} ...'
    return ''.join(each if each.isprintable() else ' ' for each in text)


def _parts(values: Values, buffers: Sequence[Buffer]) -> list[Buffer]:
    """Returns the parts of a message, each a sequence of bytes that is not empty."""
    text = json.dumps(values).encode()
    if len(text) > _MAX_VALUES_BYTES:
        raise ValueError(f'{len(text):,} bytes of values are too many for a message')
    views = [memoryview(buffer) for buffer in buffers]
    body = [view.cast('B') for view in views if view.nbytes]
    return [_HEADER.pack(len(text), sum(map(len, body))), text, *body]


def _prepare(connection: socket.socket) -> None:
    """Makes a connection fit for messages; blocking, with a deadline for the greetings."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that is gone is noticed after 15 + 3 * 5 seconds, also where nothing is sent.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (('TCP_KEEPIDLE', 15), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _set_deadline(connection, _GREETING_SECONDS)


def _set_deadline(connection: socket.socket, seconds: float) -> None:
    # Not `settimeout`, with which Python receives a long message in hundreds of pieces.
    value = struct.pack('@ll', int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _keys(secret: bytes, nonces: bytes) -> tuple[bytes, bytes]:
    """Returns the keys of what the listener and the caller send."""
    return (
        hmac.digest(secret, b'listener' + nonces, 'sha256'),
        hmac.digest(secret, b'caller' + nonces, 'sha256'),
    )


def _proof(key: bytes) -> bytes:
    """Returns the code by which an end proves that it has the secret."""
    return hmac.digest(key, b'greeting', 'sha256')


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
