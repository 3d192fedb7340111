"""Tests of impala/runs/learning_curve.py."""

import os
import struct

import numpy as np
import pytest

from impala.runs import learning_curve


def curve_of(returns):
    curve = learning_curve.LearningCurve()
    for i, value in enumerate(returns):
        curve.add(10 * (i + 1), 0.5 * (i + 1), value)
    return curve


def test_mean_of_the_last_hundred():
    returns = np.random.default_rng(1).normal(size=250)
    points = curve_of(returns).points()
    assert points.shape == (250, 4)
    np.testing.assert_array_equal(points[:, 0], 10 * np.arange(1, 251))
    np.testing.assert_array_equal(points[:, 1], 0.5 * np.arange(1, 251))
    np.testing.assert_array_equal(points[:, 2], returns)
    expected = [np.mean(returns[max(0, i - 99) : i + 1]) for i in range(250)]
    np.testing.assert_allclose(points[:, 3], expected, rtol=1e-12)


def test_no_episodes_and_no_finite_ones():
    for returns in ([], [float('nan'), float('inf')]):
        curve = curve_of(returns)
        assert curve.num_episodes == 0
        assert np.isnan(curve.mean)
        assert curve.points().shape == (0, 4)


def test_memory_is_bounded_and_the_curve_still_spans_the_run():
    num_episodes = 5 * learning_curve.MAX_POINTS
    curve = curve_of(np.arange(num_episodes, dtype=float))
    points = curve.points()
    assert curve.num_episodes == num_episodes
    assert curve.mean == num_episodes - 1 - 49.5
    assert learning_curve.MAX_POINTS / 2 <= len(points) < learning_curve.MAX_POINTS
    assert len(set(np.diff(points[:, 0]))) == 1
    assert points[0, 0] == 10 and points[-1, 0] > 9.9 * num_episodes
    np.testing.assert_array_equal(points[100:, 3], points[100:, 2] - 49.5)


@pytest.mark.parametrize('num_levels', [0, 1, 3, 12])
def test_draws_a_png(tmp_path, num_levels):
    path = tmp_path / 'curve.png'
    curves = {f'level_{i}': curve_of(np.arange(50.0) * i) for i in range(num_levels)}
    curves['never_played'] = learning_curve.LearningCurve()
    learning_curve.draw(str(path), curves, title='Pong')
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG\r\n')
    width, height = struct.unpack('>II', content[16:24])
    assert width >= 1400 and height >= 560
    assert os.listdir(tmp_path) == ['curve.png']


@pytest.mark.parametrize('num_levels', [2, 6])
def test_levels_of_different_scale_have_limits_of_their_own(num_levels):
    curves = {f'level_{i}': curve_of(np.linspace(0, 10.0**i, 50)) for i in range(num_levels)}
    figure = learning_curve._figure(curves, '', {})
    tops = {}
    for axes in figure.axes:
        if axes.get_title() or axes.get_title('left'):
            tops[axes.get_title() or axes.get_title('left')] = axes.get_ylim()[1]
    assert [*tops] == [*curves]
    for i, top in enumerate(tops.values()):
        assert 0.4 * 10**i < top < 1.2 * 10**i
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == (4 if num_levels == 2 else 6)


def test_tests_are_circles_in_the_panels_of_their_level():
    curves = {f'level_{i}': curve_of(np.arange(50.0) * i) for i in range(2)}
    tests = {'level_1': [(100.0, 30.0, 4.0), (200.0, 60.0, 5.0)], 'another': [(1.0, 2.0, 3.0)]}
    figure = learning_curve._figure(curves, '', tests)

    def circles(axes):
        return [line for line in axes.get_lines() if line.get_markerfacecolor() == 'white']

    steps_0, time_0, steps_1, time_1 = figure.axes
    assert not circles(steps_0) and not circles(time_0)
    for axes, x in ((steps_1, [100, 200]), (time_1, [30, 60])):
        (drawn,) = circles(axes)
        assert drawn.get_xdata().tolist() == x
        assert drawn.get_ydata().tolist() == [4, 5]

    def legend(figure):
        return [text.get_text() for text in figure.legends[0].get_texts()]

    marks = ['episodes', 'mean of the last 100 episodes', 'means of tests']
    assert sorted(legend(figure)) == marks
    assert sorted(legend(learning_curve._figure(curves, '', {}))) == marks[:2]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        learning_curve.draw(str(tmp_path / 'none' / 'curve.png'), {})
