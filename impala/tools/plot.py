"""Draws runs: learning curves, the time of each stage, and the policy lag.

    python -m impala.tools.plot runs/pong_1 runs/pong_2 [--output=FOLDER] [--over=frames]

Runs that differ only in seed and folder become one line, their mean, with a band from the lowest to
the highest. Every picture is written as PNG and as SVG.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from impala import suites
from impala.errors import LevelError
from impala.runs import flag_file
from impala.runs.files import LogdirError, read_episodes, read_metrics
from impala.runs.learning_curve import STYLE as CURVE_STYLE
from impala.runs.learning_curve import TEST_STYLE
from impala.runs.output import outlive_readers

WINDOW = 100
POINTS = 200
_OVER = {'frames': 'frames', 'agent_steps': 'agent steps', 'wall_time': 'wall time (h)'}
# If all runs are shorter than this, in hours, wall time is drawn in minutes.
_SHORT_RUN = 2.0
# Of the lines of known scores; sizes in points.
_KNOWN_COLOR = '0.35'
_KNOWN_FONT_SIZE = 6.5
_PUBLISHED_STYLE = (0, (8, 2, 1, 2))
# A published score is left off the scale if its distance from the range of everything else exceeds
# this multiple of that range.
_KNOWN_REACH = 2.0
# Inches of width of a panel, if there are several: without and with names of published agents.
_PANEL_WIDTH, _NAMED_PANEL_WIDTH = 3.3, 5.0
# Flags in which runs of one kind may differ.
_OF_ONE_RUN = ('seed', 'learner_address', 'task')
STYLE: Any = CURVE_STYLE | {'svg.fonttype': 'none'}


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run.

    Attributes:
      logdir: its folder.
      flags: name -> text of the value.
      episodes: level name -> f64 `[N, 4]`: frames, agent steps, hours, return.
      metrics: lines of `metrics.jsonl`.
      not_finite: number of episodes whose return is not finite; `episodes` omits them.
      tests: tested level -> f64 `[N, 4]`: frames, agent steps, hours, mean return.
    """

    logdir: str
    flags: Mapping[str, str]
    episodes: Mapping[str, np.ndarray]
    metrics: Sequence[Mapping[str, Any]]
    not_finite: int = 0
    tests: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read_run(logdir: str, report: Callable[[str], Any] | None = None) -> Run:
    """Reads a run's files.

    Args:
      logdir: folder of the run.
      report: takes a sentence for each file with damaged lines.

    Raises:
      LogdirError: there is no run there.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    not_finite = 0
    for row in read_episodes(logdir, report):
        if not math.isfinite(row['return']):
            not_finite += 1
        else:
            rows.setdefault(row['level'], []).append(
                (row['frames'], row['agent_steps'], row['wall_seconds'] / 3600, row['return'])
            )
    flags = {}
    try:
        metrics = read_metrics(logdir, report)
        path = os.path.join(logdir, flag_file.FLAG_FILE)
        if os.path.exists(path):
            for argument in flag_file.read(path):
                flags[argument.name] = argument.text.partition('=')[2]
    except flag_file.FlagFileError as error:
        raise LogdirError(str(error)) from error
    except OSError as error:
        raise LogdirError(f'Cannot read the run in {logdir}: {error.strerror}.') from error
    return Run(
        logdir,
        flags,
        {name: np.array(values) for name, values in rows.items()},
        metrics,
        not_finite,
        _tests(metrics),
    )


def _tests(metrics: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns `Run.tests` from lines of `metrics.jsonl`."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for line in metrics:
        if not {'test/frames', 'test/agent_steps', 'test/wall_seconds'} <= line.keys():
            continue
        frames, agent_steps = line['test/frames'], line['test/agent_steps']
        for name, value in line.items():
            level = name.removeprefix('test_return/')
            if level != name:
                row = (frames, agent_steps, line['test/wall_seconds'] / 3600, value)
                found.setdefault(level, []).append(row)
    return {level: np.array(rows) for level, rows in found.items()}


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs that differ only in their seeds; returns name -> runs.

    A single run is named after its folder, several runs after the beginning that their names share.
    """
    kinds: dict[Any, list[Run]] = {}
    for run in runs:
        flags = {name: value for name, value in run.flags.items() if name not in _OF_ONE_RUN}
        # Without its flags, a run cannot be compared with others.
        kind = tuple(sorted(flags.items())) if flags else run.logdir
        kinds.setdefault(kind, []).append(run)
    named: dict[str, list[Run]] = {}
    for members in kinds.values():
        names = [os.path.basename(os.path.normpath(run.logdir)) for run in members]
        name = names[0]
        if len(members) > 1:
            name = os.path.commonprefix(names).rstrip('_-. ') or names[0]
            name = f'{name} ({len(members)} seeds)'
        while name in named:
            name += "'"
        named[name] = members
    return named


