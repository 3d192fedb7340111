import json
import signal
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from configs import config
from impala import config as run_config
from impala import training
from impala.acting.actor_processes import ActorError
from impala.errors import LevelError
from impala.networks.agent import AgentConfig
from impala.runs import checkpoint, run_summary, stop_signal
from impala.runs import files as run_files
from impala.training import loop
from impala.training import run as training_run
from impala.trajectory import ArraySpec, EnvironmentSpec


def test_learners_agree_on_all_that_shapes_an_environment():
    run = config(
        '/nowhere',
        sticky_actions=0.25,
        max_noops=7,
        learner_addresses=('a:8000', 'b:8000'),
        task=1,
    )
    settings = training_run.shared_settings(
        run,
        EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 2, 4),
        AgentConfig(torso='mlp', core='none'),
    )
    # The level's action repeats, even if no flag sets them.
    expected = {**run.environment.agreed('jobs'), 'num_action_repeats': 4}
    assert settings['sticky_actions'] == 0.25
    assert settings['max_noops'] == 7
    assert expected.items() <= settings.items()


def test_different_seeds_and_resumed_runs_play_different_episodes(tmp_path):
    """Each return of this level is a function of the environment's seed."""

    def play(folder, seed, frames):
        run = config(
            tmp_path / folder, level_name='levels:seeded', seed=seed, num_actors=4,
            envs_per_process=4, total_environment_frames=frames,
        )  # fmt: skip
        training.train(run)
        return [row['return'] for row in run_files.read_episodes(run.run.logdir)]

    first = play('a', 1, 200)
    later = play('a', 1, 400)[len(first) :]
    other_seed = play('b', 2, 200)
    assert len({*first, *later, *other_seed}) == len({*first}) + len({*later}) + len({*other_seed})
    # The same seed plays the same episodes, though batches may lack some of the actors.
    assert {*first} & {*play('c', 1, 200)}


def test_a_run_on_several_levels_resumes(tmp_path):
    run = config(tmp_path, level_name='levels:short,levels:long')
    first = training.train(run)
    assert '--level_name=levels:short,levels:long\n' in (tmp_path / 'flags.txt').read_text()
    assert first == str(tmp_path / 'checkpoints' / 'ckpt-1')

    rows = [line.split(',') for line in (tmp_path / 'episodes.csv').read_text().splitlines()[1:]]
    assert {(row[3], row[4], row[5]) for row in rows} <= {
        ('levels:short', '5.0', '5'),
        ('levels:long', '20.0', '20'),
    }
    # Batches of 2 unrolls of 10 steps.
    assert {row[1] for row in rows} <= {'20', '40', '60', '80', '100'}
    assert rows
    second = training.train(run.replace(total_environment_frames=110))
    assert second == str(tmp_path / 'checkpoints' / 'ckpt-2')
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [line.split('"frames": ')[1].split(',')[0] for line in lines] == [
        str(frames) for frames in (20, 40, 60, 80, 100, 120)
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    with pytest.raises(run_files.LogdirError, match='was levels:short,levels:long and is now'):
        training.train(run.replace(level_name='levels:long'))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    # A change of levels is allowed once and then part of the run.
    other = run.replace(level_name='levels:long', allow_level_change=True)
    assert training.train(other) == second
    assert training.train(other.replace(allow_level_change=False)) == second
    stored = json.loads((tmp_path / 'network.json').read_text())
    assert stored['counted_by'] == {'num_action_repeats': 1, 'levels': ['levels:long']}
    stored['counted_by']['num_action_repeats'] = 2
    (tmp_path / 'network.json').write_text(json.dumps(stored))
    with pytest.raises(run_files.LogdirError, match='--num_action_repeats was 2 and is now 1'):
        training.train(other)


def test_a_signal_during_the_first_train_step_leaves_time_to_save(tmp_path, monkeypatch):
    to_floats, save = loop._to_floats, checkpoint.Checkpointer.save

    def interrupt(metrics):
        signal.raise_signal(signal.SIGINT)
        return to_floats(metrics)

    def save_slowly(*args):
        time.sleep(1.0)
        return save(*args)

    codes = []
    monkeypatch.setattr(stop_signal.os, '_exit', codes.append)
    monkeypatch.setattr(stop_signal, 'START_SECONDS', 0.7)
    monkeypatch.setattr(loop, '_to_floats', interrupt)
    monkeypatch.setattr(checkpoint.Checkpointer, 'save', save_slowly)
    assert training.train(config(tmp_path)) == str(tmp_path / 'checkpoints' / 'ckpt-1')
    assert not codes


def test_a_stopped_run_resumes_with_other_hyperparameters(tmp_path):
    run = config(tmp_path, stop_at_frames=40, learning_rate=0.1, epsilon=0.1)
    first = training.train(run)
    # A large epsilon and tiny gradients keep the weights where they are.
    other = run.replace(
        stop_at_frames=80, learning_rate=0.5, epsilon=1e6, gradient_clip_norm=1e-9,
        entropy_cost=0.0, baseline_cost=0.0,
    )  # fmt: skip
    second = training.train(other)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['frames'] for line in lines] == [20, 40, 60, 80]
    # It decays over all 100 frames, from its new start.
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
    # There is nothing to do if the stop has been passed.
    assert training.train(run.replace(stop_at_frames=60)) == second


