"""Tests of benchmarks/central_scaling.py in cases whose results are known without a simulation."""

import dataclasses

import pytest

from benchmarks.central_scaling import Setting, simulate

# An update takes no time, and neither does anything else but a step.
FREE = Setting(0.01, 0.0, 0.0, 0.0, 0.0, 1e-9, False, unroll_length=10, batch_size=2)


def test_cores_that_never_wait_step_all_the_time():
    outcome = simulate(FREE, num_jobs=3, cores=1, updates=2000)
    assert outcome.steps_per_second == pytest.approx(300, rel=0.02)
    assert outcome.core_load == pytest.approx(1, abs=0.02)
    assert outcome.policy_lag[0] >= 0


def test_a_round_trip_hides_behind_the_other_group_if_it_is_no_longer_than_its_steps():
    # One core: a group steps for 10 ms while the rows of the other are on their way.
    hidden = dataclasses.replace(FREE, round_trip=0.007)
    assert simulate(hidden, 1, 1, 1000).core_load == pytest.approx(1, abs=0.02)
    # A group then steps for 10 of 50 ms, and so does the other one.
    longer = dataclasses.replace(FREE, round_trip=0.04)
    assert simulate(longer, 1, 1, 1000).core_load == pytest.approx(2 * 10 / 50, abs=0.02)


def test_a_policy_that_is_the_limit_is_always_busy():
    setting = dataclasses.replace(FREE, batch=0.01, row=0.001)
    outcome = simulate(setting, num_jobs=40, cores=1, updates=1000)
    assert outcome.inference_load == pytest.approx(1, abs=0.01)
    # Half of the rows, at least, are in a batch; it takes 10 ms and 1 ms a row.
    rate = outcome.batch_rows / (0.01 + 0.001 * outcome.batch_rows)
    assert outcome.steps_per_second == pytest.approx(rate, rel=0.03)


def test_a_full_network_runs_at_capacity():
    setting = dataclasses.replace(FREE, take_in=0.01)
    outcome = simulate(setting, num_jobs=10, cores=2, updates=1000)
    assert outcome.network_load == pytest.approx(1, abs=0.01)
    assert outcome.steps_per_second == pytest.approx(100, rel=0.02)


def test_one_device_is_shared():
    setting = dataclasses.replace(FREE, row=0.001, update=0.03, one_device=True)
    outcome = simulate(setting, num_jobs=20, cores=2, updates=1000)
    # An update of 20 steps costs 30 ms, and so do 30 rows of inference.
    assert outcome.inference_load + outcome.learner_load == pytest.approx(1, abs=0.01)
    assert outcome.steps_per_second == pytest.approx(20 / 0.05, rel=0.05)
