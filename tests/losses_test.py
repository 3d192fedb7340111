"""Tests of impala/losses.py."""

import numpy as np
import pytest
import tensorflow as tf

from impala import losses
from impala.trajectory import AgentOutput, StepOutput, StepOutputInfo


def _softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def _unrolls(length=4, batch=3, num_actions=5, seed=0):
    """Returns agent, learner and environment outputs of `length + 1` random rows."""
    rng = np.random.default_rng(seed)
    rows = (length + 1, batch)

    def outputs():
        return AgentOutput(
            action=rng.integers(num_actions, size=rows, dtype=np.int32),
            policy_logits=rng.normal(size=(*rows, num_actions)).astype(np.float32),
            baseline=rng.normal(size=rows).astype(np.float32),
        )

    env_outputs = StepOutput(
        reward=rng.normal(scale=2.0, size=rows).astype(np.float32),
        info=StepOutputInfo(np.zeros(rows, np.float32), np.zeros(rows, np.int32)),
        done=rng.random(rows) < 0.3,
        observation={},
    )
    return outputs(), outputs(), env_outputs


def _slow_loss(agent_outputs, learner_outputs, env_outputs, config):
    """Section 4.2 in float64 and loops, thresholds 1, rewards clipped to [-1, 1]."""
    pi = _softmax(np.float64(learner_outputs.policy_logits))
    mu = _softmax(np.float64(agent_outputs.policy_logits))
    value = np.float64(learner_outputs.baseline)
    length, batch = value.shape[0] - 1, value.shape[1]
    parts = dict.fromkeys(('policy_gradient', 'baseline', 'entropy'), 0.0)
    for b in range(batch):
        later_v = value[length, b]
        for t in reversed(range(length)):
            # The action chosen in row t and its consequences stand in row t + 1.
            action = agent_outputs.action[t + 1, b]
            reward = min(max(env_outputs.reward[t + 1, b], -1.0), 1.0)
            gamma = 0.0 if env_outputs.done[t + 1, b] else config.discounting
            rho = min(1.0, pi[t, b, action] / mu[t + 1, b, action])
            delta = rho * (reward + gamma * value[t + 1, b] - value[t, b])
            v = value[t, b] + delta + gamma * rho * (later_v - value[t + 1, b])
            advantage = rho * (reward + gamma * later_v - value[t, b])
            parts['policy_gradient'] -= advantage * np.log(pi[t, b, action])
            parts['baseline'] += 0.5 * (v - value[t, b]) ** 2
            parts['entropy'] += np.sum(pi[t, b] * np.log(pi[t, b]))
            later_v = v
    return parts


def test_vtrace_loss_equals_the_slow_one():
    config = losses.LossConfig(discounting=0.9, entropy_cost=0.07, baseline_cost=0.3)
    unrolls = _unrolls()
    total, parts, _ = losses.vtrace_loss(*unrolls, config)
    expected = _slow_loss(*unrolls, config)
    assert set(parts) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        total,
        expected['policy_gradient'] + 0.3 * expected['baseline'] + 0.07 * expected['entropy'],
        rtol=1e-4,
    )


def test_rewards_in_another_unit_do_not_matter_if_it_is_given():
    config = losses.LossConfig(reward_clipping='none', discounting=0.9)
    agent_outputs, learner_outputs, env_outputs = _unrolls()
    factors = np.array([1000.0, 1.0, 0.01], np.float32)
    normalised = tf.constant(learner_outputs.baseline)

    def loss(factors, value_stddev):
        with tf.GradientTape() as tape:
            tape.watch(normalised)
            total, parts, targets = losses.vtrace_loss(
                agent_outputs,
                learner_outputs._replace(baseline=factors * normalised),
                env_outputs._replace(reward=factors * env_outputs.reward),
                config,
                value_stddev,
            )
        return parts, targets, tape.gradient(total, normalised)

    plain, plain_targets, plain_gradient = loss(np.float32(1.0), None)
    parts, targets, gradient = loss(factors, tf.constant(factors))
    for name, value in plain.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(targets, factors * plain_targets, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_section_4_2():
    config = losses.LossConfig(discounting=0.9, entropy_cost=0.0, baseline_cost=0.3)
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=1, batch=2)
    agent_outputs = agent_outputs._replace(policy_logits=learner_outputs.policy_logits[[1, 0]])
    logits = tf.constant(learner_outputs.policy_logits)
    baseline = tf.constant(learner_outputs.baseline)
    with tf.GradientTape() as tape:
        tape.watch([logits, baseline])
        total, _, _ = losses.vtrace_loss(
            agent_outputs,
            AgentOutput(action=learner_outputs.action, policy_logits=logits, baseline=baseline),
            env_outputs,
            config,
        )
    logits_gradient, baseline_gradient = tape.gradient(total, [logits, baseline])

    # On-policy, one step: v - V = advantage = r + gamma V' - V, seen as a constant.
    value = np.float64(learner_outputs.baseline)
    rewards = np.clip(env_outputs.reward[1], -1.0, 1.0)
    advantage = rewards + 0.9 * ~env_outputs.done[1] * value[1] - value[0]
    one_hot = np.eye(5)[agent_outputs.action[1]]
    pi = _softmax(np.float64(learner_outputs.policy_logits[0]))
    np.testing.assert_allclose(logits_gradient[0], advantage[:, None] * (pi - one_hot), rtol=1e-4)
    np.testing.assert_array_equal(logits_gradient[1], np.zeros_like(pi))
    np.testing.assert_allclose(baseline_gradient[0], -0.3 * advantage, rtol=1e-4)
    np.testing.assert_array_equal(baseline_gradient[1], [0.0, 0.0])


