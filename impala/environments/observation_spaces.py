"""Observation spaces of Gymnasium: what is supported, checked and converted for the agent.

Gymnasium does not enforce that observations are in their space: float pixels in a uint8 space would
turn black, 300 would become 44, and `[C, H, W]` would be reshaped to `[H, W, C]`. So every
observation is compared with its space before it is converted:

* Images must have exactly the declared shape and range. Those of bytes must be uint8; those of
  floats may be numbers of any kind and width.
* Numbers must have the declared shape, range and kind: only integers are integers, while both
  integers and floats are floats. Their width does not matter, because the agent sees float32 anyway
  and many environments return float64.
* Floats may exceed their range by `FLOAT_TOLERANCE`. More is an error in an image or at a reset. In
  numbers, at other steps, it is one warning, because common environments exceed their declared
  range (LunarLander-v3 in one episode of seven); the agent then sees the value unclipped.
* NaN and infinity are in every range. The actor handles them.

Python's lists and scalars have no dtype: integers in a list fit any dtype that can hold them.
"""

import abc
import contextlib
import functools
import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from impala.environments.environment import DeclarationError
from impala.trajectory import ArraySpec, Part

# Smaller uint8 arrays are symbolic grids or memory contents, which resizing would destroy.
MIN_IMAGE_SIDE = 32
# More numbers than these are pictures or maps, which need another encoder than a linear layer.
MAX_NUMBERS = 10_000
RULE = (
    'an observation may be an image (uint8 [H, W], or [H, W, C] or [C, H, W] of uint8 or of floats '
    f'between finite bounds, with sides of at least {MIN_IMAGE_SIDE} pixels), at most '
    f'{MAX_NUMBERS:,} numbers, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these '
    'and of texts'
)
# Relative to the larger bound. More than the rounding error of float16 (5e-4), and less than any
# mistake of scale or sign.
FLOAT_TOLERANCE = 1e-3

# OpenCV cannot enlarge images with more.
_MAX_RESIZED_CHANNELS = 4
_KINDS = {'b': 'biu', 'i': 'biu', 'u': 'biu', 'f': 'biuf'}


class Entry(abc.ABC):
    """An entry of an observation, converted from the values of one space.

    Attributes:
      spec: of `array`.
      array: the converted value; each `take` overwrites it.
    """

    def __init__(self, spec: ArraySpec, declared: str, level_name: str, subject: str) -> None:
        """Prepares the array.

        Args:
          spec: of the array.
          declared: the space in words.
          level_name: for messages.
          subject: in words, what the space describes.
        """
        self.spec = spec
        self.array = np.zeros(spec.shape, spec.dtype)
        self._declared = declared
        self._level_name = level_name
        self._subject = subject

    @abc.abstractmethod
    def take(self, value: Any, is_first: bool) -> None:
        """Checks a value and converts it to `array`.

        Args:
          value: what the environment returned.
          is_first: whether it starts an episode.

        Raises:
          DeclarationError: the value is not in the space.
        """

    def _error(self, came: str) -> DeclarationError:
        return DeclarationError(
            f'{self._level_name!r} declares {self._declared} as {self._subject}, but returned '
            f'{came}.'
        )


class _BoxEntry(Entry):
    """The common part of images and numbers."""

    def __init__(self, space: Any, spec: ArraySpec, level_name: str, subject: str) -> None:
        super().__init__(spec, _array_text(space), level_name, subject)
        self._space = space
        self._shape = space.shape
        self._dtype = np.dtype(space.dtype)

    def _is_as_declared(self, value: Any) -> bool:
        return (
            isinstance(value, np.ndarray)
            and value.dtype == self._dtype
            and value.shape == self._shape
        )

    def _to_array(self, value: Any) -> np.ndarray:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise self._error(f'a {type(value).__name__} that is not an array') from error
        if array.shape != self._shape:
            raise self._error(value_text(value))
        return array

    def _first_outside(self, value: np.ndarray, tolerance: float) -> tuple[int, ...] | None:
        """Returns the position of the first finite number that is out of range, if any."""
        low, high = _bounds(self._space, tolerance)
        # Neither comparison holds for NaN.
        outside = ((value < low) | (value > high)) & np.isfinite(value)
        positions = np.argwhere(outside)
        return tuple(map(int, positions[0])) if len(positions) else None

    def _range_text(self, position: tuple[int, ...]) -> str:
        where = f'at {list(position)} of {self._subject}' if position else f'as {self._subject}'
        low, high = self._space.low[position], self._space.high[position]
        return (
            f'{self._level_name!r} declares {self._dtype} values from {low} to {high} {where}, but '
            'returned'
        )

    def _refuse_outside(self, value: np.ndarray, tolerance: float) -> None:
        position = self._first_outside(value, tolerance)
        if position is not None:
            raise DeclarationError(f'{self._range_text(position)} {value[position]}.')


