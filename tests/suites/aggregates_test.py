import numpy as np
import pytest

from impala.suites import aggregates


def test_interquartile_mean_by_hand():
    # Sorted: 0 1 | 2 3 4 5 | 60 700.
    levels = [np.array([5.0, 700.0, 1.0, 3.0]), np.array([2.0, 60.0, 0.0, 4.0])]
    assert aggregates.interquartile_mean(levels) == 3.5


def test_mean_and_median_weigh_levels_equally():
    levels = [np.array([0.0, 2.0]), np.array([10.0]), np.array([3.0, 3.0, 6.0])]
    assert aggregates.mean_of_levels(levels) == pytest.approx((1 + 10 + 4) / 3)
    assert aggregates.median_of_levels(levels) == 4
    assert aggregates.share_above(levels, 2.0) == pytest.approx((0 + 1 + 1) / 3)


STATISTICS = [
    aggregates.interquartile_mean,
    aggregates.mean_of_levels,
    aggregates.median_of_levels,
]


@pytest.mark.parametrize('statistic', STATISTICS)
def test_the_interval_is_that_of_runs_drawn_within_each_level(statistic):
    random = np.random.default_rng(1)
    levels = [random.normal(place, 10, size=5).tolist() for place in (0, 100, 150, 1000)]
    value, interval = aggregates.with_interval(statistic, levels)
    # The same by a loop.
    resampled = [
        statistic([random.choice(np.array(level), size=5) for level in levels]) for _ in range(4000)
    ]
    assert value == statistic([np.array(level) for level in levels])
    assert interval == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=1.5)


def test_intervals_keep_what_they_promise():
    # Of 200 repetitions with 10 runs a level, some 95% hold the true mean, 50.
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        levels = [random.normal(0, 5, size=10), random.normal(100, 5, size=10)]
        low, high = aggregates.with_interval(aggregates.mean_of_levels, levels)[1]
        hits += low <= 50 <= high
    assert 170 <= hits <= 198


def test_one_run_of_a_level_has_no_interval():
    assert aggregates.with_interval(aggregates.mean_of_levels, [[1.0, 3.0], [4.0]]) == (3.0, None)


def test_performance_profile_falls_from_one_to_zero():
    levels = [[0.0, 10.0, 20.0], [100.0, 110.0, 120.0]]
    shares, intervals = aggregates.performance_profile(levels, np.array([-1.0, 5.0, 50.0, 200.0]))
    np.testing.assert_allclose(shares, [1, 5 / 6, 0.5, 0])
    assert intervals.shape == (4, 2)
    assert np.all(intervals[:, 0] <= shares) and np.all(shares <= intervals[:, 1])
    # Every draw of the second level is above 50, every one of the first below.
    np.testing.assert_array_equal(intervals[2], [0.5, 0.5])


def test_performance_profile_of_single_runs_has_no_intervals():
    shares, intervals = aggregates.performance_profile([[1.0], [3.0]], np.array([2.0]))
    assert shares.tolist() == [0.5]
    assert np.isnan(intervals).all()
