"""Experience replay: earlier unrolls, to be learned from again.

Espeholt et al. 2018, section 5.2.2: sampled uniformly, removed first in, first out. V-trace
corrects them like any other unroll, by the behaviour policy that is stored with them.
Letters: T unroll length, C frames of a stack, K components of an unroll.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala.trajectory import UnrollArray

# TensorFlow uses an array without a copy if its address is a multiple of this, in bytes.
ALIGNMENT = 64


class Packing:
    """The format of a stored unroll: unchanged, except for a component that stacks C frames.

    Of such a component, for instance Atari's observations, each frame is stored once: T+C frames
    instead of C(T+1). Each row must be either the previous row shifted by a frame or, where an
    episode begins, one frame C times. The pixels tell which, so an unroll is restored byte for
    byte. An unroll with any other row cannot be packed. Nor can one with a float that is not
    finite, as the learner would skip every batch that contains it.

    One thread at a time may pack; any number may unpack.

    Attributes:
      components: of an unroll, as given.
      packed: components of a packed unroll, none of them time-major. A stack's frames take its
        place; which rows begin an episode, bool `[T+1]`, comes last.
      stack: index of the component that is a stack of frames, None if none is.
    """

    def __init__(self, components: Sequence[UnrollArray], stack: str | None = None):
        """Determines the packed components.

        Args:
          components: of an unroll, from `impala.experience.batch.unroll_components`.
          stack: name of the component, uint8 `[T+1, H, W, C]`, that is a stack of frames.
        """
        self.components = list(components)
        self.packed = [dataclasses.replace(each, time_major=False) for each in components]
        self._floats = [
            i
            for i, component in enumerate(components)
            if np.issubdtype(np.dtype(component.dtype), np.floating)
        ]
        self.stack: int | None = None
        if stack is not None:
            self.stack = [component.name for component in components].index(stack)
            rows, *frame, size = components[self.stack].shape
            self.packed[self.stack] = dataclasses.replace(
                self.packed[self.stack], shape=(rows + size - 1, *frame)
            )
            self.packed.append(UnrollArray((rows,), 'bool', f'{stack}_begins', False))
            # A row is the previous one shifted by a frame if its bytes are those of the previous
            # row shifted by a byte, except for the bytes of the newest frame.
            num_bytes = math.prod(frame) * size - 1
            self._is_old = np.arange(num_bytes) % size != size - 1
            self._differs = np.empty((rows - 1, num_bytes), bool)
        self._ends = list(itertools.accumulate(each.nbytes for each in self.packed))

    @property
    def nbytes(self) -> int:
        """Bytes of a packed unroll."""
        return self._ends[-1]

    def views(self, memory: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays of a packed unroll, which lie in memory one after the other.

        Args:
          memory: u8 `[nbytes]`.
        """
        return [
            memory[start:end].view(each.dtype).reshape(each.shape)
            for start, end, each in zip([0, *self._ends], self._ends, self.packed, strict=False)
        ]

    def accepts(self, memory: np.ndarray) -> bool:
        """Returns whether all values of a packed unroll are valid.

        Args:
          memory: see `views`.
        """
        views = zip(self.packed, self.views(memory), strict=True)
        return all(component.accepts(array) for component, array in views)

    def pack(self, unroll: Sequence[np.ndarray], packed: Sequence[np.ndarray]) -> bool:
        """Packs an unroll.

        Args:
          unroll: K arrays.
          packed: the arrays that `packed` describes, written to.

        Returns:
          Whether that was possible; nothing is written otherwise.
        """
        if not all(np.isfinite(unroll[i]).all() for i in self._floats):
            return False
        if self.stack is not None and not self.pack_stack(
            unroll[self.stack], packed[self.stack], packed[-1]
        ):
            return False
        for i, array in enumerate(unroll):
            if i != self.stack:
                packed[i][...] = array
        return True

    def pack_stack(self, stacks: np.ndarray, frames: np.ndarray, begins: np.ndarray) -> bool:
        """Packs only the component that stacks frames; see `pack`.

        Args:
          stacks: u8 `[T+1, H, W, C]`.
          frames: u8 `[T+C, H, W]`, written to.
          begins: bool `[T+1]`, whether an episode begins with the row; written to.

        Returns:
          Whether that was possible; nothing is written otherwise.
        """
        rows_that_begin = self._rows_that_begin(stacks)
        if rows_that_begin is None:
            return False
        num_old = stacks.shape[-1] - 1
        frames[:num_old] = np.moveaxis(stacks[0, ..., :num_old], -1, 0)
        frames[num_old:] = stacks[..., num_old]
        begins[...] = rows_that_begin
        return True

    def unpack(
        self, packed: Sequence[np.ndarray], unrolls: Sequence[np.ndarray], column: int
    ) -> None:
        """Unpacks an unroll into a column.

        Args:
          packed: written by `pack`.
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          column: of `unrolls`, from 0 to N-1; written to.
        """
        for i, (component, array) in enumerate(zip(self.components, unrolls, strict=True)):
            if i == self.stack:
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
        """Returns each unroll of such arrays, in their order, as views."""
        return [
            [
                array[:, column] if component.time_major else array[column]
                for component, array in zip(self.components, unrolls, strict=True)
            ]
            for column in range(self.num_columns(unrolls))
        ]

    def _rows_that_begin(self, stacks: np.ndarray) -> np.ndarray | None:
        """Returns the rows with which an episode begins, bool `[T+1]`.

        These are one frame C times. Row 0 and rows that are the previous one shifted by a frame do
        not count. None if another row is neither.
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
    """A ring of unrolls, in memory reserved at the start. Any thread may use it.

    Attributes:
      components: of an unroll, as given.
      capacity: unrolls that there is room for.
      left_out: number of unrolls that were rejected because they could not be packed.
    """

    def __init__(
        self, components: Sequence[UnrollArray], capacity: int, seed: Any, stack: str | None = None
    ):
        """Reserves memory; the system provides a page when it is first written to.

        Args:
          components: see `Packing`.
          capacity: unrolls, 1 or more.
          seed: of the sampling; see `numpy.random.default_rng`.
          stack: see `Packing`.

        Raises:
          MemoryError: there is not enough.
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
        """Bytes reserved, however few unrolls are stored."""
        return sum(store.nbytes for store in self._stores)

    @property
    def description(self) -> str:
        """What this is, in a sentence for the user."""
        return (
            f'Replay of {self.capacity:,} trajectories of {self._packing.nbytes:,} bytes: '
            f'up to {self.nbytes / 1e9:.2f} GB of memory'
        )

    def add(self, unrolls: Sequence[np.ndarray]) -> None:
        """Stores unrolls in the order of their columns; they replace the oldest.

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
        """Returns whether that many unrolls can be drawn; if so, a call of `sample` must follow.

        Args:
          number: of unrolls.
        """
        return len(self) > 0

    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None:
        """Draws unrolls uniformly, with replacement, and writes them into columns.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          first_column: this column and all after it are written.

        Raises:
          ValueError: the replay is empty.
        """
        with self._lock:
            num_drawn = self._packing.num_columns(unrolls) - first_column
            slots = self._random.integers(len(self), size=num_drawn)
            for column, slot in enumerate(slots.tolist(), first_column):
                self._packing.unpack(self._slot(slot), unrolls, column)

    def metrics(self) -> dict[str, float]:
        """Returns name -> value of the metrics for the log."""
        values: dict[str, float] = {'replay_unrolls': len(self)}
        if self.left_out:
            values['replay_unrolls_left_out'] = self.left_out
        return values

    def stage_seconds(self) -> dict[str, float]:
        """Returns the seconds of stages on threads of its own: it has none."""
        return {}

    def _slot(self, slot: int) -> list[np.ndarray]:
        return [store[slot, ...] for store in self._stores]


def unroll_nbytes(components: Sequence[UnrollArray], stack: str | None = None) -> int:
    """Returns the bytes of one stored unroll; for the arguments see `Packing`."""
    return Packing(components, stack).nbytes


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array that TensorFlow can use without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _rebuild_stacks(frames: np.ndarray, begins: Sequence[int], stacks: np.ndarray) -> None:
    """Rebuilds the stacks of an unroll.

    Args:
      frames: `[T+C, H, W]`, each once.
      begins: rows with which an episode begins, one frame C times.
      stacks: `[T+1, H, W, C]`, written to.
    """
    num_rows, size = stacks.shape[0], stacks.shape[-1]
    for i in range(size):
        stacks[..., i] = frames[i : i + num_rows]
    for row in begins:
        # Older frames do not belong to this episode.
        for i in range(size - 1):
            stacks[row : row + size - 1 - i, ..., i] = frames[row + size - 1]
