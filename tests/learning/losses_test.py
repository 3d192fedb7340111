"""Tests of impala/learning/losses.py."""

import dataclasses

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf

from impala.config import LossConfig
from impala.learning import losses
from impala.networks.action_distribution import ActionDistribution
from impala.trajectory import ActionSpec, AgentOutput, StepOutput, StepOutputInfo


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
            policy=rng.normal(size=(*rows, num_actions)).astype(np.float32),
            baseline=rng.normal(size=rows).astype(np.float32),
        )

    env_outputs = StepOutput(
        reward=rng.normal(scale=2.0, size=rows).astype(np.float32),
        info=StepOutputInfo(np.zeros(rows, np.float32), *2 * [np.zeros(rows, np.int32)]),
        done=rng.random(rows) < 0.3,
        observation={},
    )
    return outputs(), outputs(), env_outputs


def _inputs(agent_outputs, learner_outputs, env_outputs, **others):
    actions = ActionDistribution(ActionSpec.discrete(agent_outputs.policy.shape[-1]))
    return losses.LossInputs(actions, agent_outputs, learner_outputs, env_outputs, **others)


def _slow_loss(agent_outputs, learner_outputs, env_outputs, config):
    """Section 4.2 in float64 and loops, thresholds 1, rewards clipped to [-1, 1]."""
    pi = _softmax(np.float64(learner_outputs.policy))
    mu = _softmax(np.float64(agent_outputs.policy))
    value = np.float64(learner_outputs.baseline)
    length, batch = value.shape[0] - 1, value.shape[1]
    parts = dict.fromkeys(('policy_gradient', 'baseline', 'entropy'), 0.0)
    for b in range(batch):
        later_v = value[length, b]
        for t in reversed(range(length)):
            # Row t + 1 holds the action chosen in row t and its consequences.
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
    config = LossConfig(discounting=0.9, entropy_cost=0.07, baseline_cost=0.3)
    unrolls = _unrolls()
    total, parts, _ = losses.vtrace_loss(_inputs(*unrolls), config)
    expected = _slow_loss(*unrolls, config)
    assert set(parts) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        total,
        expected['policy_gradient'] + 0.3 * expected['baseline'] + 0.07 * expected['entropy'],
        rtol=1e-4,
    )


def _direct_sum(log_rhos, rewards, discounts, values, bootstrap_value):
    """Equation (1) of the paper, written out, with both thresholds 1; one unroll."""
    rhos = np.minimum(1.0, np.exp(log_rhos))
    next_values = np.append(values[1:], bootstrap_value)
    deltas = rhos * (rewards + discounts * next_values - values)
    return [
        values[s]
        + sum(
            np.prod(discounts[s:t]) * np.prod(rhos[s:t]) * deltas[t] for t in range(s, len(values))
        )
        for s in range(len(values))
    ]


@pytest.mark.parametrize('bounds', [None, (-2.0, 3.0)])
def test_vtrace_of_a_normal_policy_is_the_direct_sum(bounds):
    """The policy has one categorical and one continuous component; the truth is SciPy's."""
    agent_outputs, learner_outputs, env_outputs = _unrolls(num_actions=5)
    length, batch = (size - x for size, x in zip(agent_outputs.baseline.shape, (1, 0), strict=True))
    rng = np.random.default_rng(1)
    actions = np.stack(
        [rng.integers(3, size=(length + 1, batch)), rng.normal(size=(length + 1, batch))], -1
    ).astype(np.float32)
    # Three logits, a mean and a logarithm of a standard deviation.
    spec = ActionSpec((3,), (bounds,))
    assert spec.policy.shape == (5,)
    agent_outputs = agent_outputs._replace(action=actions)
    inputs = losses.LossInputs(
        ActionDistribution(spec), agent_outputs, learner_outputs, env_outputs
    )
    config = LossConfig(discounting=0.9)
    _, parts, targets = losses.vtrace_loss(inputs, config)

    def log_prob(policy, action):
        normal = scipy.stats.norm(policy[3], np.exp(policy[4]))
        value = scipy.special.log_softmax(policy[:3])[int(action[0])] + normal.logpdf(action[1])
        if bounds is not None:
            # The derivative of the environment's action by the sample.
            value -= np.log((bounds[1] - bounds[0]) / 2 * (1 - np.tanh(action[1]) ** 2))
        return value

    policy_gradient = 0.0
    rewards = np.clip(env_outputs.reward[1:], -1, 1)
    discounts = 0.9 * (1 - env_outputs.done[1:])
    for b in range(batch):
        pairs = [
            (learner_outputs.policy[t, b], agent_outputs.policy[t + 1, b], actions[t + 1, b])
            for t in range(length)
        ]
        log_pis = np.array([log_prob(pi, action) for pi, _, action in pairs])
        log_rhos = log_pis - [log_prob(mu, action) for _, mu, action in pairs]
        values, bootstrap = learner_outputs.baseline[:-1, b], learner_outputs.baseline[-1, b]
        expected = _direct_sum(log_rhos, rewards[:, b], discounts[:, b], values, bootstrap)
        np.testing.assert_allclose(targets[:, b], expected, rtol=1e-4, atol=1e-5)
        later = np.append(expected[1:], bootstrap)
        advantages = np.minimum(1, np.exp(log_rhos)) * (
            rewards[:, b] + discounts[:, b] * later - values
        )
        policy_gradient -= np.sum(advantages * log_pis)
    np.testing.assert_allclose(parts['policy_gradient'], policy_gradient, rtol=1e-4)


