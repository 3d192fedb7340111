"""Agent steps a second of full training, and where both cores' time goes.

    python -m benchmarks.throughput --level_name=ALE/Pong-v5

Runs `experiment.py` for `--seconds` after a warm-up, then measures its parts alone on the same
machine: environments with random actions, a process on each core, the agent's step at the batch
size seen in training, and the learner's step. Those two have all cores in two ways: one step at a
time with a thread per core for each operation, the usual measure of a machine, and with the
threads of training (`--intra_op_threads`), as many steps at a time as these leave cores for.
The second wastes less of the cores, so it leaves more to `rest`.

Each part's share of the cores' time is its rate in training over its rate alone; `rest` is the
remainder: hand-over, contention, idleness. `--rounds` repeats all of it in turn, because shared
machines drift; medians are given. Training draws its first learning curve within the warm-up.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine, stages
from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import tensorflow as tf

from impala.config import LearnerConfig
from impala.environments import EnvironmentConfig, create_environment
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import has_fast_bfloat16
from impala.trajectory import (
    ActorOutput,
    AgentOutput,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CORES = len(os.sched_getaffinity(0))
PARTS = ('environment', 'inference', 'learning')

ENVIRONMENT_LOOP = """
import sys, time
import numpy as np
from impala.environments import EnvironmentConfig, create_environment
environment = create_environment(sys.argv[1], int(sys.argv[2]), EnvironmentConfig())
actions = np.random.RandomState(0).randint(environment.spec.num_actions, size=1000).tolist()
environment.reset()
steps, started = 0, time.perf_counter()
while time.perf_counter() - started < float(sys.argv[3]):
    for action in actions:
        environment.step(action)
    steps += len(actions)
print(steps / (time.perf_counter() - started))
"""


def training_rate(flags: list[str], warm_up: float, seconds: float) -> tuple[float, float]:
    """Trains for real; returns agent steps per second and the mean size of inference batches."""
    logdir = tempfile.mkdtemp(prefix='impala-benchmark-')
    errors_path = os.path.join(logdir, 'stderr')
    with open(errors_path, 'wb') as errors:
        process = subprocess.Popen(
            [sys.executable, 'experiment.py', *flags, f'--logdir={logdir}', '--log_secs=1'],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        path = os.path.join(logdir, 'metrics.jsonl')
        while not os.path.exists(path) or os.path.getsize(path) == 0:
            if process.poll() is not None:
                with open(errors_path, encoding='utf-8') as file:
                    sys.exit(f'Training ended early:\n{file.read()}')
            time.sleep(0.1)
        time.sleep(warm_up + seconds)
        process.send_signal(signal.SIGINT)
        process.wait()
        with open(path, encoding='utf-8') as file:
            lines = [json.loads(line) for line in file]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(logdir)
    # The last line may cover less than a second.
    last = lines[-2]
    first = next(
        line for line in lines if line['wall_seconds'] > lines[0]['wall_seconds'] + warm_up
    )
    rate = (last['agent_steps'] - first['agent_steps']) / (
        last['wall_seconds'] - first['wall_seconds']
    )
    return rate, statistics.fmean(line['inference_batch_size'] for line in lines)


def environment_rate(level_name: str, seconds: float) -> float:
    """Returns agent steps per second of one process per core with random actions."""
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', ENVIRONMENT_LOOP, level_name, str(seed), str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(CORES)
    ]
    return sum(float(process.communicate()[0]) for process in processes)


def concurrent_rate(
    create: Callable[[], Callable[[], Any]], num_concurrent: int, rows: int, seconds: float
) -> float:
    """Returns rows per second of several functions together, each on its own thread.

    Args:
      create: makes one of the functions.
      num_concurrent: functions that are called at the same time.
      rows: that a call computes.
      seconds: of measurement.
    """
    functions = [create() for _ in range(num_concurrent)]
    for function in functions:
        for _ in range(3):
            function()

    def rate(function: Callable[[], Any]) -> float:
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            function()
            calls += 1
        return calls * rows / (time.perf_counter() - started)

    with concurrent.futures.ThreadPoolExecutor(num_concurrent) as executor:
        return sum(executor.map(rate, functions))


def steps_at_a_time(intra_op_threads: int) -> int:
    """Returns how many concurrent steps fill the cores, given threads per operation (0: all)."""
    return max(1, CORES // intra_op_threads) if intra_op_threads else 1


def _step_output(spec: EnvironmentSpec, dims: list[int]) -> StepOutput:
    random = np.random.RandomState(0)
    zeros = tf.zeros(dims)
    observation = {
        name: tf.constant(random.randint(0, 256, [*dims, *array.shape]).astype(array.dtype))
        for name, array in spec.observation.items()
    }
    info = StepOutputInfo(zeros, *2 * [tf.zeros(dims, tf.int32)])
    return StepOutput(zeros, info, tf.zeros(dims, tf.bool), observation)


def inference(spec: EnvironmentSpec, config: AgentConfig, rows: int) -> Callable[[], Any]:
    """Returns a function that computes a step of a new agent on this many rows."""
    agent = Agent(config, spec)
    output, state = _step_output(spec, [rows]), agent.initial_state(rows)
    step = tf.function(lambda: agent.step(tf.zeros([rows], tf.int32), output, state)[0].action)
    return lambda: step().numpy()


def learning(
    spec: EnvironmentSpec, config: AgentConfig, batch_size: int, length: int
) -> Callable[[], Any]:
    """Returns a function that makes a step of a new learner."""
    agent = Agent(config, spec)
    learner = Learner(agent, LearnerConfig.of(batch_size=batch_size, unroll_length=length))
    dims = [length + 1, batch_size]
    batch = ActorOutput(
        tf.zeros([batch_size], tf.int32),
        tf.zeros([batch_size], tf.int64),
        agent.initial_state(batch_size),
        _step_output(spec, dims),
        AgentOutput(tf.zeros(dims, tf.int32), tf.zeros([*dims, spec.num_actions]), tf.zeros(dims)),
    )
    return lambda: learner.step(batch)['loss/total'].numpy()


def network_rates(args: argparse.Namespace) -> dict[str, float]:
    """Returns rows per second of the network's two parts, alone, in this process."""
    tf.config.threading.set_intra_op_parallelism_threads(args.intra_op_threads)
    environment = create_environment(args.level_name, 1, EnvironmentConfig())
    spec = environment.spec
    environment.close()
    acting = AgentConfig(torso=args.torso, core='none')
    learner = AgentConfig(torso=args.torso, core='none', compute_dtype=args.compute_dtype)
    at_a_time = steps_at_a_time(args.intra_op_threads)
    return {
        'inference': concurrent_rate(
            functools.partial(inference, spec, acting, args.rows),
            at_a_time,
            args.rows,
            args.part_seconds,
        ),
        'learning': concurrent_rate(
            functools.partial(learning, spec, learner, args.batch_size, args.unroll_length),
            at_a_time,
            args.batch_size * args.unroll_length,
            args.part_seconds,
        ),
    }


