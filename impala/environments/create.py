"""Level name -> environment, of whatever kind."""

import contextlib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from impala.config import EnvironmentConfig
from impala.environments import checked_environment
from impala.environments.atari import AtariEnvironment, AtariGame, atari_game
from impala.environments.deepmind_lab import DeepMindLabEnvironment
from impala.environments.environment import Environment
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.environments.level_names import (
    import_registrations,
    is_gymnasium_id,
    missing_package,
    suggestion,
)
from impala.environments.registered_atari import (
    AlePyEnvironment,
    create_registered_atari_environment,
    is_atari,
    is_played_by_ale_py,
    is_registered_by_ale_py,
    options_of_ale_py,
)
from impala.environments.vizdoom import VizdoomEnvironment
from impala.errors import LevelError
from impala.user_code import (
    MISTAKES,
    UserCodeError,
    describe_failure,
    import_module,
    one_line,
)

_HOW_TO_NAME_ONES_OWN = (
    'write my_module:make for a callable, or my_module:MyGame-v0 for an id that the module '
    'registers with Gymnasium'
)

_MUJOCO = 'gymnasium.envs.mujoco.'

# Settings that apply to some kinds of levels only.
_OF_ATARI = ('atari_mode', 'atari_difficulty')
_OF_GYMNASIUM = ('env_kwargs', 'observation_keys', 'clip_actions', 'info_action_mask')
_OTHER_FLAGS = (
    'since Atari games and levels of DeepMind Lab have fixed observations, discrete actions and '
    'flags of their own'
)


def create_environment(
    level_name: str, seed: int, config: EnvironmentConfig | None = None
) -> Environment:
    """Makes the environment of a level.

    Args:
      level_name: see the top-level module `environments`.
      seed: in `[0, 2**31)`. It determines everything random in the environment: with the same
        actions, two environments with one seed play the same episodes.
      config: None for the defaults.

    Raises:
      LevelError: the level is unknown, its package is not installed, or the agent does not support
        its observation or action space.
      ValueError: the seed is out of range.
    """
    config = config or EnvironmentConfig()
    if not 0 <= seed < 2**31:
        raise ValueError(f'The seed must be in [0, 2**31), not {seed}.')
    if level_name.startswith('ALE/'):
        _refuse(level_name, config, _OF_GYMNASIUM, _OTHER_FLAGS)
        return AtariEnvironment(atari_game(level_name), seed, config)
    if is_gymnasium_id(level_name):
        return _create_gymnasium_environment(level_name, seed, config)
    if ':' in level_name:
        return _create_by_callable(level_name, seed, config)
    _refuse(level_name, config, _OF_GYMNASIUM, _OTHER_FLAGS)
    _refuse(level_name, config, _OF_ATARI, 'which is not an Atari game')
    _refuse(
        level_name,
        config,
        ('bootstrap_truncated',),
        'since DeepMind Lab does not say whether a time limit has ended an episode, and returns no '
        'last observation',
    )
    return DeepMindLabEnvironment(level_name, seed, config)


def _refuse(
    level_name: str, config: EnvironmentConfig, settings: Iterable[str], reason: str
) -> None:
    """Rejects settings that have no effect on a level.

    Args:
      level_name: of the level.
      config: of the environments.
      settings: names of those without an effect.
      reason: follows the level's name in the sentence.

    Raises:
      LevelError: one of them has not its default.
    """
    for name in settings:
        value = getattr(config, name)
        if value != getattr(EnvironmentConfig, name):
            text = ','.join(value) if isinstance(value, tuple) else value
            flag = f'--{name}' if value is True else f'--{name}={text}'
            raise LevelError(f'{flag} has no effect on {level_name!r}, {reason}.')


def _import_module(level_name: str, module_name: str) -> Any:
    if not module_name:
        raise LevelError(
            f'{level_name!r} names no Python module in front of its colon: {_HOW_TO_NAME_ONES_OWN}.'
        )
    try:
        return import_module(module_name)
    except UserCodeError as error:
        raise LevelError(f'{level_name!r} cannot be made: {error}.') from error


def _create_by_callable(level_name: str, seed: int, config: EnvironmentConfig) -> Environment:
    module_name, _, attribute = level_name.partition(':')
    if not attribute:
        raise LevelError(f'{level_name!r} names nothing after its colon: {_HOW_TO_NAME_ONES_OWN}.')
    make: Any = getattr(_import_module(level_name, module_name), attribute, None)
    gymnasium = sys.modules.get('gymnasium')
    is_env = gymnasium is not None and isinstance(make, type) and issubclass(make, gymnasium.Env)
    if make is None or is_env:
        registry = gymnasium.registry if gymnasium else {}
        if attribute in registry:
            return _create_gymnasium_environment(level_name, seed, config)
        versions = [each for each in registry if each.rpartition('-v')[0] == attribute]
        if versions:
            raise LevelError(
                f'{level_name!r} lacks the version of a Gymnasium id: did you mean '
                f"'{module_name}:{versions[-1]}'?"
            )
        if is_env:
            raise LevelError(
                f'{level_name!r} is a gymnasium.Env, which is played by an id that it is '
                f"registered with, for instance '{module_name}:{attribute}-v0'."
            )
        raise LevelError(
            f'{level_name!r} asks for {attribute!r}, which the Python module {module_name!r} lacks.'
        )
    checked_environment.check_callable(level_name, make, config.kwargs)
    _log_warnings_of_mujoco()
    try:
        environment = make(seed, config, **config.kwargs)
    except MISTAKES as error:
        raise LevelError(f'{level_name!r} cannot be made: {describe_failure(error)}.') from error
    gymnasium = sys.modules.get('gymnasium')
    if gymnasium is not None and isinstance(environment, gymnasium.Env):
        repeats = config.num_action_repeats or 1
        return GymnasiumEnvironment(level_name, environment, repeats, seed, config)
    if gymnasium is not None and isinstance(environment, gymnasium.vector.VectorEnv):
        environment.close()
        raise LevelError(
            f'{level_name!r} returned {type(environment).__name__}, a vector environment of '
            'Gymnasium: return one environment, since actors are made for each.'
        )
    return checked_environment.checked(level_name, environment)


