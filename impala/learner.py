"""The learner: batches of unrolls in, updates of the agent's weights out.

Espeholt et al. 2018, section 4. Letters: T unroll length, B batch size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from impala import losses
from impala.popart import PopArt
from impala.rmsprop import RMSProp, sum_duplicates
from impala.trajectory import ActorOutput, AgentOutput, StepOutput


@dataclasses.dataclass(frozen=True)
class LearnerConfig(losses.LossConfig):
    """What the learner does with a batch, beside the loss.

    Attributes:
      batch_size: B, unrolls per update; of several learners, each has so many.
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

    @property
    def popart(self) -> PopArt | None:
        """The last layer of the baseline, if that is normalised per level."""

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
      agent_steps: i64 variable, agent steps consumed so far, those of skipped updates too, by all
        learners together.
    """

    def __init__(
        self,
        agent: TrainableAgent,
        config: LearnerConfig,
        strategy: tf.distribute.Strategy | None = None,
        name: str = 'learner',
    ):
        """Makes optimizer and counters.

        Args:
          agent: has made all its variables.
          config: of loss and optimizer.
          strategy: has replicas on several devices, of this process or of several, that stay equal:
            a `MirroredStrategy` or `MultiWorkerMirroredStrategy`. The agent was made in its scope,
            and this object is to be. None trains on one device.
          name: of the module.

        Raises:
          ValueError: a batch cannot be divided among the devices of this process.
        """
        super().__init__(name=name)
        self.agent = agent
        self.config = config
        self._strategy = strategy
        self._num_parts = 1 if strategy is None else len(strategy.extended.worker_devices)
        self._num_learners = (
            1 if strategy is None else strategy.num_replicas_in_sync // self._num_parts
        )
        if config.batch_size % self._num_parts:
            raise ValueError(
                f'a batch of {config.batch_size} unrolls cannot be divided among {self._num_parts} '
                'devices'
            )
        self.optimizer = RMSProp(
            agent.trainable_variables,
            decay=config.decay,
            momentum=config.momentum,
            epsilon=config.epsilon,
        )
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name='updates')
        self.agent_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name='agent_steps')

    @property
    def weights(self) -> list[tf.Variable]:
        """The weights of one replica, which are those of all."""
        return [self._local(weight) for weight in self.agent.trainable_variables]

    def counts(self) -> tuple[int, int]:
        """Returns updates and agent steps so far."""
        return int(self.version), int(self._local(self.agent_steps))

    @property
    def version(self) -> tf.Variable:
        """`updates` of one replica."""
        return self._local(self.updates)

    def synchronize(self) -> None:
        """Has every learner take all variables from the first one. All must call it."""
        if self._strategy is not None:
            self._synchronize()

    @tf.function(autograph=False)
    def _synchronize(self) -> None:
        def copy() -> None:
            context = tf.distribute.get_replica_context()
            is_first = tf.equal(context.replica_id_in_sync_group, 0)
            for variable in self.variables:
                value = tf.where(is_first, variable, tf.zeros_like(variable))
                value = context.all_reduce(tf.distribute.ReduceOp.SUM, value)
                tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)

        assert self._strategy is not None
        self._strategy.run(copy)

    def step(self, batch: ActorOutput) -> dict[str, tf.Tensor]:
        """Updates the weights once, or not at all where the loss or a gradient is not finite.

        Several replicas do, up to rounding, what one does with all their unrolls in one batch:
        gradients are summed, as the loss is, before they are clipped, and what is not finite
        anywhere is not applied anywhere. Statistics of PopArt are of all unrolls, and change after
        the weights. All learners must call this equally often.

        Args:
          batch: `ActorOutput` of T and B as configured, of this learner; it is divided among its
            devices.

        Returns:
          Scalar tensors, of all replicas together:
          `loss/total`, `loss/policy_gradient`, `loss/baseline`, `loss/entropy`: f32, as returned by
            `losses.vtrace_loss`; with PopArt in units of each level's standard deviation.
          `gradient_norm`: f32, global norm before clipping.
          `learning_rate`: f32, of this update.
          `policy_lag_mean` f32, `policy_lag_max` i64: updates between the weights that acted and
            those being updated, over the unrolls of the batch.
          `skipped`: bool, loss or gradient was not finite; weights and optimizer are as before.

        Raises:
          ValueError: the batch is not `[T+1, B]`.
        """
        self._check_shape(batch)
        if self._strategy is None:
            return self._step(batch)
        parts = iter(_divide(batch, self._num_parts))
        return self._step_together(
            self._strategy.experimental_distribute_values_from_function(lambda _: next(parts))
        )

    @tf.function(autograph=False)
    def _step(self, batch: ActorOutput) -> dict[str, tf.Tensor]:
        return self._step_replica(batch)

    @tf.function(autograph=False)
    def _step_together(self, parts: Any) -> dict[str, tf.Tensor]:
        assert self._strategy is not None
        metrics = self._strategy.run(self._step_replica, args=(parts,))
        return {name: self._local(value) for name, value in metrics.items()}

    def _step_replica(self, batch: ActorOutput) -> dict[str, tf.Tensor]:
        parameters = self.agent.trainable_variables
        popart, value_stddev = self.agent.popart, None
        if popart is not None:
            value_stddev = popart.stddev(batch.level_id)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            learner_outputs, _ = self.agent.unroll(
                batch.agent_outputs.action, batch.env_outputs, batch.agent_state
            )
            if popart is not None:
                values = popart.values(learner_outputs.baseline, batch.level_id)
                learner_outputs = learner_outputs._replace(baseline=values)
            total, parts, targets = losses.vtrace_loss(
                batch.agent_outputs, learner_outputs, batch.env_outputs, self.config, value_stddev
            )
        gradients = tape.gradient(total, parameters)
        lag = self.updates - batch.policy_version
        moments = None if popart is None else popart.moments(targets, batch.level_id)
        if self._strategy is not None:
            total, parts, gradients, lag, moments = _join(total, parts, gradients, lag, moments)
        gradients = [
            sum_duplicates(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
            for gradient in gradients
        ]
        # Once the first weight has changed, nothing may fail for want of another learner.
        with tf.control_dependencies([lag] if moments is None else [lag, moments]):
            update = self._update(total, gradients, parameters, moments)
            with tf.control_dependencies([update['skipped']]):
                unrolls = self.config.batch_size * self._num_learners
                _add(self.agent_steps, self.config.unroll_length * unrolls)
        return {
            'loss/total': total,
            **{f'loss/{name}': part for name, part in parts.items()},
            'policy_lag_mean': tf.reduce_mean(tf.cast(lag, tf.float32)),
            'policy_lag_max': tf.reduce_max(lag),
            **update,
        }

    def _update(
        self,
        loss: tf.Tensor,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
        moments: tf.Tensor | None,
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
            if self.agent.popart is not None:
                self.agent.popart.update(moments)
            _add(self.updates, 1)
            return tf.constant(False)

        skipped = tf.cond(finite, apply, lambda: tf.constant(True))
        return {'gradient_norm': norm, 'learning_rate': learning_rate, 'skipped': skipped}

    def _learning_rate(self) -> tf.Tensor:
        # In float64, as float32 cannot tell the later agent steps of a long run apart.
        done = tf.cast(self.agent_steps, tf.float64) / self.config.total_agent_steps
        return tf.cast(self.config.learning_rate * tf.maximum(1.0 - done, 0.0), tf.float32)

    def _local(self, value: Any) -> Any:
        """Returns what the first replica of this process has of a value."""
        if self._strategy is None:
            return value
        return self._strategy.experimental_local_results(value)[0]

    def _check_shape(self, batch: ActorOutput) -> None:
        expected = [self.config.unroll_length + 1, self.config.batch_size]
        shape = batch.env_outputs.reward.shape
        if not shape.is_compatible_with(expected):
            raise ValueError(
                f'rewards of shape {shape} do not fit unroll_length {self.config.unroll_length} '
                f'and batch_size {self.config.batch_size}, for which they should be {expected}'
            )


def _divide(batch: ActorOutput, num_parts: int) -> list[ActorOutput]:
    """Returns a batch `[T+1, B, ...]` as `num_parts` of `[T+1, B / num_parts, ...]`."""

    def split(nest: Any, axis: int) -> list[Any]:
        pieces = [tf.split(tensor, num_parts, axis) for tensor in tf.nest.flatten(nest)]
        return [
            tf.nest.pack_sequence_as(nest, [piece[i] for piece in pieces]) for i in range(num_parts)
        ]

    if num_parts == 1:
        return [batch]
    per_unroll = split((batch.level_id, batch.policy_version, batch.agent_state), 0)
    rows = split((batch.env_outputs, batch.agent_outputs), 1)
    return [ActorOutput(*per_unroll[i], *rows[i]) for i in range(num_parts)]


def _join(
    loss: tf.Tensor,
    parts: dict[str, tf.Tensor],
    gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
    lag: tf.Tensor,
    moments: tf.Tensor | None,
) -> tuple[tf.Tensor, dict[str, tf.Tensor], list[Any], tf.Tensor, tf.Tensor | None]:
    """Sums losses, gradients and moments over all replicas, and has the lags of all, `[N]`."""
    context = tf.distribute.get_replica_context()
    present = [gradient for gradient in gradients if gradient is not None]
    loss, parts, present = context.all_reduce(tf.distribute.ReduceOp.SUM, (loss, parts, present))
    summed = iter(present)
    gradients = [None if gradient is None else next(summed) for gradient in gradients]
    lag = context.all_gather(lag, axis=0)
    if moments is not None:
        # Not together with the others: what is summed together is of one dtype.
        moments = context.all_reduce(tf.distribute.ReduceOp.SUM, moments)
    return loss, parts, gradients, lag, moments


def _add(variable: tf.Variable, amount: int) -> None:
    """Adds to the variable of the replica that is computing, which `assign_add` would refuse."""
    tf.raw_ops.AssignAddVariableOp(
        resource=variable.handle, value=tf.constant(amount, variable.dtype)
    )
