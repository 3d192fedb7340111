"""Trains with a flag file and several seeds, and files the outcome under docs/results.

    python -m benchmarks.learning babyai_instruction --threshold=0.8 --seeds=3

writes `docs/results/babyai_instruction.md`, `.csv`, `.png` and `_time.png`: command, curves over
agent steps and over time, and scores next to those of random actions, people and publications. A
stopped run is resumed; a complete one is only reported.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib
import numpy as np
import tabulate

from benchmarks import machine
from impala import suites
from impala.config import Config
from impala.environments import EnvironmentConfig, create_environment
from impala.runs import files, flag_file, flags
from impala.suites.scores import mean_interval
from impala.tools import plot
from impala.trajectory import ACTION_MASK, ActionSpec, EpisodeEnd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'docs', 'results')
WINDOW = 100  # Episodes in a rolling mean.
MAX_ROWS = 10_000  # Of a CSV file in docs/results; with more episodes, every n-th is filed.


def random_action(
    spec: ActionSpec, random: np.random.RandomState, mask: np.ndarray | None = None
) -> Any:
    """Returns a uniformly random action; of unbounded components, a standard normal one.

    Args:
      spec: of the actions.
      random: the source of randomness.
      mask: bool, whether a category is allowed, for all of them one after the other; None for all.
    """
    allowed = np.ones(spec.num_logits, bool) if mask is None else mask
    masks = np.split(allowed, np.cumsum(spec.categories)[:-1]) if spec.categories else []
    categories = [random.choice(np.flatnonzero(each)) for each in masks]
    if spec.is_scalar:
        return int(categories[0])
    values = [random.normal() if each is None else random.uniform(*each) for each in spec.bounds]
    return np.array([*categories, *values], spec.array.dtype)


def random_returns(
    level_name: str, num_episodes: int, config: EnvironmentConfig | None = None
) -> list[float]:
    """Returns the returns of random actions, see `random_action`."""
    environment = create_environment(level_name, 12345, config or EnvironmentConfig())
    random = np.random.RandomState(0)
    returns: list[float] = []
    total = 0.0
    observation = environment.reset()
    while len(returns) < num_episodes:
        action = random_action(environment.spec.action, random, observation.get(ACTION_MASK))
        reward, end, observation = environment.step(action)
        total += reward
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            returns.append(total)
            total = 0.0
    environment.close()
    return returns


def first_above(episodes: list[dict[str, str]], threshold: float) -> dict[str, str] | None:
    """Returns the episode with which the mean of the last 100 first reaches the threshold."""
    returns = np.array([float(episode['episode_return']) for episode in episodes])
    if len(returns) < WINDOW:
        return None
    means = np.convolve(returns, np.full(WINDOW, 1 / WINDOW), 'valid')
    reached = np.flatnonzero(means >= threshold)
    return episodes[reached[0] + WINDOW - 1] if len(reached) else None


def mean_and_interval(returns: list[float]) -> list[float]:
    """Returns the mean and, if there are several, its 95% bootstrap interval."""
    return [float(np.mean(returns)), *(mean_interval(returns) or ())]


def mean_text(mean: float, *interval: float) -> str:
    """Returns the text of `mean_and_interval`."""
    return f'{mean:.2f}' + (f' ({interval[0]:.2f} to {interval[1]:.2f})' if interval else '')


def train_and_test(logdir: str, flags: Sequence[str], seed: int, test_episodes: int) -> None:
    """Trains, or resumes, and tests the last checkpoint; `logdir` is relative to ROOT."""
    here = [sys.executable, 'experiment.py', f'--logdir={logdir}']
    train = [*here, *flags, f'--seed={seed}']
    test = [*here, '--mode=test', f'--test_num_episodes={test_episodes}', '--num_actors=10']
    with _ctrl_c_left_to_commands():
        trained = subprocess.run(train, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(trained.stdout)
        if trained.returncode:
            # It has printed why.
            sys.exit(trained.returncode)
        # A stopped run has exit code 0, too.
        if 'The run is complete' not in trained.stdout:
            sys.exit(f'{logdir} is not complete; the same command resumes it.')
        tested = subprocess.run(test, cwd=ROOT)
    if tested.returncode:
        sys.exit(tested.returncode)
    if not is_tested(logdir):
        sys.exit(f'{logdir} is not tested; the same command resumes it.')


def is_tested(logdir: str) -> bool:
    """Returns whether all episodes of a run's test were played; `logdir` is relative to ROOT."""
    path = os.path.join(ROOT, logdir, 'test_scores.json')
    if not os.path.exists(path):
        return False
    with open(path, encoding='utf-8') as file:
        return not json.load(file)['partial']