def test_the_unit_of_rewards_does_not_matter_if_it_is_given():
    config = LossConfig(reward_clipping='none', discounting=0.9)
    agent_outputs, learner_outputs, env_outputs = _unrolls()
    factors = np.array([1000.0, 1.0, 0.01], np.float32)
    normalized = tf.constant(learner_outputs.baseline)

    def loss(factors, value_stddev):
        with tf.GradientTape() as tape:
            tape.watch(normalized)
            inputs = _inputs(
                agent_outputs,
                learner_outputs._replace(baseline=factors * normalized),
                env_outputs._replace(reward=factors * env_outputs.reward),
                value_stddev=value_stddev,
            )
            total, parts, targets = losses.vtrace_loss(inputs, config)
        return parts, targets, tape.gradient(total, normalized)

    plain, plain_targets, plain_gradient = loss(np.float32(1.0), None)
    parts, targets, gradient = loss(factors, tf.constant(factors))
    for name, value in plain.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(targets, factors * plain_targets, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_section_4_2():
    config = LossConfig(discounting=0.9, entropy_cost=0.0, baseline_cost=0.3)
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=1, batch=2)
    agent_outputs = agent_outputs._replace(policy=learner_outputs.policy[[1, 0]])
    logits = tf.constant(learner_outputs.policy)
    baseline = tf.constant(learner_outputs.baseline)
    with tf.GradientTape() as tape:
        tape.watch([logits, baseline])
        outputs = AgentOutput(action=learner_outputs.action, policy=logits, baseline=baseline)
        inputs = _inputs(agent_outputs, outputs, env_outputs)
        total, _, _ = losses.vtrace_loss(inputs, config)
    logits_gradient, baseline_gradient = tape.gradient(total, [logits, baseline])

    # On-policy, one step: v - V = advantage = r + gamma V' - V, seen as a constant.
    value = np.float64(learner_outputs.baseline)
    rewards = np.clip(env_outputs.reward[1], -1.0, 1.0)
    advantage = rewards + 0.9 * ~env_outputs.done[1] * value[1] - value[0]
    one_hot = np.eye(5)[agent_outputs.action[1]]
    pi = _softmax(np.float64(learner_outputs.policy[0]))
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
    config = LossConfig()
    agent_outputs, learner_outputs, env_outputs = _unrolls()
    twice = tf.nest.map_structure(
        lambda x: np.concatenate([x, x], axis=1), (agent_outputs, learner_outputs, env_outputs)
    )
    inputs = _inputs(agent_outputs, learner_outputs, env_outputs)
    total, _, _ = losses.vtrace_loss(inputs, config)
    total_twice, _, _ = losses.vtrace_loss(_inputs(*twice), config)
    np.testing.assert_allclose(total_twice, 2 * total, rtol=1e-5)


