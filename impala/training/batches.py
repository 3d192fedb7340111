"""The source of the learner's batches: actors, replay, loaders and sample reuse."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from impala.acting.in_process import InProcessActors, InProcessHost
from impala.acting.local_actors import LocalActors
from impala.config import ConfigError
from impala.experience.batch import Mix, UnrollBatch, unroll_components
from impala.experience.loading import Loading, default_loaders, move
from impala.experience.mixture import ReplayMixer
from impala.experience.replay import Replay
from impala.experience.sample_reuse import reused
from impala.learning import devices
from impala.learning.learner import Learner
from impala.networks.agent import Agent
from impala.runs.log import Log
from impala.runs.progress import report_to_stderr
from impala.runs.run_settings import network_settings
from impala.seeds import derived_seed
from impala.training.run import Run


def create_replay(run: Run, agent: Agent, learner: Learner) -> ReplayMixer | None:
    """Makes the replay and the mixer that adds its unrolls to each batch; None without replay.

    With several devices, each device's part of a batch has its own share of replayed unrolls.

    Raises:
      ConfigError: the fraction or the capacity is too large.
    """
    config, settings, num_devices = run.config, run.config.learner, len(learner.devices)
    if not settings.replay.replay_fraction:
        return None
    part_size, fraction = settings.batch_size // num_devices, settings.replay.replay_fraction
    if fraction * part_size > part_size - 1:
        raise ConfigError(
            f'--replay_fraction={fraction} would leave nothing new for some of '
            f'{num_devices} devices, each of which has {part_size} unrolls of '
            f'--batch_size={settings.batch_size}: give a larger batch or a smaller fraction.'
        )
    components = unroll_components(
        run.spec,
        agent.state_spec,
        settings.unroll_length,
        len(run.suite.level_names),
        config.environment.bootstrap_truncated,
    )
    stack = run.spec.stack
    task = config.cluster.task if config.cluster.has_several_learners else 0
    seed = (config.run.seed, task)
    if config.cluster.replay_addresses:
        from impala.cluster.remote_replay import RemoteReplay

        shards = RemoteReplay(
            components,
            stack,
            level_names=run.suite.level_names,
            run_id=run.learners.run_id,
            addresses=config.cluster.replay_addresses,
            batch_size=settings.batch_size,
            num_replayed=num_devices * math.ceil(fraction * part_size),
            seed=seed,
            secret=config.cluster.secret(),
            report=report_to_stderr,
        )
        return ReplayMixer(shards, fraction, part_size)
    capacity = settings.replay.replay_capacity
    try:
        replay = Replay(components, capacity, seed, stack)
    except MemoryError as error:
        raise ConfigError(
            f'--replay_capacity={capacity} is more than there is memory for: give a smaller one.'
        ) from error
    return ReplayMixer(replay, fraction, part_size)


class Actors(Protocol):
    """The source of unrolls, to which weights are published.

    `LocalActors`, `RemoteActors` or `RemoteInference`.

    A context manager: the actors play while its block runs.
    """

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...
    def publish(self, weights: Sequence[tf.Variable], version: tf.Tensor) -> None: ...
    def assembler(self, batch_size: int, mix: Mix | None = None) -> Callable[[], UnrollBatch]: ...
    def record(self, log: Log) -> dict[str, float]: ...
    def close(self) -> None: ...
    def check(self) -> None: ...
    def check_losses(self) -> None: ...
    def finish(self) -> None: ...


def create_actors(run: Run, agent: Agent, learner: Learner, log: Log) -> Actors:
    """Makes the actors of this machine, or the learner's end of actors on other machines.

    Raises:
      ConfigError, ServerError: one sentence for the user.
    """
    config, spec, level_names = run.config, run.spec, run.suite.level_names
    if config.policy_acts:
        # The work per row, not matrix products, limits acting: bfloat16 would not help.
        network = dataclasses.replace(run.network, compute_dtype='float32')
        device = devices.inference_device(config.actors.inference_device)
        with devices.placed_on(device):
            acting_agent = Agent(network, spec)
    if not config.cluster.is_distributed:
        # A resumed run must not repeat its earlier episodes.
        seed = derived_seed(config.run.seed, learner.counts()[0])
        playing = config.replace(seed=seed)
        host, report = run.actor_host, log.message
        if isinstance(host, InProcessHost):
            return InProcessActors(playing, level_names, spec, acting_agent, host, report, device)
        return LocalActors(playing, level_names, spec, acting_agent, host, report, device=device)
    from impala.cluster.remote_actors import RemoteActors, job_settings
    from impala.cluster.remote_inference import RemoteInference

    shape = network_settings(run.network, spec)
    settings = job_settings(config, level_names, shape, spec.num_action_repeats)
    if not config.policy_acts:
        return RemoteActors(config, level_names, spec, agent, settings, log.message)
    return RemoteInference(
        config,
        level_names,
        spec,
        run.network,
        acting_agent,
        run.actor_host,
        settings,
        log.message,
        device,
    )


class BatchSource:
    """Batches from actors and replay, prepared ahead by loaders. A context manager.

    Attributes:
      actors: the source of unrolls.
      replay: fills a part of each batch; None without replay.
      batches: within the block, yields pairs until the actors are closed: a batch, with a part for
        each of the learner's devices, and whether this is its first use.
    """

    def __init__(
        self, run: Run, learner: Learner, actors: Actors, replay: ReplayMixer | None, log: Log
    ):
        """Prepares; nothing plays yet.

        Args:
          run: the run.
          learner: already restored.
          actors: entered with this context manager's block.
          replay: from `create_replay`.
          log: shows messages about the replay jobs.
        """
        self._run = run
        self._learner = learner
        self.actors = actors
        self.replay = replay
        self._log = log
        self._stack = contextlib.ExitStack()
        self.batches: Iterator[tuple[tuple[UnrollBatch, ...], bool]] = iter(())

    def __enter__(self) -> 'BatchSource':
        settings, devices = self._run.config.learner, self._learner.devices
        mix = None if self.replay is None else self.replay.batch
        with self._stack as stack:
            self._enter_replay_jobs(stack)
            assemble = self.actors.assembler(settings.batch_size // len(devices), mix)
            batches: Iterator[tuple[UnrollBatch, ...]]
            if self._run.config.run.debug:
                batches = _one_by_one(assemble, devices[0])
            else:
                loaders = settings.loaders or default_loaders(devices)
                # Ends after the actors, because its threads wait for them.
                batches = stack.enter_context(Loading(assemble, loaders, devices))
            stack.enter_context(self.actors)
            self.batches = reused(
                batches, settings.replay.sample_reuse, settings.replay.reuse_buffer
            )
            self._stack = stack.pop_all()
        return self

    def _enter_replay_jobs(self, stack: contextlib.ExitStack) -> None:
        if self.replay is None or not self._run.config.cluster.replay_addresses:
            return
        from impala.cluster.remote_replay import RemoteReplay

        shards = self.replay.replay
        assert isinstance(shards, RemoteReplay)
        # If several learners start a run, only the first one starts it in the replay jobs.
        begins = self._run.config.cluster.is_first and self._learner.counts()[0] == 0
        shards.start(begins, self._log.message)
        stack.enter_context(shards)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _one_by_one(
    assemble: Callable[[], UnrollBatch], device: str | None
) -> Iterator[tuple[UnrollBatch]]:
    """Yields batches, each assembled by the calling thread when it is asked for."""
    with contextlib.suppress(tf.errors.CancelledError):
        while True:
            yield (move(assemble(), device),)
