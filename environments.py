"""Level name -> environment, behind one small interface.

`create_environment` understands four kinds of names:

* `ALE/Pong-v5` (and the older Gymnasium ids of Atari games, `PongNoFrameskip-v4`): an Atari game
  with the preprocessing of the paper (Table G.1): 84x84 grey, every action repeated 4 times, the
  maximum of the last two frames, a stack of 4, up to 30 no-ops, a limit of 108,000 frames. The
  id selects the game only; everything else comes from `EnvironmentConfig`. An id of one's own for
  such a game also has what else it was registered with.
* any other Gymnasium id (`CartPole-v1`, `VizdoomBasic-v1`, `BabyAI-GoToRedBall-v0`); an id that is
  registered by a module of one's own is written as for Gymnasium, `my_package:MyGame-v0`.
* `my_package.my_module:make`: a callable of one's own, called with `(seed, config)`, that returns
  an `Environment`. It is the way to bring an environment without Gymnasium.
* a DeepMind Lab level: one of DMLab-30 by its bare name (`explore_goal_locations_small`), any other
  by its full one (`contributed/dmlab30/...`, `tests/...`, `seekavoid_arena_01`).

Actor processes import this module, and there are many of them: it never imports TensorFlow, and
every package is imported only when a level needs it.
"""

import abc
import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from impala.trajectory import INSTRUCTION_BUCKETS, ArraySpec, EnvironmentSpec, EpisodeEnd

INSTRUCTION_LENGTH = 32

# Width and height. Atari's is that of the paper's Table G.1.
_DEFAULT_SIZE = (96, 72)
_DEFAULT_ATARI_SIZE = (84, 84)
ATARI_MAX_EPISODE_FRAMES = 108_000
# Of Atari's games and of DeepMind Lab.
SUITE_FRAMES_PER_SECOND = 60.0
ATARI_NUM_ACTIONS = 18
# The ids that `ale_py` itself leaves out: their cartridges have no single-player game.
ATARI_MULTI_PLAYER_ONLY = frozenset({'combat', 'joust', 'maze_craze', 'warlords'})

DMLAB30_LEVELS = frozenset(
    {
        'rooms_collect_good_objects_train',
        'rooms_collect_good_objects_test',
        'rooms_exploit_deferred_effects_train',
        'rooms_exploit_deferred_effects_test',
        'rooms_select_nonmatching_object',
        'rooms_watermaze',
        'rooms_keys_doors_puzzle',
        'language_select_described_object',
        'language_select_located_object',
        'language_execute_random_task',
        'language_answer_quantitative_question',
        'lasertag_one_opponent_small',
        'lasertag_three_opponents_small',
        'lasertag_one_opponent_large',
        'lasertag_three_opponents_large',
        'natlab_fixed_large_map',
        'natlab_varying_map_regrowth',
        'natlab_varying_map_randomized',
        'skymaze_irreversible_path_hard',
        'skymaze_irreversible_path_varied',
        'psychlab_arbitrary_visuomotor_mapping',
        'psychlab_continuous_recognition',
        'psychlab_sequential_comparison',
        'psychlab_visual_search',
        'explore_object_locations_small',
        'explore_object_locations_large',
        'explore_obstructed_goals_small',
        'explore_obstructed_goals_large',
        'explore_goal_locations_small',
        'explore_goal_locations_large',
        'explore_object_rewards_few',
        'explore_object_rewards_many',
    }
)
# They show the Brady-Konkle-Oliva images, which do not come with DeepMind Lab.
DMLAB_IMAGE_LEVELS = frozenset(
    {'psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition'}
)
DMLAB_IMAGE_FOLDER = 'brady_konkle_oliva2008'
# The seed with which the paper's released agent was tested, unlike those of training.
DEEPMIND_LAB_TEST_MIXER_SEED = 0x600D5EED
# Look left-right and down-up (pixels per frame), strafe left-right, move back-forward, fire, jump,
# crouch.
DEEPMIND_LAB_ACTIONS = (
    (0, 0, 0, 1, 0, 0, 0),  # forward
    (0, 0, 0, -1, 0, 0, 0),  # backward
    (0, 0, -1, 0, 0, 0, 0),  # strafe left
    (0, 0, 1, 0, 0, 0, 0),  # strafe right
    (-20, 0, 0, 0, 0, 0, 0),  # look left
    (20, 0, 0, 0, 0, 0, 0),  # look right
    (-20, 0, 0, 1, 0, 0, 0),  # look left and forward
    (20, 0, 0, 1, 0, 0, 0),  # look right and forward
    (0, 0, 0, 0, 1, 0, 0),  # fire
)
DEEPMIND_LAB_BUILD_GUIDE = 'https://github.com/google-deepmind/lab/blob/master/docs/users/build.md'

# Of the level cache: beside a map, of files that are being written, and of a run's statistics.
_SECONDS = '.seconds'
_TEMPORARY = 'impala_map_'
_STATISTICS = 'level_cache_'
_ABANDONED_SECONDS = 3600.0

Observation = dict[str, np.ndarray]


class LevelError(Exception):
    """A level that cannot be played; its text is one sentence for the user, and one line."""

    def __str__(self) -> str:
        return ' '.join(super().__str__().split())


class DeclarationError(LevelError):
    """What an environment returned is not what it declared; the text says both in one sentence.

    At the first reset the level cannot be played. Later it is a failure of that one environment,
    since thousands of steps were as declared.
    """


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """What shapes an environment besides its level and seed; `dataclasses.asdict` is its JSON form.

    Attributes:
      width: of the frames of DeepMind Lab, of Atari and of resized images, pixels. The default of
        both is 84x84 for Atari; pictures of MiniGrid have their own size whatever it says.
      height: see `width`.
      num_action_repeats: frames per agent step; None is 4 for Atari, DeepMind Lab and VizDoom and 1
        for everything else.
      full_action_set: Atari: all 18 actions, not the game's minimal set.
      sticky_actions: Atari: probability that a frame repeats the action of the one before
        (Machado et al., 2018, use .25).
      end_episode_on_life_loss: Atari: report a lost life as `EpisodeEnd.LIFE_LOST`.
      max_noops: Atari: an episode starts with 1 to this many no-ops, uniformly; 0 for none.
      frames_per_noop: Atari: 1 as in DQN's released code and Gymnasium; as many as action repeats
        make a no-op an action of the agent, as in DQN's text (Mnih et al., 2015).
      frame_stack: Atari: number of frames in the stack, the newest last.
      dataset_path: DeepMind Lab: folder with the Brady-Konkle-Oliva images that two levels need.
      level_cache_dir: DeepMind Lab: folder of compiled maps, shared by all processes; None compiles
        every map anew, which takes seconds at each episode.
      level_cache_gb: what these maps may have in all, in units of 1e9 bytes.
      temp_folder: existing folder for what an environment writes; None is the system's. A killed
        process leaves its files there, so a parent does well to remove it.
      is_test: DeepMind Lab: allow the hold-out levels, which are for testing only, and take the
        mixer seed of tests.
      render: `Environment.render` will be called.
    """

    width: int = _DEFAULT_SIZE[0]
    height: int = _DEFAULT_SIZE[1]
    num_action_repeats: int | None = None
    full_action_set: bool = False
    sticky_actions: float = 0.0
    end_episode_on_life_loss: bool = False
    max_noops: int = 30
    frames_per_noop: int = 1
    frame_stack: int = 4
    dataset_path: str = ''
    level_cache_dir: str | None = None
    level_cache_gb: float = 10.0
    temp_folder: str | None = None
    is_test: bool = False
    render: bool = False

    def __post_init__(self) -> None:
        for name in ('width', 'height', 'frame_stack', 'frames_per_noop'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}.')
        if self.num_action_repeats is not None and self.num_action_repeats < 1:
            raise ValueError(
                f'num_action_repeats must be at least 1, not {self.num_action_repeats}.'
            )
        if not 0 <= self.sticky_actions < 1:
            raise ValueError(f'sticky_actions must be in [0, 1), not {self.sticky_actions}.')
        if self.max_noops < 0:
            raise ValueError(f'max_noops must not be negative, but is {self.max_noops}.')