@pytest.mark.parametrize(
    'change',
    [
        {'clip_rho_threshold': 0.3},
        {'clip_c_threshold': 0.3},
        {'clip_pg_rho_threshold': 0.3},
        {'vtrace_lambda': 0.3},
        {'reward_clipping': 'none'},
        {'reward_clipping': 'soft_asymmetric'},
    ],
)
def test_config_reaches_the_loss(change):
    unrolls = _unrolls()
    plain, _, _ = losses.vtrace_loss(_inputs(*unrolls), LossConfig())
    changed, _, _ = losses.vtrace_loss(_inputs(*unrolls), LossConfig(**change))
    assert abs(float(plain) - float(changed)) > 1e-3


def _appo_gradient(config, agent_outputs, learner_outputs, env_outputs, **kwargs):
    """Returns total, terms, and the gradients by logits and baseline."""
    logits = tf.constant(learner_outputs.policy)
    baseline = tf.constant(learner_outputs.baseline)
    with tf.GradientTape() as tape:
        tape.watch([logits, baseline])
        loss = losses.appo_loss if config.loss == 'appo' else losses.vtrace_loss
        outputs = AgentOutput(learner_outputs.action, logits, baseline)
        total, parts, _ = loss(_inputs(agent_outputs, outputs, env_outputs, **kwargs), config)
    return total, parts, tape.gradient(total, [logits, baseline])


def _near(agent_outputs, learner_outputs):
    """Returns learner outputs whose policy is close to the behaviour policy, row by row."""
    near = np.roll(agent_outputs.policy, -1, axis=0)
    return learner_outputs._replace(policy=near + 0.02 * learner_outputs.policy)


