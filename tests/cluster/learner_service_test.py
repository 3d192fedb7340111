"""Tests of impala/cluster/learner_service.py, with real servers and clients on loopback.

Tests of network faults put a proxy in between that can hold back, count and cut traffic. Tests of
crashes run learner and actor as processes (`remote_peer.py`).
"""

import json
import math
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import remote_peer
import tensorflow as tf
from learner_process import DEADLINE, Learner
from network_proxy import Proxy
from threads import start

from impala.cluster.calls import Client
from impala.cluster.channel import Closed, Disconnected, Rejected
from impala.cluster.learner_service import LearnerConnection
from impala.cluster.unroll_format import UnrollFormat

TIMEOUT = 60  # Seconds; reached only by a deadlock.


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.01)


@pytest.fixture
def proxy(learner):
    proxy = Proxy(learner.service.port)
    yield proxy
    proxy.close()


@pytest.fixture
def learner():
    learner = Learner(capacity=3)
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
    learner.service.publish(17, [tf.zeros([1])])
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
    assert connection.settings() == {'torso': 'deep'}
    assert connection.status() == (-1, False)
    with pytest.raises(Disconnected, match='no weights'):
        connection.weights()
    learner.service.publish(3, [tf.constant(weight) for weight in weights])
    version, values = connection.weights()
    assert version == 3
    for value, weight in zip(values, weights, strict=True):
        np.testing.assert_array_equal(value, weight)
    learner.service.finish()
    assert connection.status() == (3, True)


def test_weights_of_another_network_are_refused(learner):
    learner.service.publish(0, [tf.zeros([2, 3])])
    connection = learner.connect(weights=[tf.TensorSpec([3, 2], tf.float32)])
    with pytest.raises(
        Rejected, match=r'weight 0 of the network is float32\[2, 3\], not float32\[3, 2\]'
    ):
        connection.weights()


@pytest.mark.parametrize(
    ('component', 'array', 'reason'),
    [
        (0, np.int64(1001), "'version' holds 1001, which is not in"),
        (2, np.full([5, 2], np.nan, 'float32'), "'reward' holds a value that is not finite"),
        (2, np.zeros([4, 2], 'float32'), r"'reward' is float32 \[4, 2\], not float32 \[5, 2\]"),
        (2, np.zeros([5, 2]), r"'reward' is float64 \[5, 2\], not float32 \[5, 2\]"),
    ],
)
def test_bad_unroll_is_refused_and_the_next_accepted(learner, component, array, reason):
    connection = learner.connect()
    unroll = remote_peer.make_unroll(4)
    unroll_shape, unroll_dtype = unroll[component].shape, unroll[component].dtype
    unroll[component] = array
    with pytest.raises(Rejected, match=f'actor 3 refused: component {reason}') as error:
        connection.put(unroll, 3, 'rooms', 1)
    assert '\n' not in str(error.value)
    connection.put(remote_peer.make_unroll(5), 3, 'rooms', 1)
    assert numbers(learner.inbox.take(1)) == [5]
    # Wrong shapes and dtypes are refused before they reach the learner.
    is_sent = array.shape == unroll_shape and array.dtype == unroll_dtype
    assert learner.inbox.statistics().actors[3].rejected == is_sent


PUT = {
    'actor': 1,
    'client': 5,
    'sequence': 1,
    'host': 'host',
    'level': 'rooms',
    'notes': '',
    'is_compressed': False,
}
RESERVE = {'actor': 1, 'client': 5, 'host': 'host', 'seconds': 5.0}
WEIGHTS = {'specs': [['float32', [2]]], 'bfloat16': False}


@pytest.mark.parametrize(
    ('name', 'values', 'key'),
    [
        (name, values, key)
        for name, values in (('put', PUT), ('reserve', RESERVE), ('weights', WEIGHTS))
        for key in values
    ],
)
def test_arguments_of_other_types_are_refused_in_one_sentence(learner, name, values, key):
    learner.service.publish(0, [tf.zeros([2])])
    unroll = np.concatenate(
        UnrollFormat(remote_peer.COMPONENTS).buffers(remote_peer.make_unroll(1))
    )
    buffers = [unroll] if name == 'put' else []
    with Client(learner.address, 'learner') as client:
        for value in (None, [], {}, [[1], [2]], 10**400, math.nan if key != 'seconds' else 'nan'):
            if isinstance(value, list) and key == 'specs':
                continue
            with pytest.raises(Rejected, match=f"^the argument '{key}' is not "):
                client.call(name, values | {key: value}, buffers, max_bytes=64)
        without = {each: value for each, value in values.items() if each != key}
        with pytest.raises(Rejected, match=f"^the argument '{key}' is not "):
            client.call(name, without, buffers, max_bytes=64)
        client.call(name, values, buffers, max_bytes=64)
    assert not learner.reports
    assert set(learner.service._buffers) <= {False}


@pytest.mark.parametrize(
    'specs', [[], [1], [[]], [['float32', [3]]], [{'a': 1}], ['float32[2]', 1]]
)
def test_other_specs_of_weights_are_refused(learner, specs):
    learner.service.publish(0, [tf.zeros([2])])
    with Client(learner.address, 'learner') as client, pytest.raises(Rejected):
        client.call('weights', WEIGHTS | {'specs': specs}, max_bytes=64)
    assert not learner.reports


@pytest.mark.parametrize('actor', [-1, -(1 << 63), 1 << 31, (1 << 32) + 1])
def test_numbers_that_no_actor_has_are_refused(learner, actor):
    connection = learner.connect()
    with pytest.raises(Rejected, match=f'an actor cannot have the number {actor}$'):
        connection.reserve(actor, 5)
    with pytest.raises(
        Rejected,
        match=f'^unroll of actor {actor} refused: an actor cannot have the number {actor}$',
    ):
        connection.put(remote_peer.make_unroll(0), actor, '', 1)


def test_names_of_hosts_do_not_break_lines_of_a_log(learner):
    with Client(learner.address, 'learner') as client:
        client.call('reserve', RESERVE | {'host': 'a\nb\x1b[31m'})
    assert learner.connect().reserve(1, 5).host == 'a b [31m'


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
    learner.service.publish(8, [tf.zeros([1])])
    connection = learner.connect()
    waiting = fill(learner, connection)
    learner.service.finish()
    learner.inbox.close()
    assert waiting.result(TIMEOUT) == (8, True)
    assert connection.put(remote_peer.make_unroll(3), 0, '', 4) == (8, True)


def test_interrupted_learner_may_come_back(learner):
    connection = learner.connect()
    waiting = fill(learner, connection)
    learner.inbox.close()
    with pytest.raises(Disconnected, match='it is ending'):
        waiting.result(TIMEOUT)
    learner.restart(capacity=1)
    # The connection has ended with the learner.
    with pytest.raises(Disconnected):
        connection.put(remote_peer.make_unroll(3), 0, '', 4)
    connection.put(remote_peer.make_unroll(3), 0, '', 4)
    assert numbers(learner.inbox.take(1)) == [3]


def test_closed_connection_ends_a_waiting_put(learner):
    connection = learner.connect()
    waiting = fill(learner, connection)
    connection.close()
    with pytest.raises(Closed, match='The connection to'):
        waiting.result(TIMEOUT)
    with pytest.raises(Closed, match='The connection to'):
        connection.status()
    # What has arrived as a whole enters the queue when there is room.
    assert numbers(learner.inbox.take(3)) == [0, 1, 2]
    assert numbers(learner.inbox.take(1)) == [3]


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
    actor = peers('actor', proxy.address, 0)
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
