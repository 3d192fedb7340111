"""What replay costs each batch: processor time of storing, and of drawing and assembling.

For Atari (84x84x4, T=20, B=32) and DeepMind Lab (72x96x3, T=100, B=4), half of each batch replayed,
without queue, network and learner. All runs on one thread, and its processor time is what is
counted, so that other work on the machine matters little. In turn with it the bytes of a batch are
copied into new memory, which is the least that assembling a batch can cost.

    python -m benchmarks.replay --batches=100
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine
from dynamic_batching.exchange import Component
from impala.remote_actors import unroll_components
from impala.replay import Replay, unroll_nbytes
from impala.replay_mixer import ReplayMixer
from impala.trajectory import ArraySpec, EnvironmentSpec

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
    args = parser.parse_args()
    load = os.getloadavg()[0]
    results = [{'trajectory': name, **_measure(args.batches, **s)} for name, s in _SETTINGS.items()]
    print(f'{machine.describe()}; load at the start {load:.1f}')
    print('Medians, milliseconds of processor time per batch.')
    print(tabulate.tabulate(results, headers='keys', floatfmt='.2f', tablefmt='github'))
    print(json.dumps({'machine': machine.describe(), 'results': results}))


def _measure(
    num_batches: int,
    observation: dict[str, ArraySpec],
    num_actions: int,
    state: list[ArraySpec],
    unroll_length: int,
    batch_size: int,
    stack: str | None,
) -> dict[str, float]:
    spec = EnvironmentSpec(observation, num_actions, 4)
    components = unroll_components(spec, state, unroll_length, 1)
    fresh = [
        _random(component, batch_size // 2, component.name == stack) for component in components
    ]
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


def _random(component: Component, size: int, is_stack: bool) -> np.ndarray:
    """Returns so many unrolls of random bytes, where asked for as stacks of the last frames."""
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
