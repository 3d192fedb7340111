"""A stand-in for the module `deepmind_lab`, for machines without DeepMind Lab.

It renders noise, but is at least as strict as the real module. What that would silently misread
raises `MisuseError`, and what would crash the process crashes it (exit code `CRASH`, 1 for a broken
map, SIGABRT in mid-episode for a missing image).

A frame is a function of the level, the seed of the episode, whether it is the first episode of
its Lab, and the actions so far. The reward is `MOVE_BACK_FORWARD` times the frames played. The real
module needs seconds to compile a map; the environment variable `DEEPMIND_LAB_COMPILE_SECONDS` sets
how many it takes here (0).
"""

import hashlib
import os
import sys
import tempfile
import time
import zipfile
import zlib

import numpy as np

CRASH = 139
ACTION_LIMITS = ((-512, 512), (-512, 512), (-1, 1), (-1, 1), (0, 1), (0, 1), (0, 1))
CONFIG_KEYS = {
    'width',
    'height',
    'datasetPath',
    'logLevel',
    'allowHoldOutLevels',
    'fps',
    'mixerSeed',
}
BRADY_LEVELS = {
    'contributed/dmlab30/psychlab_arbitrary_visuomotor_mapping',
    'contributed/dmlab30/psychlab_continuous_recognition',
}
# A level shows no image before the agent has looked at the cross.
FIRST_IMAGE_FRAME = 60
HOLD_OUT_LEVELS = {
    'contributed/dmlab30/rooms_collect_good_objects_test',
    'contributed/dmlab30/rooms_exploit_deferred_effects_test',
}
EPISODE_FRAMES = {
    'contributed/dmlab30/' + name: frames
    for name, frames in {
        'explore_goal_locations_small': 5400,
        'explore_goal_locations_large': 7200,
        'explore_object_locations_small': 5400,
        'explore_object_locations_large': 7200,
        'explore_obstructed_goals_small': 5400,
        'explore_obstructed_goals_large': 7200,
        'explore_object_rewards_few': 5400,
        'explore_object_rewards_many': 7200,
        'language_answer_quantitative_question': 3600,
        'language_execute_random_task': 7200,
        'language_select_described_object': 3600,
        'language_select_located_object': 7200,
        'lasertag_one_opponent_large': 14400,
        'lasertag_one_opponent_small': 14400,
        'lasertag_three_opponents_large': 14400,
        'lasertag_three_opponents_small': 14400,
        'natlab_fixed_large_map': 7200,
        'natlab_varying_map_randomized': 7200,
        'natlab_varying_map_regrowth': 7200,
        'psychlab_arbitrary_visuomotor_mapping': 18000,
        'psychlab_continuous_recognition': 18000,
        'psychlab_sequential_comparison': 18000,
        'psychlab_visual_search': 9000,
        'rooms_collect_good_objects_test': 3600,
        'rooms_collect_good_objects_train': 3600,
        'rooms_exploit_deferred_effects_test': 3600,
        'rooms_exploit_deferred_effects_train': 3600,
        'rooms_keys_doors_puzzle': 3600,
        'rooms_select_nonmatching_object': 720,
        'rooms_watermaze': 7200,
        'skymaze_irreversible_path_hard': 3600,
        'skymaze_irreversible_path_varied': 3600,
    }.items()
}
EPISODE_FRAMES['seekavoid_arena_01'] = 3600


class MisuseError(Exception):
    """The real module would accept this silently and do something other than intended."""


def _crash(why, code=CRASH):
    print(f'deepmind_lab: {why}', file=sys.stderr, flush=True)
    os._exit(code)


def _read_image(folder):
    for entry in os.scandir(folder):
        if entry.is_file() and os.path.splitext(entry.name)[0].isdigit() and entry.stat().st_size:
            return
    print('Lua check failed: cannot read the image', file=sys.stderr, flush=True)
    os.abort()


def _intact_map_text(pk3_path):
    try:
        with zipfile.ZipFile(pk3_path) as archive:
            if archive.testzip() is None:
                return archive.read('maps/map.bsp').decode()
    except Exception:
        pass
    return None


class _State:
    """The state of a Lab, kept apart because a Lab takes no attributes."""

    def __init__(self, level, width, height, speaks, folder):
        self.level = level
        self.width = width
        self.height = height
        self.speaks = speaks
        self.folder = folder
        self.level_cache = None
        self.quiet = False
        self.images = ''
        self.observations = ()
        self.closed = False
        self.running = False
        self.resets = 0
        self.frames = 0
        self.requested_frames = 0
        self.digest = 0
        self.noise = None
        self.instruction = ''
        self.rendered_in = None


class _LabType(type):
    @property
    def __signature__(cls):
        raise ValueError('no signature found for builtin type Lab')


