"""How many observations a second reach a learner from actors on the network, and what that costs.

    python -m benchmarks.ingest --actors=2 --seconds=20

Real: TensorFlow's server and sessions on loopback, the inbox with its checks, batches of 32 x 101
rows that a learner step touches. Not real: actors send one ready-made unroll of 72x96x3 frames
again and again, as fast as the learner takes it. As a limit, as many bytes through bare sockets
between as many processes.

`--weight_clients=1,10,100` measures how long reading the deep network's weights takes when that
many clients do nothing else, `--connected_clients=200` memory and threads of the learner.

    python -m benchmarks.ingest --rounds=5 --actors=4 --seconds=5 --frame=84x84x4 --unroll_length=20

compares, in turns and with nothing else, the sessions of actor jobs with calls of registered
functions (`benchmarks/registered_calls.py`), which no job uses.
"""

import argparse
import contextlib
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import tabulate
import tensorflow as tf

from benchmarks import machine, stages
from benchmarks.registered_calls import RegisteredConnection, RegisteredServer
from impala.cluster.exchange import UnrollInbox, WeightsBoard
from impala.cluster.transport import LearnerConnection, LearnerServer
from impala.networks.agent import Agent, AgentConfig
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, UnrollArray

FRAME = (72, 96, 3)
NUM_ACTIONS = 9
MB = 2**20
# What actor jobs use, and the alternative.
TRANSPORTS = ('sessions', 'registered calls')

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


def send(address: str, actor: int, unroll_length: int) -> None:
    """Sends one unroll repeatedly until the learner is gone."""
    connection = LearnerConnection(address, components(unroll_length))
    unroll = make_unroll(unroll_length)
    sequence = 0
    while True:
        sequence += 1
        connection.put(unroll, actor, 'benchmark', sequence)


def send_in_turns(
    addresses: dict[str, str], actor: int, unroll_length: int, frame: Sequence[int]
) -> None:
    """Sends one unroll repeatedly over the transport that a line on stdin names, until the next.

    An empty line ends the turn. Prints a line when the first unroll of a turn is in the inbox, and
    one when the turn has ended.
    """
    sessions, registered = TRANSPORTS
    connections: dict[str, LearnerConnection | RegisteredConnection] = {
        sessions: LearnerConnection(addresses[sessions], components(unroll_length, frame)),
        registered: RegisteredConnection(addresses[registered]),
    }
    unroll = make_unroll(unroll_length, frame)
    sequence = 0
    for line in sys.stdin:
        connection = connections[line.rstrip()]
        for turn in itertools.count():
            sequence += 1
            connection.put(unroll, actor, 'benchmark', sequence)
            if turn == 0:
                print('sending', flush=True)
            elif select.select([sys.stdin], [], [], 0)[0]:
                break
        sys.stdin.readline()
        print('idle', flush=True)


