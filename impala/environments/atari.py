"""Atari games with the preprocessing of the paper (Table G.1)."""

import dataclasses
import difflib
import functools
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala.config import EnvironmentConfig
from impala.environments.environment import (
    SUITE_FRAMES_PER_SECOND,
    Environment,
    Observation,
)
from impala.errors import LevelError
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd

# Width and height, of the paper's Table G.1.
_DEFAULT_ATARI_SIZE = (84, 84)
ATARI_MAX_EPISODE_FRAMES = 108_000
ATARI_NUM_ACTIONS = 18
# Modes named in an error. Only Video Cube has more, 153.
_MAX_LISTED = 50
# The ids that `ale_py` itself leaves out: their cartridges have no single-player game.
ATARI_MULTI_PLAYER_ONLY = frozenset({'combat', 'joust', 'maze_craze', 'warlords'})


@dataclasses.dataclass(frozen=True)
class AtariGame:
    """A game as the Arcade Learning Environment loads it.

    Attributes:
      rom: file name without its ending, for instance `space_invaders`.
      mode: see Machado et al. (2018); None for ale_py's default. `EnvironmentConfig.atari_mode`
        takes precedence.
      difficulty: None for ale_py's default. `EnvironmentConfig.atari_difficulty` takes precedence.
      max_episode_frames: an episode is truncated after this many frames; 0 for no limit.
    """

    rom: str
    mode: int | None = None
    difficulty: int | None = None
    max_episode_frames: int = ATARI_MAX_EPISODE_FRAMES


class AtariEnvironment(Environment):
    """An Atari game, played directly through the Arcade Learning Environment and OpenCV.

    Frames, rewards and no-ops equal those of Gymnasium's `AtariPreprocessing` and
    `FrameStackObservation` with the same seed, at about half their cost. The stack of a new episode
    holds its first frame `frame_stack` times. As in the paper, a reset does not press FIRE.
    """

    def __init__(self, game: AtariGame, seed: int, config: EnvironmentConfig) -> None:
        """Loads a game.

        Args:
          game: see `AtariGame`.
          seed: see `create_environment`.
          config: see `EnvironmentConfig`.

        Raises:
          LevelError: the game has no such mode or difficulty.
        """
        library, self._rom_folder = load_ale()
        library.ALEInterface.setLoggerMode(library.LoggerMode.Error)
        ale = library.ALEInterface()
        ale.setInt('max_num_frames_per_episode', game.max_episode_frames)
        ale.setFloat('repeat_action_probability', config.sticky_actions)
        self._ale = ale
        self._game = game
        self._config = config
        self._load(seed)
        self._next_seed: int | None = None

        # All 18 even if a game (Skiing) has no use for some, which are no-ops there.
        self._actions = list(range(ATARI_NUM_ACTIONS))
        if not config.full_action_set:
            self._actions = [action.value for action in ale.getMinimalActionSet()]
        self._max_noops = config.max_noops
        self._frames_per_noop = config.frames_per_noop
        self._lives_count = config.end_episode_on_life_loss
        self._keeps_last_observation = config.bootstrap_truncated
        self._lives = 0

        screen_shape = ale.getScreenDims()
        self._screen = np.zeros(screen_shape, np.uint8)
        self._previous_screen = np.zeros(screen_shape, np.uint8)
        size = (config.width, config.height)
        if size == (EnvironmentConfig.width, EnvironmentConfig.height):
            size = _DEFAULT_ATARI_SIZE
        self._stack = _FrameStack(size, config.frame_stack)
        self._observation = {'frame': self._stack.array}

        repeats = config.num_action_repeats or 4
        self._unseen_frames = range(max(repeats - 2, 0))
        self._pool_two_frames = repeats > 1
        self.spec = EnvironmentSpec(
            {'frame': ArraySpec(self._stack.array.shape, 'uint8')},
            ActionSpec.discrete(len(self._actions)),
            repeats,
            'atari',
        )

    def _load(self, seed: int) -> None:
        # ale_py's own Gymnasium environment derives both seeds in the same way.
        noop_seed, ale_seed = np.random.SeedSequence(seed).generate_state(2)
        self._noop_random = np.random.default_rng(int(noop_seed))
        self._ale.setInt('random_seed', int(ale_seed.astype(np.int32)))
        load_game(self._ale, self._rom_folder, self._game, self._config)

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
        self._stack.fill(self._screen)
        return self._observation

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        ale = self._ale
        act = ale.act
        action = self._actions[action]
        reward = 0
        first_frame = ale.getEpisodeFrameNumber()
        # A finished game ignores actions and gives no reward, so one check at the end is enough.
        for _ in self._unseen_frames:
            reward += act(action)
        if self._pool_two_frames:
            reward += act(action)
            ale.getScreenGrayscale(self._previous_screen)
        reward += act(action)

        if ale.game_over():
            is_over = ale.game_over(with_truncation=False)
            end = EpisodeEnd.TERMINATED if is_over else EpisodeEnd.TRUNCATED
            self.last_action_frames = ale.getEpisodeFrameNumber() - first_frame
            if self._keeps_last_observation and end == EpisodeEnd.TRUNCATED:
                self._push_screen()
                self.last_observation = {'frame': self._stack.array.copy()}
            return float(reward), end, self.reset()

        self._push_screen()
        end = EpisodeEnd.NOT_ENDED
        if self._lives_count:
            lives = ale.lives()
            if lives < self._lives:
                end = EpisodeEnd.LIFE_LOST
            self._lives = lives
        return float(reward), end, self._observation

    def _push_screen(self) -> None:
        self._ale.getScreenGrayscale(self._screen)
        if self._pool_two_frames:
            np.maximum(self._screen, self._previous_screen, out=self._screen)
        self._stack.push(self._screen)


