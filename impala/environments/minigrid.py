"""MiniGrid and BabyAI: the picture that the agent sees instead of symbols."""

import sys
from typing import Any

import numpy as np

from impala.errors import LevelError


def is_minigrid(env: Any) -> bool:
    """Returns whether a Gymnasium environment is, below its wrappers, one of MiniGrid."""
    if 'minigrid' not in sys.modules:
        return False
    from minigrid.minigrid_env import MiniGridEnv

    return isinstance(env.unwrapped, MiniGridEnv)


def observation_maker(env: Any) -> str | None:
    """Returns the wrapper or subclass of MiniGrid that makes its own observation; None if none."""
    import gymnasium

    while isinstance(env, gymnasium.Wrapper):
        if (
            isinstance(env, gymnasium.ObservationWrapper)
            or env.observation_space is not env.env.observation_space
        ):
            return f'wrapper {type(env).__name__}'
        env = env.env
    if is_minigrid(env):
        from gymnasium import spaces
        from minigrid.minigrid_env import MiniGridEnv

        side = env.agent_view_size
        symbols = spaces.Dict(image=spaces.Box(0, 255, (side, side, 3), np.uint8))['image']
        space = env.observation_space
        is_own = not isinstance(space, spaces.Dict) or space.spaces.get('image') != symbols
        if is_own or type(env).gen_obs is not MiniGridEnv.gen_obs:
            return f'class {type(env).__name__}'
    return None


def made_by(env: Any) -> str:
    """Returns the maker of an observation as a part of a sentence, or ''."""
    maker = observation_maker(env)
    return f' of its {maker}' if maker else ''


class MiniGridPicture:
    """A picture of the cells that the agent sees, instead of MiniGrid's own symbols.

    The picture does not show changes that a wrapper makes to the symbols. Most such wrappers are
    recognized by their type or space (`observation_maker`), the others when an observation differs
    from what MiniGrid generated.
    """

    def __init__(self, level_name: str, env: Any) -> None:
        from minigrid.wrappers import RGBImgPartialObsWrapper

        self._level_name = level_name
        self._env = env
        self._wrapper = RGBImgPartialObsWrapper(env)
        self.space: Any = self._wrapper.observation_space
        self._symbols: list[np.ndarray] = []
        generate = env.unwrapped.gen_obs

        def generate_and_note() -> Any:
            observation = generate()
            self._symbols.append(observation['image'])
            return observation

        env.unwrapped.gen_obs = generate_and_note

    def of(self, observation: Any) -> np.ndarray:
        """Returns uint8 `[H, W, 3]` in place of an observation that the environment returned.

        Raises:
          LevelError: the observation is not MiniGrid's own.
        """
        image = observation['image']
        if not any(image is symbols or np.array_equal(image, symbols) for symbols in self._symbols):
            import gymnasium

            names = []
            env = self._env
            while isinstance(env, gymnasium.Wrapper):
                if not type(env).__module__.startswith('gymnasium.'):
                    names.append(type(env).__name__)
                env = env.env
            raise LevelError(
                f"{self._level_name!r} changes MiniGrid's observation in "
                f'{" or ".join(names or [type(env).__name__])}, which has no observation space of '
                'its own: make that a gymnasium.ObservationWrapper, and have it return a picture.'
            )
        self._symbols.clear()
        return self._wrapper.observation(observation)['image']
