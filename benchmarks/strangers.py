"""What strangers on the network cost a run whose jobs have a secret.

    python -m benchmarks.strangers --rounds=5 --seconds=15

A learner, an actor job and a stranger are on hosts of their own (Linux network namespaces). In
turns, the stranger does nothing, and everything at once without pause: it scans ports, sends random
bytes and HTTP, opens 300 connections without a word, calls with a wrong secret, replays the
recorded bytes of a genuine call, and sends graphs with a TensorFlow session. The ratio of agent
steps per second within a round says what that costs. All hosts share this machine's cores, so the
processor time of the stranger itself is most of it; it runs at the lowest priority. Needs root.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine, stages
from benchmarks.namespaces import Network, Unavailable
from impala.cluster import channel
from impala.cluster.channel import RemoteError
from impala.runs.files import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
PORT = 8000
NUM_SILENT = 300
# A TensorFlow session connects for this long before it gives up.
SESSION_SECONDS = 5


def say(address: tuple[str, int], data: bytes) -> bytes:
    """Sends bytes and returns what is answered within a second."""
    answer = b''
    with contextlib.suppress(OSError), socket.create_connection(address, 5) as connection:
        connection.settimeout(1)
        connection.sendall(data)
        while more := connection.recv(4096):
            answer += more
    return answer


def scan(address: tuple[str, int]) -> None:
    """Connects to a hundred ports, the learner's among them, and leaves at once."""
    for port in range(address[1] - 50, address[1] + 50):
        with contextlib.suppress(OSError):
            socket.create_connection((address[0], port), 1).close()


def babble(address: tuple[str, int]) -> None:
    """Sends random bytes, HTTP, and the preface of HTTP/2, with which gRPC begins."""
    say(address, random.randbytes(100_000))
    say(address, b'GET / HTTP/1.1\r\nHost: learner\r\nUser-Agent: stranger\r\nAccept: */*\r\n\r\n')
    say(address, b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes(50))


