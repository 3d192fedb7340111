"""Agent steps a second of training, as a share of what its parts allow.

    python -m benchmarks.throughput --flagfile=configs/pong_fast.flags --rounds=5

Other flags are those of training; without any, it is the paper's Atari with 64 actors. In turns in
one run: `experiment.py` for `--seconds` after a warm-up; then the parts of that very configuration
alone, each with all cores: its environment with random actions, a process on each core; the acting
network's step at the batch size seen in training; and the learner's step, with its batch, loss,
optimizer and uses of a batch. The last two run as many steps at a time as `--intra_op_threads`
leaves cores for.

Their rates give the limit, 1 / sum(1 / rate): the agent steps a second of cores that do nothing
else and never wait. `efficiency` is training's rate over the limit. The table says where the rest
goes, in microseconds of a core per agent step: a process may need more than its parts alone, or
cores may have been idle. Shared machines drift: quote the medians of several `--rounds`.
"""

import argparse
import concurrent.futures
import dataclasses
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
import psutil
import tabulate

from benchmarks import learning, machine, stages
from impala import suites
from impala.config import Config
from impala.environments import create_environment
from impala.runs import flag_file, flags
from impala.runs.files import read_metrics
from impala.trajectory import ActorOutput, AgentOutput, StepOutput, StepOutputInfo

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CORES = len(os.sched_getaffinity(0))
PARTS = ('environment', 'inference', 'learning')
DEFAULT_FLAGS = [
    '--flagfile=configs/atari_paper.flags',
    '--num_actors=64',
    '--envs_per_process=32',
    '--inference_batch_size=32',
    '--intra_op_threads=1',
    '--compute_dtype=auto',
]
# What an environment's process prints when it could begin.
_READY = 'ready'
# Seconds between the lines of the log, which bound the precision of the rate.
_SAMPLE_SECONDS = 0.5


