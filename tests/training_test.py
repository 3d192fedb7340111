import dataclasses
import functools
import os
import signal
import threading
import time

import pytest
import tensorflow as tf

import environments
from impala import checkpoint, training
from impala.actor_pool import ActorError
from impala.learner import LearnerConfig
from impala.trajectory import ArraySpec, EnvironmentSpec

PATIENCE_SECONDS = 120

IMAGE = EnvironmentSpec({'frame': ArraySpec((72, 96, 3), 'uint8')}, 9, 4, 'dmlab')
STACK = EnvironmentSpec({'frame': ArraySpec((84, 84, 4), 'uint8')}, 6, 4, 'atari')
VECTOR = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)


def config(logdir, **changes):
    values = {
        'logdir': str(logdir),
        'level_names': ('levels:short',),
        'seed': 1,
        'num_actors': 2,
        'envs_per_process': 1,
        'total_environment_frames': 100,
        'torso': 'auto',
        'use_lstm': None,
        'compute_dtype': 'float32',
        'learner': LearnerConfig(batch_size=2, unroll_length=10),
        'environment': environments.EnvironmentConfig(),
        'inference_batch_size': 0,
        'inference_timeout_ms': 20.0,
        'queue_capacity': 1,
        'max_actor_restarts': 0,
        'save_checkpoint_secs': 600.0,
        'log_secs': 0.0,
    }
    return training.TrainingConfig(**(values | changes))


@pytest.mark.parametrize(
    ('level', 'spec', 'flags', 'expected'),
    [
        ('ALE/Pong-v5', STACK, {}, ('shallow', False)),
        ('ALE/Pong-v5', STACK, {'torso': 'deep', 'use_lstm': True}, ('deep', True)),
        ('CartPole-v1', VECTOR, {}, ('mlp', False)),
        ('CartPole-v1', VECTOR, {'use_lstm': True}, ('mlp', True)),
        ('explore_goal_locations_small', IMAGE, {}, ('deep', True)),
        ('explore_goal_locations_small', IMAGE, {'use_lstm': False}, ('deep', False)),
        ('VizdoomBasic-v1', IMAGE, {'torso': 'shallow'}, ('shallow', True)),
    ],
)
def test_the_network_follows_the_level_where_flags_leave_it_open(level, spec, flags, expected):
    network = training.choose_network(config('/nowhere', level_names=(level,), **flags), spec)
    assert (network.torso, network.use_lstm) == expected


@pytest.mark.parametrize(
    ('flags', 'has_it'),
    [
        ('fma avx2 avx512f avx512_vnni', False),
        ('avx512f avx512_bf16 amx_tile', True),
        ('avx512f amx_bf16 amx_tile', True),
    ],
)
def test_bfloat16_is_chosen_only_on_processors_made_for_it(tmp_path, monkeypatch, flags, has_it):
    cpu_info = tmp_path / 'cpuinfo'
    cpu_info.write_text(f'model name\t: X\nflags\t\t: fpu {flags}\nbogomips\t: 1\n')
    assert training.has_fast_bfloat16(str(cpu_info)) == has_it

    run = config('/nowhere', compute_dtype='auto')
    monkeypatch.setattr(training, 'has_fast_bfloat16', lambda: has_it)
    expected = 'bfloat16' if has_it and not tf.config.list_logical_devices('GPU') else 'float32'
    assert training.choose_network(run, STACK).compute_dtype == expected
    assert training.choose_network(config('/nowhere'), STACK).compute_dtype == 'float32'


def test_every_level_has_its_actors_in_turn():
    levels = config('/nowhere', level_names=('a', 'b', 'c'), num_actors=7).level_ids
    assert levels == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ('change', 'flags'),
    [
        ({'torso': 'deep'}, '--torso was "mlp" and is now "deep"'),
        ({'use_lstm': True}, '--use_lstm was false and is now true'),
    ],
)
def test_settings_of_the_network_are_compared_by_flag(tmp_path, change, flags):
    logdir = str(tmp_path)
    network = training.choose_network(config(logdir), VECTOR)
    (tmp_path / 'checkpoints').mkdir()
    checkpoint.check_same_network(logdir, training.network_settings(network, VECTOR))
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    checkpoint.check_same_network(logdir, training.network_settings(network, VECTOR))
    other = dataclasses.replace(network, **change)
    with pytest.raises(checkpoint.LogdirError, match=flags):
        checkpoint.check_same_network(logdir, training.network_settings(other, VECTOR))
    # Precision is no shape: a run may go on in another.
    faster = dataclasses.replace(network, compute_dtype='bfloat16')
    checkpoint.check_same_network(logdir, training.network_settings(faster, VECTOR))


@pytest.mark.parametrize(
    'spec',
    [
        dataclasses.replace(IMAGE, num_actions=8),
        dataclasses.replace(IMAGE, observation={'frame': ArraySpec((72, 96, 1), 'uint8')}),
        dataclasses.replace(
            IMAGE, observation=IMAGE.observation | {'instruction': ArraySpec((32,), 'int32')}
        ),
    ],
)
def test_another_level_is_another_network_if_its_spec_is(spec):
    network = training.choose_network(config('/nowhere'), IMAGE)
    assert training.network_settings(network, IMAGE) != training.network_settings(network, spec)


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


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_start_and_stops_the_run(number, request):
    # Whoever runs the tests may ignore it, as `nohup` does.
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with training.StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(PATIENCE_SECONDS)
        assert stop.received

    stopped = threading.Event()
    with training.StopSignal() as stop:
        stop.then(stopped.set)
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stopped.wait(PATIENCE_SECONDS)
        assert stop.received
    with training.StopSignal() as stop:
        stop.then(stopped.clear)
    assert stopped.is_set()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert 'stop signal' not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(('seconds', 'exits'), [(1e9, []), (0, [128 + signal.SIGTERM])])
def test_a_second_signal_ends_the_process_unless_it_comes_with_the_first(
    monkeypatch, seconds, exits
):
    codes = []
    monkeypatch.setattr(training.os, '_exit', codes.append)
    monkeypatch.setattr(training, 'SAME_SIGNAL_SECONDS', seconds)
    stopped = threading.Event()
    with training.StopSignal() as stop:
        stop.then(stopped.set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(PATIENCE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == exits


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
        ({'inference_batch_size': 3}, 'inference_batch_size=3 is more than .*num_actors=2'),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, flags, sentence):
    with pytest.raises(training.ConfigError, match=sentence):
        training.train(config(tmp_path, level_names=('levels:short',), num_actors=2, **flags))
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
