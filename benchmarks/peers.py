"""Other systems and this project, each training Pong on this machine, in turns.

    python -m benchmarks.peers --sample_factory=PYTHON --cleanrl=PYTHON --rounds=3

Each peer has a Python of its own; a peer whose flag is missing is left out. These commands make
them (CleanRL's package declares requirements that its script does not need):

    python3.11 -m venv peers/sample_factory
    peers/sample_factory/bin/pip install torch==2.13.0
    peers/sample_factory/bin/pip install sample-factory==2.1.1 envpool==0.8.4
    peers/sample_factory/bin/pip install gym==0.26.2 shimmy==1.3.0
    python3.11 -m venv peers/cleanrl
    peers/cleanrl/bin/pip install torch==2.13.0
    peers/cleanrl/bin/pip install --no-deps --ignore-requires-python cleanrl==1.2.0
    peers/cleanrl/bin/pip install envpool==0.8.4 gym==0.23.1 'numpy<1.24' tensorboard

With these Gym versions, neither runs with EnvPool 1.2.5. The peers are started by their own command
lines and play EnvPool's Pong:

* Sample Factory: asynchronous PPO, 2 workers with 16 environments each, unrolls of 20, batches of
  640, each used once: the fastest settings that were found for 2 cores. Its `convnet_impala` with
  256 units is the shallow network.
* CleanRL: synchronous PPO, with 32 environments and each batch used once; and with its published
  settings, 8 environments and each batch used four times. Its script has the Nature network built
  in, so it is compared with this project's `--torso=nature`.
* This project: the flags of `benchmarks/throughput.py`: V-trace, each batch used once.

A rate is the change of a program's own counter of trained agent steps (no frame counts twice,
however often its batch is used) from its last report before the end of the warm-up to its first
report at least `--seconds` later, over the time between these two. Memory is the proportional set
size of all its processes right after that. All run on the CPU. Shared machines drift: quote the
medians of several `--rounds` and the ratios, which are taken within a round.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import psutil
import tabulate

from benchmarks import machine, stages
from benchmarks.throughput import DEFAULT_FLAGS
from impala.runs.files import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Agent steps of a run that ends only when it is ended.
_ENDLESS = 10**9
# Seconds that a program has to end by itself.
_END_SECONDS = 15
_POLL_SECONDS = 0.1

# A time in seconds, and the agent steps trained until then.
Reading = tuple[float, int]
# Lines that a program has printed, each with the time at which it came.
Lines = list[tuple[float, str]]


class Failure(Exception):
    """A program has ended, or has stopped counting."""


@dataclasses.dataclass(frozen=True)
class Program:
    """How to start a program and to follow its counter.

    Attributes:
      name: in the table.
      network: `'shallow'` or `'nature'`; ratios compare programs with the same one.
      command: with `{folder}` for a folder of the run's own.
      readings: given that folder and all lines printed so far, returns the counter's reports.
      cwd: where it runs; None for the folder.
    """

    name: str
    network: str
    command: tuple[str, ...]
    readings: Callable[[str, Lines], list[Reading]]
    cwd: str | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A program's run.

    Attributes:
      rate: agent steps per second.
      gigabytes: proportional set size of all its processes, in 2^30 bytes.
    """

    rate: float
    gigabytes: float


def own_program(network: str) -> Program:
    """Returns this project's training."""

    def readings(folder: str, lines: Lines) -> list[Reading]:
        logdir = os.path.join(folder, 'logdir')
        metrics = read_metrics(logdir) if os.path.isdir(logdir) else []
        return [(line['wall_seconds'], line['agent_steps']) for line in metrics]

    command = [sys.executable, 'experiment.py', *DEFAULT_FLAGS, f'--torso={network}']
    command += ['--logdir={folder}/logdir', '--log_secs=0.5']
    return Program(f'this project, {network}', network, tuple(command), readings, ROOT)


def sample_factory(python: str) -> Program:
    """Returns Sample Factory's training, which reports every 5 seconds."""

    def readings(folder: str, lines: Lines) -> list[Reading]:
        found = [(at, re.search(r'Total num frames: (\d+)', line)) for at, line in lines]
        return [(at, int(match[1])) for at, match in found if match]

    # Without the frame skip, `num frames` are agent steps.
    flags = f"""
        --env=atari_pong --device=cpu --num_workers=2 --env_agents=16 --rollout=20
        --batch_size=640 --num_epochs=1 --num_batches_per_epoch=1
        --encoder_conv_architecture=convnet_impala --encoder_conv_mlp_layers 256
        --train_for_env_steps={_ENDLESS} --summaries_use_frameskip=False
        --experiment=peer --train_dir={{folder}}
    """
    command = [python, '-m', 'sf_examples.envpool.atari.train_envpool_atari', *flags.split()]
    return Program('Sample Factory', 'shallow', tuple(command), readings)


