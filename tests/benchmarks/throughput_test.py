"""Tests of how benchmarks/throughput.py measures the parts of training."""

import json
import os
import pathlib
import threading
import time

import pytest
from warm_process import WarmProcess

from benchmarks import throughput

CALL_SECONDS = 0.02
ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_parts_that_are_measured_together_run_concurrently():
    threads = set()

    def create():
        def call():
            threads.add(threading.get_ident())
            time.sleep(CALL_SECONDS)

        return call

    rate = throughput.concurrent_rate(create, num_concurrent=4, rows=3, seconds=0.5)
    # In sequence they would reach a quarter of the limit.
    limit = 4 * 3 / CALL_SECONDS
    assert 0.5 * limit < rate <= limit
    # Four, and the thread that warmed them up.
    assert len(threads) == 5


@pytest.mark.parametrize(('threads', 'at_a_time'), [(1, 4), (2, 2), (3, 1), (4, 1), (8, 1), (0, 1)])
def test_steps_fill_the_cores(monkeypatch, threads, at_a_time):
    monkeypatch.setattr(throughput, 'CORES', 4)
    assert throughput.steps_at_a_time(threads) == at_a_time


def test_training_is_compared_with_its_parts(tmp_path):
    flags = ['--num_actors=4', '--envs_per_process=2', '--batch_size=2']
    flags += ['--inference_batch_size=2', '--seconds=2', '--warm_up=1', '--part_seconds=0.3']
    outputs = tmp_path / 'stdout', tmp_path / 'stderr'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    process = WarmProcess(ROOT / 'benchmarks' / 'throughput.py', flags, environment, ROOT, outputs)
    try:
        assert process.wait(120) == 0, outputs[1].read_text()
    finally:
        process.kill()
    values = json.loads(outputs[0].read_text().splitlines()[-1])
    # With a single round, the rest is what remains of the limit.
    for suffix in ('', '_with_threads_of_training'):
        used = values['agent_steps_per_second'] / values[f'limit{suffix}']
        assert abs(1 - used - values[f'rest_share{suffix}']) < 0.01
        assert used > 0
