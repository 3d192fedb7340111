"""Trains one of several learners, or one on several devices; a script for `several_learners_test`.

    python replica.py devices|pipelines|learner OUTPUT NUMBER_OF_PARTS [TASK ADDRESS...]

`devices` divides batches; `pipelines` loads each device's part on its own.

Writes what `step` returns and the variables of every local replica, after every update; of
`devices`, also the variables of a learner that is restored from the last checkpoint.
"""

import functools
import sys
import threading

import numpy as np
import tensorflow as tf
from agents import (
    EmbeddingAgent,
    batch_of,
    batch_of_images,
    encoder_agent,
    image_decoder,
    mlp_agent,
)

from impala.cluster import learner_group
from impala.config import LearnerConfig
from impala.experience import loading
from impala.learning import devices as learner_devices
from impala.learning.learner import Learner

BATCH_SIZE = 4
UPDATES = 4
# The update whose batch has a NaN reward in its last unroll.
POISONED = 2
# Agents that `pipelines` trains.
PIPELINED = ('lstm', 'popart', 'appo', 'autoencoder', 'contrast', 'normalized', 'replay')
# The agent whose learner gets intrinsic rewards.
INTRINSIC = 'intrinsic'
# Which unrolls of the joined batch are replayed; the number differs between its parts.
REPLAYED = [True, True, False, False]

APPO = {
    'loss': 'appo',
    'target_update_steps': 2,
    'normalize_advantages': True,
    'kl_cost': 0.1,
    'optimizer': 'adam',
    # Adam's steps do not shrink with the gradient, so a small epsilon would show rounding errors.
    'adam_epsilon': 0.01,
    'final_entropy_cost': 0.1,
}


# Replayed steps do not count, so half the total keeps the learning rate's schedule.
_HALF = UPDATES * BATCH_SIZE // 2 * 5


def config(batch_size, **changes):
    """Returns settings that use everything that could differ between one learner and several."""
    return LearnerConfig.of(
        batch_size=batch_size,
        **{
            'unroll_length': 5,
            'reward_clipping': 'none',
            'total_agent_steps': UPDATES * BATCH_SIZE * 5,
            'learning_rate': 0.05,
            'final_learning_rate': 0.03,
            'epsilon': 0.01,
            'gradient_clip_norm': 0.5,
            **changes,
        },
    )


def create_learner(agent, changes, batch_size, strategy=None):
    """Creates a learner, with a target network if its settings need one."""
    settings = config(batch_size, **changes)
    target_agent = agent() if settings.loss.target_update_steps else None
    decoder = image_decoder() if 'autoencoder_cost' in changes else None
    return Learner(agent(), settings, strategy, target_agent, decoder)


def joined_batch(update, learner):
    """Returns the batch that all learners share.

    That of an agent with a target network or PopArt has transitions that are no steps.
    """
    agent, has_images = learner.agent, learner.decoder is not None
    state = () if isinstance(agent, EmbeddingAgent) else agent.initial_state(BATCH_SIZE)
    has_cuts = learner.target_agent is not None or agent.popart is not None
    batch = (batch_of_images if has_images else batch_of)(config(BATCH_SIZE), state, seed=update)
    rewards = batch.env_outputs.reward.numpy()
    if update == POISONED:
        rewards[2, -1] = np.nan
    env_outputs = batch.env_outputs._replace(reward=tf.constant(rewards))
    if has_cuts:
        # Their number differs between the parts of the batch.
        is_step = np.ones_like(rewards, bool)
        is_step[[2, 4, 3], [0, 0, 3]] = False
        is_step = tf.constant(is_step)
        env_outputs = env_outputs._replace(done=env_outputs.done | ~is_step, is_step=is_step)
    return batch._replace(
        level_id=tf.constant([0, 1, 1, 2]),
        policy_version=tf.constant([0, 0, 0, -update], tf.int64),
        env_outputs=env_outputs,
    )


def share(batch, part, num_parts):
    """Returns one learner's unrolls of a joined batch."""
    size = BATCH_SIZE // num_parts
    columns = slice(part * size, (part + 1) * size)

    def cut(nest, axis):
        return tf.nest.map_structure(lambda t: t[columns] if axis == 0 else t[:, columns], nest)

    return batch._replace(
        level_id=cut(batch.level_id, 0),
        policy_version=cut(batch.policy_version, 0),
        agent_state=cut(batch.agent_state, 0),
        env_outputs=cut(batch.env_outputs, 1),
        agent_outputs=cut(batch.agent_outputs, 1),
    )


def replayed_share(learner, part, num_parts):
    """Returns which of one learner's unrolls are replayed."""
    size = BATCH_SIZE // num_parts
    if not learner.config.replay.replay_fraction:
        return tf.zeros([size], tf.bool)
    return tf.constant(REPLAYED[part * size : (part + 1) * size])


def intrinsic_share(update, part, num_parts):
    """Returns the intrinsic rewards of one learner's unrolls of a joined batch."""
    rewards = np.random.default_rng(update).random([5, BATCH_SIZE], np.float32)
    return tf.constant(np.split(rewards, num_parts, axis=1)[part])


