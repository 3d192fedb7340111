"""Learner and actor jobs on separate hosts: network namespaces with a bad network in between.

Needs root, `ip` and /dev/net/tun; otherwise the tests are skipped. Each namespace has all ports, so
jobs use the default one.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import CARTPOLE, PACED, PATIENCE_SECONDS, WarmRun, episodes, frames, metrics

from benchmarks import namespaces, numbered_level

ROOT = pathlib.Path(__file__).resolve().parents[2]
TLS = ROOT / 'deploy' / 'tls'
LEARNER_PORT, TUNNEL_PORT = 8000, 8443
ENDLESS = '--total_environment_frames=1000000000'

# Connects to a supposed learner, with TLS if there is a CA, and prints the outcome. An HTTP/2
# server answers these bytes with its settings.
KNOCK = """
import socket, ssl, sys
host, port, ca, certificate, key = sys.argv[1:]
connection = None
try:
    connection = socket.create_connection((host, int(port)), 3)
    if ca:
        context = ssl.create_default_context(cafile=ca)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if certificate:
            context.load_cert_chain(certificate, key)
        connection = context.wrap_socket(connection)
    connection.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + bytes(3) + b'\\4' + bytes(5))
    print('answer' if connection.recv(9) else 'closed')
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def make_network():
    """Creates a `Network`, which is removed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs):
            try:
                return stack.enter_context(namespaces.Network(*args, **kwargs))
            except namespaces.Unavailable as error:
                pytest.skip(f'Network namespaces cannot be made here: {error}.')

        yield make


def test_training_survives_a_bad_network_and_its_outage(tmp_path, make_network, monkeypatch):
    network = make_network(3, delay_seconds=0.02, loss=0.01)
    numbers = tmp_path / 'numbers'
    numbers.mkdir()
    monkeypatch.setenv(numbered_level.FOLDER_VARIABLE, str(numbers))
    logdir = tmp_path / 'run'
    learner_host, *actor_hosts = network.hosts
    with contextlib.ExitStack() as stack:
        # Both have the level on the command line.
        level = '--level_name=benchmarks.numbered_level:cart_pole'
        learner = stack.enter_context(
            WarmRun(
                tmp_path / 'learner',
                *CARTPOLE,
                level,
                '--task=0',
                f'--logdir={logdir}',
                f'--learner_address=0.0.0.0:{LEARNER_PORT}',
                ENDLESS,
                network=learner_host.name,
            )  # fmt: skip
        )
        actors = [
            stack.enter_context(
                WarmRun(
                    tmp_path / str(task),
                    '--job_name=actor',
                    f'--task={task}',
                    level,
                    '--envs_per_actor=4',
                    f'--learner_address={learner_host.address}:{LEARNER_PORT}',
                    network=host.name,
                )  # fmt: skip
            )
            for task, host in enumerate(actor_hosts)
        ]
        learner.wait_until(lambda: frames(logdir) > 3000)
        # The machine is on a network that no flag declares trusted.
        (warning,) = re.findall('WARNING: .*', learner.stderr)
        assert f'reaches port {LEARNER_PORT}' in warning
        assert 'docs/distributed.md' in warning

        network.is_cut = True
        # A call to the learner may take 10 seconds before it fails.
        for actor in actors:
            actor.wait_until(lambda actor=actor: 'Waiting for it' in actor.stderr)
        network.is_cut = False
        for actor in actors:
            actor.wait_until(lambda actor=actor: actor.stderr.count('is there') == 1)
        reached = frames(logdir)
        learner.wait_until(lambda: frames(logdir) > reached + 3000)
        assert network.lost > 0

        for run in (learner, *actors):
            run.send(signal.SIGINT)
        for run in (learner, *actors):
            assert run.wait() == 0
            assert 'Traceback' not in run.stderr
    lines = metrics(logdir)
    assert all(line['frames'] == 8 * 20 * line['updates'] for line in lines)
    assert all(row['rejected'] == 0 for row in lines[-1]['actors'])
    account = numbered_level.account(episodes(logdir), str(numbers))
    assert account.episodes * 20 >= lines[-1]['frames'] - 8 * 20
    assert (account.duplicates, account.gaps) == (0, {})


def test_strangers_do_not_disturb_a_run(tmp_path, make_network):
    learner_host, actor_host, stranger_host = make_network(3).hosts
    key, logdir = 'a secret of at least 16 bytes', tmp_path / 'run'
    (tmp_path / 'secret').write_text(key)
    secret = f'--cluster_secret_file={tmp_path / "secret"}'
    address = f'--learner_address={learner_host.address}:{LEARNER_PORT}'
    with (
        WarmRun(tmp_path / 'learner', *CARTPOLE, PACED, '--task=0', f'--logdir={logdir}', ENDLESS,
                address, secret, network=learner_host.name) as learner,
        WarmRun(tmp_path / 'actor', '--job_name=actor', '--task=0', '--envs_per_actor=4',
                '--envs_per_process=4', address, secret, network=actor_host.name) as actor,
    ):  # fmt: skip
        learner.wait_until(lambda: frames(logdir) > 1000)
        waited = actor.stderr.count('Waiting for it')
        recording = tmp_path / 'recorded'
        attack = (
            'import pathlib, sys; from benchmarks import strangers; '
            'address = (sys.argv[1], strangers.PORT); path = pathlib.Path(sys.argv[2]); '
        )
        genuine = 'path.write_bytes(strangers.record(address, sys.argv[3].encode()))'
        actor_host.run(
            sys.executable, '-c', attack + genuine, learner_host.address, str(recording), key
        )
        twice = 'print([strangers.attack(address, path.read_bytes(), i == 0) for i in range(2)])'
        outcome = stranger_host.run(
            sys.executable, '-c', attack + twice, learner_host.address, str(recording)
        )
        # No graph of a TensorFlow session has run.
        assert outcome.splitlines()[-1] == '[False, False]'
        reached = frames(logdir)
        learner.wait_until(lambda: frames(logdir) > reached + 3000)
        # Each reason once, and only the stranger's address.
        warnings = re.findall('WARNING: .*', learner.stderr)
        reasons = ('it is no job of this program', 'it says nothing', 'does not have the secret')
        for reason in reasons:
            assert sum(reason in warning for warning in warnings) == 1, warnings
        assert len(warnings) == len(reasons)
        assert all(f'(from {stranger_host.address})' in warning for warning in warnings)
        assert actor.stderr.count('Waiting for it') == waited
        for run in (learner, actor):
            run.send(signal.SIGINT)
        for run in (learner, actor):
            assert run.wait() == 0
            assert 'Traceback' not in run.stderr


@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
    """Folder with the certificates of a run in `ours` and of another run in `others`."""
    if shutil.which('openssl') is None:
        pytest.skip('openssl is not installed.')
    folder = tmp_path_factory.mktemp('certificates')
    for name in ('ours', 'others'):
        subprocess.run([TLS / 'make_certificates.sh', folder / name, 'mine'], check=True)
    return folder


def test_certificates_are_kept_and_keys_are_private(certificates, tmp_path):
    folder = tmp_path / 'ours'
    shutil.copytree(certificates / 'ours', folder)
    before = {path: path.read_bytes() for path in folder.rglob('*.pem')}
    subprocess.run([TLS / 'make_certificates.sh', folder, 'mine', 'new'], check=True)
    after = {path: path.read_bytes() for path in folder.rglob('*.pem')}
    assert before.items() <= after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} == {'new'}
    for path in [folder / 'ca.key', *folder.rglob('key.pem')]:
        assert path.stat().st_mode & 0o077 == 0

    def verify(purpose, owner):
        command = ['openssl', 'verify', '-CAfile', folder / 'ca.pem', '-purpose', purpose,
                   folder / owner / 'certificate.pem']  # fmt: skip
        return subprocess.run(command, capture_output=True).returncode == 0

    assert verify('sslserver', 'learner')
    assert verify('sslclient', 'actors/new')
    # An actor cannot pass itself off as the learner.
    assert not verify('sslserver', 'actors/new')
    assert not verify('sslclient', 'learner')


@contextlib.contextmanager
def script(folder, name, host, *args):
    """Runs a script in deploy/tls on a host; yields the process and the path of its output."""
    folder.mkdir()
    with open(folder / 'output', 'wb') as output:
        process = subprocess.Popen(
            [*host.prefix, TLS / name, *args],
            cwd=folder,
            env=os.environ | {'PYTHON': sys.executable, 'TMPDIR': str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process, folder / 'output'
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def test_only_holders_of_a_certificate_reach_the_learner(tmp_path, make_network, certificates):
    for tool in ('stunnel', 'socat', 'unshare'):
        if shutil.which(tool) is None:
            pytest.skip(f'{tool} is not installed.')
    learner_host, actor_host, other_host = make_network(3).hosts
    logdir = tmp_path / 'run'
    ours, others = (certificates / name for name in ('ours', 'others'))

    def knock(host, address, port, owner=None):
        files = [ours / 'ca.pem' if port == TUNNEL_PORT else '', '', '']
        if owner is not None:
            files[1:] = owner / 'certificate.pem', owner / 'key.pem'
        return host.run(sys.executable, '-c', KNOCK, address, str(port), *map(str, files))

    with (
        script(tmp_path / 'learner', 'learner.sh', learner_host, ours / 'learner',
               str(TUNNEL_PORT), *CARTPOLE, ENDLESS, f'--logdir={logdir}') as (learner, output),
        script(tmp_path / 'actor', 'actor.sh', actor_host, ours / 'actors' / 'mine',
               f'{learner_host.address}:{TUNNEL_PORT}', '--task=0', '--envs_per_actor=4'),
    ):  # fmt: skip
        deadline = time.monotonic() + PATIENCE_SECONDS
        while frames(logdir) < 1000:
            assert learner.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        there = learner_host.address
        assert 'answer' in knock(other_host, there, TUNNEL_PORT, ours / 'actors' / 'mine')
        # The error depends on whether the alert or the end of the connection is seen first.
        stranger = others / 'actors' / 'mine'
        for owner, alert in ((None, 'alert certificate required'), (stranger, 'alert unknown ca')):
            heard = knock(other_host, there, TUNNEL_PORT, owner)
            assert alert in heard or heard.startswith(('SSLEOFError', 'ConnectionResetError'))
        # The learner's own port is closed, even to its own machine.
        for host, address in ((other_host, there), (learner_host, there),
                              (learner_host, 'localhost')):  # fmt: skip
            assert 'ConnectionRefusedError' in knock(host, address, LEARNER_PORT)

        # This machine's end of the tunnel is in use.
        with script(tmp_path / 'twice', 'actor.sh', actor_host, ours / 'actors' / 'mine',
                    f'{there}:{TUNNEL_PORT}', '--task=1') as (twice, reason):  # fmt: skip
            assert twice.wait(PATIENCE_SECONDS) == 2
            assert reason.read_text().startswith('stunnel cannot listen on port 8000')

        # An actor does not send to another run's learner either.
        flags = '--task=1', '--reconnect_timeout=1'
        with script(tmp_path / 'misled', 'actor.sh', other_host, stranger,
                    f'{there}:{TUNNEL_PORT}', *flags) as (misled, _):  # fmt: skip
            assert misled.wait(PATIENCE_SECONDS) == 3

        learner.send_signal(signal.SIGTERM)
        assert learner.wait(PATIENCE_SECONDS) == 0
        assert 'The same command resumes from there.' in output.read_text()
    assert not list((tmp_path / 'learner').glob('tmp*'))
    assert not list((tmp_path / 'actor').glob('tmp*'))
