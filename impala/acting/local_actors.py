"""The actors of this machine: their processes, the batcher and the behaviour policy."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from impala.acting.actor import describe_non_finite
from impala.acting.actor_pool import ActorPool
from impala.acting.actor_processes import ActorError
from impala.acting.behaviour_policy import BehaviourPolicy, UnrollSource
from impala.acting.episode_series import Schedule
from impala.config import Config, ConfigError, EnvironmentConfig
from impala.environments.level_cache import level_cache_statistics
from impala.experience.batch import Mix, UnrollBatch
from impala.networks.agent import Agent
from impala.runs.log import Log
from impala.trajectory import EnvironmentSpec

# The run ends when this many consecutive unrolls, of all actors, were discarded for values that are
# not finite: a number per actor, and a minimum.
_DISCARDED_PER_ACTOR = 10
_MIN_DISCARDED = 100


class Pool(Protocol):
    """Environments that play while the block of this context manager runs.

    Attributes:
      restarts: processes that were replaced.
    """

    restarts: int

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...
    def check(self) -> None: ...
    def check_losses(self) -> None: ...


class Host(Protocol):
    """What the environments of this machine share."""

    config: EnvironmentConfig


class LocalActors:
    """Actors that play while the block of this context manager runs."""

    def __init__(
        self,
        config: Config,
        level_names: Sequence[str],
        spec: EnvironmentSpec,
        agent: Agent,
        actor_host: Host,
        report: Callable[[str], None],
        schedule: Schedule | None = None,
        device: str | None = None,
    ):
        """Prepares; nothing plays yet.

        Args:
          config: of the run.
          level_names: levels, assigned to the actors round-robin.
          spec: of every actor's environment.
          agent: acts for all actors, with its present weights until others are published; no other
            code may use it. Its variables are on `device`.
          actor_host: starts the processes.
          report: takes a few lines for every process that died, and warnings of environments.
          schedule: see `ActorPool`.
          device: see `BehaviourPolicy`.

        Raises:
          ConfigError: there is no memory for the unrolls.
        """
        # No learner uses the unrolls of a test.
        self._max_discarded = 0
        if schedule is None:
            self._max_discarded = max(
                _MIN_DISCARDED, _DISCARDED_PER_ACTOR * config.actors.num_actors
            )
        level_ids = [actor % len(level_names) for actor in range(config.actors.num_actors)]
        try:
            self._source = UnrollSource(
                spec,
                agent,
                level_ids,
                config.learner.unroll_length,
                config.actors.queue_capacity,
                config.actors.inference_batch_size or self._default_batch_size(config),
                config.actors.inference_timeout_ms,
                self._max_discarded,
            )
        except tf.errors.ResourceExhaustedError as error:
            raise ConfigError(
                f'There is no memory for the unrolls of {config.actors.num_actors} actors and '
                f'--queue_capacity={config.actors.queue_capacity}, each of '
                f'--unroll_length={config.learner.unroll_length} agent steps: give smaller values.'
            ) from error
        self._level_names = [level_names[level] for level in level_ids]
        self._observation_names = list(spec.observation)
        self._behaviour = BehaviourPolicy(agent, self._source, device)
        self._pool = self._make_pool(config, actor_host, report, schedule)
        self._temp_folder = str(actor_host.config.temp_folder)
        self._stack = contextlib.ExitStack()
        self._reported_restarts = 0
        self._reported_discarded = 0

    def _default_batch_size(self, config: Config) -> int:
        """Returns how many requests make an inference batch."""
        return max(1, config.actors.num_actors // 2)

    def _make_pool(
        self,
        config: Config,
        actor_host: Any,
        report: Callable[[str], None],
        schedule: Schedule | None,
    ) -> Pool:
        return ActorPool(
            actor_host,
            self._source.batcher,
            self._level_names,
            config.run.seed,
            config.actors.max_actor_restarts,
            report,
            config.actors.envs_per_process,
            schedule,
        )

    def __enter__(self) -> 'LocalActors':
        with self._stack as stack:
            stack.callback(self._source.wait)
            stack.enter_context(self._behaviour.serving())
            stack.enter_context(self._pool)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def publish(self, weights: Sequence[tf.Variable], version: tf.Tensor) -> None:
        """Gives the actors new weights; see `BehaviourPolicy.publish`."""
        self._behaviour.publish(weights, version)

    def assembler(self, batch_size: int, mix: Mix | None = None) -> Callable[[], UnrollBatch]:
        """Returns a function that assembles batches until the actors are closed; see `Loading`."""
        return self._source.assembler(batch_size, mix)

    def batches(self, batch_size: int) -> Iterator[UnrollBatch]:
        """Yields batches of unrolls until the actors are closed; see `UnrollSource.batches`."""
        return self._source.batches(batch_size)

    def discard_unrolls(self) -> None:
        """Discards all unrolls until the actors are closed; see `UnrollSource.discard`."""
        self._source.discard()

    def close(self) -> None:
        """Ends the actors and every wait for a batch. Thread-safe; may be called repeatedly."""
        self._source.batcher.close()

    def check(self) -> None:
        """Raises the error that ended the actors, unless `close` did.

        Raises:
          LevelError: an environment cannot be played with these settings.
          ConfigError: the system permits no more processes.
          ActorError: an actor died too often, or only unrolls came that cannot be learned from.
        """
        self._behaviour.check()
        self._pool.check()
        statistics = self._source.batcher.statistics()
        if 0 < self._max_discarded <= statistics.discarded_in_a_row:
            assert statistics.non_finite is not None
            actor, index, value = statistics.non_finite
            what = describe_non_finite(
                self._level_names[actor], self._observation_names, index, value
            )
            raise ActorError(
                f'No unroll can be learned from: {what}, and each of the last '
                f'{statistics.discarded_in_a_row} unrolls held such a value.'
            )

    def check_losses(self) -> None:
        """Raises an error if most unrolls were lost; see `ActorPool.check_losses`."""
        self._pool.check_losses()

    def finish(self) -> None:
        """Ends the actors when training is complete."""
        self.close()

    def level_cache(self) -> dict[str, float]:
        """Returns statistics of the level cache; see `level_cache.level_cache_statistics`."""
        return level_cache_statistics(self._temp_folder)

    def discarded_unrolls(self) -> int:
        """Returns how many unrolls were discarded for values that are not finite."""
        return self._source.batcher.statistics().discarded_unrolls

    def record(self, log: Log) -> dict[str, float]:
        """Records the state of the actors in the log.

        Returns:
          Stage of actors, batcher or queue -> seconds spent in it so far.
        """
        statistics = self._source.batcher.statistics()
        if statistics.batches:
            rows = statistics.rows / statistics.batches
            log.record_update({'inference_batch_size': rows})
        restarts = self._pool.restarts
        log.record_actor_restart(restarts - self._reported_restarts)
        self._reported_restarts = restarts
        log.record_discarded_unrolls(statistics.discarded_unrolls - self._reported_discarded)
        self._reported_discarded = statistics.discarded_unrolls
        cache = self.level_cache()
        log.record_update({f'level_cache/{name}': value for name, value in cache.items()})
        return statistics.stage_seconds
