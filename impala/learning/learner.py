"""The learner: batches of unrolls in, updates of the agent's weights out.

Espeholt et al. 2018, section 4. Letters: T unroll length, B batch size.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from impala.config import LearnerConfig, OptimizerConfig
from impala.learning import losses
from impala.learning.optimizers.adam import Adam
from impala.learning.optimizers.rmsprop import RMSProp, sum_duplicates
from impala.networks.action_distribution import ActionDistribution
from impala.networks.decoder import Decoder
from impala.networks.frame_mean import FrameMean
from impala.networks.normalizer import Normalizer
from impala.networks.popart import PopArt
from impala.trajectory import ActorOutput, AgentOutput, StepOutput

# Unrolls, which of them are replayed, bool `[B]`, and their intrinsic rewards, f32 `[T, B]`, if
# there are any.
_Part = tuple[ActorOutput, tf.Tensor] | tuple[ActorOutput, tf.Tensor, tf.Tensor]


class TrainableAgent(Protocol):
    """What the learner needs of an agent; `impala.networks.agent.Agent` is one."""

    @property
    def trainable_variables(self) -> Sequence[tf.Variable]:
        """All weights, in a fixed order; they exist from construction on."""

    @property
    def acting_variables(self) -> Sequence[tf.Variable]:
        """All that acting needs: the weights, and variables that are not trained."""

    @property
    def actions(self) -> ActionDistribution:
        """The distributions of actions, by which the losses compare policies."""

    @property
    def normalizer(self) -> Normalizer | None:
        """Normalizes vector observations; None if they are not normalized."""

    @property
    def frame_mean(self) -> FrameMean | None:
        """The mean of all frames; None if the agent does not use it."""

    @property
    def popart(self) -> PopArt | None:
        """The last layer of the baseline if it is normalized per level, else None."""

    def encode(self, frames: tf.Tensor) -> tf.Tensor:
        """Returns features f32 `[N, F]` of frames `[N, ...]`; called only with a decoder."""

    def unroll(
        self,
        prev_actions: tf.Tensor,
        env_outputs: StepOutput,
        state: Any,
        features: tf.Tensor | None = None,
    ) -> tuple[AgentOutput, Any]:
        """Runs over `[T+1, B, ...]`; returns outputs `[T+1, B, ...]` and the last state.

        With a decoder, `features` are those that `encode` returned for the frames of all rows.
        """


class Learner(tf.Module):
    """Updates an agent. `tf.train.Checkpoint(learner=learner)` holds its whole state.

    Attributes:
      agent: the agent whose weights are updated in place.
      config: as given.
      target_agent: the target network; None if there is none.
      decoder: of an agent whose torso is an encoder; None if there is none.
      optimizer: with its slots.
      updates: i64 variable, updates of the weights so far; skipped ones do not count.
      agent_steps: i64 variable, agent steps consumed so far by all learners together. Those of
        skipped updates count; those of reused and replayed unrolls count once.
    """

    def __init__(
        self,
        agent: TrainableAgent,
        config: LearnerConfig,
        strategy: tf.distribute.Strategy | None = None,
        target_agent: TrainableAgent | None = None,
        decoder: Decoder | None = None,
        name: str = 'learner',
    ):
        """Makes optimizer and counters.

        Args:
          agent: its variables exist.
          config: of loss and optimizer.
          strategy: keeps equal replicas on several devices, of this process or of several: a
            `MirroredStrategy` or `MultiWorkerMirroredStrategy`. The agent must have been made in
            its scope, as must this object. None trains on one device.
          target_agent: the target network, another agent of the same shape, which copies the
            weights of `agent` at the first update; given if, and only if, `target_update_steps`
            is not 0.
          decoder: reconstructs frames from features of `agent`. Only `losses.autoencoder_loss`
            trains it, while all losses train the agent. Without `autoencoder_cost` it is not
            trained.
          name: of the module.

        Raises:
          ValueError: a batch cannot be divided among the devices of this process; or the target
            network is missing or never updated.
        """
        super().__init__(name=name)
        if (target_agent is None) != (config.loss.target_update_steps == 0):
            raise ValueError(
                f'target_update_steps={config.loss.target_update_steps} does not fit target_agent: '
                'give such an agent if it is updated, and only then'
            )
        self.agent = agent
        self.target_agent = target_agent
        self.decoder = decoder
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
        self.optimizer = _create_optimizer(self._parameters, config.optimizer)
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name='updates')
        self.agent_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name='agent_steps')
        # Tensors, because each Python number would trace another graph.
        self._steps_per_unroll = tf.constant(config.unroll_length, tf.int64)
        self._no_steps = tf.constant(0, tf.int64)
        self._none_replayed = tf.zeros([config.batch_size // self._num_parts], tf.bool)

    @property
    def devices(self) -> list[str | None]:
        """Names of the devices of this process, each for a part of every batch; None: the CPU."""
        if self._strategy is not None:
            return list(self._strategy.extended.worker_devices)
        return ['/gpu:0' if tf.config.list_logical_devices('GPU') else None]

    @property
    def _parameters(self) -> list[tf.Variable]:
        """All variables that are trained."""
        decoders = () if self.decoder is None else self.decoder.trainable_variables
        return [*self.agent.trainable_variables, *decoders]

    @property
    def weights(self) -> list[tf.Variable]:
        """The agent's `acting_variables` on one replica; they are equal on all."""
        return [self._local(weight) for weight in self.agent.acting_variables]

    def counts(self) -> tuple[int, int]:
        """Returns updates and agent steps so far."""
        return int(self.version), int(self._local(self.agent_steps))

    @property
    def version(self) -> tf.Variable:
        """`updates` of one replica."""
        return self._local(self.updates)

    def synchronize(self) -> None:
        """Copies all variables of the first learner to the others. All must call it.

        The devices of one learner hold the same values anyway: a strategy creates and restores its
        variables alike on all of them.
        """
        if self._num_learners > 1:
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

    def step(
        self,
        batch: ActorOutput,
        is_fresh: bool = True,
        is_replayed: tf.Tensor | None = None,
        intrinsic_reward: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """Updates the weights once, or not at all if the loss or a gradient is not finite.

        Several replicas do, up to rounding, what one does with all their unrolls in one batch:
        losses and gradients are summed before clipping, and a value that is not finite on one
        replica skips the update on all. PopArt's statistics are those of all unrolls and change
        after the weights. So do the statistics of observations and the mean of frames, by rows 0 to
        T-1 of all unrolls that are used for the first time and not replayed, so each counts once.
        All learners must call this equally often.

        Args:
          batch: `ActorOutput` of T and B as configured, of this learner; it is divided among its
            devices.
          is_fresh: whether the batch is used for the first time; its agent steps count only then.
          is_replayed: bool `[B]`, which unrolls are replayed; their agent steps do not count
            again. None if none is.
          intrinsic_reward: f32 `[T, B]`, added to the clipped rewards of the batch. None without
            intrinsic rewards; all steps of a learner must have them or none.

        Returns:
          Scalar tensors, of all replicas together:
          `loss/total`, `loss/policy_gradient`, `loss/baseline`, `loss/entropy`: f32, as returned by
            `losses.vtrace_loss`; or these and `loss/kl`, as by `losses.appo_loss`; with PopArt in
            units of each level's standard deviation.
          `loss/autoencoder`: f32, `losses.autoencoder_loss` of rows 0 to T-1, each frame once;
            only with a decoder and `autoencoder_cost`, and part of the total.
          `gradient_norm`: f32, global norm before clipping.
          `learning_rate`: f32, of this update.
          `entropy_cost`: f32, of this update; only if it changes over the run.
          `policy_lag_mean` f32, `policy_lag_max` i64: updates between the weights that acted and
            those being updated, over the unrolls of the batch that are not replayed.
          `replayed_policy_lag_mean` f32, `replayed_policy_lag_max` i64: the same of replayed
            unrolls, and `replayed_fraction` f32, their share of all unrolls; only with
            `replay_fraction`. Where the share is 0, these lags mean nothing.
          `intrinsic_reward`: f32, the mean over all rows; only with such rewards.
          `skipped`: bool, loss or gradient was not finite; weights and optimizer are unchanged.

        Raises:
          ValueError: the batch is not `[T+1, B]`.
        """
        self._check_shape(batch, self.config.batch_size)
        num_parts = self._num_parts
        masks = None if is_replayed is None else tf.split(is_replayed, num_parts)
        rewards = None if intrinsic_reward is None else tf.split(intrinsic_reward, num_parts, 1)
        return self.step_in_parts(_divide(batch, num_parts), is_fresh, masks, rewards)

    def step_in_parts(
        self,
        parts: Sequence[ActorOutput],
        is_fresh: bool = True,
        are_replayed: Sequence[tf.Tensor] | None = None,
        intrinsic_rewards: Sequence[tf.Tensor] | None = None,
    ) -> dict[str, tf.Tensor]:
        """Does what `step` does, with a batch that is already divided.

        Args:
          parts: `ActorOutput` of T and B / `len(devices)`, one for each of `devices`, preferably
            tensors that are on it.
          is_fresh: see `step`.
          are_replayed: `is_replayed` of `step` for each part.
          intrinsic_rewards: `intrinsic_reward` of `step` for each part.

        Returns:
          See `step`.

        Raises:
          ValueError: a part is not `[T+1, B / len(devices)]`.
        """
        for part in parts:
            self._check_shape(part, self.config.batch_size // self._num_parts)
        new_steps = self._steps_per_unroll if is_fresh else self._no_steps
        if are_replayed is None:
            are_replayed = [self._none_replayed] * self._num_parts
        rest = [are_replayed] if intrinsic_rewards is None else [are_replayed, intrinsic_rewards]
        tuples = iter(list(zip(parts, *rest, strict=True)))
        if self._strategy is None:
            return self._step(next(tuples), new_steps)
        return self._step_together(
            self._strategy.experimental_distribute_values_from_function(lambda _: next(tuples)),
            new_steps,
        )

    @tf.function(autograph=False)
    def _step(self, part: _Part, new_steps: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._step_replica(part, new_steps)

    @tf.function(autograph=False)
    def _step_together(self, parts: Any, new_steps: tf.Tensor) -> dict[str, tf.Tensor]:
        assert self._strategy is not None
        metrics = self._strategy.run(self._step_replica, args=(parts, new_steps))
        return {name: self._local(value) for name, value in metrics.items()}

    def _step_replica(self, part: _Part, new_steps: tf.Tensor) -> dict[str, tf.Tensor]:
        batch, is_replayed, *intrinsic = part
        parameters = self._parameters
        schedules = self._schedules()
        target_outputs = self._target_outputs(batch)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            total, parts, targets = self._loss(
                batch, schedules.get('entropy_cost'), target_outputs, *intrinsic
            )
        gradients = tape.gradient(total, parameters)
        lag = self.updates - batch.policy_version
        statistics = self._statistics(batch, targets, is_replayed, new_steps)
        if self._strategy is not None:
            total, parts, gradients, statistics = _join(total, parts, gradients, statistics)
            lag, is_replayed = _gather(lag, is_replayed)
        means = {'intrinsic_reward': self._mean(intrinsic[0])} if intrinsic else {}
        gradients = [
            sum_duplicates(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
            for gradient in gradients
        ]
        # A lost learner makes collective operations fail: all come before the first weight changes.
        with tf.control_dependencies([lag, *means.values(), *statistics.values()]):
            update = self._update(
                total, gradients, parameters, schedules['learning_rate'], statistics
            )
            with tf.control_dependencies([update['skipped']]):
                num_fresh = tf.math.count_nonzero(tf.logical_not(is_replayed))
                _add(self.agent_steps, new_steps * num_fresh)
        return {
            'loss/total': total,
            **{f'loss/{name}': part for name, part in parts.items()},
            **self._lags(lag, is_replayed),
            **means,
            **schedules,
            **update,
        }

    def _statistics(
        self,
        batch: ActorOutput,
        targets: tf.Tensor,
        is_replayed: tf.Tensor,
        new_steps: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Returns the statistics of one replica's unrolls, for those that the agent keeps."""
        statistics = {}
        agent = self.agent
        popart, normalizer, frame_mean = agent.popart, agent.normalizer, agent.frame_mean
        is_fresh = tf.greater(new_steps, 0)
        is_counted = tf.logical_not(is_replayed) & is_fresh
        if popart is not None:
            is_step = losses.steps(batch.env_outputs)
            statistics['popart'] = popart.moments(targets, batch.level_id, is_step)
        if normalizer is not None:
            # The last row is also the first one of the next unroll.
            rows = {name: array[:-1] for name, array in batch.env_outputs.observation.items()}
            statistics['observations'] = normalizer.summary(rows, is_counted)[tf.newaxis]
        if frame_mean is not None:
            frames = batch.env_outputs.observation['frame'][:-1]
            summary = tf.cond(
                is_fresh, lambda: frame_mean.summary(frames, is_counted), frame_mean.no_summary
            )
            statistics['frames'] = summary[tf.newaxis]
        return statistics

    def _loss(
        self,
        batch: ActorOutput,
        entropy_cost: tf.Tensor | None,
        target_outputs: AgentOutput | None,
        intrinsic_reward: tf.Tensor | None = None,
    ) -> losses.Loss:
        config, popart, value_stddev = self.config.loss, self.agent.popart, None
        given, reconstruction_loss = {}, None
        if self.decoder is not None and config.autoencoder_cost:
            given['features'], reconstruction_loss = self._reconstruct(
                batch.env_outputs.observation['frame']
            )
        learner_outputs, _ = self.agent.unroll(
            batch.agent_outputs.action, batch.env_outputs, batch.agent_state, **given
        )
        if popart is not None:
            value_stddev = popart.stddev(batch.level_id)
            values = popart.values(learner_outputs.baseline, batch.level_id)
            learner_outputs = learner_outputs._replace(baseline=values)
        loss = losses.compute(
            losses.LossInputs(
                actions=self.agent.actions,
                agent_outputs=batch.agent_outputs,
                learner_outputs=learner_outputs,
                env_outputs=batch.env_outputs,
                value_stddev=value_stddev,
                entropy_cost=entropy_cost,
                target_outputs=target_outputs,
                sum_over_replicas=self._sum_over_replicas,
                intrinsic_reward=intrinsic_reward,
            ),
            config,
        )
        if reconstruction_loss is None:
            return loss
        total = loss.total + config.autoencoder_cost * reconstruction_loss
        return loss._replace(total=total, parts=loss.parts | {'autoencoder': reconstruction_loss})

    def _reconstruct(self, frames: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the features of all frames `[T+1, B, ...]`, and the loss of all but the last."""
        assert self.decoder is not None
        size = tf.shape(frames)[1]
        frames = tf.reshape(frames, [-1, *frames.shape[2:]])
        features = self.agent.encode(frames)
        # The last row is also the first one of the next unroll.
        loss = losses.autoencoder_loss(frames[:-size], self.decoder(features[:-size]))
        return features, loss

    @tf.function(autograph=False)
    def reconstruct(self, frames: tf.Tensor) -> tf.Tensor:
        """Returns reconstructions of frames, with the present weights of one replica.

        Args:
          frames: uint8 `[N, H, W, C]`.

        Returns:
          f32 `[N, H, W, C]`, pixels in about [0, 1].
        """
        assert self.decoder is not None
        return self.decoder(self.agent.encode(frames))

    def _lags(self, lag: tf.Tensor, is_replayed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns metrics of the policy lags, i64 `[N]`."""

        def of(prefix: str, chosen: tf.Tensor) -> dict[str, tf.Tensor]:
            lags = tf.boolean_mask(lag, chosen)
            return {
                f'{prefix}policy_lag_mean': tf.reduce_mean(tf.cast(lags, tf.float32)),
                f'{prefix}policy_lag_max': tf.reduce_max(lags),
            }

        if not self.config.replay.replay_fraction:
            return of('', tf.ones_like(is_replayed))
        return {
            'replayed_fraction': tf.reduce_mean(tf.cast(is_replayed, tf.float32)),
            **of('replayed_', is_replayed),
            **of('', tf.logical_not(is_replayed)),
        }

    def _update(
        self,
        loss: tf.Tensor,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
        learning_rate: tf.Tensor,
        statistics: dict[str, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """Applies the gradients if they and the loss are finite; returns metrics."""
        # A NaN or infinity in any gradient makes the norm not finite, too.
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)

        def apply() -> tf.Tensor:
            clipped = gradients
            if self.config.optimizer.gradient_clip_norm:
                clipped, _ = tf.clip_by_global_norm(
                    gradients, self.config.optimizer.gradient_clip_norm, use_norm=norm
                )
            self.optimizer.apply(clipped, parameters, learning_rate)
            if self.agent.popart is not None:
                self.agent.popart.update(statistics['popart'])
            if self.agent.normalizer is not None:
                self.agent.normalizer.update(statistics['observations'])
            if self.agent.frame_mean is not None:
                self.agent.frame_mean.update(statistics['frames'])
            _add(self.updates, tf.constant(1, tf.int64))
            return tf.constant(False)

        skipped = tf.cond(finite, apply, lambda: tf.constant(True))
        return {'gradient_norm': norm, 'skipped': skipped}

    def _target_outputs(self, batch: ActorOutput) -> AgentOutput | None:
        """Updates the target network if that is due; returns its outputs, None if there is none."""
        if self.target_agent is None:
            return None
        self._update_target()
        outputs, _ = self.target_agent.unroll(
            batch.agent_outputs.action, batch.env_outputs, batch.agent_state
        )
        return outputs

    def _update_target(self) -> None:
        """Copies the agent to the target network if that is due, as it is at the first update."""
        assert self.target_agent is not None
        targets = self.target_agent.acting_variables

        def copy() -> tf.Tensor:
            for target, weight in zip(targets, self.agent.acting_variables, strict=True):
                tf.raw_ops.AssignVariableOp(resource=target.handle, value=weight.read_value())
            return tf.constant(True)

        is_due = tf.equal(self.updates % self.config.loss.target_update_steps, 0)
        tf.cond(is_due, copy, lambda: tf.constant(False))

    def _schedules(self) -> dict[str, tf.Tensor]:
        """Returns the settings that change over the run, f32 scalars."""
        # In float64: float32 cannot tell the later agent steps of a long run apart.
        done = tf.cast(self.agent_steps, tf.float64) / self.config.total_agent_steps
        left = tf.maximum(1.0 - done, 0.0)

        def linear(start: float, end: float) -> tf.Tensor:
            return end + (start - end) * left

        config = self.config
        schedules = {
            'learning_rate': linear(
                config.optimizer.learning_rate, config.optimizer.final_learning_rate
            )
        }
        if config.loss.final_entropy_cost is not None:
            schedules['entropy_cost'] = linear(
                config.loss.entropy_cost, config.loss.final_entropy_cost
            )
        return {name: tf.cast(value, tf.float32) for name, value in schedules.items()}

    def _sum_over_replicas(self, value: tf.Tensor) -> tf.Tensor:
        if self._strategy is None:
            return value
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(value))

    def _mean(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the mean of f32 values over all replicas."""
        count = self._sum_over_replicas(tf.cast(tf.size(values), tf.float32))
        return self._sum_over_replicas(tf.reduce_sum(values)) / count

    def _local(self, value: Any) -> Any:
        """Returns the value on the first replica of this process."""
        if self._strategy is None:
            return value
        return self._strategy.experimental_local_results(value)[0]

    def _check_shape(self, batch: ActorOutput, batch_size: int) -> None:
        expected = [self.config.unroll_length + 1, batch_size]
        shape = batch.env_outputs.reward.shape
        if not shape.is_compatible_with(expected):
            raise ValueError(
                f'rewards of shape {shape} do not fit unroll_length {self.config.unroll_length} '
                f'and batch_size {batch_size}, for which they should be {expected}'
            )


def _create_optimizer(parameters: Sequence[tf.Variable], config: OptimizerConfig) -> RMSProp | Adam:
    if config.optimizer == 'adam':
        return Adam(parameters, config.adam_beta1, config.adam_beta2, config.adam_epsilon)
    return RMSProp(parameters, decay=config.decay, momentum=config.momentum, epsilon=config.epsilon)


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
    statistics: dict[str, tf.Tensor],
) -> tuple[tf.Tensor, dict[str, tf.Tensor], list[Any], dict[str, tf.Tensor]]:
    """Joins losses, gradients and statistics of all replicas."""
    context = tf.distribute.get_replica_context()
    present = [gradient for gradient in gradients if gradient is not None]
    loss, parts, present = context.all_reduce(tf.distribute.ReduceOp.SUM, (loss, parts, present))
    summed = iter(present)
    gradients = [None if gradient is None else next(summed) for gradient in gradients]
    statistics = dict(statistics)
    if 'popart' in statistics:
        # Apart from the others: tensors that are summed in one call must have one dtype.
        moments = context.all_reduce(tf.distribute.ReduceOp.SUM, statistics['popart'])
        statistics['popart'] = moments
    for name in ('observations', 'frames'):
        if name in statistics:
            statistics[name] = context.all_gather(statistics[name], axis=0)
    return loss, parts, gradients, statistics


def _gather(lag: tf.Tensor, is_replayed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the lags of the unrolls of all replicas, `[N]`, and which of these are replayed."""
    # As one tensor, since each exchange waits for all replicas.
    pairs = tf.stack([lag, tf.cast(is_replayed, tf.int64)], 1)
    pairs = tf.distribute.get_replica_context().all_gather(pairs, axis=0)
    return pairs[:, 0], tf.not_equal(pairs[:, 1], 0)


def _add(variable: tf.Variable, amount: tf.Tensor) -> None:
    """Adds to the variable of the replica that is computing, which `assign_add` cannot do."""
    tf.raw_ops.AssignAddVariableOp(resource=variable.handle, value=amount)
