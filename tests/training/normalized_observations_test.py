"""Short runs with `--normalize_observations`, through real actor processes."""

import json

import numpy as np
import pytest
import tensorflow as tf
from command_line import WarmRun
from levels import counted
from ports import free_ports

from configs import config
from impala import training
from impala.config import ConfigError
from impala.evaluation import evaluate
from impala.runs.files import LogdirError, read_episodes
from impala.tools import export

# For `learned`.
LEARNING = {
    'level_name': 'space_levels:scaled',
    'total_environment_frames': 10_000,
    'num_actors': 16,
    'envs_per_process': 8,
    'batch_size': 16,
    'optimizer': 'adam',
    'learning_rate': 0.005,
    'entropy_cost': 0.001,
    'discounting': 0.1,
    'normalize_observations': True,
}


def statistics(checkpoint):
    """Returns name -> value of what a checkpoint has of the agent's normalizer."""
    reader = tf.train.load_checkpoint(checkpoint)
    names = ('count', 'mean', 'variance')
    return {
        name: reader.get_tensor(f'learner/agent/normalizer/{name}/.ATTRIBUTES/VARIABLE_VALUE')
        for name in names
    }


@pytest.mark.parametrize('changes', [{}, {'replay_fraction': 0.5, 'sample_reuse': 2}])
def test_a_checkpoint_has_the_statistics_of_all_observations(tmp_path, changes):
    """With one actor, unrolls come in the order in which they were played."""
    run = config(
        tmp_path, level_name='levels:counted_numbers', num_actors=1, normalize_observations=True,
        queue_capacity=3, **changes,
    )  # fmt: skip
    found = statistics(training.train(run))
    # Of the first batch nothing is replayed.
    assert found['count'] == 100
    seen = np.float64([counted(number) for number in range(100)])
    np.testing.assert_allclose(found['mean'], seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found['variance'], seen.var(0), rtol=1e-9, atol=1e-30)
    if changes:
        return
    # A resumed run goes on with them, and its environments begin again.
    again = statistics(training.train(run.replace(total_environment_frames=160)))
    seen = np.concatenate([seen, seen[:60]])
    assert again['count'] == 160
    np.testing.assert_allclose(again['mean'], seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(again['variance'], seen.var(0), rtol=1e-9, atol=1e-30)


@pytest.fixture(scope='module')
def learned(tmp_path_factory):
    """A run on observations around 5000 that differ by thousands."""
    run = config(tmp_path_factory.mktemp('learned') / 'run', **LEARNING)
    training.train(run)
    return run


def test_a_checkpoint_is_tested_with_its_statistics(learned):
    test = learned.replace(mode='test', test_num_episodes=20, test_policy='greedy')
    (returns,) = evaluate(test).values()
    assert np.mean(returns) > 9.5


def test_an_exported_model_takes_raw_observations(learned, tmp_path):
    output = str(tmp_path / 'model')
    export.export(learned.run.logdir, output)
    step = tf.saved_model.load(output).signatures['step']
    random = np.random.default_rng(3)
    wanted = random.integers(2, size=500)
    values = np.stack([2 * wanted - 1, random.normal(size=500), np.full(500, 0.3)], 1)
    outputs = step(
        prev_action=tf.zeros(500, tf.int32),
        reward=tf.zeros(500),
        done=tf.ones(500, tf.bool),
        frame=tf.constant(1000 * values + 5000, tf.float32),
    )
    assert np.mean(outputs['greedy_action'] == wanted) > 0.98
    # Without statistics these observations look like the first ones.
    outputs = step(
        prev_action=tf.zeros(500, tf.int32),
        reward=tf.zeros(500),
        done=tf.ones(500, tf.bool),
        frame=tf.constant(values, tf.float32),
    )
    assert len(set(outputs['greedy_action'].numpy())) == 1


def test_runs_without_vectors_refuse_the_flag(tmp_path):
    for level_name in ('levels:picture', 'levels:float_picture', 'space_levels:choices'):
        run = config(tmp_path, level_name=level_name, torso='mlp', normalize_observations=True)
        with pytest.raises(ConfigError) as error:
            training.train(run)
        text = str(error.value)
        assert text.startswith('--normalize_observations is for observations that are vectors')
        assert repr(level_name) in text and '\n' not in text
    assert not (tmp_path / 'network.json').exists()


def test_the_flag_cannot_change_when_a_run_resumes(tmp_path):
    run = config(tmp_path, total_environment_frames=20)
    training.train(run)
    assert json.loads((tmp_path / 'network.json').read_text())['normalize_observations'] is False
    other = run.replace(total_environment_frames=40, normalize_observations=True)
    with pytest.raises(LogdirError, match='--normalize_observations was false and is now true'):
        training.train(other)


def test_statistics_travel_to_actor_jobs(tmp_path):
    """Without them, every observation of this level would be clipped to the same values."""
    (port,) = free_ports(1)
    address = f'--learner_address=localhost:{port}'
    logdir = tmp_path / 'run'
    flags = [
        f'--{name}={value}'
        for name, value in LEARNING.items()
        if name not in ('num_actors', 'envs_per_process', 'normalize_observations')
    ]
    learner = ('--task=0', '--trusted_network', '--normalize_observations', '--unroll_length=10')
    actor = ('--job_name=actor', '--task=0', '--envs_per_actor=16', '--envs_per_process=8')
    with (
        WarmRun(tmp_path / 'a', f'--logdir={logdir}', address, *learner, *flags) as first,
        WarmRun(tmp_path / 'b', address, *actor) as job,
    ):
        assert first.wait() == 0, first.stderr
        assert job.wait() == 0, job.stderr
    returns = [row['return'] for row in read_episodes(str(logdir))]
    assert np.mean(returns[:100]) < 6.5
    assert np.mean(returns[-100:]) > 8.5
    found = statistics(str(logdir / 'checkpoints' / 'ckpt-1'))
    np.testing.assert_allclose(found['mean'], [5000, 5000, 5300], atol=100)
    np.testing.assert_allclose(found['variance'][:2], 1e6, rtol=0.1)
    assert found['count'] >= 10_000 and found['variance'][2] < 1e-6