def open_silently(address: tuple[str, int]) -> None:
    """Opens connections and says nothing."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for _ in range(NUM_SILENT):
            stack.enter_context(socket.create_connection(address, 5))
        time.sleep(1)


def call_with_a_wrong_secret(address: tuple[str, int]) -> None:
    """Greets as a job does, without the secret."""
    with contextlib.suppress(RemoteError):
        channel.connect(f'{address[0]}:{address[1]}', 'learner', b'not the secret of the run', 5)


def open_a_session(address: tuple[str, int]) -> bool:
    """Sends a graph as the client of a TensorFlow server does; returns whether it ran."""
    import tensorflow as tf

    target = f'grpc://{address[0]}:{address[1]}'
    config = tf.compat.v1.ConfigProto(operation_timeout_in_ms=1000 * SESSION_SECONDS)
    config.rpc_options.disable_session_connection_sharing = True
    ran = threading.Event()

    def run() -> None:
        with (
            contextlib.suppress(tf.errors.OpError),
            tf.Graph().as_default(),
            tf.compat.v1.Session(target, config=config) as session,
        ):
            session.run(tf.constant(1))
            ran.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * SESSION_SECONDS)
    return ran.is_set()


def record(address: tuple[str, int], secret: bytes) -> bytes:
    """Makes a genuine call and returns the bytes that the caller sent."""
    recorded = bytearray()
    with socket.create_server(('127.0.0.1', 0)) as between:

        def pump(source: socket.socket, target: socket.socket, keep: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if keep:
                        recorded.extend(data)
                    target.sendall(data)

        def forward() -> None:
            near, _ = between.accept()
            far = socket.create_connection(address)
            threading.Thread(target=pump, args=(far, near, False), daemon=True).start()
            pump(near, far, True)

        threading.Thread(target=forward, daemon=True).start()
        caller = channel.connect(
            f'127.0.0.1:{between.getsockname()[1]}', 'learner', secret, deadline_seconds=10
        )
        caller.send({'call': 'status'})
        caller.receive(lambda _: 0)
        caller.close()
    return bytes(recorded)


def attack(address: tuple[str, int], recorded: bytes, with_session: bool) -> bool:
    """Does everything once; returns whether the graph of a session ran."""
    scan(address)
    babble(address)
    open_silently(address)
    call_with_a_wrong_secret(address)
    say(address, recorded)
    return with_session and open_a_session(address)


def attack_until(
    done: threading.Event, address: tuple[str, int], recorded: bytes
) -> dict[str, int | bool]:
    """Attacks in two threads; returns how often, and whether the graph of a session ran."""
    outcomes: list[bool] = []

    def repeat(with_session: bool) -> None:
        while not done.is_set():
            outcomes.append(attack(address, recorded, with_session))

    threads = [threading.Thread(target=repeat, args=(i == 0,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {'attacks': len(outcomes), 'ran': any(outcomes)}


def be_a_stranger(host: str, recording: str) -> None:
    """Attacks between a line on stdin and the next; prints a line after each turn."""
    recorded = pathlib.Path(recording).read_bytes()
    os.nice(19)
    while sys.stdin.readline():
        done = threading.Event()
        threading.Thread(target=lambda end: (sys.stdin.readline(), end.set()), args=(done,)).start()
        print(json.dumps(attack_until(done, (host, PORT), recorded)), flush=True)


def agent_steps(logdir: str, seconds: float) -> float:
    """Returns agent steps per second over a stretch of time."""

    def now() -> tuple[float, float]:
        line = read_metrics(logdir)[-1]
        return line['agent_steps'], line['wall_seconds']

    before = now()
    time.sleep(seconds)
    steps, elapsed = np.subtract(now(), before)
    return steps / elapsed


def measure(args: argparse.Namespace, network: Network, folder: str) -> tuple[list, list[str]]:
    """Returns rows of a table, and the learner's warnings."""
    learner_host, actor_host, stranger_host = network.hosts
    secret, logdir = os.path.join(folder, 'secret'), os.path.join(folder, 'run')
    key = os.urandom(32).hex()
    pathlib.Path(secret).write_text(key)
    address = f'--learner_address={learner_host.address}:{PORT}'
    common = ['--flagfile=configs/pong_quick.flags', f'--cluster_secret_file={secret}', address]
    log = os.path.join(folder, 'learner')
    with contextlib.ExitStack() as stack:

        def start(host, output: str, *command: str, **kwargs: Any) -> Any:
            file = stack.enter_context(open(output, 'wb'))
            streams: dict[str, Any] = {'stdin': subprocess.DEVNULL, 'stdout': file, 'stderr': file}
            streams |= kwargs
            process = subprocess.Popen(
                [*host.prefix, sys.executable, *command], cwd=ROOT, **streams
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        start(learner_host, log, 'experiment.py', *common, '--task=0', f'--logdir={logdir}',
              '--batch_size=4', '--log_secs=1')  # fmt: skip
        start(actor_host, os.path.join(folder, 'actor'), 'experiment.py', *common,
              '--job_name=actor', '--task=0', '--envs_per_actor=8',
              '--envs_per_process=8')  # fmt: skip
        while not (os.path.isdir(logdir) and read_metrics(logdir)):
            time.sleep(0.5)
        recording = os.path.join(folder, 'recorded')
        code = (
            'import pathlib, sys; from benchmarks import strangers; '
            'pathlib.Path(sys.argv[1]).write_bytes('
            'strangers.record((sys.argv[2], strangers.PORT), sys.argv[3].encode()))'
        )
        actor_host.run(sys.executable, '-c', code, recording, learner_host.address, key)
        stranger = start(stranger_host, os.path.join(folder, 'stranger'), __file__,
                         f'--stranger={learner_host.address}', f'--recording={recording}',
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        rows = []
        for number in range(args.rounds):
            stages.begin(f'round {number + 1} of {args.rounds}')
            calm = agent_steps(logdir, args.seconds)
            stranger.stdin.write(b'\n')
            stranger.stdin.flush()
            attacked = agent_steps(logdir, args.seconds)
            stranger.stdin.write(b'\n')
            stranger.stdin.flush()
            outcome = json.loads(stranger.stdout.readline())
            rows.append([calm, attacked, attacked / calm, outcome['attacks'], outcome['ran']])
        stranger.stdin.close()
    lines = pathlib.Path(log).read_text(errors='replace').splitlines()
    return rows, [line for line in lines if 'WARNING' in line]


def main() -> None:
    """Prints a table, the learner's warnings and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=15, help='with and without strangers')
    # Of the stranger's process.
    parser.add_argument('--stranger', help=argparse.SUPPRESS)
    parser.add_argument('--recording', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stranger:
        be_a_stranger(args.stranger, args.recording)
        return
    try:
        with Network(3) as network, tempfile.TemporaryDirectory() as folder:
            rows, warnings = measure(args, network, folder)
    except Unavailable as error:
        sys.exit(f'Network namespaces cannot be made here: {error}.')
    print(machine.describe())
    print(f'`python -m benchmarks.strangers {" ".join(sys.argv[1:])}`')
    headers = ['agent steps/s alone', 'with strangers', 'ratio', 'attacks', 'a graph ran']
    print(tabulate.tabulate(rows, headers, 'github', floatfmt='.3g'))
    print('\n'.join(warnings))
    ratio = float(np.median([row[2] for row in rows]))
    print(json.dumps({'ratio': round(ratio, 3), 'warnings': len(warnings)}))


if __name__ == '__main__':
    main()
