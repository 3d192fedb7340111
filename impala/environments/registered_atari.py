"""Atari games under ids that users registered with Gymnasium."""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

from impala.config import EnvironmentConfig
from impala.environments.atari import (
    ATARI_MAX_EPISODE_FRAMES,
    AtariEnvironment,
    AtariGame,
    atari_roms,
    load_ale,
    load_game,
)
from impala.environments.environment import SUITE_FRAMES_PER_SECOND, Observation
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.errors import LevelError
from impala.trajectory import EpisodeEnd


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


def is_played_by_ale_py(registered: Any) -> bool:
    """Returns whether an id has observations or actions that the preprocessing does not provide.

    Then it is played as ale_py's own environment plays it.
    """
    kwargs = registered.kwargs
    return (
        kwargs.get('obs_type', 'grayscale') != 'grayscale'
        or bool(kwargs.get('continuous'))
        or bool(kwargs.get('sound_obs'))
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
    settings = _Settings(level_name, registered)
    rom, frameskip = settings.take_rom(), settings.take_frameskip()
    max_frames = settings.take(
        'max_num_frames_per_episode',
        ATARI_MAX_EPISODE_FRAMES,
        lambda n: n is None or _is_whole(n, 0),
        'which is not a valid number of frames',
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
        raise _cannot_be_played(level_name, error) from error


def options_of_ale_py(
    level_name: str, registered: Any, config: EnvironmentConfig
) -> tuple[dict[str, Any], int]:
    """Returns how to make the environment of an id for which `is_played_by_ale_py` is true.

    Args:
      level_name: for error messages.
      registered: Gymnasium's `EnvSpec` of the id.
      config: its settings take precedence over the registration.

    Returns:
      The keyword arguments of `gymnasium.make`, and the frames per action.

    Raises:
      LevelError: the registration is not supported, or a setting has no effect on it.
    """
    for name in ('end_episode_on_life_loss', 'max_noops', 'frames_per_noop', 'frame_stack'):
        if getattr(config, name) != getattr(EnvironmentConfig, name):
            raise LevelError(
                f'--{name}={getattr(config, name)} has no effect on {level_name!r}, which is '
                'registered with other observations or actions than those of the preprocessing of '
                'Atari games, so ale_py plays it without that.'
            )
    settings = _Settings(level_name, registered)
    rom, frameskip = settings.take_rom(), settings.take_frameskip()
    mode, difficulty = settings.take('mode', None), settings.take('difficulty', None)
    library, rom_folder = load_ale()
    library.ALEInterface.setLoggerMode(library.LoggerMode.Error)
    for name in ('repeat_action_probability', 'full_action_space', 'max_num_frames_per_episode'):
        settings.take(name, None)
    settings.check_the_rest()
    try:
        load_game(library.ALEInterface(), rom_folder, AtariGame(rom, mode, difficulty), config)
    except LevelError as error:
        raise _cannot_be_played(level_name, error) from error

    repeats = config.num_action_repeats or frameskip
    options = {
        'mode': config.atari_mode,
        'difficulty': config.atari_difficulty,
        'repeat_action_probability': config.sticky_actions or None,
        'full_action_space': config.full_action_set or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    options['frameskip'] = repeats
    if registered.max_episode_steps:
        # The limit is in steps of the registered number of frames.
        options['max_episode_steps'] = -(-registered.max_episode_steps * frameskip // repeats)
    return options, repeats


class AlePyEnvironment(GymnasiumEnvironment):
    """An Atari game as ale_py's own environment plays it: with its pictures, memory or actions."""

    def __init__(
        self, level_name: str, env: Any, repeats: int, seed: int, config: EnvironmentConfig
    ) -> None:
        """Takes over an environment made with `options_of_ale_py`.

        Args, Raises: see `GymnasiumEnvironment`.
        """
        super().__init__(level_name, env, repeats, seed, config)
        self._ale = env.unwrapped.ale
        # The environment repeats actions by itself.
        self._repeats = 1

    @property
    def frames_per_second(self) -> float | None:
        # The metadata have 30, whatever the frames per step.
        return SUITE_FRAMES_PER_SECOND

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        self._first_frame = self._ale.getEpisodeFrameNumber()
        return super().step(action)

    def _end(self, terminated: bool, truncated: bool) -> EpisodeEnd:
        self.last_action_frames = self._ale.getEpisodeFrameNumber() - self._first_frame
        return super()._end(terminated, truncated)


def _cannot_be_played(level_name: str, error: LevelError) -> LevelError:
    return LevelError(f'{level_name!r} cannot be played: {error}')


class _Settings:
    """The keyword arguments of a registration, read one after another."""

    def __init__(self, level_name: str, registered: Any) -> None:
        if registered.additional_wrappers:
            raise LevelError(
                f'{level_name!r} is registered with the wrapper '
                f'{registered.additional_wrappers[0].name}, and Atari games are played without: to '
                'have one, register a function that makes and wraps the environment.'
            )
        self._level_name = level_name
        self._left = dict(registered.kwargs)

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
            why = f'which is not one of the {len(roms)} games, such as {known}'
            raise self._error('game', game, why)
        return game

    def take_frameskip(self) -> int:
        """Returns the frames per step.

        Raises:
          LevelError: it is not a fixed number.
        """
        return self.take(
            'frameskip',
            4,
            lambda n: _is_whole(n, 1),
            'and an action lasts a fixed number of frames here',
        )

    def check_the_rest(self) -> None:
        """Checks the settings that were not taken.

        Raises:
          LevelError: one of them is not supported.
        """
        known = ('obs_type', 'continuous', 'continuous_action_threshold', 'sound_obs')
        for name, value in self._left.items():
            if name == 'render_mode' and value not in (None, 'rgb_array'):
                raise self._error(name, value, 'and actors open no window')
            if name not in (*known, 'render_mode'):
                raise self._error(name, value, 'which is not a setting of ale_py.AtariEnv')

    def _error(self, name: str, value: Any, why: str) -> LevelError:
        return LevelError(f'{self._level_name!r} is registered with {name}={value!r}, {why}.')


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