@pytest.mark.parametrize('lambda_', [1.0, 0.9])
def test_without_clipping_appo_has_the_gradient_of_vtrace(lambda_):
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=6, batch=4)
    unrolls = (agent_outputs, _near(agent_outputs, learner_outputs), env_outputs)
    common = {
        'entropy_cost': 0.01,
        'vtrace_lambda': lambda_,
        'clip_rho_threshold': None,
        'clip_c_threshold': None,
        'clip_pg_rho_threshold': None,
    }
    _, _, expected = _appo_gradient(LossConfig(**common), *unrolls)
    config = LossConfig(loss='appo', clip_epsilon=0.5, **common)
    _, _, actual = _appo_gradient(config, *unrolls)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(expected[0]).max() > 0.1
    # On-policy, V-trace with its defaults does not clip either.
    on_policy = learner_outputs._replace(policy=np.roll(agent_outputs.policy, -1, axis=0))
    unrolls = (agent_outputs, on_policy, env_outputs)
    _, _, expected = _appo_gradient(LossConfig(), *unrolls)
    _, _, actual = _appo_gradient(LossConfig(loss='appo'), *unrolls)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('ratio', 'advantage', 'loss', 'slope'),
    [
        # Inside the interval [0.8, 1.2] nothing is clipped; the slope is ratio times advantage.
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # Already moved in the direction of the advantage: clipped.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # Moved against the advantage: the gradient stays.
        (1.5, -2.0, 3.0, 3.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_each_side_of_the_clip_by_hand(ratio, advantage, loss, slope):
    log_ratio, advantages = tf.constant([[np.log(ratio)]], tf.float32), tf.constant([[advantage]])
    with tf.GradientTape() as tape:
        tape.watch([log_ratio, advantages])
        value = losses.clipped_surrogate_loss(log_ratio, advantages, clip_epsilon=0.2)
    gradients = tape.gradient(value, [log_ratio, advantages])
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [[slope]], rtol=1e-6)
    assert gradients[1] is None


def _slow_appo(agent_outputs, learner_outputs, env_outputs, target_outputs, config):
    """`appo_loss` in float64 and loops, rho-bar and c-bar 1, rewards clipped to [-1, 1]."""
    pi = _softmax(np.float64(learner_outputs.policy))
    mu = _softmax(np.float64(agent_outputs.policy))
    old = learner_outputs if target_outputs is None else target_outputs
    old_pi = _softmax(np.float64(old.policy))
    value = np.float64(old.baseline)
    length, batch = value.shape[0] - 1, value.shape[1]
    parts = dict.fromkeys(('baseline', 'entropy', 'kl'), 0.0)
    advantages, ratios = np.zeros((length, batch)), np.zeros((length, batch))
    for b in range(batch):
        later_v = value[length, b]
        for t in reversed(range(length)):
            action = agent_outputs.action[t + 1, b]
            reward = min(max(env_outputs.reward[t + 1, b], -1.0), 1.0)
            gamma = 0.0 if env_outputs.done[t + 1, b] else config.discounting
            m = mu[t + 1, b, action]
            rho = min(1.0, old_pi[t, b, action] / m)
            delta = rho * (reward + gamma * value[t + 1, b] - value[t, b])
            v = (
                value[t, b]
                + delta
                + gamma * config.vtrace_lambda * rho * (later_v - value[t + 1, b])
            )
            weight = config.vtrace_lambda if config.gae_advantages else 1.0
            later = (1 - weight) * value[t + 1, b] + weight * later_v
            advantages[t, b] = reward + gamma * later - value[t, b]
            if target_outputs is None:
                ratios[t, b] = pi[t, b, action] / m
                reference = mu[t + 1, b]
            else:
                bounded = min(m / old_pi[t, b, action], config.clip_target_rho_threshold)
                ratios[t, b] = bounded * pi[t, b, action] / m
                reference = old_pi[t, b]
            parts['baseline'] += 0.5 * (v - learner_outputs.baseline[t, b]) ** 2
            parts['entropy'] += np.sum(pi[t, b] * np.log(pi[t, b]))
            parts['kl'] += np.sum(reference * np.log(reference / pi[t, b]))
            later_v = v
    if config.normalize_advantages:
        advantages = (advantages - advantages.mean()) / advantages.std()
    clipped = np.clip(ratios, 1 - config.clip_epsilon, 1 + config.clip_epsilon)
    objective = np.minimum(ratios * advantages, clipped * advantages)
    return parts | {'policy_gradient': -objective.sum()}, ratios


@pytest.mark.parametrize('normalize, gae', [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize('has_target', [False, True])
def test_appo_loss_equals_the_slow_one(has_target, normalize, gae):
    config = LossConfig(
        loss='appo',
        discounting=0.9,
        entropy_cost=0.07,
        baseline_cost=0.3,
        vtrace_lambda=0.8,
        clip_epsilon=0.3,
        clip_target_rho_threshold=1.5,
        kl_cost=0.2,
        normalize_advantages=normalize,
        gae_advantages=gae,
    )
    unrolls = _unrolls(length=5, batch=6)
    target = _unrolls(length=5, batch=6, seed=1)[1] if has_target else None
    expected, ratios = _slow_appo(*unrolls, target, config)
    # All cases occur.
    assert ratios.min() < 0.7 and ratios.max() > 1.3 and np.any(abs(ratios - 1) < 0.3)
    total, parts, _ = _appo_gradient(config, *unrolls, target_outputs=target)
    assert set(parts) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        total,
        expected['policy_gradient']
        + 0.3 * expected['baseline']
        + 0.07 * expected['entropy']
        + 0.2 * expected['kl'],
        rtol=1e-4,
    )


@pytest.mark.parametrize('lambda_', [0.0, 0.5, 0.95, 1.0])
def test_on_policy_advantages_of_gae(lambda_):
    """Against the sum of equation (16) of Schulman et al. 2016; the ratios are 1."""
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=6, batch=4)
    behaviour = np.concatenate([agent_outputs.policy[:1], learner_outputs.policy[:-1]])
    agent_outputs = agent_outputs._replace(policy=behaviour)
    config = LossConfig(
        loss='appo', discounting=0.9, vtrace_lambda=lambda_, gae_advantages=True, entropy_cost=0.0,
        baseline_cost=0.0,
    )  # fmt: skip
    _, parts, (by_logits, _) = _appo_gradient(config, agent_outputs, learner_outputs, env_outputs)
    value = np.float64(learner_outputs.baseline)
    rewards = np.clip(np.float64(env_outputs.reward[1:]), -1.0, 1.0)
    gammas = 0.9 * ~env_outputs.done[1:]
    deltas = rewards + gammas * value[1:] - value[:-1]
    advantages = np.zeros_like(deltas)
    for start in range(6):
        weight = np.ones(4)
        for step in range(start, 6):
            advantages[start] += weight * deltas[step]
            weight = weight * gammas[step] * lambda_
    assert env_outputs.done[1:].any() and not env_outputs.done[1:].all()
    np.testing.assert_allclose(parts['policy_gradient'], -advantages.sum(), rtol=1e-4)
    one_hot = np.eye(5)[agent_outputs.action[1:]]
    pi = _softmax(np.float64(learner_outputs.policy[:-1]))
    expected = advantages[..., None] * (pi - one_hot)
    np.testing.assert_allclose(by_logits[:-1], expected, rtol=1e-3, atol=1e-5)


def test_a_target_network_equal_to_the_learner_makes_the_ratio_1():
    """The loss is then the sum of advantages; the slope of the ratio is that of log pi."""
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=1, batch=2)
    agent_outputs = agent_outputs._replace(policy=learner_outputs.policy[[1, 0]])
    config = LossConfig(loss='appo', discounting=0.9, entropy_cost=0.0, baseline_cost=0.3)
    _, parts, (by_logits, by_baseline) = _appo_gradient(
        config, agent_outputs, learner_outputs, env_outputs, target_outputs=learner_outputs
    )
    value = np.float64(learner_outputs.baseline)
    rewards = np.clip(env_outputs.reward[1], -1.0, 1.0)
    advantage = rewards + 0.9 * ~env_outputs.done[1] * value[1] - value[0]
    one_hot = np.eye(5)[agent_outputs.action[1]]
    pi = _softmax(np.float64(learner_outputs.policy[0]))
    np.testing.assert_allclose(parts['policy_gradient'], -advantage.sum(), rtol=1e-5)
    np.testing.assert_allclose(by_logits[0], advantage[:, None] * (pi - one_hot), rtol=1e-4)
    np.testing.assert_allclose(by_baseline[0], -0.3 * advantage, rtol=1e-4)
    assert parts['kl'] == 0.0


