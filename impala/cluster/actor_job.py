"""The actor job: environments, batcher and agent on one machine, with a learner on another."""

import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from impala.acting.actor_processes import ActorHost, require_files
from impala.acting.local_actors import LocalActors
from impala.cluster.channel import (
    Closed,
    Disconnected,
    Rejected,
    RemoteError,
    WrongPeer,
    WrongSecret,
)
from impala.cluster.exchange import Reservation
from impala.cluster.job_start import (
    POLL_SECONDS,
    RESERVED_SECONDS,
    ActorJobError,
    Finished,
    LostPolicyError,
    Retry,
    Start,
    notes_of_job,
)
from impala.cluster.learner_service import LearnerConnection, Weights
from impala.cluster.remote_actors import WATCH_SECONDS
from impala.config import ConfigError
from impala.experience.batch import flatten_unroll, unroll_components
from impala.learning import memory_needs
from impala.networks.agent import Agent, AgentConfig
from impala.runs.run_settings import flags_of, network_settings, popart_levels
from impala.trajectory import EnvironmentSpec

_RESERVING_AGAIN_SECONDS = 0.5
# After this many rejected unrolls in a row the job counts as broken.
_MAX_REJECTED = 10
_COMPLETE = 'Training is complete.'


def run(start: Start) -> str:
    """Acts for the learner until training is complete or a signal arrives. Main thread only.

    Args:
      start: of the job.

    Returns:
      A sentence that says why the job ended.

    Raises:
      KeyboardInterrupt: a signal arrived before acting began.
      ConfigError, LevelError: one sentence for the user.
      LearnerLost: the learner did not answer for `reconnect_timeout` seconds.
      ActorJobError: the learner rejects this job's unrolls.
      ActorError: an environment died too often, or sends nothing that can be learned from.
      UnrollsLostError: the job has ended, but environments kept dying.
    """
    config, level_names, settings = start.config, start.level_names, start.settings
    report, retry = start.report, start.retry
    job, address = config.cluster, config.cluster.own_address
    num_actors, seed = config.actors.num_actors, config.run.seed
    with contextlib.ExitStack() as stack:
        require_files(config.actors.num_processes, 'envs_per_actor', num_actors)
        actor_host = stack.enter_context(ActorHost(config.environment, config.actors, report))
        spec = actor_host.common_spec(level_names, seed)
        # Compare the specs first: building the network may fail on one that does not match.
        network = _network_of_learner(settings['network'], spec, address)
        memory_needs.check(memory_needs.of_actors(config, spec, network, 'envs_per_actor'))
        agent = Agent(network, spec)
        tf.random.set_seed(seed)
        components = unroll_components(
            spec, agent.state_spec, config.learner.unroll_length, len(settings['level_names'])
        )
        weights = [tf.TensorSpec(each.shape, each.dtype) for each in agent.acting_variables]
        connection = stack.enter_context(
            LearnerConnection(
                address,
                components,
                weights,
                stack=spec.stack,
                compression=job.wire_compression,
                bfloat16_weights=job.bfloat16_weights,
                secret=start.secret,
            )
        )
        actors = LocalActors(config, level_names, spec, agent, actor_host, report)
        learner = _Learner(connection, actors, retry, job.task, num_actors)
        with _before_play():
            learner.reserve(report)
            if learner.finished:
                return _COMPLETE
            learner.refresh()

        def end() -> None:
            actors.close()
            connection.close()

        start.stop.then(end)
        stack.enter_context(actors)
        stack.enter_context(learner.watched())
        report(
            f'Actor job {job.task}: {num_actors} environments of '
            f'{", ".join(sorted({*level_names}))} for the learner at {address}'
        )
        with contextlib.suppress(Finished, Closed):
            _play(level_names, settings['level_names'], address, actors, learner)
        if not start.stop.received and not learner.finished:
            if learner.holder is not None:
                raise learner.taken_error()
            actors.check()
        actors.check_losses()
    return _end_of_job(learner.finished, actors.discarded_unrolls())


