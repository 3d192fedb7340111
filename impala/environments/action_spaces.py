"""Action spaces of Gymnasium: what is supported, and how an agent's action becomes one of theirs.

Supported are Discrete, MultiDiscrete, MultiBinary, Box of floats, and any Tuple or Dict of these.
`impala.trajectory.ActionSpec` flattens them: the categorical components in their order in the
space, then the continuous ones. A MultiBinary has components of two categories.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from impala.environments.observation_spaces import space_text
from impala.errors import LevelError
from impala.trajectory import ActionSpec

# Some environments declare the largest floats as bounds where they mean none.
_INFINITE = 1e18
# A category is one of 32 bits, and in a space with continuous components a float32.
MAX_CATEGORIES = 2**24

# Takes the categories of the whole action, i32 `[K]`, and its continuous values, f32 `[D]`.
_Decode = Callable[[np.ndarray, np.ndarray], Any]


class ActionSpace:
    """An action space of Gymnasium.

    Attributes:
      spec: the same space for the agent.
    """

    def __init__(self, space: Any, level_name: str, is_clipped: bool = False) -> None:
        """Reads a space.

        Args:
          space: a `gymnasium.Space`.
          level_name: for error messages.
          is_clipped: whether the agent's continuous actions are unbounded and then clipped to the
            bounds, instead of bounded by a hyperbolic tangent. If there are two bounds, they are
            scaled first: -1 and 1 become the bounds.

        Raises:
          LevelError: the space is not supported.
        """
        from gymnasium import spaces

        self._space = space
        self._level_name = level_name
        self._is_clipped = is_clipped
        self._categories: list[int] = []
        self._bounds: list[tuple[float, float] | None] = []
        self._decode = self._read(space)
        is_scalar = isinstance(space, spaces.Discrete)
        self._start = int(space.start) if is_scalar else 0
        self.spec = ActionSpec(tuple(self._categories), tuple(self._bounds), is_scalar)
        if 0 in self._categories or not (self._categories or self._bounds):
            raise LevelError(f'{level_name!r} has no actions: its space is {space_text(space)}.')
        if max(self._categories, default=0) > MAX_CATEGORIES:
            raise LevelError(
                f'{level_name!r} has the action space {space_text(space)}, and a component may '
                f'have at most {MAX_CATEGORIES:,} categories.'
            )

    def decode(self, action: Any) -> Any:
        """Returns an action of the space.

        Args:
          action: an integer if the space is Discrete, otherwise an array as
            `ActionSpec.to_environment` returns it.
        """
        if self.spec.is_scalar:
            return int(action) + self._start
        categories, values = np.split(action, [len(self._categories)])
        return self._decode(categories.astype(np.int64), values)

    def _read(self, space: Any) -> _Decode:
        """Adds the components of a space; returns how actions of the space are made of them."""
        from gymnasium import spaces

        if isinstance(space, spaces.Discrete):
            index, start = len(self._categories), int(space.start)
            self._categories.append(int(space.n))
            return lambda categories, values: start + int(categories[index])
        if isinstance(space, spaces.MultiDiscrete):
            return self._read_categories(space, space.nvec.reshape(-1).tolist(), space.start)
        if isinstance(space, spaces.MultiBinary):
            return self._read_categories(space, [2] * math.prod(space.shape), 0)
        if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind == 'f':
            return self._read_box(space)
        if isinstance(space, spaces.Tuple):
            parts = [self._read(each) for each in space]
            return lambda categories, values: tuple(part(categories, values) for part in parts)
        if isinstance(space, spaces.Dict):
            named = {name: self._read(each) for name, each in space.items()}
            return lambda categories, values: {
                name: part(categories, values) for name, part in named.items()
            }
        part = '' if space is self._space else f', of which {space_text(space)} is not supported'
        raise LevelError(
            f'{self._level_name!r} has the action space {space_text(self._space)}{part}: actions '
            'may be Discrete, MultiDiscrete, MultiBinary, a Box of floats, or a Tuple or Dict of '
            'these.'
        )

    def _read_categories(self, space: Any, sizes: list[int], start: Any) -> _Decode:
        begin = len(self._categories)
        self._categories += sizes
        end = len(self._categories)
        return lambda categories, values: (
            categories[begin:end].reshape(space.shape) + start
        ).astype(space.dtype)

    def _read_box(self, space: Any) -> _Decode:
        begin = len(self._bounds)
        with np.errstate(over='ignore'):
            low, high = (each.reshape(-1).astype(np.float64) for each in (space.low, space.high))
        has_low, has_high = low > -_INFINITE, high < _INFINITE
        if self._is_clipped:
            self._bounds += [None] * low.size
        else:
            self._bounds += self._box_bounds(low, high, has_low, has_high)
        end = len(self._bounds)
        is_scaled = self._is_clipped & has_low & has_high
        middle, half = np.zeros_like(low), np.ones_like(low)
        middle[is_scaled] = (low[is_scaled] + high[is_scaled]) / 2
        half[is_scaled] = (high[is_scaled] - low[is_scaled]) / 2

        def decode(categories: np.ndarray, values: np.ndarray) -> np.ndarray:
            # Clipped in any case, because rounding may exceed a bound.
            box = np.clip(middle + half * values[begin:end], low, high)
            return box.astype(space.dtype).reshape(space.shape)

        return decode

    def _box_bounds(
        self, low: np.ndarray, high: np.ndarray, has_low: np.ndarray, has_high: np.ndarray
    ) -> list[tuple[float, float] | None]:
        problem = ''
        if (has_low != has_high).any():
            problem = 'has a component with one bound'
        elif (has_low & ~(low < high)).any():
            problem = 'has a component whose bounds are equal'
        if problem:
            raise LevelError(
                f'{self._level_name!r} has the action space {space_text(self._space)}, which '
                f'{problem}: give --clip_actions.'
            )
        return [(float(low[i]), float(high[i])) if has_low[i] else None for i in range(len(low))]
