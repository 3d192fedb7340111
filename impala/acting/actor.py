"""The actor process: environments and their clients of the batcher, without TensorFlow.

`impala.acting.actor_pool` runs it as `python -m impala.acting.actor`, with its settings as JSON on
stdin because they may be longer than an argument. Exit codes:

    82: an environment cannot be made or played with these settings (one sentence on stderr).
    83: the batcher was closed, or all requested episodes are played.
    84: an environment returned, after its first reset, something that its spec does not declare
        (one sentence on stderr).
    Others: a failure, with its traceback on stderr if there is one.

Warnings of `environments` go to a pipe, one per line, because stderr is read only when the process
has died. Results of requested episodes go to another pipe.

Processes that environments start stay in this process's group and end with it.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_batching.actor_client import ActorClient, ClosedError
from impala import environments
from impala.acting.episode_series import EpisodeQueues, Episodes, EpisodeSeries
from impala.environments.checked_environment import check_observation
from impala.errors import LevelError
from impala.trajectory import EnvironmentSpec, EpisodeEnd
from impala.user_code import describe_failure

# Exit codes that the libraries of environments do not use.
BAD_INPUT_EXIT_CODE = 82
CLOSED_EXIT_CODE = 83
CONTRACT_EXIT_CODE = 84

# Makes a process that shows no sign of life print its stack.
STACK_SIGNAL = signal.SIGUSR1

# Marks the line of stderr that holds the sentence for the user, among the output of libraries.
_SENTENCE_MARK = 'impala.acting.actor says '

# The learner and the behaviour policy have priority: all actors wait for them.
NICENESS = 5


class ContractError(Exception):
    """An environment violated its spec while it was played; the text is one sentence."""


def describe_non_finite(
    level_name: str, observation_names: Sequence[str], index: int, value: float
) -> str:
    """Says which value of an environment is not finite.

    Args:
      level_name: of the environment.
      observation_names: in the order of its spec.
      index: 0 for the reward, else 1 + the observation's index; see `ActorClient.send`.
      value: NaN or infinity.
    """
    what = 'reward' if index == 0 else f'observation {observation_names[index - 1]!r}'
    return f'the {what} of {level_name} is {value} as float32'


class NonFiniteWarnings:
    """Warns of values that are not finite, once per level and kind of value."""

    def __init__(self, observation_names: Sequence[str]):
        self._observation_names = observation_names
        self._known: set[tuple[str, int]] = set()

    def warn(self, level_name: str, values: Mapping[int, float], is_learned_from: bool) -> None:
        """Warns of what `ActorClient.send` returned for a level.

        Args:
          level_name: of the environment.
          values: index -> NaN or infinity.
          is_learned_from: whether the learner uses its unrolls; False in a test.
        """
        effect = 'the agent sees 0 in its place'
        if is_learned_from:
            effect += ', and does not learn from unrolls with such values'
        for index, value in values.items():
            if (level_name, index) not in self._known:
                self._known.add((level_name, index))
                logging.getLogger(environments.__name__).warning(
                    '%s: %s',
                    describe_non_finite(level_name, self._observation_names, index, value),
                    effect,
                )


class Player:
    """An actor of Figure 1: an environment, and its client of the batcher, which has the policy.

    With `bootstrap_truncated`, a truncated episode has one more row, with its last observation. The
    environment does not see the action for that row. The next row begins the next episode, and it
    alone has TRUNCATED as its end; see `is_step` of `impala.trajectory.StepOutput`.
    """

    def __init__(
        self,
        environment: environments.Environment,
        client: ActorClient,
        level_name: str,
        warnings: NonFiniteWarnings,
        bootstrap_truncated: bool = False,
    ):
        """Prepares; nothing is played yet.

        Args:
          environment: to be played.
          client: with the observations and actions of the environment's spec.
          level_name: for warnings.
          warnings: takes values that are not finite.
          bootstrap_truncated: see above.
        """
        spec = environment.spec
        self._environment = environment
        self._client = client
        self._level_name = level_name
        self._warnings = warnings
        self._names = tuple(spec.observation)
        self._is_scalar, self._to_environment = spec.action.is_scalar, spec.action.to_environment
        self._is_series = isinstance(environment, EpisodeSeries)
        self._bootstrap_truncated = bootstrap_truncated
        # The next episode's first observation, while the last one waits for its action.
        self._upcoming: environments.Observation | None = None

    def start(self) -> None:
        """Resets the environment and asks for the first action.

        Raises:
          ClosedError: the batcher is closed.
          LevelError: the environment cannot be played.
        """
        observation = self._environment.reset()
        check_observation(self._level_name, self._environment.spec, observation)
        # The first row starts an episode: the recurrent state must be reset.
        non_finite = self._client.start(
            EpisodeEnd.TERMINATED, [observation[name] for name in self._names]
        )
        if non_finite:
            self._warnings.warn(self._level_name, non_finite, not self._is_series)

    def finish_if_done(self) -> bool:
        """Ends the actor if its environment is an `EpisodeSeries` that is done; says if it is."""
        is_done = self._is_series and self._environment.is_done  # type: ignore[attr-defined]
        if is_done:
            self._client.finish()
        return is_done

    def step(self) -> None:
        """Waits for the action, acts, and asks for the next one.

        Raises:
          ClosedError: the batcher is closed.
          ContractError: the environment returned what it did not declare.
          LevelError: the environment cannot be played, or does not return its last observation.
        """
        environment = self._environment
        try:
            action = self._client.wait()
            if self._upcoming is not None:
                observation, self._upcoming = self._upcoming, None
                self._send(observation, None)
                return
            if not self._is_scalar:
                action = self._to_environment(action)
            reward, end, observation = environment.step(action)
            frames = environment.spec.num_action_repeats
            if end and end != EpisodeEnd.LIFE_LOST:
                # The episode may have ended during the action.
                frames = environment.last_action_frames or frames
            if self._bootstrap_truncated and end == EpisodeEnd.TRUNCATED:
                self._upcoming, observation = observation, self._last_observation()
                end = EpisodeEnd.NOT_ENDED
        except environments.DeclarationError as error:
            raise ContractError(str(error)) from error
        self._send(observation, (reward, end, frames))

    def _send(
        self, observation: environments.Observation, step: tuple[float, EpisodeEnd, int] | None
    ) -> None:
        """Sends the row of a step (reward, end, frames), or one with which an episode begins."""
        client = self._client
        try:
            arrays = [observation[name] for name in self._names]
            if step is None:
                non_finite = client.begin(EpisodeEnd.TRUNCATED, arrays)
            else:
                reward, end, frames = step
                non_finite = client.send(reward, end, arrays, frames)
        except (AttributeError, KeyError, TypeError, ValueError):
            _explain(self._level_name, self._environment.spec, observation)
            raise
        if non_finite:
            self._warnings.warn(self._level_name, non_finite, not self._is_series)

    def _last_observation(self) -> environments.Observation:
        observation = self._environment.last_observation
        if observation is None:
            raise LevelError(
                f'{self._level_name!r} ended an episode with TRUNCATED without a last_observation, '
                'which --bootstrap_truncated needs: have its step set that attribute, or leave the '
                'flag out.'
            )
        return observation


def act(
    environment_list: Sequence[environments.Environment],
    clients: Sequence[ActorClient],
    level_names: Sequence[str],
    bootstrap_truncated: bool = False,
) -> None:
    """Plays until the batcher is closed.

    Returns when all environments are `EpisodeSeries` that are done.

    Several environments take turns in one process. This saves switches between processes, each of
    which refills the processor's caches with interpreter and game engine.

    Args:
      environment_list: at least one.
      clients: the client of each environment.
      level_names: the level of each environment, for warnings.
      bootstrap_truncated: see `Player`.

    Raises:
      ClosedError: the batcher was closed.
      LevelError: see `Player.step`.
      ContractError: an environment returned, after its first reset, what it did not declare.
    """
    warnings = NonFiniteWarnings(tuple(environment_list[0].spec.observation))
    players = [
        Player(environment, client, level_name, warnings, bootstrap_truncated)
        for environment, client, level_name in zip(
            environment_list, clients, level_names, strict=True
        )
    ]
    for player in players:
        player.start()
    while players:
        for player in list(players):
            if player.finish_if_done():
                players.remove(player)
            else:
                player.step()


def _explain(level_name: str, spec: EnvironmentSpec, observation: Any) -> None:
    """Raises an error if a wrong observation is the reason that it could not be sent."""
    try:
        check_observation(level_name, spec, observation)
    except environments.DeclarationError as error:
        raise ContractError(str(error)) from error


def _exit_with_parent(lifeline: int) -> None:
    """Ends this process when its parent ends, which closes the other end of `lifeline`."""

    def wait() -> None:
        os.read(lifeline, 1)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name='lifeline', daemon=True).start()


def say(sentence: object) -> None:
    """Prints a sentence on stderr in a form that `sentence_of` reads."""
    print(f'\n{_SENTENCE_MARK}{json.dumps(str(sentence))}', file=sys.stderr, flush=True)


def sentence_of(printed: str) -> str | None:
    """Returns the last sentence that `say` printed, None if the output has none."""
    for line in reversed(printed.splitlines()):
        if line.startswith(_SENTENCE_MARK):
            with contextlib.suppress(ValueError):
                return str(json.loads(line.removeprefix(_SENTENCE_MARK)))
    return None


def _describe(level_name: str, seed: int, config: environments.EnvironmentConfig) -> str:
    """Returns JSON: the spec of a level, or the sentence that says why it has none."""
    try:
        try:
            environment = environments.create_environment(level_name, seed, config)
        except LevelError:
            raise
        except (Exception, SystemExit) as error:
            # A failure at the first attempt is the user's to fix. Later ones may be accidents.
            raise LevelError(
                f'{level_name!r} cannot be made: {describe_failure(error)}.'
            ) from error
        with contextlib.closing(environment):
            environment.check()
            return json.dumps({'spec': environment.spec.to_json()})
    except LevelError as error:
        return json.dumps({'error': str(error)})


def main(settings: dict[str, Any]) -> int:
    """Runs actors, or describes levels; returns the exit code."""
    _exit_with_parent(settings['lifeline'])
    faulthandler.register(STACK_SIGNAL, all_threads=False)
    inherited = ('lifeline', 'spec_pipe', 'warnings', 'results')
    names = [name for name in inherited if name in settings]
    for descriptor in (*[settings[name] for name in names], *settings.get('segments', ())):
        # Processes that an environment starts must not keep these open.
        os.set_inheritable(descriptor, False)
    if 'process_groups' in settings:
        # If the parent is killed, a shell finds the groups to kill by these files.
        with open(os.path.join(settings['process_groups'], str(os.getpid())), 'w'):
            pass
    os.nice(NICENESS)
    config = environments.EnvironmentConfig.of(**settings['environment'])
    if 'segments' not in settings:
        # On a separate descriptor, because environments may print to stdout.
        with os.fdopen(settings['spec_pipe'], 'w') as pipe:
            for level_name in settings['level_names']:
                print(_describe(level_name, settings['seed'], config), file=pipe, flush=True)
        return 0
    try:
        with contextlib.ExitStack() as stack:
            if 'warnings' in settings:
                pipe = stack.enter_context(os.fdopen(settings['warnings'], 'w'))
                logging.getLogger(environments.__name__).addHandler(logging.StreamHandler(pipe))
            made = []
            if 'episodes' in settings:
                queues = EpisodeQueues([Episodes.from_json(each) for each in settings['episodes']])
                results = stack.enter_context(os.fdopen(settings['results'], 'w'))

                def record(*result: Any) -> None:
                    print(json.dumps(result), file=results, flush=True)

            for index, level_name in enumerate(settings['level_names']):
                environment: environments.Environment
                if 'episodes' in settings:
                    environment = EpisodeSeries(
                        level_name, config, queues, index, record, **settings['series']
                    )
                else:
                    environment = environments.create_environment(
                        level_name, settings['seeds'][index], config
                    )
                stack.callback(environment.close)
                made.append(environment)
            spec = made[0].spec
            try:
                act(
                    made,
                    [
                        ActorClient(
                            segment, actor, list(spec.observation.values()), spec.action.array
                        )
                        for segment, actor in zip(
                            settings['segments'], settings['actors'], strict=True
                        )
                    ],
                    settings['level_names'],
                    # No one learns from a test.
                    config.bootstrap_truncated and 'episodes' not in settings,
                )
            except ClosedError:
                return CLOSED_EXIT_CODE
    except LevelError as error:
        say(error)
        return BAD_INPUT_EXIT_CODE
    except ContractError as error:
        say(error)
        return CONTRACT_EXIT_CODE
    return CLOSED_EXIT_CODE


if __name__ == '__main__':
    sys.exit(main(json.load(sys.stdin)))
