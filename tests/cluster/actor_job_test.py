"""Tests of impala/cluster/actor_job.py; jobs_test.py tests its command line."""

import contextlib
import dataclasses
import json
import re
import time

import pytest
import remote_peer
import tensorflow as tf
from learner_process import Learner
from other_settings import differing

from configs import STACK, VECTOR, config
from impala.cluster import actor_job
from impala.cluster.actor_job import _agreed, _Learner, _Retry
from impala.cluster.channel import Rejected
from impala.cluster.remote_actors import job_settings
from impala.config import ClusterConfig, Config, ConfigError, EnvironmentConfig, all_settings
from impala.networks.build import choose_network
from impala.runs.run_settings import network_settings
from impala.runs.stop_signal import StopSignal


class Publications(list):
    """Records the versions that actors are given."""

    def publish(self, weights, version):
        self.append(int(version))

    def level_cache(self):
        return {}


NETWORK = {
    'torso': 'mlp',
    'core': 'none',
    'core_size': 256,
    'popart_levels': [],
    'latent_size': 64,
}


def agree(learner_changes, **flags):
    """Returns the environment settings of a job with these flags and changes of the learner's.

    The level has 4 action repeats by default.
    """
    learner = config('/nowhere', **learner_changes)
    repeats = learner_changes.get('num_action_repeats') or 4
    settings = json.loads(json.dumps(job_settings(learner, ('levels:short',), NETWORK, repeats)))
    own = config('/elsewhere', dataset_path='/here', job_name='actor', task=0, **flags)
    agreed, levels = _agreed(own, flags, settings)
    assert levels == ['levels:short']
    return agreed.environment


# A value of each that is not the default.
SHAPING = {
    'width': 50,
    'height': 60,
    'num_action_repeats': 2,
    'full_action_set': True,
    'clip_actions': True,
    'info_action_mask': True,
    'env_kwargs': '{"difficulty": 2}',
    'atari_mode': 1,
    'atari_difficulty': 1,
    'bootstrap_truncated': True,
    'sticky_actions': 0.25,
    'end_episode_on_life_loss': True,
    'max_noops': 3,
    'frames_per_noop': 4,
    'frame_stack': 2,
    'observation_keys': ('a', 'b'),
}
LOCATION = {'dataset_path': '/here', 'level_cache_dir': ''}
# Settings of the machine, or of tests.
LOCAL = {'dataset_path', 'level_cache_dir', 'level_cache_gb', 'temp_folder', 'is_test', 'render'}


def test_the_learner_decides_all_that_shapes_an_environment():
    assert SHAPING.keys() | LOCAL == {field.name for field in dataclasses.fields(EnvironmentConfig)}
    assert agree(SHAPING) == EnvironmentConfig(**LOCATION, **SHAPING)
    # The same flags may be repeated, as in a flag file for all jobs.
    assert agree(SHAPING, **SHAPING) == EnvironmentConfig(**LOCATION, **SHAPING)


@pytest.mark.parametrize(('flag', 'value'), SHAPING.items())
def test_contradicting_flags_are_refused(flag, value):
    text = ','.join(value) if isinstance(value, tuple) else value
    with pytest.raises(ConfigError, match=rf'^--{flag}={text} does not fit .* leave it out\.$'):
        agree({}, **{flag: value})


def test_the_default_action_repeats_of_the_level_may_be_given():
    assert agree({}, num_action_repeats=4).num_action_repeats is None


# What an actor job has other values of than its learner, or must not have at all.
OF_THE_JOB = {'mode', 'job_name', 'task', 'num_actors', 'replay_addresses', 'debug'}


def agree_on_a_level(learner, own, given):
    """The settings of an actor job, after those of its learner; both play one level."""
    levels = (learner.run.level_name,)
    spec = STACK if levels[0].startswith('ALE/') else VECTOR
    network = network_settings(choose_network(learner, levels, spec), spec)
    repeats = learner.environment.num_action_repeats or spec.num_action_repeats
    settings = json.loads(json.dumps(job_settings(learner, levels, network, repeats)))
    return _agreed(own, given, settings)[0]


@pytest.mark.parametrize('name', sorted(all_settings().keys() - OF_THE_JOB))
def test_exactly_the_marked_settings_are_the_learners(name):
    first, second = differing(name)
    own = Config.of(**second, job_name='actor', task=0)
    if all_settings()[name].setting.agreement != 'jobs':
        assert agree_on_a_level(Config.of(**first), own, {name}).value(name) == own.value(name)
        return
    with pytest.raises(ConfigError, match=rf'^--{name}=.* the learner at '):
        agree_on_a_level(Config.of(**first), own, {name})
    # An actor job plays some of the learner's levels, whatever their flag is there.
    if name != 'level_name':
        own = Config.of(**first, job_name='actor', task=0)
        learner = Config.of(**second)
        assert agree_on_a_level(learner, own, ()).value(name) == learner.value(name)


def test_an_inference_batch_larger_than_the_job_is_refused():
    with contextlib.closing(Learner(capacity=1)) as learner:
        own = config(
            '/nowhere',
            inference_batch_size=5,
            envs_per_actor=4,
            job_name='actor',
            task=0,
            learner_address=learner.address,
        )
        settings = job_settings(own, ('levels:short',), NETWORK, 1)
        learner.service._settings = settings
        with pytest.raises(ConfigError) as error:
            actor_job.run(own, (), print)
    assert str(error.value) == (
        '--inference_batch_size=5 is more than this job has environments (--envs_per_actor=4).'
    )


def make_job(connection, publications, reconnect_timeout=600.0, **kwargs):
    cluster = ClusterConfig(learner_address=connection.address, reconnect_timeout=reconnect_timeout)
    return _Learner(connection, publications, _Retry(cluster, print, StopSignal()), **kwargs)


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
