"""Kills jobs at random while they train, and looks for loss, duplicates and leaks.

    python -m benchmarks.chaos --minutes=30

Real: one learner and `--actors` actor jobs, as commands on this machine, on loopback. Every
`--kill_seconds` one of them, drawn at random, is killed (SIGKILL) and started again a moment later;
in the second half of the time the learner is spared, so that its memory can be watched. They
train `numbered_level`, which reveals every episode that the learner missed or received twice.
Then they train the same number of frames without kills, for comparison.
"""

import argparse
import csv
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import tabulate

from benchmarks import machine, numbered_level, stages
from benchmarks.memory import resident
from impala.runs.files import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BATCH_SIZE = 8
ENVIRONMENTS = 4  # Of an actor job.
DUPLICATES = 'episodes that came twice'
UNEXPLAINED = 'gaps that no kill of the learner explains'
MISCOUNTED = 'lines of metrics with frames miscounted'
# Memory is measured after this: TensorFlow allocates on demand at first.
WARM_UP_SECONDS = 30
SETTINGS = (
    '--level_name=benchmarks.numbered_level:cart_pole',
    f'--batch_size={BATCH_SIZE}',
    f'--unroll_length={numbered_level.EPISODE_STEPS}',
    '--learning_rate=0.003',
    '--epsilon=0.01',
    '--entropy_cost=0.01',
    '--gradient_clip_norm=40',
    '--log_secs=2',
    '--save_checkpoint_secs=10',
    '--trusted_network',
)


