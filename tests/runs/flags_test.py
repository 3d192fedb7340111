"""Tests of impala/runs/flags.py."""

import dataclasses

import pytest
from absl import flags as absl_flags

from impala.config import Config, ConfigError, all_settings
from impala.runs import flag_file, flags

# Values that are not the defaults and are valid together.
CHANGED = {
    'learning_rate': 0.1,
    'level_name': 'a,b',
    'popart': True,
    'full_action_set': True,
    'learner_devices': ('/cpu:0', '/cpu:1'),
    'num_action_repeats': 3,
    'dataset_path': '/a b',
    'core': 'none',
    'epsilon': 1e-15,
}


def defined():
    values = absl_flags.FlagValues()
    flags.define(values)
    return values


def parsed(*arguments):
    values = defined()
    flags.parse('', [flag_file.Argument(text) for text in arguments], values)
    return values


def test_without_flags_all_settings_have_their_defaults():
    assert flags.config_of(parsed()) == Config()


def test_every_setting_has_a_flag():
    values = defined()
    assert {*values} >= {*all_settings()}


def another_value(known):
    """Returns a value that is not the setting's default."""
    if known.setting.choices:
        return next(choice for choice in known.setting.choices if choice != known.default)
    if known.kind is bool:
        return not known.default
    if known.kind in (int, float):
        return next(
            known.kind(each)
            for each in (7, 0.125, 1.5)
            if known.setting.low <= known.kind(each) <= known.setting.high
            and known.kind(each) != known.default
        )
    return ['a', 'b'] if known.kind is tuple else 'given'


def test_every_flag_reaches_the_setting_of_its_name():
    """One flag at a time differs from its default; nothing else changes."""
    defaults = parsed().flag_values_dict()
    for name, known in all_settings().items():
        value = another_value(known)
        values = parsed(flags.shown(name, value))
        assert {key: values[key].value for key in all_settings()} == {
            key: value if key == name else defaults[key] for key in all_settings()
        }


def test_flags_become_settings():
    values = parsed(
        '--level_name=CartPole-v1', '--num_actors', '8', '--popart', '--notrusted_network',
        '--replay_addresses=a:1,b:2', '--replay_fraction=0.5', '--epsilon=1e-3',
    )  # fmt: skip
    config = flags.config_of(values)
    assert config == Config.of(
        level_name='CartPole-v1', num_actors=8, popart=True, replay_addresses=('a:1', 'b:2'),
        replay_fraction=0.5, epsilon=1e-3,
    )  # fmt: skip
    assert flags.given(values) == {
        'level_name', 'num_actors', 'popart', 'trusted_network', 'replay_addresses',
        'replay_fraction', 'epsilon',
    }  # fmt: skip


@pytest.mark.parametrize('changes', [{}, CHANGED])
def test_the_flag_file_restores_the_runs_settings(tmp_path, changes):
    config = Config.of(logdir='/x', stop_at_frames=7, **changes)
    path = tmp_path / 'flags.txt'
    path.write_text(flags.to_text(config))
    stored = flags.parse_stored(flag_file.read(str(path)))
    for name, known in all_settings().items():
        if known.setting.on_resume == 'not_stored':
            assert stored[name] == known.default
        else:
            value = config.value(name)
            assert stored[name] == (list(value) if isinstance(value, tuple) else value), name
    assert Config.of(**stored).learner == config.learner