def test_appo_scales_values_by_the_deviation_of_their_level():
    """A deviation of 2 halves errors and advantages; targets keep the unit of the rewards."""
    unrolls = _unrolls()
    config = LossConfig(loss='appo')
    _, plain, targets = losses.appo_loss(_inputs(*unrolls), config)
    _, parts, same = losses.appo_loss(_inputs(*unrolls, value_stddev=tf.fill([3], 2.0)), config)
    np.testing.assert_allclose(parts['policy_gradient'], plain['policy_gradient'] / 2, rtol=1e-5)
    np.testing.assert_allclose(parts['baseline'], plain['baseline'] / 4, rtol=1e-5)
    np.testing.assert_array_equal(same, targets)
    _, _, of_vtrace = losses.vtrace_loss(_inputs(*unrolls), LossConfig())
    np.testing.assert_allclose(targets, of_vtrace, rtol=1e-5)


def test_normalized_values_have_mean_0_and_deviation_1():
    values = losses.normalize(tf.constant([[1e4 + 1.0, 1e4 + 3.0], [1e4 + 1.0, 1e4 + 3.0]]))
    np.testing.assert_allclose(values, [[-1.0, 1.0], [-1.0, 1.0]], rtol=1e-5)
    np.testing.assert_array_equal(losses.normalize(tf.fill([2, 2], 3.0)), np.zeros((2, 2)))


def test_autoencoder_loss_by_hand():
    frames = tf.constant([[[[255]], [[0]]], [[[51]], [[102]]]], tf.uint8)
    made = tf.constant([[[[0.5]], [[0.0]]], [[[0.0]], [[1.0]]]])
    # Two frames of two pixels each: errors 0.5, 0 and 0.2, -0.6.
    expected = 0.5 * (0.25 + 0.0) / 2 + 0.5 * (0.04 + 0.36) / 2
    np.testing.assert_allclose(losses.autoencoder_loss(frames, made), expected, rtol=1e-6)


