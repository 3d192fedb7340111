import dataclasses
import json
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from run_config_test import config

import environments
from impala import run_config, training
from impala.actor_pool import ActorError


def test_stage_timer_adds_up_also_when_a_stage_fails():
    timer = training.StageTimer()
    for _ in range(2):
        with pytest.raises(KeyError), timer('a'):
            time.sleep(0.02)
            raise KeyError
    with timer('b'):
        pass
    assert timer.seconds.keys() == {'a', 'b'}
    assert timer.seconds['a'] >= 0.04
    assert timer.seconds['b'] < timer.seconds['a']


def test_trains_on_several_levels_and_goes_on(tmp_path):
    accepted = []
    run = config(tmp_path, level_names=('levels:short', 'levels:long'))
    first = training.train(run, on_accepted=lambda: accepted.append(1))
    assert accepted == [1]
    assert first == str(tmp_path / 'checkpoints' / 'ckpt-1')

    rows = [line.split(',') for line in (tmp_path / 'episodes.csv').read_text().splitlines()[1:]]
    assert {(row[3], row[4], row[5]) for row in rows} <= {
        ('levels:short', '5.0', '5'),
        ('levels:long', '20.0', '20'),
    }
    # Batches of 2 unrolls of 10 steps.
    assert {row[1] for row in rows} <= {'20', '40', '60', '80', '100'}
    assert rows
    second = training.train(dataclasses.replace(run, total_environment_frames=110))
    assert second == str(tmp_path / 'checkpoints' / 'ckpt-2')
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [line.split('"frames": ')[1].split(',')[0] for line in lines] == [
        str(frames) for frames in (20, 40, 60, 80, 100, 120)
    ]


def test_stops_for_now_and_goes_on_with_other_hyperparameters(tmp_path):
    run = config(tmp_path, stop_at_frames=40)
    run = dataclasses.replace(
        run, learner=dataclasses.replace(run.learner, learning_rate=0.1, epsilon=0.1)
    )
    first = training.train(run)
    # Weights do not move where epsilon is huge, nor do they for entropy's sake without its cost.
    other = dataclasses.replace(
        run.learner, learning_rate=0.5, epsilon=1e30, entropy_cost=0.0, baseline_cost=0.0
    )
    second = training.train(dataclasses.replace(run, stop_at_frames=80, learner=other))
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['frames'] for line in lines] == [20, 40, 60, 80]
    # Falls over all 100 frames, from where it starts now.
    rates = [line['learning_rate'] for line in lines]
    np.testing.assert_allclose(rates, [0.1, 0.08, 0.3, 0.2], rtol=1e-6)
    for line in lines[2:]:
        np.testing.assert_allclose(line['loss/total'], line['loss/policy_gradient'], rtol=1e-5)
    weights = [
        {
            name: tf.train.load_variable(path, name)
            for name, _ in tf.train.list_variables(path)
            if name.startswith('learner/agent/') and name.endswith('VARIABLE_VALUE')
        }
        for path in (first, second)
    ]
    assert weights[0] and weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-12)
    # There is nothing to do before a stop that lies behind.
    assert training.train(dataclasses.replace(run, stop_at_frames=60)) == second


def test_a_run_that_fails_again_and_again_keeps_its_checkpoints(tmp_path):
    checkpoints = tmp_path / 'checkpoints'
    training.train(config(tmp_path))
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    for level in ('levels:failing', 'levels:not_a_number'):
        failing = config(tmp_path, level_names=(level,), total_environment_frames=1000)
        with pytest.raises((ActorError, training.TrainingError)):
            training.train(failing)
        assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ({'torso': 'deep'}, 'The deep torso needs uint8 frames .*use the mlp torso'),
        (
            {'level_names': ('levels:short', 'levels:long', 'levels:lives')},
            '--num_actors=2 would leave some of the 3 levels out: give --num_actors=3',
        ),
        ({'inference_batch_size': 3}, 'inference_batch_size=3 is more than .*num_actors=2'),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, flags, sentence):
    with pytest.raises(run_config.ConfigError, match=sentence):
        training.train(config(tmp_path, **({'level_names': ('levels:short',)} | flags)))
    assert not (tmp_path / 'checkpoints').exists()


def test_a_level_that_cannot_be_played_leaves_the_folder_alone(tmp_path):
    accepted = []
    with pytest.raises(environments.LevelError, match='lacks'):
        training.train(
            config(tmp_path, level_names=('levels:none',)),
            on_accepted=lambda: accepted.append(1),
        )
    assert not accepted
    assert not list(tmp_path.iterdir())
    assert 'stop signal' not in {thread.name for thread in threading.enumerate()}
