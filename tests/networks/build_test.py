import pytest
import tensorflow as tf

from configs import IMAGE, STACK, VECTOR, config
from impala.networks import build


@pytest.mark.parametrize(
    ('level', 'spec', 'flags', 'expected'),
    [
        ('ALE/Pong-v5', STACK, {}, ('shallow', False)),
        ('ALE/Pong-v5', STACK, {'torso': 'deep', 'use_lstm': 'true'}, ('deep', True)),
        ('CartPole-v1', VECTOR, {}, ('mlp', False)),
        ('CartPole-v1', VECTOR, {'use_lstm': 'true'}, ('mlp', True)),
        ('explore_goal_locations_small', IMAGE, {}, ('deep', True)),
        ('explore_goal_locations_small', IMAGE, {'use_lstm': 'false'}, ('deep', False)),
        ('VizdoomBasic-v1', IMAGE, {'torso': 'shallow'}, ('shallow', True)),
    ],
)
def test_the_level_decides_the_network_unless_flags_do(level, spec, flags, expected):
    network = build.choose_network(config('/nowhere', **flags), (level,), spec)
    assert (network.torso, network.use_lstm) == expected


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