class _Image(_BoxEntry):
    """An image, resized if a size is given; `[H, W]` and `[C, H, W]` become `[H, W, C]`.

    Pixels are uint8, or floats that are scaled from their range to [0, 1].
    """

    def __init__(
        self, space: Any, size: tuple[int, int] | None, level_name: str, subject: str
    ) -> None:
        self._channels_first = _has_channels_first(space.shape)
        shape = space.shape
        if self._channels_first:
            shape = (*shape[1:], shape[0])
        height, width = shape[:2]
        channels = shape[2] if len(shape) == 3 else 1
        self._resize = None
        if size is not None and size != (width, height):
            import cv2

            # There are more actor processes than cores already.
            cv2.setNumThreads(1)
            self._resize = functools.partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)
            if channels > _MAX_RESIZED_CHANNELS:
                self._resize = functools.partial(_resize_in_parts, self._resize)
            width, height = size
        self._is_float = np.dtype(space.dtype).kind == 'f'
        spec = ArraySpec((height, width, channels), 'float32' if self._is_float else 'uint8')
        super().__init__(space, spec, level_name, subject)
        if self._channels_first:
            self._channels_last = np.zeros(shape, spec.dtype)
        self._is_bounded = _is_bounded(space)
        self._is_prepared = self._is_float or self._is_bounded or self._channels_first
        if self._is_float:
            low, high = (bound.astype(np.float32) for bound in (space.low, space.high))
            self._low, self._width = _scalar(low), _scalar(np.where(high > low, high - low, 1))
            lowest, highest = _bounds(space, FLOAT_TOLERANCE)
            self._lowest, self._highest = _scalar(lowest), _scalar(highest)

    def take(self, value: Any, is_first: bool) -> None:
        if not self._is_as_declared(value):
            value = self._as_declared(value)
        if self._is_prepared:
            value = self._prepared(value)
        if self._resize is not None:
            value = self._resize(value)
        self.array[...] = value.reshape(self.array.shape)

    def _prepared(self, value: np.ndarray) -> np.ndarray:
        """Returns an image with scaled pixels and its channels last; checks its range."""
        if self._is_float:
            value = self._scaled(value)
        elif self._is_bounded:
            self._refuse_outside(value, 0.0)
        if not self._channels_first:
            return value
        # Many times as fast as a copy of `np.moveaxis`.
        for channel, plane in enumerate(value):
            self._channels_last[..., channel] = plane
        return self._channels_last

    def _scaled(self, value: np.ndarray) -> np.ndarray:
        if (value < self._lowest).any() or (value > self._highest).any():
            self._refuse_outside(value, FLOAT_TOLERANCE)
        scaled = value.astype(np.float32)
        scaled -= self._low
        scaled /= self._width
        return scaled

    def _as_declared(self, value: Any) -> np.ndarray:
        array = self._to_array(value)
        if self._is_float:
            if array.dtype.kind not in _KINDS['f']:
                raise self._error(value_text(value))
            return array
        if isinstance(value, list | tuple) and array.dtype.kind in 'iu':
            self._refuse_outside(array, 0.0)
            array = array.astype(np.uint8)
        if array.dtype != np.uint8:
            raise self._error(value_text(value))
        return array


