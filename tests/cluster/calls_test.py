"""Tests of impala/cluster/calls.py, with real servers and clients on loopback."""

import contextlib
import signal
import socket
import struct
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
    argument,
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
        } | functions
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
    strangers = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(500)]
    client = client_of(server)

    def is_served():
        # On a busy machine, a greeting may take too long; jobs try again.
        with contextlib.suppress(Disconnected):
            return client.call('echo')[0] == {'echo': {}}

    try:
        wait_until(is_served)
        # Only so many may wait to greet.
        assert threading.active_count() < 400
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


def test_what_strangers_send_is_one_short_line_of_the_log(make_server, client_of, reports):
    def complain(values, body):
        raise KeyError(values['text'])

    server = make_server(complain=Function(complain))
    text = 'two\nlines\x1b[31m\ud800' + 'x' * 100_000
    with pytest.raises(Disconnected):
        client_of(server).call('complain', {'text': text})
    assert len(reports) == 1
    assert reports[0].isprintable() and len(reports[0]) < 1000
    # Escaped, the text has more bytes than a message may have.
    with pytest.raises(Rejected, match=r'^ää'):
        client_of(server).call('refuse', {'what': 'ä' * 170_000})


def test_a_message_without_memory_for_it_ends_its_connection_only(
    make_server, client_of, reports, monkeypatch
):
    tracebacks = []
    monkeypatch.setattr(threading, 'excepthook', tracebacks.append)
    client = client_of(make_server(huge=Function(echo, 1 << 62)))
    client.call('echo')
    text = b'{"call":"huge"}'
    client._channel._connection.sendall(struct.pack('<IQ', len(text), 1 << 61) + text)
    with pytest.raises(Disconnected):
        client.call('echo')
    wait_until(lambda: reports)
    assert 'failed: ' in reports[0] and 'from 127.0.0.1' in reports[0]
    assert client.call('echo')[0] == {'echo': {}}
    assert not tracebacks


def test_a_report_that_fails_does_not_end_the_server(client_of, monkeypatch):
    monkeypatch.setattr(calls, '_MAX_NEWCOMERS', 4)

    def report(text):
        raise ValueError('I/O operation on closed file')

    functions = {'echo': Function(echo)}
    with Server('localhost:0', functions, 'learner', SECRET, report) as server:
        # The accepting thread itself reports some refusals, such as that of the oldest newcomer.
        strangers = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(9)]
        with pytest.raises(WrongSecret):
            client_of(server, b'not the secret of this run').call('echo')
        assert client_of(server, SECRET).call('echo')[0] == {'echo': {}}
        for stranger in strangers:
            stranger.close()


def test_an_interrupted_call_does_not_leave_its_answer_to_the_next(make_server, client_of, gate):
    client = client_of(make_server())

    def interrupt(number, frame):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            client.call('wait')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    gate.set()
    assert client.call('echo')[0] == {'echo': {}}


def test_a_message_that_the_network_has_changed_is_sent_again(make_server):
    server = make_server(SECRET)
    between = socket.create_server(('127.0.0.1', 0))

    def pump():
        near, _ = between.accept()
        with near, socket.create_connection(('127.0.0.1', server.port)) as far:
            near.sendall(far.recv(41, socket.MSG_WAITALL))
            far.sendall(near.recv(56, socket.MSG_WAITALL))
            near.sendall(far.recv(33, socket.MSG_WAITALL))
            far.sendall(near.recv(1 << 16))
            answer = bytearray(far.recv(1 << 16))
            answer[-1] ^= 1
            near.sendall(answer)

    pumped = start(pump)
    address = f'127.0.0.1:{between.getsockname()[1]}'
    with between, Client(address, 'learner', SECRET, 5) as client:
        # Not WrongSecret, which would end a job for good.
        with pytest.raises(Disconnected, match='does not have the code of its sender'):
            client.call('echo')
        pumped.result(10)


@pytest.mark.parametrize(
    ('value', 'kind', 'words'),
    [
        (True, int, 'an int of 64 bits'),
        (1.0, int, 'an int of 64 bits'),
        (1 << 63, int, 'an int of 64 bits'),
        ('1', int, 'an int of 64 bits'),
        (None, int, 'an int of 64 bits'),
        (10**400, float, 'a float'),
        (True, float, 'a float'),
        (1, bool, 'a bool'),
        (['a'], str, 'a str'),
    ],
)
def test_arguments_of_other_types_are_refused(value, kind, words):
    with pytest.raises(Refused, match=f"^the argument 'a' is not {words}$"):
        argument({'a': value}, 'a', kind)
    with pytest.raises(Refused):
        argument({}, 'a', kind)


def test_arguments():
    values = {'a': -(1 << 63), 'b': 2, 'c': 'text', 'd': False}
    assert argument(values, 'a', int) == -(1 << 63)
    assert argument(values, 'b', float) == 2.0
    assert argument(values, 'c', str) == 'text'
    assert argument(values, 'd', bool) is False


LIMITED = """
import resource, socket, threading, time
from impala.cluster.calls import Client, Function, Server
reports = []
functions = {'echo': Function(lambda values, body: (values, ()))}
def call(server):
    with Client(f'localhost:{server.port}', 'learner') as client:
        return client.call('echo', {'a': 1})[0]['a']
"""


def run_limited(code):
    """Runs code in a process of its own, which limits itself; returns its output."""
    command = [sys.executable, '-c', LIMITED + code]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (0, '')
    return process.stdout


def test_without_another_thread_a_connection_is_refused_and_the_server_goes_on():
    out = run_limited(
        """
threading.stack_size(256 << 20)
with Server('localhost:0', functions, 'learner', None, reports.append) as server:
    call(server)
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    # Room for two stacks.
    resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
    strangers = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(6)]
    while not reports:
        time.sleep(0.01)
    for stranger in strangers:
        stranger.close()
    while threading.active_count() > 3:
        time.sleep(0.01)
    print(call(server), reports[0])
"""
    )
    assert out.startswith('1 WARNING') and 'no room for another thread' in out


def test_connections_leave_files_for_the_rest_of_the_process():
    out = run_limited(
        """
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 100))
with Server('localhost:0', functions, 'learner', None, reports.append) as server:
    clients = [Client(f'localhost:{server.port}', 'learner') for _ in range(30)]
    for client in clients:
        client.call('echo')
    # There is room for the server's ends and, in this process, for those of its clients.
    print(*resource.getrlimit(resource.RLIMIT_NOFILE), server._max_connections, *reports)
    for client in clients:
        client.close()
"""
    )
    assert out.split() == ['100', '100', '50']


def test_localhost_is_not_reached_from_the_network(make_server):
    server = make_server(address='localhost:0')
    with pytest.raises(OSError), socket.create_connection(('127.0.0.2', server.port), 1):
        pass
    open_server = make_server(address='0.0.0.0:0')
    socket.create_connection(('127.0.0.2', open_server.port), 1).close()


def test_the_user_is_told_who_reaches_a_port():
    assert calls.port_of('0.0.0.0:8000', 8000) == 'port 8000'
    for host in ('localhost', '[::1]', '127.0.0.2'):
        words = f'port 8000, of this machine only (--learner_address={host}:8000)'
        assert calls.port_of(f'{host}:8000', 8000) == words


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