def _create_gymnasium_environment(
    level_name: str, seed: int, config: EnvironmentConfig
) -> Environment:
    import gymnasium

    module, colon, plain_id = level_name.rpartition(':')
    if colon:
        _import_module(level_name, module)
    elif plain_id not in gymnasium.registry:
        import_registrations(plain_id)
    if plain_id not in gymnasium.registry:
        raise LevelError(
            f'Gymnasium has no {plain_id!r}.{suggestion(plain_id, f"{module}:" if module else "")}'
        )

    registered = gymnasium.registry[plain_id]
    if is_atari(registered.entry_point):
        return _create_gymnasium_atari_environment(level_name, registered, seed, config)
    _refuse(level_name, config, _OF_ATARI, 'which is not an Atari game')
    is_vizdoom = str(registered.entry_point).startswith('vizdoom.')
    default_repeats = (registered.kwargs | config.kwargs).get('frame_skip', 4) if is_vizdoom else 1
    repeats = config.num_action_repeats or default_repeats
    # ViZDoom repeats actions by itself and renders only the last frame.
    options = config.kwargs | ({'frame_skip': repeats} if is_vizdoom else {})
    env = _make(level_name, plain_id, options, config)
    if is_vizdoom:
        return VizdoomEnvironment(level_name, env, repeats, seed, config)
    return GymnasiumEnvironment(level_name, env, repeats, seed, config)


def _create_gymnasium_atari_environment(
    level_name: str, registered: Any, seed: int, config: EnvironmentConfig
) -> Environment:
    if is_played_by_ale_py(registered):
        _refuse(level_name, config, ('env_kwargs',), _OTHER_FLAGS)
        options, repeats = options_of_ale_py(level_name, registered, config)
        env = _make(level_name, registered.id, options, config)
        return AlePyEnvironment(level_name, env, repeats, seed, config)
    _refuse(level_name, config, _OF_GYMNASIUM, _OTHER_FLAGS)
    if is_registered_by_ale_py(registered):
        return AtariEnvironment(AtariGame(registered.kwargs['game']), seed, config)
    return create_registered_atari_environment(level_name, registered, seed, config)


def _make(
    level_name: str, plain_id: str, options: dict[str, Any], config: EnvironmentConfig
) -> Any:
    """Returns `gymnasium.make` of an id, able to draw if `config.render` asks for it."""
    import gymnasium

    entry_point = gymnasium.registry[plain_id].entry_point
    if str(entry_point).startswith(_MUJOCO):
        with contextlib.suppress(ImportError):
            importlib.import_module('mujoco')
    _log_warnings_of_mujoco()
    if config.render:
        options = options | {'render_mode': 'rgb_array'}
    try:
        try:
            return gymnasium.make(plain_id, disable_env_checker=True, **options)
        except TypeError:
            if not config.render:
                raise
            # It cannot draw and rejects the argument.
            del options['render_mode']
            return gymnasium.make(plain_id, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        is_missing = isinstance(error, gymnasium.error.DependencyNotInstalled)
        if is_missing and str(entry_point).startswith(_MUJOCO):
            cause = error.__cause__ or error
            raise missing_package(level_name, 'mujoco', cause, 'mujoco') from error
        raise LevelError(f'{level_name!r} cannot be made: {one_line(error)}') from error
    except MISTAKES as error:
        kwargs = gymnasium.registry[plain_id].kwargs | options
        # Its own arguments do not reach the environment.
        for name in inspect.signature(gymnasium.make).parameters:
            kwargs.pop(name, None)
        why = _rejection(entry_point, kwargs) or describe_failure(error)
        raise LevelError(f'{level_name!r} cannot be made: {why}.') from error


def _log_warnings_of_mujoco() -> None:
    """Makes warnings of MuJoCo, if it is imported, those of this module.

    Otherwise every actor would print them and append them to a file in the current folder.
    """
    mujoco = sys.modules.get('mujoco')
    if mujoco is not None:
        mujoco.set_mju_user_warning(logging.getLogger(__name__).warning)


def _rejection(entry_point: Any, kwargs: Mapping[str, Any]) -> str:
    """Says why an entry point of Gymnasium does not take keyword arguments; '' if it does."""
    from gymnasium.envs.registration import load_env_creator

    try:
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        signature = inspect.signature(creator)
    except (*MISTAKES, ValueError):
        return ''
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        name = getattr(creator, '__qualname__', repr(creator))
        place = ''
        with contextlib.suppress(TypeError):
            place = f' ({os.path.basename(inspect.getfile(creator))})'
        return f'{name}{place} does not take its keyword arguments: {one_line(error)}'
    return ''
