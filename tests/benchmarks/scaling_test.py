"""Tests of benchmarks/scaling.py in cases whose results are known without a simulation."""

import pytest

from benchmarks.scaling import Setting, simulate


def test_a_lone_actor_loses_only_the_time_of_sending():
    setting = Setting(play=1.0, take_in=0.05, hand_out=0.2, update=0.001, batch_size=1)
    outcome = simulate(setting, num_jobs=1)
    # There are new weights after each unroll.
    assert outcome.unrolls_per_second == pytest.approx(1 / 1.25, rel=0.02)
    assert outcome.reads_per_second == pytest.approx(1 / 1.25, rel=0.02)
    assert outcome.play_share == pytest.approx(0.8, rel=0.02)
    assert outcome.network_load == pytest.approx(0.2, rel=0.02)
    assert outcome.queue_lag[0] == pytest.approx(0.05)
    # The weights are read before the update on this unroll is done.
    assert outcome.policy_lag == (1, 1)


def test_a_slow_learner_is_never_idle_and_policies_lag_by_the_backlog():
    setting = Setting(play=0.1, take_in=0.0, hand_out=0.0, update=1.0, batch_size=4,
                      queue_capacity=4)  # fmt: skip
    outcome = simulate(setting, num_jobs=40)
    assert outcome.learner_load == pytest.approx(1, abs=0.01)
    assert outcome.unrolls_per_second == pytest.approx(4, rel=0.01)
    # Little's law: 4 a second leave; 40 wait for room or play, 4 are queued, 4 in the next batch.
    assert outcome.queue_lag[0] == pytest.approx((40 + 4 + 4) / 4, rel=0.05)
    assert outcome.policy_lag[0] == pytest.approx(40 / 4 + 2, rel=0.1)


def test_a_full_network_runs_at_capacity():
    setting = Setting(play=0.1, take_in=0.01, hand_out=0.03, update=0.001, batch_size=2)
    # Transfers in and out come in waves; average over many.
    outcome = simulate(setting, num_jobs=100, updates=4000)
    assert outcome.network_load == pytest.approx(1, abs=0.01)
    assert outcome.unrolls_per_second == pytest.approx(25, rel=0.02)
    assert outcome.queue_lag[0] > 0.01
    assert outcome.learner_load == pytest.approx(25 / 2 * 0.001, rel=0.05)


def test_environments_of_one_job_share_its_weights():
    setting = Setting(play=1.0, take_in=0.001, hand_out=0.001, update=0.5, batch_size=10)
    outcome = simulate(setting, num_jobs=1, envs_per_job=20)
    # One read per round of all environments, despite two updates in it.
    assert outcome.unrolls_per_second == pytest.approx(20, rel=0.02)
    assert outcome.reads_per_second == pytest.approx(1, rel=0.05)
