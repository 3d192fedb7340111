"""What test mode leaves behind: scores as JSON, CSV, a table and a picture."""

import csv
import dataclasses
import io
import json
import math
import os
import statistics
from typing import Any

import tabulate

from impala import scores
from impala.suites import Suite

SCORES_FILE = 'test_scores.json'
TABLE_FILE = 'test_scores.csv'
CHART_FILES = ('test_scores.png', 'test_scores.svg')
HISTORY_FILE = 'test_history.csv'

_HISTORY_HEADER = (
    'checkpoint',
    'agent_steps',
    'frames',
    'level',
    'episodes',
    'mean',
    'low',
    'high',
    'policy',
    'seed',
)
# What makes two tests the same one.
_HISTORY_KEY = ('checkpoint', 'agent_steps', 'level', 'episodes', 'policy', 'seed')
_SUITE_ROWS = {
    'mean_no_cap': 'mean over levels',
    'mean_cap_100': 'mean over levels, each capped at 100',
    'median_no_cap': 'median over levels',
    'median_cap_100': 'median over levels, each capped at 100',
}


@dataclasses.dataclass(frozen=True)
class CheckpointScores:
    """What the test of a checkpoint has come to.

    Attributes:
      checkpoint: its path.
      agent_steps: learned from until then.
      frames: see `agent_steps`.
      policy: how actions were chosen.
      seed: of the test.
      suite: the levels that were played.
      returns: level name -> returns, at least one.
    """

    checkpoint: str
    agent_steps: int
    frames: int
    policy: str
    seed: int
    suite: Suite
    returns: dict[str, list[float]]


def summary(result: CheckpointScores) -> dict[str, Any]:
    """Returns what `test_scores.json` holds.

    Returns:
      JSON-serialisable: `checkpoint`, `agent_steps`, `frames`, `policy`, `seed`; `levels`: name ->
      `returns`, `mean`, `interval_95` (of the mean, None of a single episode), `median` and, where
      they are known, `random`, `human` and `human_normalized` (percent); and, if they are known for
      more than one level and for all, `suite`: `name`, the values of `scores.SuiteScore`, and
      `intervals_95` of them.
    """
    levels = {}
    for level in result.suite.levels:
        returns = result.returns[level.name]
        mean = scores.mean_return(returns, level.name)
        values: dict[str, Any] = {
            'returns': returns,
            'mean': mean,
            'interval_95': scores.mean_interval(returns),
            'median': statistics.median(returns),
        }
        if level.has_scores:
            values |= {
                'random': level.random,
                'human': level.human,
                'human_normalized': scores.human_normalized(mean, level),
            }
        levels[level.name] = values
    result_summary: dict[str, Any] = {
        'checkpoint': result.checkpoint,
        'agent_steps': result.agent_steps,
        'frames': result.frames,
        'policy': result.policy,
        'seed': result.seed,
        'levels': levels,
    }
    if len(levels) > 1 and result.suite.has_scores:
        result_summary['suite'] = {
            'name': result.suite.name,
            **dataclasses.asdict(scores.suite_score(result.returns, result.suite.levels)),
            'intervals_95': scores.suite_intervals(result.returns, result.suite.levels),
        }
    return result_summary


def write(logdir: str, result: CheckpointScores, add_to_history: bool = False) -> None:
    """Writes all files of a test.

    Args:
      logdir: existing folder.
      result: of the test.
      add_to_history: whether `test_history.csv` gets its rows.

    Raises:
      OSError: one of them cannot be written.
    """
    content = summary(result)
    _replace(logdir, SCORES_FILE, (json.dumps(content, indent=2) + '\n').encode())
    header = ('level', 'episodes', 'mean', 'low', 'high', 'median', 'random', 'human',
              'human_normalized')  # fmt: skip
    rows = []
    for name, values in content['levels'].items():
        low, high = values['interval_95'] or ('', '')
        rows.append(
            (name, len(values['returns']), values['mean'], low, high, values['median'])
            + tuple(values.get(column, '') for column in header[6:])
        )
    _replace(logdir, TABLE_FILE, _csv_text([header, *rows]))
    for file in CHART_FILES:
        _replace(logdir, file, _chart(content, os.path.splitext(file)[1][1:]))
    if add_to_history:
        history = []
        path = os.path.join(logdir, HISTORY_FILE)
        if os.path.exists(path):
            with open(path, encoding='utf-8', newline='') as old_file:
                history = list(csv.DictReader(old_file))
        # A test that was stopped begins with the checkpoint that it ended with.
        known = {tuple(row.get(name) for name in _HISTORY_KEY) for row in history}
        for row in rows:
            values = (
                result.checkpoint, result.agent_steps, result.frames, *row[:5],
                result.policy, result.seed,
            )  # fmt: skip
            texts = dict(zip(_HISTORY_HEADER, map(str, values), strict=True))
            if tuple(texts[name] for name in _HISTORY_KEY) not in known:
                history.append(texts)
        lines = [[row.get(name) or '' for name in _HISTORY_HEADER] for row in history]
        _replace(logdir, HISTORY_FILE, _csv_text([_HISTORY_HEADER, *lines]))