def read_weights(address: str, clients: int, seconds: float) -> None:
    """Reads weights over several connections at once; prints the milliseconds that each took."""
    specs = [tf.TensorSpec(weight.shape, weight.dtype) for weight in deep_network()]
    connections = [
        LearnerConnection(address, weights=specs, deadline_seconds=120) for _ in range(clients)
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


def connect(address: str, clients: int, unroll_length: int) -> None:
    """Connects several clients; each sends an unroll when a line arrives on stdin."""
    connections = [
        LearnerConnection(address, components(unroll_length), deadline_seconds=120)
        for _ in range(clients)
    ]
    for connection in connections:
        connection.status()
    print('connected', flush=True)
    sys.stdin.readline()
    unroll = make_unroll(unroll_length)
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
def inbox(capacity: int, unroll_length: int):
    """An inbox that exists during the block."""
    queue = UnrollInbox(capacity, components(unroll_length), 'policy_version')
    try:
        yield queue
    finally:
        queue.close()


def cpu_seconds(pids: list[int]) -> np.ndarray:
    """Returns seconds of user and system time so far, summed over processes."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return np.array([sum(t.user for t in times), sum(t.system for t in times)])


def measure(address: str, args: argparse.Namespace) -> tuple[float, list[list]]:
    """Returns observations per second and a table of where the time goes."""
    frame = [component.name for component in components(args.unroll_length)].index('frame')
    with (
        inbox(args.capacity, args.unroll_length) as queue,
        subprocesses(args.actors, __file__, '--role=send', address, args.unroll_length) as actors,
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


@contextlib.contextmanager
def consumed(queue: UnrollInbox, batch_size: int, frame: int) -> Iterator[None]:
    """Takes batches from the inbox and touches them during the block, then closes it.

    Args:
      queue: the inbox.
      batch_size: unrolls in a batch.
      frame: index of the frames among the components.
    """

    def consume() -> None:
        with contextlib.suppress(tf.errors.CancelledError):
            while True:
                touch(queue.take(batch_size).components[frame]).numpy()

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        yield
    finally:
        queue.close()
        thread.join()


class Turn(NamedTuple):
    """What one transport did in one round.

    Attributes:
      observations: observations per second.
      processor: processor time of learner and actors per 1,000 observations, seconds.
    """

    observations: float
    processor: float


def measure_turn(
    transport: str,
    actors: Sequence[Any],
    queue: UnrollInbox,
    unroll_length: int,
    seconds: float,
) -> Turn:
    """Lets all actors, processes that run `send_in_turns`, send over one transport and measures."""

    def tell(line: str) -> None:
        for actor in actors:
            actor.stdin.write(f'{line}\n')
            actor.stdin.flush()
        for actor in actors:
            if not actor.stdout.readline():
                raise RuntimeError(f'an actor has died: {transport}')

    def count() -> np.ndarray:
        accepted = sum(actor.accepted for actor in queue.statistics().actors.values())
        cpu = cpu_seconds([os.getpid(), *(actor.pid for actor in actors)]).sum()
        return np.array([time.perf_counter(), accepted * unroll_length, cpu])

    tell(transport)
    before = count()
    time.sleep(seconds)
    elapsed, observations, cpu = count() - before
    tell('')
    return Turn(observations / elapsed, cpu / observations * 1000)


def compare(address: str, args: argparse.Namespace) -> dict[str, list[Turn]]:
    """Returns what each transport did in each round; within a round they take turns."""
    layout = components(args.unroll_length, args.frame)
    queue = UnrollInbox(args.capacity, layout, 'policy_version')
    frame = [component.name for component in layout].index('frame')
    registered = RegisteredServer(queue, layout)
    addresses = dict(zip(TRANSPORTS, (address, f'localhost:{registered.port}'), strict=True))
    turns: dict[str, list[Turn]] = {transport: [] for transport in TRANSPORTS}
    shape = 'x'.join(map(str, args.frame))
    with (
        consumed(queue, args.batch_size, frame),
        subprocesses(
            args.actors,
            __file__,
            '--role=turns',
            json.dumps(addresses),
            args.unroll_length,
            shape,
        ) as actors,
    ):
        # The first turns include what happens only once, such as connecting.
        for transport in TRANSPORTS:
            measure_turn(transport, actors, queue, args.unroll_length, 0.5)
        for number in range(args.rounds):
            stages.begin(f'round {number + 1} of {args.rounds}')
            for transport in TRANSPORTS:
                turns[transport].append(
                    measure_turn(transport, actors, queue, args.unroll_length, args.seconds)
                )
    return turns


def print_comparison(turns: dict[str, list[Turn]]) -> None:
    """Prints medians over rounds, and ratios to sessions within rounds."""
    sessions = np.array(turns[TRANSPORTS[0]])
    rows = []
    for transport, measured in turns.items():
        values = np.array(measured)
        observations, processor = (values / sessions).T
        median = np.median(values, axis=0)
        rows.append(
            [
                transport,
                f'{median[0]:,.0f}',
                f'{np.median(observations):.2f}',
                f'{observations.min():.2f} to {observations.max():.2f}',
                f'{median[1]:.3f}',
                f'{np.median(processor):.2f}',
            ]
        )
    headers = ['', 'observations/s', 'ratio', 'in rounds', 'processor s per 1,000', 'ratio']
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    medians = {
        name: round(np.median([turn.observations for turn in turns[name]])) for name in turns
    }
    print(json.dumps({'observations_per_second': medians}))


def parse_shape(text: str) -> tuple[int, ...]:
    """Returns the dimensions of `84x84x4`."""
    return tuple(map(int, text.split('x')))


def measure_limit(args: argparse.Namespace, seconds: float) -> float:
    """Returns observations per second of bare sockets."""
    size = sum(array.nbytes for array in make_unroll(args.unroll_length))
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


def measure_weights(address: str, clients: int, seconds: float) -> list[str]:
    """Returns a row of milliseconds per read: median and 99th percentile."""
    # Spread over few processes: hundreds of them would measure their own memory.
    count = min(clients, 2)
    milliseconds: list[float] = []
    with subprocesses(
        count, __file__, '--role=read', address, clients // count, seconds
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


def measure_connected(address: str, clients: int, args: argparse.Namespace) -> list[list]:
    """Returns rows of the learner's memory and threads: alone, with clients, with their unrolls."""
    learner = psutil.Process()

    def row(state: str) -> list:
        return [state, f'{learner.memory_info().rss / MB:.0f}', learner.num_threads()]

    with inbox(1, args.unroll_length) as queue:
        rows = [row('nobody connected')]
        with subprocesses(1, __file__, '--role=connect', address, clients, args.unroll_length) as (
            process,
        ):
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
        while queue.statistics().waiting > 0:
            time.sleep(0.1)
        rows.append(row('all gone again'))
    return rows


def main() -> None:
    """Prints tables and a line of JSON."""
    if len(sys.argv) > 1 and sys.argv[1].startswith('--role='):
        role, rest = sys.argv[1].removeprefix('--role='), sys.argv[2:]
        if role == 'send':
            send(rest[0], int(rest[2]), int(rest[1]))
        elif role == 'turns':
            send_in_turns(json.loads(rest[0]), int(rest[3]), int(rest[1]), parse_shape(rest[2]))
        elif role == 'read':
            read_weights(rest[0], int(rest[1]), float(rest[2]))
        elif role == 'connect':
            connect(rest[0], int(rest[1]), int(rest[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--actors', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=100)
    parser.add_argument('--capacity', type=int, default=32, help='of the queue, unrolls')
    parser.add_argument('--limit_seconds', type=float, default=5, help='of bare sockets')
    parser.add_argument('--weight_clients', default='1,10', help='numbers of clients; may be empty')
    parser.add_argument('--weight_seconds', type=float, default=5)
    parser.add_argument('--connected_clients', type=int, default=20, help='0: not measured')
    parser.add_argument('--rounds', type=int, help='compare transports in this many rounds')
    parser.add_argument('--frame', type=parse_shape, default=FRAME, help='with --rounds')
    args = parser.parse_args()
    server = LearnerServer('localhost:0')
    address = f'localhost:{server.port}'
    if args.rounds:
        WeightsBoard('{}').publish([], 0)
        turns = compare(address, args)
        print(machine.describe())
        print(f'`python -m benchmarks.ingest {" ".join(sys.argv[1:])}`')
        print_comparison(turns)
        return
    board = WeightsBoard('{}')
    weights = deep_network()
    board.publish(weights, 0)
    # First, while the process holds no memory of earlier batches.
    stages.begin('clients that are connected only')
    connected = (
        measure_connected(address, args.connected_clients, args) if args.connected_clients else []
    )
    stages.begin('bare sockets')
    limit = measure_limit(args, args.limit_seconds)
    stages.begin(f'{args.actors} actor jobs send for {args.seconds:g} s')
    observations_per_second, table = measure(address, args)
    print(machine.describe())
    print(f'`python -m benchmarks.ingest {" ".join(sys.argv[1:])}`')
    print(tabulate.tabulate(table, ['', 'seconds per second'], 'github'))
    unroll_bytes = sum(array.nbytes for array in make_unroll(args.unroll_length))
    print(
        f'{observations_per_second:,.0f} observations/s, '
        f'{observations_per_second / args.unroll_length * unroll_bytes / 1e9:.2f} GB/s; '
        f'bare sockets: {limit:,.0f} observations/s'
    )
    clients = [int(number) for number in args.weight_clients.split(',') if number]
    if clients:
        size = sum(weight.numpy().nbytes for weight in weights)
        print(f'\nReading {size / 1e6:.1f} MB of weights, all clients at once, nothing else:')
        stages.begin('reading weights')
        rows = [measure_weights(address, number, args.weight_seconds) for number in clients]
        headers = ['clients', 'median ms', '99% ms', 'reads/s']
        print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    if connected:
        print('\nThe learner process:')
        print(tabulate.tabulate(connected, ['', 'MB', 'threads'], 'github'))
    print(json.dumps({'observations_per_second': round(observations_per_second)}))


if __name__ == '__main__':
    main()
