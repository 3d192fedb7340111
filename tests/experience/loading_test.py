"""Tests of impala/experience/loading.py, with sources that the test opens and closes."""

import gc
import itertools
import threading
import time
import weakref

import pytest
import tensorflow as tf

from impala.experience.loading import Loading, default_loaders, move

PATIENCE_SECONDS = 30


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Source:
    """Assembles batches 0, 1, ... at once, or when the test opens it."""

    def __init__(self, number, is_open=True):
        self.begun = 0
        self.opened = threading.Event()
        self.closed = False
        self._number = number
        self._lock = threading.Lock()
        if is_open:
            self.opened.set()

    def __call__(self):
        with self._lock:
            batch = self.begun
            if batch < self._number:
                self.begun += 1
        assert self.opened.wait(PATIENCE_SECONDS)
        if self.closed or batch == self._number:
            raise tf.errors.CancelledError(None, None, 'the source is closed')
        return batch

    def close(self):
        self.closed = True
        self.opened.set()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith('loader')]


@pytest.mark.parametrize(
    ('devices', 'expected'),
    [
        ([None], 1),
        (['/gpu:0'], 2),
        (['/job:localhost/replica:0/task:0/device:GPU:0', '/gpu:1'], 2),
        (['/cpu:0', '/cpu:1'], 1),
    ],
)
def test_gpus_have_two_loaders_and_cpus_one(devices, expected):
    """One assembles while the other moves."""
    assert default_loaders(devices) == expected


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    wait_until(lambda: not loader_threads())


def test_one_loader_keeps_the_order():
    with Loading(Source(1000)) as loading:
        assert list(loading) == [(batch,) for batch in range(1000)]


def test_several_loaders_deliver_each_batch_once():
    turns = itertools.count()

    def move_slowly(batch, device):
        # So that batches overtake each other.
        time.sleep(0.002 if next(turns) % 3 else 0)
        return batch

    with Loading(Source(300), loaders=4, move=move_slowly) as loading:
        batches = [batch for (batch,) in loading]
    assert sorted(batches) == list(range(300))
    assert batches != sorted(batches)


@pytest.mark.parametrize('loaders', [1, 4])
def test_loaders_work_in_parallel_and_not_too_far_ahead(loaders):
    moving, most, lock = 0, 0, threading.Lock()
    release = threading.Event()

    def move_together(batch, device):
        nonlocal moving, most
        with lock:
            moving += 1
            most = max(most, moving)
        assert release.wait(PATIENCE_SECONDS)
        with lock:
            moving -= 1
        return batch

    source = Source(1000)
    with Loading(source, loaders, move=move_together) as loading:
        assert source.begun == 0
        consumer = threading.Thread(target=lambda: [next(loading) for _ in range(10)])
        consumer.start()
        wait_until(lambda: most == loaders)
        # Each loader waits for the release with one batch.
        assert source.begun == loaders
        release.set()
        consumer.join(PATIENCE_SECONDS)
        wait_until(lambda: source.begun == 10 + loaders)
        for taken in range(11, 100):
            next(loading)
            assert source.begun <= taken + loaders
    assert most == loaders


@pytest.mark.parametrize('loaders', [1, 3])
def test_the_number_of_live_batches_is_bounded(loaders):
    class Batch:
        pass

    alive = weakref.WeakSet()

    def assemble():
        batch = Batch()
        alive.add(batch)
        return batch

    with Loading(assemble, loaders, move=lambda batch, device: batch) as loading:
        for _ in range(50):
            batch = None
            batch = next(loading)
            assert len(alive) <= loaders + 1
        wait_until(lambda: len(alive) == loaders + 1)
        del batch
        wait_until(lambda: len(alive) == loaders)
    gc.collect()
    assert not alive


@pytest.mark.parametrize('loaders', [1, 4])
@pytest.mark.parametrize('stage', ['assemble', 'move'])
def test_errors_of_loaders_reach_the_consumer(stage, loaders):
    def fail_at_last(batch):
        if batch == 20:
            raise ValueError('the third wheel is broken')
        return batch

    source = Source(1000)
    with Loading(
        (lambda: fail_at_last(source())) if stage == 'assemble' else source,
        loaders,
        move=lambda batch, device: fail_at_last(batch) if stage == 'move' else batch,
    ) as loading:
        with pytest.raises(ValueError, match='^the third wheel is broken$'):
            list(loading)
        # Later requests raise it again, and the other loaders stop, too.
        with pytest.raises(ValueError, match='^the third wheel is broken$'):
            next(loading)
        wait_until(lambda: not loader_threads())
    assert source.begun <= 20 + 2 * loaders


def test_an_error_on_one_device_does_not_wait_for_the_others():
    source = Source(100, is_open=False)

    def assemble():
        if threading.current_thread().name.endswith('/cpu:1'):
            raise MemoryError('no room on the second device')
        return source()

    loading = Loading(assemble, devices=['/cpu:0', '/cpu:1'])
    with pytest.raises(MemoryError, match='no room on the second device'):
        next(loading)
    source.close()


@pytest.mark.parametrize('loaders', [1, 4])
def test_closing_the_source_ends_waiting_loaders(loaders):
    source = Source(100, is_open=False)
    with Loading(source, loaders) as loading:
        ended = []
        consumer = threading.Thread(target=lambda: ended.append(list(loading)))
        consumer.start()
        wait_until(lambda: source.begun == loaders)
        assert consumer.is_alive()
        source.close()
        consumer.join(PATIENCE_SECONDS)
    assert ended == [[]]
    assert source.begun == loaders
    assert list(loading) == []


def test_closing_ends_the_consumer_at_once_and_loaders_with_their_source():
    source = Source(100, is_open=False)
    loading = Loading(source, loaders=2)
    ended = []
    consumer = threading.Thread(target=lambda: ended.append(list(loading)))
    consumer.start()
    wait_until(lambda: source.begun == 2)
    loading.close()
    loading.close()
    consumer.join(PATIENCE_SECONDS)
    assert ended == [[]]
    assert len(loader_threads()) == 2
    source.close()


def test_closing_ends_loaders_that_wait_for_room():
    source = Source(100)
    with Loading(source, loaders=4) as loading:
        next(loading)
        wait_until(lambda: source.begun == 5)
    assert not loader_threads()
    assert list(loading) == []


def test_nothing_is_loaded_before_the_first_request():
    source = Source(100)
    with Loading(source):
        pass
    assert source.begun == 0


def test_moving_keeps_structure_and_values():
    batch = {'frame': tf.constant([[1, 2]], tf.uint8), 'state': (tf.constant([True]), ())}
    assert move(batch, None) is batch
    moved = move(batch, '/cpu:0')
    tf.nest.assert_same_structure(batch, moved)
    for before, after in zip(tf.nest.flatten(batch), tf.nest.flatten(moved), strict=True):
        assert after.device.endswith('CPU:0')
        assert after.dtype == before.dtype
        assert after.numpy().tolist() == before.numpy().tolist()
