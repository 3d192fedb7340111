"""The structures that flow from the actors to the learner, and their specs.

Names follow the paper and its released code. Letters: T unroll length, B batch size, A number of
actions, H, W, C frame height, width and channels, L instruction length. An unroll has T+1 rows: row
`t` of `env_outputs` is what the agent sees before it acts, row `t` of `agent_outputs` is the action
that *led to* row `t` of `env_outputs`. Row 0 repeats row T of the previous unroll.

This module uses only NumPy: actor processes import it and never load TensorFlow.
"""

import dataclasses
import enum
import functools
import json
import numbers
import operator
from typing import Any, NamedTuple

import numpy as np

# Words of an instruction are hashed to 1, ..., 999; 0 is padding.
INSTRUCTION_BUCKETS = 1000
# Name of the observation that says which categories an action may have, bool `[N]` for N logits.
ACTION_MASK = 'action_mask'
# Kinds of `Part`.
PART_KINDS = ('numbers', 'categories', 'bits')
# Name of the observation with random numbers that test mode adds.
ACTION_NOISE = 'action_noise'


class EpisodeEnd(enum.IntEnum):
    """How a row's episode ended; `done` of the paper is `end != NOT_ENDED`."""

    NOT_ENDED = 0
    TERMINATED = 1  # by the rules of the environment
    TRUNCATED = 2  # by a limit on its length
    LIFE_LOST = 3  # ends the agent's episode, but the game and its return continue


class StepOutputInfo(NamedTuple):
    """Statistics of a row's episode or, where `done`, of the episode that has just ended.

    Attributes:
      episode_return: f32 `[T+1, B]`, undiscounted, unclipped sum of rewards.
      episode_step: i32 `[T+1, B]`, agent steps.
      episode_frames: i32 `[T+1, B]`, frames. The end of an episode may cut its last action short;
        all others last `num_action_repeats` frames.
    """

    episode_return: Any
    episode_step: Any
    episode_frames: Any


class StepOutput(NamedTuple):
    """Environment outputs.

    Attributes:
      reward: f32 `[T+1, B]`, of the action that led to this row.
      info: `StepOutputInfo`.
      done: bool `[T+1, B]`; where True, `observation` is the first of the next episode.
      observation: dict: `'frame'` uint8 `[T+1, B, H, W, C]` (or f32 `[T+1, B, N]` for environments
        without images), and `'instruction'` i32 `[T+1, B, L]` where the environment speaks.
      is_step: bool `[T+1, B]`, for the loss with `bootstrap_truncated`, else `()`: whether a step
        of the environment led to this row. If not, the row before has the last observation of an
        episode that was truncated, whose action the environment never saw, and this row the first
        one of the next episode.
    """

    reward: Any
    info: StepOutputInfo
    done: Any
    observation: Any
    # `()` has no tensors for the functions that map nests; None would count as one.
    is_step: Any = ()


class AgentOutput(NamedTuple):
    """Agent outputs.

    Attributes:
      action: i32 `[T+1, B]`, or `[T+1, B, K]` as `ActionSpec` says.
      policy: f32 `[T+1, B, A]`.
      baseline: f32 `[T+1, B]`.
    """

    action: Any
    policy: Any
    baseline: Any


