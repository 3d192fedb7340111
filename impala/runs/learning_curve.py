"""The learning curves of a run: returns of its episodes, level by level, as a PNG."""

import collections
import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 100
MAX_POINTS = 8192

# Matplotlib's settings for all pictures of runs.
STYLE: Any = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '0.9',
    'grid.linewidth': 0.6,
    'axes.axisbelow': True,
    'axes.titlesize': 10,
    'legend.frameon': False,
}

# Of tests, in the colour of their run.
TEST_STYLE: Any = {
    'linestyle': (0, (1, 2)),
    'linewidth': 1.0,
    'marker': 'o',
    'markersize': 4.5,
    'markerfacecolor': 'white',
    'zorder': 3,
}

# More levels have only panels over agent steps, without a dot per episode.
_MAX_LEVELS_OVER_TIME = 4
_COLUMNS = 5
_COLOR = 'C0'

# Level name -> agent steps, wall seconds and mean return of each of its tests.
Tests = dict[str, list[tuple[float, float, float]]]


class LearningCurve:
    """Returns of one level's episodes and their mean over the last `WINDOW` episodes.

    Memory is bounded: when `MAX_POINTS` episodes are stored, every other one is dropped, and from
    then on only every other one is stored. The mean still covers all episodes.

    Attributes:
      num_episodes: episodes with finite returns.
      num_not_finite: other episodes, which are only counted.
    """

    def __init__(self) -> None:
        self.num_episodes = 0
        self.num_not_finite = 0
        self._window: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._points = np.empty([MAX_POINTS, 4])
        self._num_points = 0
        self._stride = 1

    def add(self, agent_steps: int, wall_seconds: float, episode_return: float) -> None:
        """Adds the next episode."""
        if not math.isfinite(episode_return):
            self.num_not_finite += 1
            return
        self._window.append(episode_return)
        if self.num_episodes % self._stride == 0:
            self._points[self._num_points] = agent_steps, wall_seconds, episode_return, self.mean
            self._num_points += 1
            if self._num_points == MAX_POINTS:
                self._num_points //= 2
                self._points[: self._num_points] = self._points[::2].copy()
                self._stride *= 2
        self.num_episodes += 1

    @property
    def mean(self) -> float:
        """Mean return of the last `WINDOW` episodes, fewer at the start; NaN if there is none."""
        return sum(self._window) / len(self._window) if self._window else math.nan

    def points(self) -> np.ndarray:
        """Returns f64 `[N, 4]`: agent steps, wall seconds, return and mean return at that time."""
        return self._points[: self._num_points].copy()


