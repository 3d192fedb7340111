"""Experience replay: unrolls of before that fill a part of each batch of the learner.

Espeholt et al. 2018, section 5.2.2: sampled uniformly, removed first in, first out. V-trace
corrects them as it does any other unroll, by the behaviour policy that is stored with them.
Letters: T unroll length, B batch size, C frames of a stack, K components of an unroll.
"""

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow as tf

from dynamic_batching.exchange import Component
from impala.acting import UnrollBatch, batch_components, batch_of_components
from impala.learner_group import Log

# Bytes at whose multiples an array must begin if TensorFlow is to use it without a copy.
_ALIGNMENT = 64


class Replay:
    """A ring of unrolls, in memory that is set aside at the start. For any number of threads.

    Of a component that stacks the last C frames, as Atari's observations do, each frame is kept
    once: T+C frames in place of C(T+1). A row is then either the row before, moved on by a frame,
    or one frame C times, with which an episode begins. Which of them is read off the pixels, so
    that what comes out is what was put in, byte by byte; an unroll with a row that is neither is
    not taken in.

    Attributes:
      components: of an unroll, as given.
      capacity: unrolls that there is room for.
      left_out: unrolls that were not taken in.
    """

    def __init__(
        self, components: Sequence[Component], capacity: int, seed: Any, stack: str | None = None
    ):
        """Sets memory aside, of which the system gives out what is written to.

        Args:
          components: of an unroll, as of `impala.remote_actors.unroll_components`.
          capacity: unrolls, 1 or more.
          seed: of what is sampled; see `numpy.random.default_rng`.
          stack: name of the component, uint8 `[T+1, H, W, C]`, that is a stack of frames.

        Raises:
          MemoryError: there is not so much.
        """
        self.components = list(components)
        self.capacity = capacity
        self.left_out = 0
        self._stores = [
            np.empty((capacity, *_stored_shape(component, stack)), component.dtype)
            for component in components
        ]
        self._stack = None
        if stack is not None:
            self._stack = [component.name for component in components].index(stack)
            rows, *frame, size = components[self._stack].shape
            self._begins = np.zeros((capacity, rows), bool)
            # Of two rows as bytes, one of them moved on by a byte, all but the newest frame's are
            # the same if the one is the other moved on by a frame.
            num_bytes = math.prod(frame) * size - 1
            self._is_old = np.arange(num_bytes) % size != size - 1
            self._differs = np.empty((rows - 1, num_bytes), bool)
        self._added = 0
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes set aside, however few unrolls there are yet."""
        stores = self._stores if self._stack is None else [*self._stores, self._begins]
        return sum(store.nbytes for store in stores)

    def add(self, unrolls: Sequence[np.ndarray]) -> None:
        """Takes unrolls in, in the order of their columns; the oldest make room.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
        """
        with self._lock:
            for column in range(self._num_columns(unrolls)):
                self._add(
                    [
                        array[:, column] if component.time_major else array[column]
                        for component, array in zip(self.components, unrolls, strict=True)
                    ]
                )

    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None:
        """Writes unrolls, each drawn uniformly from all that there are, into columns.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          first_column: of those that are written; the last one is the last there is.

        Raises:
          ValueError: there is nothing to draw from.
        """
        with self._lock:
            num_drawn = self._num_columns(unrolls) - first_column
            slots = self._random.integers(len(self), size=num_drawn)
            for column, slot in enumerate(slots.tolist(), first_column):
                for i, (component, array) in enumerate(zip(self.components, unrolls, strict=True)):
                    if i == self._stack:
                        begins = np.flatnonzero(self._begins[slot])
                        _rebuild_stacks(self._stores[i][slot], begins.tolist(), array[:, column])
                    elif component.time_major:
                        array[:, column] = self._stores[i][slot]
                    else:
                        array[column] = self._stores[i][slot]

    def _num_columns(self, unrolls: Sequence[np.ndarray]) -> int:
        return unrolls[0].shape[int(self.components[0].time_major)]

    def _add(self, unroll: list[np.ndarray]) -> None:
        slot = self._added % self.capacity
        if self._stack is not None:
            stacks = unroll[self._stack]
            begins = self._rows_that_begin(stacks)
            if begins is None:
                self.left_out += 1
                return
            self._begins[slot] = begins
            num_old = stacks.shape[-1] - 1
            frames = self._stores[self._stack][slot]
            frames[:num_old] = np.moveaxis(stacks[0, ..., :num_old], -1, 0)
            frames[num_old:] = stacks[..., num_old]
        for i, (store, array) in enumerate(zip(self._stores, unroll, strict=True)):
            if i != self._stack:
                store[slot] = array
        self._added += 1

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


class ReplayMixer:
    """Has batches consist of fresh unrolls and of replayed ones.

    The first k batches with replayed unrolls have `floor(k * fraction * B)` of them, so that the
    fraction is exact over time, and never off by as much as an unroll. As long as there is nothing
    to replay, batches are all fresh.
    """

    def __init__(self, replay: Replay, fraction: float, batch_size: int):
        """Wraps a replay.

        Args:
          replay: takes in the fresh unrolls, which can be drawn from the next batch on.
          fraction: of the unrolls of a batch that are replayed; leaves each batch a fresh one.
          batch_size: B.
        """
        self.replay = replay
        self._batch_size = batch_size
        # As it was written down: in binary, .29 of 100 is less than 29.
        self._share = Fraction(str(fraction)) * batch_size
        fewest, most = math.floor(self._share), math.ceil(self._share)
        self._sizes = sorted({batch_size, batch_size - fewest, batch_size - most})
        self._num_mixed = 0
        self._lock = threading.Lock()
        self._seconds = {'replay/sample': 0.0, 'replay/store': 0.0}

    def batch(self, dequeue: Callable[[int], UnrollBatch]) -> UnrollBatch:
        """Returns a batch of B unrolls, the fresh ones first; to be made into a graph.

        Args:
          dequeue: returns that many fresh unrolls.
        """
        with tf.device('/cpu:0'):
            index = tf.numpy_function(self._next_size, [], tf.int32)
            index.set_shape([])
            fresh = tf.switch_case(
                index, [functools.partial(dequeue, size) for size in self._sizes]
            )
            components = batch_components(fresh)
            mixed = tf.numpy_function(self.mix, components, [each.dtype for each in components])
            for tensor, component in zip(mixed, self.replay.components, strict=True):
                axis = int(component.time_major)
                shape = component.shape
                tensor.set_shape([*shape[:axis], self._batch_size, *shape[axis:]])
            num_fresh = tf.size(fresh.actors)
            nobody = tf.fill([self._batch_size - num_fresh], -1)
            return batch_of_components(
                mixed,
                tf.ensure_shape(tf.concat([fresh.actors, nobody], 0), [self._batch_size]),
                fresh.actor_output.agent_state,
                list(fresh.actor_output.env_outputs.observation),
                tf.range(self._batch_size) >= num_fresh,
            )

    def next_num_fresh(self) -> int:
        """Returns how many unrolls of the next batch are to be fresh."""
        with self._lock:
            if not len(self.replay):
                return self._batch_size
            before, self._num_mixed = self._num_mixed, self._num_mixed + 1
            return self._batch_size - (
                math.floor(self._num_mixed * self._share) - math.floor(before * self._share)
            )

    def mix(self, *fresh: np.ndarray) -> list[np.ndarray]:
        """Fills a batch up, and stores what is new in it.

        Args:
          fresh: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`, N at most B.

        Returns:
          K arrays, `[T+1, B, ...]` or `[B, ...]`, the fresh unrolls first.
        """
        started = time.perf_counter()
        batch = []
        for component, array in zip(self.replay.components, fresh, strict=True):
            axis = int(component.time_major)
            shape = list(array.shape)
            num_fresh, shape[axis] = shape[axis], self._batch_size
            if num_fresh == self._batch_size:
                batch.append(array)
                continue
            batch.append(_aligned(shape, array.dtype))
            batch[-1][(slice(None),) * axis + (slice(num_fresh),)] = array
        if num_fresh < self._batch_size:
            self.replay.sample(batch, num_fresh)
        sampled = time.perf_counter()
        self.replay.add(fresh)
        with self._lock:
            self._seconds['replay/sample'] += sampled - started
            self._seconds['replay/store'] += time.perf_counter() - sampled
        return batch

    def record(self, log: Log) -> dict[str, float]:
        """Hands how full the replay is to the log; returns the seconds of each stage so far."""
        log.record_update({'replay_unrolls': len(self.replay)})
        if self.replay.left_out:
            log.record_update({'replay_unrolls_left_out': self.replay.left_out})
        return dict(self._seconds)

    def _next_size(self) -> np.int32:
        return np.int32(self._sizes.index(self.next_num_fresh()))


def unroll_nbytes(components: Sequence[Component], stack: str | None = None) -> int:
    """Returns the bytes of one stored unroll; arguments as of `Replay`."""
    total = 0
    for component in components:
        size = math.prod(_stored_shape(component, stack))
        total += size * np.dtype(component.dtype).itemsize
        if component.name == stack:
            # Which rows begin an episode.
            total += component.shape[0]
    return total


def memory_bytes(cgroups: str = '/sys/fs/cgroup') -> int:
    """Returns the bytes of memory that this process may have at most.

    Args:
      cgroups: folder of the limits of the container that it is in, if it is in one.
    """
    limits = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
    for name in ('memory.max', 'memory/memory.limit_in_bytes'):
        # There is no such file, or it says 'max'.
        with contextlib.suppress(OSError, ValueError), open(os.path.join(cgroups, name)) as file:
            limits.append(int(file.read()))
    return min(limits)


def _stored_shape(component: Component, stack: str | None) -> tuple[int, ...]:
    if component.name != stack:
        return component.shape
    rows, *frame, size = component.shape
    return rows + size - 1, *frame


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


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array of any contents that TensorFlow can use as it is."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
