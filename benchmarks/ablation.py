"""Trains levels with several settings each, and files table and curves under docs/results/.

    python -m benchmarks.ablation configs/generality.json

The file has the frames of a run, the levels with the return that counts as learned, and the
settings: their flags, the number of seeds (a level may have fewer), and their levels, if not all.
All settings train their first seed before any trains its second. A stopped run is resumed. The
outcome of a complete run is filed at once, in NAME.json and in a CSV file per level under
docs/results/, and the run is not repeated unless its flags or its return in the plan change.
`--report` trains nothing and reports what is filed. With `"suite": true` the page also has what all
levels together reach, human-normalized, with intervals.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib
import numpy as np
import tabulate
from matplotlib.figure import Figure

from benchmarks import learning, machine
from impala import suites
from impala.suites import aggregates
from impala.suites.scores import human_normalized
from impala.tools import plot

RANDOM_EPISODES = 100
_CURVE = ('agent_steps', 'minutes', 'mean_return')
_POINTS = 200


def folder(name: str, setting: str, level_name: str, seed: int, flags: Sequence[str]) -> str:
    """Returns the folder of a run, relative to the project; other flags have another folder."""
    words = [re.sub(r'[^A-Za-z0-9]+', '_', text).strip('_') for text in (setting, level_name)]
    flags_hash = zlib.crc32(' '.join(flags).encode())
    return os.path.join('runs', name, *words, f'seed_{seed}_{flags_hash:08x}')


def plan_runs(plan: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Yields seed, level and settings of each run, in the order in which they are made."""
    most = max(setting['seeds'] for setting in plan['settings'].values())
    for seed in range(1, most + 1):
        for level_name, level in plan['levels'].items():
            for setting_name, setting in plan['settings'].items():
                if level_name in setting.get('levels', plan['levels']) and seed <= min(
                    setting['seeds'], level.get('seeds', most)
                ):
                    yield seed, level_name, setting_name


def flags_of(plan: dict[str, Any], setting_name: str, level_name: str) -> list[str]:
    """Returns the flags of a run without seed and folder."""
    return [
        *plan['settings'][setting_name]['flags'],
        f'--level_name={level_name}',
        f'--total_environment_frames={plan["frames"]}',
    ]


@dataclasses.dataclass(frozen=True)
class FiledRun:
    """The record of a complete run.

    Attributes:
      settings: name in the plan.
      flags: as of `flags_of`.
      row: as of `learning.row_of`.
      curve: f64 `[N, 3]`: agent steps, minutes, mean of the last `learning.WINDOW` returns.
    """

    settings: str
    flags: list[str]
    row: dict[str, Any]
    curve: np.ndarray


def file_of_level(name: str, level_name: str) -> str:
    """Returns the name of a level's CSV file and pictures, without extension."""
    return f'{name}_{re.sub(r"[^A-Za-z0-9]+", "_", level_name.removeprefix("ALE/"))}'


@dataclasses.dataclass
class Filed:
    """The records of a plan.

    Attributes:
      runs: the complete ones.
      random: level -> score of random actions, as of `learning.mean_and_interval`.
    """

    runs: list[FiledRun] = dataclasses.field(default_factory=list)
    random: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def read_filed(folder: str, name: str, plan: dict[str, Any]) -> Filed:
    """Reads the records of a plan from a folder."""
    path = os.path.join(folder, f'{name}.json')
    if not os.path.exists(path):
        return Filed()
    with open(path, encoding='utf-8') as file:
        content = json.load(file)
    kept = content['runs']
    curves: dict[tuple[str, str, int], list[tuple[float, ...]]] = {}
    for level_name in {run['row']['level'] for run in kept}:
        path = os.path.join(folder, f'{file_of_level(name, level_name)}.csv')
        with open(path, encoding='utf-8', newline='') as file:
            for point in csv.DictReader(file):
                key = level_name, point['settings'], int(point['seed'])
                values = tuple(float(point[column]) for column in _CURVE)
                curves.setdefault(key, []).append(values)
    planned = set(plan_runs(plan))
    filed = Filed(random=content['random'])
    for run in kept:
        row, settings, flags = run['row'], run['settings'], run['flags']
        level_name = row['level']
        if (
            (row['seed'], level_name, settings) in planned
            and flags == flags_of(plan, settings, level_name)
            and row['threshold'] == plan['levels'][level_name]['learned']
        ):
            curve = np.array(curves[level_name, settings, row['seed']])
            filed.runs.append(FiledRun(settings, flags, row, curve))
    return filed


