import numpy as np
import pytest

from impala import suites
from impala.suites import Level, scores
from impala.suites.scores import ScoreError

TWO = (Level('a', 'a', 0.0, 10.0), Level('b', 'b', -1.0, 1.0))


@pytest.mark.parametrize(
    ('suite', 'agent', 'score', 'published'),
    [
        # Espeholt et al. 2018: Atari-57 medians of Table 4, DMLab-30 means of Table B.1.
        ('atari57', 'impala_multitask', 'median_no_cap', 59.7),
        ('atari57', 'impala_shallow', 'median_no_cap', 93.2),
        ('atari57', 'impala_deep', 'median_no_cap', 191.8),
        ('dmlab30', 'impala_experts', 'mean_cap_100', 44.4),
        ('dmlab30', 'impala_deep_pbt', 'mean_cap_100', 49.4),
    ],
)
def test_scores_match_the_paper(suite, agent, score, published):
    levels = suites.load(suite).levels
    returns = {level.name: [level.published[agent]] for level in levels}
    # Published with one decimal, like some of the scores of levels.
    assert getattr(scores.suite_score(returns, levels), score) == pytest.approx(published, abs=0.06)


def test_a_score_by_hand():
    returns = {'a': [4, 6], 'b': [0, 2, 4], 'other': []}
    assert scores.normalized_levels(returns, TWO) == {'a': 50, 'b': 150}
    assert scores.suite_score(returns, TWO) == scores.SuiteScore(100, 75, 100, 75)


@pytest.mark.parametrize(
    ('returns', 'sentence'),
    [
        ({'b': [1]}, 'There are no returns of a.'),
        ({'a': [1], 'b': []}, 'The level b has no episode'),
    ],
)
def test_missing_returns_are_named(returns, sentence):
    with pytest.raises(ScoreError, match=sentence):
        scores.suite_score(returns, TWO)


def test_unknown_human_scores_are_refused():
    with pytest.raises(ScoreError, match='of the level c are not known'):
        scores.suite_score({'c': [1]}, [Level('c', 'c')])
    with pytest.raises(ScoreError, match='without levels'):
        scores.suite_score({}, [])


def test_intervals_of_means_have_the_promised_coverage():
    """Of 80 samples of 30 returns about 76 have the true mean in their interval."""
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(80):
        low, high = scores.mean_interval(random.normal(7.0, 3.0, 30).tolist())
        inside += low <= 7.0 <= high
    assert 69 <= inside <= 79


def test_intervals_of_few_or_equal_returns():
    assert scores.mean_interval([3.0]) is None
    assert scores.mean_interval([3.0, 3.0]) == (3.0, 3.0)
    assert scores.suite_intervals({'a': [1.0], 'b': [1.0, 2.0]}, TWO) is None


def test_intervals_of_a_suite():
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        returns = {'a': random.normal(5.0, 2.0, 30), 'b': random.normal(2.0, 1.0, 30)}
        score = scores.suite_intervals(returns, TWO)
        low, high = score['mean_no_cap']
        inside += low <= 100 <= high
        assert score['mean_cap_100'][1] <= high
    assert 85 <= inside <= 100
