import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import cv2
import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from impala.runs.files import EPISODES_HEADER
from impala.tools import plot


def write_run(folder, seed, returns, level='ALE/Pong-v5', flags=('--level_name=ALE/Pong-v5',)):
    """Writes a run with an episode every 100 agent steps, 400 frames and 36 seconds."""
    folder.mkdir(parents=True)
    rows = [','.join(EPISODES_HEADER)]
    lines = []
    for number, value in enumerate(returns, 1):
        rows.append(f'{36 * number},{400 * number},{100 * number},{level},{value},400,terminated')
        lines.append(
            json.dumps(
                {
                    'wall_seconds': 36.0 * number,
                    'agent_steps': 100 * number,
                    'policy_lag_mean': 2.0,
                    'policy_lag_max': 4,
                    'stage_seconds/learner/wait': 1.0,
                    'stage_seconds/learner/train_step': 3.0,
                    'stage_seconds/actor/environment': 2.0,
                    'stage_seconds/replay/sample': 0.1,
                }
            )
        )
    (folder / 'episodes.csv').write_text('\n'.join(rows) + '\n')
    # The last line of an active run may be incomplete.
    (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n{"wall_sec')
    (folder / 'flags.txt').write_text('\n'.join((*flags, f'--seed={seed}')) + '\n')
    return str(folder)


def test_non_finite_returns_are_reported_and_left_out(tmp_path, capsys):
    logdir = write_run(tmp_path / 'a', 1, [1.0, math.nan, 3.0, math.inf])
    assert plot.main([logdir, f'--output={tmp_path}']) == 0
    told = f'{logdir}: 2 episodes whose return is not finite are left out.\n'
    assert capsys.readouterr().err == told
    assert plot.read_run(logdir).episodes['ALE/Pong-v5'][:, 3].tolist() == [1.0, 3.0]


def test_tests_during_training_are_circles_at_the_weights_that_were_tested(tmp_path):
    logdir = write_run(tmp_path / 'a', 1, [1.0, 2.0, 3.0])
    counters = {'test/frames': 400, 'test/agent_steps': 100, 'test/wall_seconds': 36.0}
    line = {
        'wall_seconds': 108.0, 'agent_steps': 300, 'test_return/ALE/Pong-v5': 2.5,
        'test_return/held_out': 7.0, **counters,
    }  # fmt: skip
    (tmp_path / 'a' / 'metrics.jsonl').write_text(f'{json.dumps(line)}\n')
    run = plot.read_run(logdir)
    assert {name: rows.tolist() for name, rows in run.tests.items()} == {
        'ALE/Pong-v5': [[400, 100, 0.01, 2.5]],
        'held_out': [[400, 100, 0.01, 7.0]],
    }
    for over, x in (('frames', 400), ('agent_steps', 100), ('wall_time', 0.6)):
        figure = plot.learning_curves(plot.group([run]), over)
        assert [axes.get_title() for axes in figure.axes] == ['ALE/Pong-v5', 'held_out']
        for axes, value in zip(figure.axes, (2.5, 7.0), strict=True):
            (circles,) = (
                line for line in axes.get_lines() if line.get_markerfacecolor() == 'white'
            )
            assert (circles.get_xdata().tolist(), circles.get_ydata().tolist()) == ([x], [value])
        assert 'circles: tests' in figure.get_supylabel()
    # A run that has only tests so far.
    only = dataclasses.replace(run, episodes={})
    assert len(plot.learning_curves({'a': [only]}).axes) == 2


def test_running_mean():
    assert plot.running_mean(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]
    values = np.random.default_rng(1).normal(size=500)
    expected = [values[max(0, end - 100) : end].mean() for end in range(1, 501)]
    np.testing.assert_allclose(plot.running_mean(values), expected)


def test_spread_is_limited_to_where_all_curves_are():
    short = np.array([0.0, 10.0]), np.array([0.0, 10.0])
    long = np.array([5.0, 20.0]), np.array([20.0, 20.0])
    x, mean, low, high = plot.spread([short, long], points=3)
    assert x.tolist() == [5, 7.5, 10]
    assert low.tolist() == [5, 7.5, 10] and high.tolist() == [20, 20, 20]
    assert mean.tolist() == [12.5, 13.75, 15]


def test_places_are_spread_out_as_little_as_possible():
    assert plot.spread_out([], 1) == []
    assert plot.spread_out([1, 3, 9], 1) == [1, 3, 9]
    assert plot.spread_out([1, 3, 3.5, 9], 1) == [1, 2.75, 3.75, 9]
    # The last two push the second, and these three push the first.
    np.testing.assert_allclose(plot.spread_out([1, 2.5, 3, 3], 1), [0.875, 1.875, 2.875, 3.875])
    places = plot.spread_out([0, 0, 0, 5, 5.5], 2)
    np.testing.assert_allclose(places, [-2, 0, 2, 4.25, 6.25])


@pytest.mark.parametrize('num_levels', [1, 4])
def test_lines_of_known_scores_are_named_where_they_end(tmp_path, num_levels):
    """There are five lines, and two of the published scores of Pong are only 0.58 apart."""
    games = ('Pong', 'Breakout', 'Boxing', 'Alien')[:num_levels]
    for game in games:
        write_run(tmp_path / game, 1, [1, 2, 3], level=f'ALE/{game}-v5')
    kinds = {'all': [plot.read_run(str(tmp_path / game)) for game in games]}
    with matplotlib.rc_context(plot.STYLE):
        figure = plot.learning_curves(kinds)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ['all']
        for axes in figure.axes:
            # Boxes of the texts without the lines that lead to them.
            boxes = {
                re.sub(r' \S+ \S$', '', text.get_text()): Text.get_window_extent(text)
                for text in axes.texts
            }
            assert {*boxes} == {
                'random',
                'human',
                'IMPALA, one for all games (published)',
                'IMPALA, shallow network (published)',
                'IMPALA, deep network (published)',
            }
            stacked = sorted(boxes.values(), key=lambda box: box.y0)
            for below, above in zip(stacked[:-1], stacked[1:], strict=True):
                assert below.y1 <= above.y0
            for box in stacked:
                assert axes.bbox.x1 < box.x0 and box.x1 <= figure.bbox.x1
                others = [other for other in figure.axes if other is not axes]
                assert not any(box.overlaps(other.bbox) for other in others)
    if num_levels > 1:
        # In Breakout the paper has 787.34, while the curve ends at 3 and humans score 30.
        assert 'IMPALA, deep network (published) 787.34 \N{UPWARDS ARROW}' in [
            text.get_text() for text in figure.axes[1].texts
        ]
        assert 30.5 < figure.axes[1].get_ylim()[1] < 100
    pong = figure.axes[0]
    ends = {text.get_text(): text.xy[1] for text in pong.texts}
    lines = {line.get_label(): line.get_ydata()[0] for line in pong.get_lines()}
    low, high = pong.get_ylim()
    for name, end in ends.items():
        assert low + end * (high - low) == pytest.approx(lines[name])


def test_a_users_suite_has_its_lines(tmp_path, capsys):
    path = tmp_path / 'mine.csv'
    path.write_text('level,random,human,others\nmy:level,0.5,7,6\nALE/Pong-v5,-1,1,\n')
    flags = (f'--level_name={path}',)
    logdirs = [
        write_run(tmp_path / 'a', 1, [1, 2, 3], level='my:level', flags=flags),
        write_run(tmp_path / 'b', 1, [1, 2, 3], flags=flags),
    ]

    def lines():
        kinds = plot.group([plot.read_run(logdir) for logdir in logdirs])
        return [
            {line.get_label(): line.get_ydata()[0] for line in axes.get_lines()[1:]}
            for axes in plot.learning_curves(kinds).axes
        ]

    assert lines() == [
        {'random': 0.5, 'human': 7, 'others (published)': 6},
        {'random': -1, 'human': 1},
    ]
    path.unlink()
    without, packaged = lines()
    assert without == {} and packaged['human'] == 14.6
    assert 'There are no lines for its random and human scores.' in capsys.readouterr().err


def test_runs_that_differ_only_in_their_seeds_share_a_line(tmp_path):
    logdirs = [
        write_run(tmp_path / 'pong_1', 1, [1, 2, 3]),
        write_run(tmp_path / 'pong_2', 2, [3, 4, 5]),
        write_run(tmp_path / 'other', 1, [1, 2], flags=('--batch_size=4',)),
    ]
    kinds = plot.group([plot.read_run(logdir) for logdir in logdirs])
    assert {name: len(runs) for name, runs in kinds.items()} == {'pong (2 seeds)': 2, 'other': 1}
    (axes,) = [axes for axes in plot.learning_curves(kinds).axes if axes.get_visible()]
    lines = {line.get_label(): line for line in axes.get_lines()}
    mean = lines['pong (2 seeds)'].get_xydata()
    # Means of the last 100: 1, 1.5, 2 and 3, 3.5, 4.
    np.testing.assert_allclose(mean[[0, -1]], [[400, 2], [1200, 3]])
    assert lines['human'].get_ydata()[0] == 14.6 and lines['random'].get_ydata()[0] == -20.7
    assert lines['IMPALA, shallow network (published)'].get_ydata()[0] == 20.4
    axes = plot.learning_curves(kinds, 'wall_time').axes[0]
    minutes = axes.get_lines()[0].get_xdata()
    np.testing.assert_allclose([minutes[0], minutes[-1]], [0.6, 1.8])
    assert axes.get_xlabel() == 'wall time (min)'

    (axes,) = plot.stage_times(kinds).axes
    assert sorted({round(bar.get_width(), 6) for bar in axes.patches}) == [25, 75, 100]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    clocks = ('learner', 'actor', 'replay')
    assert labels == [f'{kind}: {clock}' for clock in clocks for kind in kinds]
    lag = plot.policy_lag(kinds).axes[0].get_lines()[0]
    assert lag.get_ydata().tolist() == [2, 2, 2]


def test_each_stage_has_a_colour_and_a_name_of_its_own(tmp_path):
    stages = {
        'actor': ('environment', 'wait'),
        'batcher': ('wait', 'gather', 'inference', 'scatter'),
        'queue': ('wait', 'copy'),
        'learner': ('wait', 'intrinsic_reward', 'train_step', 'publish', 'log'),
        'replay': ('sample', 'store', 'send', 'fetch'),
    }
    names = [f'{clock}/{stage}' for clock, of_clock in stages.items() for stage in of_clock]
    assert len(names) == 17
    line = {f'stage_seconds/{name}': 1.0 + i for i, name in enumerate(names)}
    runs = [plot.Run('', {}, {}, [line]), plot.Run('', {}, {}, [line])]
    figure = plot.stage_times({'a_run': runs[:1], 'another': runs[1:]})
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == 17
    assert {'actor: waiting', 'learner: waiting', 'learner: train step'} < set(labels)
    colors = [handle.get_facecolor() for handle in legend.legend_handles]
    assert len(set(colors)) == 17
    (axes,) = figure.axes
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks[:3] == ['a run: actor', 'another: actor', 'a run: batcher']
    # The bars of both runs have the colours that the legend says.
    drawn = {bars.get_label(): bars.patches[0].get_facecolor() for bars in axes.containers}
    assert [drawn[label] for label in labels] == colors
    assert len(axes.containers) == 34


def test_more_stages_than_a_palette_has_colours_differ_too():
    line = {f'stage_seconds/own/stage_{i}': 1.0 for i in range(25)}
    (legend,) = plot.stage_times({'a': [plot.Run('', {}, {}, [line])]}).legends
    assert len({handle.get_facecolor() for handle in legend.legend_handles}) == 25


def test_levels_of_different_scale_have_limits_of_their_own(tmp_path):
    small = write_run(tmp_path / 'a', 1, [0.1, 0.2], 'small', flags=('--level_name=small',))
    large = write_run(tmp_path / 'b', 1, [100, 200], 'large', flags=('--level_name=large',))
    figure = plot.learning_curves(plot.group([plot.read_run(small), plot.read_run(large)]))
    limits = {axes.get_title(): axes.get_ylim() for axes in figure.axes}
    assert limits['small'][1] < 1 and limits['large'][0] > 90


def test_names_of_folders_are_shown_without_underscores(tmp_path):
    run = plot.read_run(write_run(tmp_path / 'pong_with_replay', 1, [1, 2]))
    kinds = plot.group([run])
    for figure in (plot.learning_curves(kinds), plot.policy_lag(kinds)):
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
        texts = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
        assert texts == ['pong with replay']


def test_long_runs_are_drawn_over_hours(tmp_path):
    # An episode every 36 seconds.
    run = plot.read_run(write_run(tmp_path / 'run', 1, [0] * 250))
    axes = plot.learning_curves({'run': [run]}, 'wall_time').axes[0]
    hours = axes.get_lines()[0].get_xdata()
    np.testing.assert_allclose([hours[0], hours[-1]], [0.01, 2.5])
    assert axes.get_xlabel() == 'wall time (h)'


@pytest.mark.parametrize('over', ['frames', 'wall_time'])
def test_pictures_from_the_command_line(tmp_path, capsys, over):
    logdirs = [
        write_run(tmp_path / 'a', 1, [1.0, 2.0]),
        write_run(tmp_path / 'b', 1, [], flags=('--batch_size=4',)),
        write_run(tmp_path / 'c', 1, [1.0], 'CartPole-v1', flags=('--batch_size=8',)),
    ]
    output = tmp_path / 'pictures'
    assert plot.main([*logdirs, f'--output={output}', f'--over={over}']) == 0
    for name in ('learning_curves', 'stage_times', 'policy_lag'):
        picture = cv2.imread(str(output / f'{name}.png'))
        assert np.ptp(picture) > 200
        assert '<svg' in (output / f'{name}.svg').read_text()
    assert 'CartPole-v1' in (output / 'learning_curves.svg').read_text()
    assert capsys.readouterr().out.count(str(output)) == 6


def test_a_tilde_stands_for_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert plot.main([write_run(tmp_path / 'a', 1, [1.0]), '--output=~/pictures']) == 0
    assert (tmp_path / 'pictures' / 'learning_curves.png').exists()


def test_drawing_does_not_import_tensorflow(tmp_path):
    logdir = write_run(tmp_path / 'run', 1, range(5))
    code = (
        'import sys; from impala.tools import plot; code = plot.main(sys.argv[1:]); '
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, '-c', code, logdir, f'--output={tmp_path}'],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, '')


def test_a_missing_run_gives_one_sentence(tmp_path, capsys):
    assert plot.main([str(tmp_path / 'none')]) == 2
    assert 'Cannot read the logs of a run' in capsys.readouterr().err