class Environment(abc.ABC):
    """One level, played over and over.

    Observations are dicts of C-contiguous arrays with exactly the shapes and dtypes of
    `spec.observation`. They may be buffers that the next call overwrites: the caller copies.
    """

    spec: EnvironmentSpec
    # How many frames the last action lasted, asked for where it has TERMINATED or TRUNCATED the
    # episode, which may cut it short. None for `spec.num_action_repeats`.
    last_action_frames: int | None = None

    @property
    def frames_per_second(self) -> float | None:
        """Frames of a second of play at its natural speed; None if there is no such speed."""
        return None

    @abc.abstractmethod
    def reset(self) -> Observation:
        """Starts an episode and returns its first observation."""

    @abc.abstractmethod
    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        """Acts for `spec.num_action_repeats` frames, or until the episode ends.

        Args:
          action: in `[0, spec.num_actions)`.

        Returns:
          The reward summed over those frames, unclipped; how the episode ended, if it did; and the
          observation. An episode that ends is reset in the same step: where the end is TERMINATED
          or TRUNCATED, the observation is the first one of the next episode. After LIFE_LOST the
          game goes on.
        """

    def seed_next(self, seed: int) -> bool:
        """Has the next `reset`, and with it the end of this episode, start from another seed.

        Args:
          seed: the next episode is the first one of an environment made with it.

        Returns:
          Whether that is possible; if not, a new environment has to be made.
        """
        return False

    def render(self) -> np.ndarray | None:
        """Returns what a person would see now, uint8 RGB `[H, W, 3]`; None if there is nothing.

        Needs `EnvironmentConfig.render`.
        """
        return None

    def check(self) -> None:  # noqa: B027
        """Finds out what keeps the level from being played, where making it does not.

        Raises:
          LevelError: it cannot be played.
        """

    def close(self) -> None:  # noqa: B027
        """Frees what the environment holds. May be called twice; nothing else may follow."""


def create_environment(
    level_name: str, seed: int, config: EnvironmentConfig | None = None
) -> Environment:
    """Makes the environment of a level.

    Args:
      level_name: see the module's description.
      seed: in `[0, 2**31)`. It decides everything random in the environment: with the same actions,
        two environments made with one seed play the same episodes.
      config: None for the defaults.

    Raises:
      LevelError: the level is unknown, its package is not installed, or its observation or action
        space is one that the agent cannot be given.
      ValueError: the seed is out of range.
    """
    config = config or EnvironmentConfig()
    if not 0 <= seed < 2**31:
        raise ValueError(f'The seed must be in [0, 2**31), not {seed}.')
    if level_name.startswith('ALE/'):
        return AtariEnvironment(_atari_game(level_name), seed, config)
    if _is_gymnasium_id(level_name):
        return _create_gymnasium_environment(level_name, seed, config)
    if ':' in level_name:
        return _create_by_callable(level_name, seed, config)
    return DeepMindLabEnvironment(level_name, seed, config)


def hash_instruction(instruction: str) -> np.ndarray:
    """Hashes the words of an instruction, the same way in every process and on every machine.

    Args:
      instruction: words are its longest runs of letters and digits, in whatever case.

    Returns:
      int32 `[INSTRUCTION_LENGTH]`: a bucket in `[1, 999]` for each word, 0 behind the last one.
      Words beyond `INSTRUCTION_LENGTH` are dropped.
    """
    buckets = np.zeros(INSTRUCTION_LENGTH, np.int32)
    words = re.findall(r'[^\W_]+', instruction.lower())[:INSTRUCTION_LENGTH]
    for i, word in enumerate(words):
        buckets[i] = zlib.crc32(word.encode()) % (INSTRUCTION_BUCKETS - 1) + 1
    return buckets


