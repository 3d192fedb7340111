"""An environment of one's own, which is seen as an image and a vector.

A ball falls; the agent catches it in a basket. A picture shows the ball, a number is the basket's
place, as a robot's camera and its sensors would tell.

How to run it: docs/examples/own_environment.md.
"""

import gymnasium
import numpy as np

CELLS = 8  # Rows and columns.
PIXELS = 4  # Side of a cell.


class Catch(gymnasium.Env):
    """An episode is one fall of the ball; the return is 1 if it is caught, otherwise 0.

    Actions: left, stay, right. In each step the wind may move the ball sideways.
    """

    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (CELLS * PIXELS, CELLS * PIXELS, 3), np.uint8),
        basket=gymnasium.spaces.Box(-1.0, 1.0, (1,)),
    )

    def __init__(self, difficulty=1):
        """Takes the probability of wind in a step, in tenths."""
        if difficulty not in range(11):
            raise ValueError(f'difficulty must be from 0 to 10, not {difficulty}')
        self._wind = difficulty / 10

    def reset(self, *, seed=None, options=None):
        """Starts an episode; see `gymnasium.Env`."""
        super().reset(seed=seed)
        # All random numbers come from `np_random`, so that the seed decides what is played.
        self._ball, self._basket = self.np_random.integers(CELLS, size=2)
        self._row = 0
        return self._observe(), {}

    def step(self, action):
        """Moves basket and ball; see `gymnasium.Env`."""
        self._basket = np.clip(self._basket + action - 1, 0, CELLS - 1)
        self._row += 1
        if self.np_random.random() < self._wind:
            self._ball = np.clip(self._ball + self.np_random.choice([-1, 1]), 0, CELLS - 1)
        terminated = self._row == CELLS - 1
        reward = float(terminated and self._ball == self._basket)
        return self._observe(), reward, terminated, False, {}

    def _observe(self):
        cells = np.full((CELLS, CELLS, 3), [40, 60, 120], np.uint8)
        cells[self._row, self._ball] = [255, 220, 80]
        place = 2 * self._basket / (CELLS - 1) - 1
        return {
            'image': cells.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1),
            'basket': np.array([place], np.float32),
        }


def make(seed, config, difficulty=1):
    """Called in every actor; `--env_kwargs` has `difficulty`. The first reset gets the seed."""
    return Catch(difficulty)
