"""Experience replay: unrolls of before, to be given out again.

Espeholt et al. 2018, section 5.2.2: sampled uniformly, removed first in, first out. V-trace
corrects them as it does any other unroll, by the behaviour policy that is stored with them.
Letters: T unroll length, C frames of a stack, K components of an unroll.
"""

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala.trajectory import UnrollArray

# Bytes at whose multiples an array must begin if TensorFlow is to use it without a copy.
_ALIGNMENT = 64


class Packing:
    """How an unroll is kept: as it is, but for a component that stacks the last C frames.

    Of such a component, as Atari's observations are, each frame is kept once: T+C frames in place
    of C(T+1). A row is then either the row before, moved on by a frame, or one frame C times, with
    which an episode begins. Which of them is read off the pixels, so that what comes out is what
    was put in, byte by byte; an unroll with a row that is neither cannot be packed. Nor can one
    with a float that is not finite: every batch with it would be skipped by the learner.

    One thread at a time may pack; any number may unpack.

    Attributes:
      components: of an unroll, as given.
      packed: of an unroll that is packed; time is a dimension like others there.
    """

    def __init__(self, components: Sequence[UnrollArray], stack: str | None = None):
        """Finds out what is to be kept.

        Args:
          components: of an unroll, as of `impala.experience.batch.unroll_components`.
          stack: name of the component, uint8 `[T+1, H, W, C]`, that is a stack of frames.
        """
        self.components = list(components)
        self.packed = [dataclasses.replace(each, time_major=False) for each in components]
        self._floats = [
            i
            for i, component in enumerate(components)
            if np.issubdtype(np.dtype(component.dtype), np.floating)
        ]
        self._stack = None
        if stack is not None:
            self._stack = [component.name for component in components].index(stack)
            rows, *frame, size = components[self._stack].shape
            self.packed[self._stack] = dataclasses.replace(
                self.packed[self._stack], shape=(rows + size - 1, *frame)
            )
            self.packed.append(UnrollArray((rows,), 'bool', f'{stack}_begins', False))
            # Of two rows as bytes, one of them moved on by a byte, all but the newest frame's are
            # the same if the one is the other moved on by a frame.
            num_bytes = math.prod(frame) * size - 1
            self._is_old = np.arange(num_bytes) % size != size - 1
            self._differs = np.empty((rows - 1, num_bytes), bool)

    @property
    def nbytes(self) -> int:
        """Bytes of a packed unroll."""
        return sum(math.prod(each.shape) * np.dtype(each.dtype).itemsize for each in self.packed)

    def new(self) -> list[np.ndarray]:
        """Returns arrays for a packed unroll, of any contents."""
        return [aligned(each.shape, np.dtype(each.dtype)) for each in self.packed]

    def pack(self, unroll: Sequence[np.ndarray], packed: Sequence[np.ndarray]) -> bool:
        """Writes an unroll as it is kept.

        Args:
          unroll: K arrays.
          packed: as of `new`, written to.

        Returns:
          Whether that was possible; nothing is written otherwise.
        """
        if not all(np.isfinite(unroll[i]).all() for i in self._floats):
            return False
        if self._stack is not None:
            stacks = unroll[self._stack]
            begins = self._rows_that_begin(stacks)
            if begins is None:
                return False
            num_old = stacks.shape[-1] - 1
            frames = packed[self._stack]
            frames[:num_old] = np.moveaxis(stacks[0, ..., :num_old], -1, 0)
            frames[num_old:] = stacks[..., num_old]
            packed[-1][...] = begins
        for i, array in enumerate(unroll):
            if i != self._stack:
                packed[i][...] = array
        return True

    def unpack(
        self, packed: Sequence[np.ndarray], unrolls: Sequence[np.ndarray], column: int
    ) -> None:
        """Writes a packed unroll as it was, into a column.

        Args:
          packed: written by `pack`.
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          column: of these, the one that is written.
        """
        for i, (component, array) in enumerate(zip(self.components, unrolls, strict=True)):
            if i == self._stack:
                begins = np.flatnonzero(packed[-1])
                _rebuild_stacks(packed[i], begins.tolist(), array[:, column])
            elif component.time_major:
                array[:, column] = packed[i]
            else:
                array[column] = packed[i]

    def num_columns(self, unrolls: Sequence[np.ndarray]) -> int:
        """Returns N of K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`."""
        return unrolls[0].shape[int(self.components[0].time_major)]

    def columns(self, unrolls: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Returns each unroll of such arrays by itself, in their order; nothing is copied."""
        return [
            [
                array[:, column] if component.time_major else array[column]
                for component, array in zip(self.components, unrolls, strict=True)
            ]
            for column in range(self.num_columns(unrolls))
        ]

    def _rows_that_begin(self, stacks: np.ndarray) -> np.ndarray | None:
        """Returns which rows, bool `[T+1]`, are one frame C times; None if a row is neither.

        Row 0 and rows that are the row before, moved on, do not count as such.
        """
        rows = stacks.reshape(len(stacks), -1)
        np.not_equal(rows[1:, :-1], rows[:-1, 1:], out=self._differs)
        self._differs &= self._is_old
        begins = np.zeros(len(stacks), bool)
        self._differs.any(1, out=begins[1:])
        if begins.any():
            first = stacks[begins]
            if (first != first[..., -1:]).any():
                return None
        return begins


class Replay:
    """A ring of unrolls, in memory that is set aside at the start. For any number of threads.

    Attributes:
      components: of an unroll, as given.
      capacity: unrolls that there is room for.
      left_out: unrolls that were not taken in, as they could not be packed.
    """

    def __init__(
        self, components: Sequence[UnrollArray], capacity: int, seed: Any, stack: str | None = None
    ):
        """Sets memory aside, of which the system gives out what is written to.

        Args:
          components: see `Packing`.
          capacity: unrolls, 1 or more.
          seed: of what is sampled; see `numpy.random.default_rng`.
          stack: see `Packing`.

        Raises:
          MemoryError: there is not so much.
        """
        self.components = list(components)
        self.capacity = capacity
        self.left_out = 0
        self._packing = Packing(components, stack)
        self._stores = [
            np.empty((capacity, *component.shape), component.dtype)
            for component in self._packing.packed
        ]
        self._added = 0
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes set aside, however few unrolls there are yet."""
        return sum(store.nbytes for store in self._stores)

    @property
    def description(self) -> str:
        """What this is, in a sentence for the user."""
        return (
            f'Replay of {self.capacity:,} trajectories of {self._packing.nbytes:,} bytes: '
            f'up to {self.nbytes / 1e9:.2f} GB of memory'
        )

    def add(self, unrolls: Sequence[np.ndarray]) -> None:
        """Takes unrolls in, in the order of their columns; the oldest make room.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
        """
        with self._lock:
            for unroll in self._packing.columns(unrolls):
                if self._packing.pack(unroll, self._slot(self._added % self.capacity)):
                    self._added += 1
                else:
                    self.left_out += 1

    def reserve(self, number: int) -> bool:
        """Returns whether that many unrolls can be drawn, by a call of `sample` that must follow.

        Args:
          number: of unrolls.
        """
        return len(self) > 0

    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None:
        """Writes unrolls, each drawn uniformly from all that there are, into columns.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          first_column: of those that are written; the last one is the last there is.

        Raises:
          ValueError: there is nothing to draw from.
        """
        with self._lock:
            num_drawn = self._packing.num_columns(unrolls) - first_column
            slots = self._random.integers(len(self), size=num_drawn)
            for column, slot in enumerate(slots.tolist(), first_column):
                self._packing.unpack(self._slot(slot), unrolls, column)

    def metrics(self) -> dict[str, float]:
        """Returns what the log is to know, by its name there."""
        values: dict[str, float] = {'replay_unrolls': len(self)}
        if self.left_out:
            values['replay_unrolls_left_out'] = self.left_out
        return values

    def stage_seconds(self) -> dict[str, float]:
        """Returns the seconds so far of stages on threads of its own: it has none."""
        return {}

    def _slot(self, slot: int) -> list[np.ndarray]:
        return [store[slot, ...] for store in self._stores]


def unroll_nbytes(components: Sequence[UnrollArray], stack: str | None = None) -> int:
    """Returns the bytes of one stored unroll; arguments as of `Packing`."""
    return Packing(components, stack).nbytes


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array of any contents that TensorFlow can use as it is."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _rebuild_stacks(frames: np.ndarray, begins: Sequence[int], stacks: np.ndarray) -> None:
    """Writes the stacks of an unroll.

    Args:
      frames: `[T+C, H, W]`, each once.
      begins: rows whose stack is one frame C times, though the row before is another.
      stacks: `[T+1, H, W, C]`, written to.
    """
    num_rows, size = stacks.shape[0], stacks.shape[-1]
    for i in range(size):
        stacks[..., i] = frames[i : i + num_rows]
    for row in begins:
        # What would be older is not of this episode.
        for i in range(size - 1):
            stacks[row : row + size - 1 - i, ..., i] = frames[row + size - 1]
