import dataclasses
import json

import pytest
import tensorflow as tf

from configs import IMAGE, STACK, VECTOR, config
from impala import config as run_config
from impala.runs import checkpoint
from impala.trajectory import ArraySpec


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
    network = run_config.choose_network(config('/nowhere', level_names=(level,), **flags), spec)
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
    assert run_config.has_fast_bfloat16(str(cpu_info)) == has_it

    run = config('/nowhere', compute_dtype='auto')
    monkeypatch.setattr(run_config, 'has_fast_bfloat16', lambda: has_it)
    expected = 'bfloat16' if has_it and not tf.config.list_logical_devices('GPU') else 'float32'
    assert run_config.choose_network(run, STACK).compute_dtype == expected
    assert run_config.choose_network(config('/nowhere'), STACK).compute_dtype == 'float32'


def test_every_level_has_its_actors_in_turn():
    levels = config('/nowhere', level_names=('a', 'b', 'c'), num_actors=7).level_ids
    assert levels == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ('change', 'flags'),
    [
        ({'torso': 'deep'}, '--torso was "mlp" and is now "deep"'),
        ({'use_lstm': True}, '--use_lstm was false and is now true'),
        (
            {'popart_levels': ('a', 'b')},
            r'--popart or --level_name \(.*\) was not set and is now \["a", "b"\]',
        ),
    ],
)
def test_settings_of_the_network_are_compared_by_flag(tmp_path, change, flags):
    logdir = str(tmp_path)
    network = run_config.choose_network(config(logdir), VECTOR)
    (tmp_path / 'checkpoints').mkdir()
    checkpoint.store_settings(logdir, run_config.network_settings(network, VECTOR), {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    checkpoint.check_same_network(logdir, run_config.network_settings(network, VECTOR))
    other = dataclasses.replace(network, **change)
    with pytest.raises(checkpoint.LogdirError, match=flags):
        checkpoint.check_same_network(logdir, run_config.network_settings(other, VECTOR))
    # Precision is no shape: a run may go on in another.
    faster = dataclasses.replace(network, compute_dtype='bfloat16')
    checkpoint.check_same_network(logdir, run_config.network_settings(faster, VECTOR))


def test_with_popart_other_levels_are_another_network(tmp_path):
    levels = ('a', 'b')
    network = run_config.choose_network(config(tmp_path, level_names=levels, popart=True), VECTOR)
    settings = run_config.network_settings(network, VECTOR)
    assert run_config.popart_levels(json.loads(json.dumps(settings))) == levels
    (tmp_path / 'checkpoints').mkdir()
    checkpoint.store_settings(str(tmp_path), settings, {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    for other, now in (((), 'not set'), (('b', 'a'), r'\["b", "a"\]'), (('a',), r'\["a"\]')):
        changed = dataclasses.replace(network, popart_levels=other)
        with pytest.raises(
            checkpoint.LogdirError,
            match=rf'--popart or --level_name .* was \["a", "b"\] and is now {now}',
        ):
            checkpoint.check_same_network(
                str(tmp_path), run_config.network_settings(changed, VECTOR)
            )
    # Without PopArt the network does not know its levels.
    plain = run_config.choose_network(config(tmp_path, level_names=levels), VECTOR)
    assert run_config.popart_levels(run_config.network_settings(plain, VECTOR)) == ()


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
    network = run_config.choose_network(config('/nowhere'), IMAGE)
    assert run_config.network_settings(network, IMAGE) != run_config.network_settings(network, spec)


def test_another_type_of_frames_is_another_network_if_the_type_is_known(tmp_path):
    network = run_config.choose_network(config(tmp_path), VECTOR)
    of_bytes = dataclasses.replace(VECTOR, observation={'frame': ArraySpec((4,), 'uint8')})
    (tmp_path / 'checkpoints').mkdir()
    stored = run_config.network_settings(network, VECTOR)
    later = run_config.LATER_SETTINGS
    checkpoint.store_settings(str(tmp_path), stored, {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    now = run_config.network_settings(network, of_bytes)
    with pytest.raises(checkpoint.LogdirError, match='frames. was "float32" and is now "uint8"'):
        checkpoint.check_same_network(str(tmp_path), now, later)
    older = {name: value for name, value in stored.items() if name not in later}
    (tmp_path / 'network.json').write_text(json.dumps(older))
    checkpoint.check_same_network(str(tmp_path), now, later)


def test_flags_that_may_have_changed_the_network_are_named(tmp_path):
    network = run_config.choose_network(config(tmp_path), STACK)
    (tmp_path / 'checkpoints').mkdir()
    checkpoint.store_settings(str(tmp_path), run_config.network_settings(network, STACK), {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    for spec, sentence in (
        (
            dataclasses.replace(STACK, num_actions=18),
            '--level_name or --full_action_set .* was 6 and is now 18',
        ),
        (
            dataclasses.replace(STACK, observation={'frame': ArraySpec((84, 84, 3), 'uint8')}),
            r'--frame_stack .* was \[84, 84, 4\] and is now \[84, 84, 3\]',
        ),
    ):
        with pytest.raises(checkpoint.LogdirError, match=sentence):
            checkpoint.check_same_network(str(tmp_path), run_config.network_settings(network, spec))


def test_what_counts_frames_and_which_levels_are_played_stay(tmp_path):
    logdir = str(tmp_path)
    before = run_config.counted_by(config(logdir, level_names=('a', 'b')), STACK)
    assert before == {'num_action_repeats': STACK.num_action_repeats, 'levels': ['a', 'b']}
    checkpoint.store_settings(logdir, {'torso': 'mlp'}, before)
    assert checkpoint.network_settings(logdir) == {'torso': 'mlp'}
    others = before | {'levels': ['a', 'c']}
    # Nothing was trained as yet.
    checkpoint.check_same_run(logdir, others | {'num_action_repeats': 1}, False)

    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    checkpoint.check_same_run(logdir, before, False)
    checkpoint.check_same_run(logdir, before | {'levels': ['b', 'a']}, False)
    repeats = STACK.num_action_repeats
    sentence = f'--num_action_repeats was {repeats} and is now {repeats + 1}; set it back'
    for allowed in (False, True):
        with pytest.raises(checkpoint.LogdirError, match=sentence):
            checkpoint.check_same_run(logdir, before | {'num_action_repeats': repeats + 1}, allowed)
    with pytest.raises(checkpoint.LogdirError, match='--level_name was a,b and is now a,c; set'):
        checkpoint.check_same_run(logdir, others, False)
    checkpoint.check_same_run(logdir, others, True)

    for damage in ([], {'levels': 3}, {'levels': [None]}):
        checkpoint.store_settings(logdir, {}, damage)
        with pytest.raises(checkpoint.LogdirError, match='network.json is damaged'):
            checkpoint.check_same_run(logdir, before, False)
    # Of a version that did not store it.
    (tmp_path / 'network.json').write_text('{"torso": "mlp"}')
    checkpoint.check_same_run(logdir, before, False)
