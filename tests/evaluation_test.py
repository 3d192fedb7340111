import dataclasses
import json

import pytest
from run_config_test import config

import environments
from impala import checkpoint, evaluation, training


@pytest.fixture(scope='module')
def logdir(tmp_path_factory):
    """A short run, trained as if every life were an episode."""
    folder = tmp_path_factory.mktemp('run')
    lives_count = environments.EnvironmentConfig(end_episode_on_life_loss=True)
    training.train(config(folder, level_names=('levels:lives',), environment=lives_count))
    return folder


def lives_config(logdir, **changes):
    lives_count = environments.EnvironmentConfig(end_episode_on_life_loss=True)
    return config(logdir, level_names=('levels:lives',), environment=lives_count, **changes)


@pytest.mark.parametrize('num_episodes', [1, 5])
def test_plays_exactly_the_episodes_asked_for_and_whole_games(logdir, num_episodes):
    lines = []
    returns = evaluation.evaluate(lives_config(logdir), num_episodes, lines.append)
    # Three lives of four steps, 1 each.
    assert returns == {'levels:lives': [12.0] * num_episodes}
    assert lines == [f'Testing {logdir}/checkpoints/ckpt-1']
    with open(logdir / 'test_scores.json') as file:
        scores = json.load(file)
    assert scores == {
        'checkpoint': f'{logdir}/checkpoints/ckpt-1',
        'levels': {
            'levels:lives': {'returns': [12.0] * num_episodes, 'mean': 12.0, 'median': 12.0}
        },
    }


def test_every_level_plays_its_episodes_however_long_they_are(logdir):
    run = lives_config(logdir, num_actors=3)
    run = dataclasses.replace(run, level_names=('levels:short', 'levels:long'))
    assert evaluation.evaluate(run, 4, print) == {
        'levels:short': [5.0] * 4,
        'levels:long': [20.0] * 4,
    }


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(checkpoint.LogdirError, match='There is no checkpoint in'):
        evaluation.evaluate(config(tmp_path), 1, print)
    assert not (tmp_path / 'test_scores.json').exists()


def test_another_network_is_refused(logdir):
    with pytest.raises(checkpoint.LogdirError, match='--use_lstm was false and is now true'):
        evaluation.evaluate(lives_config(logdir, use_lstm=True), 1, print)


def test_a_failing_environment_raises_its_error(logdir):
    run = dataclasses.replace(lives_config(logdir), level_names=('levels:failing',))
    with pytest.raises(Exception, match='the joystick is broken'):
        evaluation.evaluate(run, 1, print)