def readable(name: str) -> str:
    """Returns the name of a folder, a setting or a stage as a picture shows it."""
    return name.replace('_', ' ')


def running_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Returns the mean of the last `window` values, of fewer at the start, f64 `[N]`."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def spread(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], points: int = POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, mean, lowest and highest of curves, where all of them exist, f64 `[points]`.

    Args:
      curves: x (rising) and y of each, f64 `[N]`.
      points: number of values of x.
    """
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    x = np.linspace(first, max(first, last), points)
    y = np.array([np.interp(x, *curve) for curve in curves])
    return x, y.mean(0), y.min(0), y.max(0)


def learning_curves(
    kinds: Mapping[str, Sequence[Run]], over: str = 'frames', window: int = WINDOW
) -> Any:
    """Returns a figure with each level's returns, and its random, human and published scores.

    Args:
      kinds: from `group`.
      over: `'frames'`, `'agent_steps'` or `'wall_time'`.
      window: how many returns to average; 1 if they are averages already.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    levels = list(
        dict.fromkeys(
            name for runs in kinds.values() for r in runs for name in (*r.episodes, *r.tests)
        )
    )
    columns = min(4, math.ceil(math.sqrt(max(1, len(levels)))))
    rows = max(1, math.ceil(len(levels) / columns))
    known_levels = _known_levels(kinds)
    known = {name: known_levels.get(name) or suites.known_level(name) for name in levels}
    any_published = any(level.published for level in known.values())
    width = _NAMED_PANEL_WIDTH if any_published else _PANEL_WIDTH
    # Each level has limits of its own, since returns differ in scale.
    size = (6.5, 3.6) if len(levels) <= 1 else (width * columns, 2.3 * rows)
    figure: Any = Figure(figsize=(size[0], size[1] + 0.3), dpi=200, layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    label, scale = _horizontal_axis(kinds, over)
    has_tests = False
    for axes, name in zip(grid, levels, strict=False):
        for color, (kind, runs) in enumerate(kinds.items()):
            played = [run.episodes[name] for run in runs if name in run.episodes]
            curves = [
                (scale * episodes[:, _column(over)], running_mean(episodes[:, 3], window))
                for episodes in played
            ]
            if curves:
                _draw_spread(axes, curves, f'C{color}', readable(kind))
            for tests in (run.tests[name] for run in runs if name in run.tests):
                x = scale * tests[:, _column(over)]
                axes.plot(x, tests[:, 3], color=f'C{color}', **TEST_STYLE)
                has_tests = True
        _draw_known_scores(axes, known[name])
        axes.set_title(name, fontsize=8)
        if over != 'wall_time':
            axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.set_xlim(left=0)
    for axes in grid[len(levels) :]:
        axes.set_visible(False)
    # Not a label of the whole figure, because the legend would be drawn over it.
    for axes in grid[max(0, len(levels) - columns) : max(1, len(levels))]:
        axes.set_xlabel(label)
    figure.supylabel(
        f'mean return of the last {WINDOW} episodes' + (' (circles: tests)' if has_tests else ''),
        fontsize=9,
    )
    if levels:
        _add_legend(figure, grid[: len(levels)], [readable(kind) for kind in kinds])
        figure.draw_without_rendering()
        for axes in grid[: len(levels)]:
            _name_known_scores(axes)
    else:
        grid[0].text(0.5, 0.5, 'no episode has ended', ha='center', transform=grid[0].transAxes)
    return figure


def _column(over: str) -> int:
    """Returns the column of `Run.episodes` that a horizontal axis shows."""
    return list(_OVER).index(over)


def _horizontal_axis(kinds: Mapping[str, Sequence[Run]], over: str) -> tuple[str, float]:
    """Returns the label of the horizontal axis, and its units per unit of `Run.episodes`."""
    if over == 'wall_time' and all(
        episodes[-1, _column(over)] < _SHORT_RUN
        for runs in kinds.values() for run in runs for episodes in run.episodes.values()
    ):  # fmt: skip
        return 'wall time (min)', 60.0
    return _OVER[over], 1.0


def _draw_spread(
    axes: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]], color: str, label: str
) -> None:
    """Draws the mean of curves, and a band from the lowest to the highest if there are several."""
    x, mean, low, high = spread(curves)
    axes.plot(x, mean, color=color, linewidth=1.5, label=label)
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _add_legend(figure: Any, grid: Iterable[Any], names: Collection[str]) -> None:
    """Names the lines of runs below all axes; known scores are named where they are."""
    handles: dict[str, Any] = {}
    for axes in grid:
        drawn = axes.get_legend_handles_labels()
        drawn_runs = zip(drawn[1], drawn[0], strict=True)
        handles |= {label: handle for label, handle in drawn_runs if label in names}
    if not handles:
        return  # There are only tests.
    figure.legend(
        handles.values(),
        handles.keys(),
        loc='outside lower center',
        ncols=min(3, len(handles)),
        fontsize=8,
    )


