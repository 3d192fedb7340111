"""Tests of impala/cluster/transport.py, with real servers and clients on loopback.

Tests of network faults put a proxy in between that can hold back, count and cut traffic. Tests of
crashes run learner and actor as processes (`remote_peer.py`).
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import remote_peer
import tensorflow as tf
from learner_process import DEADLINE, Learner
from network_proxy import Proxy
from threads import start

from impala.cluster import transport as remote
from impala.cluster.exchange import UnrollInbox
from impala.cluster.transport import (
    Closed,
    Disconnected,
    LearnerConnection,
    LearnerServer,
    Rejected,
    ServerError,
    WrongPeer,
    _sentence,
    _Session,
)

TIMEOUT = 60  # Seconds; reached only by a deadlock.


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.01)


@pytest.fixture(scope='module')
def server():
    return LearnerServer('localhost:0')


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def learner(server):
    learner = Learner(f'localhost:{server.port}', capacity=3)
    yield learner
    learner.close()


def numbers(batch):
    """Returns the numbers of a batch's unrolls, after checking that they are intact."""
    for column in range(batch.actors.shape[0]):
        expected = remote_peer.make_unroll(int(batch.components[1][column]))
        for component, array in zip(batch.components, expected, strict=True):
            column_of = component[:, column] if array.ndim else component[column]
            np.testing.assert_array_equal(column_of, array)
    return batch.components[1].numpy().tolist()


def test_unrolls_reach_the_learner(learner):
    learner.board.publish([tf.zeros([1])], 17)
    connection = learner.connect()
    for number in range(3):
        status = connection.put(remote_peer.make_unroll(number), 5, 'rooms', number + 1)
        assert status == (17, False)
    batch = learner.inbox.take(3)
    assert numbers(batch) == [0, 1, 2]
    assert batch.actors.numpy().tolist() == [5, 5, 5]
    actor = learner.inbox.statistics().actors[5]
    assert (actor.host, actor.level, actor.accepted) == (socket.gethostname(), 'rooms', 3)
    assert tf.executing_eagerly()


def test_a_job_keeps_its_number_until_it_ends(learner):
    first, second = learner.connect(), learner.connect()
    assert first.reserve(0, 600).is_own
    holder = second.reserve(0, 600)
    assert (holder.is_own, holder.host) == (False, socket.gethostname())
    first.close()
    assert second.reserve(0, 600).is_own


def test_jobs_of_another_kind_are_wrong_peers(server):
    address = f'localhost:{server.port}'
    with (
        LearnerConnection(address, board='of another kind') as connection,
        pytest.raises(
            WrongPeer, match=f'^What listens at {address} is not a learner of this program'
        ),
    ):
        connection.settings()


def test_garbage_does_not_disturb_the_learner(learner):
    host, port = learner.address.split(':')
    for garbage in (b'GET / HTTP/1.1\r\n\r\n', bytes(range(256)) * 1000, b'PRI * HTTP/2.0\r\n'):
        # The server may close the connection before it has read everything.
        with (
            socket.create_connection((host, int(port))) as intruder,
            contextlib.suppress(ConnectionError),
        ):
            intruder.sendall(garbage)
    connection = learner.connect()
    connection.put(remote_peer.make_unroll(1), 0, 'rooms', 1)
    assert numbers(learner.inbox.take(1)) == [1]


def test_errors_as_long_as_an_unroll_are_raised_quickly(server, monkeypatch):
    # The error when a broken connection delivers a request twice; it ends with the unroll.
    text = 'From /job:learner:\nThe same request was received twice. ' + 'x' * 300_000

    def fail(*unused):
        raise tf.errors.AbortedError(None, None, text)

    with tf.Graph().as_default():
        zero = tf.constant(0)
        with _Session(f'grpc://localhost:{server.port}') as session:
            monkeypatch.setattr(session, '_call_tf_sessionrun', fail)
            started = time.monotonic()
            with pytest.raises(tf.errors.AbortedError) as error:
                session.run(zero)
            # TensorFlow's own session takes minutes.
            assert time.monotonic() - started < 10
    assert _sentence(error.value) == 'The same request was received twice. ...'