def write_filed(folder: str, name: str, filed: Filed) -> None:
    """Writes what `read_filed` reads."""
    runs = filed.runs
    for level_name in {run.row['level'] for run in runs}:
        path = os.path.join(folder, f'{file_of_level(name, level_name)}.csv')
        with open(path, 'w', encoding='utf-8', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['settings', 'seed', *_CURVE])
            for run in runs:
                if run.row['level'] == level_name:
                    for steps, minutes, mean in run.curve:
                        point = [round(steps), round(minutes, 3), round(mean, 3)]
                        writer.writerow([run.settings, run.row['seed'], *point])
    kept = [
        {'settings': run.settings, 'flags': run.flags, 'row': _rounded(run.row)} for run in runs
    ]
    with open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8') as file:
        json.dump({'random': _rounded(filed.random), 'runs': kept}, file, indent=1)
        file.write('\n')


def _rounded(value: Any) -> Any:
    """Returns a JSON value with at most three decimals."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 3) if isinstance(value, float) else value


def thin_curve(episodes: Sequence[dict[str, str]]) -> np.ndarray:
    """Returns a `FiledRun.curve` of the rows of `episodes.csv`."""
    returns = np.array([float(episode['episode_return']) for episode in episodes])
    columns = [
        [float(episode['agent_steps']) for episode in episodes],
        [float(episode['wall_seconds']) / 60 for episode in episodes],
        plot.running_mean(returns, learning.WINDOW),
    ]
    kept = np.linspace(0, len(episodes) - 1, min(_POINTS, len(episodes))).astype(int)
    return np.array(columns).T[kept]


def train(name: str, plan: dict[str, Any], test_episodes: int) -> None:
    """Trains, tests and files the runs that are not filed yet."""
    for seed, level_name, setting_name in plan_runs(plan):
        filed = read_filed(learning.RESULTS, name, plan)
        if (seed, level_name, setting_name) in {
            (run.row['seed'], run.row['level'], run.settings) for run in filed.runs
        }:
            continue
        flags = flags_of(plan, setting_name, level_name)
        logdir = folder(name, setting_name, level_name, seed, flags)
        if not learning.is_tested(logdir):
            learning.train_and_test(logdir, flags, seed, test_episodes)
        row, episodes = learning.row_of(seed, logdir, plan['levels'][level_name]['learned'])
        filed.runs.append(FiledRun(setting_name, flags, row, thin_curve(episodes)))
        write_filed(learning.RESULTS, name, filed)


def normalized_scores(plan: dict[str, Any], filed: Filed) -> dict[str, list[list[float]]]:
    """Returns settings -> human-normalized test scores of the runs of each level, in percent.

    Settings without a run of every level are left out.
    """
    scores = {}
    for setting_name in plan['settings']:
        levels = [
            [
                human_normalized(run.row['tested'][0], suites.known_level(level_name))
                for run in filed.runs
                if (run.settings, run.row['level']) == (setting_name, level_name)
            ]
            for level_name in plan['levels']
        ]
        if all(levels):
            scores[setting_name] = levels
    return scores


def draw_profiles(scores: dict[str, list[list[float]]]) -> Any:
    """Returns a figure of the performance profiles of `normalized_scores`, with intervals."""
    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    flat = [score for levels in scores.values() for level in levels for score in level]
    # From where all runs are above it: a run may be worse than random actions.
    margin = 0.05 * max(max(flat), 1.0)
    thresholds = np.linspace(min(0.0, *flat) - margin, max(flat) + margin, 200)
    for setting_name, levels in scores.items():
        shares, intervals = aggregates.performance_profile(levels, thresholds)
        (line,) = axes.plot(
            thresholds, shares, drawstyle='steps-post', label=plot.readable(setting_name)
        )
        low, high = intervals.T
        axes.fill_between(thresholds, low, high, step='post', alpha=0.2, color=line.get_color())
    axes.set(xlabel='human-normalized score, %', ylabel='share of runs above it', ylim=(0, 1))
    axes.legend()
    return figure


def _suite_section(name: str, plan: dict[str, Any], filed: Filed) -> list[str]:
    """Returns the page's lines about all levels together; draws the performance profile."""
    scores = normalized_scores(plan, filed)
    if not scores:
        return []
    statistics = {
        'interquartile mean': aggregates.interquartile_mean,
        'median of levels': aggregates.median_of_levels,
        'mean of levels': aggregates.mean_of_levels,
    }
    lines = []
    for setting_name, levels in scores.items():
        line = [setting_name, str(sum(map(len, levels)))]
        for statistic in statistics.values():
            value, interval = aggregates.with_interval(statistic, levels)
            line.append(
                f'{value:.1f}' + (f' ({interval[0]:.1f} to {interval[1]:.1f})' if interval else '')
            )
        lines.append(line)
    with matplotlib.rc_context(plot.STYLE):
        draw_profiles(scores).savefig(os.path.join(learning.RESULTS, f'{name}_profile.png'))
    return [
        '## All levels together',
        '',
        'Human-normalized test scores in percent (0: random actions, 100: a human), with 95%',
        'intervals of a bootstrap that draws runs within each level (Agarwal et al. 2021).',
        '',
        tabulate.tabulate(
            lines, ['settings', 'runs', *statistics], 'github', disable_numparse=True
        ),
        '',
        f'![Share of runs above each score]({name}_profile.png)',
        '',
    ]