class _FrameStack:
    """The newest frames of a game, resized.

    Attributes:
      array: uint8 `[H, W, length]`, the newest frame last; each call overwrites it.
    """

    def __init__(self, size: tuple[int, int], length: int) -> None:
        """Prepares the array.

        Args:
          size: width and height, pixels.
          length: number of frames.
        """
        import cv2

        # There are more actor processes than cores already.
        cv2.setNumThreads(1)
        self._resize = functools.partial(cv2.resize, interpolation=cv2.INTER_AREA)
        self._size = size
        width, height = size
        self._small = np.zeros((height, width), np.uint8)
        self.array = np.zeros((height, width, length), np.uint8)
        self._newest = self.array[..., -1]
        # Shifting the whole stack by one byte moves each channel of each pixel to the previous
        # channel. Only the newest channel is wrong then, and it is written next.
        self._shifted_from = self.array.reshape(-1)[1:]
        self._shifted_to = self.array.reshape(-1)[:-1]

    def fill(self, screen: np.ndarray) -> None:
        """Sets all frames to one screen of the game, uint8 `[screen height, screen width]`."""
        self._resize(screen, self._size, self._small)
        self.array[...] = self._small[..., np.newaxis]

    def push(self, screen: np.ndarray) -> None:
        """Appends a frame and drops the oldest; see `fill`."""
        self._resize(screen, self._size, self._small)
        self._shifted_to[...] = self._shifted_from
        self._newest[...] = self._small


def load_ale() -> tuple[Any, str]:
    """Returns ale_py's extension module and the folder of its ROMs.

    The package itself would import Gymnasium and register hundreds of ids, which would cost each
    actor memory and time for nothing.

    Raises:
      LevelError: ale_py is not installed, or incompletely.
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
        # An extension module cannot be loaded again if the package is imported later.
        sys.modules[name] = module
    return sys.modules[name], os.path.join(folder, 'roms')


def load_game(ale: Any, rom_folder: str, game: AtariGame, config: EnvironmentConfig) -> None:
    """Loads the ROM of a game and sets its mode and difficulty.

    Args:
      ale: an `ALEInterface` of ale_py.
      rom_folder: see `load_ale`.
      game: see `AtariGame`.
      config: its `atari_mode` and `atari_difficulty` take precedence over those of `game`.

    Raises:
      LevelError: the game has no such mode or difficulty; the sentence lists those that it has.
    """
    ale.loadROM(os.path.join(rom_folder, game.rom + '.bin'))
    for kind, plural, flag, own, set_value, available in (
        ('mode', 'modes', config.atari_mode, game.mode, ale.setMode, ale.getAvailableModes),
        (
            'difficulty',
            'difficulties',
            config.atari_difficulty,
            game.difficulty,
            ale.setDifficulty,
            ale.getAvailableDifficulties,
        ),
    ):
        value = own if flag is None else flag
        if value is None:
            continue
        offered = available()
        if type(value) is not int or value not in offered:
            given = f'{kind}={value!r}' if flag is None else f'--atari_{kind}={value}'
            raise LevelError(
                f'{given}: the game {game.rom!r} offers the {plural} {_listed(offered)}.'
            )
        set_value(value)


def _listed(values: Sequence[int]) -> str:
    """Returns numbers in a row, without those in the middle if there are many."""
    if len(values) > _MAX_LISTED:
        return f'{_listed(values[: _MAX_LISTED - 1])}, ..., {values[-1]} ({len(values)} of them)'
    return ', '.join(map(str, values))


def atari_games() -> dict[str, str]:
    """Returns the ROM for each name in a Gymnasium id: 'SpaceInvaders' -> 'space_invaders'."""
    return {
        rom.title().replace('_', ''): rom
        for rom in atari_roms()
        if rom not in ATARI_MULTI_PLAYER_ONLY
    }


def atari_roms() -> list[str]:
    """Returns the names of all ROMs that come with ale_py, sorted."""
    _, folder = load_ale()
    return sorted(file[:-4] for file in os.listdir(folder) if file.endswith('.bin'))


def atari_game(level_name: str) -> AtariGame:
    """Returns the game of an id such as `ALE/Pong-v5`.

    Raises:
      LevelError: there is no such game; the sentence names similar ones.
    """
    games = atari_games()
    match = re.fullmatch(r'ALE/(.+)-v5', level_name)
    if match and match[1] in games:
        return AtariGame(games[match[1]])
    wanted = level_name.removeprefix('ALE/').split('-')[0]
    close = difflib.get_close_matches(wanted, games, n=3, cutoff=0.6)
    known = ', '.join(f'ALE/{game}-v5' for game in close or ('Pong', 'Breakout', 'SpaceInvaders'))
    raise LevelError(
        f'There is no Atari game {level_name!r}: {len(games)} games are known, such as {known}.'
    )