def network_rates_of_process(
    flags: list[str], intra_op_threads: int, rows: float, args: argparse.Namespace
) -> dict[str, float]:
    """Returns the same from a new process, since TensorFlow's threads are fixed at its start."""
    command = [sys.executable, '-m', 'benchmarks.throughput', *flags]
    command += [f'--intra_op_threads={intra_op_threads}', f'--rows={max(1, round(rows))}']
    command.append(f'--part_seconds={args.part_seconds}')
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Prints a table or two and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--level_name', default='ALE/Pong-v5')
    parser.add_argument('--num_actors', type=int, default=64)
    parser.add_argument('--envs_per_process', type=int, default=32)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=20)
    parser.add_argument('--torso', default='shallow')
    parser.add_argument(
        '--compute_dtype',
        default='bfloat16' if has_fast_bfloat16() else 'float32',
        help='float32 or bfloat16; default: the faster one on this processor',
    )
    parser.add_argument('--inference_batch_size', type=int, default=32)
    parser.add_argument('--intra_op_threads', type=int, default=1, help='0: one per core')
    parser.add_argument('--warm_up', type=float, default=15, help='seconds')
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--part_seconds', type=float, default=5, help='for each of the parts alone')
    parser.add_argument('--rows', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        print(json.dumps(network_rates(args)))
        return
    flags = [
        f'--{name}={getattr(args, name)}'
        for name in (
            'level_name', 'num_actors', 'envs_per_process', 'batch_size', 'unroll_length', 'torso',
            'compute_dtype', 'inference_batch_size', 'intra_op_threads',
        )
    ]  # fmt: skip
    # Name of the measure -> threads per operation; 0: one per core.
    ways = {'a thread per core': 0}
    if args.intra_op_threads:
        ways["training's threads"] = args.intra_op_threads
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(args.rounds):
        stages.begin(f'round {number + 1} of {args.rounds}: training')
        training, rows = training_rate([*flags, '--core=none'], args.warm_up, args.seconds)
        stages.begin('the parts alone')
        shared = {
            'training': training,
            'environment': environment_rate(args.level_name, args.part_seconds),
            'rows': rows,
        }
        for way, threads in ways.items():
            rounds[way].append(shared | network_rates_of_process(flags, threads, rows, args))
    print(machine.describe())
    print(f'`python -m benchmarks.throughput {" ".join(sys.argv[1:])}`')
    result: dict[str, float] = {}
    for way in ways:
        median = {name: statistics.median(r[name] for r in rounds[way]) for name in rounds[way][0]}
        shares = {
            part: statistics.median(r['training'] / r[part] for r in rounds[way]) for part in PARTS
        }
        rest = statistics.median(
            1 - sum(r['training'] / r[part] for part in PARTS) for r in rounds[way]
        )
        limit = statistics.median(1 / sum(1 / r[part] for part in PARTS) for r in rounds[way])
        table = [[part, f'{median[part]:,.0f}', f'{shares[part]:.1%}'] for part in PARTS]
        table += [['rest', '', f'{rest:.1%}'], ['training', f'{median["training"]:,.0f}', '100%']]
        if not result:
            print(f'Mean inference batch: {median["rows"]:.1f} of {args.num_actors} actors')
            result['agent_steps_per_second'] = round(median['training'])
        headers = ['part', f'agent steps/s alone, {way}', 'share of the cores']
        print(tabulate.tabulate(table, headers, 'github'))
        print(f'Limit, from the parts alone: {limit:,.0f} agent steps/s')
        suffix = '' if way == 'a thread per core' else '_with_threads_of_training'
        result |= {f'rest_share{suffix}': round(rest, 4), f'limit{suffix}': round(limit)}
    print(json.dumps(result))


if __name__ == '__main__':
    main()
