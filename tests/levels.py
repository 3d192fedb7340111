"""Simple and misbehaving levels for tests of whole runs (`--level_name=levels:...`).

Actor processes import this module, so it must not import TensorFlow.
"""

import math
import os
import time
from typing import Any

import numpy as np

import environments
from impala.environments import INSTRUCTION_LENGTH
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd

LIVES = 3
STEPS_PER_LIFE = 4


class _Level(environments.Environment):
    """Two actions, a vector of two numbers, and episodes of `length` steps with reward 1 each."""

    def __init__(self, length: int = 10, end: EpisodeEnd = EpisodeEnd.TERMINATED) -> None:
        self.spec = EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 2, 1)
        self.length = length
        self.end = end
        self.steps = 0

    def reset(self) -> dict[str, np.ndarray]:
        self.steps = 0
        return {'frame': self._numbers(0)}

    def step(self, action: int) -> tuple[float, EpisodeEnd, dict[str, np.ndarray]]:
        self.steps += 1
        if self.steps == self.length:
            if self.end == EpisodeEnd.TRUNCATED:
                self.last_observation = self.make_last_observation()
            return 1.0, self.end, self.reset()
        return 1.0, EpisodeEnd.NOT_ENDED, {'frame': self._numbers(1)}

    def make_last_observation(self) -> dict[str, np.ndarray] | None:
        """Returns the last observation of an episode that the time limit has ended."""
        return {'frame': self._numbers(1)}

    def _numbers(self, number: int) -> np.ndarray:
        return np.full(self.spec.observation['frame'].shape, number, np.float32)


class _Failing(_Level):
    def step(self, action: int) -> Any:
        raise RuntimeError('the joystick is broken')


class _NotANumber(_Level):
    """Every step's observation is NaN."""

    def step(self, action: int) -> Any:
        reward, end, observation = super().step(action)
        return reward, end, {'frame': observation['frame'] * np.float32(np.nan)}


class _OtherRewards(_Level):
    """Rewards depend on the number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.total_steps = 0

    def reward(self) -> float:
        """Returns the reward of step number `total_steps`."""
        raise NotImplementedError

    def step(self, action: int) -> Any:
        _, end, observation = super().step(action)
        self.total_steps += 1
        return self.reward(), end, observation


class _Huge(_OtherRewards):
    """Rewards are so large after 200 steps that the loss overflows."""

    def reward(self) -> float:
        return 3e38 if self.total_steps > 200 else 1.0


class _SometimesInfinite(_OtherRewards):
    """The reward of every 37th step is infinite."""

    def reward(self) -> float:
        return math.inf if self.total_steps % 37 == 0 else 1.0


class _Lives(_Level):
    """A game of `LIVES` lives of `STEPS_PER_LIFE` steps each."""

    def __init__(self, lives_count: bool) -> None:
        super().__init__(LIVES * STEPS_PER_LIFE)
        self.lives_count = lives_count

    def step(self, action: int) -> Any:
        reward, end, observation = super().step(action)
        if self.lives_count and not end and self.steps % STEPS_PER_LIFE == 0:
            end = EpisodeEnd.LIFE_LOST
        return reward, end, observation


class _Seeded(_Level):
    """The return is the seed, modulo a million."""

    def __init__(self, seed: int) -> None:
        super().__init__(5)
        self.seed = seed

    def step(self, action: int) -> Any:
        _, end, observation = super().step(action)
        return self.seed % 1_000_000 if end else 0.0, end, observation


class _Counting(_Level):
    """The return counts how often action 1 was chosen; observations are zero."""

    def step(self, action: int) -> Any:
        _, end, observation = super().step(action)
        return float(action), end, {'frame': observation['frame'] * 0}


class _Dies(_Seeded):
    """Ends its process in the fifth episode of all processes, once or every time.

    Writes the seeds of completed episodes to one file, and the fatal episode's to another.
    """

    def __init__(self, seed: int, once: bool) -> None:
        super().__init__(seed)
        self.length = 10
        self.once = once
        self.next_seed = seed
        folder = os.environ['LEVELS_FOLDER']
        self.played, self.mark = os.path.join(folder, 'played'), os.path.join(folder, 'died')

    def seed_next(self, seed: int) -> bool:
        self.next_seed = seed
        return True

    def step(self, action: int) -> Any:
        is_last = self.steps == self.length - 1
        if is_last:
            self._die_or_record()
        result = super().step(action)
        if is_last:
            self.seed = self.next_seed
        return result

    def _die_or_record(self) -> None:
        with open(self.played, 'a+', encoding='utf-8') as file:
            file.seek(0)
            if len(file.readlines()) == 4 and not (self.once and os.path.exists(self.mark)):
                with open(self.mark, 'a', encoding='utf-8') as mark:
                    print(self.seed, file=mark, flush=True)
                os._exit(1)
            print(self.seed, file=file)


class _Mortal(_Seeded):
    """Ends every process in the second episode that it plays."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.next_seed = seed
        self.episodes = 0

    def seed_next(self, seed: int) -> bool:
        self.next_seed = seed
        return True

    def step(self, action: int) -> Any:
        if self.episodes == 1:
            os._exit(1)
        result = super().step(action)
        if result[1]:
            self.episodes += 1
            self.seed = self.next_seed
        return result


