"""The results of a sweep: tables, on the terminal and as CSV, and a picture."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tabulate

from impala.runs.files import LogdirError, write_atomically
from impala.runs.learning_curve import STYLE, save
from impala.tools import plot
from impala.tools.sweep.config import SweepConfig
from impala.tools.sweep.state import Member, State

RESULTS_FILE = 'results.csv'
HISTORY_FILE = 'history.csv'
PICTURE_FILE = 'sweep.png'

# Of the dots of members other than the fittest.
_OTHERS = '0.4'
_FAILED: Any = {'color': 'tab:red', 'linewidth': 1, 'linestyle': '--'}
_UNFINISHED: Any = (0, (4, 2))
_COPIED: Any = (0, (1, 1.5))


def ranked(members: Sequence[Member]) -> list[Member]:
    """Returns members, the fittest first, those without fitness last."""
    return sorted(
        members, key=lambda member: -math.inf if member.fitness is None else member.fitness
    )[::-1]


def table(state: State) -> str:
    """Returns the members, the fittest first, as a table for the terminal."""
    names = list(state.members[0].values)
    rows = [
        (
            member.name,
            '-' if member.fitness is None else f'{member.fitness:.2f}',
            f'{member.episodes:,}',
            f'{member.frames:,}',
            *(f'{value:.3g}' if isinstance(value, float) else str(value)
              for value in member.values.values()),
            outcome(member),
        )
        for member in ranked(state.members)
    ]  # fmt: skip
    header = ('member', 'fitness', 'episodes', 'frames', *names, '')
    align = ('left', *['right'] * (len(header) - 2), 'left')
    return tabulate.tabulate(rows, header, colalign=align, disable_numparse=True)


def outcome(member: Member) -> str:
    """Returns the state of a member, in a word or a sentence."""
    return member.error or ('done' if member.trained else 'not finished')


def write_tables(logdir: str, state: State) -> None:
    """Writes `results.csv`, the fittest member first, and for a population `history.csv`, by round.

    Raises:
      LogdirError: one of them cannot be written.
    """
    names = list(state.members[0].values)
    header = ['member', 'fitness', 'episodes', 'frames', *names, 'outcome']
    rows = [
        [m.name, m.fitness, m.episodes, m.frames, *m.values.values(), outcome(m)]
        for m in ranked(state.members)
    ]
    write_atomically(os.path.join(logdir, RESULTS_FILE), _csv_text([header, *rows]))
    if state.identity['method'] != 'pbt':
        return
    header = ['round', 'member', 'frames', 'fitness', *names, 'copied_from', 'error']
    rows = [
        [row['round'], row['member'], row['frames'], row['fitness'], *row['values'].values(),
         row['copied_from'], row['error']]
        for row in state.history
    ]  # fmt: skip
    write_atomically(os.path.join(logdir, HISTORY_FILE), _csv_text([header, *rows]))


def draw(
    logdir: str, state: State, config: SweepConfig, runs: Mapping[str, plot.Run | None]
) -> str:
    """Draws the results; returns the path of the picture.

    Args:
      logdir: of the sweep.
      state: with the history of at least one round.
      config: of the sweep.
      runs: name of a member -> its run, None if it has none yet.

    Raises:
      LogdirError: it cannot be written.
    """
    # Imported here because it takes a while.
    import matplotlib

    path = os.path.join(logdir, PICTURE_FILE)
    with matplotlib.rc_context(STYLE):
        figure = search_figure(state, config, runs) if config.pbt is None else pbt_figure(state)
        try:
            save(path, figure)
        except OSError as error:
            raise LogdirError(f'Cannot write {path}: {error.strerror}.') from error
    return path


def search_figure(state: State, config: SweepConfig, runs: Mapping[str, plot.Run | None]) -> Any:
    """Returns a figure of a random search.

    It shows learning curves, if one level is played; the members by rank; and fitness over each
    hyperparameter. The fittest member is blue; a curve of a failed one is red and dashed.
    """
    from matplotlib.ticker import EngFormatter

    best = ranked(state.members)
    best = [member for member in best if member.fitness is not None]
    played = [run for run in runs.values() if run is not None]
    one_level = len({name for run in played for name in run.episodes}) == 1
    figure, panels = _panels(one_level + 1 + len(config.space))
    entries = {
        'the fittest': {**_look(True), 'marker': 'o'},
        'other members': {**_look(False), 'color': _OTHERS, 'marker': 'o'},
    }
    if one_level:
        axes = panels.pop(0)
        for member in ranked(state.members)[::-1]:
            run = runs.get(member.name)
            look = _look(best[:1] == [member])
            if member.error:
                look = entries['failed'] = _FAILED
            elif not member.trained:
                look['linestyle'] = _UNFINISHED
                entries['not finished'] = {**_look(False), 'linestyle': _UNFINISHED}
            for rows in run.episodes.values() if run else ():
                axes.plot(rows[:, 0], plot.running_mean(rows[:, 3]), **look)
        axes.set(xlabel='frames', ylabel=f'mean return of {plot.WINDOW} episodes')
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes = panels.pop(0)
    axes.plot(range(1, len(best) + 1), [m.fitness for m in best], color='0.6', linewidth=1)
    _dots(axes, range(1, len(best) + 1), best)
    axes.set(xlabel='members, the fittest first', ylabel='fitness')
    axes.xaxis.get_major_locator().set_params(integer=True)
    for axes, (name, distribution) in zip(panels, config.space.items(), strict=True):
        values = [member.values[name] for member in best]
        if distribution.kind == 'choice':
            choices = list(distribution.values)
            values = [choices.index(value) for value in values]
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif distribution.kind == 'log_uniform':
            axes.set_xscale('log')
        if distribution.kind != 'choice':
            axes.set_xlim(*distribution.values)
        _dots(axes, values, best)
        axes.set(xlabel=plot.readable(name), ylabel='fitness')
    _add_legend(figure, entries)
    return figure


def pbt_figure(state: State) -> Any:
    """Returns a figure of population based training.

    It shows fitness and each hyperparameter of all members over frames. A dotted line leads from a
    member that was copied to the copy. The lineage of the fittest member is in colour.
    """
    from matplotlib.ticker import EngFormatter

    rows = {(row['round'], row['member']): row for row in state.history}
    last = max(number for number, _ in rows)
    names = [member.name for member in state.members]
    fittest = max(names, key=lambda name: _or_lowest(rows[last, name]['fitness']))
    lineage = state.lineage(fittest)
    figure, panels = _panels(1 + len(state.members[0].values))
    for axes, value in zip(panels, ('fitness', *state.members[0].values), strict=True):

        def of(number: int, name: str, value: str = value) -> float:
            row = rows[number, name]
            found = row['fitness'] if value == 'fitness' else row['values'][value]
            return math.nan if found is None else found

        frames = [max(rows[n, name]['frames'] for name in names) for n in range(last + 1)]
        for name in names:
            points = [of(number, name) for number in range(last + 1)]
            axes.plot(frames, points, **_look(False), marker='.', linestyle='none')
            for number in range(last):
                source = rows[number, name]['copied_from']
                axes.plot(
                    frames[number : number + 2],
                    [of(number, source or name), points[number + 1]],
                    **_look(False),
                    linestyle=_COPIED if source else '-',
                )
        path = [of(number, name) for number, name in enumerate(lineage)]
        axes.plot(frames, path, **_look(True), marker='.')
        if value != 'fitness':
            axes.set_yscale('log')
        axes.set(xlabel='frames', ylabel=plot.readable(value))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    entries = {
        'the fittest and its ancestors': {**_look(True), 'marker': '.'},
        'other members': {**_look(False), 'marker': '.'},
        'copied from another': {**_look(False), 'linestyle': _COPIED},
    }
    _add_legend(figure, entries)
    return figure


def _add_legend(figure: Any, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Says below all panels what lines and dots mean; takes name -> look."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **look) for name, look in entries.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), fontsize=8)


def _panels(number: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, number) if number != 4 else 2
    rows = math.ceil(number / columns)
    figure: Any = Figure(figsize=(3.1 * columns, 2.4 * rows + 0.3), dpi=200, layout='constrained')
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, grid[:number]


def _look(is_best: bool) -> dict[str, Any]:
    if is_best:
        return {'color': 'C0', 'linewidth': 1.6, 'zorder': 3}
    return {'color': '0.75', 'linewidth': 1}


def _dots(axes: Any, x: Sequence[float], members: Sequence[Member]) -> None:
    """Draws members, the fittest first."""
    for position, member, color in zip(x, members, ['C0', *[_OTHERS] * len(members)], strict=False):
        axes.plot(
            position,
            member.fitness,
            'o',
            color=color,
            markersize=5,
            markeredgewidth=0,
            clip_on=False,
        )


def _or_lowest(fitness: float | None) -> float:
    return -math.inf if fitness is None else fitness


def _csv_text(rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    return buffer.getvalue()
