"""Tests of impala/cluster/channel.py over sockets on loopback."""

import contextlib
import hashlib
import json
import socket
import struct
import time

import numpy as np
import pytest
from threads import start

from impala.cluster import channel as channel_module
from impala.cluster.channel import Disconnected, WrongPeer, WrongSecret, accept, connect

SECRET = b'a secret of at least 16 bytes'
MAGIC = b'impala\0\2'


@pytest.fixture
def listener():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        yield listener


def address_of(listener):
    return f'127.0.0.1:{listener.getsockname()[1]}'


def accepted(listener, secret, kind='learner'):
    return start(lambda: accept(listener.accept()[0], kind, secret))


@contextlib.contextmanager
def ends(listener, secret):
    """The two ends of a connection: the listener's and the caller's."""
    future = accepted(listener, secret)
    caller = connect(address_of(listener), 'learner', secret, 10)
    listening = future.result(10)
    try:
        yield listening, caller
    finally:
        caller.close()
        listening.close()


def anything(values):
    return 1 << 30


@pytest.mark.parametrize('secret', [None, SECRET])
def test_messages_arrive_in_order_and_whole(listener, secret):
    arrays = [np.arange(7, dtype='int32'), np.float64(2.5), np.zeros((0, 3)), np.ones((3, 3), bool)]
    with ends(listener, secret) as (listening, caller):
        for number in range(3):
            caller.send({'number': number, 'text': 'ä'}, [b'begin', *map(np.asarray, arrays)])
            listening.send({'echo': number})
        for number in range(3):
            values, body = listening.receive(anything)
            assert values == {'number': number, 'text': 'ä'}
            assert body.tobytes() == b'begin' + b''.join(np.asarray(a).tobytes() for a in arrays)
            assert body.ctypes.data % 64 == 0
            assert caller.receive(anything)[0] == {'echo': number}


def test_many_buffers_and_megabytes_arrive(listener):
    buffers = [np.full(1000 + i, i % 251, np.uint8) for i in range(2500)]
    buffers.append(np.arange(20_000_000, dtype=np.uint8))
    with ends(listener, SECRET) as (listening, caller):
        sent = start(caller.send, {}, buffers)
        _, body = listening.receive(anything)
        np.testing.assert_array_equal(body, np.concatenate(buffers))
        sent.result(10)


def test_the_code_is_that_of_rfc_2104(listener):
    """A caller written from the module's description alone is understood."""

    def code(key, data):
        pad = key.ljust(64, b'\0')
        inner = hashlib.sha256(bytes(b ^ 0x36 for b in pad) + data).digest()
        return hashlib.sha256(bytes(b ^ 0x5C for b in pad) + inner).digest()

    future = accepted(listener, SECRET)
    with socket.create_connection(listener.getsockname()) as caller:
        greeting = caller.recv(41, socket.MSG_WAITALL)
        assert greeting[:25] == MAGIC + b'learner'.ljust(16, b'\0') + b'\1'
        nonces = greeting[25:] + bytes(range(16))
        own, theirs = (code(SECRET, who + nonces) for who in (b'caller', b'listener'))
        caller.sendall(MAGIC + nonces[16:] + code(own, b'greeting'))
        assert caller.recv(33, socket.MSG_WAITALL) == b'\0' + code(theirs, b'greeting')
        message = struct.pack('<IQ', 7, 3) + b'{"a":1}' + b'xyz'
        caller.sendall(message + code(own, bytes(8) + message))
        listening = future.result(10)
        values, body = listening.receive(anything)
        assert (values, body.tobytes()) == ({'a': 1}, b'xyz')
        listening.close()


