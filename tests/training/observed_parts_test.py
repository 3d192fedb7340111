"""Short runs on observations with several parts, through real actor processes."""

import json

import numpy as np

from configs import LEARNING, assert_sound, config
from impala import training
from impala.evaluation import evaluate
from impala.runs import files as run_files


def test_images_numbers_and_texts_train_together_and_are_tested(tmp_path):
    run = config(
        tmp_path,
        level_name='space_levels:instructed',
        width=40,
        height=36,
        torso='shallow',
        core='lstm',
        loss='vtrace',
        replay_fraction=0.5,
    )
    training.train(run)
    assert_sound(tmp_path)
    network = json.loads((tmp_path / 'network.json').read_text())
    assert network['frame_shape'] == [36, 40, 3] and network['has_instructions']
    assert network['other_observations'] == {'vector': [[3], 'float32']}
    returns = evaluate(run.replace(mode='test', test_num_episodes=3))
    assert [len(each) for each in returns.values()] == [3]


def test_chosen_entries_reach_actors_and_tests(tmp_path):
    run = config(
        tmp_path,
        level_name='space_levels:instructed',
        observation_keys=('number', 'text'),
        total_environment_frames=20,
    )
    training.train(run)
    network = json.loads((tmp_path / 'network.json').read_text())
    assert network['frame_shape'] == [3] and network['has_instructions']
    assert network['other_observations'] == {} and network['torso'] == 'mlp'
    evaluate(run.replace(mode='test', test_num_episodes=1))


def test_entries_are_used_together(tmp_path):
    """Neither of them tells anything about the action without the other."""
    run = config(
        tmp_path,
        level_name='space_levels:combined',
        total_environment_frames=16_000,
        num_actors=16,
        envs_per_process=8,
        batch_size=16,
        optimizer='adam',
        learning_rate=0.005,
        entropy_cost=0.001,
        discounting=0.1,
    )
    training.train(run)
    network = json.loads((tmp_path / 'network.json').read_text())
    assert network['core'] == 'none'
    assert network['parts'] == {'frame': [['categories', [2]], ['numbers', [1]]]}
    returns = [row['return'] for row in run_files.read_episodes(str(tmp_path))]
    assert np.mean(returns[:100]) < 6.5
    assert np.mean(returns[-200:]) > 9


def test_image_number_and_text_are_all_used(tmp_path):
    """Each tells the action in a third of the steps."""
    run = config(
        tmp_path,
        level_name='space_levels:instructed',
        width=40,
        height=36,
        torso='shallow',
        core='none',
        **(LEARNING | {'total_environment_frames': 20_000, 'entropy_cost': 0.01}),
        # With 0.003, or with less entropy, some runs are left with a part that they do not use.
        learning_rate=0.0015,
        discounting=0.1,
    )
    training.train(run)
    returns = [row['return'] for row in run_files.read_episodes(str(tmp_path))]
    assert np.mean(returns[:100]) < 6.5
    assert np.mean(returns[-200:]) > 9
