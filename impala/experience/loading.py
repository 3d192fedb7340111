"""Parallel data loading: threads that prepare the next batches on the learner's devices."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import tensorflow as tf

Batch = TypeVar('Batch')


def move(batch: Batch, device: str | None) -> Batch:
    """Returns a batch as tensors on a device; waits until they are there.

    Args:
      batch: nest of tensors.
      device: its name; None leaves the tensors where they are.
    """
    if device is None:
        return batch
    with tf.device(device):
        return tf.nest.map_structure(tf.identity, batch)


def default_loaders(devices: Sequence[str | None]) -> int:
    """Returns the default number of threads that load batches for each device.

    TensorFlow starts a copy to a GPU only when earlier work on that GPU is done. So a lone thread
    would not begin to assemble the next batch before the current train step has ended.

    Args:
      devices: their names, as in `Learner.devices`.
    """
    has_gpu = any(device is not None and 'GPU:' in device.upper() for device in devices)
    return 2 if has_gpu else 1


class Loading(Generic[Batch]):
    """Iterates over batches, which it assembles and moves to their devices in advance.

    Each device has its own pipeline: n threads, each of which assembles a batch, moves it, and
    starts the next one when there is room. A pipeline holds at most n batches, in the making or
    ready. One thread delivers batches in the order of assembly, several in the order in which they
    are ready.

    The threads start when the first batch is requested. A context manager that waits for them when
    it is left, so the source must have been closed or have ended by then.
    """

    def __init__(
        self,
        assemble: Callable[[], Batch],
        loaders: int = 1,
        devices: Sequence[str | None] = (None,),
        move: Callable[[Batch, str | None], Batch] = move,
    ):
        """Prepares the threads, but starts none.

        Args:
          assemble: waits for a batch and returns it; called by all threads. Raises
            `tf.errors.CancelledError` when there are no more batches.
          loaders: n, threads of each device.
          devices: names of the devices; None for one whose batches need not be moved.
          move: brings a batch to a device.
        """
        self._assemble = assemble
        self._move = move
        self._pipelines = [_Pipeline(device, loaders) for device in devices]
        self._threads = [
            threading.Thread(
                target=self._load, args=(pipeline,), name=f'loader {i} of {device}', daemon=True
            )
            for device, pipeline in zip(devices, self._pipelines, strict=True)
            for i in range(loaders)
        ]
        # Guards the attributes below and the pipelines.
        self._changed = threading.Condition()
        self._has_started = False
        self._closed = False
        self._error: BaseException | None = None

    def __enter__(self) -> 'Loading[Batch]':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self.wait()

    def wait(self) -> None:
        """Waits for the threads to end, after `close` or the end of the source."""
        if self._has_started:
            for thread in self._threads:
                thread.join()

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        """Returns a batch of each device; used by one thread.

        Raises:
          StopIteration: there are no more batches, or `close` was called.
          BaseException: the error of a thread, as soon as it is raised there.
        """
        if not self._has_started:
            self._has_started = True
            for thread in self._threads:
                thread.start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or all(p.ready or not p.working for p in self._pipelines)
            )
            if self._error is not None:
                raise self._error
            if self._closed or not all(pipeline.ready for pipeline in self._pipelines):
                raise StopIteration
            for pipeline in self._pipelines:
                pipeline.room += 1
            self._changed.notify_all()
            return tuple(pipeline.ready.popleft() for pipeline in self._pipelines)

    def close(self) -> None:
        """Drops ready batches and assembles no more. May be called by any thread, repeatedly.

        A thread that waits for its source ends when the source is closed.
        """
        with self._changed:
            self._closed = True
            for pipeline in self._pipelines:
                pipeline.ready.clear()
            self._changed.notify_all()

    def _load(self, pipeline: '_Pipeline') -> None:
        try:
            while self._wait_for_room(pipeline):
                self._load_one(pipeline)
        except tf.errors.CancelledError:
            pass
        except BaseException as error:  # Raised again by `__next__`.
            with self._changed:
                self._error = self._error or error
            self.close()
        finally:
            with self._changed:
                pipeline.working -= 1
                self._changed.notify_all()

    def _wait_for_room(self, pipeline: '_Pipeline') -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or pipeline.room)
            pipeline.room -= 1
            return not self._closed

    def _load_one(self, pipeline: '_Pipeline') -> None:
        # A separate function, so that a thread holds no reference to a batch while it waits.
        batch = self._move(self._assemble(), pipeline.device)
        with self._changed:
            if not self._closed:
                pipeline.ready.append(batch)
            self._changed.notify_all()


@dataclasses.dataclass
class _Pipeline:
    """The batches on their way to one device.

    Attributes:
      device: its name.
      room: number of batches that may be started now.
      working: number of threads that may still deliver batches.
      ready: batches on the device.
    """

    device: str | None
    room: int
    working: int = dataclasses.field(init=False)
    ready: collections.deque[Any] = dataclasses.field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        self.working = self.room