class _Picture(_Level):
    """A white 4x4 square moves right on grey; frames have odd sizes and an instruction."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = EnvironmentSpec(
            {
                'frame': ArraySpec((21, 35, 3), 'uint8'),
                'instruction': ArraySpec((INSTRUCTION_LENGTH,), 'int32'),
            },
            2,
            1,
        )

    def reset(self) -> dict[str, np.ndarray]:
        super().reset()
        return self._observation()

    def step(self, action: int) -> tuple[float, EpisodeEnd, dict[str, np.ndarray]]:
        reward, end, _ = super().step(action)
        return reward, end, self._observation()

    def _observation(self) -> dict[str, np.ndarray]:
        frame = np.full((21, 35, 3), 60, np.uint8)
        frame[8:12, 3 * self.steps : 3 * self.steps + 4] = 255
        instruction = np.zeros(INSTRUCTION_LENGTH, np.int32)
        instruction[:2] = 17, 4
        return {'frame': frame, 'instruction': instruction}


class _Determined(_Level):
    """One action; observations and rewards follow from the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(7)
        self.spec = EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 1, 1)
        self.random = np.random.default_rng(seed)

    def step(self, action: int) -> Any:
        _, end, observation = super().step(action)
        return self.random.random(), end, observation

    def _numbers(self, number: int) -> np.ndarray:
        return self.random.random(2, np.float32)


class _Timed(_Level):
    """The observation tells the step. Episodes are truncated; the last observation is missing."""

    def __init__(self) -> None:
        super().__init__(end=EpisodeEnd.TRUNCATED)
        self.spec = EnvironmentSpec({'frame': ArraySpec((self.length,), 'float32')}, 2, 1)

    def reset(self) -> dict[str, np.ndarray]:
        super().reset()
        return self._observation()

    def step(self, action: int) -> tuple[float, EpisodeEnd, dict[str, np.ndarray]]:
        reward, end, _ = super().step(action)
        return reward, end, self._observation()

    def make_last_observation(self) -> None:
        return None

    def _observation(self) -> dict[str, np.ndarray]:
        return {'frame': np.eye(self.length, dtype=np.float32)[self.steps]}


class _Counted(_Level):
    """Observations are functions of their number, in order."""

    def __init__(self) -> None:
        super().__init__(7)
        self.spec = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)
        self.number = -1

    def _numbers(self, number: int) -> np.ndarray:
        self.number += 1
        return counted(self.number)


def counted(number: int) -> np.ndarray:
    """Returns an observation of the level `counted_numbers`: f32 `[4]`, on different scales."""
    values = (1e6 + number, 1e-3 * (-1) ** number, 7.7, number % 5)
    return np.array(values, np.float32)


