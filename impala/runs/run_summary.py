"""Sums up a run from its files, in numbers and in sentences."""

import os
from collections.abc import Mapping
from typing import Any

from impala.runs import learning_curve
from impala.runs.files import (
    METRICS_FILE,
    LogdirError,
    parse_metrics,
    read_episodes,
    read_rows,
)


def read_summary(logdir: str) -> dict[str, Any]:
    """Sums up a run from its files.

    Args:
      logdir: the log directory.

    Returns:
      JSON-serializable: `wall_seconds`, `frames`, `agent_steps`, `updates`,
      `agent_steps_per_second`, `updates_skipped` and `unrolls_discarded` of the whole run;
      `episodes` (those with finite returns) and `episodes_not_finite` (the others);
      `mean_return_last_100` over all levels, None without episodes; `levels`: name -> its
      `episodes` and `mean_return_last_100`.

    Raises:
      LogdirError: there is no run there.
    """
    curves: dict[str, learning_curve.LearningCurve] = {}
    together = learning_curve.LearningCurve()
    line: dict[str, Any] = {}
    skipped = discarded = 0
    try:
        for row in read_episodes(logdir):
            curve = curves.setdefault(row['level'], learning_curve.LearningCurve())
            for each in (curve, together):
                each.add(row['agent_steps'], row['wall_seconds'], row['return'])
        for row in read_rows(os.path.join(logdir, METRICS_FILE), parse_metrics):
            line = row
            skipped += row.get('updates_skipped', 0)
            discarded += row.get('unrolls_discarded', 0)
    except OSError as error:
        raise LogdirError(
            f'Cannot read the logs of a run in {logdir}: {error.strerror}.'
        ) from error
    wall_seconds = line.get('wall_seconds', 0.0)
    return {
        'wall_seconds': wall_seconds,
        'frames': line.get('frames', 0),
        'agent_steps': line.get('agent_steps', 0),
        'updates': line.get('updates', 0),
        'agent_steps_per_second': line['agent_steps'] / wall_seconds if wall_seconds else 0.0,
        'episodes': together.num_episodes,
        'mean_return_last_100': together.mean if together.num_episodes else None,
        'episodes_not_finite': together.num_not_finite,
        'updates_skipped': skipped,
        'unrolls_discarded': discarded,
        'levels': {
            level: {'episodes': curve.num_episodes, 'mean_return_last_100': curve.mean}
            for level, curve in curves.items()
        },
    }


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Returns the result of `read_summary` in sentences, one per line, without a final newline."""
    mean_return, not_finite = summary['mean_return_last_100'], summary['episodes_not_finite']
    discarded, skipped = summary['unrolls_discarded'], summary['updates_skipped']
    if mean_return is not None:
        returns = f'{mean_return:.2f}'
        if not_finite:
            returns += f' ({not_finite:,} with returns that are not finite left out)'
    elif not_finite:
        returns = f'none is finite, of {not_finite:,}'
    elif discarded:
        returns = 'none has ended in an unroll that was learned from'
    else:
        returns = 'none has ended yet'
    lines = [
        f'{summary["agent_steps"]:,} agent steps ({summary["frames"]:,} frames) in '
        f'{summary["wall_seconds"]:.0f} s; mean return of the last 100 episodes: {returns}.'
    ]
    if discarded:
        lines.append(
            f'Not learned from: {discarded:,} unrolls with values of the environment that are not '
            'finite.'
        )
    if skipped:
        lines.append(
            f'Skipped: {skipped:,} of {summary["updates"]:,} updates, whose loss or gradient was '
            'not finite.'
        )
    return '\n'.join(lines)
