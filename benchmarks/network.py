"""How fast actor jobs train Pong through networks that are slow and lose packets.

    python -m benchmarks.network --delay_ms=20 --loss=0.01 --minutes=3

Real: learner and actor jobs as commands, each on a host of its own (a Linux network namespace), and
the kernel's TCP between them. Not real: what delays and loses packets is a thread of this process
instead of a long cable (see `namespaces.py`), and all hosts share this machine's cores. The table
also has the same jobs on the same hosts without delay and loss. Needs root.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tabulate

from benchmarks import machine, stages
from benchmarks.namespaces import Network, Unavailable
from impala.runs.files import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def stop(jobs: list[subprocess.Popen]) -> None:
    """Ends jobs."""
    for job in jobs:
        job.terminate()
    for job in jobs:
        job.wait()


def train(args: argparse.Namespace, delay_ms: float, loss: float, keep: str) -> list[str]:
    """Trains for `args.minutes`; keeps the run if `keep` names a folder.

    Returns:
      A row of the table.
    """
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix='impala-benchmark-')
        stack.callback(shutil.rmtree, folder)
        network = stack.enter_context(
            Network(1 + args.actors, delay_ms / 1000, loss, args.congestion_control)
        )
        learner_host, *actor_hosts = network.hosts
        logdir = os.path.abspath(keep) if keep else os.path.join(folder, 'run')
        jobs: list[subprocess.Popen] = []
        stack.callback(stop, jobs)
        run = ['--flagfile=configs/pong_quick.flags', f'--level_name={args.level_name}']

        def start(host, *flags: str) -> None:
            with open(os.path.join(folder, 'output'), 'ab') as output:
                process = subprocess.Popen(
                    [*host.prefix, sys.executable, 'experiment.py', *run, *flags],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            jobs.append(process)

        start(learner_host, '--task=0', f'--logdir={logdir}', '--trusted_network',
              '--learner_address=0.0.0.0:8000',
              f'--batch_size={args.batch_size}', '--log_secs=5')  # fmt: skip
        for task, host in enumerate(actor_hosts):
            start(host, '--job_name=actor', f'--task={task}',
                  f'--learner_address={learner_host.address}:8000',
                  f'--envs_per_actor={args.envs_per_actor}',
                  f'--envs_per_process={args.envs_per_actor}')  # fmt: skip

        def wait(happened) -> None:
            while not happened():
                for job in jobs:
                    if job.poll() is not None:
                        with open(os.path.join(folder, 'output'), encoding='utf-8') as file:
                            sys.exit(f'A job has ended:\n{file.read()[-2000:]}')
                time.sleep(0.5)

        wait(
            lambda: read_metrics(logdir) and len(read_metrics(logdir)[-1]['actors']) == args.actors
        )
        num_before = len(read_metrics(logdir))
        first, before = read_metrics(logdir)[-1], network.bytes
        started = time.monotonic()
        wait(lambda: time.monotonic() - started > args.minutes * 60)
        elapsed = time.monotonic() - started
        last, sent = read_metrics(logdir)[-1], network.bytes - before
        seconds = last['wall_seconds'] - first['wall_seconds']
        lags = [
            line['policy_lag_mean']
            for line in read_metrics(logdir)[num_before:]
            if 'policy_lag_mean' in line
        ]
        setting = learner_host.run('cat', '/proc/sys/net/ipv4/tcp_congestion_control').strip()
        return [
            f'{delay_ms:g} ms each way, {100 * loss:g}% lost',
            setting,
            f'{(last["agent_steps"] - first["agent_steps"]) / seconds:,.0f}',
            f'{sent / elapsed / 1e6:.1f}',
            f'{100 * network.lost / max(1, network.packets):.1f}%',
            f'{sum(lags) / max(1, len(lags)):.1f}',
            str(sum(actor['rejected'] for actor in last['actors'])),
        ]


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--delay_ms', type=float, default=20, help='of each packet')
    parser.add_argument('--loss', type=float, default=0.01, help='share of packets lost')
    parser.add_argument('--minutes', type=float, default=3)
    parser.add_argument('--actors', type=int, default=4, help='jobs')
    parser.add_argument('--envs_per_actor', type=int, default=8)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--level_name', default='ALE/Pong-v5')
    parser.add_argument('--alone', action='store_true', help='leave the comparison out')
    parser.add_argument('--congestion_control', default='', help="of TCP; the machine's by default")
    parser.add_argument('--keep', default='', help='new folder for the run through the bad network')
    args = parser.parse_args()
    if args.keep and os.path.exists(args.keep):
        sys.exit(f'--keep={args.keep} exists already.')
    try:
        stages.begin(f'{args.minutes:g} minutes of training through the bad network')
        rows = [train(args, args.delay_ms, args.loss, args.keep)]
        if not args.alone:
            stages.begin(f'{args.minutes:g} minutes without delay and loss')
            rows.append(train(args, 0, 0, keep=''))
    except Unavailable as error:
        sys.exit(f'This benchmark needs network namespaces: {error}.')
    print(machine.describe())
    print(f'`python -m benchmarks.network {" ".join(sys.argv[1:])}`')
    headers = ['network', 'TCP', 'agent steps/s', 'MB/s', 'lost', 'policy lag', 'unrolls refused']
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    steps = [int(row[2].replace(',', '')) for row in rows]
    names = ['agent_steps_per_second', 'without_delay_and_loss']
    print(json.dumps(dict(zip(names, steps, strict=False))))


if __name__ == '__main__':
    main()
