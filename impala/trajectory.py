"""The structures that flow from the actors to the learner, and their specs.

Names follow the paper and its released code. Letters: T unroll length, B batch size, A number of
actions, H, W, C frame height, width and channels, L instruction length. An unroll has T+1 rows: row
`t` of `env_outputs` is what the agent sees before it acts, row `t` of `agent_outputs` is the action
that *led to* row `t` of `env_outputs`. Row 0 repeats row T of the previous unroll.

This module uses only NumPy: actor processes import it and never load TensorFlow.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np

# Words of an instruction are hashed to 1, ..., 999; 0 is padding.
INSTRUCTION_BUCKETS = 1000


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
    """

    reward: Any
    info: StepOutputInfo
    done: Any
    observation: Any


class AgentOutput(NamedTuple):
    """Agent outputs.

    Attributes:
      action: i32 `[T+1, B]`.
      policy_logits: f32 `[T+1, B, A]`.
      baseline: f32 `[T+1, B]`.
    """

    action: Any
    policy_logits: Any
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
class ArraySpec:
    """Shape and NumPy dtype name of one array, without time and batch dimensions."""

    shape: tuple[int, ...]
    dtype: str

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


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What the agent needs to know of an environment.

    Attributes:
      observation: name -> spec; `'frame'` always, `'instruction'` where the environment speaks.
      num_actions: size of the discrete action set.
      num_action_repeats: frames of the emulator or engine per agent step.
      suite: `'atari'`, `'dmlab'`, or `''` for others; the paper has settings for the first two.
    """

    observation: dict[str, ArraySpec]
    num_actions: int
    num_action_repeats: int
    suite: str = ''

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-serializable form; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> 'EnvironmentSpec':
        """Rebuilds a spec from what `to_json` returned."""
        observation = {
            name: ArraySpec(tuple(spec['shape']), spec['dtype'])
            for name, spec in value['observation'].items()
        }
        return cls(observation, value['num_actions'], value['num_action_repeats'], value['suite'])