def _known_levels(kinds: Mapping[str, Sequence[Run]]) -> dict[str, suites.Level]:
    """Returns name -> level of the suites that were played, which may be the user's own."""
    played = {run.flags.get('level_name', '') for runs in kinds.values() for run in runs} - {''}
    levels: dict[str, suites.Level] = {}
    for level_name in sorted(played):
        try:
            suite = suites.load(level_name)
        except LevelError as error:
            # The file may have been moved since; the curves do not need it.
            print(f'{error} There are no lines for its random and human scores.', file=sys.stderr)
            continue
        for level in suite.levels:
            levels.setdefault(level.name, level)
    return levels


def _draw_known_scores(axes: Any, level: suites.Level) -> None:
    def draw(name: str, value: float, style: Any) -> None:
        axes.axhline(value, color=_KNOWN_COLOR, linewidth=0.8, linestyle=style, label=name)

    if level.random is not None:
        draw('random', level.random, (0, (1, 1)))
    if level.human is not None:
        draw('human', level.human, (0, (4, 2)))
    published = sorted(level.published.items(), key=lambda item: item[1])
    low, high = axes.dataLim.intervaly
    reach = _KNOWN_REACH * (high - low)
    # With a score far beyond all else on the scale, nothing else could be seen.
    for name, value in published:
        if low - reach <= value <= high + reach:
            draw(suites.published_name(name), value, _PUBLISHED_STYLE)
    limits = axes.get_ylim()
    for name, value in published:
        if not low - reach <= value <= high + reach:
            draw(suites.published_name(name), value, _PUBLISHED_STYLE)
    axes.set_ylim(limits)