@pytest.mark.parametrize(
    ('argument', 'sentence'),
    [
        ('--num_actors=0', '--num_actors=0: 0 is not an integer in the range [1, 10000]'),
        ('--num_actors=x', '--num_actors=x is not a whole number.'),
        ('--nopopart=1', 'nopopart'),
        ('--torso=big', '--torso=big: value should be one of <auto|shallow'),
        ('--torso=big', 'or be my_module:Name'),
        ('--batchsize=3', "Unknown command line flag 'batchsize'"),
    ],
)
def test_invalid_arguments_give_one_sentence_with_their_place(argument, sentence):
    with pytest.raises(flag_file.FlagFileError) as error:
        flags.parse('', [flag_file.Argument(argument, 'a.flags, line 3')], defined())
    assert sentence in str(error.value)
    assert str(error.value).startswith('a.flags, line 3: ')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (
            ['--test_num_episodes=3'],
            '--test_num_episodes=3 is for tests: give --mode=test or --test_every_secs=600, for',
        ),
        (['--test_policy=greedy'], '--test_policy=greedy is for tests: give --mode=test or'),
        (['--test_every_secs=60', '--save_video=1'], '--save_video=1 is for tests: give --mode='),
        *(
            (
                ['--test_every_secs=60', *job],
                '--test_every_secs=60.0 is for training: leave it out of --mode=test and of actor '
                'and replay jobs.',
            )
            for job in (['--mode=test'], ['--job_name=actor', '--task=0'])
        ),
        (['--watch'], '--watch is for tests'),
        (['--envs_per_actor=3'], '--envs_per_actor=3 is for actor jobs'),
        *(
            (
                ['--inference_device=/cpu:0', '--task=0', *job],
                '--inference_device=/cpu:0 is for runs on one machine and for learners with '
                '--inference=learner: leave it out.',
            )
            for job in ([], ['--job_name=actor'])
        ),
        (['--learner_address=a:1'], '--learner_address=a:1 is for distributed jobs'),
        (['--job_name=learner'], '--job_name=learner needs --task=0'),
    ],
)
def test_flags_without_effect_are_refused(arguments, sentence):
    config = flags.config_of(parsed(*arguments))
    with pytest.raises(ConfigError, match=sentence):
        flags.refuse_unused(config, arguments)
    # In a flag file they may be for other jobs.
    flags.refuse_unused(config, [])


def test_flags_that_have_an_effect_or_their_default_are_not_refused():
    for arguments in (
        ['--mode=test', '--test_num_episodes=3'],
        ['--job_name=actor', '--task=0', '--envs_per_actor=3', '--learner_address=a:1'],
        ['--job_name=learner', '--task=0', '--learner_address=a:1'],
        ['--envs_per_actor=1', '--test_num_episodes=10'],
    ):
        flags.refuse_unused(flags.config_of(parsed(*arguments)), arguments)


def test_relevant_changes_are_reported():
    stored = flags.parse_stored(
        [flag_file.Argument('--batch_size=4'), flag_file.Argument('--popart')]
    )
    same = Config.of(batch_size=4, popart=True)
    assert flags.describe_changes(stored, same) == []
    assert flags.describe_changes(stored, same.replace(log_secs=1.0, logdir='/x', task=0)) == []
    (line,) = flags.describe_changes(stored, Config.of(batch_size=3, learner_devices=['/cpu:0']))
    assert line == (
        'Changed flags: --popart was on and is now off, --batch_size was 4 and is now 3, '
        '--learner_devices was not given and is now /cpu:0.'
    )
    _, note = flags.describe_changes(stored, same.replace(learning_rate=0.1))
    assert note.startswith('Learning rate and entropy cost are from now on')


def test_the_help_has_all_flags_in_groups():
    text = flags.short_help(defined())
    groups = dict.fromkeys(known.group for known in all_settings().values())
    places = [text.index(f'\n{group}:\n') for group in groups]
    assert places == sorted(places)
    for name in all_settings():
        assert f'--{name}:' in text or f'--[no]{name}:' in text
    assert 'Unit: ms.' in ' '.join(text.split())


def test_settings_are_shown_as_on_a_command_line():
    assert flags.shown('popart', True) == '--popart'
    assert flags.shown('popart', False) == '--nopopart'
    assert flags.shown('learner_devices', ('/cpu:0', '/cpu:1')) == '--learner_devices=/cpu:0,/cpu:1'
    config = dataclasses.replace(Config().learner, batch_size=3)
    assert flags.shown('batch_size', config.batch_size) == '--batch_size=3'
