"""The actor job: environments, batcher and agent of this machine, whose unrolls go to a learner."""

import contextlib
import dataclasses
import json
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
from impala.cluster.exchange import Reservation
from impala.cluster.transport import Closed, Disconnected, LearnerConnection, Rejected, WrongPeer
from impala.config import ClusterConfig, Config, ConfigError, with_common_actions
from impala.experience.batch import flatten_unroll, unroll_components
from impala.learning import memory_needs
from impala.networks.agent import Agent, AgentConfig
from impala.runs.run_settings import flags_of, network_settings, popart_levels
from impala.runs.stop_signal import StopSignal
from impala.seeds import derived_seed

_MAX_BACK_OFF_SECONDS = 5.0
_RESERVING_AGAIN_SECONDS = 0.5
# Refused unrolls in a row after which this job can be taken to be broken.
_MAX_REJECTED = 10
_COMPLETE = 'Training is complete.'

T = TypeVar('T')


class LearnerLost(Exception):
    """The learner has been away for too long; the text is one sentence."""


class ActorJobError(Exception):
    """The job cannot go on; the text is one sentence."""


class _Finished(Exception):
    """Training is complete, or this job was told to stop."""


def run(config: Config, given: Collection[str], report: Callable[[str], None]) -> str:
    """Plays for the learner until training is complete or a signal comes. Main thread only.

    Args:
      config: what this job's flags say; what the learner says counts where they must agree.
      given: names of the settings that were given to this job, which it may not overrule.
      report: told, in lines, what happens.

    Returns:
      A sentence that says why it ended.

    Raises:
      KeyboardInterrupt: a signal came before anything was played.
      ConfigError, LevelError, ServerError: one sentence for the user.
      LearnerLost: the learner was not there for `reconnect_timeout`.
      ActorJobError: the learner refuses what this job sends.
      ActorError: an environment died too often, or sends nothing that can be learned from.
      UnrollsLostError: the job has ended, but environments kept dying.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        job, address = config.cluster, config.cluster.own_address
        retry = _Retry(job, report, stop)
        with _before_play(), LearnerConnection(address) as control:
            settings = json.loads(retry.call(control.settings))
            version = retry.call(control.status).version
        config, level_names = _agreed(config, given, settings)
        num_actors = config.actors.num_actors
        if config.actors.inference_batch_size > num_actors:
            raise ConfigError(
                f'--inference_batch_size={config.actors.inference_batch_size} is more than this '
                f'job has environments (--envs_per_actor={num_actors}).'
            )
        # One that is started again does not play its episodes once more.
        seed = derived_seed(config.run.seed, job.task, max(version, 0))
        config = config.replace(seed=seed)
        require_files(config.actors.num_processes, 'envs_per_actor', num_actors)
        actor_host = stack.enter_context(ActorHost(config.environment, config.actors, report))
        spec = actor_host.common_spec(level_names, seed)
        network = settings['network']
        agent_config = AgentConfig(
            torso=network['torso'],
            use_lstm=network['use_lstm'],
            popart_levels=popart_levels(network),
            latent_size=network['latent_size'],
        )
        # The spec is compared before it is given to a network that may not be able to serve it.
        _check_network(network_settings(agent_config, spec), network, address)
        memory_needs.check(memory_needs.of_actors(config, spec, agent_config, 'envs_per_actor'))
        agent = Agent(agent_config, spec)
        tf.random.set_seed(seed)
        connection = stack.enter_context(
            LearnerConnection(
                address,
                unroll_components(
                    spec,
                    agent.state_spec,
                    config.learner.unroll_length,
                    len(settings['level_names']),
                ),
                [tf.TensorSpec(weight.shape, weight.dtype) for weight in agent.trainable_variables],
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
    sentence = _COMPLETE if learner.finished else 'Stopped.'
    if discarded := actors.discarded_unrolls():
        sentence += (
            f' Not sent: {discarded:,} unrolls with values of the environment that are not finite.'
        )
    return sentence


@contextlib.contextmanager
def _before_play():
    """Makes a signal, within the block, one that came before anything was done."""
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
    """Sends unrolls until there are no more, or nobody wants them."""
    rejected_in_a_row = 0
    for sequence, batch in enumerate(actors.batches(1), 1):
        unroll = flatten_unroll(batch, 0)
        level = level_names[int(unroll[0])]
        # The learner counts the levels of the whole run.
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
    """Repeats calls to a learner that may be away for a while."""

    def __init__(self, config: ClusterConfig, report: Callable[[str], None], stop: StopSignal):
        self._address = config.own_address
        self._timeout = config.reconnect_timeout
        self._report = report
        self._stop = stop

    def call(self, function: Callable[[], T], before_again: Callable[[], Any] | None = None) -> T:
        """Returns what a function returns, once the learner is there.

        Args:
          function: raises `Disconnected` as long as it is not.
          before_again: called before the function is called again.

        Raises:
          LearnerLost: it has not come back in time.
          ConfigError: what is there is no learner.
          _LostPolicyError: of `before_again`.
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
        """Waits before something is tried again.

        Raises:
          _Finished: the job was told to stop.
        """
        time.sleep(seconds)
        if self._stop.received:
            raise _Finished


