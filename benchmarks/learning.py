"""Trains with a flag file and files the outcome under docs/results: command, curve, scores.

    python -m benchmarks.learning pong_quick --threshold=18

writes `docs/results/pong_quick.md`, `.csv` and `.png`. A run that was stopped goes on; one
that is complete is only reported. Random actions and test mode stand beside it.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine
from environments import EnvironmentConfig, create_environment
from impala.trajectory import EpisodeEnd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'docs', 'results')
WINDOW = 100  # Episodes in a rolling mean.
MAX_ROWS = 10_000  # Of a CSV file in docs/results; of more episodes every n-th is filed.


def random_returns(level_name: str, num_episodes: int) -> list[float]:
    """Returns the returns of uniformly random actions."""
    environment = create_environment(level_name, 12345, EnvironmentConfig())
    random = np.random.RandomState(0)
    returns: list[float] = []
    total = 0.0
    environment.reset()
    while len(returns) < num_episodes:
        reward, end, _ = environment.step(int(random.randint(environment.spec.num_actions)))
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


def summary(returns: list[float]) -> list[str]:
    """Returns mean with its standard error, and the number of episodes."""
    error = np.std(returns, ddof=1) / np.sqrt(len(returns))
    return [f'{np.mean(returns):.2f} ± {error:.2f}', str(len(returns))]


def main() -> None:
    """Trains, tests, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name', help='of a flag file in configs/')
    parser.add_argument(
        '--threshold', type=float, required=True, help='return that counts as solved'
    )
    parser.add_argument('--logdir', default='', help='default: runs/NAME')
    parser.add_argument('--random_episodes', type=int, default=100)
    parser.add_argument('--test_episodes', type=int, default=50)
    parser.add_argument('--remark', default='', help='a sentence for the page')
    args = parser.parse_args()
    logdir = args.logdir or os.path.join('runs', args.name)
    command = [f'--flagfile=configs/{args.name}.flags', f'--logdir={logdir}']
    subprocess.run([sys.executable, 'experiment.py', *command], cwd=ROOT, check=True)
    test = ['--mode=test', f'--test_num_episodes={args.test_episodes}', f'--logdir={logdir}']
    subprocess.run(
        [sys.executable, 'experiment.py', *test, '--num_actors=10'], cwd=ROOT, check=True
    )

    logdir = os.path.join(ROOT, logdir)
    with open(os.path.join(logdir, 'episodes.csv'), encoding='utf-8', newline='') as file:
        episodes = list(csv.DictReader(file))
    with open(os.path.join(logdir, 'metrics.jsonl'), encoding='utf-8') as file:
        metrics = [json.loads(line) for line in file]
    with open(os.path.join(logdir, 'test_scores.json'), encoding='utf-8') as file:
        levels = json.load(file)['levels']
    (level_name,) = levels
    last = metrics[-1]
    solved = first_above(episodes, args.threshold)
    os.makedirs(RESULTS, exist_ok=True)
    picture = os.path.join(RESULTS, f'{args.name}.png')
    shutil.copyfile(os.path.join(logdir, 'learning_curve.png'), picture)
    stride = -(-len(episodes) // MAX_ROWS)
    with open(os.path.join(RESULTS, f'{args.name}.csv'), 'w', encoding='utf-8') as file:
        writer = csv.DictWriter(file, episodes[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(episodes[::stride])
    filed = 'Every episode' if stride == 1 else f'One episode in {stride}'

    def minutes(row: dict) -> str:
        return f'{float(row["wall_seconds"]) / 60:.1f} min'

    progress = [
        [
            f'mean of the last {WINDOW} episodes reaches {args.threshold:g}',
            f'{int(solved["agent_steps"]):,}' if solved else 'not reached',
            minutes(solved) if solved else '',
        ],
        ['end of the run', f'{last["agent_steps"]:,}', minutes(last)],
    ]
    trained = [float(episode['episode_return']) for episode in episodes[-WINDOW:]]
    scores = [
        [f'training, last {WINDOW} episodes', *summary(trained)],
        ['`--mode=test` with the last checkpoint', *summary(levels[level_name]['returns'])],
        ['random actions', *summary(random_returns(level_name, args.random_episodes))],
    ]
    page = f"""# {level_name}

{machine.describe()}, no GPU, {datetime.date.today()}. {args.remark}

    python experiment.py {' '.join(command)}

{tabulate.tabulate(progress, ['', 'agent steps', 'wall time'], 'github')}

{tabulate.tabulate(scores, ['returns', 'mean ± standard error', 'episodes'], 'github')}

![Learning curve]({args.name}.png)

{filed} is in [{args.name}.csv]({args.name}.csv), the settings are in
[configs/{args.name}.flags](../../configs/{args.name}.flags). This page was written by
`python -m benchmarks.learning {args.name} --threshold={args.threshold:g}`.
"""
    with open(os.path.join(RESULTS, f'{args.name}.md'), 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
