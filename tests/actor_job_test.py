"""Tests of impala/actor_job.py where a command does not show it; the rest is in jobs_test.py."""

import contextlib

import pytest
import remote_peer
import tensorflow as tf
from remote_test import Learner

from impala.actor_job import ActorJobConfig, _Learner, _Patience
from impala.remote import LearnerServer, Rejected
from impala.stop_signal import StopSignal


@pytest.fixture(scope='module')
def server():
    return LearnerServer('localhost:0')


class Publications(list):
    """The versions that actors have been given."""

    def publish(self, weights, version):
        self.append(int(version))

    def level_cache(self):
        return {}


def test_weights_are_read_once_for_an_unroll_of_each_environment(server):
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        config = ActorJobConfig(0, learner.address, 600.0, {}, False)
        patience = _Patience(config, print, StopSignal())
        job = _Learner(connection, publications, patience, num_environments=3)

        def send(number):
            job.send(remote_peer.make_unroll(number), 0, '', number)

        learner.board.publish([tf.zeros([1])], 100)
        job.refresh()
        for number in range(1, 10):
            # An update between any two unrolls.
            learner.board.publish([tf.zeros([1])], 100 + number)
            send(number)
        assert publications == [100, 103, 106, 109]
        for number in range(10, 20):
            send(number)
        assert publications == [100, 103, 106, 109], 'there were no newer ones'
        learner.board.publish([tf.zeros([1])], 200)
        send(20)
        assert publications[-1] == 200, 'each environment has sent several with the old ones'


@pytest.mark.parametrize('is_known', [True, False])
def test_lost_weights_are_replaced_at_once(server, is_known):
    """The learner has come back from a checkpoint, and the job has not noticed it."""
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        config = ActorJobConfig(0, learner.address, 600.0, {}, False)
        patience = _Patience(config, print, StopSignal())
        job = _Learner(connection, publications, patience, num_environments=100)
        learner.board.publish([tf.zeros([1])], 10)
        job.refresh()
        learner.board.publish([tf.zeros([1])], 7)
        if is_known:
            job.send(remote_peer.make_unroll(5), 0, '', 1)
        else:
            learner.inbox.set_latest_version(7)
            job.send(remote_peer.make_unroll(10), 0, '', 1)
        assert publications == [10, 7]
        with pytest.raises(Rejected):
            # That is another reason.
            job.send(remote_peer.make_unroll(3)[:1] * 4, 0, '', 2)
