"""Tests of impala/learning/learner.py."""

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf
from agents import (
    _NUM_ACTIONS,
    _OBSERVATION_SIZE,
    _SPEC,
    EmbeddingAgent,
    batch_of,
    batch_of_images,
    encoder_agent,
    image_decoder,
    mlp_agent,
)

from impala.config import LearnerConfig
from impala.learning.learner import Learner
from impala.learning.losses import LossInputs, appo_loss, autoencoder_loss, vtrace_loss
from impala.networks.agent import Agent, AgentConfig
from impala.trajectory import (
    ActorOutput,
    AgentOutput,
    StepOutput,
    StepOutputInfo,
)


class InfiniteSlopeAgent(EmbeddingAgent):
    """Its baseline is finite at 0, but the slope of its baseline is not."""

    def value(self, x):
        return tf.sqrt(x)


def plain_agent():
    """Returns an agent without a core, whose train step is traced in half of the time."""
    return mlp_agent('none')


def _config(**kwargs):
    return LearnerConfig.of(**{'batch_size': 3, 'unroll_length': 5, **kwargs})


def _batch_with_state(config, seed):
    state = tf.random.stateless_normal([2, config.batch_size, 8], [seed, 0])
    return batch_of(config, snt.LSTMState(*tf.unstack(state)), seed)


def _with_reward(batch, reward):
    rewards = batch.env_outputs.reward.numpy()
    rewards[2, 1] = reward
    return batch._replace(env_outputs=batch.env_outputs._replace(reward=tf.constant(rewards)))


def _values(variables):
    return [variable.numpy() for variable in variables]


def _assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _inputs(agent, batch, outputs, **others):
    return LossInputs(agent.actions, batch.agent_outputs, outputs, batch.env_outputs, **others)


def _gradients(agent, batch, config):
    with tf.GradientTape() as tape:
        outputs, _ = agent.unroll(batch.agent_outputs.action, batch.env_outputs, batch.agent_state)
        total, _, _ = vtrace_loss(_inputs(agent, batch, outputs), config.loss)
    return _values(tape.gradient(total, agent.trainable_variables))


def _global_norm(gradients):
    return np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in gradients))