class _Numbers(_BoxEntry):
    """A Box of numbers, flattened to float32."""

    def __init__(self, space: Any, level_name: str, subject: str) -> None:
        spec = ArraySpec((int(np.prod(space.shape)),), 'float32')
        super().__init__(space, spec, level_name, subject)
        self._tolerance = FLOAT_TOLERANCE if self._dtype.kind == 'f' else 0.0
        self._is_checked = self._is_bounded = _is_bounded(space)
        low, high = _bounds(space, self._tolerance)
        with np.errstate(over='ignore'):
            self._low = low.reshape(-1).astype(np.float32)
            self._high = high.reshape(-1).astype(np.float32)
        self._is_within = np.ones((2, *spec.shape), bool)
        self._is_above, self._is_below = self._is_within

    def take(self, value: Any, is_first: bool) -> None:
        if not self._is_as_declared(value):
            value = self._as_declared(value)
        self.array[...] = value.reshape(-1)
        if self._is_checked or (is_first and self._is_bounded):
            # Half the cost of `np.any`, which matters when there are only four numbers.
            np.greater_equal(self.array, self._low, self._is_above)
            np.less_equal(self.array, self._high, self._is_below)
            if b'\0' in self._is_within.tobytes():
                self._out_of_range(value, is_first)

    def _as_declared(self, value: Any) -> np.ndarray:
        array = self._to_array(value)
        if array.dtype.kind not in _KINDS[self._dtype.kind]:
            raise self._error(value_text(value))
        if self._dtype.kind != 'f':
            # Its dtype differs, so it may exceed even the whole range of the declared one.
            self._refuse_outside(array, 0.0)
        return array

    def _out_of_range(self, value: np.ndarray, is_first: bool) -> None:
        if is_first or self._dtype.kind != 'f':
            self._refuse_outside(value, self._tolerance)
            return
        position = self._first_outside(value, self._tolerance)
        if position is None:
            return
        self._is_checked = False
        size = 'smaller' if value[position] < self._space.low[position] else 'larger'
        # Without the value, so that the warnings of all actors are equal and shown once.
        logging.getLogger(__name__).warning(
            '%s a %s one in mid-episode: the agent is given it as it is.',
            self._range_text(position),
            size,
        )


class _OneHot(Entry):
    """A Discrete space, as a one-hot float32 vector."""

    def __init__(self, space: Any, level_name: str, subject: str) -> None:
        categories = (int(space.n),)
        spec = ArraySpec(categories, 'float32', parts=(Part('categories', categories),))
        super().__init__(spec, str(space), level_name, subject)
        self._start = int(space.start)
        self._size = int(space.n)
        self._hot = 0

    def take(self, value: Any, is_first: bool) -> None:
        try:
            index = operator.index(value) - self._start
        except TypeError as error:
            raise self._error(value_text(value)) from error
        if not 0 <= index < self._size:
            raise self._error(str(value))
        self.array[self._hot] = 0
        self.array[index] = 1
        self._hot = index


class _OneHots(Entry):
    """A MultiDiscrete space, as a one-hot float32 vector for each component."""

    def __init__(self, space: Any, level_name: str, subject: str) -> None:
        sizes = space.nvec.reshape(-1)
        part = Part('categories', tuple(map(int, sizes)))
        spec = ArraySpec((part.size,), 'float32', parts=(part,))
        super().__init__(spec, space_text(space), level_name, subject)
        self._shape = space.shape
        self._start = np.asarray(space.start).reshape(-1)
        self._sizes = sizes
        self._begins = np.cumsum([0, *sizes[:-1]])

    def take(self, value: Any, is_first: bool) -> None:
        indices = _integers(value, self._shape)
        if indices is None:
            raise self._error(value_text(value))
        indices = indices - self._start
        outside = (indices < 0) | (indices >= self._sizes)
        if outside.any():
            raise self._error(_first(value, outside))
        self.array[...] = 0
        self.array[self._begins + indices] = 1


class _Bits(Entry):
    """A MultiBinary space, as float32."""

    def __init__(self, space: Any, level_name: str, subject: str) -> None:
        size = (math.prod(space.shape),)
        spec = ArraySpec(size, 'float32', parts=(Part('bits', size),))
        super().__init__(spec, space_text(space), level_name, subject)
        self._shape = space.shape

    def take(self, value: Any, is_first: bool) -> None:
        bits = _integers(value, self._shape)
        if bits is None:
            raise self._error(value_text(value))
        outside = (bits != 0) & (bits != 1)
        if outside.any():
            raise self._error(_first(value, outside))
        self.array[...] = bits


def make_entry(
    space: Any, size: tuple[int, int] | None, level_name: str, key: str | None = None
) -> Entry | None:
    """Returns the entry for a Gymnasium space that is not a Dict, Tuple or text; None by `RULE`.

    Args:
      space: a `gymnasium.Space`.
      size: width and height to resize images to, pixels; None to leave their size.
      level_name: for messages.
      key: of the space, if it is part of a Dict or Tuple.
    """
    from gymnasium import spaces

    subject = 'its observation' if key is None else f'{key!r} of its observation'
    if isinstance(space, spaces.Discrete):
        return _OneHot(space, level_name, subject) if 0 < space.n <= MAX_NUMBERS else None
    if isinstance(space, spaces.MultiDiscrete):
        count = int(space.nvec.sum())
        return _OneHots(space, level_name, subject) if 0 < count <= MAX_NUMBERS else None
    if isinstance(space, spaces.MultiBinary):
        count = math.prod(space.shape)
        return _Bits(space, level_name, subject) if 0 < count <= MAX_NUMBERS else None
    if not isinstance(space, spaces.Box) or 0 in space.shape:
        return None
    if _is_image(space):
        return _Image(space, size, level_name, subject)
    if math.prod(space.shape) <= MAX_NUMBERS and np.dtype(space.dtype).kind in _KINDS:
        return _Numbers(space, level_name, subject)
    return None


