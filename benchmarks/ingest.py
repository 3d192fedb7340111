"""How many observations a second reach a learner from actors on the network, and what that costs.

    python -m benchmarks.ingest --actors=2 --seconds=20

Real: the learner's server and actor jobs' connections on loopback, the inbox with its checks,
batches of 32 x 101 rows that a learner step touches. Not real: actors send one ready-made unroll of
72x96x3 frames again and again, as fast as the learner takes it. As a limit, as many bytes through
bare sockets between as many processes, without copies into batches.

    python -m benchmarks.ingest --frame=84x84x4 --stacked --unroll_length=20

sends unrolls of Atari, each frame of a stack once. `--secret` authenticates all messages.
`--weight_clients=1,10,100` measures how long reading the deep network's weights takes when that
many clients do nothing else, `--connected_clients=200` memory and threads of the learner.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import tabulate
import tensorflow as tf

from benchmarks import machine, stages
from impala.cluster.exchange import UnrollInbox
from impala.cluster.learner_service import LearnerConnection, LearnerService
from impala.cluster.unroll_format import UnrollFormat
from impala.networks.agent import Agent, AgentConfig
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, UnrollArray

FRAME = (72, 96, 3)
NUM_ACTIONS = 9
MB = 2**20
SECRET = b'known to all processes of this benchmark'

SEND_BYTES = """
import socket, sys
data = bytes(int(sys.argv[2]))
with socket.create_connection(('localhost', int(sys.argv[1]))) as connection:
    while True:
        connection.sendall(data)
"""


def components(unroll_length: int, frame: Sequence[int] = FRAME) -> list[UnrollArray]:
    """Returns the arrays of an unroll of the deep network, by default in DeepMind Lab."""
    rows = (unroll_length + 1,)
    return [
        UnrollArray((), 'int64', 'policy_version', time_major=False, low=0),
        UnrollArray((), 'int32', 'level_id', time_major=False, low=0, high=29),
        UnrollArray((256,), 'float32', 'hidden', time_major=False),
        UnrollArray((256,), 'float32', 'cell', time_major=False),
        UnrollArray(rows, 'float32', 'reward'),
        UnrollArray(rows, 'float32', 'episode_return'),
        UnrollArray(rows, 'int32', 'episode_step', low=0),
        UnrollArray(rows, 'int32', 'episode_frames', low=0),
        UnrollArray(rows, 'uint8', 'end', high=3),
        UnrollArray((*rows, *frame), 'uint8', 'frame'),
        UnrollArray(rows, 'int32', 'action', low=0, high=NUM_ACTIONS - 1),
        UnrollArray((*rows, NUM_ACTIONS), 'float32', 'policy'),
        UnrollArray(rows, 'float32', 'baseline'),
    ]


def make_unroll(unroll_length: int, frame: Sequence[int] = FRAME) -> list[np.ndarray]:
    """Returns the arrays of one unroll, with TensorFlow's memory layout."""
    return [
        np.asarray(tf.zeros(component.shape, component.dtype))
        for component in components(unroll_length, frame)
    ]


def deep_network() -> list[tf.Variable]:
    """Returns the weights of the deep network with LSTM."""
    spec = EnvironmentSpec(
        {'frame': ArraySpec(FRAME, 'uint8')}, ActionSpec.discrete(NUM_ACTIONS), 4
    )
    agent = Agent(AgentConfig(torso='deep', core='lstm', compute_dtype='float32'), spec)
    return list(agent.trainable_variables)


@tf.function
def touch(frames):
    """Reads a line of pixels of every frame of a batch."""
    return tf.reduce_sum(tf.cast(frames[:, :, 0], tf.int32))


