"""The actor process: environments and their seats at the batcher, without TensorFlow.

Run by `impala.acting.actor_pool` as `python -m impala.acting.actor`, with its settings as JSON on
stdin: they may be longer than an argument. Exit codes: 83 the batcher was closed or all episodes
asked for are played, 82 the environment cannot be made or played as asked (one sentence on stderr),
84 after its first reset it returned something that its spec does not declare (one sentence, too),
anything else a failure with its traceback on stderr, if there is one. Warnings of `environments` go
to a pipe, a line each, as stderr is read only when the process has died, and so do results of
episodes that were asked for.

What environments start stays in this process's group, and what ends the process ends the group.
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
from impala.environments.user_code import describe_failure
from impala.errors import LevelError
from impala.trajectory import EnvironmentSpec, EpisodeEnd

# Codes with which no environment's own library ends the process.
BAD_INPUT_EXIT_CODE = 82
CLOSED_EXIT_CODE = 83
CONTRACT_EXIT_CODE = 84

# Has the process print where in the code it is; it is sent to one that shows no sign of life.
STACK_SIGNAL = signal.SIGUSR1

# Begins the line of stderr that holds a sentence for the user, among all that libraries print.
_SENTENCE_MARK = 'impala.acting.actor says '

# The learner and those who answer actors go first: all actors wait for these.
NICENESS = 5


class ContractError(Exception):
    """An environment broke its own declaration while it was played; the text is one sentence."""


def describe_non_finite(
    level_name: str, observation_names: Sequence[str], index: int, value: float
) -> str:
    """Says what of an environment is not finite.

    Args:
      level_name: of the environment.
      observation_names: in the order of its spec.
      index: what it is, as `ActorClient.send` returns it.
      value: NaN or infinity.
    """
    what = 'reward' if index == 0 else f'observation {observation_names[index - 1]!r}'
    return f'the {what} of {level_name} is {value} as float32'


class _NonFiniteWarnings:
    """Warns, once for each level and what it is of it, of values that are not finite."""

    def __init__(self, observation_names: Sequence[str]):
        self._observation_names = observation_names
        self._known: set[tuple[str, int]] = set()

    def warn(self, level_name: str, values: Mapping[int, float], is_learned_from: bool) -> None:
        """Takes what `ActorClient.send` returned of a level.

        Args:
          level_name: of the environment.
          values: index -> NaN or infinity.
          is_learned_from: whether its unrolls would be learned from else; those of a test are not.
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


def act(
    environment_list: Sequence[environments.Environment],
    clients: Sequence[ActorClient],
    level_names: Sequence[str],
) -> None:
    """Plays until the batcher is closed: Figure 1's actors, with the policy at the batcher's end.

    Returns when all environments are `EpisodeSeries` that are done.

    Several environments take turns in one process: fewer switches between processes, between which
    the processor's caches would have to take in interpreter and game engine anew.

    Args:
      environment_list: at least one.
      clients: of each environment.
      level_names: of each environment, for warnings.

    Raises:
      ClosedError: the batcher was closed.
      LevelError: an environment cannot be played.
      ContractError: an environment has returned, after its first reset, what it did not declare.
    """
    actors = list(zip(environment_list, clients, level_names, strict=True))
    names = tuple(environment_list[0].spec.observation)
    warnings = _NonFiniteWarnings(names)
    for environment, client, level_name in actors:
        observation = environment.reset()
        check_observation(level_name, environment.spec, observation)
        # An unroll's first row starts an episode: nothing before it may reach the recurrent state.
        non_finite = client.start(EpisodeEnd.TERMINATED, [observation[name] for name in names])
        if non_finite:
            warnings.warn(level_name, non_finite, not isinstance(environment, EpisodeSeries))
    while actors:
        for actor in list(actors):
            environment, client, level_name = actor
            if isinstance(environment, EpisodeSeries) and environment.is_done:
                client.finish()
                actors.remove(actor)
                continue
            try:
                reward, end, observation = environment.step(client.wait())
            except environments.DeclarationError as error:
                raise ContractError(str(error)) from error
            frames = environment.spec.num_action_repeats
            if end and end != EpisodeEnd.LIFE_LOST:
                # The end may have cut the action short.
                frames = environment.last_action_frames or frames
            try:
                non_finite = client.send(reward, end, [observation[name] for name in names], frames)
            except (AttributeError, KeyError, TypeError, ValueError):
                _explain(level_name, environment.spec, observation)
                raise
            if non_finite:
                warnings.warn(level_name, non_finite, not isinstance(environment, EpisodeSeries))


def _explain(level_name: str, spec: EnvironmentSpec, observation: Any) -> None:
    """Raises what is wrong with an observation that could not be sent, if that was the reason."""
    try:
        check_observation(level_name, spec, observation)
    except environments.DeclarationError as error:
        raise ContractError(str(error)) from error


def _exit_with_parent(lifeline: int) -> None:
    """Ends this process when the parent is gone, which closes the other end of `lifeline`."""

    def wait() -> None:
        os.read(lifeline, 1)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name='lifeline', daemon=True).start()


def say(sentence: object) -> None:
    """Prints a sentence on stderr from which `sentence_of` gets it back, lines and all."""
    print(f'\n{_SENTENCE_MARK}{json.dumps(str(sentence))}', file=sys.stderr, flush=True)


def sentence_of(printed: str) -> str | None:
    """Returns the sentence that `say` printed last, if there is one among all that was printed."""
    for line in reversed(printed.splitlines()):
        if line.startswith(_SENTENCE_MARK):
            with contextlib.suppress(ValueError):
                return str(json.loads(line.removeprefix(_SENTENCE_MARK)))
    return None


def _describe(level_name: str, seed: int, config: environments.EnvironmentConfig) -> str:
    """Returns, as JSON, the spec of a level or the sentence that says why there is none."""
    try:
        try:
            environment = environments.create_environment(level_name, seed, config)
        except LevelError:
            raise
        except (Exception, SystemExit) as error:
            # What fails at once is to be mended. Of an actor it may be a failure of chance.
            raise LevelError(
                f'{level_name!r} cannot be made: {describe_failure(error)}.'
            ) from error
        with contextlib.closing(environment):
            environment.check()
            return json.dumps({'spec': environment.spec.to_json()})
    except LevelError as error:
        return json.dumps({'error': str(error)})


def main(settings: dict[str, Any]) -> int:
    """Runs actors, or tells the specs of levels; returns the exit code."""
    _exit_with_parent(settings['lifeline'])
    faulthandler.register(STACK_SIGNAL, all_threads=False)
    for name in ('lifeline', 'spec_pipe', 'segment', 'warnings', 'results'):
        if name in settings:
            # What an environment starts must not keep the others waiting for its end.
            os.set_inheritable(settings[name], False)
    if 'process_groups' in settings:
        # For whoever ends what is left of this group, should nobody else be there to.
        with open(os.path.join(settings['process_groups'], str(os.getpid())), 'w'):
            pass
    os.nice(NICENESS)
    config = environments.EnvironmentConfig(**settings['environment'])
    if 'segment' not in settings:
        # On its own descriptor: environments may print whatever they like.
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
            observation = list(made[0].spec.observation.values())
            try:
                act(
                    made,
                    [
                        ActorClient(settings['segment'], actor, observation)
                        for actor in settings['actors']
                    ],
                    settings['level_names'],
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