@pytest.mark.parametrize(
    ('theirs', 'ours', 'words'),
    [
        (SECRET, b'another one of many bytes', 'has another secret'),
        (SECRET, None, 'has a secret, and this job has none'),
        (None, SECRET, 'has no secret, and this job has one'),
    ],
)
def test_both_ends_must_have_the_secret(listener, theirs, ours, words):
    future = accepted(listener, theirs)
    with pytest.raises(WrongSecret, match=words) as error:
        connect(address_of(listener), 'learner', ours, 10)
    assert '--cluster_secret_file' in str(error.value)
    with pytest.raises((WrongSecret, Disconnected)):
        future.result(10)


def test_a_listener_without_the_secret_is_found_out(listener):
    """It cannot answer with the right code, whatever it says of itself."""

    def pretend():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(MAGIC + b'learner'.ljust(16, b'\0') + b'\1' + bytes(16))
            connection.recv(56, socket.MSG_WAITALL)
            connection.sendall(bytes(33))

    pretender = start(pretend)
    with pytest.raises(WrongSecret, match='another secret'):
        connect(address_of(listener), 'learner', SECRET, 10)
    pretender.result(10)


class Tap:
    """Stands between caller and listener, and may record and change what the caller sends."""

    def __init__(self, listener):
        self._listener = listener
        self.recorded = b''

    def caller_through(self, secret, change=lambda data: data):
        """Returns both ends of a connection through this tap; `change` gets all after greetings."""
        between = socket.create_server(('127.0.0.1', 0))
        future = accepted(self._listener, secret)

        def pump():
            near, _ = between.accept()
            far = socket.create_connection(self._listener.getsockname())
            near.sendall(far.recv(41, socket.MSG_WAITALL))
            self.recorded = near.recv(56, socket.MSG_WAITALL)
            far.sendall(self.recorded)
            near.sendall(far.recv(33, socket.MSG_WAITALL))
            while data := near.recv(1 << 16):
                self.recorded += data
                far.sendall(change(data))
            near.close()
            far.close()
            between.close()

        start(pump)
        caller = connect(f'127.0.0.1:{between.getsockname()[1]}', 'learner', secret, 10)
        return future.result(10), caller


@pytest.mark.parametrize('place', [0, 4, 13, -33, -1])
def test_a_changed_message_is_refused(listener, place):
    def change(data):
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    listening, caller = Tap(listener).caller_through(SECRET, change)
    listening.set_deadline(1)
    caller.send({'a': 'b'}, [b'body of a message'])
    # A changed length makes it wait for bytes that do not come.
    with pytest.raises((WrongSecret, WrongPeer, Disconnected)):
        listening.receive(lambda values: 1000)
    caller.close()
    listening.close()


def test_a_recorded_message_is_refused_on_this_and_on_another_connection(listener):
    tap = Tap(listener)
    listening, caller = tap.caller_through(SECRET)
    caller.send({'a': 1}, [b'x'])
    assert listening.receive(anything)[0] == {'a': 1}
    recorded = tap.recorded
    # The same bytes again, on the same connection.
    caller._connection.sendall(recorded[56:])
    with pytest.raises(WrongSecret, match='does not have the code'):
        listening.receive(anything)
    caller.close()
    listening.close()
    # The whole conversation again, on a connection of its own.
    future = accepted(listener, SECRET)
    with socket.create_connection(listener.getsockname()) as thief:
        thief.sendall(recorded)
        with pytest.raises(WrongSecret, match='does not have the secret'):
            future.result(10)


@pytest.mark.parametrize(
    'said',
    [
        b'GET / HTTP/1.1\r\nHost: learner\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n',
        bytes(range(256)) * 10,
        b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes(40),
    ],
)
def test_strangers_are_no_jobs(listener, said):
    future = accepted(listener, None)
    with socket.create_connection(listener.getsockname()) as stranger:
        stranger.sendall(said)
        with pytest.raises(WrongPeer, match='no job of this program'):
            future.result(10)


