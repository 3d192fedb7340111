"""DeepMind Lab with the actions of the paper's released agent."""

import contextlib
import importlib
import os
import re
import shutil
import tempfile
from typing import Any

import numpy as np

from impala.config import EnvironmentConfig
from impala.environments.environment import SUITE_FRAMES_PER_SECOND, Environment, Observation
from impala.environments.instructions import INSTRUCTION_LENGTH, hash_instruction
from impala.environments.level_cache import LevelCache
from impala.environments.level_names import DMLAB30_LEVELS, suggestion
from impala.errors import LevelError
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd
from impala.user_code import one_line

# These show the Brady-Konkle-Oliva images, which are not part of DeepMind Lab.
DMLAB_IMAGE_LEVELS = frozenset(
    {'psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition'}
)
DMLAB_IMAGE_FOLDER = 'brady_konkle_oliva2008'
# The paper's released agent was tested, but not trained, with this seed.
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


class DeepMindLabEnvironment(Environment):
    """A DeepMind Lab level with the nine actions of the paper's released agent.

    The instruction is part of the observation on every level, as in the released agent; it is all
    zeros if the level gives none. Episodes always end with TERMINATED: their length is one of the
    rules of a level, and Lab does not say which rule ended an episode. Lab does not say either how
    many frames the last action lasted, so an episode may be up to `num_action_repeats - 1` frames
    shorter than counted.
    """

    def __init__(self, level_name: str, seed: int, config: EnvironmentConfig) -> None:
        """Creates the Lab. The first reset compiles the map, which may take many seconds.

        Args:
          level_name: a DMLab-30 level by its bare name, or any name that Lab knows.
          seed: see `create_environment`.
          config: see `EnvironmentConfig`.

        Raises:
          LevelError: Lab is not installed or does not know the level, the level is a hold-out
            level and this is not a test, Lab cannot render the width, or the images that the level
            shows are missing.
        """
        deepmind_lab = _import_deepmind_lab(level_name)
        if config.width % 4:
            raise LevelError(
                f'DeepMind Lab renders widths that are multiples of 4 only, not {config.width}.'
            )
        if level_name.rpartition('/')[2] in DMLAB_IMAGE_LEVELS:
            _require_images(level_name, config.dataset_path)

        self._level_name = level_name
        self._folder = tempfile.mkdtemp(prefix='deepmind_lab_', dir=config.temp_folder)
        self._lab: Any = None
        try:
            self._lab = self._make_lab(deepmind_lab, config)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

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
            ActionSpec.discrete(len(self._actions)),
            config.num_action_repeats or 4,
            'dmlab',
        )

    def _make_lab(self, deepmind_lab: Any, config: EnvironmentConfig) -> Any:
        name = self._level_name
        is_dmlab30 = name in DMLAB30_LEVELS
        try:
            return deepmind_lab.Lab(
                f'contributed/dmlab30/{name}' if is_dmlab30 else name,
                ['RGB_INTERLEAVED', 'INSTR'],
                _lab_settings(config),
                level_cache=_level_cache(config),
                temp_folder=self._folder,
            )
        except RuntimeError as error:
            reason = one_line(error)
            if name.endswith('_test') and not config.is_test:
                reason = 'it is a hold-out level, which is for testing only'
            raise LevelError(
                f'DeepMind Lab cannot make the level {name!r}: {reason}.'
                f'{"" if is_dmlab30 else suggestion(name)}'
            ) from error

    def reset(self) -> Observation:
        """Starts an episode and returns its first observation.

        Raises:
          LevelError: Lab does not find the Brady-Konkle-Oliva images that the level needs.
          RuntimeError: the environment is closed.
        """
        lab = self._open_lab()
        seed = int(self._episode_seeds.randint(2**31, dtype=np.int64))
        try:
            if self._fresh:
                # The first reset of a Lab plays differently from later ones with the same seed.
                # With a cache the map is still compiled only once.
                lab.reset(seed=seed)
                self._fresh = False
            lab.reset(seed=seed)
        except RuntimeError as error:
            if DMLAB_IMAGE_FOLDER not in str(error):
                raise
            raise LevelError(
                f'{self._level_name!r} needs the Brady-Konkle-Oliva images, and Lab does not find '
                f'them in --dataset_path: {one_line(error)}.'
            ) from error
        return self._observe(lab)

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
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
        # Lab reports missing images only at the first reset, too slow to try with every level.
        if self._level_name.rpartition('/')[2] in DMLAB_IMAGE_LEVELS:
            self.reset()

    def close(self) -> None:
        if self._lab is not None:
            self._lab.close()
            self._lab = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open_lab(self) -> Any:
        # Resetting a closed Lab crashes the process.
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


def _import_deepmind_lab(level_name: str) -> Any:
    # Otherwise Mesa renders with its own threads: more threads than cores, and a process that can
    # no longer fork.
    os.environ.setdefault('LP_NUM_THREADS', '0')
    try:
        return importlib.import_module('deepmind_lab')
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
            f'{suggestion(level_name)}'
        ) from error


def _lab_settings(config: EnvironmentConfig) -> dict[str, str]:
    settings = {
        'width': str(config.width),
        'height': str(config.height),
        # Lab writes its log to stdout, where it would drown what the user should read.
        'logLevel': 'NEVER',
    }
    if config.dataset_path:
        settings['datasetPath'] = config.dataset_path
    if config.is_test:
        settings['allowHoldOutLevels'] = 'true'
        settings['mixerSeed'] = str(DEEPMIND_LAB_TEST_MIXER_SEED)
    return settings


def _level_cache(config: EnvironmentConfig) -> LevelCache | None:
    if not config.level_cache_dir:
        return None
    folder = os.path.expanduser(config.level_cache_dir)
    return LevelCache(folder, 1e9 * config.level_cache_gb, config.temp_folder)


def _require_images(level_name: str, dataset_path: str) -> None:
    """Checks that the folder of the Brady-Konkle-Oliva images has at least one.

    Lab reads an image only when it shows it, and ends the process in mid-episode if the image is
    missing. The number of images, the digits of their numbers and their format depend on how the
    data set was prepared, so one numbered picture that is not empty suffices.

    Raises:
      LevelError: there is no such picture.
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
