"""Tests of impala/config.py."""

import dataclasses
import json
import subprocess
import sys

import pytest

from impala.config import (
    ActorsConfig,
    Config,
    ConfigError,
    EnvironmentConfig,
    LearnerConfig,
    LossConfig,
    all_settings,
    with_common_actions,
)


def test_nested_settings_are_found_by_name():
    config = Config.of(level_name='CartPole-v1', num_actors=8, entropy_cost=0.5, batch_size=3)
    assert config.run.level_name == 'CartPole-v1'
    assert config.actors.num_actors == 8
    assert config.learner.batch_size == 3
    assert config.learner.loss.entropy_cost == 0.5
    assert config.value('entropy_cost') == 0.5
    changed = config.replace(entropy_cost=0.25, learner_devices=['/cpu:0'])
    assert changed.learner.loss.entropy_cost == 0.25
    assert changed.learner.learner_devices == ('/cpu:0',)
    assert changed.actors == config.actors
    assert LearnerConfig.of(loss='appo', batch_size=3).loss == LossConfig(loss='appo')


def test_every_setting_has_help_and_a_default_within_its_bounds():
    settings = all_settings()
    assert len(settings) > 80
    for name, known in settings.items():
        assert known.setting.help.endswith('.'), name
        if known.default is not None:
            known.setting.check(name, known.default, known.kind)
        if known.kind in (int, float):
            assert known.setting.low is not None and known.setting.high is not None, name
        if known.setting.only_with:
            other, value = known.setting.only_with
            assert value in settings[other].setting.choices


