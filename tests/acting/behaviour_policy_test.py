"""Tests of the behaviour policy with real agents; actors are clients in threads of this process."""

import contextlib
import gc
import threading
import time

import actor_nursery
import numpy as np
import pytest
import tensorflow as tf

from dynamic_batching.actor_client import ClosedError
from impala.acting.behaviour_policy import BehaviourPolicy, UnrollSource
from impala.experience.batch import unroll_components
from impala.experience.mixture import ReplayMixer
from impala.experience.replay import Replay
from impala.networks.agent import Agent, AgentConfig
from impala.trajectory import AgentOutput, ArraySpec, EnvironmentSpec, EpisodeEnd

TIMEOUT = 30  # Seconds; reached only by a deadlock.
SPEC = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 3, 1)
OBSERVATION = list(SPEC.observation.values())


def make_source(agent, num_actors, unroll_length=5, queue_capacity=4):
    return UnrollSource(
        SPEC,
        agent,
        level_ids=[10 + actor for actor in range(num_actors)],
        unroll_length=unroll_length,
        queue_capacity=queue_capacity,
        minimum_batch_size=max(1, num_actors // 2),
        timeout_ms=5,
    )


@contextlib.contextmanager
def playing(source, num_actors):
    """Clients that play random episodes until the batcher is closed."""

    def play(actor):
        rng = np.random.default_rng(actor)
        client = actor_nursery.WaitingClient(source.batcher.fd, actor, OBSERVATION)
        observe = lambda: (rng.normal(size=4).astype(np.float32),)  # noqa: E731
        with contextlib.suppress(ClosedError):
            client.start(EpisodeEnd.TERMINATED, observe())
            while True:
                end = rng.choice(list(EpisodeEnd), p=[0.7, 0.1, 0.1, 0.1])
                client.step(rng.normal(), int(end), observe())

    threads = [
        threading.Thread(target=play, args=(actor,), daemon=True) for actor in range(num_actors)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        source.batcher.close()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in threads)


def make_mixer(agent, batch_size, unroll_length=5):
    components = unroll_components(SPEC, agent.state_spec, unroll_length, 100)
    return ReplayMixer(Replay(components, 3, 0), 0.5, batch_size)


@pytest.mark.parametrize(
    ('core', 'has_replay', 'normalizes'),
    [
        ('lstm', False, False),
        ('none', True, False),
        ('gru', True, True),
        ('own_cores:Started', True, False),
    ],
)
def test_a_learner_with_the_same_weights_reproduces_the_outputs_of_the_actors(
    core, has_replay, normalizes
):
    config = AgentConfig('mlp', core, core_size=16, normalize_observations=normalizes)
    learning, acting = Agent(config, SPEC), Agent(config, SPEC)
    if normalizes:
        learning.normalizer.mean.assign([0.5, -1.0, 0.0, 3.0])
        learning.normalizer.variance.assign([0.01, 4.0, 1.0, 9.0])
    source = make_source(acting, num_actors=3)
    behaviour = BehaviourPolicy(acting, source)
    behaviour.publish(learning.acting_variables, tf.constant(7, tf.int64))
    unroll = tf.function(learning.unroll)
    with behaviour.serving(), playing(source, 3):
        batches = source.batches(2, mix=make_mixer(acting, 2).batch if has_replay else None)
        for i in range(6):
            batch = next(batches)
            is_replayed = [False, has_replay and i > 0]
            np.testing.assert_array_equal(batch.is_replayed, is_replayed)
            env, agent = batch.actor_output.env_outputs, batch.actor_output.agent_outputs
            assert env.observation['frame'].shape == (6, 2, 4)
            np.testing.assert_array_equal(env.done, batch.ends.numpy() != 0)
            actors = np.where(is_replayed, -1, batch.actor_output.level_id.numpy() - 10)
            np.testing.assert_array_equal(batch.actors, actors)
            np.testing.assert_array_equal(batch.actor_output.policy_version, [7, 7])
            outputs, _ = unroll(agent.action, env, batch.actor_output.agent_state)
            np.testing.assert_allclose(outputs.policy[:-1], agent.policy[1:], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                outputs.baseline[:-1], agent.baseline[1:], rtol=1e-4, atol=1e-5
            )
        behaviour.check()


class Constant(tf.Module):
    """Answers with the smallest and the largest of its many weights."""

    state_spec = ()

    def __init__(self, num_weights=30):
        super().__init__()
        self.weights = [tf.Variable(tf.zeros([1000])) for _ in range(num_weights)]
        self.acting_variables = self.weights

    def step(self, prev_action, env_output, state):
        weights = tf.stack([tf.convert_to_tensor(weight) for weight in self.weights])
        low, high = tf.reduce_min(weights), tf.reduce_max(weights)
        rows = tf.shape(prev_action)[0]
        logits = tf.tile(tf.stack([low, high, low])[tf.newaxis], [rows, 1])
        return AgentOutput(tf.zeros([rows], tf.int32), logits, tf.fill([rows], high)), state


def test_weights_are_replaced_atomically_with_their_version():
    learner, agent = Constant(), Constant()
    source = make_source(agent, num_actors=4, unroll_length=3)
    behaviour = BehaviourPolicy(agent, source)
    stop = threading.Event()

    @tf.function
    def update():
        for weight in learner.weights:
            weight.assign_add(tf.ones_like(weight))

    behaviour.publish(learner.weights, tf.constant(0, tf.int64))

    def publish():
        version = 0
        while not stop.is_set():
            # In place, while actors use the published weights.
            update()
            version += 1
            behaviour.publish(learner.weights, tf.constant(version, tf.int64))

    publisher = threading.Thread(target=publish)
    versions = []
    with behaviour.serving(), playing(source, 4):
        publisher.start()
        try:
            batches = source.batches(3)
            deadline = time.monotonic() + TIMEOUT
            while len(set(versions)) < 100 and time.monotonic() < deadline:
                output = next(batches).actor_output
                logits = output.agent_outputs.policy.numpy()
                np.testing.assert_array_equal(logits[1:, :, 0], logits[1:, :, 1])
                assert np.all(np.diff(logits[1:, :, 0], axis=0) >= 0)
                # Row 1 is the answer to row 0.
                np.testing.assert_array_equal(logits[1, :, 0], output.policy_version)
                versions += output.policy_version.numpy().tolist()
        finally:
            stop.set()
            publisher.join(TIMEOUT)
        behaviour.check()
    assert len(set(versions)) >= 100


class Failing(Constant):
    def step(self, prev_action, env_output, state):
        tf.debugging.assert_less(
            env_output.info.episode_step, 3, message='the agent is out of its depth'
        )
        return super().step(prev_action, env_output, state)


def test_an_error_of_the_agent_ends_serving_and_is_raised_by_check():
    agent = Failing(2)
    source = make_source(agent, num_actors=1, unroll_length=100)
    behaviour = BehaviourPolicy(agent, source)
    behaviour.check()
    with behaviour.serving():
        client = actor_nursery.WaitingClient(source.batcher.fd, 0, OBSERVATION)
        observation = (np.zeros(4, np.float32),)
        client.start(EpisodeEnd.TERMINATED, observation)
        with pytest.raises(ClosedError):
            for _ in range(4):
                client.step(1.0, EpisodeEnd.NOT_ENDED, observation)
        # Batches end, too.
        assert list(source.batches(1)) == []
    with pytest.raises(tf.errors.InvalidArgumentError, match='out of its depth'):
        behaviour.check()


def test_closing_is_not_an_error():
    agent = Constant(2)
    source = make_source(agent, num_actors=1)
    behaviour = BehaviourPolicy(agent, source)
    with behaviour.serving():
        source.batcher.close()
    behaviour.check()


def test_closing_ends_the_wait_for_a_partly_replayed_batch():
    agent = Constant(2)
    source = make_source(agent, num_actors=1)
    behaviour = BehaviourPolicy(agent, source)
    batches = source.batches(2, mix=make_mixer(agent, 2).batch)
    with behaviour.serving(), playing(source, 1):
        for _ in range(3):
            next(batches)
        source.batcher.close()
        # Some may have been assembled ahead.
        assert len(list(batches)) <= 2
    behaviour.check()


@pytest.mark.parametrize('has_replay', [False, True])
def test_abandoned_batches_stop_waiting(has_replay):
    agent = Constant(2)
    source = make_source(agent, num_actors=1)
    behaviour = BehaviourPolicy(agent, source)

    def forget():
        batches = source.batches(2, mix=make_mixer(agent, 2).batch if has_replay else None)
        next(batches)
        source.batcher.reset_actor(0)
        batches.close()
        del batches
        gc.collect()

    with behaviour.serving(), playing(source, 1):
        forgetting = threading.Thread(target=forget, daemon=True)
        forgetting.start()
        forgetting.join(TIMEOUT)
        assert not forgetting.is_alive()


def test_waiting_for_the_source_leaves_no_thread_in_tensorflow():
    """A thread that returned while Python shuts down would crash the process."""
    agent = Constant(2)
    source = make_source(agent, num_actors=1)
    behaviour = BehaviourPolicy(agent, source)
    before = {*threading.enumerate()}
    with behaviour.serving(), playing(source, 1):
        batches = source.batches(2)
        next(batches)
        batches.close()
    source.wait()
    assert not [each for each in {*threading.enumerate()} - before if 'loader' in each.name]
