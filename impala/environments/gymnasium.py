"""Any environment of Gymnasium."""

import contextlib
import inspect
import io
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from impala.config import EnvironmentConfig
from impala.environments.action_masks import ActionMask
from impala.environments.action_spaces import ActionSpace
from impala.environments.checked_environment import MAX_OBSERVATIONS
from impala.environments.environment import DeclarationError, Environment, Observation
from impala.environments.minigrid import MiniGridPicture, is_minigrid, made_by, observation_maker
from impala.environments.observations import Observations
from impala.errors import LevelError
from impala.trajectory import ACTION_MASK, ArraySpec, EnvironmentSpec, EpisodeEnd


class GymnasiumEnvironment(Environment):
    """Any environment of Gymnasium; see `impala.environments.action_spaces` for its actions.

    `impala.environments.observations` says how observations are converted. An `action_mask` in a
    Dict, or in the info with `config.info_action_mask`, says which actions are allowed. MiniGrid's
    and BabyAI's 7x7x3 symbols are replaced by a picture of the same 7x7 cells, 56x56 pixels (8 per
    cell). It is turned the agent's way, so it shows the direction too. An observation that a
    wrapper or a subclass makes is used as it is, and pictures are not resized.

    Observations are compared with their space (see `impala.environments.observation_spaces`).
    Rewards must be numbers, and ends of episodes True or False.
    """

    def __init__(
        self, level_name: str, env: Any, repeats: int, seed: int, config: EnvironmentConfig
    ) -> None:
        """Takes over a Gymnasium environment.

        Args:
          level_name: for error messages.
          env: a `gymnasium.Env`; it is closed if it is not supported.
          repeats: frames per agent step.
          seed: of the first reset; later resets continue its random numbers.
          config: see `EnvironmentConfig`.

        Raises:
          LevelError: one of its spaces is not supported, or it has an older interface.
        """
        self._level_name = level_name
        self._env = env
        self._repeats = repeats
        self._seed: int | None = seed
        self._keeps_last_observation = config.bootstrap_truncated
        self._picture: MiniGridPicture | None = None
        size: tuple[int, int] | None = (config.width, config.height)
        try:
            self._check_interface()
            if is_minigrid(env):
                size = None
                if observation_maker(env) is None:
                    self._picture = MiniGridPicture(level_name, env)
            self._spec_of_spaces(repeats, size, config)
        except BaseException:
            env.close()
            raise

    def _check_interface(self) -> None:
        import gymnasium

        for name in ('action_space', 'observation_space'):
            if not isinstance(getattr(self._env, name, None), gymnasium.Space):
                raise LevelError(f'{self._level_name!r} has no {name} out of gymnasium.spaces.')
        env = self._env
        while env is not None:
            # Methods of extension modules may have no signature.
            with contextlib.suppress(ValueError):
                try:
                    inspect.signature(env.reset).bind(seed=0, options=None)
                except TypeError as error:
                    raise LevelError(
                        f'{self._level_name!r} has an older interface than that of Gymnasium: '
                        f'{type(env).__name__}.reset must take seed and options.'
                    ) from error
            env = env.env if isinstance(env, gymnasium.Wrapper) else None

    def _spec_of_spaces(
        self, repeats: int, size: tuple[int, int] | None, config: EnvironmentConfig
    ) -> None:
        from gymnasium import spaces

        actions = ActionSpace(self._env.action_space, self._level_name, config.clip_actions)
        self._decode_action = actions.decode
        if config.clip_actions and not actions.spec.bounds:
            raise self._without_effect('clip_actions', 'which has no Box among its actions')
        space: Any = self._env.observation_space
        keys = config.observation_keys
        if self._picture is not None:
            # The picture shows the direction, too.
            space = self._picture.space
            keys = keys or tuple(key for key in ('image', 'mission') if key in space.spaces)
        maker = made_by(self._env)
        observations = Observations(space, size, self._level_name, keys, maker)
        self._take, self._arrays = observations.take, observations.arrays
        observation = dict(observations.spec)
        mask_is_observed = isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces
        self._mask: ActionMask | None = None
        self._mask_is_observed = mask_is_observed
        if config.info_action_mask and mask_is_observed:
            reason = f'which has an {ACTION_MASK!r} in its observation'
            raise self._without_effect('info_action_mask', reason)
        if config.info_action_mask and not actions.spec.categories:
            raise self._without_effect('info_action_mask', 'whose actions have no categories')
        if mask_is_observed and not actions.spec.categories:
            raise LevelError(
                f'{self._level_name!r} has an {ACTION_MASK!r} in its observation, but its actions '
                'have no categories.'
            )
        if mask_is_observed or config.info_action_mask:
            where = 'an observation' if mask_is_observed else 'an info'
            self._mask = ActionMask(
                actions.spec,
                self._env.action_space,
                self._level_name,
                f'{where} with an {ACTION_MASK!r}',
            )
            observation[ACTION_MASK] = ArraySpec(self._mask.array.shape, 'bool')
            self._arrays[ACTION_MASK] = self._mask.array
        if len(observation) > MAX_OBSERVATIONS:
            raise LevelError(
                f'The observation of {self._level_name!r}{maker} has {len(observation)} arrays, '
                f'{", ".join(observation)}, and there may be {MAX_OBSERVATIONS}: choose some of '
                'its entries by --observation_keys.'
            )
        self.spec = EnvironmentSpec(observation, actions.spec, repeats)

    def reset(self) -> Observation:
        # MiniGrid prints to stdout when it has to generate a level again.
        with contextlib.redirect_stdout(io.StringIO()):
            result = self._env.reset(seed=self._seed)
        self._seed = None
        try:
            observation, info = result
        except (TypeError, ValueError) as error:
            raise self._wrong_result('reset', '(observation, info)', result) from error
        return self._convert(observation, info, is_first=True)

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        action = self._decode_action(action)
        total_reward = 0.0
        for frames in range(1, self._repeats + 1):
            result = self._env.step(action)
            try:
                observation, reward, terminated, truncated, info = result
            except (TypeError, ValueError) as error:
                values = '(observation, reward, terminated, truncated, info)'
                raise self._wrong_result('step', values, result) from error
            total_reward += reward if isinstance(reward, float) else self._number(reward)
            if terminated is not False or truncated is not False:
                terminated = self._truth('terminated', terminated)
                truncated = self._truth('truncated', truncated)
                if terminated or truncated:
                    self.last_action_frames = frames
                    end = self._end(terminated, truncated)
                    if self._keeps_last_observation and end == EpisodeEnd.TRUNCATED:
                        arrays = self._convert(observation, info, is_first=False)
                        # The reset overwrites the arrays.
                        self.last_observation = {name: arrays[name].copy() for name in arrays}
                    return total_reward, end, self.reset()
        return total_reward, EpisodeEnd.NOT_ENDED, self._convert(observation, info, is_first=False)

    def seed_next(self, seed: int) -> bool:
        self._seed = seed
        return True

    @property
    def frames_per_second(self) -> float | None:
        rate = (self._env.metadata or {}).get('render_fps')
        if isinstance(rate, int | float | np.number) and 0 < rate < math.inf:
            return float(rate)
        return None

    def render(self) -> np.ndarray | None:
        import gymnasium

        # Some cannot draw, draw with packages that they do not require, or need a display.
        cannot_draw: list[type[Exception]] = [ImportError, NotImplementedError]
        cannot_draw.append(gymnasium.error.Error)
        mujoco = sys.modules.get('mujoco')
        if mujoco is not None:
            cannot_draw.append(mujoco.FatalError)
        try:
            picture = self._env.render()
        except tuple(cannot_draw):
            return None
        if not isinstance(picture, np.ndarray) or picture.shape[2:] != (3,):
            return None
        return picture

    def close(self) -> None:
        self._env.close()

    def _end(self, terminated: bool, truncated: bool) -> EpisodeEnd:
        # An episode that reaches its goal in its last allowed step has reached it.
        return EpisodeEnd.TERMINATED if terminated else EpisodeEnd.TRUNCATED

    def _convert(self, observation: Any, info: Any, is_first: bool) -> Observation:
        if self._mask is not None:
            source = observation if self._mask_is_observed else info
            if not isinstance(source, Mapping) or ACTION_MASK not in source:
                raise self._without_mask()
            self._mask.take(source[ACTION_MASK])
        if self._picture is not None and isinstance(observation, Mapping):
            observation = {**observation, 'image': self._picture.of(observation)}
        self._take(observation, is_first)
        return self._arrays

    def _number(self, reward: Any) -> float:
        array = np.asarray(reward)
        if array.shape or array.dtype.kind not in 'biuf':
            raise DeclarationError(
                f'{self._level_name!r} returned {_short(reward)} as a reward, which is not a '
                'number.'
            )
        return float(array)

    def _truth(self, name: str, value: Any) -> bool:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        array = np.asarray(value)
        # 0-dimensional arrays are accepted, and so are 0 and 1, which many environments return.
        if array.shape or not (array.dtype.kind == 'b' or value in (0, 1)):
            raise DeclarationError(
                f'{self._level_name!r} returned {_short(value)} as {name!r}, which is neither True '
                'nor False.'
            )
        return bool(value)

    def _without_effect(self, setting: str, reason: str) -> LevelError:
        return LevelError(f'--{setting} has no effect on {self._level_name!r}, {reason}.')

    def _wrong_result(self, method: str, values: str, result: Any) -> DeclarationError:
        came = f'{len(result)} values' if isinstance(result, tuple) else _short(result)
        return DeclarationError(
            f"{self._level_name!r} returned {came} from {method}(), where Gymnasium's interface "
            f'has {values}.'
        )

    def _without_mask(self) -> DeclarationError:
        if self._mask_is_observed:
            return DeclarationError(
                f'{self._level_name!r} declares {ACTION_MASK!r} in its observation, but returned '
                'one without it.'
            )
        return DeclarationError(
            f'{self._level_name!r} returned an info without {ACTION_MASK!r}, which '
            '--info_action_mask needs.'
        )


def _short(value: Any) -> str:
    """Describes a value in a few words."""
    if isinstance(value, np.ndarray):
        return f'{value.dtype} {list(value.shape)}'
    if isinstance(value, bool | int | float | complex | str | np.generic) or value is None:
        text = repr(value)
        return text if len(text) <= 50 else f'{text[:50]}...'
    return f'a {type(value).__name__}'