@pytest.mark.parametrize(
    ('values', 'sentence'),
    [
        ({'num_actors': 0}, '--num_actors=0 must be from 1 to 10,000.'),
        ({'num_actors': 2.0}, '--num_actors must be of type int, not 2.0.'),
        ({'num_actors': True}, '--num_actors must be of type int, not True.'),
        ({'popart': 1}, '--popart must be of type bool, not 1.'),
        ({'learning_rate': 'low'}, "--learning_rate must be of type float, not 'low'."),
        ({'learning_rate': float('nan')}, '--learning_rate=nan is not a finite number.'),
        ({'learning_rate': None}, '--learning_rate must be of type float, not None.'),
        ({'torso': 'big'}, '--torso=big is not one of auto, shallow, deep'),
        ({'logdir': ''}, '--logdir is empty: give the folder of the run.'),
        ({'logdir': 'a\nb'}, "--logdir='a\\nb' has characters that cannot be printed"),
        ({'logdir': 'gs://b/c'}, '--logdir=gs://b/c is not a path of this machine'),
        ({'batchsize': 3}, 'batchsize is not a setting'),
        ({'clip_epsilon': 0.3}, '--clip_epsilon=0.3 belongs to --loss=appo; this run has'),
        ({'normalize_advantages': True}, '--normalize_advantages belongs to --loss=appo'),
        (
            {'loss': 'appo', 'clip_pg_rho_threshold': 2.0},
            '--clip_pg_rho_threshold=2.0 belongs to --loss=vtrace; this run has --loss=appo',
        ),
        ({'adam_beta1': 0.5}, '--adam_beta1=0.5 belongs to --optimizer=adam'),
        ({'optimizer': 'adam', 'epsilon': 0.5}, '--epsilon=0.5 belongs to --optimizer=rmsprop'),
        (
            {'core': 'none', 'core_size': 3},
            '--core_size=3 belongs to --core=lstm and --core=gru; this run has --core=none',
        ),
        ({'core': 'a:B', 'core_size': 3}, 'this run has --core=a:B: leave it out.'),
        ({'core': 'big'}, '--core=big is not one of auto, lstm, gru, none, nor my_module:Name.'),
        ({'latent_size': 3}, '--latent_size=3 belongs to --torso=autoencoder; this run has'),
        ({'autoencoder_cost': 0.5}, '--autoencoder_cost=0.5 belongs to --torso=autoencoder'),
        (
            {'loss': 'appo', 'target_update_steps': 1, 'popart': True},
            '--target_update_steps=1 cannot be combined with --popart',
        ),
        (
            {'loss': 'appo', 'clip_target_rho_threshold': 3.0},
            '--clip_target_rho_threshold=3.0 is for the ratio to a target network',
        ),
        ({'reuse_buffer': 2}, '--reuse_buffer=2 holds batches that no one uses again'),
        ({'replay_capacity': 7}, '--replay_capacity=7 holds trajectories that no one uses again'),
        ({'replay_fraction': 0.6}, 'or --replay_fraction=0.5 at most.'),
        (
            {'num_actors': 2, 'inference_batch_size': 3},
            '--inference_batch_size=3 is more than there are actors (--num_actors=2).',
        ),
        *(
            (
                {'learner_address': address},
                'is not an address of a job, which has the form host:port.',
            )
            for address in ('localhost', 'localhost:', ':8000', 'localhost:port', 'a:70000')
        ),
        ({'replay_addresses': ['a:1']}, '--replay_addresses=a:1 would hold trajectories that no'),
        (
            {'replay_addresses': ['a:1'], 'replay_fraction': 0.5, 'replay_capacity': 9},
            '--replay_capacity=9 is a setting of the replay jobs here',
        ),
        (
            {'replay_addresses': ['a:1', 'a:1'], 'replay_fraction': 0.5},
            '--replay_addresses has a:1 more than once',
        ),
        ({'task': 1}, '--task=1: there can be one learner only'),
        ({'learner_addresses': ['a:1', 'b:1']}, '--learner_addresses needs the number of this'),
        (
            {'learner_addresses': ['a:8000', 'b:8000'], 'task': 2},
            '--task=2: there are 2 --learner_addresses, so learners are --task=0 to --task=1.',
        ),
        (
            {'learner_addresses': ['a:8000', 'a:9000'], 'task': 0},
            '--learner_addresses: a:8000 and a:9000 would both use port 9000',
        ),
        (
            {'learner_addresses': ['a:8000', 'a:8000'], 'task': 0},
            '--learner_addresses: a:8000 and a:8000 would both use port 8000',
        ),
        (
            {'learner_addresses': ['a:9000', 'b:1', 'a:8000'], 'task': 0},
            'would both use port 9000',
        ),
        ({'learner_addresses': ['a:0', 'b:1'], 'task': 0}, 'port of a:0 must be from 1 to 63535'),
        (
            {'learner_addresses': ['a:8000', 'b:63536'], 'task': 0},
            'the port of b:63536 must be from 1 to 63535',
        ),
        ({'debug': True, 'mode': 'test'}, '--debug is for training: leave it out of --mode=test.'),
        *(
            (
                {'debug': True, **values},
                '--debug does everything in one process and one thread, so it cannot be combined '
                f'with {flag}.',
            )
            for values, flag in (
                ({'task': 0}, '--task=0'),
                ({'task': 0, 'job_name': 'actor'}, '--job_name=actor'),
                ({'learner_devices': ['/cpu:0', '/cpu:1']}, '--learner_devices=/cpu:0,/cpu:1'),
                ({'replay_addresses': ['a:1'], 'replay_fraction': 0.5}, '--replay_addresses=a:1'),
                ({'loaders': 1}, '--loaders=1'),
                ({'test_every_secs': 60}, '--test_every_secs=60'),
            )
        ),
        ({'job_name': 'actor'}, '--job_name=actor needs a number of its own'),
        ({'job_name': 'replay'}, '--job_name=replay needs --replay_addresses=host:port'),
        (
            {'mode': 'test', 'watch': True, 'checkpoint': 'a'},
            '--watch tests the checkpoints to come, so it cannot be combined with --checkpoint.',
        ),
    ],
)
def test_wrong_values_raise_one_sentence_that_names_the_flag(values, sentence):
    with pytest.raises(ConfigError) as error:
        Config.of(**values)
    assert sentence in str(error.value)
    assert '\n' not in str(error.value)


