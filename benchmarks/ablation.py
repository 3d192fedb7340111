"""Trains levels with several settings each, and files table and curves under docs/results/.

    python -m benchmarks.ablation configs/generality.json

The file says how many frames a run has, the levels with the return that counts as learned, and the
settings: their flags and how many seeds, unless a level has fewer. All have their first seed before
any has its second. A run that was stopped goes on, complete ones are only reported; `--report`
trains nothing and reports what is complete.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib
import tabulate

from benchmarks import learning, machine
from impala import plot


def folder(name: str, setting: str, level_name: str, seed: int) -> str:
    """Returns the folder of a run, from the root of the project."""
    words = [re.sub(r'[^A-Za-z0-9]+', '_', text).strip('_') for text in (setting, level_name)]
    return os.path.join('runs', name, *words, f'seed_{seed}')


def is_complete(logdir: str) -> bool:
    """Returns whether a run was trained and tested to its end."""
    return os.path.exists(os.path.join(learning.ROOT, logdir, 'test_scores.json'))


def plan_runs(plan: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Yields seed, level and settings of each run, in the order in which they are made."""
    most = max(setting['seeds'] for setting in plan['settings'].values())
    for seed in range(1, most + 1):
        for level_name, level in plan['levels'].items():
            for setting_name, setting in plan['settings'].items():
                if seed <= min(setting['seeds'], level.get('seeds', most)):
                    yield seed, level_name, setting_name


def train(name: str, plan: dict[str, Any], test_episodes: int) -> None:
    """Trains and tests what is not complete."""
    for seed, level_name, setting_name in plan_runs(plan):
        logdir = folder(name, setting_name, level_name, seed)
        if not is_complete(logdir):
            flags = [
                *plan['settings'][setting_name]['flags'],
                f'--level_name={level_name}',
                f'--total_environment_frames={plan["frames"]}',
            ]
            learning.train_and_test(logdir, flags, seed, test_episodes)


def report(
    name: str, plan: dict[str, Any], test_episodes: int, random_episodes: int, remark: str
) -> str:
    """Writes the CSV files and pictures; returns the page."""
    page = [f'# {plan["title"]}', '']
    page += [f'{machine.describe()}, no GPU, {datetime.date.today()}. {remark}'.strip(), '']
    page += [
        f'{plan["frames"]:,} frames a run. Agent steps and minutes until the mean of the last '
        f'{learning.WINDOW} episodes first reached a return; the test is of the last checkpoint, '
        f'{test_episodes} episodes.',
        '',
    ]
    for setting_name, setting in plan['settings'].items():
        flags = ' '.join(map(shlex.quote, setting['flags']))
        page += [
            f'{setting_name}:',
            '',
            f'    python experiment.py {flags} --level_name=LEVEL '
            f'--total_environment_frames={plan["frames"]} --seed=N',
            '',
        ]
    for level_name, level in plan['levels'].items():
        lines: list[list[Any]] = []
        runs: dict[str, list[plot.Run]] = {}
        filed: list[dict[str, Any]] = []
        for setting_name in plan['settings']:
            rows = []
            for seed, *what in plan_runs(plan):
                logdir = folder(name, setting_name, level_name, seed)
                if what == [level_name, setting_name] and is_complete(logdir):
                    row, episodes = learning.row_of(seed, logdir, level['learned'])
                    rows.append(row)
                    filed += [{'settings': setting_name, 'seed': seed} | e for e in episodes]
                    run = plot.read_run(os.path.join(learning.ROOT, logdir))
                    runs.setdefault(setting_name, []).append(run)
            lines += [[setting_name, *line] for line in learning.table_lines(rows)]
        if not filed:
            continue
        stem = f'{name}_{re.sub(r"[^A-Za-z0-9]+", "_", level_name.removeprefix("ALE/"))}'
        learning.file_episodes(stem, filed)
        with matplotlib.rc_context(plot.STYLE):
            for over, suffix in (('agent_steps', ''), ('wall_time', '_time')):
                figure = plot.learning_curves(runs, over)
                figure.savefig(os.path.join(learning.RESULTS, f'{stem}{suffix}.png'))
        headers = ['settings', *learning.table_headers(level['learned'])]
        page += [f'## {level_name}', '']
        page += [tabulate.tabulate(lines, headers, 'github', disable_numparse=True), '']
        page += [learning.comparison(level_name, random_episodes), '']
        page += [f'![Learning curves, lowest to highest of the seeds]({stem}.png)', '']
        page += [f'![The same over wall time]({stem}_time.png)', '']
    page.append(f'Written by `python -m benchmarks.ablation configs/{name}.json`; the episodes are')
    page.append('in the CSV files beside this page.')
    return '\n'.join(page) + '\n'


def main() -> None:
    """Trains, tests, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('plan', help='JSON file in configs/')
    parser.add_argument('--report', action='store_true', help='of what is complete, train nothing')
    parser.add_argument('--test_episodes', type=int, default=50)
    parser.add_argument('--random_episodes', type=int, default=100)
    parser.add_argument('--remark', default='', help='a sentence for the page')
    args = parser.parse_args()
    name = os.path.splitext(os.path.basename(args.plan))[0]
    try:
        with open(args.plan, encoding='utf-8') as file:
            plan = json.load(file)
    except (OSError, ValueError) as error:
        parser.error(f'{args.plan} is not a plan such as configs/generality.json: {error}.')
    if not args.report:
        train(name, plan, args.test_episodes)
    page = report(name, plan, args.test_episodes, args.random_episodes, args.remark)
    with open(os.path.join(learning.RESULTS, f'{name}.md'), 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
