"""Tests of impala/cluster/unroll_format.py; exchange_test.py has the way through the inbox."""

import numpy as np
import pytest

from impala.cluster.unroll_format import UnrollFormat
from impala.experience.batch import unroll_components
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, UnrollArray

COMPONENTS = [
    UnrollArray((), 'int32', 'level_id', time_major=False),
    UnrollArray((2, 1, 2, 2), 'uint8', 'frame'),
    UnrollArray((2,), 'float32', 'reward'),
]


def unroll():
    return [
        np.int32(258),
        np.array([[[[1, 2], [3, 4]]], [[[2, 5], [4, 6]]]], np.uint8),
        np.array([1, -2], 'float32'),
    ]


def test_plain_and_packed_bytes():
    rewards = np.array([1, -2], 'float32').tobytes()
    expected = bytearray(257)
    expected[64:68] = 2, 1, 0, 0
    expected[128:136] = 1, 2, 3, 4, 2, 5, 4, 6
    expected[192:200] = rewards
    plain = UnrollFormat(COMPONENTS)
    assert b''.join(plain.buffers(unroll())) == expected[:200]
    assert (plain.nbytes, plain.packed_nbytes, plain.max_nbytes) == (200, 200, 200)
    expected[0] = 1
    # Three frames of two pixels.
    expected[128:136] = 1, 3, 2, 4, 5, 6, 0, 0
    # No episode begins.
    packed = UnrollFormat(COMPONENTS, 'frame')
    assert b''.join(packed.buffers(unroll())) == expected + bytes(1)
    assert (packed.nbytes, packed.packed_nbytes, packed.max_nbytes) == (200, 258, 258)


def test_an_episode_that_begins_is_sent_with_a_packed_unroll():
    arrays = unroll()
    arrays[1][1, 0] = [[7, 7], [8, 8]]
    buffer = b''.join(UnrollFormat(COMPONENTS, 'frame').buffers(arrays))
    assert buffer[0] == 1
    assert [*buffer[128:134]] == [1, 3, 2, 4, 7, 8]
    assert [*buffer[256:]] == [0, 1]


def test_a_stack_that_cannot_be_packed_is_sent_plain():
    arrays = unroll()
    arrays[1][1, 0, 0] = 9, 5
    buffer = b''.join(UnrollFormat(COMPONENTS, 'frame').buffers(arrays))
    assert len(buffer) == 200
    assert [*buffer[:1], *buffer[128:136]] == [0, 1, 2, 3, 4, 9, 5, 4, 6]


def test_values_that_are_not_finite_do_not_prevent_packing():
    arrays = unroll()
    arrays[2][1] = np.nan
    assert UnrollFormat(COMPONENTS, 'frame').buffers(arrays)[0] == 1


def test_other_arrays_are_refused():
    arrays = unroll()
    arrays[1] = np.zeros((3, 1, 2, 2), np.uint8)
    error = r"'frame' is uint8 \[3, 1, 2, 2\], not uint8 \[2, 1, 2, 2\]"
    for stack in (None, 'frame'):
        with pytest.raises(ValueError, match=error):
            UnrollFormat(COMPONENTS, stack).buffers(arrays)


def test_a_packed_unroll_of_atari_has_171_kb():
    spec = EnvironmentSpec(
        {'frame': ArraySpec((84, 84, 4), 'uint8')}, ActionSpec.discrete(6), 4, 'atari'
    )
    unroll_format = UnrollFormat(unroll_components(spec, (), 20, 1), 'frame')
    # The form, level and version; return, reward, steps, frames and ends; actions and 6 logits.
    rest = 3 * 64 + 4 * 128 + 64 + 128 + 512
    # The last array is not followed by zeros: baselines, or in which rows an episode begins.
    assert unroll_format.nbytes == rest + 21 * 84 * 84 * 4 + (-21 * 84 * 84 * 4) % 64 + 84
    assert unroll_format.packed_nbytes == rest + 24 * 84 * 84 + 128 + 21 == 170_901
