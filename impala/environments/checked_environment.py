"""The user's own environments (`my_package.my_module:make`), checked where they enter.

Every mistake becomes a `LevelError`: a sentence that names the level and says what would be right.
"""

import contextlib
import dataclasses
import inspect
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from impala.environments.action_spaces import MAX_CATEGORIES
from impala.environments.environment import DeclarationError, Environment, Observation
from impala.errors import LevelError
from impala.trajectory import (
    ACTION_MASK,
    ACTION_NOISE,
    INSTRUCTION_BUCKETS,
    ActionSpec,
    ArraySpec,
    EnvironmentSpec,
    EpisodeEnd,
)

# The fields that the shared segment has for them (kMaxFields - kFirstObservation), without the one
# that test mode needs for `ACTION_NOISE`.
MAX_OBSERVATIONS = 11
# What batches and networks support. The only floating-point type is float32: networks compute in
# it, and only float32 values are checked for being finite.
DTYPES = ('float32', 'uint8', 'int8', 'uint16', 'int16', 'int32', 'int64', 'bool')
# Greater bounds of an action mean none; see `impala.environments.action_spaces`.
_MAX_BOUND = 1e18


def check_callable(level_name: str, make: Any, kwargs: Mapping[str, Any]) -> None:
    """Checks that an object can be called with a seed, an `EnvironmentConfig` and `kwargs`.

    Raises:
      LevelError: it cannot.
    """
    if not callable(make):
        raise LevelError(f'{level_name!r} is {_a(make)}, not a callable that takes (seed, config).')
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        # Callables of extension modules may have no signature.
        return
    try:
        signature.bind(0, None, **kwargs)
    except TypeError as error:
        arguments = ', '.join(['seed', 'config', *kwargs])
        raise LevelError(
            f'{level_name!r} must be a callable that takes ({arguments}): {error}.'
        ) from error


def checked(level_name: str, environment: Any) -> Environment:
    """Returns an environment that checks what it returns against its spec.

    Args:
      level_name: for error messages.
      environment: what the callable returned.

    Raises:
      LevelError: it is not an `Environment`, or no agent can be built for its spec.
    """
    if not isinstance(environment, Environment):
        raise LevelError(
            f'{level_name!r} returned {_a(environment)}, which is not an environments.Environment.'
        )
    return _Checked(level_name, environment)


def check_observation(level_name: str, spec: EnvironmentSpec, observation: Any) -> None:
    """Compares an observation with its spec.

    Args:
      level_name: for error messages.
      spec: of the environment.
      observation: what `reset` or `step` returned.

    Raises:
      DeclarationError: the observation does not match the spec.
    """
    if not isinstance(observation, Mapping):
        raise DeclarationError(
            f'{level_name!r} returned {_a(observation)} as its observation, which must be a dict '
            f'with {_listed(spec.observation)}.'
        )
    for name, array_spec in spec.observation.items():
        if name not in observation:
            raise DeclarationError(
                f'{level_name!r} returned an observation without {name!r}, which its spec declares.'
            )
        array = observation[name]
        declared = f'but its spec declares {_shown(array_spec.dtype, array_spec.shape)}.'
        if not isinstance(array, np.ndarray | np.generic):
            raise DeclarationError(
                f'{level_name!r} returned the observation {name!r} as {_a(array)}, {declared}'
            )
        if (array.shape, array.dtype) != (array_spec.shape, np.dtype(array_spec.dtype)):
            raise DeclarationError(
                f'{level_name!r} returned the observation {name!r} as '
                f'{_shown(array.dtype, array.shape)}, {declared}'
            )
        if name == 'instruction':
            _check_instruction(level_name, array)
        if name == ACTION_MASK:
            _check_mask(level_name, spec.action, array)


