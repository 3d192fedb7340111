"""Trains and tests each of the 57 Atari games for a moment, and files how fast it is.

    python -m benchmarks.atari57

writes `docs/results/atari57.md` and `.csv`. `experiment.py` trains each game for `--seconds`, is
stopped by a signal, and tests for an episode; a failure ends the program. Games already in the CSV
file are skipped: remove it to start over, or to change `--seconds`.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate
import tqdm

from benchmarks import machine
from impala import suites
from impala.runs.files import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'docs', 'results')
COLUMNS = ('level', 'agent_steps_per_second', 'agent_steps', 'test_return')
TRAINING = (
    '--num_actors=24',
    '--envs_per_process=8',
    '--batch_size=8',
    '--unroll_length=20',
    '--intra_op_threads=1',
    '--compute_dtype=auto',
)


def start(output: str, *flags: str) -> subprocess.Popen:
    """Starts experiment.py with its output in a file."""
    with open(output, 'wb') as file:
        return subprocess.Popen(
            [sys.executable, 'experiment.py', *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def finish(process: subprocess.Popen, output: str) -> None:
    """Waits for a command; ends the program if it has failed."""
    if process.wait():
        with open(output, encoding='utf-8') as file:
            sys.exit(f'{process.args!r} has failed:\n{file.read()}')


def measure(level_name: str, seconds: float) -> dict[str, object]:
    """Trains and tests a game; returns its row of the table."""
    with (
        tempfile.TemporaryDirectory(prefix='impala-benchmark-') as folder,
        contextlib.ExitStack() as stack,
    ):
        logdir = os.path.join(folder, 'run')
        output = os.path.join(folder, 'output')
        training = start(
            output, f'--level_name={level_name}', f'--logdir={logdir}', '--log_secs=1', *TRAINING
        )
        stack.callback(training.kill)
        # A line a second, except the first, which is of the first update, and the last.
        while len(read_metrics(logdir)) < seconds + 2 and training.poll() is None:
            time.sleep(0.1)
        if training.poll() is None:
            training.send_signal(signal.SIGINT)
        finish(training, output)
        lines = read_metrics(logdir)
        first, last = lines[1], lines[-2]
        test = start(output, '--mode=test', f'--logdir={logdir}', '--test_num_episodes=1')
        stack.callback(test.kill)
        finish(test, output)
        with open(os.path.join(logdir, 'test_scores.json'), encoding='utf-8') as file:
            tested = json.load(file)['levels'][level_name]
        rate = (last['agent_steps'] - first['agent_steps']) / (
            last['wall_seconds'] - first['wall_seconds']
        )
        values = (level_name, round(rate), lines[-1]['agent_steps'], *tested['returns'])
        return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=8, help='of training, each game')
    parser.add_argument('--remark', default='', help='a sentence for the page')
    args = parser.parse_args()
    path = os.path.join(RESULTS, 'atari57.csv')
    rows: list[dict] = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', newline='') as file:
            rows = list(csv.DictReader(file))
    levels = suites.load('atari57').level_names
    done = {row['level'] for row in rows}
    for level_name in tqdm.tqdm([name for name in levels if name not in done], unit='game'):
        rows.append(measure(level_name, args.seconds))
        with open(path, 'w', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    rates = [int(row['agent_steps_per_second']) for row in rows]
    table = [
        [
            row['level'],
            f'{int(row["agent_steps_per_second"]):,}',
            f'{int(row["agent_steps"]):,}',
            f'{float(row["test_return"]):g}',
        ]
        for row in rows
    ]
    headers = ['level', 'agent steps/s', 'agent steps trained', 'return of the test']
    page = f"""# The 57 games

{machine.describe()}, no GPU, {datetime.date.today()}. {args.remark}

    python -m benchmarks.atari57 {' '.join(sys.argv[1:])}

Each game is trained with `{' '.join(TRAINING)}`
for {args.seconds:g} seconds after its first update, stopped, and tested for one episode. Nothing is
learned in that time: this shows that all of them run, and how fast. (`python -m pytest -m slow`
has the same as a test.) Agent steps/s: median {np.median(rates):,.0f}, from {min(rates):,} to
{max(rates):,}.

{tabulate.tabulate(table, headers, 'github', disable_numparse=True)}
"""
    with open(os.path.join(RESULTS, 'atari57.md'), 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