def test_autoencoder_loss_equals_the_slow_one_and_is_summed_over_frames_not_pixels():
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(3, 5, 7, 4), dtype=np.uint8)
    made = rng.normal(0.5, 1.0, frames.shape).astype(np.float32)
    expected = sum(
        0.5 * np.mean((np.float64(x) / 255 - y) ** 2) for x, y in zip(frames, made, strict=True)
    )
    loss = losses.autoencoder_loss(tf.constant(frames), tf.constant(made))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def repeated(axis):
        return losses.autoencoder_loss(
            *(tf.repeat(tf.constant(x), 2, axis) for x in (frames, made))
        )

    np.testing.assert_allclose(repeated(0), 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(repeated(1), expected, rtol=1e-5)


@pytest.mark.parametrize('loss', ['vtrace', 'appo'])
def test_the_current_entropy_cost_applies(loss):
    unrolls = _unrolls()
    config = LossConfig(loss=loss, entropy_cost=0.25)
    total, parts, _ = _appo_gradient(config, *unrolls)
    later, _, _ = _appo_gradient(config, *unrolls, entropy_cost=tf.constant(0.0))
    np.testing.assert_allclose(total - later, 0.25 * parts['entropy'], rtol=1e-4)


@pytest.mark.parametrize(
    ('clipping', 'rewards', 'expected'),
    [
        ('abs_one', [-7.0, -0.5, 0.0, 0.5, 7.0], [-1.0, -0.5, 0.0, 0.5, 1.0]),
        ('none', [-7.0, -0.5, 0.0, 0.5, 7.0], [-7.0, -0.5, 0.0, 0.5, 7.0]),
        # tanh(1) = 0.76159416, tanh(0.2) = 0.19737532
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
    with pytest.raises(ValueError, match="abs_one, soft_asymmetric or none, not 'abs_two'"):
        losses.clip_rewards(tf.constant([1.0]), 'abs_two')


# An unroll of an agent whose policies are equal, so that all importance weights are 1. Its second
# transition is no step: row 1 has the last observation of a truncated episode.
CUT = {
    'reward': [0.0, 1.0, 0.0, 1.0],
    'done': [False, False, True, False],
    'is_step': [True, True, False, True],
    'baseline': [2.0, 3.0, 7.0, 11.0],
}


def _cut_inputs(**others):
    rows = (4, 1)
    column = {name: np.reshape(values, rows) for name, values in CUT.items()}
    outputs = AgentOutput(
        action=np.zeros(rows, np.int32),
        policy=np.zeros((*rows, 2), np.float32),
        baseline=column['baseline'].astype(np.float32),
    )
    env_outputs = StepOutput(
        reward=column['reward'].astype(np.float32),
        info=StepOutputInfo(np.zeros(rows, np.float32), *2 * [np.zeros(rows, np.int32)]),
        done=column['done'],
        observation={},
        is_step=column['is_step'],
    )
    return _inputs(outputs, outputs, env_outputs, **others)


@pytest.mark.parametrize('name', ['vtrace', 'appo', 'appo with GAE', 'appo with a target network'])
def test_the_value_of_the_last_observation_continues_the_return_by_hand(name):
    """Discount 0.9 and lambda 1; two actions of probability 1/2."""
    config = LossConfig(
        loss=name.split()[0],
        discounting=0.9,
        target_update_steps=int('target' in name),
        gae_advantages='GAE' in name,
        baseline_cost=1.0,
        entropy_cost=1.0,
    )
    inputs = _cut_inputs()
    if 'target' in name:
        inputs = dataclasses.replace(inputs, target_outputs=inputs.learner_outputs)
    _, parts, targets = losses.compute(inputs, config)
    # v_2 = 1 + 0.9 * 11, v_1 = V(x_1) = 3, v_0 = 1 + 0.9 * 3.
    np.testing.assert_allclose(targets[:, 0], [3.7, 3.0, 10.9], rtol=1e-6)
    np.testing.assert_allclose(parts['baseline'], (1.7**2 + 3.9**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(parts['entropy'], -2 * np.log(2), rtol=1e-6)
    advantages = 1.7 + 3.9
    if name == 'vtrace':
        np.testing.assert_allclose(parts['policy_gradient'], advantages * np.log(2), rtol=1e-6)
    else:
        np.testing.assert_allclose(parts['policy_gradient'], -advantages, rtol=1e-6)
        assert parts['kl'] == 0


def _cut(inputs, first, last):
    """Rows `first` to `last` of a batch, as a batch in which all transitions are steps."""
    rows = slice(first, last + 1)

    def cut(nest):
        return nest and tf.nest.map_structure(lambda array: array[rows], nest)

    return dataclasses.replace(
        inputs,
        agent_outputs=cut(inputs.agent_outputs),
        learner_outputs=cut(inputs.learner_outputs),
        env_outputs=cut(inputs.env_outputs)._replace(is_step=()),
        target_outputs=cut(inputs.target_outputs),
    )


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'clip_rho_threshold': None, 'clip_c_threshold': None, 'vtrace_lambda': 0.7},
        {'loss': 'appo', 'vtrace_lambda': 0.7},
        {'loss': 'appo', 'vtrace_lambda': 0.7, 'gae_advantages': True, 'kl_cost': 0.3},
        {'loss': 'appo', 'target_update_steps': 1, 'kl_cost': 0.3, 'gae_advantages': True},
    ],
)
def test_a_cut_has_the_loss_and_gradients_of_two_unrolls(changes):
    config = LossConfig(discounting=0.9, entropy_cost=0.07, baseline_cost=0.3, **changes)
    agent_outputs, learner_outputs, env_outputs = _unrolls(length=7)
    learner_outputs = _near(agent_outputs, learner_outputs)
    done, is_step = env_outputs.done, np.ones_like(env_outputs.done)
    # Between rows 3 and 4 there is no step; the reward there must not matter.
    done[4], is_step[4] = True, False
    env_outputs = env_outputs._replace(is_step=is_step)
    policy, baseline = (tf.constant(x) for x in (learner_outputs.policy, learner_outputs.baseline))
    target_outputs = _unrolls(length=7, seed=5)[1] if config.target_update_steps else None

    def loss(pieces):
        with tf.GradientTape() as tape:
            tape.watch([policy, baseline])
            outputs = learner_outputs._replace(policy=policy, baseline=baseline)
            inputs = _inputs(agent_outputs, outputs, env_outputs, target_outputs=target_outputs)
            if pieces:
                results = [losses.compute(_cut(inputs, *rows), config) for rows in ((0, 3), (4, 7))]
            else:
                results = [losses.compute(inputs, config)]
            total = tf.add_n([result.total for result in results])
        parts = {name: sum(result.parts[name] for result in results) for name in results[0].parts}
        return (
            parts,
            [result.targets for result in results],
            tape.gradient(total, [policy, baseline]),
        )

    parts, (targets,), gradients = loss(pieces=False)
    expected, (before, after), expected_gradients = loss(pieces=True)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(targets[:3], before, rtol=1e-5)
    np.testing.assert_allclose(targets[4:], after, rtol=1e-5)
    old = learner_outputs if target_outputs is None else target_outputs
    np.testing.assert_array_equal(targets[3], old.baseline[3])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
        has_gradient = [bool(np.any(row)) for row in gradient]
        assert has_gradient == [row not in (3, 7) for row in range(8)]


def test_without_a_cut_the_mark_changes_nothing():
    for name in ('vtrace', 'appo'):
        config = LossConfig(loss=name, discounting=0.9)
        agent_outputs, learner_outputs, env_outputs = _unrolls()
        all_steps = env_outputs._replace(is_step=np.ones_like(env_outputs.done))
        plain, marked = (
            losses.compute(_inputs(agent_outputs, learner_outputs, each), config)
            for each in (env_outputs, all_steps)
        )
        np.testing.assert_allclose(marked.total, plain.total, rtol=1e-6)
        np.testing.assert_array_equal(marked.targets, plain.targets)


def test_normalized_advantages_leave_out_what_does_not_count():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 4)).astype(np.float32)
    is_counted = np.random.default_rng(1).random((5, 4)) < 0.7
    values[~is_counted] = 1e6
    expected = np.where(is_counted, values - values[is_counted].mean(), 0)
    expected /= values[is_counted].std()
    actual = losses.normalize(tf.constant(values), is_counted=tf.constant(is_counted))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    nothing = losses.normalize(tf.constant(values), is_counted=tf.zeros([5, 4], tf.bool))
    np.testing.assert_array_equal(nothing, np.zeros_like(values))
    config = LossConfig(loss='appo', discounting=0.9, normalize_advantages=True)
    # The advantages are 1.7 and 3.9.
    _, parts, _ = losses.appo_loss(_cut_inputs(), config)
    np.testing.assert_allclose(parts['policy_gradient'], 0.0, atol=1e-6)
