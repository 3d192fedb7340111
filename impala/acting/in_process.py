"""Actors in the learner's process and thread, where a debugger can stop them: `--debug`.

Batcher, behaviour policy and the actors' loop are those of actor processes.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from dynamic_batching.actor_client import ActorClient
from impala import environments
from impala.acting.actor import ContractError, NonFiniteWarnings, Player
from impala.acting.actor_processes import ActorError, shared_spec
from impala.acting.behaviour_policy import BehaviourPolicy, UnrollSource
from impala.acting.local_actors import LocalActors
from impala.config import Config, EnvironmentConfig
from impala.experience.batch import Mix, UnrollBatch
from impala.networks.agent import Agent
from impala.seeds import derived_seed
from impala.trajectory import EnvironmentSpec


class InProcessHost:
    """Takes the place of `ActorHost`: a temporary folder for the environments of this process.

    A context manager, which removes the folder.

    Attributes:
      config: settings of the environments, with that folder.
    """

    def __init__(self, config: EnvironmentConfig):
        """Makes the folder."""
        self._folder = tempfile.TemporaryDirectory(prefix='impala-')
        self.config = dataclasses.replace(config, temp_folder=self._folder.name)

    def __enter__(self) -> 'InProcessHost':
        return self

    def __exit__(self, *error: Any) -> None:
        self._folder.cleanup()

    def common_spec(self, level_names: Sequence[str], seed: int) -> EnvironmentSpec:
        """Returns the spec that all levels share; makes each environment to find out.

        Args:
          level_names: at least one; may have duplicates.
          seed: for these environments.

        Raises:
          LevelError: a level cannot be played, or one agent cannot play them all.
          Exception: an environment's own.
        """
        specs = {}
        for name in dict.fromkeys(level_names):
            environment = environments.create_environment(name, seed, self.config)
            with contextlib.closing(environment):
                environment.check()
                specs[name] = environment.spec
        return shared_spec(specs)


class InProcessPool:
    """Takes the place of `ActorPool`: environments that play only while `play` is called.

    Attributes:
      restarts: always 0.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        source: UnrollSource,
        behaviour: BehaviourPolicy,
        level_names: Sequence[str],
        spec: EnvironmentSpec,
        seed: int,
        report: Callable[[str], None],
    ):
        """Prepares; the environments are made when the block is entered.

        Args:
          config: of the environments.
          source: has room for the unrolls of a batch in its queue.
          behaviour: answers the requests at `source`.
          level_names: the level of each actor.
          spec: of every environment.
          seed: of the run; every actor derives its own seed from it, as in `ActorPool`.
          report: takes warnings of the environments.
        """
        self.restarts = 0
        self._config = config
        self._source = source
        self._behaviour = behaviour
        self._level_names = level_names
        self._spec = spec
        self._seed = seed
        self._report = report
        self._players: list[Player] = []
        self._has_started: set[int] = set()
        self._next = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> 'InProcessPool':
        with self._stack as stack:
            stack.enter_context(_warnings_reported(self._report))
            observations = list(self._spec.observation.values())
            warnings = NonFiniteWarnings(tuple(self._spec.observation))
            for actor, level_name in enumerate(self._level_names):
                environment = environments.create_environment(
                    level_name, derived_seed(self._seed, 0, actor), self._config
                )
                stack.callback(environment.close)
                client = ActorClient(
                    self._source.batcher.fd, actor, observations, self._spec.action.array
                )
                self._players.append(
                    Player(
                        environment,
                        client,
                        level_name,
                        warnings,
                        self._config.bootstrap_truncated,
                    )
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._source.batcher.close()
        self._stack.__exit__(*error)

    def play(self, num_unrolls: int) -> None:
        """Plays until that many more unrolls are queued; the actors take turns, an unroll each.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
          ActorError: an environment returned what it did not declare.
          LevelError: an environment cannot be played.
          Exception: an environment's own.
        """
        batcher = self._source.batcher
        # An unroll with values that are not finite is not queued.
        last = batcher.statistics().queued_unrolls + num_unrolls
        while batcher.statistics().queued_unrolls < last:
            self._play_unroll(self._next)
            self._next = (self._next + 1) % len(self._players)

    def _play_unroll(self, actor: int) -> None:
        player = self._players[actor]
        if actor not in self._has_started:
            self._has_started.add(actor)
            player.start()
            self._behaviour.answer()
        for _ in range(self._source.batcher.unroll_length):
            try:
                player.step()
            except ContractError as error:
                raise ActorError(str(error)) from error
            # The answer to row T queues the unroll and is part of the next one.
            self._behaviour.answer()

    def check(self) -> None:
        """Does nothing: `play` raises errors itself."""

    def check_losses(self) -> None:
        """Does nothing: no process can have died."""


class InProcessActors(LocalActors):
    """Actors that play in the calling thread, as soon as a batch is asked for."""

    _pool: InProcessPool

    def __init__(
        self,
        config: Config,
        level_names: Sequence[str],
        spec: EnvironmentSpec,
        agent: Agent,
        host: InProcessHost,
        report: Callable[[str], None],
        device: str | None = None,
    ):
        """Prepares; nothing plays yet. See `LocalActors`."""
        self._spec = spec
        # There is one request at a time, and no one else empties the queue.
        config = config.replace(
            inference_batch_size=1, queue_capacity=config.learner.batch_size, envs_per_process=1
        )
        super().__init__(config, level_names, spec, agent, host, report, device=device)

    def _make_pool(
        self, config: Config, actor_host: Any, report: Callable[[str], None], schedule: Any
    ) -> InProcessPool:
        return InProcessPool(
            actor_host.config,
            self._source,
            self._behaviour,
            self._level_names,
            self._spec,
            config.run.seed,
            report,
        )

    def __enter__(self) -> 'InProcessActors':
        self._pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)

    def assembler(self, batch_size: int, mix: Mix | None = None) -> Callable[[], UnrollBatch]:
        """Returns a function that plays unrolls and makes a batch of them."""

        def dequeue(number: int) -> UnrollBatch:
            self._pool.play(number)
            return self._source.dequeue(number)

        return lambda: mix(dequeue) if mix else dequeue(batch_size)


@contextlib.contextmanager
def _warnings_reported(report: Callable[[str], None]) -> Any:
    """Reports each warning of an environment once."""
    reported: set[str] = set()

    class Reporter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = f'WARNING: {record.getMessage()}'
            if text not in reported:
                reported.add(text)
                report(text)

    handler, logger = Reporter(), logging.getLogger(environments.__name__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
