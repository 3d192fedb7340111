"""The learner's side of actors on other machines: takes their unrolls, publishes weights."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from impala.cluster.calls import port_of, warn_of_strangers
from impala.cluster.exchange import ActorStatistics, UnrollInbox
from impala.cluster.job_start import POLL_SECONDS, PROTOCOL
from impala.cluster.learner_service import LearnerService
from impala.config import Config
from impala.experience.batch import (
    Mix,
    UnrollBatch,
    batch_of_components,
    compiled,
    unroll_components,
)
from impala.networks.agent import Agent
from impala.runs.log import Log
from impala.trajectory import EnvironmentSpec

WATCH_SECONDS = 5.0
# An actor that has been silent for this many seconds does not count as connected.
CONNECTED_SECONDS = 60.0
# What a job reports on its level cache, counted since its start.
_CACHE_NAMES = ('hits', 'misses', 'seconds_saved')


def level_cache_of_jobs(notes: Iterable[str]) -> dict[str, float]:
    """Sums up what actor jobs report on their level caches; empty if they have none.

    Args:
      notes: from each job, see `notes_of_job`. Invalid notes are ignored, since they come from
        other machines.
    """
    reported = []
    for text in notes:
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            cache = json.loads(text)['level_cache']
            values = [float(cache[name]) for name in _CACHE_NAMES]
            if all(0 <= value < math.inf for value in values):
                reported.append(values)
    if not reported:
        return {}
    return dict(zip(_CACHE_NAMES, map(sum, zip(*reported, strict=True)), strict=True))


class RemoteActors:
    """Actors on other machines, with the interface of `LocalActors`. A context manager.

    Attributes:
      port: port on which the learner listens.
    """

    def __init__(
        self,
        config: Config,
        level_names: Sequence[str],
        spec: EnvironmentSpec,
        agent: Agent,
        settings: dict[str, Any],
        report: Callable[[str], None],
    ):
        """Starts to listen.

        Args:
          config: settings of the run.
          level_names: levels of the run, in the order of their ids.
          spec: specs of the environments.
          agent: the agent, which gives the spec of the recurrent state.
          settings: JSON-serializable settings for the actor jobs.
          report: takes lines that say which actors connect and disconnect.

        Raises:
          ConfigError: the file of the secret cannot be used.
          ServerError: the address is invalid or in use.
        """
        cluster, secret = config.cluster, config.cluster.secret()
        self._observation_names = list(spec.observation)
        self._state_structure = agent.state_spec
        self._report = report
        components = unroll_components(
            spec, agent.state_spec, config.learner.unroll_length, len(level_names)
        )
        self._inbox = UnrollInbox(
            config.actors.queue_capacity,
            components,
            'policy_version',
            stack=spec.stack,
        )
        self._service = LearnerService(cluster.own_address, self._inbox, settings, secret, report)
        self._address, self.port = cluster.own_address, self._service.port
        if not cluster.trusted_network:
            warn_of_strangers(cluster.own_address, self.port, secret, report)
        self._rows: list[dict[str, Any]] = []
        self._known: dict[int, ActorStatistics] = {}
        self._looked_at = time.monotonic()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name='actor watch', daemon=True)

    def __enter__(self) -> 'RemoteActors':
        self._report(f'Waiting for actors on {port_of(self._address, self.port)}')
        self._watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed.set()
        self._watcher.join()
        self.close()
        self._service.close()

    def publish(self, weights: Sequence[tf.Variable], version: tf.Tensor) -> None:
        """Publishes weights for the actor jobs."""
        # Set the version first: a fast actor may return an unroll of these weights at once.
        self._inbox.set_latest_version(version)
        self._service.publish(int(version), _in_memory(weights))

    def assembler(self, batch_size: int, mix: Mix | None = None) -> Callable[[], UnrollBatch]:
        """Returns a function that assembles the next batch, for `Loading`.

        The function raises tf.errors.CancelledError once the queue is closed.
        """
        return compiled(lambda: mix(self._take) if mix else self._take(batch_size))

    def _take(self, batch_size: int) -> UnrollBatch:
        actors, components = self._inbox.take(batch_size)
        return batch_of_components(
            components, actors, self._state_structure, self._observation_names
        )

    def close(self) -> None:
        """Ends all waits for unrolls, here and in the actor jobs. May be called from any thread."""
        self._inbox.close()

    def finish(self) -> None:
        """Announces to the actor jobs that training is complete, and waits until they have polled.

        Takes `2 * POLL_SECONDS` if there are any.
        """
        self._service.finish()
        has_actors = bool(self._inbox.statistics().actors)
        self._inbox.close()
        if has_actors:
            time.sleep(2 * POLL_SECONDS)

    def check(self) -> None:
        """Does nothing: an actor job handles its own failures."""

    def check_losses(self) -> None:
        """Does nothing: an actor job counts its own losses."""

    def record(self, log: Log) -> dict[str, float]:
        """Records a row per connected actor job, and the sums of their level caches, in the log.

        Returns:
          Stage of the queue -> seconds spent in it so far.
        """
        log.record_actors(self._rows)
        statistics = self._inbox.statistics()
        cache = level_cache_of_jobs(actor.notes for actor in statistics.actors.values())
        log.record_update({f'level_cache/{name}': value for name, value in cache.items()})
        return {'queue/copy': statistics.copy_seconds}

    def _watch(self) -> None:
        """Updates the actors' rows every few seconds."""
        while True:
            self._look()
            if self._closed.wait(WATCH_SECONDS):
                return

    def _look(self) -> None:
        """Counts unrolls, and reports which actors connect, disconnect or are rejected."""
        actors = self._inbox.statistics().actors
        version = self._service.status().version
        now = time.monotonic()
        rows: list[dict[str, Any]] = []
        for task, actor in sorted(actors.items()):
            known = self._known.get(task)
            if actor.rejected and not (known and known.rejected):
                self._report(
                    f'WARNING: what actor {task} ({actor.host}) sends is refused: '
                    f'{actor.last_rejection}'
                )
            if actor.seconds_since_seen > CONNECTED_SECONDS:
                continue
            accepted = actor.accepted - (known.accepted if known else 0)
            rows.append(
                {
                    'task': task,
                    'host': actor.host,
                    'level': actor.level,
                    'trajectories_per_second': round(accepted / (now - self._looked_at), 3),
                    'policy_lag': version - actor.last_version,
                    'seconds_since_seen': round(actor.seconds_since_seen, 1),
                    'rejected': actor.rejected,
                    'duplicates': actor.duplicates,
                }
            )
        before, connected = ({row['task'] for row in each} for each in (self._rows, rows))
        for tasks, what in ((connected - before, 'is there'), (before - connected, 'is gone')):
            for each in sorted(tasks):
                self._report(f'Actor {each} ({actors[each].host}) {what}: {len(connected)} in all')
        self._rows, self._known, self._looked_at = rows, actors, now


@tf.function(autograph=False)
def _in_memory(weights: Sequence[tf.Variable]) -> list[tf.Tensor]:
    """Returns the values of variables, which later assignments do not change."""
    with tf.device('/cpu:0'):
        return [tf.identity(weight) for weight in weights]


def job_settings(
    config: Config, level_names: Sequence[str], network: dict[str, Any], num_action_repeats: int
) -> dict[str, Any]:
    """Returns the JSON-serializable settings on which actor jobs must agree with the learner.

    Every setting with `agreement='jobs'` is among them, as `agreed`. The names of the levels stand
    for `level_name`, which may be a file of this machine.

    Args:
      config: settings of the run.
      level_names: levels of the run, in the order of their ids.
      network: see `run_settings.network_settings`.
      num_action_repeats: of the levels, whether a flag sets it or not.
    """
    agreed = config.agreed('jobs')
    del agreed['level_name']
    return {
        'protocol': PROTOCOL,
        'agreed': agreed,
        'level_names': list(level_names),
        'network': network,
        'num_action_repeats': num_action_repeats,
    }
