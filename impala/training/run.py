"""The start of a run: its settings are checked, its network is built, its checkpoint restored."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from impala.acting.actor_processes import Workplace, require_files
from impala.config import (
    ConfigError,
    TrainingConfig,
    check_learner,
    check_torso,
    environment_settings,
)
from impala.experience.mixture import ReplayMixer
from impala.learning import memory_needs
from impala.learning.devices import strategy_of_devices
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import choose_network, create_agent, create_decoder
from impala.runs import files as run_files
from impala.runs.log import Log
from impala.runs.progress import report_to_stderr
from impala.runs.run_log import Counters, RunLog
from impala.runs.run_settings import (
    check_same_network,
    check_same_run,
    checkpoint_settings,
    counted_by,
    network_settings,
)
from impala.runs.start_progress import starting
from impala.runs.stop_signal import StopSignal
from impala.training.learners import Learners, OnlyLearner
from impala.trajectory import EnvironmentSpec

if TYPE_CHECKING:
    from impala.cluster.learner_group import Member


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run trains, and where its actors play.

    Attributes:
      learner_address: `host:port` at which actor jobs find the learner; None for actors of its own.
      member: which of several learners, with `learner_address`, this is; None if it is alone.
      learner_devices: names, as `/gpu:0`, of the devices that share each batch of a learner that is
        alone; none for the one that TensorFlow chooses.
      trusted_network: whether nobody need be told that others may reach the learner's port.
    """

    learner_address: str | None = None
    member: 'Member | None' = None
    learner_devices: Sequence[str] = ()
    trusted_network: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this learner is the one that writes checkpoints and logs."""
        return self.member is None or self.member.is_first

    @property
    def device_names(self) -> str:
        """Where the learner trains, in a few words."""
        if self.learner_devices:
            return ' and '.join(self.learner_devices)
        device = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
        if self.member is None:
            return device
        return f'{device}, one of {len(self.member.addresses)} learners,'


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose levels can be played and whose settings are those of its checkpoints.

    Attributes:
      config: of the run.
      placement: of learner and actors.
      workplace: where the processes of actors run.
      spec: of every level.
      network: the agent's.
      learners: this one and the others, which are there.
      stop: receives the signals that end the run.
    """

    config: TrainingConfig
    placement: Placement
    workplace: Workplace
    spec: EnvironmentSpec
    network: AgentConfig
    learners: Learners
    stop: StopSignal

    def frames(self, learner: Learner) -> int:
        """Returns the frames that were trained on so far."""
        return learner.counts()[1] * self.spec.num_action_repeats

    def when_stopped(self, close: Callable[[], Any]) -> None:
        """Has a signal, and the end of another learner, call a function from now on."""

        def stop_all() -> None:
            close()
            self.learners.stop()

        self.stop.then(stop_all, nothing_to_lose=True)
        self.learners.then(close)


def check_settings(config: TrainingConfig, placement: Placement) -> None:
    """Refuses settings that do not go together.

    Raises:
      ConfigError, ServerError: one sentence for the user.
    """
    if placement.learner_address is None:
        if config.inference_batch_size > config.num_actors:
            raise ConfigError(
                f'--inference_batch_size={config.inference_batch_size} is more than there are '
                f'actors (--num_actors={config.num_actors}).'
            )
        if config.num_actors < len(config.level_names):
            raise ConfigError(
                f'--num_actors={config.num_actors} would leave some of the '
                f'{len(config.level_names)} levels out: give '
                f'--num_actors={len(config.level_names)} or more.'
            )
    check_learner(config.learner, config.popart)
    check_torso(config)
    if config.replay_addresses:
        from impala.cluster.remote_replay import check_replay_jobs

        check_replay_jobs(config.replay_addresses, config.learner)
    if placement.member is not None:
        from impala.cluster.learner_group import check_member

        check_member(placement.member)