def _name_known_scores(axes: Any) -> None:
    """Labels the lines of known scores at their ends, as there are more lines than styles.

    Must be called after the figure has been laid out.
    """
    lines = [line for line in axes.get_lines() if line.get_color() == _KNOWN_COLOR]
    lines.sort(key=lambda line: line.get_ydata()[0])
    low, high = axes.get_ylim()
    ends, labels = [], []
    for line in lines:
        value = line.get_ydata()[0]
        off = f' {value:g} \N{UPWARDS ARROW}' if value > high else ''
        off = off or (f' {value:g} \N{DOWNWARDS ARROW}' if value < low else '')
        labels.append(line.get_label() + off)
        ends.append(min(max((value - low) / (high - low), 0.0), 1.0))
    height = 72 * axes.bbox.height / axes.figure.dpi
    distance = 1.15 * _KNOWN_FONT_SIZE / height
    places = [
        # Not above the axes, where the titles are.
        min(place, 1 - distance * (len(ends) - 1 - index))
        for index, place in enumerate(spread_out(ends, distance))
    ]
    for label, end, place in zip(labels, ends, places, strict=True):
        axes.annotate(
            label,
            xy=(1, end),
            xytext=(1 + 10 / (72 * axes.bbox.width / axes.figure.dpi), place),
            xycoords='axes fraction',
            textcoords='axes fraction',
            va='center',
            fontsize=_KNOWN_FONT_SIZE,
            color=_KNOWN_COLOR,
            annotation_clip=False,
            arrowprops={
                'arrowstyle': '-',
                'color': _KNOWN_COLOR,
                'linewidth': 0.5,
                'shrinkA': 1,
                'shrinkB': 0,
                'relpos': (0, 0.5),
            },
        )


def spread_out(places: Sequence[float], distance: float) -> list[float]:
    """Returns places that are at least a distance apart and as close as possible to given ones.

    Args:
      places: rising.
      distance: least distance between neighbours.
    """
    # Neighbours that would overlap form a group, centred on the mean of their places.
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and (
            np.mean(groups[-1]) - np.mean(groups[-2])
            < distance * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        float(np.mean(group) + distance * (index - (len(group) - 1) / 2))
        for group in groups
        for index in range(len(group))
    ]


def stage_times(kinds: Mapping[str, Sequence[Run]]) -> Any:
    """Returns a figure with the share of each stage in the time of its clock.

    Args:
      kinds: from `group`.
    """
    from matplotlib.figure import Figure

    totals: dict[str, dict[str, float]] = {}
    for kind, runs in kinds.items():
        for run in runs:
            for line in run.metrics:
                for name, value in line.items():
                    if name.startswith('stage_seconds/'):
                        stage = name.partition('/')[2]
                        of_kind = totals.setdefault(kind, {})
                        of_kind[stage] = of_kind.get(stage, 0.0) + value
    found = dict.fromkeys(stage for seconds in totals.values() for stage in seconds)
    clocks = list(dict.fromkeys(map(_clock, found)))
    # Stable, so that each clock's stages stay in their order.
    stages = sorted(found, key=lambda stage: clocks.index(_clock(stage)))
    colors = _stage_colors(stages)
    columns = min(4, max(1, len(clocks)))
    height = 0.9 + 0.32 * max(1, len(totals)) * max(1, len(clocks))
    height += 0.17 * math.ceil(len(stages) / columns)
    figure: Any = Figure(figsize=(7.2, height + 0.3), dpi=200, layout='constrained')
    axes = figure.subplots()
    labels = []
    handles = {}
    for clock in clocks:
        for kind, seconds in totals.items():
            of_clock = {s: seconds[s] for s in stages if s in seconds and _clock(s) == clock}
            total = sum(of_clock.values())
            left = 0.0
            labels.append(f'{readable(kind)}: {clock}' if len(totals) > 1 else clock)
            for stage, value in of_clock.items():
                if total > 0:
                    handles[stage] = axes.barh(
                        len(labels) - 1,
                        100 * value / total,
                        left=left,
                        height=0.75,
                        label=_stage_name(stage),
                        color=colors[stage],
                        hatch='///' if _is_waiting(stage) else None,
                        edgecolor='white',
                    )
                    left += 100 * value / total
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel('% of its time (hatched: waiting)')
    if handles:
        figure.legend(
            handles=[handles[stage] for stage in stages if stage in handles],
            loc='outside lower center',
            ncols=columns,
            fontsize=7,
        )
    return figure