def test_learners_may_have_neighbouring_ports():
    addresses = ['a:8000', 'b:8000', 'b:8001', 'c:63535']
    config = Config.of(learner_addresses=addresses, task=3)
    assert config.cluster.has_several_learners
    assert config.cluster.own_address == 'c:63535'
    actor = Config.of(learner_addresses=addresses, task=6, job_name='actor')
    assert actor.cluster.own_address == 'b:8001'


def test_parts_are_checked_when_they_are_created():
    with pytest.raises(ConfigError, match='--envs_per_process=0 must be from 1'):
        ActorsConfig(envs_per_process=0)
    with pytest.raises(ConfigError, match='--sticky_actions=1.0 must be from 0 to 0.999'):
        EnvironmentConfig(sticky_actions=1.0)
    with pytest.raises(ConfigError, match='--clip_epsilon=0.3 belongs to --loss=appo'):
        Config(learner=LearnerConfig(loss=LossConfig(clip_epsilon=0.3)))


def test_settings_that_jobs_must_agree_on():
    config = Config.of(width=80, learning_rate=0.1, learner_addresses=['a:1', 'b:1'], task=0)
    of_jobs = config.agreed('jobs')
    assert of_jobs['width'] == 80
    assert {
        'unroll_length',
        'torso',
        'core',
        'core_size',
        'popart',
        'frame_stack',
    } <= of_jobs.keys()
    assert 'learning_rate' not in of_jobs and 'seed' not in of_jobs
    of_learners = config.agreed('jobs', 'learners')
    assert of_learners['learning_rate'] == 0.1
    assert of_learners['learner_addresses'] == ['a:1', 'b:1']
    assert 'seed' not in of_learners


def test_lists_of_texts_survive_the_way_to_other_processes():
    """JSON has no tuples."""
    config = EnvironmentConfig(observation_keys=('a', 'b'))
    sent = json.loads(json.dumps(dataclasses.asdict(config)))
    assert sent['observation_keys'] == ['a', 'b']
    assert EnvironmentConfig.of(**sent) == config
    run = Config.of(observation_keys=['a', 'b'])
    assert run.environment == config
    for settings in (run.agreed('jobs'), run.fixed()):
        assert json.loads(json.dumps(settings)) == settings
        assert settings['observation_keys'] == ['a', 'b']
    assert Config.of(**json.loads(json.dumps(run.agreed('jobs')))) == run


def test_several_atari_games_use_the_full_action_set():
    config = EnvironmentConfig()
    assert not with_common_actions(config, ['ALE/Pong-v5']).full_action_set
    assert with_common_actions(config, ['ALE/Pong-v5', 'ALE/Breakout-v5']).full_action_set
    given = dataclasses.replace(config, full_action_set=True)
    assert with_common_actions(given, ['ALE/Pong-v5']).full_action_set


def test_a_run_ends_at_the_smaller_frame_limit():
    assert Config.of(total_environment_frames=10).run.last_frames == 10
    assert Config.of(total_environment_frames=10, stop_at_frames=4).run.last_frames == 4
    assert Config.of(total_environment_frames=10, stop_at_frames=40).run.last_frames == 10


def test_importing_config_imports_no_large_packages():
    code = (
        'import sys, impala.config\n'
        'sys.exit(bool({"tensorflow", "numpy", "absl"} & sys.modules.keys()))'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (None, 'No such file or directory'),
        ('short\n', 'a secret of 5 bytes is too short; make one with: openssl rand -hex 32 > '),
    ],
)
def test_secrets_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / 'secret'
    if text is not None:
        path.write_text(text)
    config = Config.of(cluster_secret_file=str(path))
    with pytest.raises(ConfigError, match=f'^--cluster_secret_file={path}: {words}'):
        config.cluster.secret()


def test_a_secret_is_the_text_of_its_file(tmp_path):
    assert Config.of().cluster.secret() is None
    (tmp_path / 'secret').write_text('  0123456789abcdef\n')
    config = Config.of(cluster_secret_file=str(tmp_path / 'secret'))
    assert config.cluster.secret() == b'0123456789abcdef'
