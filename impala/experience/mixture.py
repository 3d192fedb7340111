"""Batches of fresh and replayed unrolls.

Letters: T unroll length, B batch size, K components of an unroll.
"""

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import tensorflow as tf

from impala.experience.batch import UnrollBatch, batch_components, batch_of_components
from impala.experience.replay import aligned
from impala.trajectory import UnrollArray


class Unrolls(Protocol):
    """A store of unrolls; `impala.experience.replay.Replay` documents the methods."""

    components: list[UnrollArray]

    @property
    def description(self) -> str: ...
    def add(self, unrolls: Sequence[np.ndarray]) -> None: ...
    def reserve(self, number: int) -> bool: ...
    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def stage_seconds(self) -> dict[str, float]: ...


class ReplayMixer:
    """Mixes fresh and replayed unrolls.

    The first k batches with replayed unrolls have `floor(k * fraction * B)` of them, so the
    fraction is exact over time and never off by a whole unroll. While the replay is empty, batches
    are all fresh.
    """

    def __init__(self, replay: Unrolls, fraction: float, batch_size: int):
        """Wraps a replay.

        Args:
          replay: stores the fresh unrolls, which can be drawn from the next batch on.
          fraction: share of replayed unrolls; leaves at least one fresh unroll in each batch.
          batch_size: B.
        """
        self.replay = replay
        self._batch_size = batch_size
        # The decimal number as written: in binary, 0.29 * 100 is less than 29.
        self._share = Fraction(str(fraction)) * batch_size
        fewest, most = math.floor(self._share), math.ceil(self._share)
        self._sizes = sorted({batch_size, batch_size - fewest, batch_size - most})
        self._num_mixed = 0
        # Two locks, so that the log does not wait for a slow replay.
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._seconds = {'replay/sample': 0.0, 'replay/store': 0.0}

    def batch(self, dequeue: Callable[[int], UnrollBatch]) -> UnrollBatch:
        """Returns a batch of B unrolls, the fresh ones first; can be traced as a graph.

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
        """Returns the number of fresh unrolls in the next batch."""
        with self._turn:
            started = time.perf_counter()
            k = self._num_mixed + 1
            number = math.floor(k * self._share) - math.floor((k - 1) * self._share)
            is_mixed = self.replay.reserve(number)
            self._count('replay/sample', started)
            if not is_mixed:
                return self._batch_size
            self._num_mixed = k
            return self._batch_size - number

    def mix(self, *fresh: np.ndarray) -> list[np.ndarray]:
        """Fills a batch with replayed unrolls, and stores the fresh ones.

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
            batch.append(aligned(shape, array.dtype))
            batch[-1][(slice(None),) * axis + (slice(num_fresh),)] = array
        if num_fresh < self._batch_size:
            self.replay.sample(batch, num_fresh)
        started = self._count('replay/sample', started)
        self.replay.add(fresh)
        self._count('replay/store', started)
        return batch

    def stage_seconds(self) -> dict[str, float]:
        """Returns the seconds of each stage so far."""
        with self._lock:
            return self._seconds | self.replay.stage_seconds()

    def _count(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        with self._lock:
            self._seconds[stage] += now - started
        return now

    def _next_size(self) -> np.int32:
        return np.int32(self._sizes.index(self.next_num_fresh()))