@pytest.mark.parametrize(
    ('settings', 'levels'),
    [
        ({'gradient_clip_norm': 1.0}, ()),
        ({'optimizer': 'adam', 'loss': 'appo', 'target_update_steps': 2, 'kl_cost': 0.1}, ()),
        ({'reward_clipping': 'none', 'final_entropy_cost': 0.0}, ('one', 'other')),
    ],
)
def test_updates_are_the_same_without_graphs(settings, levels):
    """As `--debug` computes them."""
    config = _config(learning_rate=0.01, total_agent_steps=150, **settings)
    results = []
    for is_eager in (False, True):
        targets = mlp_agent(popart_levels=levels) if config.loss.target_update_steps else None
        learner = Learner(mlp_agent(popart_levels=levels), config, target_agent=targets)
        before = _values(learner.weights)
        tf.config.run_functions_eagerly(is_eager)
        try:
            metrics = [learner.step(_batch_with_state(config, seed)) for seed in range(3)]
        finally:
            tf.config.run_functions_eagerly(False)
        results.append((_values(learner.variables), metrics))
        assert any(np.any(a != b) for a, b in zip(before, _values(learner.weights), strict=True))
    (variables, metrics), (eager_variables, eager_metrics) = results
    for a, b in zip(eager_variables, variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(eager_metrics, metrics, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_steps_follow_rmsprop_down_the_gradient_of_the_loss():
    config = _config(
        learning_rate=0.01, decay=0.9, momentum=0.5, epsilon=0.2, total_agent_steps=150
    )
    agent = mlp_agent()
    learner = Learner(agent, config)
    weights = [np.float64(v) for v in _values(agent.trainable_variables)]
    squares = [np.ones_like(w) for w in weights]
    steps = [np.zeros_like(w) for w in weights]
    for update in range(4):
        batch = batch_of(config, agent.initial_state(3), seed=update)
        gradients = _gradients(agent, batch, config)
        metrics = learner.step(batch)
        rate = 0.01 * (1 - update * 15 / 150)
        np.testing.assert_allclose(metrics['learning_rate'], rate, rtol=1e-6)
        np.testing.assert_allclose(metrics['gradient_norm'], _global_norm(gradients), rtol=1e-4)
        for i, g in enumerate(gradients):
            squares[i] = 0.9 * squares[i] + 0.1 * g**2
            steps[i] = 0.5 * steps[i] + rate * g / np.sqrt(squares[i] + 0.2)
            weights[i] -= steps[i]
        for actual, expected in zip(agent.trainable_variables, weights, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)
    assert learner.updates.numpy() == 4
    assert learner.agent_steps.numpy() == 60


def test_metrics_are_the_documented_scalars():
    config = _config()
    agent = plain_agent()
    batch = batch_of(config, agent.initial_state(3))
    outputs, _ = agent.unroll(batch.agent_outputs.action, batch.env_outputs, batch.agent_state)
    total, parts, _ = vtrace_loss(_inputs(agent, batch, outputs), config.loss)
    metrics = Learner(agent, config).step(batch)
    assert {name: value.dtype for name, value in metrics.items()} == {
        'loss/total': tf.float32,
        'loss/policy_gradient': tf.float32,
        'loss/baseline': tf.float32,
        'loss/entropy': tf.float32,
        'gradient_norm': tf.float32,
        'learning_rate': tf.float32,
        'policy_lag_mean': tf.float32,
        'policy_lag_max': tf.int64,
        'skipped': tf.bool,
    }
    assert all(value.shape == [] for value in metrics.values())
    np.testing.assert_allclose(metrics['loss/total'], total, rtol=1e-4)
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[f'loss/{name}'], part, rtol=1e-4)
    assert not metrics['skipped']


@pytest.mark.parametrize('loss', ['vtrace', 'appo'])
def test_intrinsic_rewards_are_added_after_clipping(loss):
    intrinsic = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)

    def train(change_of_rewards, intrinsic_reward):
        # The rewards are no input of this agent.
        agent = EmbeddingAgent(np.random.default_rng(0).normal(size=(3, 4)))
        learner = Learner(agent, _config(loss=loss, reward_clipping=clipping))
        for update in range(3):
            batch = batch_of(learner.config, seed=update)
            reward = batch.env_outputs.reward.numpy()
            reward[1:] = change_of_rewards(reward[1:])
            batch = batch._replace(
                env_outputs=batch.env_outputs._replace(reward=tf.constant(reward))
            )
            metrics = learner.step(batch, intrinsic_reward=intrinsic_reward)
            assert ('intrinsic_reward' in metrics) == (intrinsic_reward is not None)
        return metrics, _values(learner.variables)

    clipping = 'none'
    expected, variables = train(lambda reward: np.clip(4 * reward, -1, 1) + intrinsic, None)
    clipping = 'abs_one'
    metrics, same = train(lambda reward: 4 * reward, intrinsic)
    np.testing.assert_allclose(metrics['intrinsic_reward'], intrinsic.mean(), rtol=1e-5)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-6)
    for value, other in zip(same, variables, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-7)


def test_without_intrinsic_rewards_the_update_is_the_same_to_the_bit():
    results = []
    for intrinsic_reward in (None, tf.zeros([5, 3])):
        agent = mlp_agent()
        learner = Learner(agent, _config())
        for update in range(3):
            batch = batch_of(learner.config, agent.initial_state(3), seed=update)
            learner.step(batch, intrinsic_reward=intrinsic_reward)
        results.append(_values(learner.variables))
    _assert_equal(*results)


