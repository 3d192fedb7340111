"""Gymnasium environments with all kinds of spaces (`--level_name=space_levels:...`).

Each episode has ten steps, except those of `Sampled`. The reward of a `Target` is the closer to 1
the closer the action is to a target, which the observation does not show.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

BOX = spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
ACTION_SPACES = {
    'multi_discrete': spaces.MultiDiscrete([3, 2, 3], start=[1, 0, -1]),
    'multi_binary': spaces.MultiBinary(4),
    'box': BOX,
    'unbounded': spaces.Box(-np.inf, np.inf, (2,)),
    'mixture': spaces.Dict(
        buttons=spaces.MultiBinary(2), choice=spaces.Discrete(3, start=-1), stick=BOX
    ),
}


MIXED = spaces.Dict(
    camera=spaces.Box(-1, 1, (4, 36, 40)),
    depth=spaces.Box(0, 255, (36, 40), np.uint8),
    screen=spaces.Box(0, 255, (36, 40, 3), np.uint8),
    speech=spaces.Text(20),
    state=spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2), spaces.Box(-1, 1, (2, 2))]),
)


class Target(gymnasium.Env):
    """Rewards actions near a target; fails if an action is not in the space."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, action_space):
        self.action_space = action_space
        self._target = self._flat(_sample(action_space, np.random.default_rng(5)))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        assert action in self.action_space, (action, self.action_space)
        distance = np.abs(self._flat(action) - self._target).mean()
        self._steps += 1
        return self._observe(), float(np.exp(-2 * distance)), False, self._steps == 10, {}

    def _observe(self):
        return np.zeros(2, np.float32)

    def _flat(self, action):
        values = np.asarray(spaces.flatten(self.action_space, action), np.float64)
        # The second component of the Box is five times as wide.
        return np.where(np.abs(values) > 2, values / 5, values)


class Masked(gymnasium.Env):
    """Of nine actions, a third that changes is illegal; pays for the greatest legal one."""

    observation_space = spaces.Box(0.0, 1.0, (9,))
    action_space = spaces.Discrete(9)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe()

    def step(self, action):
        assert self._mask[action], 'an illegal action was chosen'
        reward = float(action == np.flatnonzero(self._mask)[-1])
        self._steps += 1
        observation, info = self._observe()
        return observation, reward, False, self._steps == 10, info

    def _observe(self):
        self._mask = np.ones(9, np.int8)
        self._mask[self.np_random.permutation(9)[:3]] = 0
        return self._mask.astype(np.float32), {'action_mask': self._mask}


class MaskedComponents(gymnasium.Env):
    """Of two components, categories that change are illegal."""

    observation_space = spaces.Box(0.0, 1.0, (7,))
    action_space = spaces.MultiDiscrete([3, 4])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe()

    def step(self, action):
        assert all(mask[each] for mask, each in zip(self._masks, action, strict=True))
        self._steps += 1
        observation, info = self._observe()
        return observation, 1.0, False, self._steps == 10, info

    def _observe(self):
        self._masks = [np.ones(3, np.int8), np.ones(4, np.int8)]
        for mask in self._masks:
            mask[self.np_random.integers(len(mask))] = 0
        observation = np.concatenate(self._masks).astype(np.float32)
        return observation, {'action_mask': tuple(self._masks)}


class Crowded(gymnasium.Env):
    """Has an image, numbers and a word, actions of both kinds, and an action mask in its info.

    Args:
      strict: whether a choice that the mask excludes is an error.
    """

    observation_space = spaces.Dict(
        picture=spaces.Box(0, 255, (33, 35, 3), np.uint8),
        numbers=spaces.Box(-1, 1, (3,)),
        word=spaces.Text(5),
    )
    action_space = spaces.Dict(choice=spaces.Discrete(3), stick=BOX)

    def __init__(self, strict):
        self._strict = strict

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe()

    def step(self, action):
        assert action in self.action_space, (action, self.action_space)
        assert self._mask[action['choice']] or not self._strict, (action, self._mask)
        self._steps += 1
        observation, info = self._observe()
        return observation, 1.0, False, self._steps == 10, info

    def _observe(self):
        picture = np.full((33, 35, 3), 60, np.uint8)
        picture[8:12, 3 * self._steps : 3 * self._steps + 4] = 255
        observation = {
            'picture': picture,
            'numbers': self.np_random.uniform(-1, 1, 3).astype(np.float32),
            'word': 'left' if self._steps % 2 else 'right',
        }
        self._mask = np.ones(3, np.int8)
        self._mask[self._steps % 3] = 0
        return observation, {'action_mask': self._mask}