def test_a_run_that_fails_repeatedly_keeps_its_checkpoints(tmp_path):
    checkpoints = tmp_path / 'checkpoints'
    training.train(config(tmp_path))
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    for level, sentence in (
        ('levels:failing', 'the joystick is broken'),
        ('levels:not_a_number', "the observation 'frame' of levels:not_a_number is nan"),
    ):
        failing = config(
            tmp_path,
            level_name=level,
            total_environment_frames=1000,
            allow_level_change=True,
        )
        with pytest.raises(ActorError, match=sentence):
            training.train(failing)
        assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before


def test_unrolls_with_infinite_rewards_are_discarded(tmp_path, capfd):
    """The reward of every 37th step is infinite; an episode has ten steps."""
    run = config(tmp_path, level_name='levels:sometimes_infinite', total_environment_frames=400)
    run = run.replace(unroll_length=2)
    training.train(run)
    text = capfd.readouterr().err
    assert text.count('WARNING') == 1
    assert 'the reward of levels:sometimes_infinite is inf' in text
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['frames'] == 400
    assert sum(line['updates_skipped'] for line in lines) == 0
    # One more line, without an update, may report unrolls discarded after the last update.
    assert len(lines) - len({line['updates'] for line in lines}) in (0, 1)
    assert sum('loss/total' in line for line in lines) == len({line['updates'] for line in lines})
    # Row 37 is within an unroll, row 74 ends one and starts the next.
    assert sum(line['unrolls_discarded'] for line in lines) >= 3
    returns = [row['return'] for row in run_files.read_episodes(run.run.logdir)]
    assert {10.0, float('inf')} == {*returns}
    summary = run_summary.read_summary(run.run.logdir)
    assert summary['mean_return_last_100'] == 10
    assert summary['episodes_not_finite'] == returns.count(float('inf'))


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        ({'torso': 'autoencoder'}, r'The autoencoder torso needs .*\[2\]; use the mlp torso'),
        ({'latent_size': 32}, '--latent_size=32 belongs to --torso=autoencoder; .*--torso=auto'),
        (
            {'torso': 'mlp', 'autoencoder_cost': 0.5},
            '--autoencoder_cost=0.5 belongs to --torso=autoencoder; .*--torso=mlp',
        ),
        ({'torso': 'deep'}, 'The deep torso needs uint8 or float32 frames .*use the mlp torso'),
        (
            {'level_name': 'levels:short,levels:long,levels:lives'},
            '--num_actors=2 would leave some of the 3 levels out: give --num_actors=3',
        ),
        ({'inference_batch_size': 3}, 'inference_batch_size=3 is more than .*num_actors=2'),
    ],
)
def test_incompatible_settings_are_refused(tmp_path, flags, sentence):
    with pytest.raises(run_config.ConfigError, match=sentence):
        training.train(config(tmp_path, **({'level_name': 'levels:short'} | flags)))
    assert not (tmp_path / 'checkpoints').exists()


def test_a_level_that_cannot_be_played_leaves_the_folder_alone(tmp_path):
    with pytest.raises(LevelError, match='lacks'):
        training.train(config(tmp_path, level_name='levels:none'))
    assert not list(tmp_path.iterdir())
    assert 'stop signal' not in {thread.name for thread in threading.enumerate()}


