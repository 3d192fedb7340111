"""The actor job: environments, batcher and agent on one machine, with a learner on another."""

import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from impala import suites
from impala.acting.actor_processes import ActorHost, require_files
from impala.acting.local_actors import LocalActors
from impala.cluster import remote_actors
from impala.cluster.channel import (
    Closed,
    Disconnected,
    Rejected,
    RemoteError,
    WrongPeer,
    WrongSecret,
)
from impala.cluster.exchange import Reservation
from impala.cluster.learner_service import LearnerConnection, Weights
from impala.config import ClusterConfig, Config, ConfigError, with_common_actions
from impala.experience.batch import flatten_unroll, unroll_components
from impala.learning import memory_needs
from impala.networks.agent import Agent, AgentConfig
from impala.runs.run_settings import flags_of, network_settings, popart_levels
from impala.runs.stop_signal import StopSignal
from impala.seeds import derived_seed
from impala.trajectory import EnvironmentSpec

_MAX_BACK_OFF_SECONDS = 5.0
_RESERVING_AGAIN_SECONDS = 0.5
# After this many rejected unrolls in a row the job counts as broken.
_MAX_REJECTED = 10
_COMPLETE = 'Training is complete.'

T = TypeVar('T')


class LearnerLost(Exception):
    """The learner has been away for too long; the text is one sentence."""


class ActorJobError(Exception):
    """The job cannot continue; the text is one sentence."""


class _Finished(Exception):
    """Training is complete, or a signal has stopped this job."""


