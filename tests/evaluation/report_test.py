import csv
import json
import math
import warnings

import numpy as np
import pytest

from impala import suites
from impala.evaluation import report as test_report
from impala.evaluation.report import CheckpointScores
from impala.suites import scores

KNOWN = (suites.Level('levels:a', 'levels:a', 0.0, 10.0), suites.Level('b', 'b', -1.0, 1.0))
UNKNOWN = tuple(map(suites.known_level, ('levels:a', 'b')))


def result(returns, levels=KNOWN, **changes):
    settings = {'num_episodes': max(map(len, returns.values())), 'max_frames': 500} | changes
    suite = suites.Suite('two', levels[: len(returns)])
    return CheckpointScores('ckpt-1', 10, 10, 'sample', 1, suite, returns, **settings)


def test_rows_of_an_older_history_are_kept(tmp_path):
    level = suites.known_level('CartPole-v1')
    old = 'checkpoint,agent_steps,frames,level,episodes,mean,low,high'
    row = 'ckpt-1,10,10,CartPole-v1,2,9.5,9.0,10.0'
    (tmp_path / 'test_history.csv').write_text(f'{old}\n{row}\n')
    test_report.write(str(tmp_path), result({'CartPole-v1': [8.0]}, (level,)), add_to_history=True)
    assert (tmp_path / 'test_history.csv').read_text().splitlines() == [
        f'{old},policy,seed',
        f'{row},,',
        'ckpt-1,10,10,CartPole-v1,1,8.0,,,sample,1',
    ]


def test_damaged_bytes_of_the_history_are_kept(tmp_path):
    path = tmp_path / 'test_history.csv'
    test_report.write(str(tmp_path), result({'levels:a': [1.0]}), add_to_history=True)
    header, row = path.read_bytes().splitlines()
    damaged = row.replace(b'sample', b'sam\xff\xfee')
    path.write_bytes(b'\n'.join([header, damaged, b'']))
    test_report.write(str(tmp_path), result({'levels:a': [2.0]}), add_to_history=True)
    new = row.replace(b'1.0,', b'2.0,')
    assert path.read_bytes().splitlines() == [header, damaged, new] and new != row


@pytest.mark.parametrize('levels', [KNOWN, UNKNOWN])
@pytest.mark.parametrize(
    'other', [[math.nan, math.inf, -math.inf], [], [math.nan, 0.5], [math.nan, 1.0, 0.0]]
)
def test_non_finite_returns_are_reported_and_left_out(tmp_path, levels, other):
    """Levels with some or no finite returns, with and without known scores."""
    finite = [value for value in other if math.isfinite(value)]
    tested = result({'levels:a': [1.0, math.nan, 3.0, math.inf, 8.0], 'b': other}, levels)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        test_report.write(str(tmp_path), tested, add_to_history=True)
        table = test_report.table(tested)

    def fail(name):
        raise AssertionError(f'{name} is not JSON')

    content = json.loads((tmp_path / 'test_scores.json').read_text(), parse_constant=fail)
    first, second = content['levels'].values()
    assert first['returns'] == [1.0, None, 3.0, None, 8.0] and first['not_finite'] == 2
    assert (first['mean'], first['median']) == (4.0, 3.0)
    assert first['interval_95'] == list(scores.mean_interval([1.0, 3.0, 8.0]))
    assert second['not_finite'] == len(other) - len(finite)
    assert second['mean'] == (0.5 if finite else None)
    assert ('suite' in content) == bool(finite and levels is KNOWN)
    if 'suite' in content:
        assert content['suite']['mean_no_cap'] == pytest.approx((40 + 75) / 2)
    remark = '2 of 5 returns of levels:a are not finite: the scores are of the other 3.'
    assert table.splitlines().count(remark) == 1
    if len(other) == 3 and not finite:
        assert '3 of 3 returns of b are not finite: there is no score.' in table
    assert 'nan' not in table and 'inf ' not in table
    for file in ('test_scores.csv', 'test_history.csv'):
        rows = list(csv.DictReader((tmp_path / file).read_text().splitlines()))
        assert [row['mean'] for row in rows] == ['4.0', '0.5' if finite else '']


def test_a_complete_test_has_no_remarks():
    assert test_report.table(result({'levels:a': [1.0, 2.0]})).count('\n') == 2


def test_intervals_of_a_million_returns_are_fast_and_correct(tmp_path):
    """A bootstrap would take minutes and 16 GB of memory."""
    returns = np.random.default_rng(1).exponential(3.0, 1_000_000)
    low, high = scores.mean_interval(returns.tolist())
    assert (high - low) / 2 == pytest.approx(1.96 * 3.0 / 1000, rel=0.01)
    assert (low + high) / 2 == pytest.approx(returns.mean(), abs=1e-9)
    many = {'levels:a': returns, 'b': returns[:10]}
    low, high = scores.suite_intervals(many | {'b': returns}, KNOWN)['mean_no_cap']
    # The suite's mean of 30% and 200%, with standard errors of 0.03% and 0.15%.
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 * np.hypot(0.03, 0.15), rel=0.1)
    few = returns[:2000].tolist()
    normal = 1.96 * np.std(few) / 2000**0.5
    low, high = scores.mean_interval(few)
    assert (high - low) / 2 == pytest.approx(normal, rel=0.05)