def test_eager_tensors_and_views_of_them_are_unrolls(learner):
    connection = learner.connect()
    batch = [tf.constant(np.stack([array])) for array in remote_peer.make_unroll(1)]
    connection.put([component[0] for component in batch], 0, '', 1)
    connection.put([np.asarray(component)[0] for component in batch], 0, '', 2)
    assert numbers(learner.inbox.take(2)) == [1, 1]


def test_weights_and_settings_reach_the_actor(learner):
    weights = [np.arange(6, dtype='float32').reshape(2, 3), np.array([7], 'float32')]
    connection = learner.connect(
        weights=[tf.TensorSpec(weight.shape, weight.dtype) for weight in weights]
    )
    assert json.loads(connection.settings()) == {'torso': 'deep'}
    assert connection.status() == (-1, False)
    with pytest.raises(Disconnected, match='no weights'):
        connection.weights()
    variables = [tf.Variable(weight) for weight in weights]
    learner.board.publish(variables, 3)
    variables[0].assign_add(tf.ones([2, 3]))
    version, values = connection.weights()
    assert version == 3
    for value, weight in zip(values, weights, strict=True):
        np.testing.assert_array_equal(value, weight)
    learner.board.finish()
    assert connection.status() == (3, True)


def test_weights_of_another_network_are_refused(learner):
    learner.board.publish([tf.zeros([2, 3])], 0)
    connection = learner.connect(weights=[tf.TensorSpec([3, 2], tf.float32)])
    with pytest.raises(
        Rejected, match=r'weight 0 of the network is float\[2,3\], not float\[3,2\]'
    ):
        connection.weights()


@pytest.mark.parametrize(
    ('component', 'array', 'reason'),
    [
        (0, np.int64(1001), "'version' holds 1001, which is not in"),
        (2, np.full([5, 2], np.nan, 'float32'), "'reward' holds a value that is not finite"),
        (2, np.zeros([4, 2], 'float32'), r"'reward' is float\[4,2\], not float\[5,2\]"),
        (2, np.zeros([5, 2]), "'reward' is float64, not float32"),
    ],
)
def test_bad_unroll_is_refused_and_the_next_accepted(learner, component, array, reason):
    connection = learner.connect()
    unroll = remote_peer.make_unroll(4)
    unroll[component] = array
    with pytest.raises(Rejected, match=f'actor 3 refused: component {reason}') as error:
        connection.put(unroll, 3, 'rooms', 1)
    assert '\n' not in str(error.value)
    connection.put(remote_peer.make_unroll(5), 3, 'rooms', 1)
    assert numbers(learner.inbox.take(1)) == [5]
    # A wrong dtype is refused before it reaches the learner.
    assert learner.inbox.statistics().actors[3].rejected == (array.dtype != np.float64)


def test_put_waits_for_room_beyond_its_deadline(learner):
    connection = learner.connect()
    for number in range(3):
        connection.put(remote_peer.make_unroll(number), 0, '', number + 1)
    waiting = start(connection.put, remote_peer.make_unroll(3), 0, '', 4)
    time.sleep(1.5 * DEADLINE)
    assert not waiting.done()
    assert numbers(learner.inbox.take(3)) == [0, 1, 2]
    waiting.result(TIMEOUT)
    assert numbers(learner.inbox.take(1)) == [3]
    assert learner.inbox.statistics().queued == 0


def fill(learner, connection):
    """Fills the queue and returns the future of a put that waits for room."""
    for number in range(3):
        connection.put(remote_peer.make_unroll(number), 0, '', number + 1)
    waiting = start(connection.put, remote_peer.make_unroll(3), 0, '', 4)
    wait_until(lambda: learner.inbox.statistics().waiting == 1)
    return waiting


def test_finished_learner_ends_waiting_and_later_puts(learner):
    learner.board.publish([tf.zeros([1])], 8)
    connection = learner.connect()
    waiting = fill(learner, connection)
    learner.board.finish()
    learner.inbox.close()
    assert waiting.result(TIMEOUT) == (8, True)
    assert connection.put(remote_peer.make_unroll(3), 0, '', 4) == (8, True)


def test_interrupted_learner_may_come_back(learner):
    connection = learner.connect()
    waiting = fill(learner, connection)
    learner.inbox.close()
    with pytest.raises(Disconnected, match="is ending: the inbox '.*' is closed.$"):
        waiting.result(TIMEOUT)
    inbox = UnrollInbox(1, remote_peer.COMPONENTS, 'version', learner.name)
    inbox.set_latest_version(1000)
    connection.put(remote_peer.make_unroll(3), 0, '', 4)
    assert numbers(inbox.take(1)) == [3]
    inbox.close()