def table(result: CheckpointScores) -> str:
    """Returns the scores as text for the terminal."""
    content = summary(result)
    rows = []
    for name, values in content['levels'].items():
        rows.append(
            [
                name,
                len(values['returns']),
                f'{values["mean"]:.2f}',
                _interval_text(values['interval_95'], 2),
                f'{values["median"]:g}',
                *(
                    f'{values[column]:{form}}' if column in values else ''
                    for column, form in (
                        ('random', 'g'),
                        ('human', 'g'),
                        ('human_normalized', '.1f'),
                    )
                ),
            ]
        )
    headers = ['level', 'episodes', 'mean return', '95% interval', 'median', 'random', 'human',
               '% of human']  # fmt: skip
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    lines = [
        tabulate.tabulate(
            [[row[i] for i in used] for row in rows],
            [headers[i] for i in used],
            disable_numparse=True,
            colalign=['left' if i == 0 else 'right' for i in used],
        )
    ]
    suite = content.get('suite')
    if suite:
        intervals = suite['intervals_95'] or {}
        suite_rows = [
            [text, f'{suite[key]:.1f}', _interval_text(intervals.get(key), 1)]
            for key, text in _SUITE_ROWS.items()
        ]
        lines += [
            '',
            tabulate.tabulate(
                suite_rows,
                [suite['name'] or 'these levels', '% of human', '95% interval'],
                disable_numparse=True,
                colalign=('left', 'right', 'right'),
            ),
        ]
    return '\n'.join(lines)


def _interval_text(interval: Any, digits: int) -> str:
    return f'{interval[0]:.{digits}f} to {interval[1]:.{digits}f}' if interval else ''


def _csv_text(rows: list[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    return buffer.getvalue().encode()


def _replace(logdir: str, name: str, content: bytes) -> None:
    path = os.path.join(logdir, name)
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'wb') as file:
        file.write(content)
    os.replace(temporary, path)


def _chart(content: dict[str, Any], form: str) -> bytes:
    """Returns a bar for each level, with its 95% interval, against random and human."""
    # Matplotlib takes a while to import.
    from matplotlib.figure import Figure

    levels = content['levels']
    figure: Any
    if all('human_normalized' in values for values in levels.values()):
        figure = Figure(figsize=(6.5, 1.2 + 0.19 * len(levels)), dpi=150, layout='constrained')
        axes = figure.subplots()
        names = sorted(levels, key=lambda name: levels[name]['human_normalized'])
        values = [levels[name] for name in names]
        percents = [value['human_normalized'] for value in values]
        axes.barh(names, percents, color='tab:blue', height=0.7)
        for row, value in enumerate(values):
            if value['interval_95']:
                span = value['human'] - value['random']
                ends = [100 * (end - value['random']) / span for end in value['interval_95']]
                axes.plot(ends, [row, row], color='black', linewidth=1)
        axes.axvline(0, color='0.5', linewidth=1)
        axes.axvline(100, color='tab:red', linewidth=1, linestyle='--')
        if max(percents) > 300:
            # One game far above a human would hide all others.
            axes.set_xscale('symlog', linthresh=100)
        axes.set_xlabel('% of human (0: random actions, dashed: a human)', fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(labelsize=7)
    else:
        figure = Figure(figsize=(6.5, 0.6 + 0.75 * len(levels)), dpi=150, layout='constrained')
        for axes, (name, value) in zip(
            figure.subplots(len(levels), squeeze=False)[:, 0], levels.items(), strict=True
        ):
            axes.barh([name], [value['mean']], color='tab:blue', height=0.6)
            if value['interval_95']:
                axes.plot(value['interval_95'], [0, 0], color='black', linewidth=1)
            for key, color in (('random', '0.5'), ('human', 'tab:red')):
                if key in value:
                    axes.axvline(value[key], color=color, linestyle='--', linewidth=1, label=key)
            if 'human' in value:
                axes.legend(fontsize=6, frameon=False)
            if not math.isfinite(value['mean']):
                axes.set_xlim(0, 1)
            axes.tick_params(labelsize=7)
        axes.set_xlabel('mean return, with its 95% interval', fontsize=8)
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    return buffer.getvalue()
