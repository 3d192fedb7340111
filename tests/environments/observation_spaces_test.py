"""Values checked against their spaces; Gymnasium decides about the bounds of floats."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text, Tuple

from impala.environments import DeclarationError, observation_spaces
from impala.environments.observation_spaces import make_frame
from impala.trajectory import ArraySpec

PIXELS = Box(0, 255, (40, 50, 3), np.uint8)


def frame_of(space, size=None):
    return make_frame(space, size, 'Level-v0')


def pixels(value, *shape, dtype=np.uint8):
    return np.full(shape or PIXELS.shape, value, dtype)


class LazyFrames:
    """Becomes an array on demand, like old frame stacks."""

    def __array__(self, dtype=None, copy=None):
        return pixels(7)


@pytest.mark.parametrize('is_first', [True, False])
@pytest.mark.parametrize(
    'space, value, came',
    [
        # Images need exactly the declared dtype, shape and range.
        (PIXELS, pixels(0.5, dtype=np.float32), 'float32 [40, 50, 3]'),
        (PIXELS, pixels(300, dtype=np.int64), 'int64 [40, 50, 3]'),
        (PIXELS, pixels(30, dtype=np.int64), 'int64 [40, 50, 3]'),
        (PIXELS, pixels(True, dtype=bool), 'bool [40, 50, 3]'),
        (PIXELS, pixels(1, 50, 40, 3), 'uint8 [50, 40, 3]'),
        (PIXELS, pixels(1, 3, 40, 50), 'uint8 [3, 40, 50]'),
        (PIXELS, pixels(1, 40, 50), 'uint8 [40, 50]'),
        (PIXELS, pixels(256, dtype=int).tolist(), '256'),
        (PIXELS, pixels(0.5, dtype=float).tolist(), 'a list of float64 [40, 50, 3]'),
        (PIXELS, None, 'None'),
        (Box(0, 200, PIXELS.shape, np.uint8), pixels(201), '201'),
        # Whole numbers.
        (Box(0, 255, (3,), np.uint8), np.array([0, 1, 256]), '256'),
        (Box(0, 255, (3,), np.uint8), np.array([-1, 1, 2]), '-1'),
        (Box(0, 9, (3,), np.uint8), np.array([0, 1, 10], np.uint8), '10'),
        (Box(0, 9, (3,), np.int32), np.array([0, 1, 2.0]), 'float64 [3]'),
        (Box(0, 9, (3,), np.int32), [0, 1, 2.5], 'a list of float64 [3]'),
        (Box(0, 1, (2,), np.bool_), np.array([0, 2]), '2'),
        (Box(0, 9, (), np.int32), 10, '10'),
        # Floats.
        (Box(-1, 1, (3,)), np.zeros(4, np.float32), 'float32 [4]'),
        (Box(-1, 1, (3,)), np.zeros((3, 1), np.float32), 'float32 [3, 1]'),
        (Box(-1, 1, (3,)), np.zeros(3, complex), 'complex128 [3]'),
        (Box(-1, 1, (3,)), [[0.0], [1.0, 2.0], []], 'a list that is no array'),
        (Box(-1, 1, (3,)), ['a', 'b', 'c'], 'a list of <U1 [3]'),
        (Box(-1, 1, (3,)), {'a': 1}, 'a dict'),
        (Box(-1, 1, (3,)), 0.5, '0.5'),
        # Discrete.
        (Discrete(5), -1, '-1'),
        (Discrete(5), 5, '5'),
        (Discrete(5, start=2), 1, '1'),
        (Discrete(5), 2.0, '2.0'),
        (Discrete(5), np.float32(2), 'float32 2.0'),
        (Discrete(5), np.array([2]), 'int64 [1]'),
        (Discrete(5), '2', "'2'"),
    ],
)
def test_values_outside_the_space_are_refused(space, value, came, is_first):
    frame = frame_of(space, (60, 70))
    with pytest.raises(DeclarationError) as error:
        frame.take(value, is_first)
    text = str(error.value)
    assert text.startswith("'Level-v0' declares ") and text.endswith(f', but returned {came}.')


@pytest.mark.parametrize(
    'space, value, expected',
    [
        (PIXELS, pixels(7), pixels(7)),
        (PIXELS, pixels(7).tolist(), pixels(7)),
        (PIXELS, LazyFrames(), pixels(7)),
        (PIXELS, pixels(7)[::-1, :, ::-1], pixels(7)),
        (Box(0, 255, (40, 50), np.uint8), pixels(7, 40, 50), pixels(7, 40, 50, 1)),
        (Box(0, 200, PIXELS.shape, np.uint8), pixels(200), pixels(200)),
        # Numbers of any width are accepted and become float32.
        (Box(-1, 1, (2,)), np.array([0.5, -1], np.float32), [0.5, -1]),
        (Box(-1, 1, (2,)), np.array([0.5, -1], np.float64), [0.5, -1]),
        (Box(-1, 1, (2,)), np.array([0, -1]), [0, -1]),
        (Box(-1, 1, (2,)), [0.5, -1], [0.5, -1]),
        (Box(-1, 1, (1, 2)), ((0, 1),), [0, 1]),
        (Box(-1, 1, ()), 0.5, [0.5]),
        (Box(0, 255, (2,), np.uint8), np.array([0, 255]), [0, 255]),
        (Box(0, 255, (2,), np.uint8), np.array([0, 255], np.uint8), [0, 255]),
        (Box(0, 1, (2,), np.bool_), np.array([True, False]), [1, 0]),
        (Box(-3, 9, (2,), np.int16), [-3, 9], [-3, 9]),
        (Discrete(3), 2, [0, 0, 1]),
        (Discrete(3), np.int8(0), [1, 0, 0]),
        (Discrete(3, start=-1), np.array(0), [0, 1, 0]),
    ],
)
def test_values_in_the_space_reach_the_agent(space, value, expected):
    frame = frame_of(space)
    for is_first in (True, False):
        frame.take(value, is_first)
        np.testing.assert_array_equal(frame.array, expected)
        got = ArraySpec(frame.array.shape, frame.array.dtype.name)
        assert got == frame.spec


def test_one_hot_vectors_have_a_single_one():
    frame = frame_of(Discrete(4))
    for value in (1, 3, 3, 0, 2):
        frame.take(value, False)
        np.testing.assert_array_equal(frame.array, np.eye(4)[value])


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_rounding_beyond_the_bounds_of_floats_is_accepted(dtype):
    low, high = np.array([[-1, 0, -1000, 0], [1, 1e-3, 0, np.inf]], dtype)
    space, scale = Box(low, high, dtype=dtype), [1, 1e-3, 1000, 1]
    frame = frame_of(space)
    for bound, outwards in ((low, -1), (high[:3], 1)):
        for i, value in enumerate(bound):
            rounded = np.array([0, 0, 0, 0], dtype)
            rounded[i] = np.nextafter(value, dtype(outwards * np.inf), dtype=dtype)
            assert not space.contains(rounded)
            frame.take(rounded, is_first=True)
            # A hundredth is more than rounding.
            rounded[i] = value + outwards * 0.01 * scale[i]
            with pytest.raises(DeclarationError, match=rf'at \[{i}\] of its observation'):
                frame.take(rounded, is_first=True)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_left_to_the_actor(value, caplog):
    frame = frame_of(Box(-1, 1, (2,)))
    for is_first in (True, False):
        frame.take(np.array([0, value], np.float32), is_first)
        np.testing.assert_array_equal(frame.array, [0, value])
        with pytest.raises(DeclarationError, match='5.0'):
            frame.take(np.array([5, value], np.float32), is_first=True)
    assert not caplog.records


def test_floats_out_of_range_in_mid_episode_are_reported_once(caplog):
    """Like LunarLander-v3's, which flies twenty times higher than it declares."""
    frame = frame_of(Box(-2.5, 2.5, (2,)))
    frame.take(np.array([0, 2.5], np.float32), is_first=True)
    for height in (2.4, 26.0, 27.0, -27.0):
        frame.take(np.array([0, height], np.float32), is_first=False)
        np.testing.assert_allclose(frame.array, [0, height])
    assert [record.getMessage() for record in caplog.records] == [
        "'Level-v0' declares float32 values from -2.5 to 2.5 at [1] of its observation, but "
        'returned a larger one in mid-episode: the agent is given it as it is.'
    ]
    with pytest.raises(DeclarationError, match='returned 27.0'):
        frame.take(np.array([0, 27], np.float32), is_first=True)


