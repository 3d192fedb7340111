"""Training: actors, behaviour policy, queue and learner, put together (Figure 1)."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from impala.acting.actor_pool import UnrollsLostError
from impala.acting.actor_processes import Workplace, require_files
from impala.acting.local_actors import LocalActors
from impala.cluster.learner_group import (
    FollowerLog,
    LearnerGroup,
    Member,
    check_member,
    strategy_of_learners,
)
from impala.cluster.remote_actors import RemoteActors, job_settings
from impala.cluster.remote_replay import RemoteReplay, check_replay_jobs
from impala.cluster.transport import warn_of_network
from impala.config import (
    ConfigError,
    TrainingConfig,
    check_learner,
    check_torso,
    environment_settings,
)
from impala.experience.batch import UnrollBatch, unroll_components
from impala.experience.loading import Loading, default_loaders
from impala.experience.mixture import ReplayMixer
from impala.experience.replay import Replay
from impala.experience.sample_reuse import reused
from impala.learning import memory_needs
from impala.learning.devices import strategy_of_devices
from impala.learning.learner import Learner
from impala.networks import decoder
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import choose_network, create_agent, create_decoder
from impala.runs import files as run_files
from impala.runs.checkpoint import Checkpointer, LogdirError
from impala.runs.log import Log
from impala.runs.progress import report_to_stderr
from impala.runs.run_log import WAIT_STAGE, RunLog
from impala.runs.run_settings import (
    check_same_network,
    check_same_run,
    checkpoint_settings,
    counted_by,
    network_settings,
    store_settings,
)
from impala.runs.start_progress import starting
from impala.runs.stop_signal import StopSignal
from impala.seeds import derived_seed
from impala.trajectory import EnvironmentSpec


class TrainingError(Exception):
    """The run cannot go on; its text is one sentence for the user."""


# Updates in a row with a loss or gradient that is not finite, after which a run stops.
MAX_SKIPPED_UPDATES = 10
NUM_RECONSTRUCTIONS = 8


def train(
    config: TrainingConfig,
    on_accepted: Callable[[], Any] | None = None,
    learner_address: str | None = None,
    member: Member | None = None,
    learner_devices: Sequence[str] = (),
    trusted_network: bool = False,
) -> str | None:
    """Trains until the frames are done, or until SIGINT or SIGTERM. Main thread only.

    A run that finds checkpoints in its logdir goes on where they end.

    Args:
      config: of the run.
      on_accepted: called once it is certain that the level can be played and that the network is
        the one of the checkpoints, before anything is trained.
      learner_address: `host:port` at which actor jobs find the learner; None for actors of its own.
      member: which of several learners, with `learner_address`, this is; None if it is alone.
      learner_devices: names, as `/gpu:0`, of the devices that share each batch of a learner that is
        alone; none for the one that TensorFlow chooses.
      trusted_network: whether nobody need be told that others may reach the learner's port.

    Returns:
      The path of the last checkpoint, None if there is none yet or another learner has it. At once
      if all frames were done before.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came before training had begun.
      UnrollsLostError: training has ended and is saved, but actors kept dying.
      ConfigError, LevelError, LogdirError, ServerError, TrainingError: one sentence for the user.
      LearnerGroupError: another learner has ended.
      ActorError: with the actor's own error text.
    """
    if learner_address is None and config.inference_batch_size > config.num_actors:
        raise ConfigError(
            f'--inference_batch_size={config.inference_batch_size} is more than there are actors '
            f'(--num_actors={config.num_actors}).'
        )
    if learner_address is None and config.num_actors < len(config.level_names):
        raise ConfigError(
            f'--num_actors={config.num_actors} would leave some of the {len(config.level_names)} '
            f'levels out: give --num_actors={len(config.level_names)} or more.'
        )
    check_learner(config.learner, config.popart)
    check_torso(config)
    check_replay_jobs(config.replay_addresses, config.learner)
    if member is not None:
        check_member(member)
    is_first = member is None or member.is_first
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if learner_address is None:
            require_files(config.num_processes, 'num_actors', config.num_actors)
        workplace = stack.enter_context(Workplace(config.environment, config.silence))
        spec = workplace.common_spec(config.level_names, config.seed)
        network = choose_network(config, spec)
        if is_first:
            settings_of_run = checkpoint_settings(config, network, spec)
            check_same_network(config.logdir, settings_of_run)
            check_same_run(config.logdir, counted_by(config, spec), config.allow_level_change)
        needs = memory_needs.of_learner(config, spec, network)
        if learner_address is None:
            needs += memory_needs.of_actors(config, spec, network)
        memory_needs.check(needs)
        run_id = run_files.run_id(config.logdir) if is_first and config.replay_addresses else ''
        group = None
        if member is not None:
            settings = _shared_settings(config, member, spec, network_settings(network, spec))
            group = stack.enter_context(LearnerGroup(member, settings, report_to_stderr, run_id))
            run_id = group.run_id
        frames_per_step = spec.num_action_repeats
        with starting(report_to_stderr, 'the network is built'):
            agent, learner = _create_learner(config, network, spec, member, learner_devices)
        replay = _create_replay(config, spec, agent, len(learner.devices), member, run_id)
        shards = replay.replay if replay and isinstance(replay.replay, RemoteReplay) else None
        checkpointer: Checkpointer | None = None
        if is_first:
            checkpointer = Checkpointer(config.logdir, learner, config.save_checkpoint_secs)
            checkpointer.restore()
            store_settings(config.logdir, settings_of_run, counted_by(config, spec))
        if on_accepted is not None:
            on_accepted()
        learner.synchronize()
        restored_updates, agent_steps = learner.counts()
        if agent_steps * frames_per_step >= config.last_frames:
            if group is not None:
                group.finish()
            return None if checkpointer is None else checkpointer.latest
        log: Log
        if checkpointer is not None:
            log = stack.enter_context(
                RunLog(
                    config.logdir,
                    config.level_names,
                    frames_per_step,
                    config.total_environment_frames,
                    config.log_secs,
                    frames=agent_steps * frames_per_step,
                    agent_steps=agent_steps,
                    updates=restored_updates,
                    wall_seconds=checkpointer.wall_seconds,
                    suite=config.suite,
                )
            )
        else:
            assert group is not None and member is not None
            log = FollowerLog(group, member.task, config.log_secs)
        actors: LocalActors | RemoteActors
        if learner_address is None:
            # Acting is bound by the work per row, not by matrix products: bfloat16 gains nothing.
            acting_agent = Agent(dataclasses.replace(network, compute_dtype='float32'), spec)
            # A run that goes on does not play its episodes once more.
            playing = dataclasses.replace(config, seed=derived_seed(config.seed, restored_updates))
            actors = LocalActors(playing, spec, acting_agent, workplace, log.message)
        else:
            settings = job_settings(config, network_settings(network, spec), frames_per_step)
            actors = RemoteActors(config, spec, agent, settings, learner_address, log.message)
            if not trusted_network:
                warn_of_network(actors.port, log.message)
        actors.publish(learner.weights, learner.version)
        if group is None:
            stop.then(actors.close, nothing_to_lose=True)
        else:
            stop.then(_both(actors.close, group.stop), nothing_to_lose=True)
            group.then(actors.close)
        if shards is not None:
            # Of a run that several learners begin, the first one does.
            shards.start(is_first and restored_updates == 0, log.message)
            stack.enter_context(shards)
        # Ends after the actors, for whom its threads wait.
        loading = stack.enter_context(
            Loading(
                actors.assembler(
                    config.learner.batch_size // len(learner.devices),
                    None if replay is None else replay.batch,
                ),
                config.loaders or default_loaders(learner.devices),
                learner.devices,
            )
        )
        stack.enter_context(actors)
        num_weights = sum(int(tf.size(weight)) for weight in learner.weights)
        who = f'{config.num_actors} actors' if learner_address is None else 'actor jobs'
        log.message(
            f'{config.levels_text}: {who}, {network.torso} network '
            f'{"with" if network.use_lstm else "without"} LSTM ({num_weights:,} weights), learner '
            f'on {_place(member, learner_devices)} in {network.compute_dtype}'
            + (f'; all goes to {config.logdir}' if is_first else '')
        )
        if replay is not None:
            log.message(replay.replay.description)
        if learner_address is not None and config.inference_batch_size:
            log.message(
                f'WARNING: --inference_batch_size={config.inference_batch_size} has no effect on a '
                'learner that does not act itself: give it to the actor jobs'
            )
        if checkpointer is not None and checkpointer.latest is not None:
            log.message(f'Going on from {checkpointer.latest}, at agent step {agent_steps:,}')

        def save() -> None:
            # A run that fails each time it is started must not push its good checkpoints out.
            if checkpointer is not None and learner.counts()[0] > restored_updates:
                # The signal may have come at the end of the first train step.
                stop.begun()
                checkpointer.save(log.wall_seconds)

        timer = StageTimer()
        try:
            _learn(
                config,
                frames_per_step,
                learner,
                actors,
                loading,
                replay,
                log,
                timer,
                checkpointer,
                group,
                stop,
            )
            # For the last line, which may come early.
            log.record_stage_seconds(actors.record(log) | timer.seconds)
            _record_popart(config, learner, log)
            if replay is not None:
                _record_replay(replay, log)
            if not stop.received:
                actors.check()
                if group is not None:
                    group.check()
                    group.finish()
                    group.collect(log)
            elif group is not None:
                # The signal's thread may be behind, and nobody is told when all is closed.
                group.stop()
        except BaseException:
            # Whatever went wrong, the weights are good: updates that were not finite are skipped.
            try:
                save()
            except LogdirError as error:
                log.message(f'WARNING: {error}')
            raise
        try:
            save()
        except LogdirError as error:
            raise TrainingError(str(error)) from error
        _, agent_steps = learner.counts()
        # Actor jobs wait for a run that ends for now, whether by a signal or by its flag.
        if not stop.received and agent_steps * frames_per_step >= config.total_environment_frames:
            actors.finish()
        if isinstance(actors, LocalActors):
            try:
                actors.check_losses()
            except UnrollsLostError as error:
                error.checkpoint = None if checkpointer is None else checkpointer.latest
                raise
    return None if checkpointer is None else checkpointer.latest


def _create_learner(
    config: TrainingConfig,
    network: AgentConfig,
    spec: EnvironmentSpec,
    member: Member | None,
    learner_devices: Sequence[str],
) -> tuple[Agent, Learner]:
    """Makes the agent and its learner, or, with the other learners, this one's replicas of them."""
    strategy = None
    if member is not None:
        strategy = strategy_of_learners(member.addresses, member.task)
    elif learner_devices:
        strategy = strategy_of_devices(learner_devices)
    tf.random.set_seed(config.seed)
    total_agent_steps = max(1, config.total_environment_frames // spec.num_action_repeats)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        agent = create_agent(network, spec)
        if config.initializer == 'orthogonal':
            agent.initialize_orthogonally()
        target_agent = create_agent(network, spec) if config.learner.target_update_steps else None
        encoders_decoder = create_decoder(network, spec)
        try:
            return agent, Learner(
                agent,
                dataclasses.replace(config.learner, total_agent_steps=total_agent_steps),
                strategy,
                target_agent,
                encoders_decoder,
            )
        except ValueError as error:
            raise ConfigError(
                f'--batch_size={config.learner.batch_size} does not fit: {error}.'
            ) from error


def _create_replay(
    config: TrainingConfig,
    spec: EnvironmentSpec,
    agent: Agent,
    num_devices: int,
    member: Member | None,
    run_id: str,
) -> ReplayMixer | None:
    """Makes what fills a part of each batch, or of each device's part, if the flags say so."""
    learner = config.learner
    if not learner.replay_fraction:
        return None
    part_size = learner.batch_size // num_devices
    if learner.replay_fraction * part_size > part_size - 1:
        raise ConfigError(
            f'--replay_fraction={learner.replay_fraction} would leave nothing new for some of '
            f'{num_devices} devices, each of which has {part_size} unrolls of '
            f'--batch_size={learner.batch_size}: give a larger batch or a smaller fraction.'
        )
    components = unroll_components(
        spec, agent.state_spec, learner.unroll_length, len(config.level_names)
    )
    stack = memory_needs.stack_of(spec)
    seed = (config.seed, 0 if member is None else member.task)
    if config.replay_addresses:
        shards = RemoteReplay(
            components,
            stack,
            config.level_names,
            run_id,
            config.replay_addresses,
            learner.batch_size,
            num_devices * math.ceil(learner.replay_fraction * part_size),
            seed,
            report_to_stderr,
        )
        return ReplayMixer(shards, learner.replay_fraction, part_size)
    try:
        replay = Replay(components, learner.replay_capacity, seed, stack)
    except MemoryError as error:
        raise ConfigError(
            f'--replay_capacity={learner.replay_capacity} is more than there is memory for: give a '
            'smaller one.'
        ) from error
    return ReplayMixer(replay, learner.replay_fraction, part_size)


def _shared_settings(
    config: TrainingConfig, member: Member, spec: EnvironmentSpec, network: dict[str, Any]
) -> dict[str, Any]:
    """Returns what all learners must have the same of, by the names of the flags."""
    of_learner = dataclasses.asdict(config.learner)
    of_learner['vtrace_lambda'] = of_learner.pop('lambda_')
    # Follows from the frames and the repeats.
    del of_learner['total_agent_steps']
    return (
        network
        | environment_settings(config.environment)
        | of_learner
        | {
            'learner_addresses': ','.join(member.addresses),
            'level_name': ','.join(config.level_names),
            'total_environment_frames': config.total_environment_frames,
            'stop_at_frames': config.stop_at_frames,
            'num_action_repeats': spec.num_action_repeats,
            'replay_addresses': ','.join(config.replay_addresses),
        }
    )


def _place(member: Member | None, learner_devices: Sequence[str]) -> str:
    if learner_devices:
        return ' and '.join(learner_devices)
    device = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
    if member is None:
        return device
    return f'{device}, one of {len(member.addresses)} learners,'


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _learn(
    config: TrainingConfig,
    frames_per_step: int,
    learner: Learner,
    actors: LocalActors | RemoteActors,
    loading: Loading[UnrollBatch],
    replay: ReplayMixer | None,
    log: Log,
    timer: 'StageTimer',
    checkpointer: Checkpointer | None,
    group: LearnerGroup | None,
    stop: StopSignal,
) -> None:
    """The learner of Figure 1: until the frames are done or the actors are closed."""
    skipped_in_a_row = 0
    has_begun = False
    _, agent_steps = learner.counts()
    batches = reused(loading, config.learner.sample_reuse, config.learner.reuse_buffer)
    while agent_steps * frames_per_step < config.last_frames:
        with timer(WAIT_STAGE):
            parts, is_fresh = next(batches, (None, False))
        # Behind the signal there may still be a batch that was assembled ahead.
        if parts is None or stop.received:
            return
        with timer('learner/train_step'):
            try:
                outputs = [part.actor_output for part in parts]
                are_replayed = [part.is_replayed for part in parts]
                with contextlib.nullcontext() if has_begun else _tracing(stop, log):
                    metrics = _to_floats(learner.step_in_parts(outputs, is_fresh, are_replayed))
                has_begun = True
            except KeyboardInterrupt:
                return
            except RuntimeError:
                # An interrupt that reaches TensorFlow while it makes an error comes out as this.
                if has_begun or not stop.received:
                    raise
                return
            except tf.errors.OpError as error:
                if group is None:
                    raise
                group.explain(error)
                return
        with timer('learner/publish'):
            actors.publish(learner.weights, learner.version)
        with timer('learner/log'):
            updates, agent_steps = learner.counts()
            log.record_update(metrics if is_fresh else _of_reuse(metrics))
            if is_fresh:
                for part in parts:
                    record_episodes(log, part)
            if group is not None:
                group.collect(log)
            if log.line_is_due:
                log.record_stage_seconds(actors.record(log) | timer.seconds)
                _record_popart(config, learner, log)
                record_reconstructions(log, learner, parts[0])
                if replay is not None:
                    _record_replay(replay, log)
            log.maybe_write(agent_steps * frames_per_step, agent_steps, updates)
            if checkpointer is not None:
                checkpointer.maybe_save(log.wall_seconds)
        skipped_in_a_row = skipped_in_a_row + 1 if metrics['skipped'] else 0
        # One bad batch is not many, however often it is used.
        if skipped_in_a_row >= MAX_SKIPPED_UPDATES * config.learner.sample_reuse:
            raise TrainingError(
                f'Loss or gradient was not finite in {skipped_in_a_row} updates in a row (none of '
                'them was applied): try a lower --learning_rate or --gradient_clip_norm.'
            )


@contextlib.contextmanager
def _tracing(stop: StopSignal, log: Log) -> Iterator[None]:
    """Surrounds the first train step, which TensorFlow takes seconds to make a graph of."""
    with stop.interrupting(), starting(log.message, 'the train step is traced'):
        yield
    stop.begun()


def _record_popart(config: TrainingConfig, learner: Learner, log: Log) -> None:
    popart = learner.agent.popart
    if popart is not None:
        log.record_update(popart.statistics(config.level_names))


def _record_replay(replay: ReplayMixer, log: Log) -> None:
    log.record_update(replay.replay.metrics())
    log.record_stage_seconds(replay.stage_seconds())


def _of_reuse(metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics of an update by a batch used before, whose policy lags are told apart."""
    return {
        f'reused_{name}' if 'policy_lag_' in name else name: value
        for name, value in metrics.items()
    }


def record_episodes(log: Log, batch: UnrollBatch) -> None:
    """Hands the episodes that ended in the unrolls of a batch that are new to the log."""
    info = batch.actor_output.env_outputs.info
    is_new = ~batch.is_replayed.numpy()
    level_ids = batch.actor_output.level_id.numpy()[is_new]
    log.record_agent_steps(level_ids, info.episode_step.shape[0] - 1)
    # Row 0 stands in the unroll before, too, or is the first of an actor.
    log.record_episodes(
        level_ids,
        info.episode_return.numpy()[1:, is_new],
        info.episode_frames.numpy()[1:, is_new],
        batch.ends.numpy()[1:, is_new],
    )


def record_reconstructions(log: Log, learner: Learner, batch: UnrollBatch) -> None:
    """Hands some frames of a batch, each above what the decoder makes of it, to the log.

    Only every so often, and if there is a decoder that is being trained.
    """
    if learner.decoder is None or not learner.config.autoencoder_cost:
        return
    if not log.picture_is_due:
        return
    frames = batch.actor_output.env_outputs.observation['frame']
    # Of different times and, as far as there are so many, different actors.
    rows, size = frames.shape[:2]
    shown = [(i * rows // NUM_RECONSTRUCTIONS, i % size) for i in range(NUM_RECONSTRUCTIONS)]
    frames = tf.stack([frames[row, column] for row, column in shown])
    picture = decoder.picture(frames.numpy(), learner.reconstruct(frames).numpy())
    log.record_picture('reconstructions', picture)


class StageTimer:
    """Adds up the seconds of named stages; cleanba's answer to "what is my bottleneck?"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times its block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed


def _to_floats(metrics: dict[str, tf.Tensor]) -> dict[str, float]:
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    if values.get('replayed_fraction') == 0:
        values = {name: v for name, v in values.items() if not name.startswith('replayed_policy')}
    return values
