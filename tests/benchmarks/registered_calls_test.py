"""Tests of benchmarks/registered_calls.py, with a server and clients in one process."""

import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from threads import start
from warm_process import WarmProcess

from benchmarks.registered_calls import RegisteredConnection, RegisteredServer
from impala.cluster.exchange import UnrollInbox
from impala.trajectory import UnrollArray

ROOT = pathlib.Path(__file__).resolve().parents[2]
T = 2
COMPONENTS = [
    UnrollArray((), 'int64', 'policy_version', time_major=False, low=0),
    UnrollArray((T + 1, 4, 5), 'uint8', 'frame'),
    UnrollArray((T + 1,), 'int32', 'action', low=0, high=2),
    UnrollArray((T + 1, 3), 'float32', 'policy'),
]
TIMEOUT = 60  # Seconds; reached only by a deadlock.


@pytest.fixture(scope='module')
def inbox():
    """An inbox into which clients put unrolls; it holds one."""
    queue = UnrollInbox(1, COMPONENTS, 'policy_version', 'registered calls')
    yield queue
    queue.close()


@pytest.fixture(scope='module')
def address(inbox):
    """The address of the server of the inbox."""
    server = RegisteredServer(inbox, COMPONENTS)
    yield f'localhost:{server.port}'
    del server


def make_unroll(seed):
    random = np.random.default_rng(seed)
    return [
        np.int64(0),
        random.integers(256, size=(T + 1, 4, 5), dtype='uint8'),
        random.integers(3, size=T + 1, dtype='int32'),
        random.normal(size=(T + 1, 3)).astype('float32'),
    ]


def test_unrolls_arrive_as_they_were_sent(inbox, address):
    connections = [RegisteredConnection(address) for _ in range(2)]
    # The second one waits until there is room.
    puts = [
        start(connection.put, make_unroll(seed), seed, 'level', 1)
        for seed, connection in enumerate(connections)
    ]
    batch = inbox.take(2)
    assert all(put.result(TIMEOUT) for put in puts)
    for column, actor in enumerate(batch.actors.numpy()):
        version, *arrays = make_unroll(actor)
        assert batch.components[0][column].numpy() == version
        for received, sent in zip(batch.components[1:], arrays, strict=True):
            np.testing.assert_array_equal(received[:, column], sent)
    statistics = inbox.statistics().actors
    assert [statistics[actor].level for actor in range(2)] == ['level', 'level']
    # Sent again, as after a lost answer.
    assert not connections[0].put(make_unroll(0), 0, 'level', 1)


def test_invalid_unrolls_are_rejected(address):
    connection = RegisteredConnection(address)
    unroll = make_unroll(0)
    unroll[2] = unroll[2] + np.int32(3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="'action'"):
        connection.put(unroll, 5, 'level', 1)
    unroll[2] = unroll[2][1:]
    with pytest.raises(tf.errors.InvalidArgumentError):
        connection.put(unroll, 5, 'level', 1)
    unroll[1] = np.zeros(4 << 20, 'uint8')
    with pytest.raises(ValueError, match='do not fit'):
        connection.put(unroll, 5, 'level', 1)


def test_transports_are_compared_in_turns(tmp_path):
    flags = ['--rounds=2', '--actors=1', '--seconds=1', '--frame=8x6x1', '--unroll_length=5']
    flags += ['--batch_size=2', '--capacity=2']
    outputs = tmp_path / 'stdout', tmp_path / 'stderr'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    process = WarmProcess(ROOT / 'benchmarks' / 'ingest.py', flags, environment, ROOT, outputs)
    try:
        assert process.wait(240) == 0, outputs[1].read_text()
    finally:
        process.kill()
    *_, sessions, registered, line = outputs[0].read_text().splitlines()
    values = json.loads(line)['observations_per_second']
    assert min(values.values()) > 0
    assert list(values) == ['sessions', 'registered calls']
    for row, (transport, observations) in zip((sessions, registered), values.items(), strict=True):
        cells = [cell.strip() for cell in row.split('|')[1:-1]]
        assert cells[:2] == [transport, f'{observations:,}']
    # Sessions are compared with themselves.
    assert sessions.split('|')[3].strip() == '1.00'