@dataclasses.dataclass
class Job:
    """A learner or actor job, and its processes so far."""

    flags: list[str]
    environment: dict[str, str]
    output: str
    kills: int = 0

    def start(self) -> None:
        """Starts or restarts it."""
        with open(self.output, 'ab') as output:
            self.process = subprocess.Popen(
                [sys.executable, 'experiment.py', *self.flags],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        """Kills it without warning."""
        self.kills += 1
        self.process.kill()
        self.process.wait()


class Run:
    """A learner and its actors in a folder. A context manager that ends them all."""

    def __init__(self, folder: str, num_actors: int):
        self.logdir = os.path.join(folder, 'run')
        self.numbers = os.path.join(folder, 'numbers')
        os.makedirs(self.numbers)
        with socket.socket() as probe:
            probe.bind(('localhost', 0))
            address = f'--learner_address=localhost:{probe.getsockname()[1]}'
        environment = os.environ | {numbered_level.FOLDER_VARIABLE: self.numbers}
        self.learner = Job(
            ['--task=0', address, *SETTINGS, f'--logdir={self.logdir}'],
            environment,
            os.path.join(folder, 'learner.txt'),
        )
        self.actors = [
            Job(
                [
                    '--job_name=actor',
                    f'--task={task}',
                    address,
                    f'--envs_per_actor={ENVIRONMENTS}',
                    f'--seed={1 + 1000 * task}',
                ],
                environment,
                os.path.join(folder, f'actor{task}.txt'),
            )
            for task in range(num_actors)
        ]

    @property
    def jobs(self) -> list[Job]:
        """All of them, the learner first."""
        return [self.learner, *self.actors]

    def __enter__(self) -> 'Run':
        for job in self.jobs:
            job.start()
        return self

    def __exit__(self, *unused: object) -> None:
        for job in self.jobs:
            job.process.kill()
            job.process.wait()

    def metrics(self) -> list[dict]:
        """Returns the lines of metrics.jsonl."""
        return read_metrics(self.logdir)

    def frames(self) -> int:
        """Returns the frames trained so far."""
        lines = self.metrics()
        return lines[-1]['frames'] if lines else 0

    def account(self) -> numbered_level.Account:
        """Returns what became of the episodes."""
        path = os.path.join(self.logdir, 'episodes.csv')
        with open(path, encoding='utf-8', newline='') as file:
            return numbered_level.account(csv.DictReader(file), self.numbers)

    def stop(self) -> list[int]:
        """Ends all jobs by a signal; returns their exit codes."""
        for job in self.jobs:
            job.process.send_signal(signal.SIGTERM)
        return [job.process.wait() for job in self.jobs]

    def check_alive(self) -> None:
        """Ends the program if a job has ended without being killed."""
        for job in self.jobs:
            if job.process.poll() is not None:
                with open(job.output, encoding='utf-8') as file:
                    sys.exit(f'{job.flags[0]} ended by itself:\n{file.read()[-2000:]}')


def cause_chaos(run: Run, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Kills at random.

    Returns:
      Minutes and megabytes of the learner, from `WARM_UP_SECONDS` after its last start of training.
    """
    dice = random.Random(args.seed)
    while not run.frames():
        run.check_alive()
        time.sleep(1)
    started = trains_since = time.monotonic()
    frames_at_start = 0
    next_kill = started + args.kill_seconds
    samples: list[tuple[float, float]] = []
    while (now := time.monotonic()) - started < args.minutes * 60:
        run.check_alive()
        if now >= next_kill:
            next_kill += args.kill_seconds
            victim = dice.choice(run.actors)
            if (
                now - started < args.minutes * 30
                and dice.random() < args.learner_share
                and os.path.isdir(os.path.join(run.logdir, 'checkpoints'))
            ):
                victim = run.learner
                samples.clear()
            stages.begin(f'a kill, at {run.frames():,} frames')
            victim.kill()
            time.sleep(dice.uniform(0, 2))
            victim.start()
            if victim is run.learner:
                frames_at_start = run.frames()
        if run.frames() <= frames_at_start:
            # It is loading, or repeats what it had not saved.
            trains_since = now
        elif now - trains_since > WARM_UP_SECONDS:
            learner = psutil.Process(run.learner.process.pid)
            samples.append(((now - started) / 60, resident(learner)))
        time.sleep(1)
    return samples


def column(run: Run) -> dict[str, float]:
    """Returns the table's column for a run that has ended."""
    account, lines = run.account(), run.metrics()
    learner_kills, *actor_kills = (job.kills for job in run.jobs)
    unroll_frames = BATCH_SIZE * numbered_level.EPISODE_STEPS
    return {
        'kills of actor jobs': sum(actor_kills),
        'kills of the learner': learner_kills,
        'frames': lines[-1]['frames'],
        'frames/s': lines[-1]['frames'] / lines[-1]['wall_seconds'],
        'episodes': account.episodes,
        DUPLICATES: account.duplicates,
        'episodes missing': account.missing,
        # When a learner is killed, an environment loses what had not been saved, and then what it
        # had begun with unsaved weights; an unroll of older weights may come between.
        UNEXPLAINED: sum(max(0, gaps - 2 * learner_kills) for gaps in account.gaps.values()),
        MISCOUNTED: sum(line['frames'] != unroll_frames * line['updates'] for line in lines),
        'unrolls refused, last line': sum(row['rejected'] for row in lines[-1]['actors']),
        'frames per fall, last quarter': account.frames_per_fall,
    }


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--kill_seconds', type=float, default=10)
    parser.add_argument(
        '--learner_share', type=float, default=0.15, help='of kills in the first half'
    )
    parser.add_argument('--actors', type=int, default=4, help=f'jobs, {ENVIRONMENTS} games each')
    parser.add_argument('--alone', action='store_true', help='leave the comparison out')
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix='impala-benchmark-') as folder,
        Run(folder, args.actors) as run,
    ):
        stages.begin(f'{args.minutes:g} minutes of chaos')
        samples = cause_chaos(run, args)
        if len(samples) < 2:
            sys.exit('The learner was not there for long enough to be watched: more --minutes.')
        minutes, megabytes = np.array(samples).T
        codes = run.stop()
        chaos = column(run)
        frames = run.frames()
    columns = [list(chaos.values())]
    growth = float(np.polyfit(minutes, megabytes, 1)[0])
    if not args.alone:
        with (
            tempfile.TemporaryDirectory(prefix='impala-benchmark-') as folder,
            Run(folder, args.actors) as run,
        ):
            stages.begin(f'{frames:,} frames in calm')
            while run.frames() < frames:
                run.check_alive()
                time.sleep(2)
            codes += run.stop()
            columns.append(list(column(run).values()))
    print(machine.describe())
    print(f'`python -m benchmarks.chaos {" ".join(sys.argv[1:])}`')
    rows = [list(row) for row in zip(chaos, *columns, strict=True)]
    headers = ['', 'chaos', 'calm'][: 1 + len(columns)]
    print(tabulate.tabulate(rows, headers, 'github', intfmt=',', floatfmt='.0f'))
    print(
        f'The learner had {megabytes[0]:.0f} MB, and {megabytes[-1]:.0f} MB after '
        f'{minutes[-1] - minutes[0]:.1f} minutes more, in which only actors were killed.'
    )
    print(
        json.dumps(
            {
                'duplicates': chaos[DUPLICATES],
                'unexplained_gaps': chaos[UNEXPLAINED],
                'frames_miscounted': chaos[MISCOUNTED],
                'exit_codes': codes,
                'frames_per_fall': [round(values[-1]) for values in columns],
                'learner_megabytes_per_minute': round(growth, 3),
            }
        )
    )


if __name__ == '__main__':
    main()
