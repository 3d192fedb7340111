"""Where the policy of actor jobs acts: in each job, or on the learner for all of them.

    python -m benchmarks.central_inference --jobs=1,8 --seconds=30

Trains with `--inference=actor` and with `--inference=learner`, learner and jobs as commands on this
machine, whose cores they share. Between them is a proxy that counts bytes and delays them
(`benchmarks/delayed_proxy.py`). `pong` is Atari Pong with configs/pong_quick.flags; `deep` is an
environment without cost whose 72x96x3 frames the deep network with LSTM sees, as in DeepMind Lab.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tabulate

from benchmarks import machine, stages
from impala.runs.files import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LEVELS = {
    'pong': ['--flagfile=configs/pong_quick.flags', '--level_name=ALE/Pong-v5'],
    'deep': [
        '--level_name=benchmarks.fixed_frame:make',
        '--batch_size=4',
        '--unroll_length=20',
        '--intra_op_threads=1',
    ],
}
# Seconds that all jobs get to start.
_PATIENCE = 600
# Seconds of playing before the measurement.
_WARM_UP = 8


def measure(level: str, inference: str, delay_ms: float, jobs: int, args) -> list[str]:
    """Trains for `args.seconds`.

    Returns:
      A row of the table.
    """
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix='impala-benchmark-')
        stack.callback(shutil.rmtree, folder)
        output = stack.enter_context(open(os.path.join(folder, 'output'), 'ab'))
        logdir = os.path.join(folder, 'run')
        with socket.create_server(('127.0.0.1', 0)) as probe:
            port = probe.getsockname()[1]
        processes: list[subprocess.Popen] = []
        stack.callback(_stop, processes)

        def start(*command: str, **options) -> subprocess.Popen:
            processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, **options))
            return processes[-1]

        proxy = start(
            *('-m', 'benchmarks.delayed_proxy', '0', str(port), str(delay_ms)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert proxy.stdin is not None and proxy.stdout is not None
        proxy_port = int(proxy.stdout.readline())

        def run(*flags: str) -> subprocess.Popen:
            return start(
                *('experiment.py', *LEVELS[level], *flags),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

        learner = run(
            '--task=0',
            f'--learner_address=localhost:{port}',
            f'--logdir={logdir}',
            '--trusted_network',
            '--log_secs=2',
            f'--inference={inference}',
            f'--num_actors={jobs * args.envs_per_actor}',
        )
        actors = [
            run(
                '--job_name=actor',
                f'--task={task}',
                f'--learner_address=localhost:{proxy_port}',
                f'--envs_per_actor={args.envs_per_actor}',
                f'--envs_per_process={args.envs_per_actor}',
            )
            for task in range(jobs)
        ]
        _wait(processes, output.name, lambda: _num_actors(logdir) == jobs)
        time.sleep(_WARM_UP)

        def sent() -> int:
            print(file=proxy.stdin, flush=True)
            assert proxy.stdout is not None
            return int(proxy.stdout.readline())

        num_before = len(read_metrics(logdir))
        bytes_before, began = sent(), time.monotonic()
        cpu_before = _cpu_seconds([learner]), _cpu_seconds(actors)
        time.sleep(args.seconds)
        cpu = _cpu_seconds([learner]), _cpu_seconds(actors)
        elapsed, num_bytes = time.monotonic() - began, sent() - bytes_before
        memory = sum(map(_private_bytes, actors)) / jobs
        lines = read_metrics(logdir)[num_before - 1 :]
        steps = lines[-1]['agent_steps'] - lines[0]['agent_steps']
        rate = steps / (lines[-1]['wall_seconds'] - lines[0]['wall_seconds'])
        lags = [line['policy_lag_mean'] for line in lines[1:] if 'policy_lag_mean' in line]
        costs = [
            1e6 * (after - before) / elapsed / max(rate, 1e-9)
            for before, after in zip(cpu_before, cpu, strict=True)
        ]
        return [
            level,
            f'{delay_ms:g}',
            str(jobs),
            inference,
            f'{rate:,.0f}',
            f'{num_bytes / elapsed / 1e6:.2f}',
            f'{num_bytes / elapsed / max(rate, 1e-9):,.0f}',
            f'{sum(lags) / max(1, len(lags)):.1f}',
            *(f'{cost:,.0f}' for cost in costs),
            f'{memory / 1e6:,.0f}',
        ]


def _num_actors(logdir: str) -> int:
    lines = read_metrics(logdir)
    return len(lines[-1]['actors']) if lines else 0


def _wait(processes: Sequence[subprocess.Popen], output: str, happened) -> None:
    """Waits for the start of all jobs; ends this program if one of them ends."""
    deadline = time.monotonic() + _PATIENCE
    while not happened():
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            with open(output, encoding='utf-8') as file:
                sys.exit(f'A job has ended, or does not start:\n{file.read()[-2000:]}')
        time.sleep(0.5)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _cpu_seconds(processes: Sequence[subprocess.Popen]) -> float:
    """Returns the processor time of processes and their descendants so far."""
    children: dict[int, list[int]] = {}
    times: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError), open(f'/proc/{entry}/stat', encoding='utf-8') as file:
            fields = file.read().rpartition(')')[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry))
            times[int(entry)] = int(fields[11]) + int(fields[12])
    todo, ticks = [process.pid for process in processes], 0
    while todo:
        process_id = todo.pop()
        ticks += times.get(process_id, 0)
        todo += children.get(process_id, [])
    return ticks / os.sysconf('SC_CLK_TCK')


def _private_bytes(process: subprocess.Popen) -> int:
    """Returns the private memory of a process, without its descendants."""
    with open(f'/proc/{process.pid}/smaps_rollup', encoding='utf-8') as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith('Private'))


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--levels', default='pong,deep')
    parser.add_argument('--delay_ms', default='0,20', help='of each direction')
    parser.add_argument('--jobs', default='1,8')
    parser.add_argument('--envs_per_actor', type=int, default=16)
    parser.add_argument('--seconds', type=float, default=30, help='of each measurement')
    args = parser.parse_args()
    rows = []
    for level, delay, jobs, inference in itertools.product(
        args.levels.split(','),
        map(float, args.delay_ms.split(',')),
        map(int, args.jobs.split(',')),
        ('actor', 'learner'),
    ):
        stages.begin(f'{level}, {delay:g} ms, {jobs} jobs, --inference={inference}')
        rows.append(measure(level, inference, delay, jobs, args))
        print('\t'.join(rows[-1]), file=sys.stderr, flush=True)
    print(machine.describe())
    print(f'`python -m benchmarks.central_inference {" ".join(sys.argv[1:])}`')
    headers = [
        'level', 'delay, ms', 'jobs', 'inference', 'agent steps/s', 'MB/s', 'bytes per step',
        'policy lag', 'learner, µs of processor per step', 'jobs, µs of processor per step',
        'memory of a job, MB',
    ]  # fmt: skip
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    print(json.dumps({'agent_steps_per_second': [int(row[4].replace(',', '')) for row in rows]}))


if __name__ == '__main__':
    main()
