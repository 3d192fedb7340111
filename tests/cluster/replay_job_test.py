"""Tests of the functions of impala/cluster/replay_job.py; replay_jobs_test.py runs the jobs."""

import numpy as np
import pytest

from impala.cluster.calls import Refused
from impala.cluster.replay_job import MAX_DRAWN, Shard, layout
from impala.trajectory import UnrollArray

ARRAYS = [UnrollArray((3,), 'float32', 'reward'), UnrollArray((), 'int32', 'level', False, 0, 5)]
NBYTES = 16
NOTHING = np.zeros(0, np.uint8)
LEARNER = {'run': 'run', 'learner': 'learner'}
BEGIN = {**LEARNER, 'layout': layout(['rooms'], ARRAYS), 'anew': False, 'only_asks': False}


@pytest.fixture
def reports():
    return []


@pytest.fixture
def shard(reports):
    return Shard(1000, 1, reports.append, lambda: None)


def call(shard, name, values, body=NOTHING):
    return shard.functions[name].call(values, body)


def unrolls(number):
    return np.zeros(number * NBYTES, np.uint8)


def test_what_is_added_is_drawn_but_not_more_than_is_sent_at_once(shard):
    answer, _ = call(shard, 'begin', BEGIN)
    assert (answer['capacity'], answer['held']) == (1000, 0)
    values = {**LEARNER, 'key': answer['key'], 'number': 1}
    assert call(shard, 'add', values, unrolls(16))[0] == {'held': 16, 'left_out': 0}
    for number in range(2, 9):
        call(shard, 'add', values | {'number': number}, unrolls(16))
    for number, expected in ((3, 3), (0, 0), (-1, 0), (1 << 62, MAX_DRAWN)):
        answer, [drawn] = call(shard, 'draw', values | {'number': number})
        assert answer == {'held': 128} and drawn.shape == (expected, NBYTES)


@pytest.mark.parametrize(
    'arrays',
    [
        None,
        5,
        [],
        [[]],
        [[[3], 'float32']],
        [[[-3], 'float32', 'reward', True, None, None]],
        [[[3.5], 'float32', 'reward', True, None, None]],
        [[[3], 'O', 'reward', True, None, None]],
        [[[3], 'nothing', 'reward', True, None, None]],
        # Its bytes are 0 modulo 2 to the power of 64.
        [[[1 << 32, 1 << 32], 'float32', 'reward', True, None, None]],
        [[[1 << 70], 'float32', 'reward', True, None, None]],
    ],
)
def test_a_malformed_layout_is_refused_and_changes_nothing(shard, reports, arrays):
    key = call(shard, 'begin', BEGIN)[0]['key']
    call(shard, 'add', {**LEARNER, 'key': key, 'number': 1}, unrolls(2))
    before = list(reports)
    malformed = {'layout': {'levels': ['rooms'], 'arrays': arrays}}
    with pytest.raises(Refused, match='layout of the trajectories is malformed'):
        call(shard, 'begin', BEGIN | malformed)
    assert len(shard) == 2 and reports == before


@pytest.mark.parametrize('key', list(BEGIN))
def test_other_arguments_are_refused_and_change_nothing(shard, reports, key):
    call(shard, 'begin', BEGIN)
    before = list(reports)
    for value in (None, 1.5, [1], 'x' if key in ('layout', 'anew', 'only_asks') else {}):
        with pytest.raises(Refused, match=f"the argument '{key}' is not"):
            call(shard, 'begin', BEGIN | {key: value})
    assert reports == before


@pytest.mark.parametrize('name', ['add', 'draw'])
def test_other_numbers_are_refused(shard, name):
    values = {**LEARNER, 'key': call(shard, 'begin', BEGIN)[0]['key']}
    for value in (None, True, 1.5, '1', 1 << 64):
        with pytest.raises(Refused, match="the argument 'number' is not"):
            call(shard, name, values | {'number': value})
    with pytest.raises(Refused, match='has dropped'):
        call(shard, name, values | {'number': 1, 'key': None})


def test_names_of_levels_do_not_break_lines_of_the_log(shard, reports):
    levels = {'layout': layout(['a\nb\x1b[31m'], ARRAYS)}
    call(shard, 'begin', BEGIN | levels)
    with pytest.raises(Refused):
        call(shard, 'begin', BEGIN | {'run': 'another'})
    assert len(reports) == 2 and all(report.isprintable() for report in reports)