class AtariEnvironment(Environment):
    """An Atari game, straight through the Arcade Learning Environment and OpenCV.

    Frames, rewards and no-ops are those of Gymnasium's `AtariPreprocessing` and
    `FrameStackObservation` for the same seed, at about half their cost. The stack of a new episode
    holds its first frame `frame_stack` times. FIRE is not pressed for the agent at a reset: the
    paper does not do it.
    """

    def __init__(
        self,
        game: str,
        seed: int,
        config: EnvironmentConfig,
        mode: int | None = None,
        difficulty: int | None = None,
        max_episode_frames: int | None = None,
    ) -> None:
        """Loads a game.

        Args:
          game: file name of the ROM without its ending, for instance `space_invaders`.
          seed: see `create_environment`.
          config: see `EnvironmentConfig`.
          mode: of the game, see Machado et al. (2018); None for its default.
          difficulty: see `mode`.
          max_episode_frames: an episode is truncated there; 0 for no limit, None for
            `ATARI_MAX_EPISODE_FRAMES`.

        Raises:
          LevelError: the game has no such mode or difficulty.
        """
        import cv2

        # With one environment a process there are more processes than cores already.
        cv2.setNumThreads(1)
        self._resize = functools.partial(cv2.resize, interpolation=cv2.INTER_AREA)

        library, rom_folder = _load_ale()
        library.ALEInterface.setLoggerMode(library.LoggerMode.Error)
        ale = library.ALEInterface()
        if max_episode_frames is None:
            max_episode_frames = ATARI_MAX_EPISODE_FRAMES
        ale.setInt('max_num_frames_per_episode', max_episode_frames)
        ale.setFloat('repeat_action_probability', config.sticky_actions)
        self._ale = ale
        self._rom = os.path.join(rom_folder, game + '.bin')
        self._mode, self._difficulty = mode, difficulty
        self._load(seed)
        self._next_seed: int | None = None

        # All 18 also where a game (Skiing) has no use for some: it takes those for no-ops.
        self._actions = list(range(ATARI_NUM_ACTIONS))
        if not config.full_action_set:
            self._actions = [action.value for action in ale.getMinimalActionSet()]
        self._max_noops = config.max_noops
        self._frames_per_noop = config.frames_per_noop
        self._lives_count = config.end_episode_on_life_loss
        self._lives = 0

        screen_shape = ale.getScreenDims()
        self._screen = np.zeros(screen_shape, np.uint8)
        self._previous_screen = np.zeros(screen_shape, np.uint8)
        self._size = (config.width, config.height)
        if self._size == _DEFAULT_SIZE:
            self._size = _DEFAULT_ATARI_SIZE
        width, height = self._size
        self._small = np.zeros((height, width), np.uint8)
        self._stack = np.zeros((height, width, config.frame_stack), np.uint8)
        self._newest = self._stack[..., -1]
        # Moving the whole stack one byte forward moves each channel of each pixel to the channel
        # before. Only the newest channel is wrong then, and that is the one to be written.
        self._shifted_from = self._stack.reshape(-1)[1:]
        self._shifted_to = self._stack.reshape(-1)[:-1]
        self._observation = {'frame': self._stack}

        repeats = config.num_action_repeats or 4
        self._unseen_frames = range(max(repeats - 2, 0))
        self._pool_two_frames = repeats > 1
        self.spec = EnvironmentSpec(
            {'frame': ArraySpec((height, width, config.frame_stack), 'uint8')},
            len(self._actions),
            repeats,
            'atari',
        )

    def _load(self, seed: int) -> None:
        # The derivation of both seeds is that of ale_py's own Gymnasium environment.
        noop_seed, ale_seed = np.random.SeedSequence(seed).generate_state(2)
        self._noop_random = np.random.default_rng(int(noop_seed))
        self._ale.setInt('random_seed', int(ale_seed.astype(np.int32)))
        self._ale.loadROM(self._rom)
        ale = self._ale
        for name, value, set_value, available in (
            ('mode', self._mode, ale.setMode, ale.getAvailableModes),
            ('difficulty', self._difficulty, ale.setDifficulty, ale.getAvailableDifficulties),
        ):
            if value is not None:
                if value not in available():
                    raise LevelError(
                        f'{os.path.basename(self._rom)[:-4]!r} has no {name} {value!r}, but '
                        f'{", ".join(map(str, available()))}.'
                    )
                set_value(value)

    def seed_next(self, seed: int) -> bool:
        self._next_seed = seed
        return True

    @property
    def frames_per_second(self) -> float | None:
        return SUITE_FRAMES_PER_SECOND

    def render(self) -> np.ndarray | None:
        return self._ale.getScreenRGB()

    def reset(self) -> Observation:
        ale = self._ale
        if self._next_seed is not None:
            self._load(self._next_seed)
            self._next_seed = None
        ale.reset_game()
        if self._max_noops:
            noops = self._noop_random.integers(1, self._max_noops + 1)
            for _ in range(noops * self._frames_per_noop):
                ale.act(0)
                if ale.game_over():
                    ale.reset_game()
        self._lives = ale.lives()
        ale.getScreenGrayscale(self._screen)
        self._shrink_screen()
        self._stack[...] = self._small[..., np.newaxis]
        return self._observation

    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        ale = self._ale
        act = ale.act
        action = self._actions[action]
        reward = 0
        first_frame = ale.getEpisodeFrameNumber()
        # A game that is over ignores actions and gives no reward, so one look at the end is enough.
        for _ in self._unseen_frames:
            reward += act(action)
        if self._pool_two_frames:
            reward += act(action)
            ale.getScreenGrayscale(self._previous_screen)
        reward += act(action)

        if ale.game_over():
            end = EpisodeEnd.TRUNCATED if ale.game_truncated() else EpisodeEnd.TERMINATED
            self.last_action_frames = ale.getEpisodeFrameNumber() - first_frame
            return float(reward), end, self.reset()

        ale.getScreenGrayscale(self._screen)
        if self._pool_two_frames:
            np.maximum(self._screen, self._previous_screen, out=self._screen)
        self._shrink_screen()
        self._shifted_to[...] = self._shifted_from
        self._newest[...] = self._small

        end = EpisodeEnd.NOT_ENDED
        if self._lives_count:
            lives = ale.lives()
            if lives < self._lives:
                end = EpisodeEnd.LIFE_LOST
            self._lives = lives
        return float(reward), end, self._observation

    def _shrink_screen(self) -> None:
        self._resize(self._screen, self._size, self._small)


def _load_ale() -> tuple[Any, str]:
    """Returns ale_py's extension module and the folder of its ROMs.

    Importing the package itself would import Gymnasium and register hundreds of ids, which costs an
    actor memory and time and is of no use to it.
    """
    package = importlib.util.find_spec('ale_py')
    if package is None or not package.submodule_search_locations:
        raise LevelError('Atari games need the package ale_py: pip install ale-py.')
    folder = package.submodule_search_locations[0]
    name = 'ale_py._ale_py'
    if name not in sys.modules:
        spec = importlib.machinery.PathFinder.find_spec(name, [folder])
        if spec is None or spec.loader is None:
            raise LevelError(
                f'The package ale_py in {folder} has no extension module: reinstall it.'
            )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # An extension module cannot be loaded twice, should someone import the package later.
        sys.modules[name] = module
    return sys.modules[name], os.path.join(folder, 'roms')


def _atari_games() -> dict[str, str]:
    """Returns name in a Gymnasium id -> ROM, for instance 'SpaceInvaders' -> 'space_invaders'."""
    _, folder = _load_ale()
    roms = sorted(file[:-4] for file in os.listdir(folder) if file.endswith('.bin'))
    return {rom.title().replace('_', ''): rom for rom in roms if rom not in ATARI_MULTI_PLAYER_ONLY}


def _atari_game(level_name: str) -> str:
    games = _atari_games()
    match = re.fullmatch(r'ALE/(.+)-v5', level_name)
    if match and match[1] in games:
        return games[match[1]]
    wanted = level_name.removeprefix('ALE/').split('-')[0]
    close = difflib.get_close_matches(wanted, games, n=3, cutoff=0.6)
    known = ', '.join(f'ALE/{game}-v5' for game in close or ('Pong', 'Breakout', 'SpaceInvaders'))
    raise LevelError(
        f'There is no Atari game {level_name!r}: {len(games)} games are known, such as {known}.'
    )


def _is_atari(entry_point: Any) -> bool:
    """Returns whether Gymnasium's entry point, a class or its name, is that of ale_py's games."""
    if not isinstance(entry_point, str):
        module, name = (getattr(entry_point, each, '') for each in ('__module__', '__qualname__'))
        entry_point = f'{module}:{name}'
    return re.fullmatch(r'ale_py(\.[\w.]+)?:AtariEnv', entry_point) is not None


def _is_registered_by_ale_py(registered: Any) -> bool:
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


