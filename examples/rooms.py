"""An environment with one reward, far away: walk through a row of rooms to the last one.

Random actions hardly ever find it; `random_network_distillation.py` does.

How to run it: docs/examples/random_network_distillation.md.
"""

import gymnasium
import numpy as np

SIDE = 5  # Cells of a room along each side.
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class Rooms(gymnasium.Env):
    """Rooms from left to right; the doors are alternately at the top and at the bottom.

    The agent starts at the top left, sees its column and its row, and gets a reward of 10 when it
    enters the last room, which ends the episode.
    """

    def __init__(self, rooms=8, limit=200):
        """Takes the number of rooms, and the steps after which an episode is truncated."""
        self._rooms, self._limit = rooms, limit
        self._width = rooms * (SIDE + 1)
        self.observation_space = gymnasium.spaces.MultiDiscrete([self._width, SIDE])
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))

    def reset(self, seed=None, options=None):
        """Starts an episode; see `gymnasium.Env`."""
        super().reset(seed=seed)
        self._column = self._row = self._steps = 0
        return self._observe(), {}

    def step(self, action):
        """Moves, unless there is a wall; see `gymnasium.Env`."""
        column, row = self._column + MOVES[action][0], self._row + MOVES[action][1]
        if column >= 0 and 0 <= row < SIDE and not self._is_wall(column, row):
            self._column, self._row = column, row
        self._steps += 1
        done = self._column // (SIDE + 1) == self._rooms - 1
        return self._observe(), 10.0 * done, done, self._steps == self._limit, {}

    def _is_wall(self, column, row):
        room, place = divmod(column, SIDE + 1)
        # The last column of a room is its right wall, with a door in one cell.
        return place == SIDE and row != (0 if room % 2 else SIDE - 1)

    def _observe(self):
        return np.array([self._column, self._row])


def make(seed, config, **kwargs):
    """Called in every actor; `--env_kwargs` has the arguments of `Rooms`."""
    return Rooms(**kwargs)
