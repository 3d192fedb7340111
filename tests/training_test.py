import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from run_config_test import config

import environments
from impala import checkpoint, run_config, training
from impala.actor_pool import ActorError
from impala.learner import LearnerConfig


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
        ({'torso': 'autoencoder'}, r'The autoencoder torso needs .*\[2\]; use the mlp torso'),
        ({'latent_size': 32}, '--latent_size=32 belongs to --torso=autoencoder; .*--torso=auto'),
        (
            {'torso': 'mlp', 'learner': LearnerConfig(autoencoder_cost=0.5)},
            '--autoencoder_cost=0.5 belongs to --torso=autoencoder; .*--torso=mlp',
        ),
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


def test_a_run_begins_with_the_weights_that_were_asked_for(tmp_path):
    norms = {}
    for initializer in ('truncated_normal', 'orthogonal'):
        run = config(
            tmp_path / initializer,
            initializer=initializer,
            learner=LearnerConfig(batch_size=2, unroll_length=10, learning_rate=0.0),
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


# What may be chosen of each setting of the learner; the first is the default.
CHOICES = {
    'torso': ('auto', 'autoencoder'),
    'autoencoder_cost': (1.0, 0.0),
    'use_lstm': (False, True),
    'popart': (False, True),
    'loss': ('vtrace', 'appo'),
    'sample_reuse': (1, 2, 4),
    'reuse_buffer': (1, 3),
    'replay_fraction': (0.0, 0.5),
    'optimizer': ('rmsprop', 'adam'),
    'target_update_steps': (0, 2),
    'normalize_advantages': (False, True),
    'kl_cost': (0.0, 0.1),
    'final_entropy_cost': (None, 0.0),
    'loaders': (1, 4),
}


def _pairs(choice):
    return set(itertools.combinations(choice.items(), 2))


def _learner(choice):
    of_learner = {
        name: value
        for name, value in choice.items()
        if name not in ('torso', 'use_lstm', 'popart', 'loaders')
    }
    return LearnerConfig(batch_size=2, unroll_length=10, **of_learner)


def _run(logdir, choice):
    # Of odd frames and instructions, or vectors.
    level = 'levels:picture' if choice['torso'] == 'autoencoder' else 'levels:short'
    return config(
        logdir,
        level_names=(level,),
        torso=choice['torso'],
        use_lstm=choice['use_lstm'],
        popart=choice['popart'],
        loaders=choice['loaders'],
        learner=_learner(choice),
        total_environment_frames=200,
    )


def _is_accepted(choice):
    try:
        run_config.check_learner(_learner(choice), choice['popart'])
        run_config.check_torso(_run('', choice))
    except run_config.ConfigError:
        return False
    return True


def _pairwise():
    """Returns choices in which every pair that any accepted choice has occurs."""
    choices = [
        dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
    ]
    accepted = [choice for choice in choices if _is_accepted(choice)]
    missing = set().union(*map(_pairs, accepted))
    chosen = []
    while missing:
        chosen.append(max(accepted, key=lambda choice: len(missing & _pairs(choice))))
        missing -= _pairs(chosen[-1])
    return chosen


def test_pairs_that_never_train_are_those_refused_by_name():
    trained = set().union(*map(_pairs, _pairwise()))
    pairs = {
        tuple(pair)
        for a, b in itertools.combinations(CHOICES, 2)
        for pair in itertools.product(
            [(a, value) for value in CHOICES[a]], [(b, value) for value in CHOICES[b]]
        )
    }
    assert pairs - trained == {
        (('torso', 'auto'), ('autoencoder_cost', 0.0)),
        (('popart', True), ('target_update_steps', 2)),
        (('loss', 'vtrace'), ('target_update_steps', 2)),
        (('loss', 'vtrace'), ('normalize_advantages', True)),
        (('loss', 'vtrace'), ('kl_cost', 0.1)),
        (('sample_reuse', 1), ('reuse_buffer', 3)),
    }


@pytest.mark.parametrize('choice', _pairwise(), ids=str)
def test_every_pair_of_settings_trains(tmp_path, choice):
    assert training.train(_run(tmp_path, choice)) == str(tmp_path / 'checkpoints' / 'ckpt-1')
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['frames'] == 200
    batches = 200 // 20
    if choice['replay_fraction']:
        assert {line['replayed_fraction'] for line in lines} == {0, 0.5}
        all_fresh = [line for line in lines if line['replayed_fraction'] == 0]
        # Each loader may begin with a batch while there is nothing to replay.
        num_all_fresh, rest = divmod(len(all_fresh), choice['sample_reuse'])
        assert rest == 0
        assert 1 <= num_all_fresh <= choice['loaders']
        # Behind these there are two for each as many frames.
        batches = num_all_fresh + 2 * (batches - num_all_fresh)
        lags = {'replayed_policy_lag_max', 'reused_replayed_policy_lag_max'}
        assert [line for line in lines if not lags & line.keys()] == all_fresh
    else:
        assert not any(name.startswith('replay') for line in lines for name in line)
    updates = _uses(batches, choice['sample_reuse'], choice['reuse_buffer'])
    assert lines[-1]['updates'] == updates
    # Two actors of which each unroll has two episodes, told once.
    episode_steps = 10 if choice['torso'] == 'autoencoder' else 5
    assert len((tmp_path / 'episodes.csv').read_text().splitlines()) == 1 + 200 // episode_steps
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    decodes = choice['torso'] == 'autoencoder' and choice['autoencoder_cost'] > 0
    assert all(('loss/autoencoder' in line) == decodes for line in lines)
    assert (tmp_path / 'reconstructions.png').exists() == decodes
    # Each line is of one update: by a batch that is new, or by one of before.
    reused = [line for line in lines if 'reused_policy_lag_mean' in line]
    assert bool(reused) == (choice['sample_reuse'] > 1)
    for line in lines:
        lags = {name for name in line if 'policy_lag' in name}
        assert all(name.startswith('reused_') == (line in reused) for name in lags)


def _uses(batches, times, buffer_size):
    """Returns updates up to the first use of the last batch, with which the run ends."""
    ages = [round(use * (buffer_size - 1) / max(1, times - 1)) for use in range(times)]
    return 1 + sum(age < held for held in range(1, batches) for age in ages)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'clip_epsilon': 0.1}, '--clip_epsilon=0.1 belongs to --loss=appo'),
        ({'clip_target_rho_threshold': 3.0}, '--clip_target_rho_threshold=3.0 belongs to --loss=a'),
        ({'kl_cost': 0.5}, '--kl_cost=0.5 belongs to --loss=appo'),
        ({'normalize_advantages': True}, '--normalize_advantages belongs to --loss=appo'),
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
    ],
)
def test_settings_without_effect_are_refused_by_name(tmp_path, changes, sentence):
    learner = LearnerConfig(batch_size=2, unroll_length=10, **changes)
    with pytest.raises(run_config.ConfigError, match=sentence):
        training.train(config(tmp_path, learner=learner))
    assert not list(tmp_path.iterdir())


