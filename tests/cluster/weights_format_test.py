"""Tests of impala/cluster/weights_format.py."""

import numpy as np
import pytest
import tensorflow as tf

from impala.cluster.weights_format import WeightsFormat
from impala.experience.replay import aligned
from impala.learning.optimizers.rmsprop import RMSProp
from impala.trajectory import ArraySpec


def specs_of(weights):
    return [ArraySpec(tuple(each.shape), np.dtype(each.dtype).name) for each in weights]


def sent(weights_format, weights):
    """Returns what a peer reads."""
    buffers = weights_format.buffers(weights)
    assert sum(buffer.size for buffer in buffers) == weights_format.nbytes
    body = aligned([weights_format.nbytes], np.dtype('uint8'))
    body[:] = np.concatenate(buffers)
    return body, weights_format.weights(body)


def some_weights():
    random = np.random.default_rng(0)
    return [
        random.normal(size=(3, 3, 4, 16)).astype('float32'),
        random.normal(size=16).astype('float32'),
        random.normal(size=(5, 7)),
        np.array(2**40 + 1),
        np.float32(1.1),
        random.integers(9, size=(4, 2), dtype='int32'),
        np.zeros((0, 3), 'float32'),
    ]


def test_weights_arrive_unchanged_and_in_place():
    weights = some_weights()
    body, values = sent(WeightsFormat(specs_of(weights)), weights)
    for value, weight in zip(values, weights, strict=True):
        np.testing.assert_array_equal(value, weight, strict=True)
        assert not value.size or np.shares_memory(value, body)
        assert value.ctypes.data % 64 == 0


def test_weights_as_bfloat16():
    """Only float32 matrices are rounded, to the nearest number with 8 significant bits."""
    weights = some_weights()
    body, values = sent(WeightsFormat(specs_of(weights), bfloat16=True), weights)
    exact_body, _ = sent(WeightsFormat(specs_of(weights)), weights)
    assert exact_body.size - body.size == 3 * 3 * 4 * 16 * 2
    for value, weight in zip(values[1:], weights[1:], strict=True):
        np.testing.assert_array_equal(value, weight, strict=True)
    kernel = weights[0]
    mantissas, exponents = np.frexp(kernel.astype('float64'))
    nearest = np.ldexp(np.rint(mantissas * 256), exponents - 8)
    assert values[0].dtype == np.float32
    np.testing.assert_array_equal(values[0], nearest)
    assert (values[0] != kernel).any()


@pytest.mark.parametrize(
    'value', [0.0, -0.0, np.inf, -np.inf, np.nan, np.float32(3.4e38), np.float32(1e-45)]
)
def test_extreme_weights_as_bfloat16(value):
    weights = [np.full((1, 3), value, 'float32')]
    _, (rounded,) = sent(WeightsFormat(specs_of(weights), bfloat16=True), weights)
    np.testing.assert_array_equal(rounded, tf.cast(tf.cast(weights[0], tf.bfloat16), tf.float32))


def test_tensors_are_not_copied():
    tensors = [tf.constant([[1.0, 2.0]]), tf.constant(3, tf.int64), tf.cast([1.5], tf.bfloat16)]
    specs = [ArraySpec(tuple(each.shape), each.dtype.name) for each in tensors]
    weights_format = WeightsFormat(specs)
    buffers = weights_format.buffers(tensors)
    for tensor in tensors:
        array = np.asarray(tensor)
        assert any(np.shares_memory(array, buffer) for buffer in buffers)
    _, values = sent(weights_format, tensors)
    assert [value.tolist() for value in values] == [[[1.0, 2.0]], 3, [1.5]]


def test_other_networks_are_refused():
    weights_format = WeightsFormat([ArraySpec((2, 3), 'float32'), ArraySpec((3,), 'float32')])
    with pytest.raises(ValueError, match=r'weight 1 is float32 \[4\], not float32 \[3\]'):
        weights_format.buffers([np.zeros((2, 3), 'float32'), np.zeros(4, 'float32')])
    with pytest.raises(ValueError, match='shorter'):
        weights_format.buffers([np.zeros((2, 3), 'float32')])
    with pytest.raises(ValueError, match='there are 75 bytes, not 76'):
        weights_format.weights(np.zeros(75, np.uint8))


def _assign(variable):
    return lambda: variable.assign(tf.fill(variable.shape, -1.0))


def _assign_sub(variable):
    return lambda: variable.assign_sub(tf.ones(variable.shape))


def _scatter(variable):
    return lambda: variable.scatter_nd_update([[0]], [[-1.0] * variable.shape[1]])


def _rmsprop(variable):
    optimizer = RMSProp([variable])
    return lambda: optimizer.apply([tf.ones(variable.shape)], [variable], 0.1)


def _sparse_rmsprop(variable):
    optimizer = RMSProp([variable])
    row = tf.IndexedSlices(tf.ones([1, variable.shape[1]]), tf.constant([2]))
    return lambda: optimizer.apply([row], [variable], 0.1)


@pytest.mark.parametrize('reading', ['eager', 'function'])
@pytest.mark.parametrize('updating', ['eager', 'function', 'compiled'])
@pytest.mark.parametrize('make_update', [_assign, _assign_sub, _scatter, _rmsprop, _sparse_rmsprop])
def test_updates_of_a_variable_do_not_reach_buffers(make_update, updating, reading):
    before = np.arange(6000, dtype='float32').reshape(60, 100)
    variable = tf.Variable(before)
    update = make_update(variable)

    def read():
        return [tf.identity(variable)]

    weights = (read if reading == 'eager' else tf.function(read))()
    buffers = WeightsFormat(specs_of([before])).buffers(weights)
    del weights
    # XLA supports neither sparse updates nor our own ops.
    compiled = updating == 'compiled' and make_update not in (_rmsprop, _sparse_rmsprop)
    (update if updating == 'eager' else tf.function(update, jit_compile=compiled))()
    assert b''.join(buffers) == before.tobytes()
    assert (variable.numpy() != before).any()


def test_reading_a_variable_does_not_copy():
    variable = tf.Variable(np.ones((100, 10), 'float32'))
    read = tf.function(lambda: [tf.identity(variable)])
    first, second = (WeightsFormat(specs_of([variable.numpy()])).buffers(read()) for _ in range(2))
    assert np.shares_memory(first[0], second[0])