class Unrolls(NamedTuple):
    """What the actors send.

    Attributes:
      unroll_length: agent steps.
      frame: shape of a frame.
      stack: name of the array that is a stack of frames, None if none is.
      secret: of the run, None without one.
    """

    unroll_length: int
    frame: tuple[int, ...]
    stack: str | None
    secret: bytes | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> 'Unrolls':
        """Returns what the command line says."""
        return cls(
            args.unroll_length,
            args.frame,
            'frame' if args.stacked else None,
            SECRET if args.secret else None,
        )

    @property
    def components(self) -> list[UnrollArray]:
        """The arrays of an unroll."""
        return components(self.unroll_length, self.frame)

    @property
    def nbytes(self) -> int:
        """Bytes of an unroll on the network."""
        return UnrollFormat(self.components, self.stack).packed_nbytes

    def make(self) -> list[np.ndarray]:
        """Returns the arrays of one unroll."""
        return make_unroll(self.unroll_length, self.frame)

    def connect(self, address: str, **kwargs) -> LearnerConnection:
        """Returns a connection of an actor job."""
        return LearnerConnection(
            address,
            self.components,
            stack=self.stack,
            secret=self.secret,
            # Ready-made unrolls would shrink unlike those of an environment.
            compression='none',
            **kwargs,
        )


def send(address: str, unrolls: Unrolls, actor: int) -> None:
    """Sends one unroll repeatedly until the learner is gone."""
    connection = unrolls.connect(address)
    unroll = unrolls.make()
    for sequence in itertools.count(1):
        connection.put(unroll, actor, 'benchmark', sequence)


def read_weights(address: str, unrolls: Unrolls, clients: int, seconds: float) -> None:
    """Reads weights over several connections at once; prints the milliseconds that each took."""
    specs = [tf.TensorSpec(weight.shape, weight.dtype) for weight in deep_network()]
    connections = [
        unrolls.connect(address, weights=specs, deadline_seconds=120) for _ in range(clients)
    ]
    for connection in connections:
        connection.status()
    print('ready', flush=True)
    sys.stdin.readline()
    milliseconds: list[float] = []
    ends_at = time.perf_counter() + seconds

    def run(connection: LearnerConnection) -> None:
        while (started := time.perf_counter()) < ends_at:
            connection.weights()
            milliseconds.append((time.perf_counter() - started) * 1000)

    threads = [threading.Thread(target=run, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(milliseconds), flush=True)


def connect(address: str, unrolls: Unrolls, clients: int) -> None:
    """Connects several clients; each sends an unroll when a line arrives on stdin."""
    connections = [unrolls.connect(address, deadline_seconds=120) for _ in range(clients)]
    for connection in connections:
        connection.status()
    print('connected', flush=True)
    sys.stdin.readline()
    unroll = unrolls.make()
    for actor, connection in enumerate(connections):
        threading.Thread(
            target=connection.put, args=(unroll, actor, 'benchmark', 1), daemon=True
        ).start()
    sys.stdin.readline()
    os._exit(0)


@contextlib.contextmanager
def subprocesses(count: int, *args: object):
    """Runs Python processes with these arguments and a number each during the block."""
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, args), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def learner(capacity: int, unrolls: Unrolls):
    """An inbox and the address of its service during the block."""
    queue = UnrollInbox(capacity, unrolls.components, 'policy_version', stack=unrolls.stack)
    service = LearnerService('localhost:0', queue, {}, unrolls.secret, print)
    service.publish(0, [tf.identity(weight) for weight in deep_network()])
    try:
        yield queue, f'localhost:{service.port}'
    finally:
        queue.close()
        service.close()