class ActorOutput(NamedTuple):
    """A batch of unrolls.

    Attributes:
      level_id: i32 `[B]`, index into the run's list of levels.
      policy_version: i64 `[B]`, learner updates that made the weights that acted in row 0.
      agent_state: nest of `[B, ...]`, recurrent state before row 0.
      env_outputs: `StepOutput`, `[T+1, B, ...]`.
      agent_outputs: `AgentOutput`, `[T+1, B, ...]`.
    """

    level_id: Any
    policy_version: Any
    agent_state: Any
    env_outputs: StepOutput
    agent_outputs: AgentOutput


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive numbers of a vector, which are one entry of a Dict or Tuple observation.

    Attributes:
      kind: `'numbers'`, `'categories'` (one-hot, for each component) or `'bits'` (zeros and ones).
      sizes: the number of categories of each component, or else one number, of all values.
    """

    kind: str
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers of the vector these are."""
        return sum(self.sizes)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and NumPy dtype name of one array, without time and batch dimensions.

    Attributes:
      shape: as NumPy has it.
      dtype: as NumPy names it.
      parts: what a float32 vector consists of, in order; empty if it is one entry of numbers, and
        for all other arrays.

    Raises:
      ValueError: the parts do not make up the vector.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not self.parts:
            return
        if any(
            part.kind not in PART_KINDS
            or min(part.sizes, default=0) < 1
            or (part.kind != 'categories' and len(part.sizes) > 1)
            for part in self.parts
        ):
            raise ValueError(f'there are no such parts of a vector: {self.parts}')
        size = sum(part.size for part in self.parts)
        if np.dtype(self.dtype) != np.float32 or tuple(self.shape) != (size,):
            raise ValueError(f'{self.dtype} {list(self.shape)} does not consist of {self.parts}')

    @property
    def nbytes(self) -> int:
        """Bytes of one such array."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class UnrollArray(ArraySpec):
    """The spec of one of the arrays that make up an unroll.

    `shape` includes the time dimension; `dtype` is a float, an integer of up to 63 bits or bool.

    Attributes:
      name: for error messages.
      time_major: whether the first dimension is time, so that batches are `[T+1, B, ...]`;
        otherwise they are `[B, ...]`.
      low: least valid value of an integer; None for the least of its type.
      high: greatest valid value of an integer, inclusive; None for the greatest of its type.
    """

    name: str
    time_major: bool = True
    low: int | None = None
    high: int | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest valid value; zeros for floats and bool, which have none."""
        if not np.issubdtype(np.dtype(self.dtype), np.integer):
            return 0, 0
        limits = np.iinfo(self.dtype)
        return (
            int(limits.min) if self.low is None else self.low,
            int(limits.max) if self.high is None else self.high,
        )

    def accepts(self, values: np.ndarray) -> bool:
        """Returns whether all values are valid: finite, within `bounds`, or false or true.

        Args:
          values: of this dtype.
        """
        dtype = np.dtype(self.dtype)
        if np.issubdtype(dtype, np.floating):
            return bool(np.isfinite(values).all())
        if dtype == np.bool_:
            # Bytes from elsewhere may be neither.
            return bool(values.view(np.uint8).max(initial=0) <= 1)
        (low, high), limits = self.bounds, np.iinfo(dtype)
        return bool(
            (low <= limits.min or low <= values.min(initial=limits.max))
            and (limits.max <= high or values.max(initial=limits.min) <= high)
        )


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """An action space: categorical components, continuous components, or both.

    The agent's action is one array. An action of `Discrete` is an i32 scalar, `categories[0]` says
    of how many. Other actions have the categories of all categorical components, then the samples
    of all continuous ones: i32 `[K]` if all components are categorical, otherwise f32 `[K]`.

    Attributes:
      categories: number of categories of each categorical component.
      bounds: of each continuous component, the least and the greatest value; None if the component
        is unbounded.
      is_scalar: whether the only component is categorical and its action has no dimension.
    """

    categories: tuple[int, ...] = ()
    bounds: tuple[tuple[float, float] | None, ...] = ()
    is_scalar: bool = False

    @classmethod
    def discrete(cls, num_actions: int) -> 'ActionSpec':
        """Returns the spec of `Discrete`, whose actions are `0, ..., num_actions - 1`."""
        return cls((num_actions,), is_scalar=True)

    def to_json(self) -> Any:
        """Returns a JSON-serializable form: an integer for `Discrete`; `from_json` inverts it."""
        if self.is_scalar:
            return self.categories[0]
        return {'categories': list(self.categories), 'bounds': [b and list(b) for b in self.bounds]}

    @classmethod
    def from_json(cls, value: Any) -> 'ActionSpec':
        """Rebuilds a spec from what `to_json` returned.

        Raises:
          LookupError, TypeError, ValueError: it is something else.
        """
        sizes = [value] if type(value) is int else value['categories']
        categories = tuple(map(operator.index, sizes))
        if not all(size > 0 for size in categories):
            raise ValueError(f'there cannot be {categories} categories')
        if type(value) is int:
            return cls.discrete(value)
        bounds = [each and tuple(map(float, each)) for each in value['bounds']]
        return cls(categories, tuple(each and (each[0], each[1]) for each in bounds))

    def __str__(self) -> str:
        return json.dumps(self.to_json())

    @property
    def zero(self) -> Any:
        """An action of the environment: first categories, the middle between bounds, or 0."""
        if self.is_scalar:
            return 0
        return self.to_environment(np.zeros(self.array.shape, self.array.dtype))

    @property
    def array(self) -> ArraySpec:
        """Spec of one action."""
        if self.is_scalar:
            return ArraySpec((), 'int32')
        size = len(self.categories) + len(self.bounds)
        return ArraySpec((size,), 'float32' if self.bounds else 'int32')

    @property
    def num_logits(self) -> int:
        """Number of logits of the policy: the categories of all components."""
        return sum(self.categories)

    @property
    def policy(self) -> ArraySpec:
        """Spec of the parameters of a policy: logits, then means, then log standard deviations."""
        return ArraySpec((self.num_logits + 2 * len(self.bounds),), 'float32')

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Returns the environment's form of an agent's action that is not a scalar.

        Samples of bounded components are not bounded themselves: a hyperbolic tangent maps them to
        the open interval between the bounds. So the learner need not invert it, which would lose
        most of the precision near a bound.

        Args:
          action: i32 or f32 `[K]`.

        Returns:
          The same type and shape, within the bounds.
        """
        low, high, bounded = self._bounded
        if bounded.size:
            action = action.copy()
            shares = 0.5 * (1.0 + np.tanh(action[bounded]))
            action[bounded] = np.clip(low + (high - low) * shares, low, high)
        return action

    @functools.cached_property
    def _bounded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bounds of the bounded components, and their indices in an action."""
        first = len(self.categories)
        indices = [first + i for i, bounds in enumerate(self.bounds) if bounds is not None]
        bounds = np.array([each for each in self.bounds if each is not None]).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1], np.array(indices, int)


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What the agent needs to know of an environment.

    Attributes:
      observation: name -> spec; `'frame'` always, `'instruction'` where the environment speaks,
        `ACTION_MASK` where some actions are not always allowed. The network sees all others, too.
      action: the action space; an integer n stands for `ActionSpec.discrete(n)`.
      num_action_repeats: frames of the emulator or engine per agent step.
      suite: `'atari'`, `'dmlab'`, or `''` for others; the paper has settings for the first two.
        With `'atari'`, the channels of the frame are the last frames, the newest last.
    """

    observation: dict[str, ArraySpec]
    action: ActionSpec
    num_action_repeats: int
    suite: str = ''

    def __post_init__(self) -> None:
        if isinstance(self.action, numbers.Integral):
            object.__setattr__(self, 'action', ActionSpec.discrete(int(self.action)))

    @property
    def stack(self) -> str | None:
        """Name of the observation whose channels are the last frames; None if there is none."""
        is_stack = self.suite == 'atari' and self.observation['frame'].shape[-1] > 1
        return 'frame' if is_stack else None

    @property
    def num_actions(self) -> int:
        """Size of a discrete action set."""
        (num_actions,) = self.action.categories
        return num_actions

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-serializable form; `from_json` is its inverse."""
        return dataclasses.asdict(self) | {'action': self.action.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> 'EnvironmentSpec':
        """Rebuilds a spec from what `to_json` returned."""
        observation = {
            name: ArraySpec(
                tuple(spec['shape']),
                spec['dtype'],
                parts=tuple(Part(part['kind'], tuple(part['sizes'])) for part in spec['parts']),
            )
            for name, spec in value['observation'].items()
        }
        action = ActionSpec.from_json(value['action'])
        return cls(observation, action, value['num_action_repeats'], value['suite'])