def config_of(training_flags: list[str]) -> Config:
    """Returns the config that flags of `experiment.py` make."""
    return Config.of(**flags.parse_stored(flag_file.expand(training_flags)))


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run of `experiment.py` did after its warm-up.

    Attributes:
      rate: agent steps per second.
      rows: mean size of an inference batch.
      learner: seconds of a core per agent step, of the learner's process.
      actors: seconds of a core per agent step, of all other processes of the run.
    """

    rate: float
    rows: float
    learner: float
    actors: float


def train(training_flags: list[str], warm_up: float, seconds: float) -> Training:
    """Trains for real."""
    logdir = tempfile.mkdtemp(prefix='impala-benchmark-')
    errors_path = os.path.join(logdir, 'stderr')
    with open(errors_path, 'wb') as errors:
        process = subprocess.Popen(
            [sys.executable, 'experiment.py', *training_flags, f'--logdir={logdir}']
            + [f'--log_secs={_SAMPLE_SECONDS}'],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:

        def line() -> dict[str, Any]:
            if process.poll() is not None:
                with open(errors_path, encoding='utf-8') as file:
                    sys.exit(f'Training ended early:\n{file.read()}')
            lines = read_metrics(logdir)
            return lines[-1] if lines else {}

        while not line():
            time.sleep(0.1)
        time.sleep(warm_up)
        begin, used_before = line(), _processor_seconds(process.pid)
        started = time.monotonic()
        time.sleep(seconds)
        end, used = line(), _processor_seconds(process.pid)
        elapsed = time.monotonic() - started
        process.send_signal(signal.SIGINT)
        process.wait()
        lines = read_metrics(logdir)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(logdir)
    rate = (end['agent_steps'] - begin['agent_steps']) / (
        end['wall_seconds'] - begin['wall_seconds']
    )
    learner, actors = (
        (after - before) / (rate * elapsed) for before, after in zip(used_before, used, strict=True)
    )
    return Training(
        rate, statistics.fmean(line['inference_batch_size'] for line in lines), learner, actors
    )


def _processor_seconds(pid: int) -> tuple[float, float]:
    """Returns seconds of a core that a process has used, and that all below it have used."""

    def of(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    process = psutil.Process(pid)
    return of(process), sum(of(child) for child in process.children(recursive=True))


def play(training_flags: list[str], seconds: float) -> None:
    """Plays a configuration's first level with random actions; prints agent steps per second.

    Prints `ready` and waits for a line of input before it begins.
    """
    config = config_of(training_flags)
    level_name = suites.load(config.run.level_name).level_names[0]
    environment = create_environment(level_name, os.getpid(), config.environment)
    random = np.random.RandomState(os.getpid())
    actions = [learning.random_action(environment.spec.action, random) for _ in range(1000)]
    environment.reset()
    print(_READY, flush=True)
    sys.stdin.readline()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for action in actions[:100]:
            environment.step(action)
        steps += 100
        actions = actions[100:] + actions[:100]
    print(steps / (time.perf_counter() - started))
    environment.close()


def environment_rate(training_flags: list[str], seconds: float) -> float:
    """Returns agent steps per second of one process per core with random actions."""
    command = _command('environment', training_flags, seconds)
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(CORES)
    ]
    # One that played before the others have started would have more than its share.
    for process in processes:
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != _READY:
            if process.poll() is not None and not line:
                sys.exit('An environment ended before it could be measured.')
    for process in processes:
        assert process.stdin is not None
        process.stdin.write('\n')
        process.stdin.flush()
    return sum(float(process.communicate()[0].splitlines()[-1]) for process in processes)


def concurrent_rate(
    create: Callable[[], Callable[[], Any]], num_concurrent: int, rows: float, seconds: float
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


def network_rates(training_flags: list[str], rows: int, seconds: float) -> dict[str, float]:
    """Returns agent steps per second of acting and of learning, alone, in this process.

    Args:
      training_flags: of the configuration.
      rows: of an inference batch.
      seconds: of measurement, each.
    """
    from impala.runs.tensorflow_start import starting_tensorflow

    with starting_tensorflow():
        import tensorflow as tf

    from impala.learning.learner import Learner
    from impala.networks.build import choose_network, create_agent, create_decoder

    config = config_of(training_flags)
    tf.config.threading.set_intra_op_parallelism_threads(config.learner.intra_op_threads)
    level_names = suites.load(config.run.level_name).level_names
    environment = create_environment(level_names[0], 1, config.environment)
    spec = environment.spec
    environment.close()
    network = choose_network(config, level_names, spec)
    settings = config.learner
    random = np.random.RandomState(0)

    def step_output(dims: list[int]) -> StepOutput:
        zeros = tf.zeros(dims)
        observation = {}
        for name, array in spec.observation.items():
            shape = [*dims, *array.shape]
            values = random.randint(0, 256, shape) if array.dtype == 'uint8' else np.ones(shape)
            observation[name] = tf.constant(values.astype(array.dtype))
        info = StepOutputInfo(zeros, *2 * [tf.zeros(dims, tf.int32)])
        return StepOutput(zeros, info, tf.zeros(dims, tf.bool), observation)

    def zeros_of(dims: list[int], array: Any) -> tf.Tensor:
        return tf.zeros([*dims, *array.shape], array.dtype)

    def inference() -> Callable[[], Any]:
        agent = create_agent(dataclasses.replace(network, compute_dtype='float32'), spec)
        output, state = step_output([rows]), agent.initial_state(rows)
        last_action = zeros_of([rows], spec.action.array)
        step = tf.function(lambda: agent.step(last_action, output, state)[0].action)
        return lambda: step().numpy()

    def learner() -> Callable[[], Any]:
        agent = create_agent(network, spec)
        target = create_agent(network, spec) if settings.loss.target_update_steps else None
        learner = Learner(agent, settings, None, target, create_decoder(network, spec))
        size, dims = settings.batch_size, [settings.unroll_length + 1, settings.batch_size]
        batch = ActorOutput(
            tf.zeros([size], tf.int32),
            tf.zeros([size], tf.int64),
            agent.initial_state(size),
            step_output(dims),
            AgentOutput(
                zeros_of(dims, spec.action.array),
                zeros_of(dims, spec.action.policy),
                tf.zeros(dims),
            ),
        )
        return lambda: learner.step(batch)['loss/total'].numpy()

    at_a_time = steps_at_a_time(config.learner.intra_op_threads)
    replay = settings.replay
    new_steps = settings.batch_size * settings.unroll_length * (1 - replay.replay_fraction)
    return {
        'inference': concurrent_rate(inference, at_a_time, rows, seconds),
        'learning': concurrent_rate(learner, at_a_time, new_steps / replay.sample_reuse, seconds),
    }


def _command(part: str, training_flags: list[str], seconds: float, rows: int = 0) -> list[str]:
    """Returns the command that measures a part in a process of its own."""
    command = [sys.executable, '-m', 'benchmarks.throughput', *training_flags]
    return [*command, f'--part={part}', f'--part_seconds={seconds}', f'--rows={rows}']


def network_rates_of_process(
    training_flags: list[str], rows: float, seconds: float
) -> dict[str, float]:
    """Returns `network_rates` of a new process: TensorFlow's threads are fixed at its start."""
    command = _command('network', training_flags, seconds, max(1, round(rows)))
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(output.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Round:
    """A measurement of training and of its parts, right after each other.

    Attributes:
      training: the whole.
      rates: part -> agent steps per second alone, on all cores.
    """

    training: Training
    rates: dict[str, float]

    @property
    def limit(self) -> float:
        """Agent steps per second that the parts allow."""
        return 1 / sum(1 / self.rates[part] for part in PARTS)

    @property
    def efficiency(self) -> float:
        """Training's share of the limit."""
        return self.training.rate / self.limit

    def core_seconds(self) -> dict[str, float]:
        """Returns where an agent step's time on the cores goes, in seconds of a core.

        The sum is `CORES / training.rate`. What a process needs beyond its parts alone is named
        after it, and so is what other programs on the machine took together with idle cores.
        """
        alone = {part: CORES / self.rates[part] for part in PARTS}
        learner, actors = self.training.learner, self.training.actors
        return alone | {
            'learner process, beyond its parts': learner - alone['inference'] - alone['learning'],
            'actor processes, beyond their part': actors - alone['environment'],
            'idle, or other programs': CORES / self.training.rate - learner - actors,
        }


def measure(training_flags: list[str], args: argparse.Namespace) -> Round:
    """Measures a round."""
    stages.begin('training')
    training = train(training_flags, args.warm_up, args.seconds)
    stages.begin('the parts alone')
    rates = {'environment': environment_rate(training_flags, args.part_seconds)}
    rates |= network_rates_of_process(training_flags, training.rows, args.part_seconds)
    return Round(training, rates)


def main() -> None:
    """Prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='All other flags are those of experiment.py.',
        allow_abbrev=False,
    )
    parser.add_argument('--warm_up', type=float, default=15, help='seconds')
    parser.add_argument('--seconds', type=float, default=30)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--part_seconds', type=float, default=5, help='for each of the parts alone')
    parser.add_argument('--part', help=argparse.SUPPRESS)
    parser.add_argument('--rows', type=int, help=argparse.SUPPRESS)
    args, training_flags = parser.parse_known_args()
    training_flags = training_flags or DEFAULT_FLAGS
    if args.part == 'environment':
        play(training_flags, args.part_seconds)
        return
    if args.part == 'network':
        print(json.dumps(network_rates(training_flags, args.rows, args.part_seconds)))
        return
    rounds = []
    for number in range(args.rounds):
        stages.begin(f'round {number + 1} of {args.rounds}')
        rounds.append(measure(training_flags, args))

    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, rounds))

    print(machine.describe())
    print(f'`python -m benchmarks.throughput {" ".join(sys.argv[1:])}`')
    rate = median(lambda r: r.training.rate)
    table = []
    for name in rounds[0].core_seconds():
        seconds = [r.core_seconds()[name] for r in rounds]
        shares = [s * r.training.rate / CORES for s, r in zip(seconds, rounds, strict=True)]
        alone = ''
        if name in PARTS:
            alone = f'{statistics.median(r.rates[name] for r in rounds):,.0f}'
        microseconds = f'{1e6 * statistics.median(seconds):,.0f}'
        table.append([name, alone, microseconds, f'{statistics.median(shares):.1%}'])
    table.append(['training', f'{rate:,.0f}', f'{1e6 * CORES / rate:,.0f}', '100%'])
    headers = [
        'part',
        'agent steps/s alone',
        'µs of a core per agent step',
        "share of the cores' time",
    ]
    print(tabulate.tabulate(table, headers, 'github', disable_numparse=True))
    efficiencies = [round(r.efficiency, 3) for r in rounds]
    limit, rows = median(lambda r: r.limit), median(lambda r: r.training.rows)
    print(f'Limit, from the parts alone: {limit:,.0f} agent steps/s. Inference batch: {rows:.1f}.')
    print(f'Efficiency of each round: {", ".join(map(str, efficiencies))}')
    result = {
        'efficiency': statistics.median(efficiencies),
        'agent_steps_per_second': round(rate),
        'limit': round(limit),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