def test_learning_rate_falls_linearly_to_zero_and_stays_there():
    config = _config(learning_rate=0.5, total_agent_steps=60)
    agent = plain_agent()
    learner = Learner(agent, config)
    batch = batch_of(config, agent.initial_state(3))
    rates = [float(learner.step(batch)['learning_rate']) for _ in range(4)]
    np.testing.assert_allclose(rates, [0.5, 0.375, 0.25, 0.125], rtol=1e-6)
    before = _values(agent.trainable_variables)
    assert [float(learner.step(batch)['learning_rate']) for _ in range(2)] == [0.0, 0.0]
    _assert_equal(_values(agent.trainable_variables), before)


@pytest.mark.parametrize('bad', ['nan', 'infinite_reward', 'nan_behaviour'])
def test_a_non_finite_loss_changes_nothing(bad):
    config = _config(reward_clipping='none', momentum=0.9, learning_rate=0.01)
    agent = plain_agent()
    learner = Learner(agent, config)
    good = batch_of(config, agent.initial_state(3))
    learner.step(good)
    if bad == 'nan_behaviour':
        logits = good.agent_outputs.policy * np.nan
        poisoned = good._replace(agent_outputs=good.agent_outputs._replace(policy=logits))
    else:
        poisoned = _with_reward(good, np.nan if bad == 'nan' else np.inf)
    everything = [*agent.variables, *learner.optimizer.variables]
    assert len(everything) == 3 * len(agent.trainable_variables)
    before = _values(everything)
    metrics = learner.step(poisoned)
    assert metrics['skipped']
    assert not np.isfinite(metrics['loss/total'])
    _assert_equal(_values(everything), before)
    assert learner.updates.numpy() == 1
    assert learner.agent_steps.numpy() == 30

    assert not learner.step(good)['skipped']
    assert learner.updates.numpy() == 2
    assert not np.array_equal(agent.trainable_variables[0], before[0])
    assert all(np.all(np.isfinite(v)) for v in everything)


def test_a_non_finite_gradient_changes_nothing():
    config = _config()
    agent = InfiniteSlopeAgent(np.zeros((_NUM_ACTIONS, _NUM_ACTIONS + 1)))
    learner = Learner(agent, config)
    before = _values(learner.variables)
    metrics = learner.step(batch_of(config))
    assert np.isfinite(metrics['loss/total'])
    assert not np.isfinite(metrics['gradient_norm'])
    assert metrics['skipped']
    assert learner.updates.numpy() == 0
    learner.agent_steps.assign(0)
    _assert_equal(_values(learner.variables), before)