def draw(
    path: str,
    curves: Mapping[str, LearningCurve],
    title: str = '',
    tests: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> None:
    """Draws the curve of each level in panels of its own, as returns differ in scale.

    Up to four levels have one over agent steps and one over wall time, more have only the first.

    Args:
      path: of the PNG file; replaced as a whole.
      curves: level name -> its curve.
      title: of the figure.
      tests: see `Tests`; drawn for the levels of `curves`.

    Raises:
      OSError: the file cannot be written; an earlier file is unchanged.
    """
    # Imported here because Matplotlib is slow to import.
    import matplotlib

    with matplotlib.rc_context(STYLE):
        save(path, _figure(curves, title, tests or {}))


def save(path: str, figure: Any) -> None:
    """Writes a figure as PNG.

    Args:
      path: of the file; replaced as a whole.
      figure: of Matplotlib.

    Raises:
      OSError: the file cannot be written; an earlier file is unchanged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        # `savefig` would draw the figure twice.
        FigureCanvasAgg(figure).print_png(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _figure(
    curves: Mapping[str, LearningCurve],
    title: str,
    tests: Mapping[str, Sequence[tuple[float, float, float]]],
) -> Any:
    from matplotlib.figure import Figure

    drawn = {name: curve.points() for name, curve in curves.items() if curve.num_episodes}
    figure: Any
    if not drawn:
        figure = Figure(figsize=(7.2, 2.8), dpi=200, layout='constrained')
        any_ended = any(curve.num_not_finite for curve in curves.values())
        axes = figure.subplots()
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, 'no return is finite' if any_ended else 'no episode has ended', ha='center'
        )
    elif len(drawn) <= _MAX_LEVELS_OVER_TIME:
        figure = _over_steps_and_time(drawn, tests)
    else:
        figure = _over_steps(drawn, tests)
    if drawn:
        figure.supylabel('episode return', fontsize=9)
        handles = {
            handle.get_label(): handle
            for axes in figure.axes
            for handle in axes.get_lines()
            if not handle.get_label().startswith('_')
        }
        place = 'outside lower center' if figure.get_layout_engine() else 'lower center'
        legend = figure.legend(handles=handles.values(), loc=place, ncols=3, fontsize=8)
        for handle in legend.legend_handles:
            # A single dot would be too pale.
            handle.set_alpha(1.0)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _over_steps_and_time(drawn: Mapping[str, np.ndarray], tests: Mapping[str, Any]) -> Any:
    """Returns a figure with a row of two panels for each level; see `LearningCurve.points`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    longest = max(points[-1, 1] for points in drawn.values())
    seconds, unit = next(
        u for u in ((3600, 'h'), (60, 'min'), (1, 's')) if longest >= 2 * u[0] or u[0] == 1
    )
    size = (7.2, 3.0 if len(drawn) == 1 else 0.6 + 1.8 * len(drawn))
    figure = Figure(figsize=size, dpi=200, layout='constrained')
    # The limits of one level must not be those of another.
    grid = figure.subplots(len(drawn), 2, sharex='col', sharey='row', squeeze=False)
    for (by_steps, by_time), (name, points) in zip(grid, drawn.items(), strict=True):
        tested = np.array(tests.get(name, ())).reshape(-1, 3)
        _draw_level(by_steps, points[:, 0], points, tested[:, [0, 2]])
        _draw_level(by_time, points[:, 1] / seconds, points, tested[:, [1, 2]] / (seconds, 1))
        by_steps.set_title(name, fontsize=9, loc='left')
    for axes, label in zip(grid[-1], ('agent steps', f'wall time ({unit})'), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    grid[-1, 0].xaxis.set_major_formatter(EngFormatter(sep=''))
    return figure


def _over_steps(drawn: Mapping[str, np.ndarray], tests: Mapping[str, Any]) -> Any:
    """Returns a figure with a small panel for each level; see `LearningCurve.points`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = math.ceil(len(drawn) / _COLUMNS)
    width, height = 2.1 * _COLUMNS, 1.0 + 1.3 * rows
    # Without a layout engine, which would take seconds with that many panels.
    figure = Figure(figsize=(width, height), dpi=150)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.1 / width, bottom=0.75 / height, top=1 - 0.3 / height,
        wspace=0.3, hspace=0.35,
    )  # fmt: skip
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).ravel()
    last = max(points[-1, 0] for points in drawn.values())
    for axes, (name, points) in zip(grid, drawn.items(), strict=False):
        tested = np.array(tests.get(name, ())).reshape(-1, 3)
        _draw_level(axes, points[:, 0], points, tested[:, [0, 2]], with_dots=False)
        axes.set_title(name, fontsize=6.5)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=7)
    grid[0].set_xlim(0, 1.05 * last)
    grid[0].xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    grid[0].xaxis.set_major_formatter(EngFormatter(sep=''))
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(drawn) - _COLUMNS) : len(drawn)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel('agent steps', fontsize=8)
    return figure


def _draw_level(
    axes: Any, x: np.ndarray, points: np.ndarray, tested: np.ndarray, with_dots: bool = True
) -> None:
    """Draws a level.

    Args:
      axes: of Matplotlib.
      x: of the points, f64 `[N]`.
      points: see `LearningCurve.points`.
      tested: x and mean return of its tests, f64 `[M, 2]`.
      with_dots: whether to draw each episode.
    """
    if with_dots:
        axes.plot(
            x,
            points[:, 2],
            label='episodes',
            linestyle='none',
            marker='o',
            markersize=2.4,
            markeredgewidth=0,
            color=_COLOR,
            alpha=0.25 if len(points) < 2000 else 0.1,
        )
    axes.plot(
        x, points[:, 3], label=f'mean of the last {WINDOW} episodes', color=_COLOR, linewidth=1.6
    )
    if len(tested):
        axes.plot(tested[:, 0], tested[:, 1], label='means of tests', color=_COLOR, **TEST_STYLE)
