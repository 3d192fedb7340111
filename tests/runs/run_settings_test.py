import dataclasses
import functools
import json
import os

import pytest
from other_settings import differing

from configs import IMAGE, STACK, VECTOR, config
from impala.config import Config, all_settings
from impala.environments import create_environment
from impala.networks import build
from impala.runs import files as run_files
from impala.runs import run_settings
from impala.trajectory import ArraySpec


@pytest.mark.parametrize(
    ('change', 'flags'),
    [
        ({'torso': 'deep'}, '--torso was "mlp" and is now "deep"'),
        ({'core': 'lstm'}, '--core was "none" and is now "lstm"'),
        (
            {'popart_levels': ('a', 'b')},
            r'--popart or --level_name \(.*\) was \[\] and is now \["a", "b"\]',
        ),
    ],
)
def test_settings_of_the_network_are_compared_by_flag(tmp_path, change, flags):
    logdir = str(tmp_path)
    network = build.choose_network(config(logdir), ('a',), VECTOR)
    (tmp_path / 'checkpoints').mkdir()
    run_settings.store_settings(logdir, run_settings.network_settings(network, VECTOR), {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_settings.check_same_network(logdir, run_settings.network_settings(network, VECTOR))
    other = dataclasses.replace(network, **change)
    with pytest.raises(run_files.LogdirError, match=flags):
        run_settings.check_same_network(logdir, run_settings.network_settings(other, VECTOR))
    # A run may be resumed with another precision, which changes no shape.
    faster = dataclasses.replace(network, compute_dtype='bfloat16')
    run_settings.check_same_network(logdir, run_settings.network_settings(faster, VECTOR))


def test_with_popart_other_levels_are_another_network(tmp_path):
    levels = ('a', 'b')
    network = build.choose_network(config(tmp_path, popart=True), levels, VECTOR)
    settings = run_settings.network_settings(network, VECTOR)
    assert run_settings.popart_levels(json.loads(json.dumps(settings))) == levels
    (tmp_path / 'checkpoints').mkdir()
    run_settings.store_settings(str(tmp_path), settings, {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    for other, now in (((), r'\[\]'), (('b', 'a'), r'\["b", "a"\]'), (('a',), r'\["a"\]')):
        changed = dataclasses.replace(network, popart_levels=other)
        with pytest.raises(
            run_files.LogdirError,
            match=rf'--popart or --level_name .* was \["a", "b"\] and is now {now}',
        ):
            run_settings.check_same_network(
                str(tmp_path), run_settings.network_settings(changed, VECTOR)
            )
    # Without PopArt the network does not know its levels.
    plain = build.choose_network(config(tmp_path), levels, VECTOR)
    assert run_settings.popart_levels(run_settings.network_settings(plain, VECTOR)) == ()


@pytest.mark.parametrize(
    'spec',
    [
        dataclasses.replace(IMAGE, action=8),
        dataclasses.replace(IMAGE, observation={'frame': ArraySpec((72, 96, 1), 'uint8')}),
        dataclasses.replace(
            IMAGE, observation=IMAGE.observation | {'instruction': ArraySpec((32,), 'int32')}
        ),
        dataclasses.replace(
            IMAGE, observation=IMAGE.observation | {'vector': ArraySpec((3,), 'float32')}
        ),
    ],
)
def test_another_spec_is_another_network(spec):
    network = build.choose_network(config('/nowhere'), ('a',), IMAGE)
    assert run_settings.network_settings(network, IMAGE) != run_settings.network_settings(
        network, spec
    )


def test_a_run_may_resume_with_an_action_mask_but_jobs_must_agree(tmp_path):
    network = build.choose_network(config(tmp_path), ('a',), VECTOR)
    mask = {'action_mask': ArraySpec((2,), 'bool')}
    masked = dataclasses.replace(VECTOR, observation=VECTOR.observation | mask)
    stored, now = (run_settings.network_settings(network, spec) for spec in (VECTOR, masked))
    assert stored != now
    (tmp_path / 'checkpoints').mkdir()
    run_settings.store_settings(str(tmp_path), stored, {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_settings.check_same_network(str(tmp_path), now)


def test_a_run_from_before_a_setting_resumes_with_its_default(tmp_path):
    network = build.choose_network(config(tmp_path), ('a',), STACK)
    settings = run_settings.network_settings(network, STACK)
    before = {name: value for name, value in settings.items() if name != 'contrast_gain'}
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'network.json').write_text(json.dumps(before))
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_settings.check_same_network(str(tmp_path), settings)
    other = settings | {'contrast_gain': 5.0}
    with pytest.raises(run_files.LogdirError, match='--contrast_gain was 0.0 and is now 5.0'):
        run_settings.check_same_network(str(tmp_path), other)


def test_numbers_are_stored_in_the_type_of_the_setting(tmp_path):
    run = config(tmp_path, contrast_gain=5)
    network = build.choose_network(run, ('a',), STACK)
    assert repr(run_settings.checkpoint_settings(run, network, STACK)['contrast_gain']) == '5.0'


def test_another_type_of_frames_is_another_network(tmp_path):
    network = build.choose_network(config(tmp_path), ('a',), VECTOR)
    of_bytes = dataclasses.replace(VECTOR, observation={'frame': ArraySpec((4,), 'uint8')})
    (tmp_path / 'checkpoints').mkdir()
    stored = run_settings.network_settings(network, VECTOR)
    run_settings.store_settings(str(tmp_path), stored, {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    now = run_settings.network_settings(network, of_bytes)
    with pytest.raises(run_files.LogdirError, match='frames. was "float32" and is now "uint8"'):
        run_settings.check_same_network(str(tmp_path), now)


def test_flags_that_may_have_changed_the_network_are_named(tmp_path):
    network = build.choose_network(config(tmp_path), ('a',), STACK)
    (tmp_path / 'checkpoints').mkdir()
    run_settings.store_settings(str(tmp_path), run_settings.network_settings(network, STACK), {})
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    for spec, sentence in (
        (
            dataclasses.replace(STACK, action=18),
            '--level_name, --full_action_set or --clip_actions .* was 6 and is now 18',
        ),
        (
            dataclasses.replace(STACK, observation={'frame': ArraySpec((84, 84, 3), 'uint8')}),
            r'--frame_stack .* was \[84, 84, 4\] and is now \[84, 84, 3\]',
        ),
        (
            dataclasses.replace(
                STACK, observation=STACK.observation | {'vector': ArraySpec((3,), 'float32')}
            ),
            r'--level_name or --observation_keys \(other observations\) was {} and is now '
            r'{"vector": \[\[3\], "float32"\]}',
        ),
    ):
        with pytest.raises(run_files.LogdirError, match=sentence):
            run_settings.check_same_network(
                str(tmp_path), run_settings.network_settings(network, spec)
            )


def test_action_repeats_and_levels_must_not_change(tmp_path):
    logdir = str(tmp_path)
    before = run_settings.counted_by(('a', 'b'), STACK)
    assert before == {'num_action_repeats': STACK.num_action_repeats, 'levels': ['a', 'b']}
    run_settings.store_settings(logdir, {'torso': 'mlp'}, before)
    assert run_settings.stored_settings(logdir) == {'torso': 'mlp'}
    others = before | {'levels': ['a', 'c']}
    # Nothing has been trained yet.
    run_settings.check_same_run(logdir, others | {'num_action_repeats': 1}, False)

    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_settings.check_same_run(logdir, before, False)
    run_settings.check_same_run(logdir, before | {'levels': ['b', 'a']}, False)
    repeats = STACK.num_action_repeats
    sentence = f'--num_action_repeats was {repeats} and is now {repeats + 1}; set it back'
    for allowed in (False, True):
        with pytest.raises(run_files.LogdirError, match=sentence):
            run_settings.check_same_run(
                logdir, before | {'num_action_repeats': repeats + 1}, allowed
            )
    with pytest.raises(run_files.LogdirError, match='--level_name was a,b and is now a,c; set'):
        run_settings.check_same_run(logdir, others, False)
    run_settings.check_same_run(logdir, others, True)

    for damage in (
        [], before | {'levels': 3}, before | {'levels': [None]}, {'levels': ['a', 'b']},
        before | {'num_action_repeats': None},
    ):  # fmt: skip
        run_settings.store_settings(logdir, {}, damage)
        with pytest.raises(run_files.LogdirError, match='network.json is damaged'):
            run_settings.check_same_run(logdir, before, False)


def test_settings_are_stored_and_compared(tmp_path):
    logdir = str(tmp_path)
    settings = {'torso': 'deep', 'core': 'lstm', 'frame_shape': (72, 96, 3)}
    assert run_settings.stored_settings(logdir) is None
    run_settings.store_settings(logdir, {'torso': 'shallow'}, {})
    # Nothing has been trained with the first settings.
    run_settings.check_same_network(logdir, settings)
    run_settings.store_settings(logdir, settings, {})
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_settings.check_same_network(logdir, settings)
    stored = {'torso': 'deep', 'core': 'lstm', 'frame_shape': [72, 96, 3]}
    assert run_settings.stored_settings(logdir) == stored

    other = {'torso': 'shallow', 'core': 'lstm', 'frame_shape': (84, 84, 4), 'core_size': 8}
    with pytest.raises(run_files.LogdirError) as error:
        run_settings.check_same_network(logdir, other)
    text = str(error.value)
    assert '--torso was "deep" and is now "shallow"' in text
    assert '(shape of the frames) was [72, 96, 3] and is now [84, 84, 4]' in text
    assert '--core_size was not set and is now 8' in text
    assert '--core ' not in text and '\n' not in text
    assert run_settings.stored_settings(logdir) == stored

    for damage, what in (
        (b'{"torso": ', 'line 1 column 11'),
        (b'\xff', "can't decode byte 0xff"),
        (b'[1]', 'it has no settings'),
        (b'[' * 100_000, 'recursion'),
        (b'{"torso": ' + b'9' * 5000 + b'}', 'Exceeds the limit'),
    ):
        with open(os.path.join(logdir, 'network.json'), 'wb') as file:
            file.write(damage)
        with pytest.raises(run_files.LogdirError, match=f'network.json is damaged .*{what}'):
            run_settings.check_same_network(logdir, settings)


@functools.cache
def spec_of(level_name, environment_config):
    environment = create_environment(level_name, 1, environment_config)
    environment.close()
    return environment.spec


# Not fixed, but some changes are refused: to levels that are not allowed, and between a run with
# and a run without a target network.
REFUSED_AT_TIMES = {'level_name', 'target_update_steps'}


@pytest.mark.parametrize('name', all_settings())
def test_exactly_the_fixed_settings_are_refused_when_a_run_resumes(tmp_path, name):
    logdir = str(tmp_path)

    def settings(values):
        config = Config.of(**values)
        levels = (config.run.level_name,)
        spec = spec_of(*levels, config.environment)
        network = build.choose_network(config, levels, spec)
        return (
            run_settings.checkpoint_settings(config, network, spec),
            run_settings.counted_by(levels, spec),
        )

    first, second = map(settings, differing(name))
    run_settings.store_settings(logdir, *first)
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()

    def resume(of_network, of_counters):
        run_settings.check_same_network(logdir, of_network)
        run_settings.check_same_run(logdir, of_counters, False)

    resume(*first)
    if all_settings()[name].setting.on_resume == 'fixed' or name in REFUSED_AT_TIMES:
        sentence = rf'--{name}\b.* was .* and is now '
        with pytest.raises(run_files.LogdirError, match=sentence) as error:
            resume(*second)
        assert '\n' not in str(error.value)
    else:
        resume(*second)
