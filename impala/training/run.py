"""The start of a run: checks its settings, builds its network, opens its log."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from impala.acting.actor_processes import ActorHost, require_files
from impala.acting.in_process import InProcessHost
from impala.config import (
    Config,
    ConfigError,
)
from impala.experience.mixture import ReplayMixer
from impala.learning import memory_needs
from impala.learning.devices import strategy_of_devices
from impala.learning.learner import Learner
from impala.learning.losses import loss_function
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
from impala.runs.stop_signal import RaisedStopSignal, StopSignal
from impala.suites import Suite
from impala.training.learners import Learners, OnlyLearner
from impala.trajectory import EnvironmentSpec


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose levels can be played and whose settings match its checkpoints.

    Attributes:
      config: of the run.
      suite: the levels.
      actor_host: starts the actor processes; or makes environments in this process, to debug.
      spec: of every level.
      network: settings of the agent's network.
      learners: this learner and the others, all of which are connected.
      stop: receives the signals that end the run.
    """

    config: Config
    suite: Suite
    actor_host: ActorHost | InProcessHost
    spec: EnvironmentSpec
    network: AgentConfig
    learners: Learners
    stop: StopSignal

    def frames(self, learner: Learner) -> int:
        """Returns the frames trained on so far."""
        return learner.counts()[1] * self.spec.num_action_repeats

    def when_stopped(self, close: Callable[[], Any]) -> None:
        """Makes a signal, and the end of another learner, call a function from now on."""

        def stop_all() -> None:
            close()
            self.learners.stop()

        self.stop.then(stop_all, nothing_to_lose=True)
        self.learners.then(close)


@contextlib.contextmanager
def started(config: Config, suite: Suite) -> Iterator[Run]:
    """Starts a run; the end of the block ends its actor processes and connections.

    Within the block, `StopSignal` handles SIGINT and SIGTERM.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came.
      ConfigError, LevelError, LogdirError, ServerError: one sentence for the user.
    """
    cluster, num_actors = config.cluster, config.actors.num_actors
    if not cluster.is_distributed and num_actors < len(suite.levels):
        raise ConfigError(
            f'--num_actors={num_actors} would leave some of the {len(suite.levels)} levels out: '
            f'give --num_actors={len(suite.levels)} or more.'
        )
    with contextlib.ExitStack() as stack:
        stop: StopSignal
        actor_host: ActorHost | InProcessHost
        if config.run.debug:
            stop = stack.enter_context(RaisedStopSignal())
            actor_host = stack.enter_context(InProcessHost(config.environment))
        else:
            stop = stack.enter_context(StopSignal())
            if not cluster.is_distributed:
                require_files(config.actors.num_processes, 'num_actors', num_actors)
            actor_host = stack.enter_context(ActorHost(config.environment, config.actors))
        spec = actor_host.common_spec(suite.level_names, config.run.seed)
        network = choose_network(config, suite.level_names, spec)
        if config.cluster.is_first:
            logdir, counting = config.run.logdir, counted_by(suite.level_names, spec)
            check_same_network(logdir, checkpoint_settings(config, network, spec))
            check_same_run(logdir, counting, config.run.allow_level_change)
        needs = memory_needs.of_learner(config, spec, network)
        if not cluster.is_distributed:
            needs += memory_needs.of_actors(config, spec, network)
        elif config.policy_acts:
            needs.append(memory_needs.of_unrolls(config, spec, network))
        memory_needs.check(needs)
        run_id = ''
        if cluster.is_first and cluster.replay_addresses:
            run_id = run_files.run_id(config.run.logdir)
        learners: Learners = OnlyLearner(run_id)
        if cluster.has_several_learners:
            from impala.cluster.learner_group import LearnerGroup, Member, warn_of_gradients

            member = Member(cluster.learner_addresses, cluster.task, cluster.secret())
            settings = shared_settings(config, spec, network)
            learners = stack.enter_context(LearnerGroup(member, settings, report_to_stderr, run_id))
            if not cluster.trusted_network:
                warn_of_gradients(member, report_to_stderr)
        yield Run(config, suite, actor_host, spec, network, learners, stop)


def shared_settings(config: Config, spec: EnvironmentSpec, network: AgentConfig) -> dict[str, Any]:
    """Returns the settings that all learners of a run must agree on, JSON-serializable."""
    return (
        config.agreed('jobs', 'learners')
        | network_settings(network, spec)
        | {'num_action_repeats': spec.num_action_repeats}
    )