def run(config: Config, given: Collection[str], report: Callable[[str], None]) -> str:
    """Acts for the learner until training is complete or a signal arrives. Main thread only.

    Args:
      config: this job's settings; the learner's apply where the two must agree.
      given: names of the settings that the user gave; the learner's must not differ from these.
      report: takes lines of progress.

    Returns:
      A sentence that says why the job ended.

    Raises:
      KeyboardInterrupt: a signal arrived before acting began.
      ConfigError, LevelError, ServerError: one sentence for the user.
      LearnerLost: the learner did not answer for `reconnect_timeout` seconds.
      ActorJobError: the learner rejects this job's unrolls.
      ActorError: an environment died too often, or sends nothing that can be learned from.
      UnrollsLostError: the job has ended, but environments kept dying.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        job, address = config.cluster, config.cluster.own_address
        secret = job.secret()
        retry = _Retry(job, report, stop)
        with _before_play(), LearnerConnection(address, secret=secret) as control:
            settings = retry.call(control.settings)
            version = retry.call(control.status).version
        config, level_names = _agreed(config, given, settings)
        num_actors = config.actors.num_actors
        # Depends on the version, so that a restarted job does not repeat its episodes.
        seed = derived_seed(config.run.seed, job.task, max(version, 0))
        config = config.replace(seed=seed)
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
                stack=memory_needs.stack_of(spec),
                compression=job.wire_compression,
                bfloat16_weights=job.bfloat16_weights,
                secret=secret,
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

        stop.then(end)
        stack.enter_context(actors)
        stack.enter_context(learner.watched())
        report(
            f'Actor job {job.task}: {num_actors} environments of '
            f'{", ".join(sorted({*level_names}))} for the learner at {address}'
        )
        with contextlib.suppress(_Finished, Closed):
            _play(level_names, settings['level_names'], address, actors, learner)
        if not stop.received and not learner.finished:
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
    except _Finished as error:
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


class _Retry:
    """Retries calls while the learner does not answer."""

    def __init__(self, config: ClusterConfig, report: Callable[[str], None], stop: StopSignal):
        self._address = config.own_address
        self._timeout = config.reconnect_timeout
        self._report = report
        self._stop = stop

    def call(self, function: Callable[[], T], before_again: Callable[[], Any] | None = None) -> T:
        """Calls a function until the learner answers, and returns its result.

        Args:
          function: raises `Disconnected` while the learner does not answer.
          before_again: called before each further attempt.

        Raises:
          LearnerLost: the learner has not answered in time.
          ConfigError: the process at the address is not a learner, or has another secret.
          _LostPolicyError: raised by `before_again`.
        """
        away_since = None
        back_off = 0.25
        while True:
            try:
                if away_since is not None and before_again is not None:
                    before_again()
                result = function()
                if away_since is not None:
                    self._report(f'The learner at {self._address} is there')
                return result
            except _LostPolicyError:
                self._report(f'The learner at {self._address} is there')
                raise
            except WrongPeer as error:
                raise ConfigError(
                    f'{error} Give this job the --learner_address of its learner.'
                ) from error
            except WrongSecret as error:
                raise ConfigError(str(error)) from error
            except Disconnected as error:
                if self._stop.received:
                    raise _Finished from error
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    self._report(f'{error} Waiting for it, {self._timeout:g} seconds at most')
                if now - away_since > self._timeout:
                    raise LearnerLost(
                        f'The learner at {self._address} was not there for '
                        f'{self._timeout:g} seconds (--reconnect_timeout).'
                    ) from error
                self.sleep(back_off)
                back_off = min(2 * back_off, _MAX_BACK_OFF_SECONDS)

    def sleep(self, seconds: float) -> None:
        """Waits before the next attempt.

        Raises:
          _Finished: a signal has stopped the job.
        """
        time.sleep(seconds)
        if self._stop.received:
            raise _Finished


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
        retry: _Retry,
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
                    f'{remote_actors.RESERVED_SECONDS:g} seconds to see whether that one has ended'
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
            holder = self._connection.reserve(self._task, remote_actors.RESERVED_SECONDS)
        except Disconnected:
            # A learner that has finished accepts no more reservations.
            self.finished = self._connection.status().finished
            if not self.finished:
                raise
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
            with contextlib.suppress(Disconnected, Closed):
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
          _Finished: training is complete.
        """

        def check_policy() -> None:
            # A restarted learner may have lost the updates behind the weights that acted.
            if self._connection.status().version < unroll[1]:
                raise _LostPolicyError

        # The unroll began before the learner restarted without these weights. Each environment may
        # have one such unroll.
        if unroll[1] > self._version:
            return
        try:
            status = self._retry.call(
                lambda: self._connection.put(
                    unroll, self._task, level, sequence, self._present_notes()
                ),
                check_policy,
            )
        except _LostPolicyError:
            self.refresh()
            return
        except Rejected:
            # The learner may have restarted unnoticed and lost these weights.
            if self._retry.call(self._connection.status).version >= self._version:
                raise
            self.refresh()
            return
        if status.finished:
            self.finished = True
            raise _Finished
        self._sent_with_it += 1
        is_newer = status.version > self._version
        is_lost = status.version < self._version
        if is_lost:
            self.refresh()
        elif is_newer and self._sent_with_it >= self._num_environments:
            self._refresh_meanwhile()

    def _present_notes(self) -> str:
        # Not for each unroll, since it reads files.
        now = time.monotonic()
        if now - self._noted_at >= remote_actors.WATCH_SECONDS:
            self._notes = remote_actors.notes_of_job(self._actors.level_cache())
            self._noted_at = now
        return self._notes

    @contextlib.contextmanager
    def watched(self):
        """Renews the reservation every few seconds, and ends the job when it has to end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(remote_actors.POLL_SECONDS):
                with contextlib.suppress(RemoteError):
                    self.finished = self._connection.status().finished
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


class _LostPolicyError(Exception):
    """The learner has lost the weights behind an unroll."""


def _agreed(
    config: Config, given: Collection[str], settings: dict[str, Any]
) -> tuple[Config, list[str]]:
    """Adopts the learner's settings; rejects flags that differ from them.

    Args:
      config: this job's settings.
      given: names of the settings that the user gave.
      settings: the learner's, from `remote_actors.job_settings`.

    Returns:
      The settings, and the level of each environment.

    Raises:
      ConfigError: the learner runs another version, a flag or a level is not one of the learner's,
        or the inference batch is larger than the number of environments.
    """
    if settings.get('protocol') != remote_actors.PROTOCOL:
        raise ConfigError(
            f'The learner at {config.cluster.own_address} runs another version of this program '
            f'(protocol {settings.get("protocol")}, here {remote_actors.PROTOCOL}): '
            'install the same one.'
        )
    _check_flags(config, given, settings)
    levels = _levels(config, given, settings['level_names'])
    if config.actors.inference_batch_size > len(levels):
        raise ConfigError(
            f'--inference_batch_size={config.actors.inference_batch_size} is more than this '
            f'job has environments (--envs_per_actor={len(levels)}).'
        )
    config = config.replace(**settings['agreed'], num_actors=len(levels))
    environment = with_common_actions(config.environment, settings['level_names'])
    return dataclasses.replace(config, environment=environment), levels


def _check_flags(config: Config, given: Collection[str], settings: dict[str, Any]) -> None:
    """Rejects flags whose values differ from the learner's; see `_agreed`."""
    # What the learner has chosen replaces the flags that may leave it open.
    of_the_learner = settings['agreed'] | settings['network']
    of_the_learner['popart'] = bool(popart_levels(settings['network']))
    of_the_learner['num_action_repeats'] = settings['num_action_repeats']
    own = config.agreed('jobs')
    for flag in own.keys() & of_the_learner.keys() & {*given}:
        value = own[flag]
        is_open = config.value(flag) in ('auto', None)
        if not is_open and value != of_the_learner[flag]:
            raise ConfigError(
                f'--{flag}={_as_flag(value)} does not fit the learner at '
                f'{config.cluster.own_address}, which has {_as_flag(of_the_learner[flag])}: leave '
                'it out.'
            )


def _as_flag(value: Any) -> str:
    return (','.join(value) or 'none') if isinstance(value, list) else str(value)


def _levels(config: Config, given: Collection[str], known: list[str]) -> list[str]:
    """Returns the level of each environment of this job.

    Args:
      config: see `_agreed`.
      given: see `_agreed`.
      known: levels of the learner, from which `level_name` may choose some.

    Raises:
      ConfigError: the learner does not have such a level.
    """
    names: Sequence[str] = known
    if 'level_name' in given:
        names = suites.load(config.run.level_name).level_names
    for level in names:
        if level not in known:
            raise ConfigError(
                f'--level_name={level} is not one of the levels of the learner at '
                f'{config.cluster.own_address}: {", ".join(known)}.'
            )
    # Assign levels round robin, by job and environment.
    first = config.cluster.task * config.cluster.envs_per_actor
    return [names[(first + i) % len(names)] for i in range(config.cluster.envs_per_actor)]


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
    )
    own = network_settings(network, spec)
    for name in settings:
        if own.get(name) != settings[name]:
            raise ConfigError(
                f'This job does not fit the learner at {address}: {flags_of(name)} is '
                f'{own.get(name)} here and {settings[name]} there.'
            )
    return network
