"""Actions with several components: a Tuple of a choice and of continuous values.

How to run it: docs/examples/tuple_actions.md.
"""

import gymnasium
import numpy as np

ARROWS = 3
SHOTS = 10


class Archery(gymnasium.Env):
    """Ten shots at targets: choose the arrow for the target, and aim in two dimensions.

    A shot with the right arrow gets `exp(-2 distance)`, any other 0. Positions are from -1 to 1.
    """

    action_space = gymnasium.spaces.Tuple(
        [gymnasium.spaces.Discrete(ARROWS), gymnasium.spaces.Box(-1.0, 1.0, (2,))]
    )
    observation_space = gymnasium.spaces.Tuple(
        [gymnasium.spaces.Discrete(ARROWS), gymnasium.spaces.Box(-1.0, 1.0, (2,))]
    )

    def reset(self, *, seed=None, options=None):
        """Starts an episode; see `gymnasium.Env`."""
        super().reset(seed=seed)
        self._shots = 0
        return self._next_target(), {}

    def step(self, action):
        """Shoots; see `gymnasium.Env`."""
        arrow, aim = action
        distance = np.linalg.norm(aim - self._position)
        reward = float(np.exp(-2 * distance)) if arrow == self._kind else 0.0
        self._shots += 1
        return self._next_target(), reward, False, self._shots == SHOTS, {}

    def _next_target(self):
        self._kind = int(self.np_random.integers(ARROWS))
        self._position = self.np_random.uniform(-0.9, 0.9, 2).astype(np.float32)
        return self._kind, self._position


def make(seed, config):
    """Called in every actor."""
    return Archery()