@contextlib.contextmanager
def _ctrl_c_left_to_commands() -> Iterator[None]:
    """Makes Ctrl-C end the commands that run in this block, but not this process.

    `subprocess.run` would leave them a quarter of a second, and then kill them: too little for
    training to save what it has learned.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def row_of(seed: int, logdir: str, threshold: float) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns a row of the page's table, with numbers for the medians, and the run's episodes."""
    logdir = os.path.join(ROOT, logdir)
    with open(os.path.join(logdir, 'episodes.csv'), encoding='utf-8', newline='') as file:
        episodes = list(csv.DictReader(file))
    with open(os.path.join(logdir, 'test_scores.json'), encoding='utf-8') as file:
        ((level_name, level),) = json.load(file)['levels'].items()
    solved = first_above(episodes, threshold)
    last = files.read_metrics(logdir)[-1]
    return {
        'seed': seed,
        'level': level_name,
        'threshold': threshold,
        'solved_steps': int(solved['agent_steps']) if solved else None,
        'solved_minutes': float(solved['wall_seconds']) / 60 if solved else None,
        'steps': last['agent_steps'],
        'minutes': last['wall_seconds'] / 60,
        'trained': statistics.fmean(float(e['episode_return']) for e in episodes[-WINDOW:]),
        'tested': mean_and_interval(level['returns']),
    }, episodes


def table_headers(threshold: float) -> list[str]:
    """Returns the headers of `table_lines`."""
    return [
        'seed',
        f'steps until {threshold:g}',
        'minutes',
        'steps in all',
        'minutes',
        f'return, last {WINDOW}',
        '`--mode=test` (95% interval)',
    ]


