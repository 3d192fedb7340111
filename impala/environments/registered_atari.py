"""Atari games by the ids that somebody registered with Gymnasium."""

import dataclasses
import difflib
import os
import re
from typing import Any

from impala.environments.atari import ATARI_MAX_EPISODE_FRAMES, AtariEnvironment, load_ale
from impala.environments.environment import EnvironmentConfig
from impala.errors import LevelError


def is_atari(entry_point: Any) -> bool:
    """Returns whether Gymnasium's entry point, a class or its name, is that of ale_py's games."""
    if not isinstance(entry_point, str):
        module, name = (getattr(entry_point, each, '') for each in ('__module__', '__qualname__'))
        entry_point = f'{module}:{name}'
    return re.fullmatch(r'ale_py(\.[\w.]+)?:AtariEnv', entry_point) is not None


def is_registered_by_ale_py(registered: Any) -> bool:
    """Returns whether a registration is the package's own, of which only the game counts."""
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
    """Makes the game of an id that somebody registered for `ale_py.AtariEnv`, as the id says.

    What flags say comes first. A `frameskip` of 1 leaves it to the preprocessing to repeat actions,
    as for Gymnasium's `AtariPreprocessing`, which takes no other. Of the limits on an episode, one
    in steps of the id and one in frames, the shorter one counts.
    """
    settings = dict(registered.kwargs)

    def refuse(name: str, value: Any, why: str) -> LevelError:
        return LevelError(f'{level_name!r} is registered with {name}={value!r}, {why}.')

    def is_whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if registered.additional_wrappers:
        raise LevelError(
            f'{level_name!r} is registered with the wrapper '
            f'{registered.additional_wrappers[0].name}, and the preprocessing of Atari games is '
            'fixed: to have another, register a function that makes and wraps the environment.'
        )
    if 'game' not in settings:
        raise LevelError(
            f"{level_name!r} names no game: register it with, for instance, kwargs={{'game': "
            "'pong'}."
        )
    game = settings.pop('game')
    _, rom_folder = load_ale()
    roms = sorted(file[:-4] for file in os.listdir(rom_folder) if file.endswith('.bin'))
    if game not in roms:
        close = difflib.get_close_matches(str(game), roms, n=3, cutoff=0.6)
        known = ', '.join(map(repr, close or ('pong', 'breakout', 'space_invaders')))
        raise refuse('game', game, f'which is none of the {len(roms)} games, such as {known}')

    frameskip = settings.pop('frameskip', 4)
    if not is_whole(frameskip, 1):
        raise refuse('frameskip', frameskip, 'and an action lasts a fixed number of frames here')
    max_frames = settings.pop('max_num_frames_per_episode', ATARI_MAX_EPISODE_FRAMES)
    if max_frames is not None and not is_whole(max_frames, 0):
        raise refuse('max_num_frames_per_episode', max_frames, 'which is no number of frames')
    repeats = frameskip if frameskip > 1 else None
    limits = [max_frames, (registered.max_episode_steps or 0) * frameskip]
    sticky = settings.pop('repeat_action_probability', 0.0)
    if not (isinstance(sticky, int | float) and 0 <= sticky < 1):
        raise refuse('repeat_action_probability', sticky, 'which is not in [0, 1)')
    full_action_set = settings.pop('full_action_space', False)
    levels = {name: settings.pop(name, None) for name in ('mode', 'difficulty')}

    played = {
        'obs_type': ('grayscale',),
        'continuous': (False,),
        'continuous_action_threshold': (settings.get('continuous_action_threshold'),),
        'sound_obs': (False,),
        'render_mode': (None, 'rgb_array'),
    }
    for name, value in settings.items():
        if value not in played.get(name, ()):
            raise refuse(
                name,
                value,
                'and Atari games are played in grey pictures, with discrete actions and without '
                'sound or other settings',
            )
    try:
        return AtariEnvironment(
            game,
            seed,
            dataclasses.replace(
                config,
                num_action_repeats=config.num_action_repeats or repeats,
                sticky_actions=config.sticky_actions or sticky,
                full_action_set=config.full_action_set or bool(full_action_set),
            ),
            levels['mode'],
            levels['difficulty'],
            min(filter(None, limits), default=0),
        )
    except LevelError as error:
        raise LevelError(f'{level_name!r} cannot be played: {error}') from error
