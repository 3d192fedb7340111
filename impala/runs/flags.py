"""The flags of the command line and the flag file of a run, both made from `impala.config`."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from impala.config import Config, ConfigError, Known, all_settings
from impala.runs.files import FLAG_FILE, checkpoint_paths, write_atomically
from impala.runs.flag_file import Argument, FlagFileError, plainly, read
from impala.user_code import is_own

_LONGEST_REASON = 400
_BOUNDED: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
_UNBOUNDED: dict[type, Any] = {
    bool: flags.DEFINE_boolean,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}


class _ChoiceOrOwn(flags.EnumParser):
    """Accepts a choice or a name of the user's own code, `my_module:Name`."""

    def parse(self, argument: str) -> str:
        if is_own(argument):
            return argument
        try:
            return super().parse(argument)
        except ValueError as error:
            raise ValueError(f'{error} or be my_module:Name') from error


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each setting.

    Args:
      values: where to define them: the flags of this process, or others, for instance to read a
        flag file.
    """
    for name, known in all_settings().items():
        # The help groups flags by module.
        place: dict[str, Any] = {'flag_values': values, 'module_name': known.group}
        text = known.setting.help
        if known.setting.only_with is not None:
            text = f'With --{"=".join(known.setting.only_with)}: {text[0].lower()}{text[1:]}'
        if known.setting.allows_own:
            text = f'<{"|".join(known.setting.choices)}|my_module:Name>: {text}'
            parser = _ChoiceOrOwn(known.setting.choices)
            flags.DEFINE(parser, name, known.default, text, place.pop('flag_values'), **place)
        elif known.setting.choices:
            flags.DEFINE_enum(name, known.default, known.setting.choices, text, **place)
        elif known.kind in _BOUNDED:
            text += f' Unit: {known.setting.unit}.' if known.setting.unit else ''
            _BOUNDED[known.kind](
                name,
                known.default,
                text,
                lower_bound=known.setting.low,
                upper_bound=known.setting.high,
                **place,
            )
        else:
            default = list(known.default) if known.kind is tuple else known.default
            _UNBOUNDED[known.kind](name, default, text, **place)


def short_help(values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns all flags, in groups."""
    groups = dict.fromkeys(known.group for known in all_settings().values())
    return '\n'.join(values.module_help(group) for group in groups)