def test_a_stranger_that_says_nothing_is_dropped(listener, monkeypatch):
    monkeypatch.setattr(channel_module, '_GREETING_SECONDS', 0.2)
    future = accepted(listener, None)
    with socket.create_connection(listener.getsockname()) as stranger:
        with pytest.raises(WrongPeer):
            future.result(10)
        stranger.recv(41, socket.MSG_WAITALL)
        assert stranger.recv(1) == b''


def test_a_stranger_that_leaves_at_once_is_no_reason_to_worry(listener):
    """Ports are probed to find out whether a job listens."""
    future = accepted(listener, SECRET)
    socket.create_connection(listener.getsockname()).close()
    with pytest.raises(Disconnected):
        future.result(10)


def test_jobs_of_another_kind_are_wrong_peers(listener):
    accepted(listener, None, kind='replay job')
    with pytest.raises(WrongPeer, match='is not a learner of this version'):
        connect(address_of(listener), 'learner', None, 10)


def test_lengths_are_checked_before_memory_is_allocated(listener):
    with ends(listener, None) as (listening, caller):
        # An exabyte, which no machine could allocate.
        caller._connection.sendall(struct.pack('<IQ', 2, 1 << 60) + b'{}')
        with pytest.raises(WrongPeer, match='more than 10'):
            listening.receive(lambda values: 10)
    with ends(listener, None) as (listening, caller):
        caller._connection.sendall(struct.pack('<IQ', 1 << 31, 0))
        with pytest.raises(WrongPeer, match='bytes of values'):
            listening.receive(anything)


@pytest.mark.parametrize('text', [b'[1]', b'{"a":', b'\xff\xfe', b'[' * 100_000])
def test_values_that_are_no_object_are_refused(listener, text):
    with ends(listener, None) as (listening, caller):
        caller._connection.sendall(struct.pack('<IQ', len(text), 0) + text)
        with pytest.raises(WrongPeer, match='not a JSON object'):
            listening.receive(anything)


def test_values_that_are_too_long_are_an_error_of_the_sender(listener):
    with ends(listener, None) as (_, caller), pytest.raises(ValueError, match='too many'):
        caller.send({'text': 'x' * (1 << 20)})


def test_silence_in_a_message_ends_at_the_deadline_and_between_messages_does_not(listener):
    with ends(listener, None) as (listening, caller):
        listening.set_deadline(0.2)
        received = start(listening.receive, anything, True)
        with pytest.raises(TimeoutError):
            received.result(0.6)
        caller.send({'a': 1})
        assert received.result(10)[0] == {'a': 1}
        caller._connection.sendall(struct.pack('<IQ', 100, 0) + json.dumps({}).encode())
        with pytest.raises(Disconnected, match='does not answer'):
            listening.receive(anything, waits=True)


def test_an_end_that_reads_nothing_is_noticed(listener):
    with ends(listener, None) as (_, caller):
        caller.set_deadline(0.2)
        with pytest.raises(Disconnected, match='takes no more'):
            caller.send({}, [bytes(100 << 20)])


@pytest.mark.parametrize('size', [100_000, 1000])
def test_a_notice_does_not_wait_for_an_end_that_reads_nothing(listener, size):
    with ends(listener, SECRET) as (listening, _):
        listening.set_deadline(30)
        started = time.monotonic()
        num_sent = -1
        # Until there is no room, or for a part only.
        with contextlib.suppress(Disconnected):
            while num_sent < listening._num_sent:
                num_sent = listening._num_sent
                listening.send_now({'busy': 'x' * size})
        assert time.monotonic() - started < 20


@pytest.mark.parametrize('address', ['127.0.0.1:1', '..:8000'])
def test_absent_jobs_are_disconnected(address):
    with pytest.raises(Disconnected, match='is not there'):
        connect(address, 'learner', None, 1)


def test_shutting_ends_waiting_for_a_message(listener):
    with ends(listener, None) as (listening, _):
        received = start(listening.receive, anything, True)
        with pytest.raises(TimeoutError):
            received.result(0.1)
        listening.shut()
        with pytest.raises(Disconnected):
            received.result(10)