@contextlib.contextmanager
def started(config: TrainingConfig, placement: Placement) -> Iterator[Run]:
    """Starts a run; ends the processes of its actors and its connections with the block.

    From now on SIGINT and SIGTERM are the run's, see `StopSignal`.

    Raises:
      KeyboardInterrupt: one of them has come.
      ConfigError, LevelError, LogdirError, ServerError: one sentence for the user.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if placement.learner_address is None:
            require_files(config.num_processes, 'num_actors', config.num_actors)
        workplace = stack.enter_context(Workplace(config.environment, config.silence))
        spec = workplace.common_spec(config.level_names, config.seed)
        network = choose_network(config, spec)
        if placement.is_first:
            check_same_network(config.logdir, checkpoint_settings(config, network, spec))
            check_same_run(config.logdir, counted_by(config, spec), config.allow_level_change)
        needs = memory_needs.of_learner(config, spec, network)
        if placement.learner_address is None:
            needs += memory_needs.of_actors(config, spec, network)
        memory_needs.check(needs)
        run_id = ''
        if placement.is_first and config.replay_addresses:
            run_id = run_files.run_id(config.logdir)
        learners: Learners = OnlyLearner(run_id)
        if placement.member is not None:
            from impala.cluster.learner_group import LearnerGroup

            settings = shared_settings(config, placement.member, spec, network)
            learners = stack.enter_context(
                LearnerGroup(placement.member, settings, report_to_stderr, run_id)
            )
        yield Run(config, placement, workplace, spec, network, learners, stop)


def shared_settings(
    config: TrainingConfig, member: 'Member', spec: EnvironmentSpec, network: AgentConfig
) -> dict[str, Any]:
    """Returns what all learners of a run must have the same of, JSON-serialisable."""
    of_learner = dataclasses.asdict(config.learner)
    of_learner['vtrace_lambda'] = of_learner.pop('lambda_')
    # Follows from the frames and the repeats.
    del of_learner['total_agent_steps']
    return (
        network_settings(network, spec)
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


def build_learner(run: Run) -> tuple[Agent, Learner]:
    """Makes the agent and its learner, or, with other learners, this one's replicas of them.

    Raises:
      ConfigError, ServerError: one sentence for the user.
    """
    config, network, spec, placement = run.config, run.network, run.spec, run.placement
    total_agent_steps = max(1, config.total_environment_frames // spec.num_action_repeats)
    settings = dataclasses.replace(config.learner, total_agent_steps=total_agent_steps)
    with starting(report_to_stderr, 'the network is built'), contextlib.ExitStack() as stack:
        strategy = None
        if placement.member is not None:
            from impala.cluster.learner_group import strategy_of_learners

            strategy = strategy_of_learners(placement.member.addresses, placement.member.task)
        elif placement.learner_devices:
            strategy = strategy_of_devices(placement.learner_devices)
        tf.random.set_seed(config.seed)
        if strategy is not None:
            stack.enter_context(strategy.scope())
        agent = create_agent(network, spec)
        if config.initializer == 'orthogonal':
            agent.initialize_orthogonally()
        target_agent = create_agent(network, spec) if settings.target_update_steps else None
        decoder = create_decoder(network, spec)
        try:
            return agent, Learner(agent, settings, strategy, target_agent, decoder)
        except ValueError as error:
            raise ConfigError(
                f'--batch_size={settings.batch_size} does not fit: {error}.'
            ) from error


@contextlib.contextmanager
def opened_log(run: Run, learner: Learner, wall_seconds: float) -> Iterator[Log]:
    """Opens the log of the run, or of a learner that tells the first one what it has to log.

    Args:
      run: to log.
      learner: is as it was restored.
      wall_seconds: of training before.

    Raises:
      LogdirError: one sentence for the user.
    """
    config, member = run.config, run.placement.member
    if member is not None and not member.is_first:
        from impala.cluster.learner_group import FollowerLog, LearnerGroup

        assert isinstance(run.learners, LearnerGroup)
        yield FollowerLog(run.learners, member.task, config.log_secs)
        return
    updates, agent_steps = learner.counts()
    with RunLog(
        config.logdir,
        config.level_names,
        run.spec.num_action_repeats,
        config.total_environment_frames,
        config.log_secs,
        begin=Counters(run.frames(learner), agent_steps, updates, wall_seconds),
        suite=config.suite,
    ) as log:
        yield log


def announce(
    run: Run, learner: Learner, replay: ReplayMixer | None, latest: str | None, log: Log
) -> None:
    """Tells the user what is trained where.

    Args:
      run: that begins.
      learner: of the run.
      replay: that fills a part of each batch.
      latest: path of the checkpoint from which the run is resumed, if it is.
      log: shows it.
    """
    config, network, placement = run.config, run.network, run.placement
    num_weights = sum(int(tf.size(weight)) for weight in learner.weights)
    is_alone = placement.learner_address is None
    who = f'{config.num_actors} actors' if is_alone else 'actor jobs'
    log.message(
        f'{config.levels_text}: {who}, {network.torso} network '
        f'{"with" if network.use_lstm else "without"} LSTM ({num_weights:,} weights), learner '
        f'on {placement.device_names} in {network.compute_dtype}'
        + (f'; all goes to {config.logdir}' if placement.is_first else '')
    )
    if replay is not None:
        log.message(replay.replay.description)
    if not is_alone and config.inference_batch_size:
        log.message(
            f'WARNING: --inference_batch_size={config.inference_batch_size} has no effect on a '
            'learner that does not act itself: give it to the actor jobs'
        )
    if latest is not None:
        log.message(f'Going on from {latest}, at agent step {learner.counts()[1]:,}')
