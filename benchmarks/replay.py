"""What replay costs each batch: processor time of storing, and of drawing and assembling.

For Atari (84x84x4, T=20, B=32) and DeepMind Lab (72x96x3, T=100, B=4), half of each batch replayed,
without queue, network and learner. Everything runs on one thread and counts its processor
time, so that other work on the machine matters little. In turn, the bytes of a batch are copied
into new memory, the lower bound for assembling a batch.

Then the trajectories a second that a replay job on the loopback interface stores and returns, and,
as a limit, the bytes a second of bare sockets between two processes. These are wall time, which
other work on the machine affects.

    python -m benchmarks.replay --batches=100 --seconds=10
"""

import argparse
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine, stages
from benchmarks.ingest import SEND_BYTES
from impala.cluster.remote_replay import RemoteReplay
from impala.experience.batch import unroll_components
from impala.experience.mixture import ReplayMixer
from impala.experience.replay import Replay, unroll_nbytes
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, UnrollArray

_CAPACITY = 500
_LSTM_STATE = [ArraySpec((256,), 'float32')] * 2
_SETTINGS: dict[str, dict[str, Any]] = {
    'Atari, T=20, B=32': {
        'observation': {'frame': ArraySpec((84, 84, 4), 'uint8')},
        'num_actions': 6,
        'state': [],
        'unroll_length': 20,
        'batch_size': 32,
        'stack': 'frame',
    },
    'DeepMind Lab, T=100, B=4': {
        'observation': {
            'frame': ArraySpec((72, 96, 3), 'uint8'),
            'instruction': ArraySpec((32,), 'int32'),
        },
        'num_actions': 9,
        'state': _LSTM_STATE,
        'unroll_length': 100,
        'batch_size': 4,
        'stack': None,
    },
}


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, default=100, help='of each setting')
    parser.add_argument('--seconds', type=float, default=10.0, help='of each rate of a job')
    args = parser.parse_args()
    load = os.getloadavg()[0]
    results = []
    for name, setting in _SETTINGS.items():
        stages.begin(f'{name}: processor time')
        results.append({'trajectory': name, **_measure(args.batches, **setting)})
    print(f'{machine.describe()}; load at the start {load:.1f}')
    print('Medians, milliseconds of processor time per batch.')
    print(tabulate.tabulate(results, headers='keys', floatfmt='.2f', tablefmt='github'))
    with _replay_job() as address:
        rates = []
        for name, setting in _SETTINGS.items():
            stages.begin(f'{name}: a replay job')
            rates.append({'trajectory': name, **_measure_job(address, args.seconds, **setting)})
    stages.begin('bare sockets')
    limit = _measure_sockets(args.seconds)
    print('A replay job by TCP on the loopback interface.')
    print(tabulate.tabulate(rates, headers='keys', floatfmt=',.0f', tablefmt='github'))
    print(f'Bare sockets: {limit:,.0f} MB/s')
    print(
        json.dumps(
            {
                'machine': machine.describe(),
                'results': results,
                'rates': rates,
                'bare_sockets_mb_per_second': limit,
            }
        )
    )


def _unrolls(
    observation: dict[str, ArraySpec],
    num_actions: int,
    state: list[ArraySpec],
    unroll_length: int,
    size: int,
    stack: str | None,
) -> tuple[list[UnrollArray], list[np.ndarray]]:
    """Returns the arrays of an unroll, and this many unrolls."""
    spec = EnvironmentSpec(observation, ActionSpec.discrete(num_actions), 4)
    # Two levels, as random numbers below are 0 and 1.
    components = unroll_components(spec, state, unroll_length, 2)
    return components, [
        _random(component, size, component.name == stack) for component in components
    ]