def test_a_run_begins_with_the_weights_of_its_initializer(tmp_path):
    norms = {}
    for initializer in ('truncated_normal', 'orthogonal'):
        run = config(
            tmp_path / initializer,
            initializer=initializer,
            batch_size=2,
            unroll_length=10,
            learning_rate=0.0,
            total_environment_frames=20,
        )
        reader = tf.train.load_checkpoint(training.train(run))
        (name,) = [
            name
            for name in reader.get_variable_to_shape_map()
            if name.startswith('learner/agent/_policy/w/.ATTR')
        ]
        norms[initializer] = np.linalg.norm(reader.get_tensor(name), axis=0)
    np.testing.assert_allclose(norms['orthogonal'], 0.01, rtol=1e-3)
    assert np.all(norms['truncated_normal'] > 0.1)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'clip_epsilon': 0.1}, '--clip_epsilon=0.1 belongs to --loss=appo'),
        ({'clip_target_rho_threshold': 3.0}, '--clip_target_rho_threshold=3.0 belongs to --loss=a'),
        ({'kl_cost': 0.5}, '--kl_cost=0.5 belongs to --loss=appo'),
        ({'normalize_advantages': True}, '--normalize_advantages belongs to --loss=appo'),
        ({'gae_advantages': True}, '--gae_advantages belongs to --loss=appo'),
        ({'target_update_steps': 9}, '--target_update_steps=9 belongs to --loss=appo; .*vtrace'),
        (
            {'loss': 'appo', 'clip_pg_rho_threshold': 2.0},
            '--clip_pg_rho_threshold=2.0 belongs to --loss=vtrace; this run has --loss=appo',
        ),
        (
            {'loss': 'appo', 'clip_target_rho_threshold': 3.0},
            '--clip_target_rho_threshold=3.0 is .* give --target_update_steps=1 or more',
        ),
        ({'reuse_buffer': 4}, '--reuse_buffer=4 holds .* give --sample_reuse=2 or more'),
        (
            {'replay_capacity': 9},
            '--replay_capacity=9 holds .* no one uses again: give --replay_fraction=0.5',
        ),
        (
            {'replay_fraction': 0.6},
            '--replay_fraction=0.6 .* nothing new in some batches of --batch_size=2: .*=0.5 at',
        ),
        ({'adam_epsilon': 1e-5}, '--adam_epsilon=1e-05 belongs to --optimizer=adam'),
        ({'adam_beta1': 0.5}, '--adam_beta1=0.5 belongs to --optimizer=adam'),
        ({'adam_beta2': 0.5}, '--adam_beta2=0.5 belongs to --optimizer=adam'),
        ({'optimizer': 'adam', 'momentum': 0.5}, '--momentum=0.5 belongs to --optimizer=rmsprop'),
        ({'optimizer': 'adam', 'decay': 0.5}, '--decay=0.5 belongs .* its default, 0.99'),
        ({'optimizer': 'adam', 'epsilon': 1e-5}, '--epsilon=1e-05 belongs to .* its default, 0.1'),
    ],
)
def test_settings_without_effect_are_refused_by_name(tmp_path, changes, sentence):
    with pytest.raises(run_config.ConfigError, match=sentence):
        config(tmp_path, **changes)


def test_a_replay_larger_than_the_memory_is_refused(tmp_path):
    replay = {'replay_fraction': 0.5, 'replay_capacity': 10**9}
    with pytest.raises(
        run_config.ConfigError,
        match=r'^This run needs [\d,]+\.\d GB .* room for [\d.]+ GB.* for the replay '
        r'\(--replay_capacity=1000000000\); --replay_capacity=\d+ would do\.$',
    ):
        training.train(config(tmp_path, batch_size=2, unroll_length=10, **replay))
    assert not (tmp_path / 'checkpoints').exists()


def test_a_target_network_and_popart_cannot_be_combined(tmp_path):
    with pytest.raises(run_config.ConfigError, match='--target_update_steps=2 .* with --popart'):
        config(tmp_path, loss='appo', target_update_steps=2, popart=True)


def test_a_run_resumes_with_another_loss_but_not_with_other_variables(tmp_path):
    run = config(tmp_path)
    training.train(run)
    for changes, sentence in (
        ({'optimizer': 'adam'}, '--optimizer was "rmsprop" and is now "adam"'),
        (
            {'target_update_steps': 5},
            r'--target_update_steps \(whether there is a target network\) was false',
        ),
    ):
        with pytest.raises(checkpoint.LogdirError, match=sentence):
            training.train(run.replace(loss='appo', total_environment_frames=200, **changes))
    resumed = run.replace(loss='appo', sample_reuse=2, total_environment_frames=200)
    assert training.train(resumed) == str(tmp_path / 'checkpoints' / 'ckpt-2')


def test_an_autoencoder_trains_in_bfloat16_and_resumes_with_another_cost_only(tmp_path):
    run = config(
        tmp_path,
        level_name='levels:picture',
        torso='autoencoder',
        latent_size=5,
        compute_dtype='bfloat16',
    )
    training.train(run)
    for changes, sentence in (
        ({'latent_size': 64}, '--latent_size was 5 and is now 64'),
        ({'torso': 'shallow', 'latent_size': 64}, '--torso was "autoencoder" and is now "shallow"'),
    ):
        with pytest.raises(checkpoint.LogdirError, match=sentence):
            training.train(run.replace(**changes))
    more = run.replace(autoencoder_cost=0.0, total_environment_frames=200)
    assert training.train(more) == str(tmp_path / 'checkpoints' / 'ckpt-2')
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert ['loss/autoencoder' in line for line in lines] == 5 * [True] + 5 * [False]