def cpu_seconds(pids: list[int]) -> np.ndarray:
    """Returns seconds of user and system time so far, summed over processes."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return np.array([sum(t.user for t in times), sum(t.system for t in times)])


def measure(args: argparse.Namespace) -> tuple[float, list[list]]:
    """Returns observations per second and a table of where the time goes."""
    unrolls = Unrolls.of(args)
    frame = [component.name for component in unrolls.components].index('frame')
    with (
        learner(args.capacity, unrolls) as (queue, address),
        subprocesses(args.actors, *role('send', address, args)) as actors,
    ):
        pids = [process.pid for process in actors]
        for _ in range(5):
            touch(queue.take(args.batch_size).components[frame])
        waited = touched = 0.0
        observations = 0
        copied = queue.statistics().copy_seconds
        cpu = [cpu_seconds([os.getpid()]), cpu_seconds(pids)]
        started = time.perf_counter()
        while (now := time.perf_counter()) - started < args.seconds:
            batch = queue.take(args.batch_size)
            taken = time.perf_counter()
            touch(batch.components[frame]).numpy()
            waited += taken - now
            touched += time.perf_counter() - taken
            observations += args.batch_size * args.unroll_length
        elapsed = time.perf_counter() - started
        learner_cpu = (cpu_seconds([os.getpid()]) - cpu[0]) / elapsed
        actor_cpu = (cpu_seconds(pids) - cpu[1]) / elapsed
        copied = queue.statistics().copy_seconds - copied
    table = [
        ['learner: wait for a batch', f'{waited / elapsed:.2f}'],
        ['learner: touch it', f'{touched / elapsed:.2f}'],
        ['copies into batches, all threads', f'{copied / elapsed:.2f}'],
        ['processor time of the learner, user', f'{learner_cpu[0]:.2f}'],
        ['processor time of the learner, system', f'{learner_cpu[1]:.2f}'],
        ['processor time of the actors, user', f'{actor_cpu[0]:.2f}'],
        ['processor time of the actors, system', f'{actor_cpu[1]:.2f}'],
    ]
    return observations / elapsed, table


def parse_shape(text: str) -> tuple[int, ...]:
    """Returns the dimensions of `84x84x4`."""
    return tuple(map(int, text.split('x')))


def measure_limit(args: argparse.Namespace, seconds: float) -> float:
    """Returns observations per second of bare sockets."""
    size = Unrolls.of(args).nbytes
    received = [0] * args.actors

    def receive(index: int, connection: socket.socket) -> None:
        unroll = memoryview(bytearray(size))
        with contextlib.suppress(OSError):
            while count := connection.recv_into(unroll):
                received[index] += count

    with (
        socket.create_server(('localhost', 0)) as listener,
        subprocesses(args.actors, '-c', SEND_BYTES, listener.getsockname()[1], size),
    ):
        connections = [listener.accept()[0] for _ in range(args.actors)]
        for index, connection in enumerate(connections):
            threading.Thread(target=receive, args=(index, connection), daemon=True).start()
        time.sleep(1)
        before, started = sum(received), time.perf_counter()
        time.sleep(seconds)
        rate = (sum(received) - before) / (time.perf_counter() - started)
        for connection in connections:
            connection.close()
    return rate / size * args.unroll_length


def measure_weights(address: str, clients: int, args: argparse.Namespace) -> list[str]:
    """Returns a row of milliseconds per read: median and 99th percentile."""
    # Spread over few processes: hundreds of them would measure their own memory.
    count = min(clients, 2)
    milliseconds: list[float] = []
    seconds = args.weight_seconds
    with subprocesses(
        count, *role('read', address, args), f'--count={clients // count}'
    ) as readers:
        for process in readers:
            process.stdout.readline()
        for process in readers:
            process.stdin.write('\n')
            process.stdin.flush()
        for process in readers:
            milliseconds += json.loads(process.stdout.readline())
    return [
        str(clients),
        f'{np.median(milliseconds):.1f}',
        f'{np.percentile(milliseconds, 99):.1f}',
        f'{len(milliseconds) / seconds:.0f}',
    ]


def measure_connected(args: argparse.Namespace) -> list[list]:
    """Returns rows of the learner's memory and threads: alone, with clients, with their unrolls."""
    process_of_learner, clients = psutil.Process(), args.connected_clients

    def row(state: str) -> list:
        rss = process_of_learner.memory_info().rss
        return [state, f'{rss / MB:.0f}', process_of_learner.num_threads()]

    with learner(1, Unrolls.of(args)) as (queue, address):
        rows = [row('nobody connected')]
        with subprocesses(1, *role('connect', address, args), f'--count={clients}') as (process,):
            process.stdout.readline()
            rows.append(row(f'{clients} connected'))
            process.stdin.write('\n')
            process.stdin.flush()
            while queue.statistics().waiting < clients - 1:
                time.sleep(0.1)
            rows.append(row(f'{clients} wait with an unroll'))
            process.stdin.write('\n')
            process.stdin.flush()
            process.wait()
        # What has arrived as a whole waits for room although its sender is gone.
        while queue.statistics().queued > 0:
            queue.take(1)
        rows.append(row('all gone again'))
    return rows