@pytest.mark.parametrize(
    'space',
    [
        Box(0, 255, (64, 64, 5), np.uint8),
        Box(0, 255, (3, 64, 64), np.uint8),
        Box(0, 255, (64, 64, 0), np.uint8),
        Box(0, 255, (20, 64, 3), np.uint8),
        Box(0, 1, (64, 64, 3), np.float32),
        Box(0, 1, (0,)),
        Box(0, 1, (2, 2, 2)),
        Tuple([Discrete(2)]),
        MultiBinary(3),
        Text(5),
    ],
    ids=str,
)
def test_spaces_that_cannot_be_frames(space):
    assert frame_of(space) is None


def test_text_spaces():
    minigrid = pytest.importorskip('minigrid.core.mission')
    mission = minigrid.MissionSpace(lambda: 'go')
    assert [observation_spaces.is_text(space) for space in (Text(3), mission)] == [True, True]
    assert not any(map(observation_spaces.is_text, (Discrete(3), PIXELS, Tuple([Text(3)]))))


def test_spaces_are_described_in_one_line():
    bounds = np.arange(100.0).reshape(10, 10)
    space = Dict(a=Box(bounds, bounds + 1, dtype=np.float64), b=Discrete(3), c=Tuple([PIXELS]))
    assert observation_spaces.space_text(space) == (
        "Dict('a': Box(float64 [10, 10]), 'b': Discrete(3), "
        "'c': Tuple(Box(0, 255, (40, 50, 3), uint8)))"
    )

    class Odd(gymnasium.Space):
        pass

    assert observation_spaces.space_text(Odd()) == 'Odd'
