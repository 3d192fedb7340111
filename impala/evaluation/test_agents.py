"""The agents of test mode, whose episodes do not depend on each other."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from impala.networks.agent import Agent
from impala.trajectory import ACTION_NOISE, AgentOutput, ArraySpec, StepOutput


class SamplingAgent(Agent):
    """Acts by the contents of a row alone, so that an episode does not depend on any other.

    It samples with the action noise of `EpisodeSeries`. Each episode begins with last action and
    last reward 0, as the first one of an environment does. The network computes one row at a time:
    in a batch, the order of a row's sums depends on the size of the batch, the row's place in it
    and the processor, and the last bit of a logit may decide about an action.
    """

    def step(
        self, prev_action: tf.Tensor, env_output: StepOutput, state: Any
    ) -> tuple[AgentOutput, Any]:
        is_first = env_output.done
        lead = tf.reshape(is_first, [-1, *[1] * (prev_action.shape.rank - 1)])
        prev_action = tf.where(lead, tf.zeros([], prev_action.dtype), prev_action)
        reward = tf.where(is_first, 0.0, env_output.reward)
        env_output = env_output._replace(reward=reward)
        scalar = ArraySpec((), 'float32')
        output = AgentOutput(self.actions.spec.array, self.actions.spec.policy, scalar)
        return row_by_row(super().step, (prev_action, env_output, state), (output, self.state_spec))

    def choose_actions(self, policy: tf.Tensor, env_output: StepOutput) -> tf.Tensor:
        return self.actions.sample_by_noise(policy, env_output.observation[ACTION_NOISE])


class GreedyAgent(SamplingAgent):
    """Takes the most probable action."""

    def choose_actions(self, policy: tf.Tensor, env_output: StepOutput) -> tf.Tensor:
        return self.actions.mode(policy)


def row_by_row(function: Callable[..., Any], arguments: tuple[Any, ...], result_spec: Any) -> Any:
    """Calls a function with one row at a time.

    Args:
      function: takes nests of `[1, ...]` and returns one.
      arguments: of the function, nests of `[B, ...]`.
      result_spec: nest of `ArraySpec` of a row of the result.

    Returns:
      The results, a nest of `[B, ...]`.
    """
    results = tf.map_fn(
        lambda row: function(*row),
        tf.nest.map_structure(lambda rows: tf.expand_dims(rows, 1), arguments),
        parallel_iterations=1,
        fn_output_signature=tf.nest.map_structure(
            lambda spec: tf.TensorSpec([1, *spec.shape], spec.dtype), result_spec
        ),
    )
    return tf.nest.map_structure(lambda rows: tf.squeeze(rows, 1), results)