class _Checked(Environment):
    """Wraps an environment: checks its spec once, and results when they are returned."""

    def __init__(self, level_name: str, environment: Environment) -> None:
        self._level_name = level_name
        self._environment = environment
        self._step = environment.step
        try:
            self.spec = _SpecCheck(level_name).checked(getattr(environment, 'spec', None))
        except LevelError:
            environment.close()
            raise
        self._was_truncated = False
        self._speaks = 'instruction' in self.spec.observation
        self._has_mask = ACTION_MASK in self.spec.observation

    @property
    def frames_per_second(self) -> float | None:
        return self._environment.frames_per_second

    @property
    def last_action_frames(self) -> int | None:  # type: ignore[override]
        return self._environment.last_action_frames

    @property
    def last_observation(self) -> Observation | None:  # type: ignore[override]
        observation = self._environment.last_observation
        if observation is not None:
            check_observation(self._level_name, self.spec, observation)
        return observation

    def reset(self) -> Observation:
        observation = self._environment.reset()
        check_observation(self._level_name, self.spec, observation)
        return observation

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        if self._was_truncated:
            # So that it is missed where the next episode leaves it out; a property has no need.
            with contextlib.suppress(AttributeError):
                self._environment.last_observation = None
        result: Any = self._step(action)
        try:
            reward, end, observation = result
        except (TypeError, ValueError) as error:
            raise DeclarationError(
                f'{self._level_name!r} returned {_a(result)} from step, which must return three '
                'values: reward, end and observation.'
            ) from error
        if type(reward) is not float:
            reward = self._number(reward)
        if type(end) is not EpisodeEnd:
            raise DeclarationError(
                f'{self._level_name!r} returned {end!r}, {_a(end)}, as the end of the episode, '
                f'which must be one of {", ".join(map(str, EpisodeEnd.__members__))} of '
                'impala.trajectory.EpisodeEnd.'
            )
        self._was_truncated = end == EpisodeEnd.TRUNCATED
        # Shapes and dtypes are checked where observations are copied into the shared segment.
        if self._speaks and isinstance(observation, Mapping):
            _check_instruction(self._level_name, observation.get('instruction'))
        if self._has_mask and isinstance(observation, Mapping):
            _check_mask(self._level_name, self.spec.action, observation.get(ACTION_MASK))
        return reward, end, observation

    def _number(self, reward: Any) -> float:
        is_array = isinstance(reward, np.ndarray | np.generic)
        if is_array and reward.shape == () and reward.dtype.kind in 'biuf':
            return float(reward)
        if isinstance(reward, numbers.Real):
            with contextlib.suppress(OverflowError):
                return float(reward)
        raise DeclarationError(
            f'{self._level_name!r} returned {_a(reward)} as its reward, which must be a number.'
        )

    def seed_next(self, seed: int) -> bool:
        return self._environment.seed_next(seed)

    def render(self) -> np.ndarray | None:
        return self._environment.render()

    def check(self) -> None:
        """Tries a reset and a step after the environment's own check."""
        self._environment.check()
        try:
            check_observation(self._level_name, self.spec, self.reset())
            _, _, observation = self.step(self.spec.action.zero)
            check_observation(self._level_name, self.spec, observation)
        except LevelError:
            raise
        except (Exception, SystemExit):
            # Left to the actors to report, since chance may have caused it.
            pass

    def close(self) -> None:
        self._environment.close()