def cleanrl(python: str, num_envs: int, epochs: int) -> Program:
    """Returns CleanRL's training, which prints a line that begins with `SPS` after each batch."""
    num_steps = 128

    def readings(folder: str, lines: Lines) -> list[Reading]:
        times = [at for at, line in lines if line.startswith('SPS')]
        return [(at, number * num_envs * num_steps) for number, at in enumerate(times, 1)]

    flags = f"""
        --env-id=Pong-v5 --cuda=False --num-envs={num_envs} --num-steps={num_steps}
        --update-epochs={epochs} --total-timesteps={_ENDLESS}
    """
    command = [python, '-m', 'cleanrl.ppo_atari_envpool', *flags.split()]
    name = f'CleanRL, {num_envs} environments, {epochs} epoch{"s" if epochs > 1 else ""}'
    return Program(name, 'nature', tuple(command), readings)


def require(python: str, flag: str, modules: Iterable[str]) -> None:
    """Exits with status 2 if a Python is missing or cannot find modules of these names."""
    code = (
        'import importlib.util, sys; '
        'print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))'
    )
    problem = ''
    try:
        found = subprocess.run([python, '-c', code, *modules], capture_output=True, text=True)
        if found.returncode:
            problem = 'is not a Python'
        elif missing := found.stdout.strip():
            problem = f'lacks {missing}'
    except OSError as error:
        problem = f'cannot be started ({error.strerror})'
    if problem:
        print(
            f'--{flag}={python} {problem}: make it as `benchmarks/peers.py` says at its top.',
            file=sys.stderr,
        )
        sys.exit(2)


