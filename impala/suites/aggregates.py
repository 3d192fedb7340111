"""One figure for several runs over several levels.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": with
few runs per level, the interquartile mean over all runs says more than the median over levels;
its interval comes from a bootstrap that draws runs within each level, since the levels are fixed;
and the performance profile shows all runs at once.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from impala.suites.scores import CONFIDENCE

_RESAMPLES = 2000

# Scores of a level's runs, `[..., RUNS]` for each level, to `[...]`.
Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]


def interquartile_mean(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean of the middle half of all runs, without regard to their level.

    Args:
      levels: scores of each level's runs, f64 `[..., RUNS]`; levels may differ in `RUNS`.

    Returns:
      f64 `[...]`; of N runs, `N // 4` are left out at each end.
    """
    return stats.trim_mean(np.concatenate(levels, -1), 0.25, axis=-1)


def median_of_levels(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the median over levels of the mean of a level's runs; see `interquartile_mean`."""
    return np.median(np.stack([level.mean(-1) for level in levels]), 0)


def mean_of_levels(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean over levels of the mean of a level's runs; see `interquartile_mean`."""
    return np.mean(np.stack([level.mean(-1) for level in levels]), 0)


def share_above(levels: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """Returns the share of runs with a score above a threshold, levels weighted equally.

    Over thresholds this is the performance profile (Agarwal et al. 2021, equation 1); see
    `interquartile_mean` for the arguments.
    """
    return np.mean(np.stack([(level > threshold).mean(-1) for level in levels]), 0)


def with_interval(
    statistic: Statistic, levels: Sequence[Sequence[float]]
) -> tuple[float, tuple[float, float] | None]:
    """Returns a statistic and its 95% stratified bootstrap interval.

    Args:
      statistic: one of this module.
      levels: scores of each level's runs.

    Returns:
      Value and interval; the interval is None if a level has fewer than two runs.
    """
    samples = tuple(np.asarray(level, np.float64) for level in levels)
    value = float(statistic(samples))
    if any(len(level) < 2 for level in samples):
        return value, None

    def along(*resampled: np.ndarray, axis: int) -> np.ndarray:
        return statistic([np.moveaxis(level, axis, -1) for level in resampled])

    low, high = stats.bootstrap(
        samples,
        along,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return value, (float(low), float(high))


def performance_profile(
    levels: Sequence[Sequence[float]], thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of runs above each threshold, with intervals.

    Args:
      levels: as in `with_interval`.
      thresholds: f64 `[N]`, of scores.

    Returns:
      Shares f64 `[N]` and their intervals f64 `[N, 2]`, NaN if a level has fewer than two runs.
    """
    shares, intervals = [], []
    for threshold in thresholds:
        statistic = functools.partial(share_above, threshold=float(threshold))
        share, interval = with_interval(statistic, levels)
        shares.append(share)
        intervals.append(interval or (np.nan, np.nan))
    return np.array(shares), np.array(intervals)
