"""Tests of how benchmarks/throughput.py measures the parts of training."""

import json
import os
import pathlib
import threading
import time

import pytest
import tensorflow as tf
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


def test_core_seconds_add_up_to_the_time_of_a_step(monkeypatch):
    monkeypatch.setattr(throughput, 'CORES', 2)
    # 2 cores and 1,000 agent steps a second: 2 ms of a core for each.
    training = throughput.Training(rate=1000, rows=8, learner=1.2e-3, actors=0.7e-3)
    rates = {'environment': 4000, 'inference': 10_000, 'learning': 2500}
    measured = throughput.Round(training, rates)
    assert measured.limit == pytest.approx(1 / (0.25e-3 + 0.1e-3 + 0.4e-3))
    assert measured.efficiency == pytest.approx(0.75)
    assert list(measured.core_seconds().values()) == pytest.approx(
        [0.5e-3, 0.2e-3, 0.8e-3, 0.2e-3, 0.2e-3, 0.1e-3]
    )
    assert sum(measured.core_seconds().values()) == pytest.approx(2e-3)


def test_parts_are_those_of_the_flags(tmp_path):
    flags = ['--level_name=ALE/Pong-v5', '--num_actors=4', '--envs_per_process=2']
    flags += ['--batch_size=2', '--unroll_length=8', '--sample_reuse=3', '--reuse_buffer=3']
    flags += ['--intra_op_threads=1', '--seconds=2', '--warm_up=1', '--part_seconds=0.3']
    outputs = tmp_path / 'stdout', tmp_path / 'stderr'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    process = WarmProcess(ROOT / 'benchmarks' / 'throughput.py', flags, environment, ROOT, outputs)
    try:
        assert process.wait(120) == 0, outputs[1].read_text()
    finally:
        process.kill()
    lines = outputs[0].read_text().splitlines()
    values = json.loads(lines[-1])
    used = values['agent_steps_per_second'] / values['limit']
    assert values['efficiency'] == pytest.approx(used, abs=0.01) and used > 0
    assert [line.split('|')[1].strip() for line in lines if line.startswith('| ')] == [
        'part',
        'environment',
        'inference',
        'learning',
        'learner process, beyond its parts',
        'actor processes, beyond their part',
        'idle, or other programs',
        'training',
    ]


def test_each_use_of_a_batch_counts(monkeypatch):
    # The learner alone makes as many steps; with four uses of a batch they are worth a quarter.
    rows = []

    def record(create, num_concurrent, number, seconds):
        rows.append(number)
        return number

    monkeypatch.setattr(throughput, 'concurrent_rate', record)
    # Earlier tests in this process may have started TensorFlow; then the threads are settled.
    monkeypatch.setattr(
        tf.config.threading, 'set_intra_op_parallelism_threads', lambda num_threads: None
    )
    flags = ['--level_name=CartPole-v1', '--batch_size=4', '--unroll_length=10']
    throughput.network_rates(flags, 7, 1)
    throughput.network_rates([*flags, '--sample_reuse=4', '--reuse_buffer=4'], 7, 1)
    replay = ['--replay_fraction=0.5', '--replay_capacity=100']
    throughput.network_rates([*flags, *replay], 7, 1)
    assert rows == [7, 40, 7, 10, 7, 20]