def test_policy_gradient_does_not_flow_into_the_advantages():
    log_probs, advantages = tf.constant([[-1.0, -2.0]]), tf.constant([[3.0, 5.0]])
    with tf.GradientTape() as tape:
        tape.watch([log_probs, advantages])
        loss = losses.policy_gradient_loss(log_probs, advantages)
    assert loss == 13.0
    gradients = tape.gradient(loss, [log_probs, advantages])
    np.testing.assert_array_equal(gradients[0], [[-3.0, -5.0]])
    assert gradients[1] is None


def test_terms_are_summed_over_time_and_batch():
    config = losses.LossConfig()
    agent_outputs, learner_outputs, env_outputs = _unrolls()
    twice = tf.nest.map_structure(
        lambda x: np.concatenate([x, x], axis=1), (agent_outputs, learner_outputs, env_outputs)
    )
    total, _, _ = losses.vtrace_loss(agent_outputs, learner_outputs, env_outputs, config)
    total_twice, _, _ = losses.vtrace_loss(*twice, config)
    np.testing.assert_allclose(total_twice, 2 * total, rtol=1e-5)


@pytest.mark.parametrize(
    'change',
    [
        {'clip_rho_threshold': 0.3},
        {'clip_c_threshold': 0.3},
        {'clip_pg_rho_threshold': 0.3},
        {'lambda_': 0.3},
        {'reward_clipping': 'none'},
        {'reward_clipping': 'soft_asymmetric'},
    ],
)
def test_config_reaches_the_loss(change):
    unrolls = _unrolls()
    plain, _, _ = losses.vtrace_loss(*unrolls, losses.LossConfig())
    changed, _, _ = losses.vtrace_loss(*unrolls, losses.LossConfig(**change))
    assert abs(float(plain) - float(changed)) > 1e-3


def test_entropy_of_a_uniform_policy_is_its_maximum():
    uniform = losses.entropy_loss(tf.zeros([2, 3, 7]))
    np.testing.assert_allclose(uniform, -6 * np.log(7), rtol=1e-6)
    assert losses.entropy_loss(tf.random.stateless_normal([2, 3, 7], [1, 2])) > uniform


def test_entropy_gradient_is_finite_for_a_certain_policy():
    logits = tf.constant([[[0.0, 200.0, -200.0]]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.entropy_loss(logits)
    assert loss == 0.0
    assert np.all(np.isfinite(tape.gradient(loss, logits)))


@pytest.mark.parametrize(
    ('clipping', 'rewards', 'expected'),
    [
        ('abs_one', [-7.0, -0.5, 0.0, 0.5, 7.0], [-1.0, -0.5, 0.0, 0.5, 1.0]),
        ('none', [-7.0, -0.5, 0.0, 0.5, 7.0], [-7.0, -0.5, 0.0, 0.5, 7.0]),
        # tanh(1) = .76159416, tanh(.2) = .19737532
        (
            'soft_asymmetric',
            [-5.0, -1.0, 0.0, 1.0, 5.0, 1000.0, -1000.0],
            [-1.1423912, -0.29606298, 0.0, 0.9868766, 3.8079708, 5.0, -1.5],
        ),
    ],
)
def test_clip_rewards(clipping, rewards, expected):
    np.testing.assert_allclose(
        losses.clip_rewards(tf.constant(rewards), clipping), expected, rtol=1e-6
    )


def test_unknown_clipping_is_refused_by_name():
    with pytest.raises(ValueError, match="abs_one, soft_asymmetric, none, not 'abs_two'"):
        losses.clip_rewards(tf.constant([1.0]), 'abs_two')
