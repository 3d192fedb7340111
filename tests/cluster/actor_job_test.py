"""Tests of impala/cluster/actor_job.py beyond those of the command line, see jobs_test.py."""

import contextlib
import dataclasses
import json
import re
import time

import pytest
import remote_peer
import tensorflow as tf
from learner_process import Learner

from configs import config
from impala.cluster import actor_job
from impala.cluster.actor_job import _agreed, _Learner, _Retry
from impala.cluster.exchange import WeightsBoard
from impala.cluster.remote_actors import job_settings
from impala.cluster.transport import LearnerServer, Rejected
from impala.config import ClusterConfig, ConfigError, EnvironmentConfig
from impala.runs.stop_signal import StopSignal


@pytest.fixture(scope='module')
def server():
    return LearnerServer('localhost:0')


class Publications(list):
    """The versions that actors have been given."""

    def publish(self, weights, version):
        self.append(int(version))

    def level_cache(self):
        return {}


NETWORK = {'torso': 'mlp', 'use_lstm': False, 'popart_levels': [], 'latent_size': 64}


def agree(of_the_learner, **flags):
    """What a job with these flags plays, where the learner has changed settings of an environment.

    Level and learner know only how many frames a step has.
    """
    learner = config('/nowhere', **of_the_learner)
    repeats = of_the_learner.get('num_action_repeats') or 4
    settings = json.loads(json.dumps(job_settings(learner, ('levels:short',), NETWORK, repeats)))
    own = config('/elsewhere', dataset_path='/here', job_name='actor', task=0, **flags)
    agreed, levels = _agreed(own, flags, settings)
    assert levels == ['levels:short']
    return agreed.environment


# Of each, something else than the default.
SHAPING = {
    'width': 50,
    'height': 60,
    'num_action_repeats': 2,
    'full_action_set': True,
    'sticky_actions': 0.25,
    'end_episode_on_life_loss': True,
    'max_noops': 3,
    'frames_per_noop': 4,
    'frame_stack': 2,
}
LOCATION = {'dataset_path': '/here', 'level_cache_dir': ''}
# Of the machine, or of tests.
LOCAL = {'dataset_path', 'level_cache_dir', 'level_cache_gb', 'temp_folder', 'is_test', 'render'}


def test_all_that_shapes_an_environment_is_the_learners():
    assert SHAPING.keys() | LOCAL == {field.name for field in dataclasses.fields(EnvironmentConfig)}
    assert agree(SHAPING) == EnvironmentConfig(**LOCATION, **SHAPING)
    # Said once more, as in a flag file for all jobs.
    assert agree(SHAPING, **SHAPING) == EnvironmentConfig(**LOCATION, **SHAPING)


@pytest.mark.parametrize(('flag', 'value'), SHAPING.items())
def test_flags_that_say_something_else_are_refused(flag, value):
    with pytest.raises(ConfigError, match=rf'^--{flag}={value} does not fit .* leave it out\.$'):
        agree({}, **{flag: value})


def test_action_repeats_that_the_level_has_anyway_may_be_said():
    assert agree({}, num_action_repeats=4).num_action_repeats is None


def test_more_answers_at_once_than_environments_are_refused(server):
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=1)) as learner:
        own = config(
            '/nowhere',
            inference_batch_size=5,
            envs_per_actor=4,
            job_name='actor',
            task=0,
            learner_address=learner.address,
        )
        settings = job_settings(own, ('levels:short',), NETWORK, 1)
        board = WeightsBoard(json.dumps(settings))
        with contextlib.closing(board), pytest.raises(ConfigError) as error:
            actor_job.run(own, (), print)
    assert str(error.value) == (
        '--inference_batch_size=5 is more than this job has environments (--envs_per_actor=4).'
    )


def make_job(connection, publications, reconnect_timeout=600.0, **kwargs):
    cluster = ClusterConfig(learner_address=connection.address, reconnect_timeout=reconnect_timeout)
    return _Learner(connection, publications, _Retry(cluster, print, StopSignal()), **kwargs)


def test_a_job_waits_for_one_that_has_died_and_gives_way_to_one_that_lives(server, monkeypatch):
    """The other one dies after the first try, or asks again and again."""
    monkeypatch.setattr(actor_job, '_RESERVING_AGAIN_SECONDS', 0.1)
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=1)) as learner:
        other, connection = learner.connect(), learner.connect()
        job = make_job(connection, Publications(), task=3, num_environments=1)
        said = []
        assert other.reserve(3, 1).is_own
        job.reserve(said.append)
        assert len(said) == 1
        assert re.match(
            '--task=3 is taken by a job on .*; waiting up to 10 seconds to see', said[0]
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


def test_a_job_that_comes_when_training_is_complete_hears_of_it(server):
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=1)) as learner:
        learner.board.finish()
        learner.inbox.close()
        job = make_job(learner.connect(), Publications(), 1.0, task=0, num_environments=1)
        job.reserve(print)
        assert job.finished and job.holder is None


def test_weights_are_read_once_for_an_unroll_of_each_environment(server):
    with contextlib.closing(Learner(f'localhost:{server.port}', capacity=100)) as learner:
        connection = learner.connect(weights=[tf.TensorSpec([1])])
        publications = Publications()
        job = make_job(connection, publications, task=0, num_environments=3)

        def send(number):
            job.send(remote_peer.make_unroll(number), '', number)

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
        job = make_job(connection, publications, task=0, num_environments=100)
        learner.board.publish([tf.zeros([1])], 10)
        job.refresh()
        learner.board.publish([tf.zeros([1])], 7)
        if is_known:
            job.send(remote_peer.make_unroll(5), '', 1)
        else:
            learner.inbox.set_latest_version(7)
            job.send(remote_peer.make_unroll(10), '', 1)
        assert publications == [10, 7]
        with pytest.raises(Rejected):
            # That is another reason.
            job.send(remote_peer.make_unroll(3)[:1] * 4, '', 2)
