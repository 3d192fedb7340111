"""The actor process: one environment and a seat at the batcher, without TensorFlow.

Run by `impala.actor_pool` as `python -m impala.actor`, with its settings as JSON in the last
argument. Exit codes: 3 the batcher was closed, 2 the environment cannot be made or played as asked
(one sentence on stderr), anything else a failure with its traceback on stderr, if there is one.
"""

import json
import os
import shutil
import sys
import threading

import environments
from dynamic_batching.actor_client import ActorClient, ClosedError
from impala.trajectory import EpisodeEnd

BAD_INPUT_EXIT_CODE = 2
# Not 0, with which an environment's own library may end the process.
CLOSED_EXIT_CODE = 3


def act(environment: environments.Environment, client: ActorClient) -> None:
    """Plays until the batcher is closed: Figure 1's actor, with the policy at the batcher's end.

    Raises:
      ClosedError: the batcher was closed.
    """
    names = tuple(environment.spec.observation)
    observation = environment.reset()
    # An unroll's first row starts an episode: nothing before it may reach the recurrent state.
    action = client.start(EpisodeEnd.TERMINATED, tuple([observation[name] for name in names]))
    while True:
        reward, end, observation = environment.step(action)
        action = client.step(reward, end, tuple([observation[name] for name in names]))


def _exit_with_parent(lifeline: int, temp_folder: str) -> None:
    """Ends this process when the parent is gone, which closes the other end of `lifeline`."""

    def wait() -> None:
        os.read(lifeline, 1)
        shutil.rmtree(temp_folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, name='lifeline', daemon=True).start()


def main(argument: str) -> int:
    """Runs one actor, or prints the spec of its environment; returns the exit code."""
    settings = json.loads(argument)
    _exit_with_parent(settings['lifeline'], settings['environment']['temp_folder'])
    config = environments.EnvironmentConfig(**settings['environment'])
    try:
        environment = environments.create_environment(
            settings['level_name'], settings['seed'], config
        )
        try:
            if 'segment' in settings:
                act(
                    environment,
                    ActorClient(
                        settings['segment'],
                        settings['actor'],
                        list(environment.spec.observation.values()),
                    ),
                )
            else:
                # On its own descriptor: environments may print whatever they like.
                with os.fdopen(settings['spec_pipe'], 'w') as pipe:
                    json.dump(environment.spec.to_json(), pipe)
        except ClosedError:
            return CLOSED_EXIT_CODE
        finally:
            environment.close()
    except environments.LevelError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT_EXIT_CODE
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[-1]))
