"""The learning curve of a run: returns of its episodes over agent steps and over time, as a PNG."""

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

# Of tests, in the colour of their level or run.
TEST_STYLE: Any = {
    'linestyle': (0, (1, 2)),
    'linewidth': 1.0,
    'marker': 'o',
    'markersize': 4.5,
    'markerfacecolor': 'white',
    'zorder': 3,
}

_MAX_LEVELS_WITH_DOTS = 4

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
    """Draws the curves of all levels, on the left over agent steps, on the right over wall time.

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
    from matplotlib.ticker import EngFormatter, MaxNLocator

    drawn = {name: curve.points() for name, curve in curves.items() if curve.num_episodes}
    longest = max((points[-1, 1] for points in drawn.values()), default=0.0)
    seconds, unit = next(
        u for u in ((3600, 'h'), (60, 'min'), (1, 's')) if longest >= 2 * u[0] or u[0] == 1
    )
    # About 100 characters of the legend fit side by side.
    columns = max(1, min(4, len(drawn), 100 // (8 + max(map(len, drawn), default=0))))
    height = 2.8 + 0.17 * math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(7.2, height), dpi=200, layout='constrained')
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    by_steps.set_xlabel('agent steps')
    by_time.set_xlabel(f'wall time ({unit})')
    by_steps.set_ylabel('episode return')
    with_dots = len(drawn) <= _MAX_LEVELS_WITH_DOTS
    lines = []
    has_tests = any(tests.get(name) for name in drawn)
    for (name, points), color in zip(drawn.items(), _colors(len(drawn)), strict=True):
        for axes, x in ((by_steps, points[:, 0]), (by_time, points[:, 1] / seconds)):
            if with_dots:
                _draw_dots(axes, x, points[:, 2], color)
            lines += axes.plot(x, points[:, 3], color=color, linewidth=1.6)
        if tests.get(name):
            tested = np.array(tests[name])
            for axes, x in ((by_steps, tested[:, 0]), (by_time, tested[:, 1] / seconds)):
                axes.plot(x, tested[:, 2], color=color, **TEST_STYLE)
    for axes in (by_steps, by_time):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    by_steps.xaxis.set_major_formatter(EngFormatter(sep=''))
    if drawn:
        figure.legend(
            lines[::2],
            drawn.keys(),
            loc='outside lower center',
            ncols=columns,
            title=('dots: episodes, ' if with_dots else '')
            + f'line: mean of the last {WINDOW} episodes'
            + (', circles: tests' if has_tests else ''),
            title_fontsize=8,
            fontsize=8,
        )
    else:
        any_ended = any(curve.num_not_finite for curve in curves.values())
        text = 'no return is finite' if any_ended else 'no episode has ended'
        for axes in (by_steps, by_time):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, text, ha='center')
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _colors(number: int) -> list[Any]:
    """Returns colours that differ from each other as much as possible."""
    import matplotlib

    palette = matplotlib.colormaps['tab10' if number <= 10 else 'turbo']
    return [palette(i if number <= 10 else i / (number - 1)) for i in range(number)]


def _draw_dots(axes: Any, x: np.ndarray, returns: np.ndarray, color: Any) -> None:
    axes.plot(
        x,
        returns,
        linestyle='none',
        marker='o',
        markersize=2.4,
        markeredgewidth=0,
        color=color,
        alpha=0.25 if len(returns) < 2000 else 0.1,
    )