def role(name: str, address: str, args: argparse.Namespace) -> list[str]:
    """Returns the command line of a process of this benchmark, without its number."""
    shape = 'x'.join(map(str, args.frame))
    flags = [f'--role={name}', f'--address={address}', f'--seconds={args.weight_seconds}']
    flags += [f'--frame={shape}', f'--unroll_length={args.unroll_length}']
    flags += [f'--{flag}' for flag in ('stacked', 'secret') if getattr(args, flag)]
    return [__file__, *flags]


def play(args: argparse.Namespace) -> None:
    """Plays the role of an actor job or of several."""
    unrolls = Unrolls.of(args)
    if args.role == 'send':
        send(args.address, unrolls, args.number)
    elif args.role == 'read':
        read_weights(args.address, unrolls, args.count, args.seconds)
    else:
        connect(args.address, unrolls, args.count)


def main() -> None:
    """Prints tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--actors', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=100)
    parser.add_argument('--frame', type=parse_shape, default=FRAME)
    parser.add_argument('--stacked', action='store_true', help='frames are stacks, sent packed')
    parser.add_argument('--secret', action='store_true', help='messages are authenticated')
    parser.add_argument('--capacity', type=int, default=32, help='of the queue, unrolls')
    parser.add_argument('--limit_seconds', type=float, default=5, help='of bare sockets')
    parser.add_argument('--weight_clients', default='1,10', help='numbers of clients; may be empty')
    parser.add_argument('--weight_seconds', type=float, default=5)
    parser.add_argument('--connected_clients', type=int, default=20, help='0: not measured')
    # Of the processes that this command starts.
    parser.add_argument('--role', choices=('send', 'read', 'connect'), help=argparse.SUPPRESS)
    parser.add_argument('--address', help=argparse.SUPPRESS)
    parser.add_argument('--count', type=int, help=argparse.SUPPRESS)
    parser.add_argument('number', type=int, nargs='?', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        play(args)
        return
    # First, while the process holds no memory of earlier batches.
    stages.begin('clients that are connected only')
    connected = measure_connected(args) if args.connected_clients else []
    stages.begin('bare sockets')
    limit = measure_limit(args, args.limit_seconds)
    stages.begin(f'{args.actors} actor jobs send for {args.seconds:g} s')
    observations_per_second, table = measure(args)
    print(machine.describe())
    print(f'`python -m benchmarks.ingest {" ".join(sys.argv[1:])}`')
    print(tabulate.tabulate(table, ['', 'seconds per second'], 'github'))
    nbytes = Unrolls.of(args).nbytes
    print(
        f'{observations_per_second:,.0f} observations/s, '
        f'{observations_per_second / args.unroll_length * nbytes / 1e9:.2f} GB/s; '
        f'bare sockets: {limit:,.0f} observations/s'
    )
    clients = [int(number) for number in args.weight_clients.split(',') if number]
    if clients:
        size = sum(weight.numpy().nbytes for weight in deep_network())
        print(f'\nReading {size / 1e6:.1f} MB of weights, all clients at once, nothing else:')
        stages.begin('reading weights')
        with learner(1, Unrolls.of(args)) as (_, address):
            rows = [measure_weights(address, number, args) for number in clients]
        headers = ['clients', 'median ms', '99% ms', 'reads/s']
        print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    if connected:
        print('\nThe learner process:')
        print(tabulate.tabulate(connected, ['', 'MB', 'threads'], 'github'))
    result = {
        'observations_per_second': round(observations_per_second),
        'share_of_bare_sockets': round(observations_per_second / limit, 3),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
