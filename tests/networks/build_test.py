import dataclasses

import pytest
import tensorflow as tf

from configs import IMAGE, STACK, VECTOR, config
from impala.config import ConfigError
from impala.networks import build
from impala.trajectory import ArraySpec


@pytest.mark.parametrize(
    ('level', 'spec', 'flags', 'expected'),
    [
        ('ALE/Pong-v5', STACK, {}, ('shallow', 'none')),
        ('ALE/Pong-v5', STACK, {'torso': 'deep', 'core': 'lstm'}, ('deep', 'lstm')),
        ('CartPole-v1', VECTOR, {}, ('mlp', 'none')),
        ('CartPole-v1', VECTOR, {'core': 'lstm'}, ('mlp', 'lstm')),
        ('CartPole-v1', VECTOR, {'core': 'gru'}, ('mlp', 'gru')),
        ('CartPole-v1', VECTOR, {'core': 'my_module:MyCore'}, ('mlp', 'my_module:MyCore')),
        ('explore_goal_locations_small', IMAGE, {}, ('deep', 'lstm')),
        ('explore_goal_locations_small', IMAGE, {'core': 'none'}, ('deep', 'none')),
        ('VizdoomBasic-v1', IMAGE, {'torso': 'shallow'}, ('shallow', 'lstm')),
    ],
)
def test_the_level_decides_the_network_unless_flags_do(level, spec, flags, expected):
    network = build.choose_network(config('/nowhere', **flags), (level,), spec)
    assert (network.torso, network.core) == expected


def test_a_size_without_a_core_is_refused():
    run = config('/nowhere', core_size=5)
    assert build.choose_network(run, ('lab',), IMAGE).core_size == 5
    for spec in (STACK, VECTOR):
        with pytest.raises(ConfigError, match='--core_size=5 has no effect, since --core=auto'):
            build.choose_network(run, ('a',), spec)


def test_contrast_gain_needs_a_stack_of_frames_and_convolutions():
    run = config('/nowhere', contrast_gain=5)
    assert build.choose_network(run, ('ALE/Pong-v5',), STACK).contrast_gain == 5.0
    single = dataclasses.replace(STACK, observation={'frame': ArraySpec((84, 84, 1), 'uint8')})
    for spec in (IMAGE, VECTOR, single):
        with pytest.raises(ConfigError, match="--contrast_gain=5 .* those of 'a' are single"):
            build.choose_network(run, ('a',), spec)
    for torso in ('mlp', 'my_module:MyTorso'):
        with pytest.raises(ConfigError, match=f'--contrast_gain=5 belongs .* has --torso={torso}:'):
            build.choose_network(run.replace(torso=torso), ('a',), STACK)


@pytest.mark.parametrize(
    ('flags', 'has_it'),
    [
        ('fma avx2 avx512f avx512_vnni', False),
        ('avx512f avx512_bf16 amx_tile', True),
        ('avx512f amx_bf16 amx_tile', True),
    ],
)
def test_bfloat16_is_chosen_only_on_processors_with_support(tmp_path, monkeypatch, flags, has_it):
    cpu_info = tmp_path / 'cpuinfo'
    cpu_info.write_text(f'model name\t: X\nflags\t\t: fpu {flags}\nbogomips\t: 1\n')
    assert build.has_fast_bfloat16(str(cpu_info)) == has_it

    run = config('/nowhere', compute_dtype='auto')
    monkeypatch.setattr(build, 'has_fast_bfloat16', lambda: has_it)
    expected = 'bfloat16' if has_it and not tf.config.list_logical_devices('GPU') else 'float32'
    assert build.choose_network(run, ('a',), STACK).compute_dtype == expected
    assert build.choose_network(config('/nowhere'), ('a',), STACK).compute_dtype == 'float32'