@pytest.mark.parametrize(('clip_norm', 'scaled'), [(0.25, True), (1e6, False)])
def test_gradients_are_clipped_to_their_global_norm(clip_norm, scaled):
    config = _config(gradient_clip_norm=clip_norm, learning_rate=0.1, decay=0.9, epsilon=0.1)
    agent = plain_agent()
    learner = Learner(agent, config)
    batch = batch_of(config, agent.initial_state(3))
    before = _values(agent.trainable_variables)
    gradients = _gradients(agent, batch, config)
    norm = _global_norm(gradients)
    assert (norm > clip_norm) == scaled
    metrics = learner.step(batch)
    np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-4)
    for old, new, g in zip(before, agent.trainable_variables, gradients, strict=True):
        clipped = g * (clip_norm / norm if scaled else 1.0)
        expected = old - 0.1 * clipped / np.sqrt(0.9 + 0.1 * clipped**2 + 0.1)
        np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_embeddings_count_like_dense_ones():
    config = _config(learning_rate=0.1, decay=0.9, epsilon=0.1)
    table = np.random.default_rng(0).normal(size=(_NUM_ACTIONS, _NUM_ACTIONS + 1))
    agent = EmbeddingAgent(table)
    learner = Learner(agent, config)
    batch = batch_of(config)
    rows = tf.one_hot(batch.agent_outputs.action, _NUM_ACTIONS)
    dense = tf.constant(table, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(dense)
        looked_up = tf.einsum('tba,ac->tbc', rows, dense)
        outputs = AgentOutput(None, looked_up[..., :-1], looked_up[..., -1])
        total, _, _ = vtrace_loss(_inputs(agent, batch, outputs), config.loss)
    gradient = tape.gradient(total, dense).numpy()
    metrics = learner.step(batch)
    np.testing.assert_allclose(metrics['gradient_norm'], _global_norm([gradient]), rtol=1e-4)
    expected = table - 0.1 * gradient / np.sqrt(0.9 + 0.1 * gradient**2 + 0.1)
    np.testing.assert_allclose(agent.table, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(agent.unused, [1.0, 2.0])


def test_policy_lag_counts_updates_since_the_acting_weights():
    config = _config()
    agent = plain_agent()
    learner = Learner(agent, config)
    learner.updates.assign(10)
    batch = batch_of(config, agent.initial_state(3))
    metrics = learner.step(batch._replace(policy_version=tf.constant([10, 4, 9], tf.int64)))
    np.testing.assert_allclose(metrics['policy_lag_mean'], 7 / 3, rtol=1e-6)
    assert metrics['policy_lag_max'].numpy() == 6
    metrics = learner.step(batch._replace(policy_version=tf.constant([11, 11, 11], tf.int64)))
    assert metrics['policy_lag_max'].numpy() == 0


def test_replayed_unrolls_train_alike_but_are_counted_apart():
    config = _config(replay_fraction=0.5, total_agent_steps=100)
    batch = batch_of(config, plain_agent().initial_state(3))
    batch = batch._replace(policy_version=tf.constant([10, 4, 7], tf.int64))
    learners = [Learner(plain_agent(), each) for each in (config, _config(total_agent_steps=100))]
    for learner in learners:
        learner.updates.assign(10)
    metrics = learners[0].step(batch, is_replayed=tf.constant([False, True, True]))
    assert learners[0].counts() == (11, 5)
    np.testing.assert_allclose(metrics['replayed_fraction'], 2 / 3, rtol=1e-6)
    assert [metrics[name].numpy() for name in ('policy_lag_mean', 'policy_lag_max')] == [0, 0]
    assert metrics['replayed_policy_lag_mean'].numpy() == 4.5
    assert metrics['replayed_policy_lag_max'].numpy() == 6
    # Fresh and replayed unrolls train alike.
    assert 'replayed_fraction' not in learners[1].step(batch)
    assert learners[1].counts() == (11, 15)
    _assert_equal(*[_values(learner.agent.trainable_variables) for learner in learners])
    # A batch without replayed unrolls, then the same batch again.
    for is_fresh, agent_steps in ((True, 20), (False, 20)):
        metrics = learners[0].step(batch, is_fresh, tf.zeros([3], tf.bool))
        assert metrics['replayed_fraction'].numpy() == 0
        assert learners[0].counts()[1] == agent_steps
    assert learners[0]._step.experimental_get_tracing_count() == 1


def test_agent_state_of_the_batch_is_used():
    config = _config()
    losses = []
    for offset in (0.0, 1.0):
        agent = mlp_agent()
        state = tf.nest.map_structure(lambda s, o=offset: s + o, agent.initial_state(3))
        batch = batch_of(config, state)
        not_done = tf.zeros_like(batch.env_outputs.done)
        batch = batch._replace(env_outputs=batch.env_outputs._replace(done=not_done))
        losses.append(float(Learner(agent, config).step(batch)['loss/total']))
    assert losses[0] != losses[1]


def test_checkpoint_holds_all_that_the_next_steps_depend_on(tmp_path):
    config = _config(momentum=0.9, learning_rate=0.01, total_agent_steps=1000)
    learner = Learner(mlp_agent(), config)
    state = learner.agent.initial_state(3)
    learner.step(batch_of(config, state, seed=0))
    path = tf.train.Checkpoint(learner=learner).save(str(tmp_path / 'checkpoint'))

    tf.random.set_seed(1)
    restored = Learner(Agent(AgentConfig('mlp', 'lstm', 8), _SPEC), config)
    tf.train.Checkpoint(learner=restored).restore(path).assert_consumed()
    for seed in (1, 2):
        expected = learner.step(batch_of(config, state, seed))
        actual = restored.step(batch_of(config, state, seed))
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=name)
    for a, b in zip(restored.variables, learner.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert restored.agent_steps.numpy() == 45


def test_step_is_traced_once():
    config = _config()
    agent = plain_agent()
    learner = Learner(agent, config)
    for seed in range(3):
        learner.step(batch_of(config, agent.initial_state(3), seed))
    assert learner._step.experimental_get_tracing_count() == 1


def test_batches_of_another_shape_are_refused():
    agent = plain_agent()
    learner = Learner(agent, _config())
    for other in (_config(batch_size=2), _config(unroll_length=4)):
        batch = batch_of(other, agent.initial_state(other.batch_size))
        with pytest.raises(ValueError, match='unroll_length 5 and batch_size 3'):
            learner.step(batch)


_APPO = {
    'loss': 'appo',
    'optimizer': 'adam',
    'learning_rate': 0.01,
    'target_update_steps': 2,
    'normalize_advantages': True,
    'kl_cost': 0.1,
}


def appo_learner(**changes):
    config = _config(**(_APPO | changes))
    has_target = config.loss.target_update_steps > 0
    return Learner(plain_agent(), config, target_agent=plain_agent() if has_target else None)


def test_the_target_network_is_updated_periodically():
    learner = appo_learner(target_update_steps=3)
    for variable in learner.target_agent.trainable_variables:
        variable.assign_add(tf.ones_like(variable))
    history = []
    for update in range(8):
        history.append(_values(learner.agent.trainable_variables))
        learner.step(batch_of(learner.config, learner.agent.initial_state(3), seed=update))
        expected = history[update - update % 3]
        _assert_equal(_values(learner.target_agent.trainable_variables), expected)
    assert not np.array_equal(history[0][0], history[1][0])


@pytest.mark.parametrize('target_update_steps', [0, 2])
def test_metrics_of_appo_are_those_of_its_loss(target_update_steps):
    learner = appo_learner(target_update_steps=target_update_steps)
    agent, config = learner.agent, learner.config
    batches = [batch_of(config, agent.initial_state(3), seed=seed) for seed in range(2)]

    def outputs(batch):
        inputs = (batch.agent_outputs.action, batch.env_outputs, batch.agent_state)
        return agent.unroll(*inputs)[0]

    # At the second update the target network still has the initial weights.
    target = outputs(batches[1]) if target_update_steps else None
    learner.step(batches[0])
    batch = batches[1]
    inputs = _inputs(agent, batch, outputs(batch), target_outputs=target)
    total, parts, _ = appo_loss(inputs, config.loss)
    metrics = learner.step(batch)
    np.testing.assert_allclose(metrics['loss/total'], total, rtol=1e-4)
    assert set(parts) == {'policy_gradient', 'baseline', 'entropy', 'kl'}
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[f'loss/{name}'], part, rtol=1e-4, err_msg=name)


def test_steps_follow_adam_down_the_gradient_of_the_loss():
    config = _config(
        optimizer='adam',
        learning_rate=0.01,
        adam_beta1=0.8,
        adam_beta2=0.75,
        adam_epsilon=0.5,
        total_agent_steps=150,
    )
    agent = plain_agent()
    learner = Learner(agent, config)
    weights = [np.float64(v) for v in _values(agent.trainable_variables)]
    means, squares = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for update in range(3):
        batch = batch_of(config, agent.initial_state(3), seed=update)
        gradients = _gradients(agent, batch, config)
        learner.step(batch)
        # In the order of section 2 of the paper, without bias correction of epsilon.
        t = update + 1
        rate = 0.01 * (1 - update * 15 / 150) * np.sqrt(1 - 0.75**t) / (1 - 0.8**t)
        for i, g in enumerate(gradients):
            means[i] = 0.8 * means[i] + 0.2 * g
            squares[i] = 0.75 * squares[i] + 0.25 * np.float64(g) ** 2
            weights[i] -= rate * means[i] / (np.sqrt(squares[i]) + 0.5)
        for actual, expected in zip(agent.trainable_variables, weights, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


def test_reused_batches_count_as_updates_only():
    learner = appo_learner(total_agent_steps=60, entropy_cost=0.5, final_entropy_cost=0.1)
    batches = [batch_of(learner.config, learner.agent.initial_state(3), seed) for seed in range(2)]
    seen = []
    for batch, is_fresh in [(0, True), (0, False), (1, True), (0, False), (1, False)]:
        metrics = learner.step(batches[batch], is_fresh)
        seen.append(
            [*learner.counts(), metrics['policy_lag_max'].numpy()]
            + [metrics['learning_rate'].numpy(), metrics['entropy_cost'].numpy()]
        )
    # Updates, agent steps, policy lag, learning rate, entropy cost.
    expected = [
        [1, 15, 0, 0.01, 0.5],
        [2, 15, 1, 0.0075, 0.4],
        [3, 30, 2, 0.0075, 0.4],
        [4, 30, 3, 0.005, 0.3],
        [5, 30, 4, 0.005, 0.3],
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert learner._step.experimental_get_tracing_count() == 1


def test_the_final_entropy_cost_is_reached():
    learner = appo_learner(total_agent_steps=15, entropy_cost=0.5, final_entropy_cost=0.0)
    batch = batch_of(learner.config, learner.agent.initial_state(3))
    assert [float(learner.step(batch)['entropy_cost']) for _ in range(3)] == [0.5, 0.0, 0.0]


def test_the_final_learning_rate_is_kept():
    learner = appo_learner(total_agent_steps=30, final_learning_rate=0.004)
    batch = batch_of(learner.config, learner.agent.initial_state(3))
    rates = [learner.step(batch)['learning_rate'] for _ in range(4)]
    np.testing.assert_allclose(rates, [0.01, 0.007, 0.004, 0.004], rtol=1e-6)


def test_a_non_finite_appo_loss_changes_nothing():
    learner = appo_learner(reward_clipping='none')
    good = batch_of(learner.config, learner.agent.initial_state(3))
    learner.step(good)
    before = _values([*learner.agent.variables, *learner.optimizer.variables])
    logits = good.agent_outputs.policy * np.nan
    nan_behaviour = good._replace(agent_outputs=good.agent_outputs._replace(policy=logits))
    for poisoned in (_with_reward(good, np.nan), _with_reward(good, np.inf), nan_behaviour):
        assert learner.step(poisoned)['skipped']
        _assert_equal([*learner.agent.variables, *learner.optimizer.variables], before)
    assert learner.updates.numpy() == 1
    assert not learner.step(good)['skipped']


def test_checkpoint_holds_target_network_and_adam(tmp_path):
    learner = appo_learner(target_update_steps=3)
    state = learner.agent.initial_state(3)
    for seed in range(2):
        learner.step(batch_of(learner.config, state, seed))
    path = tf.train.Checkpoint(learner=learner).save(str(tmp_path / 'checkpoint'))
    restored = appo_learner(target_update_steps=3)
    tf.train.Checkpoint(learner=restored).restore(path).assert_consumed()
    for seed in (2, 3):
        for each in (learner, restored):
            each.step(batch_of(learner.config, state, seed))
    for a, b in zip(restored.variables, learner.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert len(learner.variables) == 4 * len(learner.agent.variables) + 3


@pytest.mark.parametrize('has_target', [False, True])
def test_a_target_network_needs_target_update_steps_and_vice_versa(has_target):
    config = _config(loss='appo', target_update_steps=0 if has_target else 5)
    with pytest.raises(ValueError, match='target_update_steps=. does not fit target_agent'):
        Learner(plain_agent(), config, target_agent=plain_agent() if has_target else None)


@pytest.mark.parametrize(
    'changes',
    [
        {'learning_rate': 0.02},
        {'loss': 'appo', 'learning_rate': 0.02},
        {'loss': 'appo', 'learning_rate': 0.01, 'optimizer': 'adam', 'target_update_steps': 4},
        {'loss': 'appo', 'learning_rate': 0.02, 'kl_cost': 0.1, 'normalize_advantages': True},
    ],
)
def test_learns_to_choose_the_rewarded_action(changes):
    """In episodes of one step, the frame shows which action earns 1; the others earn 0."""
    config = LearnerConfig.of(batch_size=32, unroll_length=4, total_agent_steps=10**6, **changes)
    agent = mlp_agent(core='none')
    target_agent = mlp_agent(core='none') if config.loss.target_update_steps else None
    learner = Learner(agent, config, target_agent=target_agent)
    rng = np.random.default_rng(0)
    rows = (config.unroll_length + 1, config.batch_size)
    zeros = np.zeros(rows, np.int32)
    policy = tf.function(lambda action, outputs: agent.unroll(action, outputs, ())[0])

    def episodes():
        best = rng.integers(_NUM_ACTIONS, size=rows)
        env_outputs = StepOutput(
            reward=np.zeros(rows, np.float32),
            info=StepOutputInfo(np.zeros(rows, np.float32), zeros, zeros),
            done=np.ones(rows, bool),
            observation={'frame': np.eye(_OBSERVATION_SIZE, dtype=np.float32)[best]},
        )
        # The previous reward and action say nothing here, so the agent sees zeros.
        logits = policy(zeros, env_outputs).policy.numpy()
        chosen = np.argmax(logits + rng.gumbel(size=logits.shape), -1).astype(np.int32)
        rewards = np.float32(chosen == best)
        # Row t + 1 holds what was decided in row t.
        later = [np.roll(x, 1, axis=0) for x in (rewards, chosen, logits)]
        batch = ActorOutput(
            level_id=np.zeros(config.batch_size, np.int32),
            policy_version=np.full(config.batch_size, learner.updates.numpy()),
            agent_state=(),
            env_outputs=env_outputs._replace(reward=later[0]),
            agent_outputs=AgentOutput(later[1], later[2], np.zeros(rows, np.float32)),
        )
        return tf.nest.map_structure(tf.convert_to_tensor, batch), rewards.mean()

    first = np.mean([episodes()[1] for _ in range(10)])
    for _ in range(100):
        learner.step(episodes()[0])
    last = np.mean([episodes()[1] for _ in range(10)])
    assert first < 0.55
    assert last > 0.9


def _named(variables):
    return {variable.name: variable.numpy() for variable in variables}


@pytest.mark.parametrize('changes', [{}, {'loss': 'appo', 'target_update_steps': 2}], ids=str)
def test_the_autoencoder_loss_trains_only_decoder_and_encoder(changes):
    config = _config(autoencoder_cost=30.0, learning_rate=0.01, **changes)
    has_target = 'target_update_steps' in changes
    learners = [
        Learner(encoder_agent(), config, None, encoder_agent() if has_target else None, decoder)
        for decoder in (None, image_decoder())
    ]
    plain, learner = learners
    batch = batch_of_images(config, learner.agent.initial_state(3))
    frames = tf.reshape(batch.env_outputs.observation['frame'][:-1], [-1, 9, 14, 3])
    before = [_named(each.variables) for each in learners]
    # The last row is also the first of the next unroll, and counts there.
    expected = autoencoder_loss(frames, learner.reconstruct(frames))
    metrics = [each.step(batch) for each in learners]
    assert 'loss/autoencoder' not in metrics[0]
    np.testing.assert_allclose(metrics[1]['loss/autoencoder'], expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics[1]['loss/total'], metrics[0]['loss/total'] + 30 * expected, rtol=1e-4
    )
    for name in ('policy_gradient', 'baseline', 'entropy'):
        np.testing.assert_allclose(
            metrics[1][f'loss/{name}'], metrics[0][f'loss/{name}'], rtol=1e-4, atol=1e-5
        )
    encoder = [v.name for v in learner.agent.trainable_variables if 'encoder_torso' in v.name]
    assert len(encoder) == 8
    after = [_named(each.agent.trainable_variables) for each in learners]
    for name in after[0]:
        np.testing.assert_array_equal(before[0][name], before[1][name])
        moved = np.abs(after[1][name] - after[0][name]).max()
        # Weights of policy, baseline and core change as they do without a decoder.
        assert moved > 1e-5 if name in encoder else moved < 1e-6, (name, moved)
    for variable in learner.decoder.trainable_variables:
        assert np.any(variable.numpy() != before[1][variable.name]), variable.name


def test_the_loss_of_the_policy_does_not_reach_the_decoder():
    config = _config(autoencoder_cost=0.0, learning_rate=0.01)
    learner = Learner(encoder_agent(), config, decoder=image_decoder())
    plain = Learner(encoder_agent(), config)
    before = _named(learner.decoder.variables)
    batch = batch_of_images(config, learner.agent.initial_state(3))
    metrics = learner.step(batch)
    assert metrics.keys() == plain.step(batch).keys()
    _assert_equal(_named(learner.decoder.variables).values(), before.values())
    # The encoder is trained as it is without a decoder.
    for mine, other in zip(learner.weights, plain.weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert any(
        np.any(v != w)
        for v, w in zip(learner.weights, encoder_agent().trainable_variables, strict=True)
    )


def test_published_weights_have_no_decoder():
    learner = Learner(encoder_agent(), _config(), decoder=image_decoder())
    shapes = [weight.shape for weight in encoder_agent().trainable_variables]
    assert [weight.shape for weight in learner.weights] == shapes


def test_reconstructions_converge_to_the_frames():
    # Without the baseline loss: on one repeated batch its targets run away and ruin the encoder.
    config = _config(
        baseline_cost=0.0,
        autoencoder_cost=100.0,
        optimizer='adam',
        learning_rate=0.003,
        total_agent_steps=10**6,
    )
    learner = Learner(encoder_agent(core='none'), config, decoder=image_decoder())
    batch = batch_of_images(config)
    history = [float(learner.step(batch)['loss/autoencoder']) for _ in range(400)]
    assert history[-1] < 0.1 * history[0]
    frames = batch.env_outputs.observation['frame'][0]
    made = learner.reconstruct(frames).numpy()
    # White where the square is and grey elsewhere, not just the mean of all frames.
    is_white = frames.numpy() == 255
    assert made[is_white].mean() > 0.8
    assert abs(made[~is_white].mean() - 70 / 255) < 0.05
    # The features of the policy change with the frame.
    assert not np.allclose(learner.agent.encode(frames[:1]), learner.agent.encode(frames[1:2]))


def test_checkpoint_holds_decoder_and_its_slots(tmp_path):
    config = _config(learning_rate=0.01, momentum=0.5)
    learner = Learner(encoder_agent(), config, decoder=image_decoder())
    state = learner.agent.initial_state(3)
    for seed in range(2):
        learner.step(batch_of_images(config, state, seed))
    path = tf.train.Checkpoint(learner=learner).save(str(tmp_path / 'checkpoint'))
    restored = Learner(encoder_agent(), config, decoder=image_decoder())
    tf.train.Checkpoint(learner=restored).restore(path).assert_consumed()
    for each in (learner, restored):
        each.step(batch_of_images(config, state, 2))
    for a, b in zip(restored.variables, learner.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    trained = [*learner.agent.trainable_variables, *learner.decoder.trainable_variables]
    assert len(learner.variables) == 3 * len(trained) + 2
    # Actors restore only the agent.
    alone = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=encoder_agent()))
    status = alone.restore(path).expect_partial()
    status.assert_existing_objects_matched()