class MaskedInDict(Masked):
    """As `Masked`, with the mask in the observation."""

    observation_space = spaces.Dict(
        observation=Masked.observation_space, action_mask=spaces.Box(0, 1, (9,), np.int8)
    )

    def _observe(self):
        observation, info = super()._observe()
        return {'observation': observation, **info}, {}


class Sampled(gymnasium.Env):
    """Chooses observations out of `pool` at random; the reward is the index of the last one."""

    def __init__(self, observation_space, action_space, size=10):
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(1)
        self.pool = [observation_space.sample() for _ in range(size)]
        self._rng = np.random.default_rng(2)
        self._index = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.pool[self._index], {}

    def step(self, action):
        assert action in self.action_space, (action, self.action_space)
        self._index = int(self._rng.integers(len(self.pool)))
        is_end = bool(self._rng.random() < 0.1)
        return self.pool[self._index], float(self._index), is_end, False, {}


class Instructed(gymnasium.Env):
    """Pays for the action that image, number or text name, whichever the present step uses."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (36, 40, 3), np.uint8),
        number=spaces.Discrete(3),
        text=spaces.Text(9),
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self._wanted)
        self._steps += 1
        return self._observe(), reward, False, self._steps == 10, {}

    def _observe(self):
        self._wanted, source = self.np_random.integers(2), self.np_random.integers(3)
        shade = 255 * self._wanted if source == 0 else 128
        return {
            'image': np.full((36, 40, 3), shade, np.uint8),
            'number': self._wanted if source == 1 else 2,
            'text': ('left', 'right')[self._wanted] if source == 2 else 'look around',
        }


class Combined(gymnasium.Env):
    """Pays for action 0 if both entries are positive or neither is, and else for action 1."""

    observation_space = spaces.Dict(choice=spaces.Discrete(2), number=spaces.Box(-1, 1, (1,)))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self._wanted)
        self._steps += 1
        return self._observe(), reward, False, self._steps == 10, {}

    def _observe(self):
        choice, sign = self.np_random.integers(2, size=2)
        self._wanted = int(choice != sign)
        return {'choice': choice, 'number': np.array([2 * sign - 1], np.float32)}


class Scaled(gymnasium.Env):
    """Pays for the action that one of three numbers names, which are far from 0."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self._wanted)
        self._steps += 1
        return self._observe(), reward, False, self._steps == 10, {}

    def _observe(self):
        self._wanted = self.np_random.integers(2)
        noise = self.np_random.normal()
        values = 1000 * np.array([2 * self._wanted - 1, noise, 0.3]) + 5000
        return values.astype(np.float32)


def _sample(space, rng):
    """Returns an action that does not depend on how the space draws its own."""
    if isinstance(space, spaces.Dict):
        return {name: _sample(each, rng) for name, each in space.items()}
    if isinstance(space, spaces.Box):
        low, high = np.maximum(space.low, -1), np.minimum(space.high, 3)
        return rng.uniform(low, high).astype(space.dtype)
    if isinstance(space, spaces.MultiDiscrete):
        return (rng.integers(space.nvec) + space.start).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(2, size=space.shape).astype(space.dtype)
    return space.start + rng.integers(space.n)


def multi_discrete(seed, config):
    return Target(ACTION_SPACES['multi_discrete'])


def multi_binary(seed, config):
    return Target(ACTION_SPACES['multi_binary'])


def box(seed, config):
    return Target(ACTION_SPACES['box'])


def unbounded(seed, config):
    return Target(ACTION_SPACES['unbounded'])


def mixture(seed, config):
    return Target(ACTION_SPACES['mixture'])


def crowded(seed, config, strict=False):
    return Crowded(strict)


def masked(seed, config):
    return Masked()


def masked_in_dict(seed, config):
    return MaskedInDict()


def mixed(seed, config):
    return Sampled(MIXED, ACTION_SPACES['mixture'])


def tuples(seed, config):
    return Sampled(spaces.Tuple([MIXED['depth'], MIXED['state'], MIXED]), spaces.Discrete(3))


def numbers(seed, config):
    return Sampled(MIXED['state'], ACTION_SPACES['multi_binary'])


def instructed(seed, config):
    return Instructed()


def combined(seed, config):
    return Combined()


def scaled(seed, config):
    return Scaled()


def choices(seed, config):
    return Sampled(spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)]), spaces.Discrete(2))


def masked_components(seed, config):
    return MaskedComponents()
