"""Tests of impala/cluster/calls.py, with real servers and clients on loopback."""

import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from network_proxy import Proxy
from threads import start

from impala.cluster import calls
from impala.cluster.calls import (
    Client,
    Closed,
    Disconnected,
    Function,
    Refused,
    Rejected,
    Server,
    ServerError,
    WrongPeer,
    WrongSecret,
)
from impala.config import ConfigError

SECRET = b'a secret of at least 16 bytes'


def echo(values, body):
    return {'echo': values}, [body, body]


def refuse(values, body):
    raise Refused(f'{values["what"]} is wrong')


def postpone(values, body):
    raise Disconnected('it is not ready')


def fail(values, body):
    raise KeyError('nothing')


@pytest.fixture
def reports():
    return []


@pytest.fixture
def gate():
    return threading.Event()


@pytest.fixture
def make_server(reports, gate):
    servers = []

    def make(secret=None, address='localhost:0', **functions):
        def wait(values, body):
            gate.wait()
            return {'waited': True}, ()

        table = {
            'echo': Function(echo, 1 << 24),
            'refuse': Function(refuse),
            'fail': Function(fail),
            'postpone': Function(postpone),
            'wait': Function(wait),
        }
        servers.append(Server(address, table, 'learner', secret, reports.append))
        return servers[-1]

    yield make
    gate.set()
    for server in servers:
        server.close()


@pytest.fixture
def client_of():
    clients = []

    def make(server, secret=None, **kwargs):
        clients.append(Client(f'localhost:{server.port}', 'learner', secret, **kwargs))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def wait_until(condition):
    ends_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_at, 'timed out'
        time.sleep(0.01)


@pytest.mark.parametrize('secret', [None, SECRET])
def test_calls_are_answered(make_server, client_of, secret):
    client = client_of(make_server(secret), secret)
    for number in range(3):
        array = np.arange(number * 1000, dtype='float32')
        values, body = client.call('echo', {'n': number}, [array], max_bytes=1 << 20)
        assert values == {'echo': {'n': number}}
        assert body.tobytes() == 2 * array.tobytes()


def test_calls_of_several_threads_do_not_mix(make_server, client_of):
    client = client_of(make_server())

    def call(number):
        array = np.full(100_000, number, np.uint8)
        values, body = client.call('echo', {'n': number}, [array], max_bytes=1 << 20)
        return values['echo']['n'] == number and (body == number).all()

    assert all(each.result(60) for each in [start(call, number) for number in range(8)])


def test_a_refusal_reaches_the_caller_and_the_connection_stays(make_server, client_of):
    client = client_of(make_server())
    with pytest.raises(Rejected, match='^this is wrong$'):
        client.call('refuse', {'what': 'this'})
    assert client.call('echo')[0] == {'echo': {}}


def test_a_function_may_ask_to_be_called_later(make_server, client_of, reports):
    client = client_of(make_server())
    with pytest.raises(Disconnected, match=r'^The learner at .* is not there: it is not ready\.$'):
        client.call('postpone')
    assert client.call('echo')[0] == {'echo': {}}
    assert not reports


def test_a_failure_is_reported_and_the_server_goes_on(make_server, client_of, reports):
    client = client_of(make_server())
    for _ in range(3):
        with pytest.raises(Disconnected, match='^The learner at localhost'):
            client.call('fail')
    assert client.call('echo')[0] == {'echo': {}}
    # Once, not each time.
    assert len(reports) == 1
    assert "call 'fail' failed: KeyError: 'nothing'" in reports[0]


@pytest.mark.parametrize(('name', 'size'), [('unknown', 0), ('refuse', 1), ('echo', (1 << 24) + 1)])
def test_unknown_functions_and_long_bodies_end_the_connection(
    make_server, client_of, reports, name, size
):
    client = client_of(make_server())
    with pytest.raises(Disconnected):
        client.call(name, {'what': 'x'}, [bytes(size)])
    wait_until(lambda: reports)
    assert 'refused' in reports[0] and '127.0.0.1' in reports[0]
    assert client.call('echo')[0] == {'echo': {}}


def test_an_answer_that_is_too_long_is_refused(make_server, client_of):
    client = client_of(make_server())
    with pytest.raises(WrongPeer, match='more than 19'):
        client.call('echo', {}, [bytes(10)], max_bytes=19)


