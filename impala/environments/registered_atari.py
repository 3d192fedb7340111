"""Atari games under ids that users registered with Gymnasium."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from impala.config import EnvironmentConfig
from impala.environments.atari import (
    ATARI_MAX_EPISODE_FRAMES,
    AtariEnvironment,
    AtariGame,
    atari_roms,
)
from impala.errors import LevelError


def is_atari(entry_point: Any) -> bool:
    """Returns whether an entry point of Gymnasium, a class or its name, is ale_py's `AtariEnv`."""
    if not isinstance(entry_point, str):
        module, name = (getattr(entry_point, each, '') for each in ('__module__', '__qualname__'))
        entry_point = f'{module}:{name}'
    return re.fullmatch(r'ale_py(\.[\w.]+)?:AtariEnv', entry_point) is not None


def is_registered_by_ale_py(registered: Any) -> bool:
    """Returns whether ale_py itself registered an id; then only the game of the id counts."""
    settings = dict(registered.kwargs)
    name = str(settings.pop('game', '')).title().replace('_', '')
    return (
        registered.max_episode_steps is None
        and not registered.additional_wrappers
        and (registered.id, settings)
        in [
            (
                identifier,
                {
                    'repeat_action_probability': sticky,
                    'full_action_space': False,
                    'frameskip': frameskip,
                    'max_num_frames_per_episode': ATARI_MAX_EPISODE_FRAMES,
                },
            )
            for identifier, sticky, frameskip in (
                (f'ALE/{name}-v5', 0.25, 4),
                (f'{name}-v0', 0.25, (2, 5)),
                (f'{name}-v4', 0.0, (2, 5)),
                (f'{name}NoFrameskip-v0', 0.25, 1),
                (f'{name}NoFrameskip-v4', 0.0, 1),
            )
        ]
    )


def create_registered_atari_environment(
    level_name: str, registered: Any, seed: int, config: EnvironmentConfig
) -> AtariEnvironment:
    """Creates the game of an id that a user registered for `ale_py.AtariEnv`.

    Flags take precedence over the registration. A `frameskip` of 1 leaves it to the preprocessing
    to repeat actions, as in Gymnasium's `AtariPreprocessing`, which accepts nothing else. The id
    may limit an episode in steps and in frames: the shorter limit applies.

    Args:
      level_name: for error messages.
      registered: Gymnasium's `EnvSpec` of the id.
      seed: see `create_environment`.
      config: see `EnvironmentConfig`.

    Raises:
      LevelError: the preprocessing of Atari games does not support the registration.
    """
    if registered.additional_wrappers:
        raise LevelError(
            f'{level_name!r} is registered with the wrapper '
            f'{registered.additional_wrappers[0].name}, and the preprocessing of Atari games is '
            'fixed: to have another, register a function that makes and wraps the environment.'
        )
    settings = _Settings(level_name, registered.kwargs)
    rom = settings.take_rom()
    frameskip = settings.take(
        'frameskip',
        4,
        lambda n: _is_whole(n, 1),
        'and an action lasts a fixed number of frames here',
    )
    max_frames = settings.take(
        'max_num_frames_per_episode',
        ATARI_MAX_EPISODE_FRAMES,
        lambda n: n is None or _is_whole(n, 0),
        'which is no number of frames',
    )
    sticky_actions = settings.take(
        'repeat_action_probability',
        0.0,
        lambda p: isinstance(p, int | float) and 0 <= p < 1,
        'which is not in [0, 1)',
    )
    full_action_set = settings.take('full_action_space', False)
    mode, difficulty = settings.take('mode', None), settings.take('difficulty', None)
    settings.check_the_rest()

    limits = [max_frames, (registered.max_episode_steps or 0) * frameskip]
    game = AtariGame(rom, mode, difficulty, min(filter(None, limits), default=0))
    config = dataclasses.replace(
        config,
        num_action_repeats=config.num_action_repeats or (frameskip if frameskip > 1 else None),
        sticky_actions=config.sticky_actions or sticky_actions,
        full_action_set=config.full_action_set or bool(full_action_set),
    )
    try:
        return AtariEnvironment(game, seed, config)
    except LevelError as error:
        raise LevelError(f'{level_name!r} cannot be played: {error}') from error


class _Settings:
    """The keyword arguments of a registration, read one after another."""

    def __init__(self, level_name: str, kwargs: Mapping[str, Any]) -> None:
        self._level_name = level_name
        self._left = dict(kwargs)

    def take(
        self,
        name: str,
        default: Any,
        is_right: Callable[[Any], bool] = lambda value: True,
        why_wrong: str = '',
    ) -> Any:
        """Returns a setting.

        Args:
          name: of the setting.
          default: returned if the registration leaves the setting out.
          is_right: whether a value is supported.
          why_wrong: ends the sentence about a value that is not.

        Raises:
          LevelError: the value is not supported.
        """
        value = self._left.pop(name, default)
        if not is_right(value):
            raise self._error(name, value, why_wrong)
        return value

    def take_rom(self) -> str:
        """Returns the name of the game's ROM.

        Raises:
          LevelError: the registration has no game, or no game has this name.
        """
        if 'game' not in self._left:
            raise LevelError(
                f'{self._level_name!r} names no game: register it with, for instance, '
                "kwargs={'game': 'pong'}."
            )
        roms = atari_roms()
        game = self._left.pop('game')
        if game not in roms:
            close = difflib.get_close_matches(str(game), roms, n=3, cutoff=0.6)
            known = ', '.join(map(repr, close or ('pong', 'breakout', 'space_invaders')))
            why = f'which is none of the {len(roms)} games, such as {known}'
            raise self._error('game', game, why)
        return game

    def check_the_rest(self) -> None:
        """Checks the settings that were not taken.

        Raises:
          LevelError: the preprocessing does not support one of them.
        """
        played = {
            'obs_type': ('grayscale',),
            'continuous': (False,),
            'continuous_action_threshold': (self._left.get('continuous_action_threshold'),),
            'sound_obs': (False,),
            'render_mode': (None, 'rgb_array'),
        }
        for name, value in self._left.items():
            if value not in played.get(name, ()):
                raise self._error(
                    name,
                    value,
                    'and Atari games are played in grey pictures, with discrete actions and '
                    'without sound or other settings',
                )

    def _error(self, name: str, value: Any, why: str) -> LevelError:
        return LevelError(f'{self._level_name!r} is registered with {name}={value!r}, {why}.')


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
