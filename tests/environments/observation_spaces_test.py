"""Values checked against their spaces; Gymnasium decides about the bounds of floats."""

import warnings

import cv2
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    OneOf,
    Sequence,
    Text,
    Tuple,
)

from impala.environments import DeclarationError, observation_spaces
from impala.environments.observation_spaces import make_entry
from impala.trajectory import ArraySpec

PIXELS = Box(0, 255, (40, 50, 3), np.uint8)
FLOATS = Box(-1, 3, (40, 50, 3))


def entry_of(space, size=None):
    return make_entry(space, size, 'Level-v0')


def pixels(value, *shape, dtype=np.uint8):
    return np.full(shape or PIXELS.shape, value, dtype)


GRADIENT = np.arange(40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
LOW = np.float32([[[0]], [[-2]]]) + np.zeros((2, 32, 33), np.float32)
HIGH = np.float32([[[1]], [[2]]]) + np.zeros((2, 32, 33), np.float32)


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
        # Those of floats may have other dtypes, but not more than rounding beyond their range.
        (FLOATS, pixels(3.01, dtype=float), '3.01'),
        (FLOATS, pixels(-2, dtype=int), '-2'),
        (FLOATS, pixels(200), '200'),
        (FLOATS, pixels(1j, dtype=complex), 'complex128 [40, 50, 3]'),
        (FLOATS, pixels(0, 3, 40, 50, dtype=np.float32), 'float32 [3, 40, 50]'),
        (Box(0, 1, (3, 40, 50)), pixels(0, dtype=np.float32), 'float32 [40, 50, 3]'),
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
        (Box(-1, 1, (3,)), [[0.0], [1.0, 2.0], []], 'a list that is not an array'),
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
        # MultiDiscrete and MultiBinary.
        (MultiDiscrete([2, 3]), [0, 3], '3 at [1]'),
        (MultiDiscrete([2, 3], start=[1, 0]), np.array([0, 1]), '0 at [0]'),
        (MultiDiscrete([[2, 3], [4, 5]]), np.array([[0, 0], [9, 0]]), '9 at [1, 0]'),
        (MultiDiscrete([2, 3]), [0.0, 1.0], 'a list of float64 [2]'),
        (MultiDiscrete([2, 3]), [0, 1, 1], 'a list of int64 [3]'),
        (MultiDiscrete([2, 3]), None, 'None'),
        (MultiBinary(3), [0, 1, 2], '2 at [2]'),
        (MultiBinary([2, 2]), np.array([[0, 0], [-1, 0]]), '-1 at [1, 0]'),
        (MultiBinary(3), np.zeros(3), 'float64 [3]'),
        (MultiBinary([2, 2]), [[0, 1], [1]], 'a list'),
    ],
)
def test_values_outside_the_space_are_refused(space, value, came, is_first):
    entry = entry_of(space, (60, 70))
    with pytest.raises(DeclarationError) as error:
        entry.take(value, is_first)
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
        # Channels come last, and there may be any number of them.
        (
            Box(0, 255, (3, 40, 50), np.uint8),
            np.moveaxis(GRADIENT, -1, 0),
            GRADIENT,
        ),
        (Box(0, 255, (40, 50, 9), np.uint8), pixels(7, 40, 50, 9), pixels(7, 40, 50, 9)),
        (Box(0, 255, (2, 40, 50), np.uint8), pixels(7, 2, 40, 50), pixels(7, 40, 50, 2)),
        # Floats are scaled from their range to [0, 1].
        (FLOATS, pixels(2, dtype=np.float32), pixels(0.75, dtype=np.float32)),
        (FLOATS, pixels(2, dtype=int), pixels(0.75, dtype=np.float32)),
        (FLOATS, pixels(2.0, dtype=float).tolist(), pixels(0.75, dtype=np.float32)),
        (
            Box(LOW, HIGH),
            (LOW + HIGH) / 2,
            pixels(0.5, 32, 33, 2, dtype=np.float32),
        ),
        (
            Box(5, 5, (32, 32, 1), np.float64),
            pixels(5, 32, 32, 1, dtype=float),
            pixels(0, 32, 32, 1, dtype=np.float32),
        ),
        # Small images, and all else of three and more dimensions, are numbers.
        (
            Box(0, 255, (31, 40, 2), np.uint8),
            GRADIENT[:31, :40, 1:],
            GRADIENT[:31, :40, 1:].ravel(),
        ),
        (Box(0, 1, (2, 2, 2)), np.arange(8).reshape(2, 2, 2) / 8, np.arange(8) / 8),
        (Box(0, 1, (40, 40, 3), np.int16), pixels(1, 40, 40, 3, dtype=int), np.ones(4800)),
        (Box(-np.inf, 1, (40, 40, 3)), pixels(0.5, 40, 40, 3, dtype=float), np.full(4800, 0.5)),
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
        (MultiDiscrete([2, 3]), [1, 0], [0, 1, 1, 0, 0]),
        (MultiDiscrete([2, 3], start=[-1, 5]), np.array([-1, 7]), [1, 0, 0, 0, 1]),
        (MultiDiscrete([[2, 2], [1, 2]]), np.array([[0, 1], [0, 1]]), [1, 0, 0, 1, 1, 0, 1]),
        (MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (MultiBinary([2, 2]), [[True, False], [False, True]], [1, 0, 0, 1]),
    ],
)
def test_values_in_the_space_reach_the_agent(space, value, expected):
    entry = entry_of(space)
    for is_first in (True, False):
        entry.take(value, is_first)
        np.testing.assert_array_equal(entry.array, expected)
        got = ArraySpec(entry.array.shape, entry.array.dtype.name, parts=entry.spec.parts)
        assert got == entry.spec