def _create_own_atari_environment(
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
    _, rom_folder = _load_ale()
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


def _create_by_callable(level_name: str, seed: int, config: EnvironmentConfig) -> Environment:
    module_name, _, attribute = level_name.partition(':')
    if not attribute:
        raise LevelError(f'{level_name!r} names nothing behind its colon: {_HOW_TO_NAME_ONES_OWN}.')
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
    # Which imports this module.
    from impala.environments import checks as own_environment

    own_environment.check_callable(level_name, make)
    try:
        environment = make(seed, config)
    except _MISTAKES as error:
        raise LevelError(f'{level_name!r} cannot be made: {describe_failure(error)}.') from error
    return own_environment.checked(level_name, environment)


# Raised by code that is wrong and stays so. Others may come from the machine or from a seed: after
# these an actor is started again.
_MISTAKES = (ImportError, TypeError, AttributeError, NameError)
_HOW_TO_NAME_ONES_OWN = (
    'write my_module:make for a callable, or my_module:MyGame-v0 for an id that the module '
    'registers with Gymnasium'
)


def _import_module(level_name: str, module_name: str) -> Any:
    """Imports the module that a level is in; whatever goes wrong in it is a `LevelError`."""
    if not module_name:
        raise LevelError(
            f'{level_name!r} names no Python module in front of its colon: {_HOW_TO_NAME_ONES_OWN}.'
        )
    asks = f'{level_name!r} asks for the Python module {module_name!r}, which cannot be'
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + '.').startswith(error.name + '.'):
            raise LevelError(f'{asks} imported: {describe_failure(error)}.') from error
        raise LevelError(f'{asks} found.') from error
    except (Exception, SystemExit) as error:
        raise LevelError(f'{asks} imported: {describe_failure(error)}.') from error


def describe_failure(error: BaseException) -> str:
    """Returns the kind and the words of an error in somebody else's code, and where it is."""
    text = f'{type(error).__name__}: {_one_line(error).removesuffix(".")}'
    # Gymnasium raises some anew, with other words.
    cause = error.__cause__ or error
    # Those of Python's own import and of this file lead there, and say nothing.
    places = [
        f'{os.path.basename(frame.filename)}, line {frame.lineno}'
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith('<')
        and frame.filename not in (__file__, importlib.__file__)
    ]
    # The text of a syntax error has its place.
    return f'{text} ({places[-1]})' if places and not isinstance(error, SyntaxError) else text


def _is_gymnasium_id(level_name: str) -> bool:
    return re.search(r'-v\d+$', level_name) is not None


def _import_registrations(level_name: str) -> None:
    """Imports the package that registers an id with Gymnasium, if it is one that we know."""
    if level_name.startswith('Vizdoom'):
        module, extra = 'vizdoom.gymnasium_wrapper', 'vizdoom'
    elif level_name.startswith(('MiniGrid', 'BabyAI')):
        module, extra = 'minigrid', 'minigrid'
    else:
        # The older ids of Atari games have no prefix of their own.
        module, extra = 'ale_py', ''
    try:
        importlib.import_module(module)
    except ImportError as error:
        package = module.partition('.')[0]
        install = f"pip install -e '.[{extra}]'" if extra else 'pip install ale-py'
        raise LevelError(
            f'{level_name!r} needs the package {package}, which cannot be imported ({error}): '
            f'{install}.'
        ) from error


def _suggestion(level_name: str, module: str = '') -> str:
    """Returns a question to end an error with, or nothing if no known level has such a name.

    Args:
      level_name: without the module that registers it.
      module: that module with a colon, to stand before what is suggested.

    Raises:
      LevelError: the name is that of an id but for the version.
    """
    import gymnasium

    for prefix in ('', 'Vizdoom', 'MiniGrid'):
        with contextlib.suppress(LevelError):
            _import_registrations(prefix)
    # A name is often the id without what stands around it: 'Pong' for 'ALE/Pong-v5'.
    names: dict[str, str] = {}
    for known in [*gymnasium.registry, *sorted(DMLAB30_LEVELS)]:
        if known == level_name:
            return ''
        names[known.lower()] = known
        names[re.sub(r'^ALE/|-v\d+$', '', known).lower()] = known
    known = names.get(level_name.lower(), '')
    if _is_gymnasium_id(known) and not _is_gymnasium_id(level_name):
        raise LevelError(
            f'{level_name!r} lacks the version of a Gymnasium id: did you mean {known!r}?'
        )
    close = difflib.get_close_matches(level_name.lower(), names, n=1, cutoff=0.75)
    return f' Did you mean {module + names[close[0]]!r}?' if close else ''


