"""Scores of levels and suites: human-normalized, with and without a cap, with intervals.

Espeholt et al. 2018, section 5.3: the score of a level is human-normalized, `100 * (mean return -
random) / (human - random)`. For DMLab-30 the score of each level is capped at 100 before the mean
over levels is taken; for Atari-57 the median is reported.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from impala.suites import Level

CAP = 100.0
CONFIDENCE = 0.95
_RESAMPLES = 2000
# With more, resampling takes more memory and time, and means are normally distributed anyway.
_MAX_RESAMPLED_EPISODES = 2000


class ScoreError(Exception):
    """A score cannot be computed; the text is one sentence that names the level."""


@dataclasses.dataclass(frozen=True)
class SuiteScore:
    """Human-normalized percentages over the levels of a suite.

    Attributes:
      mean_no_cap: mean over levels.
      mean_cap_100: mean over levels, each capped at 100.
      median_no_cap: median over levels.
      median_cap_100: median over levels, each capped at 100.
    """

    mean_no_cap: float
    mean_cap_100: float
    median_no_cap: float
    median_cap_100: float


def human_normalized(value: float, level: Level) -> float:
    """Returns a mean return in percent: 0 for random actions, 100 for a human.

    Raises:
      ScoreError: the random or human score of the level is unknown.
    """
    if level.random is None or level.human is None:
        raise ScoreError(f'The random and human scores of the level {level.name} are not known.')
    return 100.0 * (value - level.random) / (level.human - level.random)


def mean_return(returns: Sequence[float], level_name: str) -> float:
    """Returns the mean of a level's episode returns.

    Raises:
      ScoreError: there are no episodes.
    """
    if not len(returns):
        raise ScoreError(f'The level {level_name} has no episode: its list of returns is empty.')
    return statistics.fmean(returns)


def normalized_levels(
    returns: Mapping[str, Sequence[float]], levels: Sequence[Level]
) -> dict[str, float]:
    """Returns the human-normalized percentage of every level.

    Args:
      returns: level name -> returns of its episodes; levels not in `levels` are ignored.
      levels: of the suite.

    Raises:
      ScoreError: a level is missing, has no episode, or has no random or human score.
    """
    missing = [level.name for level in levels if level.name not in returns]
    if missing:
        raise ScoreError(f'There are no returns of {", ".join(missing)}.')
    return {
        level.name: human_normalized(mean_return(returns[level.name], level.name), level)
        for level in levels
    }


def suite_score(returns: Mapping[str, Sequence[float]], levels: Sequence[Level]) -> SuiteScore:
    """Returns the score of a suite; see `normalized_levels` for arguments and errors."""
    if not levels:
        raise ScoreError('A suite without levels has no score.')
    values = list(normalized_levels(returns, levels).values())
    capped = [min(value, CAP) for value in values]
    return SuiteScore(
        mean_no_cap=statistics.fmean(values),
        mean_cap_100=statistics.fmean(capped),
        median_no_cap=statistics.median(values),
        median_cap_100=statistics.median(capped),
    )


def mean_interval(returns: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95% bootstrap interval of a mean; None if there are fewer than two episodes.

    For more than 2,000 episodes it is the limit of such intervals: the mean plus or minus 1.96
    standard errors.
    """
    if len(returns) < 2:
        return None
    if min(returns) == max(returns):
        return float(returns[0]), float(returns[0])
    if len(returns) > _MAX_RESAMPLED_EPISODES:
        mean, error = _mean_and_error(np.asarray(returns, np.float64))
        reach = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
        return mean - reach, mean + reach
    # The import takes a second, and is needed only after episodes were played.
    from scipy import stats

    low, high = stats.bootstrap(
        (returns,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(low), float(high)


def suite_intervals(
    returns: Mapping[str, Sequence[float]], levels: Sequence[Level]
) -> dict[str, tuple[float, float]] | None:
    """Returns the 95% bootstrap intervals of a suite's scores.

    Episodes are resampled within each level: the levels themselves are fixed, not a sample.

    Args:
      returns: as in `suite_score`, which must be called first because it checks them.
      levels: of the suite.

    Returns:
      Name as in `SuiteScore` -> interval in percent; None if a level has fewer than two episodes.
    """
    if any(len(returns[level.name]) < 2 for level in levels):
        return None
    random = np.random.default_rng(0)
    resampled = []
    for level in levels:
        episodes = np.asarray(returns[level.name], np.float64)
        if len(episodes) > _MAX_RESAMPLED_EPISODES:
            means = random.normal(*_mean_and_error(episodes), _RESAMPLES)
        else:
            chosen = random.integers(len(episodes), size=(_RESAMPLES, len(episodes)))
            means = episodes[chosen].mean(1)
        resampled.append([human_normalized(mean, level) for mean in means])
    values = np.array(resampled)
    capped = np.minimum(values, CAP)
    tail = 50 * (1 - CONFIDENCE)
    return {
        name: tuple(np.percentile(score, [tail, 100 - tail]).tolist())
        for name, score in (
            ('mean_no_cap', values.mean(0)),
            ('mean_cap_100', capped.mean(0)),
            ('median_no_cap', np.median(values, 0)),
            ('median_cap_100', np.median(capped, 0)),
        )
    }


def _mean_and_error(returns: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error (ddof=0, as in a bootstrap)."""
    return float(returns.mean()), float(returns.std()) / len(returns) ** 0.5