class _Learner:
    """The learner as an actor job sees it: takes unrolls, has weights, ends one day.

    Attributes:
      finished: whether training is complete.
      holder: another job that has this one's number; None if there is none.
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
        self._version = -1
        self._sent_with_it = 0
        self._notes, self._noted_at = '', -math.inf
        self.finished = False
        self.holder: Reservation | None = None

    def reserve(self, report: Callable[[str], None]) -> None:
        """Makes this job the only one of its number, once one that has ended is forgotten.

        Or finds out that training is complete: then `finished` is set.

        Raises:
          ConfigError: another job has the number and lives.
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
            # Of this clock and the learner's, which may not run alike.
            elif now - self.holder.seconds_since_seen > seen_at + 1:
                raise self.taken_error()
            self._retry.sleep(_RESERVING_AGAIN_SECONDS)

    def taken_error(self) -> ConfigError:
        """Returns what to raise where another job has the number."""
        assert self.holder is not None
        return ConfigError(
            f'--task={self._task} is taken by a job on {self.holder.host} that is there, heard of '
            f'{self.holder.seconds_since_seen:.1f} seconds ago: give each actor job a number of '
            'its own.'
        )

    def _reserve(self) -> None:
        """Asks the learner for the number, again and again; `holder` is who has it."""
        try:
            holder = self._connection.reserve(self._task, remote_actors.RESERVED_SECONDS)
        except Disconnected:
            # It gives out no more numbers when all is done.
            self.finished = self._connection.status().finished
            if not self.finished:
                raise
            return
        self.holder = None if holder.is_own else holder

    def refresh(self) -> None:
        """Has the actors act with the learner's present weights.

        Raises:
          ActorJobError: they are not those of this job's network.
        """
        try:
            version, values = self._retry.call(self._connection.weights)
        except Rejected as error:
            raise ActorJobError(
                f'The learner at {self._connection.address} has another network: {error}.'
            ) from error
        self._version = version
        self._sent_with_it = 0
        self._actors.publish(
            [tf.constant(value) for value in values], tf.constant(version, tf.int64)
        )

    def send(self, unroll: list[Any], level: str, sequence: int) -> None:
        """Sends an unroll; refreshes the weights after as many unrolls as there are environments.

        So on the average each environment begins each unroll with newer ones, as in the paper;
        reading them after each unroll of the job would make them most of the traffic. Unrolls of
        weights that the learner has lost are thrown away, and its own are read at once.

        Raises:
          Rejected: the learner refuses it.
          _Finished: training is complete.
        """

        def forget_what_is_lost() -> None:
            # A learner that came back may have lost the updates behind the weights that acted.
            if self._connection.status().version < unroll[1]:
                raise _LostPolicyError

        # Begun before the learner came back without those weights; there may be one from each
        # environment.
        if unroll[1] > self._version:
            return
        try:
            status = self._retry.call(
                lambda: self._connection.put(
                    unroll, self._task, level, sequence, self._present_notes()
                ),
                forget_what_is_lost,
            )
        except _LostPolicyError:
            self.refresh()
            return
        except Rejected:
            # By a learner that does not know these weights? It may have been away unnoticed.
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
        if is_lost or (is_newer and self._sent_with_it >= self._num_environments):
            self.refresh()

    def _present_notes(self) -> str:
        # Which reads files, and so not for each unroll.
        now = time.monotonic()
        if now - self._noted_at >= remote_actors.WATCH_SECONDS:
            self._notes = remote_actors.notes_of_job(self._actors.level_cache())
            self._noted_at = now
        return self._notes

    @contextlib.contextmanager
    def watched(self):
        """Tells the learner every few seconds that this job is there, and looks whether to end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(remote_actors.POLL_SECONDS):
                with contextlib.suppress(Disconnected, Rejected, Closed, WrongPeer):
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


class _LostPolicyError(Exception):
    """An unroll of weights that the learner does not know any more."""


def _agreed(
    config: Config, given: Collection[str], settings: dict[str, Any]
) -> tuple[Config, list[str]]:
    """Takes over what the learner says; refuses flags that say something else.

    Returns:
      The settings, and the level of each environment.
    """
    address = config.cluster.own_address
    if settings.get('protocol') != remote_actors.PROTOCOL:
        raise ConfigError(
            f'The learner at {address} runs another version of this program '
            f'(protocol {settings.get("protocol")}, here {remote_actors.PROTOCOL}): '
            'install the same one.'
        )
    of_the_learner = settings['network'] | {
        'unroll_length': settings['unroll_length'],
        'popart': bool(popart_levels(settings['network'])),
    }
    environment = settings['environment']
    of_the_learner |= environment | {'num_action_repeats': settings['num_action_repeats']}
    own = config.agreed('jobs') | {'use_lstm': config.network.use_lstm == 'true'}
    for flag in own.keys() & of_the_learner.keys() & {*given}:
        value = own[flag]
        is_open = config.value(flag) in ('auto', None)
        if not is_open and value != of_the_learner[flag]:
            raise ConfigError(
                f'--{flag}={value} does not fit the learner at {address}, which has '
                f'{of_the_learner[flag]}: leave it out.'
            )
    known = settings['level_names']
    names = known
    if 'level_name' in given:
        names = suites.load(config.run.level_name).level_names
    for level in names:
        if level not in known:
            raise ConfigError(
                f'--level_name={level} is none of the levels of the learner at '
                f'{address}: {", ".join(known)}.'
            )
    # Round robin over the levels, by job and environment.
    num_actors = config.cluster.envs_per_actor
    first = config.cluster.task * num_actors
    levels = [names[(first + i) % len(names)] for i in range(num_actors)]
    agreed = dataclasses.replace(
        config.replace(num_actors=num_actors),
        environment=with_common_actions(
            dataclasses.replace(config.environment, **environment), known
        ),
        learner=dataclasses.replace(config.learner, unroll_length=settings['unroll_length']),
    )
    return agreed, levels


def _check_network(ours: dict[str, Any], learners: dict[str, Any], address: str) -> None:
    for name in learners:
        if ours.get(name) != learners[name]:
            raise ConfigError(
                f'This job does not fit the learner at {address}: {flags_of(name)} is '
                f'{ours.get(name)} here and {learners[name]} there.'
            )