def is_text(space: Any) -> bool:
    """Returns whether the values of a space are strings, as in Text and MiniGrid's missions."""
    return space.dtype is not None and np.dtype(space.dtype).kind == 'U'


def space_text(space: Any) -> str:
    """Describes a space in one line, without its bounds if they are many numbers."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return f'Dict({", ".join(f"{key!r}: {space_text(each)}" for key, each in space.items())})'
    if isinstance(space, spaces.Tuple):
        return f'Tuple({", ".join(map(space_text, space))})'
    text = str(space)
    if isinstance(space, spaces.Box) and ('\n' in text or len(text) > 100):
        return f'Box({_array_text(space)})'
    # Such a text has an address in memory, which differs between processes.
    return type(space).__name__ if ' at 0x' in text else ' '.join(text.split())


def _is_image(space: Any) -> bool:
    dtype, shape = np.dtype(space.dtype), space.shape
    if dtype.kind == 'f':
        # Floats without a range could not be scaled; two dimensions of them are rather a matrix.
        with np.errstate(over='ignore', invalid='ignore'):
            width = space.high.astype(np.float32) - space.low.astype(np.float32)
        if len(shape) != 3 or not np.isfinite(width).all():
            return False
    elif dtype != np.uint8:
        return False
    if len(shape) not in (2, 3):
        return False
    return min(shape[:2]) >= MIN_IMAGE_SIDE or _has_channels_first(shape)


def _has_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] < MIN_IMAGE_SIDE <= min(shape[1:])


def _resize_in_parts(resize: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Resizes `[H, W, C]` with more channels than OpenCV supports."""
    step = _MAX_RESIZED_CHANNELS
    parts = [
        resize(np.ascontiguousarray(image[..., begin : begin + step]))
        for begin in range(0, image.shape[2], step)
    ]
    return np.dstack(parts)


def _scalar(bound: np.ndarray) -> Any:
    """Returns the number of which an array consists, which saves reading it; or else the array."""
    return bound.flat[0] if (bound == bound.flat[0]).all() else bound


def _first(value: Any, outside: np.ndarray) -> str:
    """Describes the first of the values that are out of range, given as a flat array of bool."""
    array = np.asarray(value)
    position = np.unravel_index(int(np.argmax(outside)), array.shape)
    return f'{array[position]} at {list(map(int, position))}' if array.shape else str(array)


def _integers(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a value as a flat array of integers; None if it has another shape or type."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    if array.shape != shape or array.dtype.kind not in 'biu':
        return None
    return array.reshape(-1).astype(np.int64)


def _is_bounded(space: Any) -> bool:
    """Returns whether a Box excludes some values of its dtype."""
    dtype = np.dtype(space.dtype)
    if dtype.kind == 'f':
        floats = np.finfo(dtype)
        return bool((space.low > floats.min).any() or (space.high < floats.max).any())
    if dtype.kind == 'b':
        return not ((space.low == 0) & (space.high == 1)).all()
    limits = np.iinfo(dtype)
    return not ((space.low == limits.min) & (space.high == limits.max)).all()


def _bounds(space: Any, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of a Box, widened by `tolerance` times the larger one."""
    low, high = space.low, space.high
    if not tolerance:
        return low, high
    low, high = low.astype(np.float64), high.astype(np.float64)
    scale = np.maximum(
        np.abs(np.where(np.isfinite(low), low, 0)), np.abs(np.where(np.isfinite(high), high, 0))
    )
    # A single bound at 0 tells nothing about the scale.
    scale = np.where(scale == 0, 1, scale)
    # Some environments declare the largest floats.
    with np.errstate(over='ignore'):
        return low - tolerance * scale, high + tolerance * scale


def _array_text(array: Any) -> str:
    return f'{np.dtype(array.dtype)} {list(array.shape)}'


def value_text(value: Any) -> str:
    """Describes in a few words what was returned instead of what was declared."""
    if isinstance(value, np.ndarray):
        return _array_text(value)
    if isinstance(value, np.generic):
        return f'{value.dtype} {value}'
    if isinstance(value, list | tuple):
        with contextlib.suppress(ValueError):  # Rows of different lengths are not an array.
            return f'a {type(value).__name__} of {_array_text(np.asarray(value))}'
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 50 else f'{text[:50]}...'
    return f'a {type(value).__name__}'
