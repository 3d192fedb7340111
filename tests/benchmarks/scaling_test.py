"""Tests of benchmarks/scaling.py where what must come out can be told without a simulation."""

import pytest

from benchmarks.scaling import Setting, simulate


def test_actors_that_find_nobody_in_their_way_lose_the_time_of_sending_only():
    setting = Setting(play=1.0, take_in=0.05, hand_out=0.2, update=0.001, batch_size=1)
    outcome = simulate(setting, num_jobs=1)
    # There are new weights after each unroll.
    assert outcome.unrolls_per_second == pytest.approx(1 / 1.25, rel=0.02)
    assert outcome.reads_per_second == pytest.approx(1 / 1.25, rel=0.02)
    assert outcome.play_share == pytest.approx(0.8, rel=0.02)
    assert outcome.network_load == pytest.approx(0.2, rel=0.02)
    assert outcome.queue_lag[0] == pytest.approx(0.05)
    # The weights are read before the update that this very unroll makes is done.
    assert outcome.policy_lag == (1, 1)


def test_a_slow_learner_trains_all_the_time_and_policies_lag_by_what_is_on_the_way():
    setting = Setting(play=0.1, take_in=0.0, hand_out=0.0, update=1.0, batch_size=4,
                      queue_capacity=4)  # fmt: skip
    outcome = simulate(setting, num_jobs=40)
    assert outcome.learner_load == pytest.approx(1, abs=0.01)
    assert outcome.unrolls_per_second == pytest.approx(4, rel=0.01)
    # Little's law: 4 a second leave; 40 wait for room or play, 4 are queued, 4 in the next batch.
    assert outcome.queue_lag[0] == pytest.approx((40 + 4 + 4) / 4, rel=0.05)
    assert outcome.policy_lag[0] == pytest.approx(40 / 4 + 2, rel=0.1)


def test_a_full_network_carries_as_much_as_it_can():
    setting = Setting(play=0.1, take_in=0.01, hand_out=0.03, update=0.001, batch_size=2)
    # Takings in and handings out come in waves, of which there must be many.
    outcome = simulate(setting, num_jobs=100, updates=4000)
    assert outcome.network_load == pytest.approx(1, abs=0.01)
    assert outcome.unrolls_per_second == pytest.approx(25, rel=0.02)
    assert outcome.queue_lag[0] > 0.01
    assert outcome.learner_load == pytest.approx(25 / 2 * 0.001, rel=0.05)


def test_environments_of_one_job_share_its_weights():
    setting = Setting(play=1.0, take_in=0.001, hand_out=0.001, update=0.5, batch_size=10)
    outcome = simulate(setting, num_jobs=1, envs_per_job=20)
    # One reading for each round of all environments, though there are two updates in it.
    assert outcome.unrolls_per_second == pytest.approx(20, rel=0.02)
    assert outcome.reads_per_second == pytest.approx(1, rel=0.05)