class Lab(metaclass=_LabType):
    __slots__ = ('_state',)

    def __init_subclass__(cls):
        raise TypeError("type 'deepmind_lab.Lab' is not an acceptable base type")

    def __init__(
        self,
        level,
        observations,
        config=None,
        renderer='software',
        level_cache=None,
        temp_folder=None,
    ):
        if not isinstance(level, str):
            raise TypeError('level must be str')
        if not isinstance(observations, list):
            raise TypeError('observations must be list')
        config = {} if config is None else config
        if not isinstance(config, dict):
            raise TypeError('config must be dict')
        for key, value in config.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError('config must be a dict of str to str')
            if key not in CONFIG_KEYS:
                raise MisuseError(f'unknown config key {key!r}')
        if renderer not in ('software', 'hardware'):
            raise ValueError(f'unknown renderer {renderer!r}')
        width, height = int(config.get('width', 320)), int(config.get('height', 240))
        if width <= 0 or width % 4 or height <= 0:
            raise RuntimeError(f'width {width} must be a positive multiple of 4')
        if level not in EPISODE_FRAMES:
            raise RuntimeError(f'Invalid script path.\nLevel not found: "{level}"\n')
        if level in HOLD_OUT_LEVELS and config.get('allowHoldOutLevels') != 'true':
            raise RuntimeError(f'Level "{level}" is a hold-out level.')
        for name in observations:
            if name not in ('RGB_INTERLEAVED', 'INSTR'):
                raise RuntimeError(f'Unknown observation {name!r}')
        if level_cache is not None and not (
            callable(getattr(level_cache, 'fetch', None))
            and callable(getattr(level_cache, 'write', None))
        ):
            raise TypeError('level_cache must have fetch and write')

        folder = tempfile.mkdtemp(prefix='dmlab_temp_folder_', dir=temp_folder)
        state = _State(level, width, height, '/language_' in level, folder)
        state.level_cache = level_cache
        state.quiet = config.get('logLevel') == 'NEVER'
        state.observations = tuple(observations)
        state.images = os.path.join(config.get('datasetPath', ''), 'brady_konkle_oliva2008')
        object.__setattr__(self, '_state', state)

        def forked():
            if state.rendered_in is not None and os.environ.get('LP_NUM_THREADS') != '0':
                _crash('a child forked after a Lab has rendered would hang')

        os.register_at_fork(after_in_child=forked)

    def __setattr__(self, name, value):
        raise AttributeError(f"'deepmind_lab.Lab' object has no attribute {name!r}")

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle 'deepmind_lab.Lab' object")

    def reset(self, episode=-1, seed=None):
        state = self._state
        if state.closed:
            _crash('reset of a closed Lab')
        if seed is not None and type(seed) is not int:
            raise ValueError(f"'seed' must be int or None, was {type(seed).__name__}")
        if seed is not None and not 0 <= seed < 2**31:
            raise ValueError(f"'seed' must be in [0, 2**31), was {seed}")
        state.running = False
        if state.level in BRADY_LEVELS and not os.path.isdir(state.images):
            raise RuntimeError('Dataset brady_konkle_oliva2008 not found')
        if not state.quiet:
            print(f'Lua log: loading {state.level}', flush=True)
        seed = int.from_bytes(os.urandom(3), 'little') if seed is None else seed
        self._load_map(seed)

        first = state.resets == 0
        state.resets += 1
        state.digest = zlib.crc32(f'{state.level} {seed} {first}'.encode())
        shape = (state.height, state.width, 3)
        state.noise = np.random.RandomState(state.digest).randint(0, 256, shape, np.uint8)
        colour = ('red', 'green', 'blue')[seed % 3]
        state.instruction = f'Get the {colour} hat' if state.speaks else ''
        state.frames = state.requested_frames = 0
        state.running = True
        state.rendered_in = os.getpid()
        return True

    def _load_map(self, seed):
        state = self._state
        text = f'{state.level} {seed % 4}'
        key = hashlib.md5(text.encode()).hexdigest()
        path = os.path.join(state.folder, 'baselab.pk3')
        if state.level_cache is not None and state.level_cache.fetch(key, path):
            if _intact_map_text(path) != text:
                _crash('fetch returned True without a valid map in place', 1)
            return
        time.sleep(float(os.environ.get('DEEPMIND_LAB_COMPILE_SECONDS', '0')))
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('maps/map.bsp', text)
        if state.level_cache is not None:
            state.level_cache.write(key, path)

    def step(self, action, num_steps=1):
        state = self._state
        if state.closed or not state.running:
            raise RuntimeError('Environment in wrong status to step')
        if not isinstance(action, np.ndarray) or action.shape != (len(ACTION_LIMITS),):
            raise ValueError('action must be an array of shape (7,)')
        if action.dtype != np.intc:
            raise ValueError(f'action must have the dtype intc, not {action.dtype}')
        if not action.flags.c_contiguous:
            raise MisuseError('the strides of an action are ignored')
        for value, (low, high) in zip(action.tolist(), ACTION_LIMITS, strict=True):
            if not low <= value <= high:
                raise MisuseError(f'action {action} is out of range')
        if type(num_steps) is not int or num_steps < 1:
            raise ValueError('num_steps must be a positive int')
        if state.level in BRADY_LEVELS and state.frames >= FIRST_IMAGE_FRAME:
            # The image is read only when it is shown.
            _read_image(state.images)
        played = min(num_steps, EPISODE_FRAMES[state.level] - state.frames)
        state.frames += played
        state.requested_frames += num_steps
        state.digest = zlib.crc32(action.tobytes(), state.digest)
        state.running = state.frames < EPISODE_FRAMES[state.level]
        return float(played * action[3])

    def observations(self):
        state = self._state
        if state.closed or not state.running:
            raise RuntimeError('Environment in wrong status for call to observations()')
        result = {}
        for name in state.observations:
            if name == 'INSTR':
                result[name] = state.instruction
            else:
                frame = state.noise.copy()
                frame[0, 0] = state.digest & 255, state.digest >> 8 & 255, state.digest >> 16 & 255
                result[name] = frame
        return result

    def observation_spec(self):
        if self._state.closed:
            _crash('observation_spec of a closed Lab')
        shape = (self._state.height, self._state.width, 3)
        return [
            {'name': 'RGB_INTERLEAVED', 'shape': shape, 'dtype': np.uint8},
            {'name': 'INSTR', 'shape': (), 'dtype': str},
        ]

    def is_running(self):
        return self._state.running

    def num_steps(self):
        return self._state.requested_frames

    def close(self):
        state = self._state
        if state.closed:
            return False
        state.closed = True
        state.running = False
        for name in os.listdir(state.folder):
            os.unlink(os.path.join(state.folder, name))
        os.rmdir(state.folder)
        return True
