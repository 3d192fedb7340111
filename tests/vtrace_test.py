"""Tests of vtrace.py."""

import numpy as np
import pytest
import tensorflow as tf

import vtrace

# Two sequences of rlax's test suite, batch-major; thresholds and lambda are 1.
_BEHAVIOUR_LOGITS = [
    [[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
    [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]],
]
_TARGET_LOGITS = [
    [[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]],
    [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]],
]
_ACTIONS = [[0, 1, 0, 0], [1, 0, 0, 1]]
_REWARDS = [[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]]
_DISCOUNTS = [[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]]
_VALUES = [[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]]
_BOOTSTRAP = [8.4, -1.2]
_ERRORS = [[-1.6155143, -3.4973226, 1.8670533, 50.316], [1.4662437, 3.6116405, -8.337e-5, -13.54]]

_MODES = ['eager', 'graph', 'xla', 'unknown_length']


def _in_mode(mode, function):
    """Returns `function` of a dict of arrays, executed in the given way."""
    if mode == 'eager':
        return lambda arrays: function(**{k: tf.constant(v) for k, v in arrays.items()})

    def run(arrays):
        specs = {}
        for name, array in arrays.items():
            array = np.asarray(array)
            shape = list(array.shape)
            if mode == 'unknown_length':
                shape = [None] * len(shape)
                if name.endswith('logits'):
                    shape[-1] = array.shape[-1]
            specs[name] = tf.TensorSpec(shape, tf.as_dtype(array.dtype))
        compiled = tf.function(
            lambda tensors: function(**tensors),
            input_signature=[specs],
            jit_compile=mode == 'xla',
        )
        return compiled({k: tf.constant(v) for k, v in arrays.items()})

    return run


def _softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def _direct_sum(
    log_rhos, discounts, rewards, values, bootstrap_value, rho_bar, c_bar, pg_rho_bar, lambda_
):
    """Equation (1) and section 4.2 of the paper, term by term in float64; None: not clipped."""
    log_rhos, discounts, rewards, values, bootstrap_value = (
        np.asarray(x, np.float64) for x in (log_rhos, discounts, rewards, values, bootstrap_value)
    )
    bars = [np.inf if bar is None else bar for bar in (rho_bar, c_bar, pg_rho_bar)]
    rhos = np.exp(log_rhos)
    rho, c, pg_rho = (np.minimum(bar, rhos) for bar in bars)
    c = lambda_ * c
    states = np.concatenate([values, bootstrap_value[None]])
    n = len(values)
    vs = []
    for s in range(n):
        v = values[s].copy()
        for t in range(s, n):
            delta = rho[t] * (rewards[t] + discounts[t] * states[t + 1] - states[t])
            v += np.prod(discounts[s:t], axis=0) * np.prod(c[s:t], axis=0) * delta
        vs.append(v)
    vs = np.stack(vs)
    vs_next = np.concatenate([vs[1:], bootstrap_value[None]])
    return vs, pg_rho * (rewards + discounts * vs_next - values)


def _random_weights(shape, seed=0, discount=0.95):
    rng = np.random.default_rng(seed)
    discounts = np.where(rng.random(shape) < 0.15, 0.0, discount)
    return {
        'log_rhos': rng.normal(size=shape).astype(np.float32),
        'discounts': discounts.astype(np.float32),
        'rewards': rng.normal(size=shape).astype(np.float32),
        'values': rng.normal(size=shape).astype(np.float32),
        'bootstrap_value': rng.normal(size=shape[1:]).astype(np.float32),
    }


def _time_major(batch_major, dtype=np.float32):
    return np.swapaxes(np.asarray(batch_major, dtype), 0, 1)


def _known_case():
    return {
        'behaviour_policy_logits': _time_major(_BEHAVIOUR_LOGITS),
        'target_policy_logits': _time_major(_TARGET_LOGITS),
        'actions': _time_major(_ACTIONS, np.int32),
        'discounts': _time_major(_DISCOUNTS),
        'rewards': _time_major(_REWARDS),
        'values': _time_major(_VALUES),
        'bootstrap_value': np.asarray(_BOOTSTRAP, np.float32),
    }