def build_learner(run: Run) -> tuple[Agent, Learner]:
    """Makes the agent and its learner; with several learners, this learner's replicas.

    Raises:
      ConfigError, ServerError: one sentence for the user.
    """
    config, network, spec, cluster = run.config, run.network, run.spec, run.config.cluster
    total_agent_steps = max(1, config.run.total_environment_frames // spec.num_action_repeats)
    settings = dataclasses.replace(config.learner, total_agent_steps=total_agent_steps)
    with contextlib.ExitStack() as stack:
        if not config.run.debug:
            # A debugger may hold it up for as long as the user likes.
            stack.enter_context(starting(report_to_stderr, 'the network is built'))
        strategy = None
        if cluster.has_several_learners:
            from impala.cluster.learner_group import strategy_of_learners

            strategy = strategy_of_learners(cluster.learner_addresses, cluster.task)
        elif settings.learner_devices:
            strategy = strategy_of_devices(settings.learner_devices)
        tf.random.set_seed(config.run.seed)
        if strategy is not None:
            stack.enter_context(strategy.scope())
        agent = create_agent(network, spec)
        if config.network.initializer == 'orthogonal':
            agent.initialize_orthogonally()
        target_agent = create_agent(network, spec) if settings.loss.target_update_steps else None
        decoder = create_decoder(network, spec)
        try:
            loss_function(settings.loss.loss)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            return agent, Learner(agent, settings, strategy, target_agent, decoder)
        except ValueError as error:
            raise ConfigError(
                f'--batch_size={settings.batch_size} does not fit: {error}.'
            ) from error


@contextlib.contextmanager
def opened_log(
    run: Run,
    learner: Learner,
    wall_seconds: float,
    on_line: Callable[[Mapping[str, float]], None],
) -> Iterator[Log]:
    """Opens the log of the run; learners other than the first report to the first one instead.

    Args:
      run: to log.
      learner: already restored.
      wall_seconds: seconds of training before this start.
      on_line: see `RunLog`; not called by learners other than the first.

    Raises:
      LogdirError: one sentence for the user.
    """
    config = run.config
    if not config.cluster.is_first:
        from impala.cluster.learner_group import FollowerLog, LearnerGroup

        assert isinstance(run.learners, LearnerGroup)
        yield FollowerLog(run.learners, config.cluster.task, config.run.log_secs)
        return
    updates, agent_steps = learner.counts()
    with RunLog(
        config.run.logdir,
        run.suite,
        run.spec.num_action_repeats,
        config.run.total_environment_frames,
        config.run.log_secs,
        begin=Counters(run.frames(learner), agent_steps, updates, wall_seconds),
        shows_bar=not config.run.debug,
        on_line=on_line,
    ) as log:
        yield log


def announce(
    run: Run, learner: Learner, replay: ReplayMixer | None, latest: str | None, log: Log
) -> None:
    """Reports to the user what is trained where.

    Args:
      run: the run.
      learner: of the run.
      replay: fills a part of each batch; None without replay.
      latest: path of the checkpoint from which the run resumes; None for a new run.
      log: shows the report.
    """
    config, network, acting_on = run.config, run.network, run.config.actors.inference_device
    num_weights = sum(math.prod(weight.shape) for weight in learner.agent.trainable_variables)
    is_distributed = config.cluster.is_distributed
    core = {'lstm': 'with LSTM', 'gru': 'with GRU', 'none': 'without core'}.get(
        network.core, f'with {network.core}'
    )
    who = 'actor jobs' if is_distributed else f'{config.actors.num_actors} actors'
    if config.run.debug:
        who += ' in this process (--debug)'
    log.message(
        f'{run.suite.text}: {who}, {network.torso} network {core} ({num_weights:,} weights), '
        f'learner on {_device_names(config)} in {network.compute_dtype}'
        + (f', acting on {acting_on}' if acting_on else '')
        + (f'; all goes to {config.run.logdir}' if config.cluster.is_first else '')
    )
    if replay is not None:
        log.message(replay.replay.description)
    if not config.policy_acts and config.actors.inference_batch_size:
        log.message(
            f'WARNING: --inference_batch_size={config.actors.inference_batch_size} has no effect '
            'on a learner that does not act itself: give it to the actor jobs'
        )
    if latest is not None:
        log.message(f'Resuming from {latest}, at agent step {learner.counts()[1]:,}')


def _device_names(config: Config) -> str:
    """Returns where the learner trains, in a few words."""
    if config.learner.learner_devices:
        return ' and '.join(config.learner.learner_devices)
    device = 'GPU' if tf.config.list_logical_devices('GPU') else 'CPU'
    if not config.cluster.has_several_learners:
        return device
    return f'{device}, one of {len(config.cluster.learner_addresses)} learners,'
