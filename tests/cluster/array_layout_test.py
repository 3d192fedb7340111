"""Tests of impala/cluster/array_layout.py."""

import ml_dtypes
import numpy as np
import pytest

from impala.cluster.array_layout import ArrayLayout
from impala.experience.replay import aligned
from impala.trajectory import ArraySpec

SPECS = [
    ArraySpec((), 'int32'),
    ArraySpec((3, 2), 'float64'),
    ArraySpec((0, 4), 'float32'),
    ArraySpec((5,), 'bool'),
    ArraySpec((64,), 'uint8'),
    ArraySpec((2,), 'bfloat16'),
]


def arrays():
    return [
        np.array(258, np.int32),
        np.arange(6, dtype='float64').reshape(3, 2),
        np.zeros((0, 4), 'float32'),
        np.array([True, False, True, True, False]),
        np.arange(64, dtype='uint8'),
        np.array([1, -2], ml_dtypes.bfloat16),
    ]


def expected_bytes():
    expected = bytearray(260)
    expected[:4] = 2, 1, 0, 0
    expected[64:112] = np.arange(6.0).tobytes()
    # The empty array is at 128, and so is the one after it.
    expected[128:133] = 1, 0, 1, 1, 0
    expected[192:256] = range(64)
    # The upper halves of float32: 0x3f80 and 0xc000.
    expected[256:260] = 0x80, 0x3F, 0x00, 0xC0
    return expected


def test_each_array_is_at_a_multiple_of_64_bytes():
    layout = ArrayLayout(SPECS)
    assert layout.nbytes == 260
    assert b''.join(layout.buffers(arrays())) == expected_bytes()


def test_bytes_at_the_start_are_left_out():
    layout = ArrayLayout(SPECS, start=65)
    assert layout.nbytes == 128 + 260
    assert b''.join(layout.buffers(arrays())) == bytes(63) + expected_bytes()


@pytest.mark.parametrize('start', [0, 1])
def test_arrays_in_a_buffer_are_views(start):
    layout = ArrayLayout(SPECS, start)
    buffer = aligned([layout.nbytes], np.dtype('uint8'))
    buffer[start:] = np.concatenate(layout.buffers(arrays()))
    for array, expected in zip(layout.arrays(buffer), arrays(), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, strict=True)
        assert not array.size or np.shares_memory(array, buffer)
        assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match=f'{layout.nbytes - 1} bytes, not {layout.nbytes}'):
        layout.arrays(buffer[:-1])


def test_contiguous_arrays_are_not_copied():
    own = arrays()
    layout = ArrayLayout(SPECS)
    buffers = layout.buffers(own)
    for array in own:
        assert not array.size or any(np.shares_memory(array, buffer) for buffer in buffers)
    own[1] = own[1].T.copy().T
    assert b''.join(layout.buffers(own)) == expected_bytes()


def test_other_arrays_are_refused():
    layout = ArrayLayout(SPECS[:2])
    good, names = arrays()[:2], ['one', 'two']
    layout.check(good, names)
    for other, error in (
        ([np.int64(1), good[1]], r'one is int64 \[\], not int32 \[\]'),
        ([good[0], good[1].T], r'two is float64 \[2, 3\], not float64 \[3, 2\]'),
        (good[:1], 'shorter'),
        ([*good, good[0]], 'longer'),
    ):
        with pytest.raises(ValueError, match=error):
            layout.check(other, names)