def _create_gymnasium_environment(
    level_name: str, seed: int, config: EnvironmentConfig
) -> Environment:
    import gymnasium

    module, colon, plain_id = level_name.rpartition(':')
    if colon:
        _import_module(level_name, module)
    elif plain_id not in gymnasium.registry:
        _import_registrations(plain_id)
    if plain_id not in gymnasium.registry:
        raise LevelError(
            f'Gymnasium has no {plain_id!r}.{_suggestion(plain_id, f"{module}:" if module else "")}'
        )

    registered = gymnasium.registry[plain_id]
    entry_point = str(registered.entry_point)
    if _is_atari(registered.entry_point):
        if _is_registered_by_ale_py(registered):
            return AtariEnvironment(registered.kwargs['game'], seed, config)
        return _create_own_atari_environment(level_name, registered, seed, config)

    is_vizdoom = entry_point.startswith('vizdoom.')
    default_repeats = registered.kwargs.get('frame_skip', 4) if is_vizdoom else 1
    repeats = config.num_action_repeats or default_repeats
    # VizDoom repeats by itself and renders the last frame only.
    options: dict[str, Any] = {'frame_skip': repeats} if is_vizdoom else {}
    if config.render:
        options['render_mode'] = 'rgb_array'
    try:
        try:
            env = gymnasium.make(plain_id, disable_env_checker=True, **options)
        except TypeError:
            if not config.render:
                raise
            # It cannot draw, and takes no such argument.
            del options['render_mode']
            env = gymnasium.make(plain_id, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        raise LevelError(f'{level_name!r} cannot be made: {_one_line(error)}') from error
    except _MISTAKES as error:
        raise LevelError(f'{level_name!r} cannot be made: {describe_failure(error)}.') from error
    if is_vizdoom:
        return VizdoomEnvironment(level_name, env, repeats, seed, config)
    return GymnasiumEnvironment(level_name, env, repeats, seed, config)


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


class GymnasiumEnvironment(Environment):
    """Any environment of Gymnasium with discrete actions.

    What becomes of its observation:

    * uint8 images with sides of at least 32 pixels are resized to `config.width` x `config.height`;
    * Box observations of up to two dimensions are flattened to a float32 vector, Discrete ones
      become a one-hot float32 vector;
    * of a Dict, `screen` (VizDoom) or `image` is the frame and `mission` is the instruction;
    * MiniGrid's and BabyAI's 7x7x3 symbols, which are no picture, are replaced by the picture
      of the same 7x7 cells that the agent sees, 56x56 pixels (8 a cell). What the direction says
      the picture shows too: it is turned the agent's way. Where a wrapper or a subclass makes an
      observation of its own, that is taken as it is, and pictures are not resized.

    Observations are compared with their space (see
    `impala.environments.observation_spaces`); rewards must be numbers, and
    ends of episodes True or False.
    """

    def __init__(
        self, level_name: str, env: Any, repeats: int, seed: int, config: EnvironmentConfig
    ) -> None:
        """Takes over a Gymnasium environment.

        Args:
          level_name: for error messages.
          env: a `gymnasium.Env`; it is closed if it cannot be served.
          repeats: frames per agent step.
          seed: of the first reset; later ones go on from there.
          config: see `EnvironmentConfig`.

        Raises:
          LevelError: a space of it is not supported, or it has an older interface.
        """
        self._level_name = level_name
        self._env = env
        self._repeats = repeats
        self._seed: int | None = seed
        self._picture: _MiniGridPicture | None = None
        size: tuple[int, int] | None = (config.width, config.height)
        try:
            self._check_interface()
            if _is_minigrid(env):
                size = None
                if _observation_maker(env) is None:
                    self._picture = _MiniGridPicture(level_name, env)
            self._spec_of_spaces(repeats, size)
        except BaseException:
            env.close()
            raise

    def _check_interface(self) -> None:
        import gymnasium

        for name in ('action_space', 'observation_space'):
            if not isinstance(getattr(self._env, name, None), gymnasium.Space):
                raise LevelError(f'{self._level_name!r} has no {name} out of gymnasium.spaces.')
        env = self._env
        while env is not None:
            # Methods of extension modules may have no signature to be looked at.
            with contextlib.suppress(ValueError):
                try:
                    inspect.signature(env.reset).bind(seed=0, options=None)
                except TypeError as error:
                    raise LevelError(
                        f'{self._level_name!r} has an older interface than that of Gymnasium: '
                        f'{type(env).__name__}.reset must take seed and options.'
                    ) from error
            env = env.env if isinstance(env, gymnasium.Wrapper) else None

    def _spec_of_spaces(self, repeats: int, size: tuple[int, int] | None) -> None:
        from gymnasium import spaces

        from impala.environments import observation_spaces

        action_space = self._env.action_space
        if not isinstance(action_space, spaces.Discrete):
            raise LevelError(
                f'{self._level_name!r} has the action space '
                f'{observation_spaces.space_text(action_space)}, and only Discrete ones can be '
                'played.'
            )
        if action_space.n < 1:
            raise LevelError(f'{self._level_name!r} has no actions: its space is {action_space}.')
        self._first_action = int(action_space.start)

        space = self._env.observation_space if self._picture is None else self._picture.space
        self._frame_key: str | None = None
        self._speaks = False
        self._instruction = ''
        if isinstance(space, spaces.Dict):
            self._frame_key = next(
                (key for key in ('screen', 'image') if key in space.spaces), None
            )
            self._speaks = 'mission' in space.spaces
            if self._frame_key is None:
                raise self._unsupported_observation()
            if self._speaks and not observation_spaces.is_text(space['mission']):
                mission = observation_spaces.space_text(space['mission'])
                raise LevelError(
                    f"{self._level_name!r} has the space {mission} as 'mission'"
                    f'{_made_by(self._env)}, and only texts can be instructions.'
                )
            space = space[self._frame_key]
        frame = observation_spaces.make_frame(space, size, self._level_name, self._frame_key)
        if frame is None:
            raise self._unsupported_observation()

        self._frame = frame
        self._observation = {'frame': frame.array}
        observation = {'frame': frame.spec}
        if self._speaks:
            observation['instruction'] = ArraySpec((INSTRUCTION_LENGTH,), 'int32')
            self._observation['instruction'] = hash_instruction('')
        self.spec = EnvironmentSpec(observation, int(action_space.n), repeats)

    def _unsupported_observation(self) -> LevelError:
        from impala.environments import observation_spaces

        hint = ''
        if _is_minigrid(self._env):
            hint = ': minigrid.wrappers.RGBImgObsWrapper makes a picture'
        return LevelError(
            f'{self._level_name!r} has the observation space '
            f'{observation_spaces.space_text(self._env.observation_space)}{_made_by(self._env)}, '
            f"which is {observation_spaces.FRAME_RULE}, nor a Dict with one of them as 'screen' or "
            f"'image'{hint}."
        )

    def reset(self) -> Observation:
        # MiniGrid prints to stdout when it has to draw a level anew.
        with contextlib.redirect_stdout(io.StringIO()):
            result = self._env.reset(seed=self._seed)
        self._seed = None
        try:
            observation, _ = result
        except (TypeError, ValueError) as error:
            raise self._wrong_result('reset', '(observation, info)', result) from error
        return self._convert(observation, is_first=True)

    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        action = int(action) + self._first_action
        total_reward = 0.0
        for frames in range(1, self._repeats + 1):
            result = self._env.step(action)
            try:
                observation, reward, terminated, truncated, _ = result
            except (TypeError, ValueError) as error:
                values = '(observation, reward, terminated, truncated, info)'
                raise self._wrong_result('step', values, result) from error
            total_reward += reward if isinstance(reward, float) else self._number(reward)
            if terminated is not False or truncated is not False:
                terminated = self._truth('terminated', terminated)
                truncated = self._truth('truncated', truncated)
                if terminated or truncated:
                    self.last_action_frames = frames
                    return total_reward, self._end(terminated, truncated), self.reset()
        return total_reward, EpisodeEnd.NOT_ENDED, self._convert(observation, is_first=False)

    def seed_next(self, seed: int) -> bool:
        self._seed = seed
        return True

    @property
    def frames_per_second(self) -> float | None:
        rate = (self._env.metadata or {}).get('render_fps')
        if isinstance(rate, int | float | np.number) and 0 < rate < math.inf:
            return float(rate)
        return None

    def render(self) -> np.ndarray | None:
        import gymnasium

        try:
            picture = self._env.render()
        except (gymnasium.error.Error, ImportError, NotImplementedError):
            # Some do not draw, or with packages that they do not ask for.
            return None
        if not isinstance(picture, np.ndarray) or picture.shape[2:] != (3,):
            return None
        return picture

    def close(self) -> None:
        self._env.close()

    def _end(self, terminated: bool, truncated: bool) -> EpisodeEnd:
        # An episode that reaches its goal with the last step of its time has reached it.
        return EpisodeEnd.TERMINATED if terminated else EpisodeEnd.TRUNCATED

    def _convert(self, observation: Any, is_first: bool) -> Observation:
        frame = observation
        if self._frame_key is not None:
            keys = (self._frame_key, 'mission')[: 1 + self._speaks]
            if not isinstance(observation, Mapping) or not all(key in observation for key in keys):
                raise self._wrong_dict(keys, observation)
            if self._speaks and observation['mission'] is not self._instruction:
                self._hear(observation['mission'])
            if self._picture is not None:
                frame = self._picture.of(observation)
            else:
                frame = observation[self._frame_key]
        self._frame.take(frame, is_first)
        return self._observation

    def _hear(self, mission: Any) -> None:
        # Letters and length are not compared with what a Text space allows: by default it has no
        # room for a space, and all that becomes of a text is the hash of its words.
        if not isinstance(mission, str):
            raise DeclarationError(
                f"{self._level_name!r} declares a text as 'mission' of its observation, but "
                f'returned {_short(mission)}.'
            )
        if mission != self._instruction:
            self._observation['instruction'] = hash_instruction(mission)
        self._instruction = mission

    def _number(self, reward: Any) -> float:
        array = np.asarray(reward)
        if array.shape or array.dtype.kind not in 'biuf':
            raise DeclarationError(
                f'{self._level_name!r} returned {_short(reward)} as a reward, which is not a '
                'number.'
            )
        return float(array)

    def _truth(self, name: str, value: Any) -> bool:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        array = np.asarray(value)
        # 0-dimensional arrays are truth values, too, and many environments have 0 and 1.
        if array.shape or not (array.dtype.kind == 'b' or value in (0, 1)):
            raise DeclarationError(
                f'{self._level_name!r} returned {_short(value)} as {name!r}, which is neither True '
                'nor False.'
            )
        return bool(value)

    def _wrong_result(self, method: str, values: str, result: Any) -> DeclarationError:
        came = f'{len(result)} values' if isinstance(result, tuple) else _short(result)
        return DeclarationError(
            f"{self._level_name!r} returned {came} from {method}(), where Gymnasium's interface "
            f'has {values}.'
        )

    def _wrong_dict(self, keys: tuple[str, ...], observation: Any) -> DeclarationError:
        came = _short(observation)
        if isinstance(observation, Mapping):
            missing = next(key for key in keys if key not in observation)
            came = f'one without {missing!r}'
        return DeclarationError(
            f'{self._level_name!r} declares a Dict with {" and ".join(map(repr, keys))} as its '
            f'observation, but returned {came}.'
        )


def _short(value: Any) -> str:
    """Returns a value in a few words."""
    if isinstance(value, np.ndarray):
        return f'{value.dtype} {list(value.shape)}'
    if isinstance(value, bool | int | float | complex | str | np.generic) or value is None:
        text = repr(value)
        return text if len(text) <= 50 else f'{text[:50]}...'
    return f'a {type(value).__name__}'


def _is_minigrid(env: Any) -> bool:
    if 'minigrid' not in sys.modules:
        return False
    from minigrid.minigrid_env import MiniGridEnv

    return isinstance(env.unwrapped, MiniGridEnv)


def _observation_maker(env: Any) -> str | None:
    """Returns the name of a wrapper, or of a class of MiniGrid, with an observation of its own."""
    import gymnasium

    while isinstance(env, gymnasium.Wrapper):
        if (
            isinstance(env, gymnasium.ObservationWrapper)
            or env.observation_space is not env.env.observation_space
        ):
            return f'wrapper {type(env).__name__}'
        env = env.env
    if _is_minigrid(env):
        from gymnasium import spaces
        from minigrid.minigrid_env import MiniGridEnv

        side = env.agent_view_size
        symbols = spaces.Dict(image=spaces.Box(0, 255, (side, side, 3), np.uint8))['image']
        space = env.observation_space
        is_own = not isinstance(space, spaces.Dict) or space.spaces.get('image') != symbols
        if is_own or type(env).gen_obs is not MiniGridEnv.gen_obs:
            return f'class {type(env).__name__}'
    return None


def _made_by(env: Any) -> str:
    maker = _observation_maker(env)
    return f' of its {maker}' if maker else ''


class _MiniGridPicture:
    """The picture of the cells that the agent sees, in place of MiniGrid's own symbols.

    It does not show what somebody else makes of the symbols. Wrappers that do so say it by their
    kind or their space, as a rule; whether there is one that does not is seen from what comes.
    """

    def __init__(self, level_name: str, env: Any) -> None:
        from minigrid.wrappers import RGBImgPartialObsWrapper

        self._level_name = level_name
        self._env = env
        self._wrapper = RGBImgPartialObsWrapper(env)
        self.space = self._wrapper.observation_space
        self._symbols: list[np.ndarray] = []
        generate = env.unwrapped.gen_obs

        def generate_and_note() -> Any:
            observation = generate()
            self._symbols.append(observation['image'])
            return observation

        env.unwrapped.gen_obs = generate_and_note

    def of(self, observation: Any) -> np.ndarray:
        """Returns uint8 `[H, W, 3]` in place of an observation that the environment returned.

        Raises:
          LevelError: the observation is not MiniGrid's own.
        """
        image = observation['image']
        if not any(image is symbols or np.array_equal(image, symbols) for symbols in self._symbols):
            import gymnasium

            names = []
            env = self._env
            while isinstance(env, gymnasium.Wrapper):
                if not type(env).__module__.startswith('gymnasium.'):
                    names.append(type(env).__name__)
                env = env.env
            raise LevelError(
                f"{self._level_name!r} changes MiniGrid's observation in "
                f'{" or ".join(names or [type(env).__name__])}, which has no observation space of '
                'its own: make that a gymnasium.ObservationWrapper, and have it return a picture.'
            )
        self._symbols.clear()
        return self._wrapper.observation(observation)['image']


class VizdoomEnvironment(GymnasiumEnvironment):
    """A ViZDoom environment of Gymnasium, which plays in a process of its own.

    Left to itself, that process outlives an actor that is killed, as do its shared memory objects,
    and it writes its settings to the current folder. Here it runs in a temporary folder, ends with
    the process that started it (where `setpriv` of util-linux is installed) and the names of its
    shared memory are removed as soon as both sides have it open.
    """

    def __init__(
        self, level_name: str, env: Any, repeats: int, seed: int, config: EnvironmentConfig
    ) -> None:
        """Takes over a ViZDoom environment made with `frame_skip=repeats`.

        Args, Raises: see `GymnasiumEnvironment`.
        """
        super().__init__(level_name, env, repeats, seed, config)
        self._repeats = 1
        self._folder = tempfile.mkdtemp(prefix='vizdoom_', dir=config.temp_folder)
        self._fresh = True

        import vizdoom

        program = os.path.join(os.path.dirname(vizdoom.__file__), 'vizdoom')
        launcher = os.path.join(self._folder, 'vizdoom')
        die_with_parent = 'setpriv --pdeathsig KILL' if shutil.which('setpriv') else ''
        with open(launcher, 'w', encoding='utf-8') as file:
            # Ctrl-C reaches the whole group of processes, and it is ours to end this one.
            file.write(
                f"#!/bin/sh\ntrap '' INT\ncd {shlex.quote(self._folder)} || exit\n"
                f'exec {die_with_parent} {shlex.quote(program)} "$@"\n'
            )
        os.chmod(launcher, 0o700)
        # The folder may be on a file system from which nothing may be executed.
        if os.access(program, os.X_OK) and os.access(launcher, os.X_OK):
            env.unwrapped.game.set_vizdoom_path(launcher)

    def reset(self) -> Observation:
        observation = super().reset()
        if self._fresh:
            self._fresh = False
            with open('/proc/self/maps', encoding='utf-8') as file:
                paths = {line.split()[-1] for line in file if '/dev/shm/ViZDoom' in line}
            for path in paths:
                # Those of other environments in this process are gone already.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return observation

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        self._first_tic = self._env.unwrapped.game.get_episode_time()
        return super().step(action)

    def _end(self, terminated: bool, truncated: bool) -> EpisodeEnd:
        # It repeats by itself; to the interface that is one step.
        tic = self._env.unwrapped.game.get_episode_time()
        self.last_action_frames = tic - self._first_tic
        # ViZDoom calls an episode that ran out of time both.
        return EpisodeEnd.TRUNCATED if truncated else EpisodeEnd.TERMINATED


class DeepMindLabEnvironment(Environment):
    """A DeepMind Lab level with the nine actions of the paper's released agent.

    The instruction is part of the observation on every level, as in the released agent; it is all
    zeros where the level does not speak. The end of an episode is always TERMINATED: the length of
    an episode is one of the rules of a level, and Lab does not say which of them ended it. Nor does
    it say how many frames the last action lasted: an episode may be up to `num_action_repeats - 1`
    frames shorter than its actions make it.
    """

    def __init__(self, level_name: str, seed: int, config: EnvironmentConfig) -> None:
        """Makes the Lab. The map is compiled by the first reset, which may take many seconds.

        Args:
          level_name: a DMLab-30 level by its bare name, or any name that Lab knows.
          seed: see `create_environment`.
          config: see `EnvironmentConfig`.

        Raises:
          LevelError: Lab is not installed or does not know the level, the level is a hold-out one
            and this is not a test, the width is not one that Lab can render, or the images that the
            level shows are not there.
        """
        # Mesa renders with threads of its own otherwise: more threads than cores, and a process
        # that can no longer fork.
        os.environ.setdefault('LP_NUM_THREADS', '0')
        try:
            deepmind_lab: Any = importlib.import_module('deepmind_lab')
        except ImportError as error:
            what = 'is a DeepMind Lab level'
            if level_name not in DMLAB30_LEVELS:
                what = (
                    "has no version at its end, as Gymnasium's ids have (CartPole-v1, "
                    'my_module:MyGame-v0), so it must be a DeepMind Lab level'
                )
            raise LevelError(
                f'{level_name!r} {what}, but the module deepmind_lab cannot be imported '
                f'({error}): build its wheel as {DEEPMIND_LAB_BUILD_GUIDE} says and install it, or '
                "choose a level that runs without it, for instance 'ALE/Pong-v5'."
                f'{_suggestion(level_name)}'
            ) from error
        if config.width % 4:
            raise LevelError(
                f'DeepMind Lab renders widths that are multiples of 4 only, not {config.width}.'
            )
        if level_name.rpartition('/')[2] in DMLAB_IMAGE_LEVELS:
            _require_images(level_name, config.dataset_path)

        self._level_name = level_name
        is_dmlab30 = level_name in DMLAB30_LEVELS
        path = f'contributed/dmlab30/{level_name}' if is_dmlab30 else level_name
        settings = {
            'width': str(config.width),
            'height': str(config.height),
            # Lab's log lines go to stdout, among those that the user is to read.
            'logLevel': 'NEVER',
        }
        if config.dataset_path:
            settings['datasetPath'] = config.dataset_path
        if config.is_test:
            settings['allowHoldOutLevels'] = 'true'
            settings['mixerSeed'] = str(DEEPMIND_LAB_TEST_MIXER_SEED)
        cache = None
        if config.level_cache_dir:
            cache = LevelCache(
                config.level_cache_dir, 1e9 * config.level_cache_gb, config.temp_folder
            )

        self._folder = tempfile.mkdtemp(prefix='deepmind_lab_', dir=config.temp_folder)
        self._lab: Any = None
        try:
            self._lab = deepmind_lab.Lab(
                path,
                ['RGB_INTERLEAVED', 'INSTR'],
                settings,
                level_cache=cache,
                temp_folder=self._folder,
            )
        except BaseException as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if not isinstance(error, RuntimeError):
                raise
            if level_name.endswith('_test') and not config.is_test:
                reason = 'it is a hold-out level, which is for testing only'
            else:
                reason = _one_line(error)
            raise LevelError(
                f'DeepMind Lab cannot make the level {level_name!r}: {reason}.'
                f'{"" if is_dmlab30 else _suggestion(level_name)}'
            ) from error

        self._actions = [np.array(action, np.intc) for action in DEEPMIND_LAB_ACTIONS]
        self._episode_seeds = np.random.RandomState(seed)
        self._fresh = True
        self._instruction = ''
        self._hashed_instruction = hash_instruction('')
        self.spec = EnvironmentSpec(
            {
                'frame': ArraySpec((config.height, config.width, 3), 'uint8'),
                'instruction': ArraySpec((INSTRUCTION_LENGTH,), 'int32'),
            },
            len(self._actions),
            config.num_action_repeats or 4,
            'dmlab',
        )

    def reset(self) -> Observation:
        """Starts an episode and returns its first observation.

        Raises:
          LevelError: the level needs the Brady-Konkle-Oliva images and Lab does not find them.
          RuntimeError: the environment is closed.
        """
        lab = self._open_lab()
        seed = int(self._episode_seeds.randint(2**31, dtype=np.int64))
        try:
            if self._fresh:
                # The first reset of a Lab plays differently from all later ones with that seed.
                # With a cache the map is compiled once all the same.
                lab.reset(seed=seed)
                self._fresh = False
            lab.reset(seed=seed)
        except RuntimeError as error:
            if DMLAB_IMAGE_FOLDER not in str(error):
                raise
            raise LevelError(
                f'{self._level_name!r} needs the Brady-Konkle-Oliva images, and Lab does not find '
                f'them in --dataset_path: {_one_line(error)}.'
            ) from error
        return self._observe(lab)

    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        lab = self._open_lab()
        reward = lab.step(self._actions[action], num_steps=self.spec.num_action_repeats)
        if lab.is_running():
            return reward, EpisodeEnd.NOT_ENDED, self._observe(lab)
        return reward, EpisodeEnd.TERMINATED, self.reset()

    @property
    def frames_per_second(self) -> float | None:
        return SUITE_FRAMES_PER_SECOND

    def seed_next(self, seed: int) -> bool:
        self._episode_seeds = np.random.RandomState(seed)
        return True

    def check(self) -> None:
        # Lab says so at the first reset only, which is too dear to try with every level.
        if self._level_name.rpartition('/')[2] in DMLAB_IMAGE_LEVELS:
            self.reset()

    def close(self) -> None:
        if self._lab is not None:
            self._lab.close()
            self._lab = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open_lab(self) -> Any:
        # A closed Lab takes the whole process down when it is reset.
        if self._lab is None:
            raise RuntimeError('The environment is closed.')
        return self._lab

    def _observe(self, lab: Any) -> Observation:
        observations = lab.observations()
        if observations['INSTR'] != self._instruction:
            self._instruction = observations['INSTR']
            self._hashed_instruction = hash_instruction(self._instruction)
        return {
            'frame': observations['RGB_INTERLEAVED'],
            'instruction': self._hashed_instruction,
        }


def _require_images(level_name: str, dataset_path: str) -> None:
    """Raises a `LevelError` unless the folder of the Brady-Konkle-Oliva images has some.

    Lab reads one only when it shows it, and ends the process in mid-episode when it is not there.
    How many there must be, how many digits their numbers have and of which format they are depends
    on how the data set was prepared, so that all that is asked for is a numbered picture that is
    not empty.
    """
    folder = os.path.join(dataset_path, DMLAB_IMAGE_FOLDER)
    wrong = f'the folder {folder} has no numbered pictures (0001.jpg, 0002.jpg, ...)'
    if not dataset_path:
        wrong = 'there is no --dataset_path'
    elif not os.path.isdir(folder):
        wrong = f'there is no folder {folder}'
    else:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                is_picture = re.fullmatch(r'\d+\.(jpe?g|png|bmp|gif|tga|tiff?)', entry.name.lower())
                if is_picture and entry.is_file() and entry.stat().st_size:
                    return
    raise LevelError(
        f'{level_name!r} needs the Brady-Konkle-Oliva images, but {wrong}: give the folder that '
        f'holds {DMLAB_IMAGE_FOLDER} with its numbered pictures as --dataset_path.'
    )


class LevelCache:
    """Compiled DeepMind Lab maps in a folder that any number of processes and machines share.

    Lab ends the process when it is given a broken map, and its environment when the cache raises.
    So maps appear under their names only when they are complete, are checked before they are handed
    out, and whatever goes wrong counts as a map that is not there. Beside each map stands how long
    compiling it took.

    Attributes:
      hits: maps handed out.
      misses: maps asked for that were not there.
      seconds_saved: what compiling the maps handed out took when they were written.
    """

    def __init__(
        self, folder: str, limit_bytes: float = math.inf, statistics_folder: str | None = None
    ) -> None:
        """Uses a folder, which is made when the first map is written.

        Args:
          folder: of the maps; what else lies in it stays.
          limit_bytes: that all maps together may have. When they have more, those that have not
            been used for longest go. They are exceeded by a hundredth for a while, on average,
            however many caches write to the folder.
          statistics_folder: existing folder for a file that says how the cache does, for
            `level_cache_statistics`.
        """
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._statistics_folder = statistics_folder
        self._warned = False
        self._asked_at: dict[str, float] = {}
        self._has_written = False
        self.hits = self.misses = 0
        self.seconds_saved = 0.0

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copies the map of a key to `pk3_path`, over whatever is there; False if it has none."""
        is_there = self._fetch(key, pk3_path)
        if is_there:
            self.hits += 1
        else:
            self.misses += 1
            self._asked_at = {key: time.monotonic()}
        self._tell()
        return is_there

    def write(self, key: str, pk3_path: str) -> None:
        """Keeps the map at `pk3_path` under a key, if it can."""
        seconds = time.monotonic() - self._asked_at.pop(key, time.monotonic())
        try:
            os.makedirs(self._folder, exist_ok=True)
            cached = self._path(key)
            with _replacing(cached) as copy:
                shutil.copyfile(pk3_path, copy)
                if not _is_intact(copy):
                    raise zipfile.BadZipFile(f'{pk3_path} is not an intact map')
                self._share(copy)
                size = os.path.getsize(copy)
            with _replacing(cached + _SECONDS) as file:
                pathlib.Path(file).write_text(f'{seconds:.3f}', encoding='utf-8')
                self._share(file)
            # A folder of a hundred thousand maps is not looked through for each of them. Nobody
            # counts what others write: by chance, all together look once in a hundredth of it.
            if not self._has_written or random.random() * self._limit_bytes < 100 * size:
                self._prune()
            self._has_written = True
        except Exception as error:  # noqa: BLE001
            self._warn(error)

    def _fetch(self, key: str, pk3_path: str) -> bool:
        cached = self._path(key)
        try:
            if not os.path.exists(cached):
                return False
            with _replacing(pk3_path) as copy:
                shutil.copyfile(cached, copy)
                if not _is_intact(copy):
                    # Removed, so that the map is compiled and written anew.
                    os.unlink(cached)
                    raise zipfile.BadZipFile(f'{cached} is not an intact map')
        except Exception as error:  # noqa: BLE001
            self._warn(error)
            return False
        # Neither is worth a map: another process may just have removed it.
        with contextlib.suppress(OSError):
            os.utime(cached)
        with contextlib.suppress(OSError, ValueError):
            text = pathlib.Path(cached + _SECONDS).read_text(encoding='utf-8')
            self.seconds_saved += float(text)
        return True

    def _share(self, path: str) -> None:
        # Temporary files are made for one user only, while the folder may be for several. Who may
        # write there may touch the map, too, so that it does not look as if it was not used.
        os.chmod(path, 0o644 | os.stat(self._folder).st_mode & 0o022)

    def _prune(self) -> None:
        """Removes maps until they have nine tenths of the limit, if they have more than it."""
        maps = []
        now = time.time()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # Other processes, maybe of other machines, remove files at the same time.
                with contextlib.suppress(OSError):
                    if re.fullmatch(r'[0-9a-f]{64}\.pk3', entry.name):
                        maps.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                    elif (
                        entry.name.startswith(_TEMPORARY)
                        and now - entry.stat().st_mtime > _ABANDONED_SECONDS
                    ):
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in maps)
        if total <= self._limit_bytes:
            return
        for _, size, path in sorted(maps):
            if total <= 0.9 * self._limit_bytes:
                return
            total -= size
            for each in (path, path + _SECONDS):
                with contextlib.suppress(OSError):
                    os.unlink(each)

    def _tell(self) -> None:
        if self._statistics_folder is None:
            return
        path = os.path.join(self._statistics_folder, f'{_STATISTICS}{os.getpid()}_{id(self)}')
        with contextlib.suppress(OSError), _replacing(path) as file:
            pathlib.Path(file).write_text(
                json.dumps([self.hits, self.misses, self.seconds_saved]), encoding='utf-8'
            )

    def _path(self, key: str) -> str:
        # Nothing is known of the characters in a key.
        return os.path.join(self._folder, hashlib.sha256(key.encode()).hexdigest() + '.pk3')

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                'The level cache in %s fails, and each failure costs seconds: %s',
                self._folder,
                error,
            )


def level_cache_statistics(folder: str) -> dict[str, float]:
    """Returns what the level caches of a run's environments have done so far.

    Args:
      folder: the `EnvironmentConfig.temp_folder` of the environments.

    Returns:
      `hits`, `misses` and `seconds_saved` as of `LevelCache`, summed; empty if there is none.
    """
    rows = []
    for path in glob.glob(os.path.join(glob.escape(folder), f'{_STATISTICS}*')):
        with contextlib.suppress(OSError, ValueError):
            rows.append(json.loads(pathlib.Path(path).read_text(encoding='utf-8')))
    names = ('hits', 'misses', 'seconds_saved')
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True)) if rows else {}


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Gives the path of a temporary file that takes the place of `path` if nothing is raised."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=_TEMPORARY, suffix='.tmp', dir=os.path.dirname(path) or '.'
    )
    os.close(descriptor)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _is_intact(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001
        # A damaged archive makes zipfile raise about anything.
        return False