def _clock(stage: str) -> str:
    """Returns whose stage it is: of `'learner/train_step'`, `'learner'`."""
    return stage.partition('/')[0]


def _is_waiting(stage: str) -> bool:
    return stage.endswith('/wait')


def _stage_name(stage: str) -> str:
    """Returns the name of a stage for a legend, which says whose stage it is."""
    clock, _, name = stage.partition('/')
    return f'{clock}: {"waiting" if _is_waiting(stage) else readable(name)}'


def _stage_colors(stages: Sequence[str]) -> dict[str, Any]:
    """Returns a colour for each stage, all different; stages that wait get the palest."""
    import matplotlib

    by_paleness = sorted(stages, key=_is_waiting)
    if len(stages) <= 20:
        # Ten strong colours, followed by their pale twins.
        palette = matplotlib.colormaps['tab20']
        strong, pale = ([palette(2 * i + k) for i in range(10)] for k in (0, 1))
        first_pale = next((i for i, s in enumerate(by_paleness) if _is_waiting(s)), len(stages))
        rest = [*strong, *pale]
        waiting = rest[len(rest) - (len(stages) - first_pale) :]
        colors = [*rest[:first_pale], *waiting]
    else:
        palette = matplotlib.colormaps['turbo']
        colors = [palette(i / (len(stages) - 1)) for i in range(len(stages))]
    return dict(zip(by_paleness, colors, strict=True))


def policy_lag(kinds: Mapping[str, Sequence[Run]]) -> Any:
    """Returns a figure with the policy lag: updates between acting and learning weights.

    Args:
      kinds: from `group`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure: Any = Figure(figsize=(6.0, 3.2), dpi=200, layout='constrained')
    axes = figure.subplots()
    for color, (kind, runs) in enumerate(kinds.items()):
        for number, run in enumerate(runs):
            lines = [line for line in run.metrics if 'policy_lag_mean' in line]
            x = [line['agent_steps'] for line in lines]
            label = {'label': readable(kind)} if number == 0 else {}
            axes.plot(x, [line['policy_lag_mean'] for line in lines], f'C{color}', **label)
            highest = [line.get('policy_lag_max', math.nan) for line in lines]
            axes.plot(x, highest, f'C{color}', linewidth=0.6, alpha=0.6)
    axes.set_xlabel('agent steps')
    axes.set_ylabel('policy lag (updates; thin: largest)')
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def main(argv: list[str]) -> int:
    """Draws what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m impala.tools.plot', description='Draws training runs as PNG and SVG.'
    )
    parser.add_argument('logdirs', nargs='+', metavar='LOGDIR', help='folder of a training run')
    # In `--output=~/folder` a shell leaves the ~ to us.
    parser.add_argument(
        '--output',
        type=os.path.expanduser,
        default='.',
        help='folder of the pictures; . by default',
    )
    parser.add_argument('--over', choices=list(_OVER), default='frames', help='horizontal axis')
    arguments = parser.parse_args(argv)

    import matplotlib

    def report(text: str) -> None:
        print(text, file=sys.stderr)

    drawings: dict[str, Callable[[], Any]] = {
        'learning_curves': lambda: learning_curves(kinds, arguments.over),
        'stage_times': lambda: stage_times(kinds),
        'policy_lag': lambda: policy_lag(kinds),
    }
    try:
        runs = [read_run(logdir, report) for logdir in arguments.logdirs]
        for run in runs:
            if run.not_finite:
                print(
                    f'{run.logdir}: {run.not_finite:,} episodes whose return is not finite are '
                    'left out.',
                    file=sys.stderr,
                )
        kinds = group(runs)
        os.makedirs(arguments.output, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for name, draw in drawings.items():
                figure = draw()
                for form in ('png', 'svg'):
                    path = os.path.join(arguments.output, f'{name}.{form}')
                    figure.savefig(path)
                    print(path)
    except (LogdirError, LevelError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f'Cannot write to {arguments.output}: {error.strerror}.', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    outlive_readers()
    sys.exit(main(sys.argv[1:]))