def config_of(values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the flags as a config.

    Raises:
      ConfigError: they do not fit together.
    """
    return Config.of(**{name: values[name].value for name in all_settings()})


def given(values: flags.FlagValues = flags.FLAGS) -> set[str]:
    """Returns the names of the settings that the command line or its flag files set."""
    return {name for name in all_settings() if values[name].present}


def parse(
    program: str, arguments: Sequence[Argument], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Sets flags.

    Args:
      program: name of the program.
      arguments: its arguments, with flag files expanded.
      values: the flags.

    Returns:
      The program and the arguments that are not flags.

    Raises:
      FlagFileError: one sentence about an invalid argument, with its file and line if it has one.
    """
    try:
        return values([program, *(argument.text for argument in arguments)])
    except (flags.Error, ValueError) as error:
        # --nopopart=1 raises ValueError. The message repeats the argument, which may be long.
        reason = plainly(str(error))
        if len(reason) > _LONGEST_REASON:
            reason = f'{reason[:_LONGEST_REASON]}...'
        for argument in arguments:
            name = re.escape(argument.name)
            if argument.origin and name and re.search(rf"--{name}\b|'{name}'", reason):
                reason = f'{argument.origin}: {reason}'
                break
        raise FlagFileError(reason) from error


def parse_stored(arguments: Sequence[Argument]) -> dict[str, Any]:
    """Returns name -> value of all settings as in the flag file of a run.

    Raises:
      FlagFileError: a line is invalid.
    """
    values = flags.FlagValues()
    define(values)
    parse('', arguments, values)
    return {name: values[name].value for name in all_settings()}


def to_text(config: Config) -> str:
    """Returns the flag file that restores a run."""
    lines = (_line(name, known, config.value(name)) for name, known in _stored())
    return ''.join(f'{line}\n' for line in lines if line)


def shown(name: str, value: Any) -> str:
    """Returns a flag as written on a command line."""
    return _line(name, all_settings()[name], value)


def _stored() -> Iterable[tuple[str, Known]]:
    settings = all_settings().items()
    return ((name, known) for name, known in settings if known.setting.on_resume != 'not_stored')


def _line(name: str, known: Known, value: Any) -> str:
    if value is None:
        return ''
    if known.kind is bool:
        return f'--{name}' if value else f'--no{name}'
    return f'--{name}={",".join(value) if known.kind is tuple else value}'


def refuse_unused(config: Config, arguments: Sequence[str]) -> None:
    """Rejects flags on the command line that have no effect in this mode or kind of job.

    In a flag file they are allowed, because jobs of all kinds may share it.

    Args:
      config: the settings that the flags make.
      arguments: the command line without the program.

    Raises:
      ConfigError: names the flag.
    """
    names = {Argument(text).name for text in arguments}
    changed = {
        name: known.setting
        for name, known in all_settings().items()
        if name in names and config.value(name) != known.default
    }
    mode, job = config.run.mode, config.cluster.job_name
    for name, known in changed.items():
        text = shown(name, config.value(name))
        if known.only_in == 'test' and mode == 'train':
            raise ConfigError(f'{text} is for tests: give --mode=test, too, or leave it out.')
        if known.only_in == 'tests' and mode == 'train' and not config.test.test_every_secs:
            raise ConfigError(
                f'{text} is for tests: give --mode=test or --test_every_secs=600, for instance, '
                'too, or leave it out.'
            )
        if known.only_in == 'train' and (mode == 'test' or job != 'learner'):
            raise ConfigError(
                f'{text} is for training: leave it out of --mode=test and of actor and replay jobs.'
            )
        if known.only_in == 'actor' and job != 'actor':
            raise ConfigError(f'{text} is for actor jobs (--job_name=actor): leave it out here.')
        if known.only_in == 'local' and mode == 'train' and config.cluster.is_job:
            if config.is_learner and config.policy_acts:
                continue
            raise ConfigError(
                f'{text} is for runs on one machine and for learners with --inference=learner: '
                'leave it out.'
            )
    if mode == 'train' and config.cluster.task < 0:
        for name in {'learner_address', 'learner_addresses'} & changed.keys():
            raise ConfigError(
                f'{shown(name, config.value(name))} is for distributed jobs, which have a number: '
                'give --task=0, for instance, too, or leave it out to train on this machine alone.'
            )
        if 'job_name' in names and 'task' not in names:
            raise ConfigError(
                '--job_name=learner needs --task=0 for actor jobs to find it: give that, too, or '
                'leave it out to train on this machine alone.'
            )


def describe_changes(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Returns lines for the user about the settings that a resumed run changes.

    Args:
      stored: name -> earlier value, from `parse_stored`.
      config: of the resumed run.
    """
    changes, on_resume = [], set()
    for name, known in _stored():
        old, new = _plain(stored[name]), _plain(config.value(name))
        if old != new and known.setting.on_resume != 'free':
            changes.append(f'--{name} was {_value_text(old)} and is now {_value_text(new)}')
            on_resume.add(known.setting.on_resume)
    lines = [f'Changed flags: {", ".join(changes)}.'] if changes else []
    if 'schedule' in on_resume:
        lines.append(
            'Learning rate and entropy cost are from now on what they would be at this frame if '
            'the run had begun with the new flags.'
        )
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, list):
        value = ','.join(value)
    return 'not given' if value in (None, '') else str(value)


def store_flags(config: Config, report: Callable[[str], None]) -> None:
    """Writes the flag file of a run; reports first which flags a resumed run changes.

    Args:
      config: of the run.
      report: takes lines for the user.

    Raises:
      LogdirError: the file cannot be written.
    """
    path = os.path.join(config.run.logdir, FLAG_FILE)
    if checkpoint_paths(config.run.logdir):
        try:
            lines = describe_changes(parse_stored(read(path)), config)
        except FlagFileError as error:
            lines = [f'WARNING: {error} So changes of flags cannot be shown.']
        for line in lines:
            report(line)
    write_atomically(path, to_text(config))
