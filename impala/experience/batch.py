"""The learner's batch: a stack of unrolls, its arrays, and their bounds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from impala.experience.loading import Batch
from impala.trajectory import (
    INSTRUCTION_BUCKETS,
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    EpisodeEnd,
    StepOutput,
    StepOutputInfo,
    UnrollArray,
)


class UnrollBatch(NamedTuple):
    """A batch for the learner, with data that only the log needs.

    Attributes:
      actor_output: `ActorOutput`, `[T+1, B, ...]`.
      actors: i32 `[B]`, the actor of each unroll; -1 if it is replayed.
      ends: u8 `[T+1, B]`, values of `impala.trajectory.EpisodeEnd`.
      is_replayed: bool `[B]`, whether the unroll is drawn from the replay.
    """

    actor_output: ActorOutput
    actors: tf.Tensor
    ends: tf.Tensor
    is_replayed: tf.Tensor

    def for_loss(self, bootstrap_truncated: bool) -> ActorOutput:
        """Returns the unrolls with what the loss needs to know of the ends of episodes.

        Args:
          bootstrap_truncated: setting of the actors; see `impala.acting.actor.act`.
        """
        output = self.actor_output
        if not bootstrap_truncated:
            return output
        # Such actors send TRUNCATED only with the row after the last observation.
        is_step = tf.not_equal(self.ends, int(EpisodeEnd.TRUNCATED))
        return output._replace(env_outputs=output.env_outputs._replace(is_step=is_step))


# Makes a batch of fresh unrolls, a number of which it gets from its argument, and of others.
Mix = Callable[[Callable[[int], UnrollBatch]], UnrollBatch]


def unroll_components(
    spec: EnvironmentSpec,
    state_spec: Any,
    unroll_length: int,
    num_levels: int,
    bootstrap_truncated: bool = False,
) -> list[UnrollArray]:
    """Returns the arrays that an unroll consists of on its way to the learner.

    In order: level id, policy version, recurrent state at the start, the rows of `StepOutput`
    (reward, episode return, step and frames, end of episode, observation) and of `AgentOutput`.

    Args:
      spec: of the environments.
      state_spec: nest of `ArraySpec`, of the agent.
      unroll_length: T.
      num_levels: of the run.
      bootstrap_truncated: setting of the actors. It gives the ends of episodes another meaning and
        another name, so that a replay job does not mix the two.
    """
    end = 'bootstrapped_end' if bootstrap_truncated else 'end'
    rows = unroll_length + 1

    def row(name: str, array: ArraySpec, low: int | None = None, high: int | None = None):
        return UnrollArray((rows, *array.shape), array.dtype, name, True, low, high)

    # Continuous actions have no bounds.
    action_range = (None, None) if spec.action.bounds else (0, max(spec.action.categories) - 1)
    highest = {'instruction': INSTRUCTION_BUCKETS - 1}
    return [
        UnrollArray((), 'int32', 'level_id', False, 0, num_levels - 1),
        UnrollArray((), 'int64', 'policy_version', False, 0),
        *[
            UnrollArray(state.shape, state.dtype, f'state_{i}', False)
            for i, state in enumerate(tf.nest.flatten(state_spec))
        ],
        row('reward', ArraySpec((), 'float32')),
        row('episode_return', ArraySpec((), 'float32')),
        row('episode_step', ArraySpec((), 'int32'), 0),
        row('episode_frames', ArraySpec((), 'int32'), 0),
        row(end, ArraySpec((), 'uint8'), 0, max(EpisodeEnd)),
        *[
            row(name, array, 0 if name in highest else None, highest.get(name))
            for name, array in spec.observation.items()
        ],
        row('action', spec.action.array, *action_range),
        row('policy', spec.action.policy),
        row('baseline', ArraySpec((), 'float32')),
    ]


def batch_components(batch: UnrollBatch) -> list[tf.Tensor]:
    """Returns the arrays of a batch, in the order of `unroll_components`."""
    output = batch.actor_output
    env = output.env_outputs
    return [
        output.level_id,
        output.policy_version,
        *tf.nest.flatten(output.agent_state),
        env.reward,
        *env.info,
        batch.ends,
        *env.observation.values(),
        *output.agent_outputs,
    ]


def batch_of_components(
    components: Sequence[tf.Tensor],
    actors: tf.Tensor,
    state_structure: Any,
    observation_names: Sequence[str],
    is_replayed: tf.Tensor | None = None,
) -> UnrollBatch:
    """Makes a batch of its arrays; the inverse of `batch_components`.

    Args:
      components: in that order.
      actors: i32 `[B]`, see `UnrollBatch`.
      state_structure: nest with the structure of the agent's state.
      observation_names: in the order of the components.
      is_replayed: bool `[B]`; None if no unroll is.
    """
    level_id, policy_version, *rest = components
    num_states = len(tf.nest.flatten(state_structure))
    states, rest = rest[:num_states], rest[num_states:]
    reward, *info, end = rest[:5]
    observation = rest[5:-3]
    return UnrollBatch(
        ActorOutput(
            level_id=level_id,
            policy_version=policy_version,
            agent_state=tf.nest.pack_sequence_as(state_structure, states),
            env_outputs=StepOutput(
                reward=reward,
                info=StepOutputInfo(*info),
                done=tf.not_equal(end, 0),
                observation=dict(zip(observation_names, observation, strict=True)),
            ),
            agent_outputs=AgentOutput(*rest[-3:]),
        ),
        actors,
        end,
        tf.zeros_like(actors, tf.bool) if is_replayed is None else is_replayed,
    )


def flatten_unroll(batch: UnrollBatch, column: int) -> list[Any]:
    """Returns one unroll of a batch as arrays, in the order of `unroll_components`."""
    # Views of the tensors; `numpy()` would copy them.
    arrays = [np.asarray(component) for component in batch_components(batch)]
    num_per_unroll = 2 + len(tf.nest.flatten(batch.actor_output.agent_state))
    return [array[column] for array in arrays[:num_per_unroll]] + [
        array[:, column] for array in arrays[num_per_unroll:]
    ]


def compiled(dequeue: Callable[[], Batch]) -> Callable[[], Batch]:
    """Returns a function as a graph on the CPU, which any thread may call.

    Args:
      dequeue: raises `tf.errors.CancelledError` when there are no more batches.
    """

    @tf.function(autograph=False)
    def dequeue_on_cpu() -> Batch:
        with tf.device('/cpu:0'):
            return dequeue()

    return dequeue_on_cpu.get_concrete_function()
