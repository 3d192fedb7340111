"""Truth: SciPy's distributions, numerical integrals, and tests of samples against them."""

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import tensorflow as tf

from impala.networks.action_distribution import (
    MAX_LOG_STDDEV,
    MIN_LOG_STDDEV,
    ActionDistribution,
    bounded_log_stddev,
)
from impala.trajectory import ActionSpec

DISCRETE = ActionSpec.discrete(4)
CATEGORIES = ActionSpec((2, 3, 3, 2))
UNBOUNDED = ActionSpec(bounds=(None, None))
BOUNDED = ActionSpec(bounds=((-2.0, 2.0), (0.0, 5.0)))
MIXED = ActionSpec((3, 2), (None, (-1.0, 3.0)))
ALL = [DISCRETE, CATEGORIES, UNBOUNDED, BOUNDED, MIXED]


def policies(spec, rows, seed=0):
    """Returns random parameters, f32 `[rows, P]`."""
    rng = np.random.default_rng(seed)
    count = len(spec.bounds)
    logits = rng.normal(size=(rows, spec.num_logits))
    means, log_stddevs = rng.normal(size=(rows, count)), rng.uniform(-1.5, 0.7, (rows, count))
    return np.concatenate([logits, means, log_stddevs], 1).astype(np.float32)


def components(spec, policy):
    """Returns SciPy's distribution of each component of one policy, before any tangent."""
    result, begin = [], 0
    for size in spec.categories:
        probabilities = scipy.special.softmax(policy[begin : begin + size].astype(np.float64))
        result.append(scipy.stats.rv_discrete(values=(range(size), probabilities)))
        begin += size
    means, log_stddevs = np.split(policy[begin:].astype(np.float64), 2)
    return result + [
        scipy.stats.norm(*each) for each in zip(means, np.exp(log_stddevs), strict=True)
    ]


def bounded_density(normal, low, high):
    """Returns the density of the environment's action, and its derivation from the definition."""

    def density(action):
        share = (action - low) / (high - low)
        sample = np.arctanh(2 * share - 1)
        # The derivative of the inverse of the map from sample to action.
        return normal.pdf(sample) / (2 * share * (1 - share) * (high - low))

    return density


@pytest.mark.parametrize('spec', ALL, ids=str)
def test_log_probabilities_are_those_of_the_definition(spec):
    distribution = ActionDistribution(spec)
    policy = policies(spec, 20)
    actions = distribution.sample(tf.constant(policy)).numpy()
    got = distribution.log_prob(tf.constant(policy), tf.constant(actions)).numpy()
    for row, action, value in zip(policy, actions, got, strict=True):
        expected = 0.0
        parts = components(spec, row)
        values = np.atleast_1d(action)
        played = values if spec.is_scalar else spec.to_environment(values)
        for i, part in enumerate(parts):
            bounds = None if i < len(spec.categories) else spec.bounds[i - len(spec.categories)]
            if i < len(spec.categories):
                expected += np.log(part.pmf(int(values[i])))
            elif bounds is None:
                expected += part.logpdf(values[i])
            else:
                # In double precision, since float32 loses digits near the bounds.
                exact = bounds[0] + (bounds[1] - bounds[0]) * (1 + np.tanh(float(values[i]))) / 2
                assert played[i] == pytest.approx(exact, abs=1e-5)
                expected += np.log(bounded_density(part, *bounds)(exact))
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ('log_stddev', 'error'), [(-5.0, 1e-3), (0.0, 1e-3), (1.25, 0.01), (MAX_LOG_STDDEV, 0.1)]
)
def test_entropies_are_as_precise_as_documented(log_stddev, error):
    means = np.linspace(-6, 6, 61)[:, None]
    deviations = np.linspace(-9, 9, 4001)
    samples = means + np.exp(log_stddev) * deviations
    # log(1 - tanh(x)^2) without cancellation.
    log_slopes = 2 * (np.log(2) - samples - np.logaddexp(0, -2 * samples))
    weights = scipy.stats.norm.pdf(deviations)
    expected = scipy.stats.norm.entropy() + log_stddev
    expected += scipy.integrate.trapezoid(weights * log_slopes, deviations)
    policy = np.concatenate([means, np.full_like(means, log_stddev)], 1).astype(np.float32)
    entropies = ActionDistribution(ActionSpec(bounds=((-1.0, 1.0),))).entropy(policy)
    np.testing.assert_allclose(entropies, expected, atol=error, rtol=0)