def _end_of_job(is_complete: bool, num_discarded: int) -> str:
    """Returns a sentence that says why the job ended, and what it has not sent."""
    sentence = _COMPLETE if is_complete else 'Stopped.'
    if num_discarded:
        sentence += (
            f' Not sent: {num_discarded:,} unrolls with values of the environment that are not '
            'finite.'
        )
    return sentence


@contextlib.contextmanager
def _before_play():
    """Turns a signal within the block into KeyboardInterrupt: acting has not begun."""
    try:
        yield
    except Finished as error:
        raise KeyboardInterrupt from error


def _play(
    level_names: Sequence[str],
    names_of_run: list[str],
    address: str,
    actors: LocalActors,
    learner: '_Learner',
) -> None:
    """Sends unrolls until the actors stop or training is complete."""
    rejected_in_a_row = 0
    for sequence, batch in enumerate(actors.batches(1), 1):
        unroll = flatten_unroll(batch, 0)
        level = level_names[int(unroll[0])]
        # The learner's level ids index the levels of the whole run.
        unroll[0] = unroll[0].dtype.type(names_of_run.index(level))
        try:
            learner.send(unroll, level, sequence)
            rejected_in_a_row = 0
        except Rejected as error:
            rejected_in_a_row += 1
            if rejected_in_a_row == _MAX_REJECTED:
                raise ActorJobError(
                    f'The learner at {address} refused {_MAX_REJECTED} unrolls in a '
                    f'row, the last because: {error}'
                ) from error