def processes_of(process: subprocess.Popen) -> set[psutil.Process]:
    """Returns all processes of a program that was started in a session of its own.

    These are the ones below it and, should it have ended before them, those in its session.
    """
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        found = {first, *first.children(recursive=True)}
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(other.pid) == process.pid:
                found.add(other)
    return {each for each in found if _is_alive(each)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gigabytes_of(processes: Iterable[psutil.Process]) -> float:
    """Returns the sum of proportional set sizes: what processes share counts once."""
    kilobytes = 0
    for process in processes:
        # Some may have ended.
        with contextlib.suppress(OSError), open(f'/proc/{process.pid}/smaps_rollup') as file:
            kilobytes += sum(int(line.split()[1]) for line in file if line.startswith('Pss:'))
    return kilobytes / 2**20


def end(process: subprocess.Popen, seconds: float = _END_SECONDS) -> None:
    """Ends a program with all its processes.

    Args:
      process: was started in a session of its own.
      seconds: before those that have not ended by themselves are killed.
    """
    members = processes_of(process)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    while members := {each for each in members | processes_of(process) if _is_alive(each)}:
        for each in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.poll()
        time.sleep(_POLL_SECONDS)
    process.wait()


def measure(program: Program, warm_up: float, seconds: float, patience: float) -> Measurement:
    """Runs a program and ends it.

    Args:
      program: is started.
      warm_up: seconds from its first training to the measurement.
      seconds: of measurement.
      patience: seconds without a new report after which the program hangs.

    Raises:
      Failure: it has ended or hangs; the message has its last lines.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='impala-benchmark-', ignore_cleanup_errors=True)
        )
        # The peers' Pythons must not find this project's packages.
        environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        environment |= {'PYTHONUNBUFFERED': '1', 'CUDA_VISIBLE_DEVICES': '-1'}
        process = subprocess.Popen(
            [part.replace('{folder}', folder) for part in program.command],
            cwd=program.cwd or folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
        )
        lines: Lines = []
        output = process.stdout
        assert output is not None

        def collect() -> None:
            for line in output:
                lines.append((time.monotonic(), line.rstrip()))

        reader = threading.Thread(target=collect)
        reader.start()
        # In reverse order: once all writers have ended, the reader does.
        stack.callback(output.close)
        stack.callback(reader.join)
        stack.callback(end, process)

        def wait_for(enough: Callable[[Reading], bool]) -> Reading:
            latest, since = None, time.monotonic()
            while True:
                readings = program.readings(folder, lines)
                for reading in readings:
                    if enough(reading):
                        return reading
                if readings and readings[-1] != latest:
                    latest, since = readings[-1], time.monotonic()
                problem = ''
                if process.poll() is not None:
                    problem = f'has ended with exit code {process.returncode}'
                elif time.monotonic() - since > patience:
                    problem = f'has counted no step for {patience:g} seconds'
                if problem:
                    last = '\n'.join(line for _, line in lines[-20:])
                    raise Failure(f'{program.name} {problem}:\n{last}')
                time.sleep(_POLL_SECONDS)

        wait_for(lambda reading: reading[1] > 0)
        time.sleep(warm_up)
        begin = program.readings(folder, lines)[-1]
        last = wait_for(lambda reading: reading[0] >= begin[0] + seconds)
        gigabytes = gigabytes_of(processes_of(process))
    return Measurement((last[1] - begin[1]) / (last[0] - begin[0]), gigabytes)


def ratios(
    programs: list[Program], own: list[Program], rounds: list[dict[str, Measurement]]
) -> dict[str, list[float]]:
    """Returns peer -> this project's rate over its rate, with the same network, of each round."""
    counterparts = {program.network: program.name for program in own}
    return {
        peer.name: [each[counterparts[peer.network]].rate / each[peer.name].rate for each in rounds]
        for peer in programs
        if peer not in own
    }


def report(
    programs: list[Program], own: list[Program], rounds: list[dict[str, Measurement]]
) -> None:
    """Prints a table and a line of JSON."""
    ratios_of = ratios(programs, own, rounds)
    table, result = [], {}
    for program in programs:
        of_program = [each[program.name] for each in rounds]
        rates = [measurement.rate for measurement in of_program]
        gigabytes = statistics.median(measurement.gigabytes for measurement in of_program)
        row = [program.name, program.network, f'{statistics.median(rates):,.0f}']
        row += [', '.join(f'{rate:,.0f}' for rate in rates), f'{gigabytes:.1f}']
        values: dict[str, float] = {'agent_steps_per_second': round(statistics.median(rates))}
        values |= {'gigabytes': round(gigabytes, 2)}
        if program.name in ratios_of:
            each = ratios_of[program.name]
            row += [f'{statistics.median(each):.2f}', ', '.join(f'{ratio:.2f}' for ratio in each)]
            values |= {'ratio': round(statistics.median(each), 3)}
        table.append(row)
        result[program.name] = values
    headers = ['program', 'network', 'agent steps/s', 'each round', 'GB']
    headers += ['this project is faster by', 'each round']
    print(tabulate.tabulate(table, headers, 'github', disable_numparse=True))
    print(json.dumps(result))


def main() -> None:
    """Measures all programs in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sample_factory', metavar='PYTHON', help='that has Sample Factory')
    parser.add_argument('--cleanrl', metavar='PYTHON', help='that has CleanRL')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--warm_up', type=float, default=15, help='seconds')
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument(
        '--patience', type=float, default=180, help='seconds without a new count: a program hangs'
    )
    args = parser.parse_args()
    peers = []
    if args.sample_factory:
        # A relative path must also be right in the folder of a run.
        python = os.path.abspath(args.sample_factory)
        require(python, 'sample_factory', ['sample_factory', 'sf_examples', 'envpool'])
        peers.append(sample_factory(python))
    if args.cleanrl:
        python = os.path.abspath(args.cleanrl)
        require(python, 'cleanrl', ['cleanrl', 'envpool', 'gym', 'torch', 'tensorboard'])
        peers += [cleanrl(python, 32, 1), cleanrl(python, 8, 4)]
    if not peers:
        print('Nothing to compare with: give --sample_factory, --cleanrl or both.', file=sys.stderr)
        sys.exit(2)
    own = [own_program(network) for network in sorted({peer.network for peer in peers})[::-1]]
    programs = own + peers
    # Ends the program under way, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rounds = []
    for number in range(args.rounds):
        measurements = {}
        for program in programs:
            stages.begin(f'round {number + 1} of {args.rounds}: {program.name}')
            try:
                measurements[program.name] = measure(
                    program, args.warm_up, args.seconds, args.patience
                )
            except Failure as failure:
                sys.exit(str(failure))
        rounds.append(measurements)
    print(machine.describe())
    print(f'`python -m benchmarks.peers {" ".join(sys.argv[1:])}`')
    report(programs, own, rounds)


if __name__ == '__main__':
    main()