def table_lines(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Returns a line for each run of `row_of`, and one of medians if their number has a middle."""
    lines = [
        [
            row['seed'],
            f'{row["solved_steps"]:,}' if row['solved_steps'] else 'not reached',
            f'{row["solved_minutes"]:.1f}' if row['solved_steps'] else '',
            f'{row["steps"]:,}',
            f'{row["minutes"]:.1f}',
            f'{row["trained"]:.2f}',
            mean_text(*row['tested']),
        ]
        for row in rows
    ]
    if len(rows) > 1 and len(rows) % 2:
        # Runs that never reach it count as slower than all that do.
        reached = statistics.median(row['solved_steps'] or float('inf') for row in rows)
        minutes = statistics.median(row['solved_minutes'] or float('inf') for row in rows)
        solved = reached < float('inf')
        lines.append(
            [
                'median',
                f'{reached:,.0f}' if solved else 'not reached',
                f'{minutes:.1f}' if solved else '',
                f'{statistics.median(row["steps"] for row in rows):,.0f}',
                f'{statistics.median(row["minutes"] for row in rows):.1f}',
                f'{statistics.median(row["trained"] for row in rows):.2f}',
                f'{statistics.median(row["tested"][0] for row in rows):.2f}',
            ]
        )
    return lines


def file_episodes(name: str, episodes: Sequence[dict[str, Any]]) -> int:
    """Writes every n-th episode to docs/results/NAME.csv; returns n."""
    stride = -(-len(episodes) // MAX_ROWS)
    with open(os.path.join(RESULTS, f'{name}.csv'), 'w', encoding='utf-8') as file:
        writer = csv.DictWriter(file, episodes[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(episodes[::stride])
    return stride


def comparison(level_name: str, random: Sequence[float], random_episodes: int) -> str:
    """Returns a table of scores in the level: random actions, humans, publications."""
    known = suites.known_level(level_name)
    lines = [[f'random actions, {random_episodes} episodes here', mean_text(*random)]]
    if known.human is not None:
        lines.append(['human, as published', f'{known.human:g}'])
    lines += [[f'{name}, as published', f'{value:g}'] for name, value in known.published.items()]
    return tabulate.tabulate(
        lines, ['for comparison', 'mean return'], 'github', disable_numparse=True
    )


def main() -> None:
    """Trains, tests, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name', help='of a flag file in configs/')
    parser.add_argument(
        '--threshold', type=float, required=True, help='return that counts as solved'
    )
    parser.add_argument('--seeds', type=int, default=3, help='runs with the seeds 1, 2, ...')
    parser.add_argument('--random_episodes', type=int, default=100)
    parser.add_argument('--test_episodes', type=int, default=50)
    parser.add_argument('--remark', default='', help='a sentence for the page')
    args = parser.parse_args()
    name = args.name
    rows, filed = [], []
    logdirs = [os.path.join('runs', name, f'seed_{seed}') for seed in range(1, args.seeds + 1)]
    for seed, logdir in enumerate(logdirs, 1):
        train_and_test(logdir, [f'--flagfile=configs/{name}.flags'], seed, args.test_episodes)
    for seed, logdir in enumerate(logdirs, 1):
        row, episodes = row_of(seed, logdir, args.threshold)
        rows.append(row)
        filed += [{'seed': seed} | episode for episode in episodes]
    os.makedirs(RESULTS, exist_ok=True)
    stride = file_episodes(name, filed)
    with matplotlib.rc_context(plot.STYLE):
        runs = [plot.read_run(os.path.join(ROOT, logdir)) for logdir in logdirs]
        label = f'{name}, {len(runs)} seeds' if len(runs) > 1 else name
        for over, suffix in (('agent_steps', ''), ('wall_time', '_time')):
            figure = plot.learning_curves({label: runs}, over)
            figure.savefig(os.path.join(RESULTS, f'{name}{suffix}.png'))
    level_name = rows[0]['level']
    stored = flags.parse_stored(flag_file.read(os.path.join(ROOT, logdirs[0], files.FLAG_FILE)))
    environment = Config.of(**stored).environment
    random = mean_and_interval(random_returns(level_name, args.random_episodes, environment))
    shape = ', between the lowest and the highest of the seeds' if len(rows) > 1 else ''
    table = tabulate.tabulate(
        table_lines(rows), table_headers(args.threshold), 'github', disable_numparse=True
    )
    page = f"""# {level_name}

{machine.describe()}, no GPU, {datetime.date.today()}. {args.remark}

    python experiment.py --flagfile=configs/{name}.flags --logdir=runs/{name}/seed_1 --seed=1

and so on. Agent steps and minutes until the mean of the last {WINDOW} episodes first reached
{args.threshold:g}; the test is of the last checkpoint, {args.test_episodes} episodes.

{table}

{comparison(level_name, random, args.random_episodes)}

![Learning curve{shape}]({name}.png)

![The same over wall time]({name}_time.png)

{'Every episode' if stride == 1 else f'One episode in {stride}'} is in [{name}.csv]({name}.csv),
the settings are in [configs/{name}.flags](../../configs/{name}.flags). This page was written by
`python -m benchmarks.learning {name} --threshold={args.threshold:g} --seeds={args.seeds}`.
"""
    with open(os.path.join(RESULTS, f'{name}.md'), 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