def test_closed_connection_ends_a_waiting_put(learner):
    connection = learner.connect()
    waiting = fill(learner, connection)
    connection.close()
    with pytest.raises(Closed, match='The connection to'):
        waiting.result(TIMEOUT)
    with pytest.raises(Closed, match='The connection to'):
        connection.status()
    wait_until(lambda: learner.inbox.statistics().waiting == 0)


def test_lost_answer_does_not_duplicate_an_unroll(learner, proxy):
    connection = learner.connect(proxy.address)
    connection.put(remote_peer.make_unroll(0), 2, '', 1)
    proxy.hold('down')
    started = time.monotonic()
    with pytest.raises(Disconnected):
        connection.put(remote_peer.make_unroll(1), 2, '', 2)
    # One deadline for the put, one for asking whether the learner is there.
    assert time.monotonic() - started < 2 * DEADLINE + 2
    proxy.cut()
    proxy.hold()
    connection.put(remote_peer.make_unroll(1), 2, '', 2)
    connection.put(remote_peer.make_unroll(2), 2, '', 3)
    assert numbers(learner.inbox.take(3)) == [0, 1, 2]
    statistics = learner.inbox.statistics()
    assert statistics.queued == 0
    assert statistics.actors[2].accepted == 3
    assert statistics.actors[2].duplicates >= 1


def test_stalled_network_causes_neither_hangs_nor_duplicates(learner, proxy):
    connection = learner.connect(proxy.address)
    connection.put(remote_peer.make_unroll(0), 2, '', 1)
    # Old connections stay open, as if all their packets were dropped.
    proxy.hold('up', 'down')
    for _ in range(2):
        with pytest.raises(Disconnected):
            connection.put(remote_peer.make_unroll(1), 2, '', 2)
    proxy.hold()
    started = time.monotonic()
    connection.put(remote_peer.make_unroll(1), 2, '', 2)
    assert time.monotonic() - started < 10
    connection.put(remote_peer.make_unroll(2), 2, '', 3)
    assert numbers(learner.inbox.take(3)) == [0, 1, 2]
    assert learner.inbox.statistics().queued == 0


def test_interrupted_transfer_leaves_nothing_behind(learner, proxy):
    connection = learner.connect(proxy.address)
    connection.status()
    proxy.hold('up')
    sent = proxy.sent
    waiting = start(connection.put, remote_peer.make_unroll(1), 2, '', 1)
    wait_until(lambda: proxy.sent > sent)
    proxy.cut()
    proxy.hold()
    # The transport retries by itself, or raises.
    try:
        waiting.result(TIMEOUT)
    except Disconnected:
        connection.put(remote_peer.make_unroll(1), 2, '', 1)
    connection.put(remote_peer.make_unroll(2), 2, '', 2)
    assert numbers(learner.inbox.take(2)) == [1, 2]
    assert learner.inbox.statistics().queued == 0


def test_absent_learner_is_reported():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port = listener.getsockname()[1]
        # Not a learner: it accepts and never answers.
        with LearnerConnection(f'127.0.0.1:{port}', deadline_seconds=1) as connection:
            started = time.monotonic()
            with pytest.raises(Disconnected, match=f'127.0.0.1:{port}'):
                connection.status()
            assert time.monotonic() - started < 5
    with LearnerConnection(f'127.0.0.1:{port}', deadline_seconds=60) as connection:
        # Raised at once, not after the deadline.
        started = time.monotonic()
        with pytest.raises(Disconnected, match=f'127.0.0.1:{port} is not there: '):
            connection.status()
        assert time.monotonic() - started < 5
    for address, is_unknown in (
        ('no-such-host.invalid:8000', True),
        ('.empty-part.invalid:8000', True),
        ('[::1]:1', False),
    ):
        with LearnerConnection(address, deadline_seconds=60) as connection:
            with pytest.raises(Disconnected, match=f'{re.escape(address)} is not there: ') as error:
                connection.status()
            unknown = re.search(
                'name or service|name resolution|not the name', str(error.value), re.I
            )
            assert bool(unknown) == is_unknown, error.value