def report(name: str, plan: dict[str, Any], test_episodes: int, remark: str) -> str:
    """Plots the records; returns the page."""
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
    filed = read_filed(learning.RESULTS, name, plan)
    for level_name, level in plan['levels'].items():
        lines: list[list[Any]] = []
        drawn: dict[str, list[plot.Run]] = {}
        for setting_name in plan['settings']:
            runs = [
                r for r in filed.runs if (r.settings, r.row['level']) == (setting_name, level_name)
            ]
            runs.sort(key=lambda run: run.row['seed'])
            rows = [run.row for run in runs]
            lines += [[setting_name, *line] for line in learning.table_lines(rows)]
            for steps, minutes, means in (run.curve.T for run in runs):
                points = np.stack([steps, steps, minutes / 60, means], 1)
                drawn.setdefault(setting_name, []).append(
                    plot.Run('', {'level_name': level_name}, {level_name: points}, [])
                )
        if not lines:
            continue
        stem = file_of_level(name, level_name)
        with matplotlib.rc_context(plot.STYLE):
            for over, suffix in (('agent_steps', ''), ('wall_time', '_time')):
                figure = plot.learning_curves(drawn, over, window=1)
                figure.savefig(os.path.join(learning.RESULTS, f'{stem}{suffix}.png'))
        headers = ['settings', *learning.table_headers(level['learned'])]
        page += [f'## {level_name}', '']
        page += [tabulate.tabulate(lines, headers, 'github', disable_numparse=True), '']
        if level_name not in filed.random:
            returns = learning.random_returns(level_name, RANDOM_EPISODES)
            filed.random[level_name] = learning.mean_and_interval(returns)
            write_filed(learning.RESULTS, name, filed)
        random = filed.random[level_name]
        page += [learning.comparison(level_name, random, RANDOM_EPISODES), '']
        page += [f'![Learning curves, lowest to highest of the seeds]({stem}.png)', '']
        page += [f'![The same over wall time]({stem}_time.png)', '']
    if plan.get('suite'):
        page += _suite_section(name, plan, filed)
    page.append(
        f'Written by `python -m benchmarks.ablation configs/{name}.json`; the curves are in'
    )
    page.append('the CSV files next to this page.')
    return '\n'.join(page) + '\n'


def main() -> None:
    """Trains, tests, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('plan', help='JSON file in configs/')
    parser.add_argument('--report', action='store_true', help='of what is complete, train nothing')
    parser.add_argument('--test_episodes', type=int, default=50)
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
    page = report(name, plan, args.test_episodes, args.remark)
    with open(os.path.join(learning.RESULTS, f'{name}.md'), 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
