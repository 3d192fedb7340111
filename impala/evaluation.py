"""Test mode: plays episodes with the weights of a checkpoint, on the machinery of training."""

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tqdm

from impala.actor_pool import Workplace
from impala.agent import Agent
from impala.checkpoint import (
    Checkpointer,
    LogdirError,
    check_same_network,
    report_to_stderr,
)
from impala.local_actors import LocalActors
from impala.run_config import (
    TrainingConfig,
    choose_network,
    create_agent,
    network_settings,
)
from impala.stop_signal import StopSignal
from impala.trajectory import EpisodeEnd

SCORES_FILE = 'test_scores.json'

# Far from those of training, so that a test does not repeat the episodes trained on.
_SEED_OFFSET = 1 << 30


class _Restorable(tf.Module):
    """Stands where the learner does in a checkpoint."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent


def evaluate(
    config: TrainingConfig, num_episodes: int, report: Callable[[str], None]
) -> dict[str, list[float]] | None:
    """Plays whole episodes with the newest checkpoint and writes `test_scores.json`.

    Every environment plays a number of episodes that is fixed beforehand: taking the first ones
    that end would favour short episodes. A game that is lost life by life counts as one episode.

    Args:
      config: of the run that is tested.
      num_episodes: per level.
      report: told in a line which checkpoint is tested.

    Returns:
      Level name -> undiscounted, unclipped returns; None if SIGINT or SIGTERM came first.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came before anything was played.
      ConfigError, LevelError, LogdirError: one sentence for the user.
      ActorError: with the actor's own error text.
    """
    num_actors = len(config.level_names) * min(config.num_actors, num_episodes)
    config = dataclasses.replace(
        config,
        num_actors=num_actors,
        queue_capacity=num_actors,
        inference_batch_size=0,
        seed=config.seed + _SEED_OFFSET,
        environment=dataclasses.replace(
            config.environment, end_episode_on_life_loss=False, is_test=True
        ),
    )
    quotas = _quotas(config, num_episodes)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        workplace = stack.enter_context(Workplace(config.environment))
        spec = workplace.environment_spec(config.level_names[0], config.seed)
        network = choose_network(config, spec)
        agent = create_agent(dataclasses.replace(network, compute_dtype='float32'), spec)
        checkpointer = Checkpointer(config.logdir, _Restorable(agent))
        check_same_network(config.logdir, network_settings(network, spec))
        if not checkpointer.restore():
            raise LogdirError(
                f'There is no checkpoint in {config.logdir}: give the --logdir of a training run.'
            )
        report(f'Testing {checkpointer.latest}')
        tf.random.set_seed(config.seed)
        actors = LocalActors(config, spec, agent, workplace, report_to_stderr)
        progress = stack.enter_context(tqdm.tqdm(total=sum(quotas), unit='episode', disable=None))
        stop.then(actors.close)
        stack.enter_context(actors)
        returns: dict[str, list[float]] = {name: [] for name in config.level_names}
        for batch in actors.batches(1):
            actor = int(batch.actors[0])
            ends = batch.ends.numpy()[1:, 0]
            finished = (ends == EpisodeEnd.TERMINATED) | (ends == EpisodeEnd.TRUNCATED)
            ended = batch.actor_output.env_outputs.info.episode_return.numpy()[1:, 0][finished]
            counted = ended[: quotas[actor]]
            quotas[actor] -= len(counted)
            returns[config.level_names[config.level_ids[actor]]] += [
                float(np.float64(str(value))) for value in counted
            ]
            progress.update(len(counted))
            if not any(quotas):
                break
        else:
            if stop.received:
                return None
            actors.check()
    _write_scores(config.logdir, str(checkpointer.latest), returns)
    return returns


def _quotas(config: TrainingConfig, num_episodes: int) -> list[int]:
    """Returns the episodes that each actor plays; those of a level add up to `num_episodes`."""
    actors_per_level = config.num_actors // len(config.level_names)
    return [
        num_episodes // actors_per_level
        + (actor // len(config.level_names) < num_episodes % actors_per_level)
        for actor in range(config.num_actors)
    ]


def _write_scores(logdir: str, checkpoint: str, returns: dict[str, list[float]]) -> None:
    scores = {
        'checkpoint': checkpoint,
        'levels': {
            level: {
                'returns': values,
                'mean': statistics.fmean(values),
                'median': statistics.median(values),
            }
            for level, values in returns.items()
        },
    }
    path = os.path.join(logdir, SCORES_FILE)
    try:
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(scores, file, indent=2)
            file.write('\n')
    except OSError as error:
        raise LogdirError(f'Cannot write {path}: {error.strerror}.') from error