@pytest.mark.parametrize('interfaces', [['lo'], ['lo', 'eth0']])
def test_listening_on_a_network_is_warned_of(monkeypatch, interfaces):
    monkeypatch.setattr(socket, 'if_nameindex', lambda: list(enumerate(interfaces, 1)))
    lines = []
    remote.warn_of_network(8000, lines.append)
    assert len(lines) == len(interfaces) - 1
    assert all(line.startswith('WARNING: whoever reaches port 8000 of this') for line in lines)


def test_port_in_use_raises_one_sentence():
    with socket.create_server(('', 0)) as listener:
        address = f'localhost:{listener.getsockname()[1]}'
        with pytest.raises(
            ServerError, match=f'cannot listen on {address}: another process does.$'
        ):
            LearnerServer(address)


class Peer:
    """A process of remote_peer.py."""

    def __init__(self, *args):
        environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, remote_peer.__file__, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def read(self):
        """The next line of the process, as JSON."""
        line = start(self.process.stdout.readline).result(TIMEOUT)
        assert line, 'the process has ended'
        return json.loads(line)

    def ask(self, question):
        self.process.stdin.write(question + '\n')
        self.process.stdin.flush()
        return self.read()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def peers():
    peers = []

    def make(*args):
        peers.append(Peer(*args))
        return peers[-1]

    yield make
    for peer in peers:
        peer.kill()
        peer.process.communicate()


def test_actor_killed_in_mid_transfer_leaves_no_partial_unroll(learner, proxy, peers):
    actor = peers('actor', proxy.address, learner.name, 0)
    taken = []
    for _ in range(3):
        taken += numbers(learner.inbox.take(2))
    # The unroll that waits for room has reached the learner. Only the beginning of the next one
    # leaves the actor.
    wait_until(lambda: learner.inbox.statistics().waiting == 1)
    proxy.hold('up')
    sent = proxy.sent
    taken += numbers(learner.inbox.take(2))
    wait_until(lambda: proxy.sent > sent)
    actor.kill()
    proxy.hold()
    assert taken == list(range(8))
    others = learner.connect()
    rest = start(lambda: [numbers(learner.inbox.take(1)) for _ in range(4)])
    others.put(remote_peer.make_unroll(900), 1, '', 1)
    while not rest.done():
        others.put(remote_peer.make_unroll(901), 1, '', int(time.time_ns()))
        time.sleep(0.05)
    # Accepted unrolls are there, in order and intact, as `numbers` has checked.
    mine = [number for (number,) in rest.result(TIMEOUT) if number < 900]
    assert mine == list(range(8, 8 + len(mine)))


@pytest.fixture
def free_port():
    with socket.create_server(('', 0)) as listener:
        return listener.getsockname()[1]


def test_closing_does_not_wait_for_a_learner_that_is_gone(peers, free_port):
    learner = peers('learner', free_port)
    assert learner.read() == {'port': free_port}
    with LearnerConnection(f'localhost:{free_port}', deadline_seconds=20) as connection:
        connection.status()
        learner.kill()
        learner.process.wait()
        threads = set(threading.enumerate())
    # The process cannot end before these threads, in which TensorFlow would retry for 20 seconds.
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()


def test_connection_survives_a_restart_of_the_learner(peers, free_port):
    port = free_port
    first = peers('learner', port)
    assert first.read() == {'port': port}
    with LearnerConnection(
        f'localhost:{port}',
        remote_peer.COMPONENTS,
        [tf.TensorSpec([2], tf.float32)],
        deadline_seconds=1,
    ) as connection:
        connection.put(remote_peer.make_unroll(0), 2, '', 1)
        assert first.ask('take') == {'numbers': [0], 'actors': [2]}
        assert connection.weights().version == 7
        first.kill()
        # Nothing hangs while there is no learner.
        started = time.monotonic()
        with pytest.raises(Disconnected):
            connection.put(remote_peer.make_unroll(1), 2, '', 2)
        with pytest.raises(Disconnected):
            connection.weights()
        assert time.monotonic() - started < 8
        second = peers('learner', port)
        assert second.read() == {'port': port}
        started = time.monotonic()
        while True:
            try:
                connection.put(remote_peer.make_unroll(1), 2, '', 2)
                break
            except Disconnected:
                assert time.monotonic() - started < 10
        assert time.monotonic() - started < 10
        assert second.ask('take') == {'numbers': [1], 'actors': [2]}
        assert connection.weights().version == 7
