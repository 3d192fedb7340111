"""Parallel data loading: threads that have the next batches ready where the learner trains."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import tensorflow as tf

Batch = TypeVar('Batch')


def move(batch: Batch, device: str | None) -> Batch:
    """Returns a batch as tensors of a device, once they are there.

    Args:
      batch: nest of tensors.
      device: its name; None leaves the tensors where they are.
    """
    if device is None:
        return batch
    with tf.device(device):
        return tf.nest.map_structure(tf.identity, batch)


def default_loaders(devices: Sequence[str | None]) -> int:
    """Returns how many threads load batches for each device where nobody has said it.

    TensorFlow lets a copy to a GPU wait for what the GPU has been asked to compute, so that a lone
    thread would begin to assemble the next batch only when the train step under way has ended.

    Args:
      devices: their names, as of `Learner.devices`.
    """
    has_gpu = any(device is not None and 'GPU:' in device.upper() for device in devices)
    return 2 if has_gpu else 1


class Loading(Generic[Batch]):
    """Assembles batches and moves them to their devices, ahead of who iterates over this.

    Each device has a pipeline of its own: n threads, each of which assembles a batch, moves it, and
    goes on when there is room. A pipeline never holds more than n batches, be they in the making
    or ready. With one thread they come in the order in which they were assembled, with more in that
    in which they are ready.

    Threads start with the first batch that is asked for. A context manager: leaving it waits for
    its threads, so the source must be closed before, or know of an end.
    """

    def __init__(
        self,
        assemble: Callable[[], Batch],
        loaders: int = 1,
        devices: Sequence[str | None] = (None,),
        move: Callable[[Batch, str | None], Batch] = move,
    ):
        """Does nothing yet.

        Args:
          assemble: waits for a batch and returns it; called by all threads. Raises
            `tf.errors.CancelledError` when there is nothing more.
          loaders: n, threads of each device.
          devices: names of the devices; None for one whose batches are good as they are.
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
        # Guards all below, and the pipelines.
        self._changed = threading.Condition()
        self._has_started = False
        self._closed = False
        self._error: BaseException | None = None

    def __enter__(self) -> 'Loading[Batch]':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        if self._has_started:
            for thread in self._threads:
                thread.join()

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        """Returns a batch of each device; used by one thread.

        Raises:
          StopIteration: there is nothing more, or `close` was called.
          BaseException: what a thread has raised, at once.
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
        """Lets go of what is ready and assembles nothing more. From any thread, repeatedly.

        A thread that waits for its source ends when that is closed.
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
        except BaseException as error:  # Raised again where the batches are wanted.
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
        # A function of its own, so that a thread that waits for room holds on to no batch.
        batch = self._move(self._assemble(), pipeline.device)
        with self._changed:
            if not self._closed:
                pipeline.ready.append(batch)
            self._changed.notify_all()


@dataclasses.dataclass
class _Pipeline:
    """What is on its way to one device.

    Attributes:
      device: its name.
      room: batches that may be begun now.
      working: threads that may still bring batches.
      ready: batches that are there.
    """

    device: str | None
    room: int
    working: int = dataclasses.field(init=False)
    ready: collections.deque[Any] = dataclasses.field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        self.working = self.room
