"""The learner: batches of unrolls in, updates of the agent's weights out.

Espeholt et al. 2018, section 4. Letters: T unroll length, B batch size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from impala import losses
from impala.rmsprop import RMSProp, sum_duplicates
from impala.trajectory import ActorOutput, AgentOutput, StepOutput


@dataclasses.dataclass(frozen=True)
class LearnerConfig(losses.LossConfig):
    """What the learner does with a batch, beside the loss.

    Attributes:
      batch_size: B, unrolls per update.
      unroll_length: T, agent steps per unroll.
      total_agent_steps: agent steps over which the learning rate falls linearly to 0.
      learning_rate: at the start.
      decay: RMSProp's, per update.
      momentum: RMSProp's.
      epsilon: RMSProp's, inside the root.
      gradient_clip_norm: gradients are scaled down to this global norm; None leaves them.
    """

    batch_size: int = 2
    unroll_length: int = 100
    total_agent_steps: int = 250_000_000
    learning_rate: float = 0.00048
    decay: float = 0.99
    momentum: float = 0.0
    epsilon: float = 0.1
    gradient_clip_norm: float | None = None


class TrainableAgent(Protocol):
    """What the learner needs of an agent; `impala.agent.Agent` is one."""

    @property
    def trainable_variables(self) -> Sequence[tf.Variable]:
        """The weights; all of them, from construction on, in an order that never changes."""

    def unroll(
        self, prev_actions: tf.Tensor, env_outputs: StepOutput, state: Any
    ) -> tuple[AgentOutput, Any]:
        """Runs over `[T+1, B, ...]`; returns outputs `[T+1, B, ...]` and the last state."""


class Learner(tf.Module):
    """Updates an agent. `tf.train.Checkpoint(learner=learner)` holds all there is to keep.

    Attributes:
      agent: the agent whose weights are updated in place.
      config: as given.
      optimizer: with its slots.
      updates: i64 variable, updates of the weights so far; skipped ones do not count.
      agent_steps: i64 variable, agent steps consumed so far, those of skipped updates too.
    """

    def __init__(self, agent: TrainableAgent, config: LearnerConfig, name: str = 'learner'):
        """Makes optimizer and counters.

        Args:
          agent: has made all its variables.
          config: of loss and optimizer.
          name: of the module.
        """
        super().__init__(name=name)
        self.agent = agent
        self.config = config
        self.optimizer = RMSProp(
            agent.trainable_variables,
            decay=config.decay,
            momentum=config.momentum,
            epsilon=config.epsilon,
        )
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name='updates')
        self.agent_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name='agent_steps')

    def step(self, batch: ActorOutput) -> dict[str, tf.Tensor]:
        """Updates the weights once, or not at all where the loss or a gradient is not finite.

        Args:
          batch: `ActorOutput` of T and B as configured.

        Returns:
          Scalar tensors:
          `loss/total`, `loss/policy_gradient`, `loss/baseline`, `loss/entropy`: f32, as returned by
            `losses.vtrace_loss`.
          `gradient_norm`: f32, global norm before clipping.
          `learning_rate`: f32, of this update.
          `policy_lag_mean` f32, `policy_lag_max` i64: updates between the weights that acted and
            those being updated, over the unrolls of the batch.
          `skipped`: bool, loss or gradient was not finite; weights and optimizer are as before.

        Raises:
          ValueError: the batch is not `[T+1, B]`.
        """
        self._check_shape(batch)
        return self._step(batch)

    @tf.function(autograph=False)
    def _step(self, batch: ActorOutput) -> dict[str, tf.Tensor]:
        parameters = self.agent.trainable_variables
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            learner_outputs, _ = self.agent.unroll(
                batch.agent_outputs.action, batch.env_outputs, batch.agent_state
            )
            total, parts = losses.vtrace_loss(
                batch.agent_outputs, learner_outputs, batch.env_outputs, self.config
            )
        gradients = [
            sum_duplicates(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
            for gradient in tape.gradient(total, parameters)
        ]
        lag = self.updates - batch.policy_version
        metrics = {
            'loss/total': total,
            **{f'loss/{name}': part for name, part in parts.items()},
            'policy_lag_mean': tf.reduce_mean(tf.cast(lag, tf.float32)),
            'policy_lag_max': tf.reduce_max(lag),
            **self._update(total, gradients, parameters),
        }
        self.agent_steps.assign_add(self.config.unroll_length * self.config.batch_size)
        return metrics

    def _update(
        self,
        loss: tf.Tensor,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
    ) -> dict[str, tf.Tensor]:
        """Applies the gradients if they and the loss are finite; returns what there is to log."""
        learning_rate = self._learning_rate()
        # Any NaN or infinity among the gradients is one in their norm too, which is wanted anyway.
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)

        def apply() -> tf.Tensor:
            clipped = gradients
            if self.config.gradient_clip_norm is not None:
                clipped, _ = tf.clip_by_global_norm(
                    gradients, self.config.gradient_clip_norm, use_norm=norm
                )
            self.optimizer.apply(clipped, parameters, learning_rate)
            self.updates.assign_add(1)
            return tf.constant(False)

        skipped = tf.cond(finite, apply, lambda: tf.constant(True))
        return {'gradient_norm': norm, 'learning_rate': learning_rate, 'skipped': skipped}

    def _learning_rate(self) -> tf.Tensor:
        # In float64, as float32 cannot tell the later agent steps of a long run apart.
        done = tf.cast(self.agent_steps, tf.float64) / self.config.total_agent_steps
        return tf.cast(self.config.learning_rate * tf.maximum(1.0 - done, 0.0), tf.float32)

    def _check_shape(self, batch: ActorOutput) -> None:
        expected = [self.config.unroll_length + 1, self.config.batch_size]
        shape = batch.env_outputs.reward.shape
        if not shape.is_compatible_with(expected):
            raise ValueError(
                f'rewards of shape {shape} do not fit unroll_length {self.config.unroll_length} '
                f'and batch_size {self.config.batch_size}, for which they should be {expected}'
            )