class _SpecCheck:
    """Checks the parts of a spec."""

    def __init__(self, level_name: str) -> None:
        self._level_name = level_name

    def checked(self, spec: Any) -> EnvironmentSpec:
        """Returns the spec with Python's own numbers and names of dtypes.

        Raises:
          LevelError: no agent can be built for the spec.
        """
        if not isinstance(spec, EnvironmentSpec):
            raise LevelError(
                f"{self._level_name!r} made an environment whose attribute 'spec' is {_a(spec)}, "
                'not an impala.trajectory.EnvironmentSpec.'
            )
        observation = self._observation(spec.observation)
        self._check_instruction(observation.get('instruction'))
        action = self._action(spec.action)
        self._check_mask(observation.get(ACTION_MASK), action)
        num_action_repeats = self._count('num_action_repeats', spec.num_action_repeats)
        self._check_suite(spec.suite, observation['frame'])
        return dataclasses.replace(
            spec,
            observation=observation,
            action=action,
            num_action_repeats=num_action_repeats,
        )

    def _observation(self, declared: Any) -> dict[str, ArraySpec]:
        if not isinstance(declared, Mapping) or not all(
            isinstance(name, str) and isinstance(each, ArraySpec) for name, each in declared.items()
        ):
            raise self._error(
                'must have a dict of name -> impala.trajectory.ArraySpec as its observation'
            )
        if 'frame' not in declared:
            raise self._error(
                f"declares {_listed(declared)}, but no observation 'frame', which is what the "
                'agent sees'
            )
        if len(declared) > MAX_OBSERVATIONS:
            raise self._error(
                f'declares {len(declared)} observations, and there may be {MAX_OBSERVATIONS}'
            )
        if ACTION_NOISE in declared:
            raise self._error(
                f'declares the observation {ACTION_NOISE!r}, a name that test mode uses itself: '
                'choose another'
            )
        observation = {name: self._array(name, each) for name, each in declared.items()}
        frame = observation['frame']
        if len(frame.shape) > 3:
            raise self._error(
                f"declares the observation 'frame' as {_shown(frame.dtype, frame.shape)}, and it "
                'may have three dimensions at most'
            )
        return observation

    def _array(self, name: str, declared: ArraySpec) -> ArraySpec:
        try:
            dtype = np.dtype(declared.dtype).name
        except TypeError:
            dtype = ''
        if dtype not in DTYPES:
            raise self._error(
                f'declares the observation {name!r} as {declared.dtype}, and it may be one of '
                f'{", ".join(DTYPES)}'
            )
        try:
            shape = tuple(operator.index(size) for size in declared.shape)
        except TypeError:
            shape = (0,)
        if min(shape, default=1) < 1:
            raise self._error(
                f'declares the observation {name!r} with the shape {declared.shape}, and it must '
                'be a tuple of positive integers'
            )
        return ArraySpec(shape, dtype, parts=declared.parts)

    def _check_instruction(self, instruction: ArraySpec | None) -> None:
        if instruction and (instruction.dtype, len(instruction.shape)) != ('int32', 1):
            raise self._error(
                "declares the observation 'instruction' as "
                f'{_shown(instruction.dtype, instruction.shape)}, and it must be int32 with one '
                'dimension, as environments.hash_instruction returns it'
            )

    def _check_mask(self, mask: ArraySpec | None, action: ActionSpec) -> None:
        expected = ArraySpec((action.num_logits,), 'bool')
        if mask is not None and mask != expected:
            raise self._error(
                f'declares the observation {ACTION_MASK!r} as {_shown(mask.dtype, mask.shape)}, '
                f'and it must be {_shown(expected.dtype, expected.shape)}, one value for each '
                'category of the actions'
            )

    def _action(self, action: Any) -> ActionSpec:
        if not isinstance(action, ActionSpec):
            raise self._error(
                f'has action={action!r}, and it must be an impala.trajectory.ActionSpec, or a '
                'number of discrete actions'
            )
        for name in ('categories', 'bounds'):
            if not isinstance(getattr(action, name), tuple | list):
                raise self._error(f'has {name}={getattr(action, name)!r}, and it must be a tuple')
        if not action.categories and not action.bounds:
            raise self._error('has no actions')
        categories = tuple(self._count('categories', size) for size in action.categories)
        if max(categories, default=0) > MAX_CATEGORIES:
            raise self._error(
                f'has {max(categories):,} categories, and a component may have {MAX_CATEGORIES:,} '
                'at most'
            )
        bounds = tuple(map(self._bounds, action.bounds))
        if action.is_scalar and (len(categories) != 1 or bounds):
            raise self._error(
                'has is_scalar=True, and there must then be one categorical component and no other'
            )
        return ActionSpec(categories, bounds, bool(action.is_scalar))

    def _bounds(self, bounds: Any) -> tuple[float, float] | None:
        if bounds is None:
            return None
        with contextlib.suppress(TypeError, ValueError):
            low, high = map(float, bounds)
            # The learner computes in float32.
            if -_MAX_BOUND <= low < high <= _MAX_BOUND:
                return low, high
        raise self._error(
            f'has the bounds {bounds}, and they must be None or two numbers from '
            f'{-_MAX_BOUND:g} to {_MAX_BOUND:g}, the second greater than the first'
        )

    def _count(self, name: str, value: Any) -> int:
        if not isinstance(value, numbers.Integral) or not 1 <= int(value) < 2**31:
            raise self._error(f'has {name}={value!r}, and it must be an integer of at least 1')
        return int(value)

    def _check_suite(self, suite: str, frame: ArraySpec) -> None:
        if suite not in ('', 'atari', 'dmlab'):
            raise self._error(f"has suite={suite!r}, and it must be '', 'atari' or 'dmlab'")
        if suite == 'atari' and (frame.dtype, len(frame.shape)) != ('uint8', 3):
            raise self._error(
                f"has suite='atari' and the observation 'frame' as "
                f'{_shown(frame.dtype, frame.shape)}, and it must be uint8 '
                '[height, width, frames]'
            )

    def _error(self, text: str) -> LevelError:
        return LevelError(f'The spec of {self._level_name!r} {text}.')


def _check_instruction(level_name: str, instruction: Any) -> None:
    # Other mistakes are reported elsewhere.
    if not isinstance(instruction, np.ndarray) or instruction.dtype != np.int32:
        return
    # As unsigned numbers, negative ones are too large as well.
    if instruction.size and instruction.view(np.uint32).max() >= INSTRUCTION_BUCKETS:
        raise DeclarationError(
            f"{level_name!r} returned the observation 'instruction' with numbers outside of 0 to "
            f'{INSTRUCTION_BUCKETS - 1}: environments.hash_instruction makes one of a text.'
        )


def _check_mask(level_name: str, action: ActionSpec, mask: Any) -> None:
    # Other mistakes are reported elsewhere.
    if not isinstance(mask, np.ndarray) or (mask.shape, mask.dtype) != ((action.num_logits,), bool):
        return
    begins = np.cumsum([0, *action.categories[:-1]])
    if not np.logical_or.reduceat(mask, begins).all():
        raise DeclarationError(
            f'{level_name!r} returned an observation {ACTION_MASK!r} that allows no action.'
        )


def _a(value: Any) -> str:
    """Returns the type of a value with an article."""
    if value is None:
        return 'None'
    name = type(value).__name__
    if isinstance(value, np.ndarray):
        return f'an array {_shown(value.dtype, value.shape)}'
    if isinstance(value, tuple | list):
        return f'a {name} of {len(value)}'
    return f'{"an" if name[0].lower() in "aeiou" else "a"} {name}'


def _shown(dtype: Any, shape: tuple[int, ...]) -> str:
    return f'{dtype} {list(shape)}'


def _listed(names: Mapping[str, Any]) -> str:
    return ' and '.join(map(repr, names)) if names else 'nothing'