@pytest.mark.parametrize('channels', [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('channels_first', [False, True])
@pytest.mark.parametrize('size', [(20, 90), (60, 70)])
def test_images_of_any_number_of_channels_are_resized(channels, dtype, channels_first, size):
    image = np.random.default_rng(1).integers(0, 256, (40, 50, channels)).astype(dtype)
    value = np.ascontiguousarray(np.moveaxis(image, -1, 0)) if channels_first else image
    entry = entry_of(Box(0, 255, value.shape, dtype), size)
    entry.take(value, True)
    assert entry.spec == ArraySpec((size[1], size[0], channels), np.dtype(dtype).name)
    for channel in range(channels):
        expected = cv2.resize(image[..., channel], size, interpolation=cv2.INTER_AREA)
        scale = 255 if dtype == np.float32 else 1
        np.testing.assert_allclose(entry.array[..., channel], expected / scale, 1e-5, 1e-6)


def test_rounding_beyond_the_range_of_float_images_is_accepted():
    entry = entry_of(FLOATS)
    for is_first in (True, False):
        entry.take(pixels(3.001, dtype=float), is_first)
        np.testing.assert_allclose(entry.array, 1.00025)
        for value in (np.nan, np.inf, -np.inf):
            entry.take(pixels(value, dtype=float), is_first)
            np.testing.assert_array_equal(entry.array, value)


def test_the_largest_floats_may_be_bounds():
    largest = np.finfo(np.float64).max
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        entry = entry_of(Box(-largest, largest, (2,), np.float64))
        entry.take(np.array([1.0, -2.0]), is_first=True)
    assert entry.array.tolist() == [1, -2]


def test_one_hot_vectors_have_a_single_one():
    entry = entry_of(Discrete(4))
    for value in (1, 3, 3, 0, 2):
        entry.take(value, False)
        np.testing.assert_array_equal(entry.array, np.eye(4)[value])


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_rounding_beyond_the_bounds_of_floats_is_accepted(dtype):
    low, high = np.array([[-1, 0, -1000, 0], [1, 1e-3, 0, np.inf]], dtype)
    space, scale = Box(low, high, dtype=dtype), [1, 1e-3, 1000, 1]
    entry = entry_of(space)
    for bound, outwards in ((low, -1), (high[:3], 1)):
        for i, value in enumerate(bound):
            rounded = np.array([0, 0, 0, 0], dtype)
            rounded[i] = np.nextafter(value, dtype(outwards * np.inf), dtype=dtype)
            assert not space.contains(rounded)
            entry.take(rounded, is_first=True)
            # A hundredth is more than rounding.
            rounded[i] = value + outwards * 0.01 * scale[i]
            with pytest.raises(DeclarationError, match=rf'at \[{i}\] of its observation'):
                entry.take(rounded, is_first=True)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_left_to_the_actor(value, caplog):
    entry = entry_of(Box(-1, 1, (2,)))
    for is_first in (True, False):
        entry.take(np.array([0, value], np.float32), is_first)
        np.testing.assert_array_equal(entry.array, [0, value])
        with pytest.raises(DeclarationError, match='5.0'):
            entry.take(np.array([5, value], np.float32), is_first=True)
    assert not caplog.records


def test_floats_out_of_range_in_mid_episode_are_reported_once(caplog):
    """Like LunarLander-v3's, which flies twenty times higher than it declares."""
    entry = entry_of(Box(-2.5, 2.5, (2,)))
    entry.take(np.array([0, 2.5], np.float32), is_first=True)
    for height in (2.4, 26.0, 27.0, -27.0):
        entry.take(np.array([0, height], np.float32), is_first=False)
        np.testing.assert_allclose(entry.array, [0, height])
    assert [record.getMessage() for record in caplog.records] == [
        "'Level-v0' declares float32 values from -2.5 to 2.5 at [1] of its observation, but "
        'returned a larger one in mid-episode: the agent is given it as it is.'
    ]
    with pytest.raises(DeclarationError, match='returned 27.0'):
        entry.take(np.array([0, 27], np.float32), is_first=True)


@pytest.mark.parametrize(
    'space',
    [
        Box(0, 255, (64, 64, 0), np.uint8),
        Box(0, 1, (0,)),
        # More than 10,000 numbers which are no image.
        Box(0, 255, (31, 31, 11), np.uint8),
        Box(0, 255, (4, 84, 84, 3), np.uint8),
        Box(-np.inf, np.inf, (64, 64, 3)),
        Box(0, np.inf, (64, 64, 3)),
        Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (64, 64, 3)),
        Box(0, 1, (200, 200)),
        Box(0, 1, (10_001,)),
        Box(0, 9, (64, 64, 3), np.int32),
        Discrete(10_001),
        MultiDiscrete([5000, 5001]),
        MultiBinary(10_001),
        Graph(Discrete(2), None),
        Sequence(Discrete(2)),
        OneOf([Discrete(2), Discrete(3)]),
    ],
    ids=observation_spaces.space_text,
)
def test_spaces_that_are_not_supported(space):
    assert entry_of(space) is None


@pytest.mark.parametrize(
    'space',
    [Box(0, 1, (10_000,)), Discrete(10_000), MultiDiscrete([5000, 5000]), MultiBinary([100, 100])],
    ids=observation_spaces.space_text,
)
def test_10_000_numbers_are_supported(space):
    spec = entry_of(space).spec
    assert spec == ArraySpec((10_000,), 'float32', parts=spec.parts)


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