def _measure(
    num_batches: int, batch_size: int, stack: str | None, **setting: Any
) -> dict[str, float]:
    components, fresh = _unrolls(size=batch_size // 2, stack=stack, **setting)
    replay = Replay(components, _CAPACITY, 0, stack)
    mixer = ReplayMixer(replay, 0.5, batch_size)
    for _ in range(2 * _CAPACITY // batch_size + 1):
        replay.add(fresh)
    batch = mixer.mix(*fresh)
    times: dict[str, list[float]] = {'mix': [], 'store': [], 'copy': []}
    calls: dict[str, Callable[[], Any]] = {
        'mix': lambda: mixer.mix(*fresh),
        'store': lambda: replay.add(fresh),
        'copy': lambda: [array.copy() for array in batch],
    }
    for _ in range(num_batches):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            times[name].append(time.thread_time() - started)
    mix, store, copy = (1e3 * float(np.median(times[name])) for name in calls)
    return {
        'bytes each': unroll_nbytes(components, stack),
        'store': store,
        'draw and assemble': mix - store,
        'copy of a batch': copy,
    }


@contextlib.contextmanager
def _replay_job() -> Iterator[str]:
    """Runs a replay job; yields its address."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        address = f'localhost:{probe.getsockname()[1]}'
    program = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                           'experiment.py')  # fmt: skip
    flags = ['--job_name=replay', '--task=0', '--trusted_network']
    flags += [f'--replay_addresses={address}', f'--replay_capacity={_CAPACITY}']
    job = subprocess.Popen([sys.executable, program, *flags], stderr=subprocess.DEVNULL)
    try:
        while job.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(('localhost', int(address.partition(':')[2]))).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        job.kill()
        job.wait()


def _measure_job(
    address: str, seconds: float, batch_size: int, stack: str | None, **setting: Any
) -> dict[str, float]:
    number = batch_size // 2
    components, fresh = _unrolls(size=number, stack=stack, **setting)
    batch = [np.empty_like(array) for array in fresh]
    replay = RemoteReplay(
        components,
        stack,
        level_names=['a'],
        run_id=secrets.token_hex(16),
        addresses=[address],
        batch_size=batch_size,
        num_replayed=number,
        seed=0,
        report=print,
    )

    def num_lost() -> float:
        return replay.metrics().get('replay_unrolls_lost', 0)

    def store() -> float:
        lost = num_lost()
        replay.add(fresh)
        return number - (num_lost() - lost)

    def draw() -> float:
        if not replay.reserve(number):
            return 0
        replay.sample(batch)
        return number

    def rate(*calls: Callable[[], float]) -> float:
        """Returns unrolls a second; for calls in turns, those of the slower one."""
        counts = [0.0] * len(calls)
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            done = [call() for call in calls]
            counts = [count + more for count, more in zip(counts, done, strict=True)]
            if not any(done):
                time.sleep(0.001)
        return min(counts) / elapsed

    with replay:
        while len(replay) < number:
            store()
            time.sleep(0.01)
        rates = {'stored': rate(store), 'drawn': rate(draw), 'both at once': rate(store, draw)}
    nbytes = unroll_nbytes(components, stack)
    row: dict[str, float] = {'bytes each': nbytes}
    for name, value in rates.items():
        row |= {f'{name}, 1/s': value, f'{name}, MB/s': value * nbytes / 1e6}
    return row


def _measure_sockets(seconds: float) -> float:
    """Returns MB/s from one process to another."""
    buffer = bytearray(1 << 21)
    with socket.create_server(('localhost', 0)) as listener:
        port = listener.getsockname()[1]
        sender = subprocess.Popen(
            [sys.executable, '-c', SEND_BYTES, str(port), str(len(buffer))],
            stderr=subprocess.DEVNULL,
        )
        try:
            connection, _ = listener.accept()
            with connection:
                started, received = time.perf_counter(), 0
                while (elapsed := time.perf_counter() - started) < seconds:
                    received += connection.recv_into(buffer)
        finally:
            sender.kill()
            sender.wait()
    return received / elapsed / 1e6


def _random(component: UnrollArray, size: int, is_stack: bool) -> np.ndarray:
    """Returns this many unrolls of random bytes, optionally as stacks of the last frames."""
    random = np.random.default_rng(0)
    shape = list(component.shape)
    shape.insert(int(component.time_major), size)
    if not is_stack:
        return random.integers(0, 2, shape).astype(component.dtype)
    rows, depth = shape[0], shape[-1]
    frames = random.integers(0, 256, (rows + depth - 1, *shape[1:-1]), np.uint8)
    return np.stack([frames[i : i + rows] for i in range(depth)], -1)


if __name__ == '__main__':
    main()