def test_a_replay_larger_than_the_memory_is_refused(tmp_path):
    replay = {'replay_fraction': 0.5, 'replay_capacity': 10**12}
    with pytest.raises(
        run_config.ConfigError,
        match=r'--replay_capacity=1000000000000 trajectories of \d+ bytes are more than there is '
        r'room for in the .* GB of memory .*: give less than --replay_capacity=\d+',
    ):
        training.train(
            config(tmp_path, learner=LearnerConfig(batch_size=2, unroll_length=10, **replay))
        )
    assert not (tmp_path / 'checkpoints').exists()


def test_a_target_network_and_popart_do_not_go_together(tmp_path):
    learner = LearnerConfig(batch_size=2, unroll_length=10, loss='appo', target_update_steps=2)
    with pytest.raises(run_config.ConfigError, match='--target_update_steps=2 .* with --popart'):
        training.train(config(tmp_path, learner=learner, popart=True))


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'loss': 'appo', 'optimizer': 'adam'}, '--optimizer was not set and is now "adam"'),
        (
            {'loss': 'appo', 'target_update_steps': 5},
            r'--target_update_steps \(whether there is a target network\) was not set',
        ),
    ],
)
def test_a_run_goes_on_with_another_loss_but_not_with_other_variables(tmp_path, changes, sentence):
    training.train(config(tmp_path))
    with pytest.raises(checkpoint.LogdirError, match=sentence):
        training.train(
            config(
                tmp_path,
                learner=LearnerConfig(batch_size=2, unroll_length=10, **changes),
                total_environment_frames=200,
            )
        )
    appo = LearnerConfig(batch_size=2, unroll_length=10, loss='appo', sample_reuse=2)
    run = config(tmp_path, learner=appo, total_environment_frames=200)
    assert training.train(run) == str(tmp_path / 'checkpoints' / 'ckpt-2')


def test_an_autoencoder_trains_in_bfloat16_and_goes_on_with_another_cost_only(tmp_path):
    run = config(
        tmp_path,
        level_names=('levels:picture',),
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
            training.train(dataclasses.replace(run, **changes))
    learner = dataclasses.replace(run.learner, autoencoder_cost=0.0)
    more = dataclasses.replace(run, learner=learner, total_environment_frames=200)
    assert training.train(more) == str(tmp_path / 'checkpoints' / 'ckpt-2')
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert ['loss/autoencoder' in line for line in lines] == 5 * [True] + 5 * [False]
