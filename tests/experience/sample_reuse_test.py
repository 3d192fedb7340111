"""Tests of impala/experience/sample_reuse.py."""

import collections
import itertools

import pytest

from impala.experience.sample_reuse import reused


def test_three_uses_of_each_of_five_batches():
    """By hand: each batch is used at once, two batches later and four batches later."""
    uses = [(batch, fresh) for batch, fresh in reused(range(6), times=3, buffer_size=5)]
    expected = [0, 1, 2, 0, 3, 1, 4, 2, 0, 5, 3, 1]
    assert [batch for batch, _ in uses] == expected
    assert [batch for batch, fresh in uses if fresh] == [0, 1, 2, 3, 4, 5]


def test_a_buffer_of_one_uses_each_batch_in_a_row():
    uses = list(reused('ab', times=3, buffer_size=1))
    assert uses == [(c, fresh) for c in 'ab' for fresh in (True, False, False)]


def test_one_use_passes_batches_through():
    assert list(reused('abc', times=1, buffer_size=1)) == [(c, True) for c in 'abc']


@pytest.mark.parametrize('times', [2, 3, 4, 7])
@pytest.mark.parametrize('buffer_size', [1, 2, 4, 16])
def test_each_batch_is_used_the_given_number_of_times(times, buffer_size):
    newest, counts = -1, collections.Counter()
    for batch, fresh in reused(range(100), times, buffer_size):
        assert fresh == (batch == newest + 1)
        newest = max(newest, batch)
        assert newest - buffer_size < batch
        counts[batch] += 1
    used_up = range(100 - buffer_size)
    assert [counts[batch] for batch in used_up] == [times] * len(used_up)


def test_the_next_batch_is_requested_only_when_needed():
    asked = []
    source = (asked.append(i) or i for i in itertools.count())
    uses = reused(source, times=2, buffer_size=2)
    for expected in (1, 2, 2, 3, 3):
        next(uses)
        assert len(asked) == expected