class _Learner:
    """The actor job's view of the learner, which takes unrolls and publishes weights.

    Attributes:
      finished: whether training is complete.
      holder: the other job that has reserved this one's number; None if there is none.
    """

    def __init__(
        self,
        connection: LearnerConnection,
        actors: LocalActors,
        retry: Retry,
        task: int,
        num_environments: int,
    ):
        self._connection = connection
        self._actors = actors
        self._retry = retry
        self._task = task
        self._num_environments = num_environments
        # Held while weights are read and given to the actors.
        self._publishing = threading.Lock()
        self._version = -1
        self._sent_with_it = 0
        self._notes, self._noted_at = '', -math.inf
        self._reader = concurrent.futures.ThreadPoolExecutor(1, 'weights')
        self._reading: concurrent.futures.Future[None] | None = None
        self.finished = False
        self.holder: Reservation | None = None

    def reserve(self, report: Callable[[str], None]) -> None:
        """Reserves this job's number; waits for the reservation of a job that has ended to expire.

        Sets `finished` instead if training is complete.

        Raises:
          ConfigError: another job has the number and is alive.
        """
        seen_at = None
        while True:
            self._retry.call(self._reserve)
            if self.finished or self.holder is None:
                return
            now = time.monotonic()
            if seen_at is None:
                report(
                    f'--task={self._task} is taken by a job on {self.holder.host}; waiting up to '
                    f'{RESERVED_SECONDS:g} seconds to see whether that one has ended'
                )
                seen_at = now - self.holder.seconds_since_seen
            # A margin of one second, since this clock and the learner's may drift apart.
            elif now - self.holder.seconds_since_seen > seen_at + 1:
                raise self.taken_error()
            self._retry.sleep(_RESERVING_AGAIN_SECONDS)

    def taken_error(self) -> ConfigError:
        """Returns the error to raise when another job has the number."""
        assert self.holder is not None
        return ConfigError(
            f'--task={self._task} is taken by a job on {self.holder.host}, last seen '
            f'{self.holder.seconds_since_seen:.1f} seconds ago: give each actor job a number of '
            'its own.'
        )

    def _reserve(self) -> None:
        """Reserves the number or renews the reservation; sets `holder`, or `finished`."""
        try:
            holder = self._connection.reserve(self._task, RESERVED_SECONDS)
        except Disconnected:
            # A learner that has finished accepts no more reservations.
            if not self._connection.status().finished:
                raise
            self.finished = True
            return
        self.holder = None if holder.is_own else holder

    def refresh(self) -> None:
        """Makes the actors use the learner's latest weights.

        Raises:
          ActorJobError: the weights do not fit this job's network.
        """
        self._publish(lambda: self._retry.call(self._connection.weights))

    def _publish(self, read: Callable[[], Weights]) -> None:
        with self._publishing:
            try:
                version, values = read()
            except Rejected as error:
                raise ActorJobError(
                    f'The learner at {self._connection.address} has another network: {error}.'
                ) from error
            self._version = version
            self._sent_with_it = 0
            self._actors.publish(
                [tf.constant(value) for value in values], tf.constant(version, tf.int64)
            )

    def _refresh_meanwhile(self) -> None:
        """Reads newer weights while unrolls are sent; a call that fails leaves the old ones."""

        def read() -> None:
            # What answers there may not even be a learner; the next unroll meets the same.
            with contextlib.suppress(Disconnected, Closed, WrongPeer, WrongSecret):
                self._publish(self._connection.weights)

        if self._reading is not None:
            if not self._reading.done():
                return
            self._reading.result()
        self._reading = self._reader.submit(read)

    def send(self, unroll: list[Any], level: str, sequence: int) -> None:
        """Sends an unroll; begins to read newer weights after a round of all environments.

        So on average each environment begins each unroll with newer weights, as in the paper.
        Reading them after every unroll of the job would make weights most of the traffic. If a
        restarted learner has lost the weights behind an unroll, the unroll is dropped and the
        weights are read at once.

        Raises:
          Rejected: the learner rejects the unroll.
          ActorJobError: the weights do not fit this job's network.
          Finished: training is complete.
        """

        def check_policy() -> None:
            # A restarted learner may have lost the updates behind the weights that acted.
            if self._connection.status().version < unroll[1]:
                raise LostPolicyError

        # Newer weights may arrive at any time. A learner with older ones than these has lost some.
        known = self._version
        # The unroll began before the learner restarted without these weights. Each environment may
        # have one such unroll.
        if unroll[1] > known:
            return
        try:
            status = self._retry.call(
                lambda: self._connection.put(
                    unroll, self._task, level, sequence, self._present_notes()
                ),
                check_policy,
            )
        except LostPolicyError:
            self.refresh()
            return
        except Rejected:
            # The learner may have restarted unnoticed and lost these weights.
            if self._retry.call(self._connection.status).version >= known:
                raise
            self.refresh()
            return
        if status.finished:
            self.finished = True
            raise Finished
        self._sent_with_it += 1
        if status.version < known:
            self.refresh()
        elif status.version > self._version and self._sent_with_it >= self._num_environments:
            self._refresh_meanwhile()

    def _present_notes(self) -> str:
        # Not for each unroll, since it reads files.
        now = time.monotonic()
        if now - self._noted_at >= WATCH_SECONDS:
            self._notes = notes_of_job(self._actors.level_cache())
            self._noted_at = now
        return self._notes

    @contextlib.contextmanager
    def watched(self):
        """Renews the reservation every few seconds, and ends the job when it has to end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                with contextlib.suppress(RemoteError):
                    # Set only: the main thread may have just learned of it.
                    if self._connection.status().finished:
                        self.finished = True
                    if not self.finished:
                        self._reserve()
                    if self.finished or self.holder is not None:
                        self._actors.close()
                        self._connection.close()
                        return

        thread = threading.Thread(target=watch, name='learner watch', daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._reader.shutdown()


def _network_of_learner(
    settings: dict[str, Any], spec: EnvironmentSpec, address: str
) -> AgentConfig:
    """Returns the shape of the learner's network, which must suit the environments of this job.

    Args:
      settings: the learner's `network_settings`.
      spec: of this job's environments.
      address: of the learner.

    Raises:
      ConfigError: with these environments the network would have another shape.
    """
    network = AgentConfig(
        torso=settings['torso'],
        core=settings['core'],
        core_size=settings['core_size'],
        popart_levels=popart_levels(settings),
        latent_size=settings['latent_size'],
        normalize_observations=settings['normalize_observations'],
        contrast_gain=settings['contrast_gain'],
    )
    own = network_settings(network, spec)
    for name in settings:
        if own.get(name) != settings[name]:
            raise ConfigError(
                f'This job does not fit the learner at {address}: {flags_of(name)} is '
                f'{own.get(name)} here and {settings[name]} there.'
            )
    return network