@pytest.mark.parametrize('mode', _MODES)
def test_known_case(mode):
    case = _known_case()
    returns = _in_mode(mode, vtrace.from_logits)(case)
    np.testing.assert_allclose(
        np.swapaxes(returns.vs - case['values'], 0, 1), _ERRORS, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize('mode', _MODES)
@pytest.mark.parametrize('shape', [(1, 3), (2, 1), (7, 4), (20, 2), (5, 2, 3)])
def test_equals_direct_sum(mode, shape):
    arrays = _random_weights(shape)
    thresholds = [
        (1.0, 1.0, 1.0, 1.0),
        (3.7, 1.2, 2.2, 0.9),
        (None, None, None, 1.0),
        (0.5, None, 1.5, 0.0),
    ]

    def all_targets(**kwargs):
        return [
            vtrace.from_importance_weights(
                **kwargs,
                clip_rho_threshold=rho_bar,
                clip_c_threshold=c_bar,
                clip_pg_rho_threshold=pg_rho_bar,
                lambda_=lambda_,
            )
            for rho_bar, c_bar, pg_rho_bar, lambda_ in thresholds
        ]

    # In one function, because XLA takes more than a second for each.
    for returns, (rho_bar, c_bar, pg_rho_bar, lambda_) in zip(
        _in_mode(mode, all_targets)(arrays), thresholds, strict=True
    ):
        vs, pg_advantages = _direct_sum(
            **arrays, rho_bar=rho_bar, c_bar=c_bar, pg_rho_bar=pg_rho_bar, lambda_=lambda_
        )
        np.testing.assert_allclose(returns.vs, vs, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(returns.pg_advantages, pg_advantages, rtol=2e-4, atol=2e-5)


def test_long_unrolls_equal_direct_sum():
    arrays = _random_weights((100, 4), discount=0.999)
    arrays['log_rhos'] *= 0.1
    returns = vtrace.from_importance_weights(**arrays)
    vs, pg_advantages = _direct_sum(**arrays, rho_bar=1, c_bar=1, pg_rho_bar=1, lambda_=1)
    np.testing.assert_allclose(returns.vs, vs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(returns.pg_advantages, pg_advantages, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('extra', [(), (2,)])
def test_from_logits_weighs_by_the_ratio_of_probabilities(extra):
    rng = np.random.default_rng(1)
    shape, num_actions = (6, 3, *extra), 5
    behaviour = rng.normal(size=(*shape, num_actions)).astype(np.float32)
    target = rng.normal(size=(*shape, num_actions)).astype(np.float32)
    actions = rng.integers(num_actions, size=shape, dtype=np.int32)
    arrays = _random_weights(shape)
    del arrays['log_rhos']
    returns = vtrace.from_logits(behaviour, target, actions, **arrays, clip_rho_threshold=2.0)

    mu, pi = (
        np.take_along_axis(_softmax(np.float64(x)), actions[..., None], -1)[..., 0]
        for x in (behaviour, target)
    )
    np.testing.assert_allclose(returns.behaviour_action_log_probs, np.log(mu), rtol=1e-5)
    np.testing.assert_allclose(returns.target_action_log_probs, np.log(pi), rtol=1e-5)
    np.testing.assert_allclose(returns.log_rhos, np.log(pi / mu), rtol=1e-4, atol=1e-5)
    vs, pg_advantages = _direct_sum(
        np.log(pi / mu), **arrays, rho_bar=2.0, c_bar=1, pg_rho_bar=1, lambda_=1
    )
    np.testing.assert_allclose(returns.vs, vs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns.pg_advantages, pg_advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mode', ['eager', 'xla'])
def test_trailing_dimension_of_size_one_is_broadcast(mode):
    arrays = _random_weights((4, 2, 3))
    narrow = dict(arrays, log_rhos=arrays['log_rhos'][..., :1])
    narrow['discounts'] = arrays['discounts'][..., :1]
    wide = dict(arrays)
    for name in ('log_rhos', 'discounts'):
        wide[name] = np.repeat(narrow[name], 3, axis=-1)
    returns = _in_mode(mode, vtrace.from_importance_weights)(narrow)
    vs, pg_advantages = _direct_sum(**wide, rho_bar=1, c_bar=1, pg_rho_bar=1, lambda_=1)
    np.testing.assert_allclose(returns.vs, vs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns.pg_advantages, pg_advantages, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('thresholds', [(1.0, 1.0), (2.5, 1.0), (None, None)])
def test_on_policy_targets_are_n_step_returns(thresholds):
    arrays = _random_weights((9, 3), seed=2)
    arrays['log_rhos'][:] = 0.0
    returns = vtrace.from_importance_weights(
        **arrays, clip_rho_threshold=thresholds[0], clip_c_threshold=thresholds[1]
    )
    n_step = arrays['bootstrap_value'].astype(np.float64)
    for t in reversed(range(9)):
        n_step = arrays['rewards'][t] + arrays['discounts'][t] * n_step
        np.testing.assert_allclose(returns.vs[t], n_step, rtol=1e-4, atol=1e-5)


def test_on_policy_without_rho_bar_other_thresholds_have_no_effect():
    arrays = _random_weights((9, 3), seed=3)
    arrays['log_rhos'][:] = 0.0
    unclipped = vtrace.from_importance_weights(
        **arrays, clip_rho_threshold=None, clip_c_threshold=None, clip_pg_rho_threshold=None
    )
    for c_bar in (1.0, 1.3, 50.0):
        clipped = vtrace.from_importance_weights(
            **arrays, clip_rho_threshold=None, clip_c_threshold=c_bar, clip_pg_rho_threshold=c_bar
        )
        np.testing.assert_array_equal(clipped.vs, unclipped.vs)
        np.testing.assert_array_equal(clipped.pg_advantages, unclipped.pg_advantages)


def test_off_policy_thresholds_have_an_effect():
    arrays = _random_weights((9, 3), seed=3)
    plain = vtrace.from_importance_weights(**arrays)
    assert not np.allclose(plain.vs, vtrace.from_importance_weights(**arrays, lambda_=0.5).vs)
    for name in ('clip_rho_threshold', 'clip_c_threshold'):
        other = vtrace.from_importance_weights(**arrays, **{name: 0.5})
        assert not np.allclose(plain.vs, other.vs), name
    other = vtrace.from_importance_weights(**arrays, clip_pg_rho_threshold=0.5)
    np.testing.assert_array_equal(plain.vs, other.vs)
    assert not np.allclose(plain.pg_advantages, other.pg_advantages)


def test_zero_discount_cuts_off_later_steps():
    arrays = _random_weights((8, 2), seed=4, discount=0.9)
    arrays['discounts'][3] = 0.0
    changed = {name: array.copy() for name, array in arrays.items()}
    for name in ('log_rhos', 'rewards', 'values'):
        changed[name][4:] += 10.0
    changed['bootstrap_value'] += 10.0
    before = vtrace.from_importance_weights(**arrays)
    after = vtrace.from_importance_weights(**changed)
    np.testing.assert_allclose(before.vs[:4], after.vs[:4], rtol=1e-6)
    np.testing.assert_allclose(before.pg_advantages[:4], after.pg_advantages[:4], rtol=1e-6)
    assert np.all(np.abs(before.vs[4:] - after.vs[4:]) > 1e-3)


def test_overflow_of_the_last_unclipped_c_has_no_effect():
    # The last step's c would weigh what follows the unroll, so nothing is multiplied by it.
    arrays = _random_weights((5, 1), seed=5)
    arrays['log_rhos'][:] = 0.0
    arrays['log_rhos'][-1] = 1000.0
    returns = vtrace.from_importance_weights(**arrays, clip_c_threshold=None)
    assert np.all(np.isfinite(returns.vs))


@pytest.mark.parametrize('mode', _MODES)
def test_bfloat16_is_computed_in_float32(mode):
    # 1 + 2^-9 needs 10 bits of mantissa, too many for bfloat16; its summands do not.
    arrays = {
        'log_rhos': np.zeros((2, 1)),
        'discounts': np.ones((2, 1)),
        'rewards': np.array([[1.0], [2.0**-9]]),
        'values': np.zeros((2, 1)),
        'bootstrap_value': np.zeros(1),
    }
    arrays = {k: v.astype(tf.bfloat16.as_numpy_dtype) for k, v in arrays.items()}
    returns = _in_mode(mode, vtrace.from_importance_weights)(arrays)
    assert returns.vs.dtype == returns.pg_advantages.dtype == tf.float32
    np.testing.assert_array_equal(returns.vs, np.float32([[1 + 2.0**-9], [2.0**-9]]))


def test_from_logits_accepts_bfloat16():
    case = _known_case()
    bfloat16 = {
        k: v if k == 'actions' else v.astype(tf.bfloat16.as_numpy_dtype) for k, v in case.items()
    }
    exact = {k: np.asarray(v, v.dtype if k == 'actions' else 'f') for k, v in bfloat16.items()}
    returns, expected = vtrace.from_logits(**bfloat16), vtrace.from_logits(**exact)
    for actual, wanted in zip(returns, expected, strict=True):
        assert actual.dtype == tf.float32
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize('mode', ['eager', 'graph'])
def test_no_gradient_flows_through_the_targets(mode):
    case = {k: tf.constant(v) for k, v in _known_case().items()}
    floats = {k: v for k, v in case.items() if k != 'actions'}

    def gradients():
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(floats)
            returns = vtrace.from_logits(**case)
            weights = vtrace.from_importance_weights(
                log_rhos=floats['target_policy_logits'][..., 0],
                **{k: v for k, v in floats.items() if not k.endswith('logits')},
            )
            blocked = [returns.vs, returns.pg_advantages, returns.log_rhos]
            blocked += [returns.behaviour_action_log_probs, *weights]
        for target in blocked:
            assert all(g is None for g in tf.nest.flatten(tape.gradient(target, floats)))
        return tape.gradient(returns.target_action_log_probs, floats['target_policy_logits'])

    gradient = (gradients if mode == 'eager' else tf.function(gradients))()
    probabilities = _softmax(np.float64(case['target_policy_logits']))
    one_hot = np.eye(2)[case['actions'].numpy()]
    np.testing.assert_allclose(gradient, one_hot - probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('log_rhos', (5,)),
        ('log_rhos', (5, 4)),
        ('discounts', (5, 3, 1)),
        ('rewards', (4, 3)),
        ('rewards', (1, 3)),
        ('values', (5,)),
        ('values', (0, 3)),
        ('bootstrap_value', (4,)),
        ('bootstrap_value', (3, 1)),
        ('bootstrap_value', ()),
    ],
)
def test_wrong_shapes_of_weights_are_refused_by_name(name, shape):
    arrays = _random_weights((5, 3))
    arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=rf'^{name} '):
        vtrace.from_importance_weights(**arrays)
    with pytest.raises(ValueError, match=rf'{name} '):
        tf.function(vtrace.from_importance_weights)(**arrays)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('behaviour_policy_logits', np.zeros((4, 2), np.float32)),
        ('target_policy_logits', np.zeros((4, 2), np.float32)),
        ('target_policy_logits', np.zeros((4, 2, 3), np.float32)),
        ('actions', np.zeros((4, 3), np.int32)),
        ('actions', np.zeros((4, 2, 1), np.int32)),
        ('actions', np.zeros((4, 2), np.float32)),
        ('rewards', np.zeros((4, 2, 1), np.float32)),
        ('bootstrap_value', np.zeros((4, 2), np.float32)),
    ],
)
def test_wrong_shapes_of_logits_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf'^{name} '):
        vtrace.from_logits(**dict(_known_case(), **{name: value}))
