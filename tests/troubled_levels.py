"""Levels whose actor processes fail, for tests of the pool (`troubled_levels:...`)."""

import atexit
import os
import subprocess
import sys
import time

import numpy as np

import environments
from impala.environments.level_cache import LevelCache
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd


class Level(environments.Environment):
    """Has episodes of 7 steps with reward 1 each; calls a function in step number `at`."""

    spec = EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 3, 1)

    def __init__(self, at=None, function=None):
        self._at, self._function = at, function
        self._steps = 0

    def reset(self):
        return {'frame': np.zeros(2, np.float32)}

    def step(self, action):
        self._steps += 1
        if self._steps == self._at:
            self._function()
        end = EpisodeEnd.NOT_ENDED if self._steps % 7 else EpisodeEnd.TERMINATED
        return 1.0, end, {'frame': np.full(2, self._steps, np.float32)}


def _raise(error):
    raise error


def good(seed, config):
    """Never fails, and leaves a file in its temporary folder."""
    with open(os.path.join(config.temp_folder, f'level-{os.getpid()}'), 'w', encoding='utf-8'):
        return Level()


def starts_late(seed, config):
    """Is created once the process of `good` has ended."""
    while True:
        time.sleep(0.05)
        others = [name for name in os.listdir(config.temp_folder) if name.startswith('level-')]
        if others and not os.path.exists(f'/proc/{others[0].removeprefix("level-")}'):
            return Level()


def fails_early(seed, config):
    """Prints a lot, then fails before any unroll is full."""
    print('a lot of talk\n' * 1000)
    return Level(3, lambda: _raise(RuntimeError(f'the joystick broke with seed {seed}')))


def fails_mostly(seed, config):
    """Fails before any unroll is full, for three of four seeds."""
    at = 30 if seed % 4 == 0 else 3
    return Level(at, lambda: _raise(RuntimeError(f'the joystick broke with seed {seed}')))


def fails_late(seed, config):
    """Fails after some full unrolls."""
    return Level(60, lambda: _raise(RuntimeError('the joystick broke')))


def chatters(seed, config):
    """Prints far too much in its first steps, then fails."""
    level = Level(100_000, lambda: None)
    step = level.step

    def talk(action):
        os.write(1, b'line of an engine\n' * 1000)
        if level._steps == 500:
            raise RuntimeError('the joystick broke')
        return step(action)

    level.step = talk
    return level


def fails_to_start(seed, config):
    """Cannot be created."""
    raise RuntimeError('there is no joystick')


def hangs_at_start(seed, config):
    """Hangs while it is created."""
    time.sleep(1e6)


def hangs(seed, config):
    """Never returns from a step."""
    return Level(3, lambda: time.sleep(1e6))


def exits_at_start(seed, config):
    """Ends its process while it is created."""
    os._exit(83)


def has_a_fork(seed, config):
    """Leaves a forked process that inherits all open files."""
    child = os.fork()
    if child == 0:
        time.sleep(1e6)
    return _with_child(child, config)


def has_an_engine(seed, config):
    """Starts an engine process and never ends it."""
    return _with_child(subprocess.Popen(['sleep', '1000000']).pid, config)


def _with_child(child, config):
    with open(os.path.join(config.temp_folder, f'child-{child}'), 'w', encoding='utf-8'):
        return Level()


def exits(seed, config):
    """Ends its process with exit code 0."""
    return Level(3, lambda: os._exit(0))


def exits_82(seed, config):
    """Ends its process with the exit code for levels that cannot be played."""
    return Level(3, lambda: os._exit(82))


def exits_83(seed, config):
    """Ends its process with the exit code for a closed batcher."""
    return Level(3, lambda: os._exit(83))


def exits_politely(seed, config):
    """Raises SystemExit."""
    return Level(3, lambda: sys.exit('I am done.'))


def raises_level_error(seed, config):
    """Raises LevelError in its third step; its engine prints before and after."""
    os.write(2, b'engine: hello')
    atexit.register(os.write, 2, b'engine: bye\n')
    return Level(3, lambda: _raise(environments.LevelError('This level\nneeds a map.')))


def breaks_its_declaration(seed, config):
    """Returns an observation of the wrong shape in its third step."""
    level = Level()
    step = level.step

    def step_wrongly(action):
        reward, end, observation = step(action)
        return reward, end, {'frame': np.zeros(3 if level._steps == 3 else 2, np.float32)}

    level.step = step_wrongly
    return level


def warns(seed, config):
    """Logs a warning, but works."""
    LevelCache('/dev/null/cache').write('key', '/dev/null')
    return Level()


def prints_and_exits(seed, config):
    """Aborts after a message of its engine, without a Python traceback."""
    os.write(2, b'engine: out of polygons\n')
    os.abort()