def test_a_call_may_take_longer_than_the_deadline(make_server, client_of, gate, monkeypatch):
    monkeypatch.setattr(calls, '_BUSY_SECONDS', 0.1)
    client = client_of(make_server(SECRET), SECRET, deadline_seconds=0.5)
    waiting = start(client.call, 'wait')
    with pytest.raises(TimeoutError):
        waiting.result(1.5)
    gate.set()
    assert waiting.result(10)[0] == {'waited': True}
    assert client.call('echo')[0] == {'echo': {}}


def test_a_server_that_does_not_answer_is_disconnected(make_server, client_of):
    server = make_server()
    proxy = Proxy(server.port)
    try:
        client = Client(proxy.address, 'learner', deadline_seconds=0.5)
        client.call('echo')
        proxy.hold('down')
        with pytest.raises(Disconnected, match='does not answer'):
            client.call('echo')
        proxy.hold()
        assert client.call('echo')[0] == {'echo': {}}
        proxy.cut()
        with pytest.raises(Disconnected):
            client.call('echo')
        assert client.call('echo')[0] == {'echo': {}}
        client.close()
    finally:
        proxy.close()


def test_closing_a_client_ends_its_call(make_server, client_of):
    client = client_of(make_server())
    waiting = start(client.call, 'wait')
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    client.close()
    with pytest.raises(Closed):
        waiting.result(10)
    with pytest.raises(Closed):
        client.call('echo')


def test_closing_a_server_ends_its_threads_and_frees_the_port(make_server, client_of):
    num_threads = threading.active_count()
    server = make_server()
    clients = [client_of(server) for _ in range(5)]
    for client in clients:
        client.call('echo')
    assert threading.active_count() > num_threads
    server.close()
    wait_until(lambda: threading.active_count() == num_threads)
    with pytest.raises(Disconnected):
        clients[0].call('echo')
    again = make_server(address=f'localhost:{server.port}')
    assert again.port == server.port
    assert clients[0].call('echo')[0] == {'echo': {}}


def test_a_client_that_is_gone_leaves_nothing_behind(make_server, client_of):
    server = make_server()
    first = client_of(server)
    first.call('echo')
    num_threads = threading.active_count()
    for _ in range(20):
        with Client(f'localhost:{server.port}', 'learner') as client:
            client.call('echo')
    wait_until(lambda: threading.active_count() == num_threads)


def test_strangers_are_reported_once_and_jobs_are_served(make_server, client_of, reports):
    server = make_server(SECRET)
    client = client_of(server, SECRET)
    client.call('echo')
    for _ in range(20):
        with pytest.raises(WrongSecret):
            client_of(server, b'not the secret of this run').call('echo')
    assert client.call('echo')[0] == {'echo': {}}
    assert len(reports) == 1
    assert 'does not have the secret of this run (from 127.0.0.1)' in reports[0]


def test_half_open_connections_do_not_keep_jobs_out(make_server, client_of, reports):
    server = make_server()
    strangers = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(200)]
    try:
        assert client_of(server).call('echo')[0] == {'echo': {}}
        # Only so many may wait to greet.
        assert threading.active_count() < 150
    finally:
        for stranger in strangers:
            stranger.close()


def test_too_many_connections_are_refused(make_server, client_of, reports, monkeypatch):
    monkeypatch.setattr(calls, '_MAX_CONNECTIONS', 2)
    server = make_server()
    clients = [client_of(server) for _ in range(3)]
    for client in clients[:2]:
        client.call('echo')
    with pytest.raises(Disconnected):
        clients[2].call('echo')
    wait_until(lambda: reports)
    assert 'there are 2 already' in reports[0]
    clients[0].close()
    wait_until(lambda: len(server._served) == 1)
    assert clients[2].call('echo')[0] == {'echo': {}}


def test_localhost_is_not_reached_from_the_network(make_server):
    server = make_server(address='localhost:0')
    with pytest.raises(OSError), socket.create_connection(('127.0.0.2', server.port), 1):
        pass
    open_server = make_server(address='0.0.0.0:0')
    socket.create_connection(('127.0.0.2', open_server.port), 1).close()


def test_a_port_in_use_is_one_sentence(make_server):
    server = make_server()
    with pytest.raises(
        ServerError, match=r'cannot listen on localhost:\d+: another process does\.$'
    ):
        make_server(address=f'localhost:{server.port}')


def test_invalid_addresses_are_config_errors(make_server):
    with pytest.raises(ConfigError):
        Client('learner', 'learner')
    with pytest.raises(ConfigError):
        make_server(address='learner')


def test_neither_end_needs_tensorflow():
    code = 'import sys, impala.cluster.calls; sys.exit("tensorflow" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
