"""Tests of how benchmarks/throughput.py measures the parts of training."""

import threading
import time

import pytest

from benchmarks import throughput

CALL_SECONDS = 0.02


def test_parts_that_are_measured_together_run_together():
    threads = set()

    def create():
        def call():
            threads.add(threading.get_ident())
            time.sleep(CALL_SECONDS)

        return call

    rate = throughput.concurrent_rate(create, num_concurrent=4, rows=3, seconds=0.5)
    # One after the other they would make a quarter of that.
    limit = 4 * 3 / CALL_SECONDS
    assert 0.5 * limit < rate <= limit
    # The thread that has warmed them up is not among them.
    assert len(threads) == 5


@pytest.mark.parametrize(('threads', 'at_a_time'), [(1, 4), (2, 2), (3, 1), (4, 1), (8, 1), (0, 1)])
def test_steps_fill_the_cores(monkeypatch, threads, at_a_time):
    monkeypatch.setattr(throughput, 'CORES', 4)
    assert throughput.steps_at_a_time(threads) == at_a_time
