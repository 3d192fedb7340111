"""The results of a test: scores as JSON, CSV, a table and a bar chart."""

import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any

import tabulate

from impala.suites import Suite, scores

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
_NO_SCORE = 'no finite return'
# Tests that agree in these are the same test.
_HISTORY_KEY = ('checkpoint', 'agent_steps', 'level', 'episodes', 'policy', 'seed')
_SUITE_ROWS = {
    'mean_no_cap': 'mean over levels',
    'mean_cap_100': 'mean over levels, each capped at 100',
    'median_no_cap': 'median over levels',
    'median_cap_100': 'median over levels, each capped at 100',
}


@dataclasses.dataclass(frozen=True)
class CheckpointScores:
    """The results of testing a checkpoint.

    Attributes:
      checkpoint: its path.
      agent_steps: agent steps that it was trained on.
      frames: frames that it was trained on.
      policy: how actions were chosen, as `--test_policy`.
      seed: of the test.
      suite: the levels that were played.
      returns: level name -> returns of the episodes that were played.
      num_episodes: planned for each level; if fewer were played, the test is partial.
      max_frames: length at which an episode is cut off.
      cut_off: level name -> number of episodes that were cut off; empty if none was.
    """

    checkpoint: str
    agent_steps: int
    frames: int
    policy: str
    seed: int
    suite: Suite
    returns: dict[str, list[float]]
    num_episodes: int
    max_frames: int
    cut_off: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether fewer episodes were played than planned."""
        return any(len(returns) < self.num_episodes for returns in self.returns.values())


def summary(result: CheckpointScores) -> dict[str, Any]:
    """Returns the content of `test_scores.json`.

    Returns:
      JSON-serializable: `checkpoint`, `agent_steps`, `frames`, `policy`, `seed`, `partial` (whether
      the test ended before all episodes were played), `max_frames`, and `levels`: level name ->
      `returns` (None for each that is not finite), `not_finite` (their number), `cut_off` (number
      of episodes cut off at `max_frames`); of the finite returns `mean` and `median` (None if there
      are none), and `interval_95` (of the mean; None for a single episode); where they are known
      `random`, `human` and `human_normalized` (percent). If there are several levels, all with
      known scores and finite returns, also `suite`: `name`, the values of `scores.SuiteScore`, and
      their `intervals_95`.
    """
    finite = {
        name: [value for value in returns if math.isfinite(value)]
        for name, returns in result.returns.items()
    }
    levels = {}
    for level in result.suite.levels:
        returns, counted = result.returns[level.name], finite[level.name]
        mean = scores.mean_return(counted, level.name) if counted else None
        values: dict[str, Any] = {
            'returns': [value if math.isfinite(value) else None for value in returns],
            'not_finite': len(returns) - len(counted),
            'cut_off': result.cut_off.get(level.name, 0),
            'mean': mean,
            'interval_95': scores.mean_interval(counted),
            'median': statistics.median(counted) if counted else None,
        }
        if level.has_scores:
            values |= {
                'random': level.random,
                'human': level.human,
                'human_normalized': (
                    None if mean is None else scores.human_normalized(mean, level)
                ),
            }
        levels[level.name] = values
    result_summary: dict[str, Any] = {
        'checkpoint': result.checkpoint,
        'agent_steps': result.agent_steps,
        'frames': result.frames,
        'policy': result.policy,
        'seed': result.seed,
        'partial': result.is_partial,
        'max_frames': result.max_frames,
        'levels': levels,
    }
    if len(levels) > 1 and result.suite.has_scores and all(finite.values()):
        result_summary['suite'] = {
            'name': result.suite.name,
            **dataclasses.asdict(scores.suite_score(finite, result.suite.levels)),
            'intervals_95': scores.suite_intervals(finite, result.suite.levels),
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
    text = json.dumps(content, indent=2, allow_nan=False)
    _replace(logdir, SCORES_FILE, f'{text}\n'.encode())
    header = ('level', 'episodes', 'mean', 'low', 'high', 'median', 'random', 'human',
              'human_normalized', 'not_finite', 'cut_off', 'partial')  # fmt: skip
    rows = []
    for name, values in content['levels'].items():
        low, high = values['interval_95'] or ('', '')
        row = values | {
            'level': name,
            'episodes': len(values['returns']),
            'low': low,
            'high': high,
            'partial': str(result.is_partial).lower(),
        }
        rows.append(['' if row.get(column) is None else row[column] for column in header])
    _replace(logdir, TABLE_FILE, _csv_text([header, *rows]))
    for file in CHART_FILES:
        _replace(logdir, file, _chart(content, os.path.splitext(file)[1][1:]))
    if add_to_history:
        history = []
        path = os.path.join(logdir, HISTORY_FILE)
        if os.path.exists(path):
            # Damaged bytes are kept.
            with open(path, encoding='utf-8', errors='surrogateescape', newline='') as old_file:
                history = list(csv.DictReader(old_file))
        # A test that is started again begins with the checkpoint that it ended with.
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
    columns = {
        'mean return': ('mean', '.2f'),
        '95% interval': None,
        'median': ('median', 'g'),
        'random': ('random', 'g'),
        'human': ('human', 'g'),
        '% of human': ('human_normalized', '.1f'),
    }
    rows = []
    for name, values in content['levels'].items():
        row = [name, str(len(values['returns']))]
        for column in columns.values():
            if column is None:
                row.append(_interval_text(values['interval_95'], 2))
                continue
            value = values.get(column[0])
            row.append('' if value is None else format(value, column[1]))
        rows.append(row)
    headers = ['level', 'episodes', *columns]
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
    lines += _remarks(result, content)
    return '\n'.join(lines)


def _remarks(result: CheckpointScores, content: dict[str, Any]) -> list[str]:
    """Returns sentences about a partial test, returns that are not finite, and cut-off episodes."""
    remarks = []
    if result.is_partial:
        played = sum(map(len, result.returns.values()))
        remarks.append(
            f'PARTIAL: {played:,} of {result.num_episodes * len(result.returns):,} episodes were '
            'played before the test ended; those that end early are over-represented.'
        )
    for name, values in content['levels'].items():
        num_played = len(values['returns'])
        if values['not_finite']:
            finite = num_played - values['not_finite']
            rest = f'the scores are of the other {finite:,}' if finite else 'there is no score'
            remarks.append(
                f'{values["not_finite"]:,} of {num_played:,} returns of {name} are not finite: '
                f'{rest}.'
            )
        if values['cut_off']:
            remarks.append(
                f'{values["cut_off"]:,} of {num_played:,} episodes of {name} were cut off at '
                f'--test_max_frames={result.max_frames}.'
            )
    return remarks


def _interval_text(interval: Any, digits: int) -> str:
    return f'{interval[0]:.{digits}f} to {interval[1]:.{digits}f}' if interval else ''


def _csv_text(rows: list[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    return buffer.getvalue().encode(errors='surrogateescape')


def _replace(logdir: str, name: str, content: bytes) -> None:
    path = os.path.join(logdir, name)
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'wb') as file:
        file.write(content)
    os.replace(temporary, path)


def _chart(content: dict[str, Any], form: str) -> bytes:
    """Returns a picture: a bar per level with its 95% interval, and random and human scores."""
    # Imported here because it takes a while.
    from matplotlib.figure import Figure

    levels = content['levels']
    figure: Any
    if all('human_normalized' in values for values in levels.values()):
        figure = Figure(figsize=(6.5, 1.2 + 0.19 * len(levels)), dpi=150, layout='constrained')
        axes = figure.subplots()
        names = sorted(levels, key=lambda name: levels[name]['human_normalized'] or 0.0)
        values = [levels[name] for name in names]
        percents = [value['human_normalized'] or 0.0 for value in values]
        axes.barh(names, percents, color='tab:blue', height=0.7)
        for row, value in enumerate(values):
            if value['mean'] is None:
                axes.text(0, row, f' {_NO_SCORE}', va='center', fontsize=6)
            if value['interval_95']:
                span = value['human'] - value['random']
                ends = [100 * (end - value['random']) / span for end in value['interval_95']]
                axes.plot(ends, [row, row], color='black', linewidth=1)
        axes.axvline(0, color='0.5', linewidth=1)
        axes.axvline(100, color='tab:red', linewidth=1, linestyle='--')
        if max(percents) > 300:
            # One game far above a human would make all other bars invisible.
            axes.set_xscale('symlog', linthresh=100)
        axes.set_xlabel('% of human (0: random actions, dashed: a human)', fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(labelsize=7)
    else:
        figure = Figure(figsize=(6.5, 0.6 + 0.75 * len(levels)), dpi=150, layout='constrained')
        for axes, (name, value) in zip(
            figure.subplots(len(levels), squeeze=False)[:, 0], levels.items(), strict=True
        ):
            axes.barh([name], [value['mean'] or 0.0], color='tab:blue', height=0.6)
            if value['interval_95']:
                axes.plot(value['interval_95'], [0, 0], color='black', linewidth=1)
            for key, color in (('random', '0.5'), ('human', 'tab:red')):
                if key in value:
                    axes.axvline(value[key], color=color, linestyle='--', linewidth=1, label=key)
            if 'human' in value:
                axes.legend(fontsize=6, frameon=False)
            if value['mean'] is None:
                axes.set_xlim(0, 1)
                axes.text(0.01, 0, _NO_SCORE, va='center', fontsize=7)
            axes.tick_params(labelsize=7)
        axes.set_xlabel('mean return, with its 95% interval', fontsize=8)
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    return buffer.getvalue()
