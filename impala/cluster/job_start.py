"""How an actor job starts: it waits for its learner and adopts its settings. Without TensorFlow."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from impala import suites
from impala.cluster.calls import Client
from impala.cluster.channel import Disconnected, WrongPeer, WrongSecret
from impala.config import ClusterConfig, Config, ConfigError, with_common_actions
from impala.runs.stop_signal import StopSignal
from impala.seeds import derived_seed

# Changes when a learner and an actor job of two versions could misunderstand each other.
PROTOCOL = 13

# Jobs ask this often whether training is complete; the learner waits twice as long before it exits.
POLL_SECONDS = 3.0
# A job keeps its number, and its places with `--inference=learner`, for this many seconds after its
# last message.
RESERVED_SECONDS = 10.0

_MAX_BACK_OFF_SECONDS = 5.0

T = TypeVar('T')


class LearnerLost(Exception):
    """The learner has been away for too long; the text is one sentence."""


class ActorJobError(Exception):
    """The job cannot continue; the text is one sentence."""


class Finished(Exception):
    """Training is complete, or a signal has stopped this job."""


class LostPolicyError(Exception):
    """The learner has lost the weights behind an unroll."""


@dataclasses.dataclass(frozen=True)
class Start:
    """An actor job that has found its learner.

    Attributes:
      config: this job's settings, with those of the learner where the two must agree.
      level_names: the level of each environment.
      settings: the learner's, from `remote_actors.job_settings`.
      secret: of the run; None without one.
      stop: receives signals.
      retry: retries calls while the learner does not answer.
      report: takes lines of progress.
    """

    config: Config
    level_names: list[str]
    settings: dict[str, Any]
    secret: bytes | None
    stop: StopSignal
    retry: 'Retry'
    report: Callable[[str], None]


def notes_of_job(level_cache: Mapping[str, float]) -> str:
    """Returns the notes that an actor job sends to the learner now and then.

    Args:
      level_cache: see `level_cache_statistics`.
    """
    return json.dumps({'level_cache': dict(level_cache)}) if level_cache else ''


@contextlib.contextmanager
def started(
    config: Config,
    given: Collection[str],
    report: Callable[[str], None],
) -> Iterator[Start]:
    """Waits for the learner and adopts its settings. Main thread only.

    Within the block, `StopSignal` handles SIGINT and SIGTERM.

    Args:
      config: this job's settings.
      given: names of the settings that the user gave; the learner's must not differ from these.
      report: takes lines of progress.

    Raises:
      KeyboardInterrupt: a signal arrived.
      ConfigError: the learner's settings differ, or the process at its address is not a learner.
      LearnerLost: the learner did not answer for `reconnect_timeout` seconds.
    """
    with StopSignal() as stop:
        secret = config.cluster.secret()
        retry = Retry(config.cluster, report, stop)
        try:
            with Client(config.cluster.own_address, 'learner', secret) as client:
                settings = retry.call(lambda: client.call('settings')[0])
                version = retry.call(lambda: client.call('status')[0])['version']
        except Finished as error:
            # Acting has not begun.
            raise KeyboardInterrupt from error
        config, level_names = agreed(config, given, settings)
        # Depends on the version, so that a restarted job does not repeat its episodes.
        seed = derived_seed(config.run.seed, config.cluster.task, max(version, 0))
        config = config.replace(seed=seed)
        yield Start(config, level_names, settings, secret, stop, retry, report)


class Retry:
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
          LostPolicyError: raised by `before_again`.
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
            except LostPolicyError:
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
                    raise Finished from error
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
          Finished: a signal has stopped the job.
        """
        time.sleep(seconds)
        if self._stop.received:
            raise Finished


def agreed(
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
    if settings.get('protocol') != PROTOCOL:
        raise ConfigError(
            f'The learner at {config.cluster.own_address} runs another version of this program '
            f'(protocol {settings.get("protocol")}, here {PROTOCOL}): '
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
    """Rejects flags whose values differ from the learner's; see `agreed`."""
    # What the learner has chosen replaces the flags that may leave it open.
    of_the_learner = settings['agreed'] | settings['network']
    of_the_learner['popart'] = bool(settings['network'].get('popart_levels'))
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
      config: see `agreed`.
      given: see `agreed`.
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
