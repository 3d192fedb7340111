"""Levels whose actor processes come to grief, for tests of the pool (`troubled_levels:...`)."""

import os

import numpy as np

import environments
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd


class Level(environments.Environment):
    """Calls a function in its step number `at`; episodes of 7 steps, with reward 1 each."""

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


def fails_early(seed, config):
    """Fails before any unroll is full, and talks first."""
    print('a lot of talk\n' * 1000)
    return Level(3, lambda: _raise(RuntimeError(f'the joystick broke with seed {seed}')))


def fails_late(seed, config):
    """Fails after some full unrolls."""
    return Level(60, lambda: _raise(RuntimeError('the joystick broke')))


def chatters(seed, config):
    """Prints at its first steps more than anybody wants to keep, then fails."""
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
    """Cannot be made."""
    raise RuntimeError('there is no joystick')


def exits(seed, config):
    """Ends its process as if all were well."""
    return Level(3, lambda: os._exit(0))


def misses_something(seed, config):
    """Cannot be played as asked, which shows late."""
    return Level(3, lambda: _raise(environments.LevelError('This level needs a map.')))


def warns(seed, config):
    """Has something to say, but goes on."""
    environments.LevelCache('/dev/null/cache').write('key', '/dev/null')
    return Level()


def prints_and_exits(seed, config):
    """Fails without any text of Python's."""
    os.write(2, b'engine: out of polygons\n')
    os.abort()
