"""Calls per second of `batch_fn`, next to TensorFlow's own `tf.nondifferentiable_batch_function`.

    python -m benchmarks.batcher

Each caller is a Python thread in a tf.function, whose loop passes a uint8 frame of 72x96x3 and the
int32 that its last call returned, as an actor passes its observation and its state: it waits for
each answer. The function computes almost nothing, so that this measures batching itself, once
without variables, and once with as many (scalar) ones as the shallow network has.

A turn of the loop makes one such call, and in other rows four, one after the other, so that less
of what is measured is TensorFlow's while loop, the same for every batcher.

TensorFlow's function runs with several settings and the fastest counts. Ratios are medians over
rounds in which all take turns, because the speed of a shared machine drifts. `unbatched` is the
same loop calling the function itself. With few `--seconds` the start of the callers, threads of
Python, would dominate.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate
import tensorflow as tf

from benchmarks import machine, stages
from dynamic_batching import batch_fn


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--seconds', type=float, default=0.8, help='about, per measurement')
    parser.add_argument('--callers', type=numbers, default='1,16,48')
    parser.add_argument('--variables', type=numbers, default='0,13')
    parser.add_argument('--calls_a_turn', type=numbers, default='1,4')
    args = parser.parse_args()
    load = os.getloadavg()[0]
    table, result = [], {}
    for calls_per_turn, num_variables, callers in itertools.product(
        args.calls_a_turn, args.variables, args.callers
    ):
        stages.begin(f'{callers} callers, {num_variables} variables, {calls_per_turn} calls a turn')
        rates = _measure(callers, num_variables, calls_per_turn, args.rounds, args.seconds)
        theirs = max(
            (name for name in rates if name.startswith('TensorFlow')),
            key=lambda name: statistics.median(rates[name]),  # noqa: B023
        )
        ratios = [
            ours / other for ours, other in zip(rates['batch_fn'], rates[theirs], strict=True)
        ]
        lower, ratio, upper = np.percentile(ratios, [25, 50, 75])
        medians = {name: round(statistics.median(values)) for name, values in rates.items()}
        table.append(
            (
                calls_per_turn,
                num_variables,
                callers,
                medians['unbatched'],
                medians[theirs],
                theirs.partition(' ')[2],
                medians['batch_fn'],
                f'{ratio:.2f}',
                f'{lower:.2f}, {upper:.2f}',
            )
        )
        suffix = str(callers)
        if calls_per_turn > 1:
            suffix += f'_{calls_per_turn}_calls_a_turn'
        if num_variables:
            suffix += '_with_variables'
        result[f'ratio_{suffix}'] = round(float(ratio), 3)
        result[f'calls_per_second_{suffix}'] = medians['batch_fn']
    print(
        f'{machine.describe()}, TensorFlow {tf.__version__}, load average at start {load:.1f}; '
        f'calls/s, medians of {args.rounds} rounds'
    )
    headers = ['calls a turn', 'variables', 'callers', 'unbatched']
    headers += ['TensorFlow', 'settings', 'batch_fn', 'ratio', 'quartiles']
    print(tabulate.tabulate(table, headers=headers, tablefmt='github'))
    print(json.dumps(result))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]


def _measure(
    callers: int, num_variables: int, calls_per_turn: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Returns calls/s of each round, by name of the batcher."""
    variables = [tf.Variable(0) for _ in range(num_variables)]

    def act(frames, counts):
        """Args: frames uint8 [B, 72, 96, 3], counts int32 [B]. Returns counts + 1."""
        total = tf.add_n(variables) if variables else 0
        return counts + tf.cast(frames[:, 0, 0, 0], tf.int32) + total

    batched: dict[str, Callable[..., Any]] = {'unbatched': act, 'batch_fn': batch_fn(act)}
    half = max(callers // 2, 1)
    for threads, maximum, timeout in (
        (1, callers, 0),
        (2, callers, 0),
        (2, half, 1000),
        (1, callers, 1000),
    ):
        name = f'TensorFlow {threads} threads, at most {maximum}, {timeout} us'
        batched[name] = _tensorflow_batch_fn(act, threads, maximum, timeout)
    # Each caller has its own frame; otherwise all copies would come from the same cached memory.
    frames = [tf.fill([1, 72, 96, 3], tf.constant(1, tf.uint8)) for _ in range(callers)]
    measurements = {
        name: _measurement(function, frames, calls_per_turn) for name, function in batched.items()
    }
    calls = {}
    for name, measure in measurements.items():
        measure(10 * callers)
        calls[name] = round(seconds * measure(200 * callers))
    rates: dict[str, list[float]] = {name: [] for name in batched}
    for round_ in range(rounds):
        # The last in a round is first in the next.
        for name in list(batched) if round_ % 2 else reversed(list(batched)):
            rates[name].append(measurements[name](calls[name]))
    return rates


def _tensorflow_batch_fn(
    function: Callable[..., Any], threads: int, maximum: int, timeout_micros: int
) -> Callable[..., Any]:
    batched = tf.nondifferentiable_batch_function(
        threads, maximum, timeout_micros, max_enqueued_batches=1000
    )(function)
    # TensorFlow names the queue after the scope of the call, and shares it, with the options of the
    # first call, among all calls in the process that are in a scope of that name. The tf.function
    # has the calls of one loop's turn in the same scope.
    scope = f'batch_{id(batched)}'

    @tf.function
    def call(*args):
        with tf.name_scope(scope):
            return batched(*args)

    return call


def _measurement(
    function: Callable[..., Any], frames: list[tf.Tensor], calls_per_turn: int
) -> Callable[[int], float]:
    """Returns a function that makes about this many calls and returns calls/s."""

    @tf.function
    def loop(frame, turns):
        count = tf.constant([0])
        for _ in tf.range(turns):
            for _ in range(calls_per_turn):
                count = function(frame, count)
                count.set_shape([1])  # TensorFlow's batcher does not report it.
        return count

    def measure(total_calls):
        turns = max(round(total_calls / len(frames) / calls_per_turn), 1)
        calls = turns * calls_per_turn
        counts: list[Any] = [None] * len(frames)

        def run(caller):
            counts[caller] = loop(frames[caller], tf.constant(turns))

        threads = [threading.Thread(target=run, args=(caller,)) for caller in range(len(frames))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        if any(int(count[0]) != calls for count in counts):
            raise RuntimeError('a caller has not got the answers that it should have')
        return calls * len(frames) / seconds

    loop(frames[0], tf.constant(1))  # Traced before threads race for it.
    return measure


if __name__ == '__main__':
    main()