def train(learner, part=0, num_parts=1, has_intrinsic_rewards=False):
    """Yields, for each update, what `step` returned and the learner's variables."""
    for update in range(UPDATES):
        is_replayed = replayed_share(learner, part, num_parts)
        batch = share(joined_batch(update, learner), part, num_parts)
        intrinsic_reward = None
        if has_intrinsic_rewards:
            intrinsic_reward = intrinsic_share(update, part, num_parts)
        metrics = learner.step(batch, True, is_replayed, intrinsic_reward)
        yield metrics, learner.variables


def train_by_pipelines(learner):
    """Like `train`, but each device's part of a batch has its own pipeline."""
    num_parts = len(learner.devices)
    # Each part comes with what is replayed of it, because either device may ask for it.
    pieces = iter(
        (
            share(joined_batch(update, learner), part, num_parts),
            replayed_share(learner, part, num_parts),
        )
        for update in range(UPDATES)
        for part in range(num_parts)
    )
    lock = threading.Lock()

    def assemble():
        with lock:
            piece = next(pieces, None)
        if piece is None:
            raise tf.errors.CancelledError(None, None, 'there are no more')
        return piece

    with loading.Loading(assemble, devices=learner.devices) as batches:
        for parts in batches:
            for part, device in zip(parts, learner.devices, strict=True):
                for tensor in tf.nest.flatten(part):
                    assert tensor.device.endswith(device), (tensor.device, device)
            outputs, are_replayed = zip(*parts, strict=True)
            metrics = learner.step_in_parts(outputs, are_replayed=are_replayed)
            yield metrics, learner.variables


def agents():
    """Returns functions that create agents, and the settings to train them with, by name."""
    table = np.random.default_rng(0).normal(size=(3, 4))
    # A core doubles the time that a train step is traced.
    without_core = functools.partial(mlp_agent, 'none')
    return {
        'lstm': (mlp_agent, {}),
        'gru': (lambda: mlp_agent('gru'), {'momentum': 0.5}),
        'own core': (lambda: mlp_agent('own_cores:Started'), {'momentum': 0.5}),
        'embedding': (lambda: EmbeddingAgent(table), {'momentum': 0.5}),
        # No unroll is of the last level.
        'popart': (lambda: without_core(popart_levels=('a', 'b', 'c', 'd')), {'momentum': 0.5}),
        'appo': (without_core, APPO),
        INTRINSIC: (without_core, {'reward_clipping': 'abs_one'}),
        'autoencoder': (
            lambda: encoder_agent('none'),
            {'momentum': 0.5, 'autoencoder_cost': 10.0},
        ),
        # All unrolls of one of two learners are replayed.
        'contrast': (
            lambda: encoder_agent('none', contrast_gain=3.0),
            {'autoencoder_cost': 10.0, 'replay_fraction': 0.5, 'total_agent_steps': _HALF},
        ),
        'normalized': (lambda: without_core(normalizes=True), {'momentum': 0.5}),
        'replay': (
            lambda: without_core(normalizes=True),
            {'replay_fraction': 0.5, 'total_agent_steps': _HALF},
        ),
    }


def main(kind, output, num_parts, task=0, *addresses):
    """Trains each of the agents."""
    num_parts, task = int(num_parts), int(task)
    if kind in ('devices', 'pipelines'):
        devices = [f'/cpu:{i}' for i in range(num_parts)]
        learner_devices.prepare(devices, are_shared_with_others=False)
        strategy = learner_devices.strategy_of_devices(devices)
        part, parts, batch_size = 0, 1, BATCH_SIZE
    else:
        strategy = learner_group.strategy_of_learners(list(addresses), task)
        part, parts, batch_size = task, num_parts, BATCH_SIZE // num_parts
    results = {}
    for name, (agent, changes) in agents().items():
        if kind == 'pipelines' and name not in PIPELINED:
            continue
        with strategy.scope():
            learner = create_learner(agent, changes, batch_size, strategy)
        if task:
            # `synchronize` must overwrite what the others start with.
            for variable in learner.variables:
                for local in strategy.experimental_local_results(variable):
                    local.assign_add(tf.ones_like(local))
        learner.synchronize()
        if kind == 'pipelines':
            updates = train_by_pipelines(learner)
        else:
            updates = train(learner, part, parts, name == INTRINSIC)
        for update, (metrics, variables) in enumerate(updates):
            for key, value in metrics.items():
                results[f'{name}/{update}/{key}'] = value.numpy()
            results |= values_of(variables, strategy, f'{name}/{update}')
        if kind == 'devices':
            path = tf.train.Checkpoint(learner=learner).save(f'{output}.checkpoint')
            with strategy.scope():
                restored = create_learner(agent, changes, batch_size, strategy)
            tf.train.Checkpoint(learner=restored).restore(path).assert_consumed()
            results |= values_of(restored.variables, strategy, f'{name}/restored')
    np.savez(output, **results)


def values_of(variables, strategy, name):
    """Returns the values of variables on every local replica."""
    return {
        f'{name}/variable {i}/replica {replica}': local.numpy()
        for i, variable in enumerate(variables)
        for replica, local in enumerate(strategy.experimental_local_results(variable))
    }


if __name__ == '__main__':
    main(*sys.argv[1:])