class _Constant(_Level):
    """All observations are the same array, of the given shape and dtype."""

    def __init__(
        self, shape: tuple[int, ...], dtype: str, end: EpisodeEnd = EpisodeEnd.TERMINATED
    ) -> None:
        super().__init__(end=end)
        self.spec = EnvironmentSpec({'frame': ArraySpec(shape, dtype)}, 2, 1)
        self.frame = np.full(shape, 1, dtype)

    def reset(self) -> dict[str, np.ndarray]:
        super().reset()
        return {'frame': self.frame}

    def step(self, action: int) -> tuple[float, EpisodeEnd, dict[str, np.ndarray]]:
        reward, end, _ = super().step(action)
        return reward, end, {'frame': self.frame}

    def make_last_observation(self) -> dict[str, np.ndarray]:
        return {'frame': self.frame}


def never_made(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Takes 10 minutes to create, as a slow download or compiler might."""
    time.sleep(600)
    return _Level()


def paced(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Plays CartPole at 1000 steps a second and process at most.

    For runs that wait for other processes.
    """
    level = environments.create_environment('CartPole-v1', seed, config)
    step = level.step

    def step_slowly(action: int) -> Any:
        time.sleep(0.001)
        return step(action)

    level.step = step_slowly  # type: ignore[method-assign]
    return level


def failing(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Raises at its first step."""
    return _Failing()


def huge(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has rewards of 3e38 from its 201st step on."""
    return _Huge()


def sometimes_infinite(
    seed: int, config: environments.EnvironmentConfig
) -> environments.Environment:
    """Has one infinite reward in 37 steps."""
    return _SometimesInfinite()


def not_a_number(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has observations that are NaN."""
    return _NotANumber()


def lives(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has three lives."""
    return _Lives(config.end_episode_on_life_loss)


def short(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has episodes of 5 steps."""
    return _Level(5)


def long(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has episodes of 20 steps."""
    return _Level(20)


def fails_in_tests(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """As `paced`, but raises at its first step in tests."""
    environment = paced(seed, config)
    if not config.is_test:
        return environment
    failing = _Failing()
    failing.spec = environment.spec
    environment.close()
    return failing


def endless(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has one episode, without an end."""
    return _Level(-1)


def wide(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has observations of three numbers."""
    level = _Level()
    level.spec = EnvironmentSpec({'frame': ArraySpec((3,), 'float32')}, 2, 1)
    return level


def three_actions(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has three actions."""
    level = _Level()
    level.spec = EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 3, 1)
    return level


def incomplete(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Lacks a map, which only its check reports."""
    level = _Level()

    def check() -> None:
        raise environments.LevelError('Its map is missing.')

    level.check = check  # type: ignore[method-assign]
    return level


def seeded(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has a return that equals its seed, modulo a million."""
    return _Seeded(seed)


def counting(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has a return that counts actions."""
    return _Counting(50)


def determined(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Leaves the policy no choice, so that a run of one actor can be repeated."""
    return _Determined(seed)


def picture(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has frames and instructions."""
    return _Picture()


def timeless(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has one observation only, and episodes of 10 steps, cut off by a time limit."""
    return _Constant((2,), 'float32', EpisodeEnd.TRUNCATED)


def timed(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has observations that tell the step, and episodes of 10 steps, cut off by a time limit.

    It does not return the last observation of an episode.
    """
    return _Timed()


def counted_numbers(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has observations that `counted` returns, in order."""
    return _Counted()


def float_picture(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has frames in the shape of an image, but of floats."""
    return _Constant((4, 5, 3), 'float32')


def byte_vector(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Has observations of three bytes."""
    return _Constant((3,), 'uint8')


def dies_once(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Dies once and records that in the folder that the variable LEVELS_FOLDER names."""
    return _Dies(seed, once=True)


def mortal(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Ends every process in its second episode; the return is the seed, modulo a million."""
    return _Mortal(seed)


def dies_again(seed: int, config: environments.EnvironmentConfig) -> environments.Environment:
    """Dies in the same episode every time."""
    return _Dies(seed, once=False)