@pytest.mark.parametrize('bounds', [(-2.0, 2.0), (0.0, 5.0)])
@pytest.mark.parametrize('parameters', [(0.0, 0.0), (1.0, -1.0), (-0.5, 0.5), (2.0, -3.0)])
def test_bounded_densities_integrate_to_one_and_entropies_are_their_integral(bounds, parameters):
    spec = ActionSpec(bounds=(bounds,))
    distribution = ActionDistribution(spec)
    policy = tf.constant([parameters])

    samples = np.linspace(-12, 12, 20_001)
    low, high = bounds
    # Dense near the bounds, where the density may be great.
    actions = low + (high - low) * (1 + np.tanh(samples)) / 2
    rows = tf.constant(samples[:, None], tf.float32)
    log_densities = distribution.log_prob(tf.repeat(policy, len(samples), 0), rows).numpy()
    densities = np.exp(log_densities)
    assert scipy.integrate.trapezoid(densities, actions) == pytest.approx(1.0, abs=1e-3)
    entropy = scipy.integrate.trapezoid(-densities * log_densities, actions)
    assert float(distribution.entropy(policy)[0]) == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize('spec', [DISCRETE, CATEGORIES, UNBOUNDED, MIXED], ids=str)
def test_entropies_and_divergences_are_scipys(spec):
    distribution = ActionDistribution(spec)
    policy, other = policies(spec, 10, seed=1), policies(spec, 10, seed=2)
    entropies = distribution.entropy(tf.constant(policy)).numpy()
    divergences = distribution.kl_divergence(tf.constant(policy), tf.constant(other)).numpy()
    for row, other_row, entropy, divergence in zip(
        policy, other, entropies, divergences, strict=True
    ):
        expected_entropy = expected_divergence = 0.0
        pairs = zip(components(spec, row), components(spec, other_row), strict=True)
        for i, (p, q) in enumerate(pairs):
            if i < len(spec.categories):
                expected_entropy += scipy.stats.entropy(p.pk)
                expected_divergence += scipy.stats.entropy(p.pk, q.pk)
                continue
            low, high = p.ppf([1e-12, 1 - 1e-12])
            integral, _ = scipy.integrate.quad(
                lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high
            )
            expected_divergence += integral
            expected_entropy += p.entropy()
        if spec is MIXED:
            # Its bounded component has the entropy of a test above.
            bounded = ActionDistribution(ActionSpec(bounds=spec.bounds[1:]))
            normal = components(spec, row)[-1]
            parameters = tf.constant([[normal.mean(), np.log(normal.std())]], tf.float32)
            expected_entropy += float(bounded.entropy(parameters)[0]) - normal.entropy()
        assert entropy == pytest.approx(expected_entropy, abs=1e-4)
        assert divergence == pytest.approx(expected_divergence, abs=1e-4)
    total = distribution.sum_of_entropies(tf.constant(policy))
    np.testing.assert_allclose(total, entropies.sum(), rtol=1e-5)
    total = distribution.sum_of_kl_divergences(tf.constant(policy), tf.constant(other))
    np.testing.assert_allclose(total, divergences.sum(), rtol=1e-5)


def by_gumbel_and_normal(distribution, policy):
    rng = np.random.default_rng(7)
    spec, rows = distribution.spec, len(policy)
    gumbel = rng.gumbel(size=(rows, spec.num_logits))
    normal = rng.normal(size=(rows, len(spec.bounds)))
    noise = np.concatenate([gumbel, normal], 1).astype(np.float32)
    return distribution.sample_by_noise(policy, tf.constant(noise))


@pytest.mark.parametrize('spec', ALL, ids=str)
@pytest.mark.parametrize('is_noise_given', [False, True])
def test_samples_have_the_distribution(spec, is_noise_given):
    tf.random.set_seed(3)
    distribution = ActionDistribution(spec)
    policy = policies(spec, 1, seed=4)
    rows = tf.constant(np.repeat(policy, 20_000, 0))
    sample = by_gumbel_and_normal if is_noise_given else ActionDistribution.sample
    actions = sample(distribution, rows).numpy()
    assert actions.shape == (20_000, *spec.array.shape)
    assert actions.dtype == spec.array.dtype
    columns = actions.reshape(20_000, -1).T
    for i, (part, column) in enumerate(zip(components(spec, policy[0]), columns, strict=True)):
        if i < len(spec.categories):
            counts = np.bincount(column.astype(int), minlength=spec.categories[i])
            p_value = scipy.stats.chisquare(counts, part.pk * len(column)).pvalue
        else:
            p_value = scipy.stats.kstest(column, part.cdf).pvalue
        assert p_value > 1e-3
    if len(columns) > 1:
        correlation = np.corrcoef(columns) - np.eye(len(columns))
        assert np.abs(correlation).max() < 0.03


