"""How long the learner waits for batches with 1, 2 and 4 loaders, when moving them takes time.

    python -m benchmarks.loading --transfer_ms=0,50,100 --seconds=10

Real: the inbox of unrolls, which copies them into batches, `Loading`, and the learner's step of
the shallow network on the CPU or, where there is one, the GPU. Actors are as fast as possible:
threads that put one ready-made unroll again and again. `--transfer_ms` is added to the moving of
every batch by sleeping, which costs the processor nothing, like a transfer by DMA; the table has
the bandwidth to which it corresponds.

`--step_ms` makes the learner sleep instead of its step, like one that waits for its accelerator;
then neither competes with the other for a core.

Settings are measured in turn, several times; the table has medians. The idle share is the learner's
time without a batch. `limit` is the idle share that n loaders cannot avoid, 1 - step * n /
transfer, with the step time of the same measurement.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate
import tensorflow as tf

from benchmarks import machine, stages
from impala.cluster.exchange import UnrollInbox
from impala.cluster.unroll_format import UnrollFormat
from impala.config import LearnerConfig
from impala.experience.batch import (
    UnrollBatch,
    batch_of_components,
    compiled,
    unroll_components,
)
from impala.experience.loading import Loading, move
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import has_fast_bfloat16
from impala.trajectory import (
    ActionSpec,
    ArraySpec,
    EnvironmentSpec,
)

SPEC = EnvironmentSpec(
    {'frame': ArraySpec((84, 84, 4), 'uint8')}, action=ActionSpec.discrete(6), num_action_repeats=4
)
PRODUCERS = 2


class Inbox:
    """An inbox of unrolls that is always full."""

    def __init__(self, config: LearnerConfig):
        components = unroll_components(SPEC, (), config.unroll_length, num_levels=1)
        self._inbox = UnrollInbox(config.batch_size, components, 'policy_version', 'frame')
        zeros = [np.zeros(each.shape, each.dtype) for each in components]
        # An aligned copy, which is not copied again.
        self._unroll = tf.constant(np.concatenate(UnrollFormat(components).buffers(zeros)))
        self._batch_size = config.batch_size

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Makes threads put unrolls during its block."""

        def put(actor: int) -> None:
            with contextlib.suppress(tf.errors.CancelledError):
                for sequence in range(1, sys.maxsize):
                    self._inbox.put(self._unroll, actor, actor, sequence)

        threads = [threading.Thread(target=put, args=(actor,)) for actor in range(PRODUCERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._inbox.close()
            for thread in threads:
                thread.join()

    def take(self) -> UnrollBatch:
        """Waits for a batch; for `compiled`."""
        actors, components = self._inbox.take(self._batch_size)
        return batch_of_components(components, actors, (), ['frame'])


def batch_size_in_bytes(config: LearnerConfig) -> int:
    """Returns the bytes to move for a batch."""
    components = unroll_components(SPEC, (), config.unroll_length, num_levels=1)
    return config.batch_size * sum(
        math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in components
    )


def measure(
    learner: Learner, loaders: int, transfer_seconds: float, step_seconds: float, seconds: float
) -> tuple[float, float]:
    """Returns updates per second and the share of the time in which the learner had no batch.

    Args:
      learner: makes the steps.
      loaders: threads.
      transfer_seconds: added to the moving of every batch.
      step_seconds: slept instead of a step; 0 for real ones.
      seconds: of measurement.
    """

    def move_slowly(batch: UnrollBatch, device: str | None) -> UnrollBatch:
        batch = move(batch, device)
        time.sleep(transfer_seconds)
        return batch

    inbox = Inbox(learner.config)
    # Closed before waiting for the loaders.
    with (
        Loading(compiled(inbox.take), loaders, learner.devices, move_slowly) as batches,
        inbox.filled(),
    ):

        def update() -> float:
            started = time.perf_counter()
            (batch,) = next(batches)
            waited = time.perf_counter() - started
            if step_seconds:
                time.sleep(step_seconds)
            else:
                float(learner.step(batch.actor_output)['loss/total'])
            return waited

        for _ in range(2 * loaders + 2):
            update()
        waited, updates, started = 0.0, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            waited += update()
            updates += 1
        elapsed = time.perf_counter() - started
    return updates / elapsed, waited / elapsed


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Plots idle share and updates per second over the transfer's time, a line per n."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for loaders in sorted({row['loaders'] for row in rows}):
        line = [row for row in rows if row['loaders'] == loaders]
        times = [row['transfer_ms'] for row in line]
        label = f'{loaders} loader{"s" if loaders > 1 else ""}'
        axes[0].plot(times, [100 * row['idle_share'] for row in line], marker='o', label=label)
        axes[1].plot(times, [row['updates_per_second'] for row in line], marker='o', label=label)
    axes[0].set_ylabel("learner's time without a batch, %")
    axes[1].set_ylabel('updates per second')
    for each in axes:
        each.set_xlabel('transfer of a batch, ms')
        each.set_ylim(bottom=0)
        each.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints one table and a line of JSON, and plots if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--loaders', default='1,2,4')
    parser.add_argument('--transfer_ms', default='0,50,100', help='added to the moving of a batch')
    parser.add_argument('--step_ms', type=float, default=0, help='slept instead of a step')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=20)
    parser.add_argument('--seconds', type=float, default=5, help='of each measurement')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--plot', help='file to draw into')
    args = parser.parse_args()
    load = os.getloadavg()[0]
    devices = ', '.join(d.device_type for d in tf.config.list_physical_devices())
    config = LearnerConfig.of(batch_size=args.batch_size, unroll_length=args.unroll_length)
    dtype = 'bfloat16' if has_fast_bfloat16() else 'float32'
    agent = Agent(AgentConfig(torso='shallow', core='none', compute_dtype=dtype), SPEC)
    learner = Learner(agent, config)
    batch_bytes = batch_size_in_bytes(config)
    transfers = [float(text) for text in args.transfer_ms.split(',')]
    settings = [
        (transfer, loaders)
        for transfer in transfers
        for loaders in map(int, args.loaders.split(','))
    ]
    rounds = []
    for number in range(args.rounds):
        of_round = []
        for transfer, loaders in settings:
            stages.begin(
                f'round {number + 1} of {args.rounds}: {loaders} loaders, {transfer:g} ms added'
            )
            of_round.append(
                measure(learner, loaders, transfer / 1000, args.step_ms / 1000, args.seconds)
            )
        rounds.append(of_round)
    rows = []
    for (transfer, loaders), results in zip(settings, zip(*rounds, strict=True), strict=True):
        rate, idle = (statistics.median(values) for values in zip(*results, strict=True))
        step = 1000 * (1 - idle) / rate
        limit = max(0.0, 1 - step * loaders / transfer) if transfer else 0.0
        rows.append(
            {
                'transfer_ms': transfer,
                'loaders': loaders,
                'updates_per_second': round(rate, 2),
                'step_ms': round(step, 2),
                'idle_share': round(idle, 4),
                'limit': round(limit, 4),
            }
        )
    print(f'{machine.describe()}, TensorFlow {tf.__version__} on {devices}, load {load:.1f}')
    print(f'`python -m benchmarks.loading {" ".join(sys.argv[1:])}`')
    print(f'Batches of {batch_bytes / 1e6:.1f} MB')
    table = [
        [
            f'{row["transfer_ms"]:g}',
            f'{batch_bytes / row["transfer_ms"] / 1e6:.2f}' if row['transfer_ms'] else '',
            row['loaders'],
            f'{row["updates_per_second"]:.1f}',
            f'{row["step_ms"]:.1f}',
            f'{row["idle_share"]:.1%}',
            f'{row["limit"]:.1%}',
        ]
        for row in rows
    ]
    headers = ['transfer ms', 'GB/s', 'loaders', 'updates/s', 'step ms', 'idle share', 'limit']
    print(tabulate.tabulate(table, headers, 'github', disable_numparse=True))
    print(json.dumps(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == '__main__':
    main()
