"""Tests of impala/cluster/job_start.py: what an actor job takes from its learner."""

import contextlib
import dataclasses
import json

import pytest
from learner_process import Learner
from other_settings import differing

from configs import STACK, VECTOR, config
from impala.cluster.job_start import agreed, started
from impala.cluster.remote_actors import job_settings
from impala.config import Config, ConfigError, EnvironmentConfig, all_settings
from impala.networks.build import choose_network
from impala.runs.run_settings import network_settings

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
    adopted, levels = agreed(own, flags, settings)
    assert levels == ['levels:short']
    return adopted.environment


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
    return agreed(own, given, settings)[0]


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
        with pytest.raises(ConfigError) as error, started(own, (), print):
            pass
    assert str(error.value) == (
        '--inference_batch_size=5 is more than this job has environments (--envs_per_actor=4).'
    )