@pytest.mark.parametrize('spec', ALL, ids=str)
def test_gradients_are_those_of_finite_differences(spec):
    distribution = ActionDistribution(spec)
    policy, other = policies(spec, 3, seed=5), policies(spec, 3, seed=6)
    action = distribution.sample(tf.constant(other))
    functions = [
        lambda p: tf.reduce_sum(distribution.log_prob(p, action)),
        distribution.sum_of_entropies,
        lambda p: distribution.sum_of_kl_divergences(tf.constant(other), p),
    ]
    for function in functions:
        theoretical, numerical = tf.test.compute_gradient(function, [policy], delta=1e-2)
        np.testing.assert_allclose(theoretical[0], numerical[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize('spec', ALL, ids=str)
def test_the_mode_is_the_most_probable_category_and_the_median(spec):
    distribution = ActionDistribution(spec)
    policy = policies(spec, 5, seed=8)
    modes = distribution.mode(tf.constant(policy)).numpy().reshape(5, -1)
    for row, mode in zip(policy, modes, strict=True):
        for i, (part, value) in enumerate(zip(components(spec, row), mode, strict=True)):
            is_categorical = i < len(spec.categories)
            assert value == pytest.approx(np.argmax(part.pk) if is_categorical else part.median())


@pytest.mark.parametrize('spec', ALL, ids=str)
def test_an_action_is_an_action_even_if_parameters_are_not_finite(spec):
    distribution = ActionDistribution(spec)
    for value in (np.nan, np.inf, -np.inf):
        policy = np.full((6, *spec.policy.shape), value, np.float32)
        actions = distribution.sample(tf.constant(policy)).numpy().reshape(6, -1)
        assert np.isfinite(actions).all()
        for column, size in zip(actions.T, spec.categories, strict=False):
            assert ((column >= 0) & (column < size)).all()


def test_a_discrete_space_computes_what_softmax_policies_compute():
    """To the bit, as V-trace and the losses computed it when this was the only space."""
    distribution = ActionDistribution(DISCRETE)
    policy, old = (tf.constant(policies(DISCRETE, 50, seed)) for seed in (9, 10))
    actions = tf.constant(np.random.default_rng(11).integers(4, size=50), tf.int32)
    log_probs, old_log_probs = tf.nn.log_softmax(policy), tf.nn.log_softmax(old)
    np.testing.assert_array_equal(
        distribution.log_prob(policy, actions),
        -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=actions, logits=policy),
    )
    np.testing.assert_array_equal(
        -distribution.sum_of_entropies(policy), tf.reduce_sum(tf.exp(log_probs) * log_probs)
    )
    np.testing.assert_array_equal(
        distribution.sum_of_kl_divergences(old, policy),
        tf.reduce_sum(tf.exp(old_log_probs) * (old_log_probs - log_probs)),
    )


def test_features_are_one_hot_vectors_tangents_and_clipped_samples():
    distribution = ActionDistribution(MIXED)
    features = distribution.features(tf.constant([[2, 0, 25.0, 0.5], [9, 1, -0.5, -20.0]]))
    np.testing.assert_allclose(
        features,
        [[0, 0, 1, 1, 0, 10, np.tanh(0.5)], [0, 0, 0, 0, 1, -0.5, -1]],
        rtol=1e-6,
    )


def test_gradient_of_the_divergence_pulls_towards_the_old_policy():
    """The gradient of KL(pi_old || pi) by the logits of pi is pi - pi_old."""
    distribution = ActionDistribution(DISCRETE)
    rng = np.random.default_rng(0)
    old, new = (tf.constant(rng.normal(size=(2, 3, 4)), tf.float32) for _ in range(2))
    with tf.GradientTape() as tape:
        tape.watch([old, new])
        loss = distribution.sum_of_kl_divergences(tf.stop_gradient(old), new)
    gradients = tape.gradient(loss, [old, new])
    assert gradients[0] is None
    np.testing.assert_allclose(
        gradients[1], scipy.special.softmax(new, -1) - scipy.special.softmax(old, -1), atol=1e-6
    )
    assert float(loss) > 0 and distribution.sum_of_kl_divergences(old, old) == 0


def test_entropy_of_a_uniform_policy_is_its_maximum():
    entropy = ActionDistribution(ActionSpec.discrete(7)).sum_of_entropies
    uniform = entropy(tf.zeros([2, 3, 7]))
    np.testing.assert_allclose(uniform, 6 * np.log(7), rtol=1e-6)
    assert entropy(tf.random.stateless_normal([2, 3, 7], [1, 2])) < uniform


def test_entropy_gradient_is_finite_for_a_deterministic_policy():
    logits = tf.constant([[[0.0, 200.0, -200.0]]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        entropy = ActionDistribution(ActionSpec.discrete(3)).sum_of_entropies(logits)
    assert entropy == 0.0
    assert np.all(np.isfinite(tape.gradient(entropy, logits)))


@pytest.mark.parametrize('spec', [DISCRETE, CATEGORIES, MIXED], ids=str)
def test_masked_categories_are_never_chosen_and_do_not_count(spec):
    distribution = ActionDistribution(spec)
    rng = np.random.default_rng(12)
    policy, old = (tf.constant(np.repeat(policies(spec, 1, seed), 2000, 0)) for seed in (13, 14))
    mask = np.concatenate([rng.permutation([True] + [False] * (n - 1)) for n in spec.categories])
    mask[-1] = mask[0] = True
    masked = distribution.masked(policy, tf.constant(mask))
    is_continuous = np.arange(policy.shape[-1]) >= spec.num_logits
    np.testing.assert_array_equal(
        masked.numpy()[:, is_continuous], policy.numpy()[:, is_continuous]
    )
    actions = distribution.sample(masked).numpy().reshape(2000, -1)
    begin = 0
    entropy = 0.0
    for i, size in enumerate(spec.categories):
        allowed = mask[begin : begin + size]
        assert set(actions[:, i].astype(int)) == set(np.flatnonzero(allowed))
        entropy += scipy.stats.entropy(
            scipy.special.softmax(policy.numpy()[0, begin : begin + size][allowed])
        )
        begin += size
    if not spec.bounds:
        np.testing.assert_allclose(distribution.entropy(masked)[0], entropy, atol=1e-5)
    with tf.GradientTape() as tape:
        tape.watch(policy)
        masked = distribution.masked(policy, tf.constant(mask))
        old_masked = distribution.masked(old, tf.constant(mask))
        total = tf.reduce_sum(distribution.log_prob(masked, tf.constant(actions.squeeze())))
        total += distribution.sum_of_entropies(masked)
        total += distribution.sum_of_kl_divergences(old_masked, masked)
    gradient = tape.gradient(total, policy).numpy()[:, : spec.num_logits]
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()
    assert (gradient[:, ~mask] == 0).all()


@pytest.mark.parametrize(('start', 'target'), [(9.0, 0.5), (-9.0, -2.0), (0.0, 1.5)])
def test_a_standard_deviation_returns_from_beyond_its_bounds(start, target):
    """By gradient descent on the squared distance to a target within the bounds."""
    log_stddev = tf.Variable(start)
    for _ in range(400):
        with tf.GradientTape() as tape:
            clipped = bounded_log_stddev(tf.convert_to_tensor(log_stddev))
            loss = tf.square(clipped - target)
        assert MIN_LOG_STDDEV <= clipped <= MAX_LOG_STDDEV
        log_stddev.assign_sub(0.05 * tape.gradient(loss, log_stddev))
    np.testing.assert_allclose(log_stddev, target, atol=0.01)


def test_a_standard_deviation_moves_no_further_beyond_its_bounds():
    log_stddev = tf.constant([2.5, 2.5, -5.5, -5.5, 1.0])
    with tf.GradientTape() as tape:
        tape.watch(log_stddev)
        # Gradient descent would increase those with a factor below 0.
        loss = tf.reduce_sum(bounded_log_stddev(log_stddev) * [-3.0, 3.0, -3.0, 3.0, -3.0])
    np.testing.assert_array_equal(tape.gradient(loss, log_stddev), [0.0, 3.0, -3.0, 0.0, -3.0])
