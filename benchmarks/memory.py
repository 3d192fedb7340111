"""Memory of a training run: what an actor process costs besides its environment, and any growth.

    python -m benchmarks.memory --minutes=30

Starts `experiment.py`, samples the memory of its processes every `--interval` seconds and compares
the actors' with processes that hold nothing but the same environment. `--pid` watches a run in
progress instead. Figures are resident memory without the shared unrolls, which exist once.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import tabulate

from benchmarks import machine, stages

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MB = 2**20

BARE_ENVIRONMENTS = """
import sys
from impala.environments import EnvironmentConfig, create_environment
environments = [
    create_environment(sys.argv[1], seed, EnvironmentConfig()) for seed in range(int(sys.argv[2]))
]
for environment in environments:
    environment.reset()
    for _ in range(500):
        environment.step(0)
print('ready', flush=True)
sys.stdin.read()
"""


def resident(process: psutil.Process) -> float:
    """Returns megabytes of resident memory without shared memory."""
    with open(f'/proc/{process.pid}/status', encoding='utf-8') as file:
        fields = dict(line.split(':', 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ('RssAnon', 'RssFile')) * 1024 / MB


def bare_environments(level_name: str, number: int) -> float:
    """Returns the megabytes of a process that only plays this many environments."""
    process = subprocess.Popen(
        [sys.executable, '-c', BARE_ENVIRONMENTS, level_name, str(number)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        return resident(psutil.Process(process.pid))
    finally:
        process.communicate()


def watch(pid: int, minutes: float, interval: float) -> list[tuple[float, float, float]]:
    """Returns samples: minutes, megabytes of the learner, mean megabytes of its actors."""
    learner = psutil.Process(pid)
    samples = []
    started = time.monotonic()
    while time.monotonic() - started < minutes * 60 and learner.is_running():
        try:
            actors = [
                resident(child)
                for child in learner.children()
                if 'impala.acting.actor' in child.cmdline()
            ]
            samples.append(
                (
                    (time.monotonic() - started) / 60,
                    resident(learner),
                    statistics.fmean(actors) if actors else float('nan'),
                )
            )
        except (psutil.NoSuchProcess, OSError, KeyError):
            # One was just replaced, or the run ended: /proc has no file, or one without fields.
            pass
        time.sleep(interval)
    return samples


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--level_name', default='ALE/Pong-v5')
    parser.add_argument('--num_actors', type=int, default=32)
    parser.add_argument(
        '--envs_per_process', type=int, default=1, help='of the run, also of one that runs already'
    )
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--interval', type=float, default=10, help='seconds')
    parser.add_argument('--warm_up', type=float, default=2, help='minutes left out of the growth')
    parser.add_argument('--pid', type=int, default=0, help='of a learner that runs already')
    args = parser.parse_args()
    stages.begin('environments alone')
    bare = bare_environments(args.level_name, args.envs_per_process)
    logdir = tempfile.mkdtemp(prefix='impala-benchmark-')
    process = None
    pid = args.pid
    try:
        if not pid:
            process = subprocess.Popen(
                [
                    sys.executable,
                    'experiment.py',
                    '--flagfile=configs/pong_quick.flags',
                    f'--level_name={args.level_name}',
                    f'--num_actors={args.num_actors}',
                    f'--envs_per_process={args.envs_per_process}',
                    f'--logdir={logdir}',
                ],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            pid = process.pid
        stages.begin(f'a run is watched for {args.minutes:g} minutes')
        samples = watch(pid, args.minutes, args.interval)
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait()
        shutil.rmtree(logdir)
    settled = np.array([sample for sample in samples if sample[0] >= args.warm_up])
    if len(settled) < 2:
        sys.exit('The run ended before there was anything to measure.')
    # Megabytes per minute of a straight line through the samples.
    learner_growth = np.polyfit(settled[:, 0], settled[:, 1], 1)[0]
    actor_growth = np.polyfit(settled[:, 0], settled[:, 2], 1)[0]
    over = statistics.median(settled[:, 2]) - bare
    print(machine.describe())
    print(f'`python -m benchmarks.memory {" ".join(sys.argv[1:])}`, {samples[-1][0]:.0f} minutes')
    rows = [['environments alone', f'{bare:.1f}']]
    for name, column, growth in (('actor', 2, actor_growth), ('learner', 1, learner_growth)):
        quarters = settled[np.linspace(0, len(settled) - 1, 5).astype(int), column]
        rows.append([name, *(f'{each:.1f}' for each in quarters), f'{growth:+.3f}'])
    headers = ['process', 'MB after warm-up', '1/4', '1/2', '3/4', 'at the end', 'MB per minute']
    print(tabulate.tabulate(rows, headers, 'github'))
    print(
        json.dumps(
            {
                'actor_megabytes_over_environment': round(over, 1),
                'actor_growth_megabytes_per_minute': round(float(actor_growth), 4),
                'learner_growth_megabytes_per_minute': round(float(learner_growth), 4),
            }
        )
    )


if __name__ == '__main__':
    main()
