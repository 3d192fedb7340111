"""Tests of impala/cluster/actor_job.py; jobs_test.py tests its command line."""

import contextlib
import re
import time

import pytest
import remote_peer
import tensorflow as tf
from learner_process import Learner

from impala.cluster import actor_job
from impala.cluster.actor_job import _Learner
from impala.cluster.calls import Server
from impala.cluster.channel import Rejected
from impala.cluster.job_start import Retry
from impala.config import ClusterConfig, ConfigError
from impala.runs.stop_signal import StopSignal


class Publications(list):
    """Records the versions that actors are given."""

    def publish(self, weights, version):
        self.append(int(version))

    def level_cache(self):
        return {}


def make_job(connection, publications, reconnect_timeout=600.0, **kwargs):
    cluster = ClusterConfig(learner_address=connection.address, reconnect_timeout=reconnect_timeout)
    return _Learner(connection, publications, Retry(cluster, print, StopSignal()), **kwargs)


def test_a_job_replaces_a_dead_one_and_gives_way_to_a_live_one(monkeypatch):
    """The other job dies after the first try, or keeps renewing its reservation."""
    monkeypatch.setattr(actor_job, '_RESERVING_AGAIN_SECONDS', 0.1)
    with contextlib.closing(Learner(capacity=1)) as learner:
        other, connection = learner.connect(), learner.connect()
        job = make_job(connection, Publications(), task=3, num_environments=1)
        reports = []
        assert other.reserve(3, 1).is_own
        job.reserve(reports.append)
        assert len(reports) == 1
        assert re.match(
            '--task=3 is taken by a job on .*; waiting up to 10 seconds to see', reports[0]
        )
        assert job.holder is None
        assert not other.reserve(3, 600).is_own

        connection.reserve(3, 0)
        assert other.reserve(3, 600).is_own

        def live(sentence):
            time.sleep(1.2)
            other.reserve(3, 600)

        with pytest.raises(ConfigError, match='--task=3 is taken by a job on .*, last seen'):
            job.reserve(live)


def test_a_job_that_starts_after_training_ends_at_once():
    with contextlib.closing(Learner(capacity=1)) as learner:
        learner.service.finish()
        learner.inbox.close()
        job = make_job(learner.connect(), Publications(), 1.0, task=0, num_environments=1)
        job.reserve(print)
        assert job.finished and job.holder is None


def test_weights_are_read_once_per_round_of_environments():
    with contextlib.closing(Learner(capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        job = make_job(connection, publications, task=0, num_environments=3)

        def send(number):
            job.send(remote_peer.make_unroll(number), '', number)
            if job._reading is not None:
                job._reading.result(60)

        learner.service.publish(100, [tf.zeros([1])])
        job.refresh()
        for number in range(1, 10):
            # An update between any two unrolls.
            learner.service.publish(100 + number, [tf.zeros([1])])
            send(number)
        assert publications == [100, 103, 106, 109]
        for number in range(10, 20):
            send(number)
        assert publications == [100, 103, 106, 109], 'there were no newer ones'
        learner.service.publish(200, [tf.zeros([1])])
        send(20)
        assert publications[-1] == 200, 'each environment has sent several with the old ones'


@pytest.mark.parametrize('is_known', [True, False])
def test_lost_weights_are_replaced_at_once(is_known):
    """The learner has resumed from a checkpoint, unnoticed by the job."""
    with contextlib.closing(Learner(capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        job = make_job(connection, publications, task=0, num_environments=100)
        learner.service.publish(10, [tf.zeros([1])])
        job.refresh()
        learner.service.publish(7, [tf.zeros([1])])
        if is_known:
            job.send(remote_peer.make_unroll(5), '', 1)
        else:
            learner.inbox.set_latest_version(7)
            job.send(remote_peer.make_unroll(10), '', 1)
        assert publications == [10, 7]
        with pytest.raises(Rejected):
            # A refusal for another reason is raised.
            job.send(remote_peer.make_unroll(3)[:1] * 4, '', 2)


def test_weights_that_arrive_during_a_call_are_not_taken_for_lost_ones():
    with contextlib.closing(Learner(capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        job = make_job(connection, publications, task=0, num_environments=100)
        learner.service.publish(100, [tf.zeros([1])])
        job.refresh()
        put = connection.put

        def put_while_weights_arrive(*args):
            status = put(*args)
            learner.service.publish(101, [tf.zeros([1])])
            job._refresh_meanwhile()
            job._reading.result(60)
            return status

        connection.put = put_while_weights_arrive
        job.send(remote_peer.make_unroll(5), '', 1)
        assert publications == [100, 101], 'read once'


def test_another_job_at_the_address_of_the_learner_is_reported_by_the_next_unroll():
    with contextlib.closing(Learner(capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        job = make_job(connection, publications, task=0, num_environments=1)
        learner.service.publish(100, [tf.zeros([1])])
        job.refresh()
        learner.inbox.close()
        learner.service.close()
        with Server(learner.address, {}, 'replay job', None, learner.reports.append):
            for _ in range(2):
                job._refresh_meanwhile()
                assert job._reading.result(60) is None
            with pytest.raises(ConfigError, match='is not a learner of this version'):
                job.send(remote_peer.make_unroll(5), '', 1)
        assert publications == [100]
