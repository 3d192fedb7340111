"""Tests of impala/cluster/exchange.py, from within one process.

A call that waits forever shows as a time-out.
"""

import contextlib
import gc
import itertools
import math
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation
from threads import start

from impala.cluster.exchange import UnrollInbox
from impala.cluster.unroll_format import UnrollFormat
from impala.experience.replay import aligned
from impala.trajectory import UnrollArray

TIMEOUT = 30  # Seconds; reached only by a deadlock.
T, H, W = 3, 4, 5
COMPONENTS = [
    UnrollArray((), 'int64', 'policy_version', time_major=False, low=0),
    UnrollArray((), 'int32', 'level_id', time_major=False, low=0, high=2),
    UnrollArray((6,), 'float32', 'state', time_major=False),
    UnrollArray((T + 1, H, W), 'uint8', 'frame'),
    UnrollArray((T + 1,), 'float32', 'reward'),
    UnrollArray((T + 1,), 'uint8', 'end', high=3),
    UnrollArray((T + 1, 2), 'float16', 'half'),
    UnrollArray((T + 1,), 'bool', 'done'),
]
FORMAT = UnrollFormat(COMPONENTS)
_sequences = itertools.count(1)


@contextlib.contextmanager
def make_inbox(capacity=4, components=COMPONENTS, latest_version=1000, stack=None):
    """An inbox, which is closed when the block ends."""
    inbox = UnrollInbox(capacity, components, 'policy_version', stack)
    inbox.set_latest_version(latest_version)
    try:
        yield inbox
    finally:
        inbox.close()


def make_unroll(seed, **replaced):
    """Returns random arrays; the policy version is the seed."""
    random = np.random.default_rng(seed)
    unroll = {
        'policy_version': np.int64(seed),
        'level_id': np.int32(random.integers(3)),
        'state': random.normal(size=6).astype('float32'),
        'frame': random.integers(256, size=(T + 1, H, W), dtype='uint8'),
        'reward': random.normal(size=T + 1).astype('float32'),
        'end': random.integers(4, size=T + 1, dtype='uint8'),
        'half': random.normal(size=(T + 1, 2)).astype('float16'),
        'done': random.integers(2, size=T + 1).astype('bool'),
    }
    return list((unroll | replaced).values())


def joined(unroll, unroll_format=FORMAT):
    return np.concatenate(unroll_format.buffers(unroll))


def put(inbox, unroll, actor=0, client=0, sequence=None):
    """Puts arrays or their bytes."""
    buffer = unroll if isinstance(unroll, np.ndarray) else joined(unroll)
    return inbox.put(buffer, actor, client, next(_sequences) if sequence is None else sequence)


def put_function(inbox, buffer, client, sequence):
    """Returns a function of TensorFlow, which can be cancelled, that puts an unroll."""
    function = tf.function(lambda: inbox.put(buffer, client, client, sequence), autograph=False)
    return function.get_concrete_function()


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.001)


def versions(batch):
    return batch.components[0].numpy().tolist()


def assert_is_batch_of(batch, unrolls, components=COMPONENTS):
    """Compares a batch with NumPy's stack of the unrolls."""
    for i, component in enumerate(components):
        axis = 1 if component.time_major else 0
        expected = np.stack([unroll[i] for unroll in unrolls], axis)
        actual = batch.components[i].numpy()
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected, component.name)


def test_batch_of_unrolls_in_the_queue_is_time_major():
    with make_inbox(capacity=5) as inbox:
        unrolls = [make_unroll(i) for i in range(5)]
        for i, unroll in enumerate(unrolls):
            assert put(inbox, unroll, actor=10 + i)
        batch = inbox.take(3)
        assert batch.actors.numpy().tolist() == [10, 11, 12]
        assert_is_batch_of(batch, unrolls[:3])
        assert_is_batch_of(inbox.take(2), unrolls[3:])


def test_batch_of_unrolls_that_arrive_one_by_one():
    with make_inbox(capacity=1) as inbox:
        take = start(inbox.take, 3)
        unrolls = [make_unroll(i) for i in range(3)]
        for unroll in unrolls:
            put(inbox, unroll)
        assert_is_batch_of(take.result(TIMEOUT), unrolls)


def test_a_number_belongs_to_one_client_at_a_time():
    with make_inbox() as inbox:
        assert inbox.reserve(0, 111, 'first', 600).is_own
        assert inbox.reserve(1, 222, 'second', 600).is_own
        holder = inbox.reserve(0, 222, 'second', 600)
        assert (holder.is_own, holder.host) == (False, 'first')
        assert 0 <= holder.seconds_since_seen < TIMEOUT
        # Only its own client can give it back.
        assert not inbox.reserve(0, 222, 'second', 0).is_own
        assert inbox.reserve(0, 111, 'first', 600).is_own
        assert inbox.reserve(0, 111, 'first', 0).is_own
        assert inbox.reserve(0, 222, 'second', 600).is_own
        assert not inbox.reserve(0, 111, 'first', 600).is_own


def test_a_reservation_expires():
    with make_inbox() as inbox:
        assert inbox.reserve(0, 111, 'first', 0.1).is_own
        wait_until(lambda: inbox.reserve(0, 222, 'second', 600).is_own)
        assert inbox.reserve(0, 111, 'first', 600).host == 'second'


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        ((-1, 1, '', 1), 'an actor cannot have the number -1'),
        ((0, 1, 'x' * 300, 1), 'too long'),
        ((0, 1, '', 3601), 'for so long'),
        ((0, 1, '', float('nan')), 'for so long'),
    ],
)
def test_invalid_reservations_are_refused(arguments, error):
    with make_inbox() as inbox, pytest.raises(tf.errors.InvalidArgumentError, match=error):
        inbox.reserve(*arguments)


def test_take_in_a_function_knows_its_shapes():
    with make_inbox() as inbox:
        unrolls = [make_unroll(i) for i in range(2)]
        for unroll in unrolls:
            put(inbox, unroll)

        @tf.function
        def take():
            batch = inbox.take(2)
            assert batch.actors.shape == [2]
            assert batch.components[1].shape == [2]
            assert batch.components[2].shape == [2, 6]
            assert batch.components[3].shape == [T + 1, 2, H, W]
            return batch

        assert_is_batch_of(take(), unrolls)


def test_batches_of_large_unrolls_from_many_threads():
    rows, size = 21, 40_000
    components = [COMPONENTS[0], UnrollArray((rows, size), 'uint8', 'frame')]
    unroll_format = UnrollFormat(components)
    num_threads, each, batch_size = 4, 8, 4
    with make_inbox(3, components) as inbox:

        def send(actor):
            # A format is for one thread, and this one has nothing but constants.
            for i in range(each):
                number = np.int64(actor * each + i)
                frame = np.full((rows, size), number, np.uint8)
                put(inbox, joined([number, frame], unroll_format), actor, client=actor)

        # Sequence numbers grow within each thread, because they all come from one counter.
        threads = [start(send, actor) for actor in range(num_threads)]
        seen = []
        for _ in range(num_threads * each // batch_size):
            batch = start(inbox.take, batch_size).result(TIMEOUT)
            numbers = np.array(versions(batch))
            np.testing.assert_array_equal(batch.actors.numpy(), numbers // each)
            frames = batch.components[1].numpy()
            np.testing.assert_array_equal(
                frames, np.broadcast_to(numbers[:, np.newaxis], [rows, batch_size, size])
            )
            seen += numbers.tolist()
        for thread in threads:
            thread.result(TIMEOUT)
        assert sorted(seen) == list(range(num_threads * each))
        for actor in range(num_threads):
            own = [number for number in seen if number // each == actor]
            assert own == sorted(own)


def test_put_waits_while_the_queue_is_full():
    with make_inbox(capacity=2) as inbox:
        for i in range(2):
            put(inbox, make_unroll(i))
        waiting = start(put, inbox, make_unroll(2), 7)
        wait_until(lambda: inbox.statistics().waiting == 1)
        assert inbox.statistics().queued == 2
        assert not waiting.done()
        assert versions(inbox.take(1)) == [0]
        assert waiting.result(TIMEOUT)
        assert versions(inbox.take(2)) == [1, 2]


@pytest.mark.parametrize(
    ('component', 'value', 'reason'),
    [
        (
            'policy_version',
            np.int64(1001),
            "'policy_version' holds 1001, which is not in [0",
        ),
        ('policy_version', np.int64(-1), "'policy_version' holds -1"),
        ('level_id', np.int32(3), "'level_id' holds 3, which is not in [0, 2]"),
        ('state', np.full(6, np.nan, 'float32'), "'state' holds a value that is not finite"),
        ('reward', np.array([0, 1, 2, -np.inf], 'float32'), "'reward' holds a value that is not"),
        ('half', np.full((T + 1, 2), np.inf, 'float16'), "'half' holds a value that is not finite"),
        ('end', np.array([0, 0, 4, 0], 'uint8'), "'end' holds 4, which is not in [0, 3]"),
    ],
)
def test_invalid_unroll_is_refused(component, value, reason):
    with make_inbox() as inbox:
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            put(inbox, make_unroll(1, **{component: value}), actor=5)
        assert reason in str(error.value)
        assert 'actor 5' in str(error.value)
        statistics = inbox.statistics()
        assert (statistics.queued, statistics.waiting) == (0, 0)
        assert statistics.actors[5].rejected == 1
        assert reason in statistics.actors[5].last_rejection
        # The sequence number of a refused unroll can be used again.
        assert put(inbox, make_unroll(2), actor=5)
        assert versions(inbox.take(1)) == [2]


@pytest.mark.parametrize(
    'value', [np.finfo('float32').max, np.finfo('float32').min, np.float32(1e-45), np.float32(-0.0)]
)
def test_every_finite_number_is_valid(value):
    with make_inbox() as inbox:
        put(inbox, make_unroll(1, state=np.full(6, value, 'float32')))
        np.testing.assert_array_equal(inbox.take(1).components[2], np.full((1, 6), value))


def test_bounds_are_inclusive():
    with make_inbox() as inbox:
        put(inbox, make_unroll(1, level_id=np.int32(0), policy_version=np.int64(0)))
        put(inbox, make_unroll(1, level_id=np.int32(2), policy_version=np.int64(1000)))
        assert inbox.take(2).components[1].numpy().tolist() == [0, 2]


def test_version_becomes_valid_when_it_is_published():
    with make_inbox(latest_version=5) as inbox:
        with pytest.raises(tf.errors.InvalidArgumentError):
            put(inbox, make_unroll(6))
        inbox.set_latest_version(6)
        put(inbox, make_unroll(6))


def test_bytes_that_are_neither_true_nor_false_are_refused():
    buffer = joined(make_unroll(1))
    buffer[-1] = 2
    with make_inbox() as inbox, pytest.raises(tf.errors.InvalidArgumentError) as error:
        put(inbox, buffer)
    assert "'done' holds neither true nor false" in str(error.value)


@pytest.mark.parametrize('size', [0, 1, 64, FORMAT.nbytes - 1, FORMAT.nbytes + 1])
def test_wrong_number_of_bytes_is_refused(size):
    with make_inbox() as inbox, pytest.raises(tf.errors.InvalidArgumentError) as error:
        put(inbox, np.zeros(size, np.uint8), actor=5)
    assert f'actor 5 refused: it has {size} bytes, not {FORMAT.nbytes}' in str(error.value)


@pytest.mark.parametrize('number', [-1, 2**31, 2**63 - 1])
def test_numbers_that_no_actor_has_are_refused(number):
    with make_inbox() as inbox:
        with pytest.raises(tf.errors.InvalidArgumentError, match=f'have the number {number}'):
            put(inbox, make_unroll(1), actor=number)
        assert not inbox.statistics().actors


@pytest.mark.parametrize('form', [1, 255])
def test_unknown_forms_are_refused(form):
    buffer = joined(make_unroll(1))
    buffer[0] = form
    with make_inbox() as inbox, pytest.raises(tf.errors.InvalidArgumentError) as error:
        put(inbox, buffer)
    assert f'it is of form {form}, which is not in [0, 0]' in str(error.value)


def test_aligned_arrays_are_not_copied():
    """What is written to such an array appears in the batch; a copy keeps its values."""
    with make_inbox() as inbox:
        bytes_of_unroll = joined(make_unroll(1))
        buffer = aligned([FORMAT.nbytes + 1], np.dtype('uint8'))
        for begin, expected in ((0, 2), (1, 1)):
            part = buffer[begin : begin + FORMAT.nbytes]
            part[:] = bytes_of_unroll
            put(inbox, part)
            part[:] = joined(make_unroll(2))
            assert versions(inbox.take(1)) == [expected]


def test_arrays_are_freed_after_they_are_taken():
    with make_inbox() as inbox:
        buffer = aligned([FORMAT.nbytes], np.dtype('uint8'))
        buffer[:] = joined(make_unroll(1))
        memory = weakref.ref(buffer.base)
        put(inbox, buffer)
        del buffer
        gc.collect()
        assert memory() is not None
        inbox.take(1)
        # Python frees it with the next tensor.
        tf.constant(0)
        assert memory() is None


def test_unroll_that_arrives_twice_enters_once():
    with make_inbox() as inbox:
        assert put(inbox, make_unroll(1), actor=3, client=8, sequence=1)
        assert not put(inbox, make_unroll(1), actor=3, client=8, sequence=1)
        assert put(inbox, make_unroll(2), actor=3, client=9, sequence=1)
        assert put(inbox, make_unroll(3), actor=3, client=8, sequence=2)
        assert not put(inbox, make_unroll(1), actor=3, client=8, sequence=1)
        assert versions(inbox.take(3)) == [1, 2, 3]
        actor = inbox.statistics().actors[3]
        assert (actor.accepted, actor.duplicates) == (3, 2)


def test_unroll_that_arrives_twice_while_it_waits_enters_once():
    with make_inbox(capacity=1) as inbox:
        put(inbox, make_unroll(0))
        puts = [start(put, inbox, make_unroll(1), 3, 8, 1) for _ in range(3)]
        wait_until(lambda: inbox.statistics().waiting == 3)
        assert versions(inbox.take(2)) == [0, 1]
        assert sorted(bool(future.result(TIMEOUT)) for future in puts) == [False, False, True]
        assert inbox.statistics().queued == 0


def test_cancelled_put_leaves_nothing_behind():
    with make_inbox(capacity=1) as inbox:
        put(inbox, make_unroll(0))
        manager = cancellation.CancellationManager()
        function = put_function(inbox, joined(make_unroll(1)), 8, 1)
        cancelled = start(manager.get_cancelable_function(function))
        wait_until(lambda: inbox.statistics().waiting == 1)
        manager.start_cancel()
        with pytest.raises(tf.errors.CancelledError):
            cancelled.result(TIMEOUT)
        assert inbox.statistics().waiting == 0
        assert versions(inbox.take(1)) == [0]
        # It was not in the queue, so it may be sent again.
        assert put(inbox, make_unroll(1), 0, 8, 1)
        assert versions(inbox.take(1)) == [1]


def test_unrolls_enter_once_whenever_their_puts_are_cancelled():
    num_clients, each = 4, 30
    components = [COMPONENTS[0], UnrollArray((T + 1, 50), 'uint8', 'frame')]
    unroll_format = UnrollFormat(components)
    with make_inbox(2, components) as inbox:
        num_cancelled = []

        def send(client):
            random = np.random.default_rng(client)
            for i in range(each):
                number = np.int64(client * each + i)
                frame = np.full((T + 1, 50), number, np.uint8)
                unroll = joined([number, frame], unroll_format)
                concrete = put_function(inbox, unroll, client, i)
                while True:
                    manager = cancellation.CancellationManager()
                    timer = threading.Timer(random.uniform(0, 0.004), manager.start_cancel)
                    timer.start()
                    try:
                        manager.get_cancelable_function(concrete)()
                        break
                    except tf.errors.CancelledError:
                        num_cancelled.append(number)
                    finally:
                        timer.join()

        senders = [start(send, client) for client in range(num_clients)]
        seen = []
        for _ in range(num_clients * each // 4):
            # Slowly, so that some puts wait.
            time.sleep(0.003)
            batch = start(inbox.take, 4).result(TIMEOUT)
            numbers = np.array(versions(batch))
            np.testing.assert_array_equal(
                batch.components[1], np.broadcast_to(numbers[:, np.newaxis], [T + 1, 4, 50])
            )
            seen += numbers.tolist()
        for sender in senders:
            sender.result(TIMEOUT)
        assert inbox.statistics().queued == 0
        assert num_cancelled
        assert sorted(seen) == list(range(num_clients * each))
        for client in range(num_clients):
            own = [number for number in seen if number // each == client]
            assert own == sorted(own)


def test_cancelled_take_leaves_later_unrolls_to_others():
    with make_inbox() as inbox:
        manager = cancellation.CancellationManager()
        function = tf.function(lambda: inbox.take(100)).get_concrete_function()
        cancelled = start(manager.get_cancelable_function(function))
        # Once the call waits, it takes whatever arrives.
        wait_until(lambda: put(inbox, make_unroll(0)) and inbox.statistics().queued == 0)
        manager.start_cancel()
        with pytest.raises(tf.errors.CancelledError):
            cancelled.result(TIMEOUT)
        put(inbox, make_unroll(7))
        assert versions(inbox.take(1)) == [7]


def test_close_wakes_waiting_puts_and_takes():
    with make_inbox(capacity=1) as full, make_inbox() as empty:
        put(full, make_unroll(0))
        waiting = [start(put, full, make_unroll(1)), start(empty.take, 1)]
        wait_until(lambda: full.statistics().waiting == 1)
        for inbox in (full, empty):
            inbox.close()
            inbox.close()
        for future in waiting:
            with pytest.raises(tf.errors.CancelledError, match='closed'):
                future.result(TIMEOUT)
        with pytest.raises(tf.errors.CancelledError, match='closed'):
            put(full, make_unroll(2))
        with pytest.raises(tf.errors.CancelledError, match='closed'):
            full.take(1)


def test_inconsistent_components_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match='int64 scalar'):
        UnrollInbox(1, COMPONENTS, 'level_id')
    scalar = UnrollArray((), 'float32', 'reward', time_major=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match='no dimension for time'):
        UnrollInbox(1, [COMPONENTS[0], scalar], 'policy_version')
    with pytest.raises(tf.errors.InvalidArgumentError, match='a stack of frames must be uint8'):
        UnrollInbox(1, COMPONENTS, 'policy_version', 'half')


def test_statistics_of_actors():
    with make_inbox() as inbox:
        inbox.put(joined(make_unroll(1)), 4, 1, 1, 'far', 'rooms')
        inbox.put(joined(make_unroll(9)), 4, 1, 2, 'far', 'tunnels', 'well')
        inbox.put(joined(make_unroll(2)), 0, 2, 1, 'near', 'rooms')
        statistics = inbox.statistics()
        assert statistics.queued == 3
        assert list(statistics.actors) == [0, 4]
        far = statistics.actors[4]
        assert (far.host, far.level, far.accepted, far.last_version) == ('far', 'tunnels', 2, 9)
        assert (far.notes, statistics.actors[0].notes) == ('well', '')
        assert 0 <= far.seconds_since_seen < TIMEOUT
        with pytest.raises(tf.errors.InvalidArgumentError, match='notes of an actor are too long'):
            inbox.put(joined(make_unroll(3)), 4, 1, 3, 'far', 'rooms', 'x' * 4097)


def stack_components(shape):
    return [
        COMPONENTS[0],
        UnrollArray(shape, 'uint8', 'frame'),
        UnrollArray(shape[:1], 'float32', 'reward'),
    ]


def stacked_unroll(shape, begins, seed):
    """Returns an unroll of an environment that stacks its last frames as a queue.

    Args:
      shape: `(T+1, H, W, C)`.
      begins: rows with which an episode begins: the queue is filled with the first frame.
      seed: of the frames; the policy version.
    """
    rows, height, width, size = shape
    random = np.random.default_rng(seed)

    def render():
        return random.integers(256, size=(height, width), dtype=np.uint8)

    queue = [render() for _ in range(size)]
    stacks = []
    for row in range(rows):
        frame = render()
        queue = [frame] * size if row in begins else [*queue[1:], frame]
        stacks.append(np.stack(queue, -1))
    rewards = random.normal(size=rows).astype('float32')
    return [np.int64(seed), np.stack(stacks), rewards]


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('frame', [(1, 1), (3, 5), (84, 84)])
def test_packed_stacks_come_out_unchanged(frame, size):
    shape = (7, *frame, size)
    components = stack_components(shape)
    unroll_format = UnrollFormat(components, 'frame')
    cases = [(), (0,), (6,), (3,), (0, 6), (2, 3), (1, 3, 5), range(7)]
    unrolls = [stacked_unroll(shape, begins, i) for i, begins in enumerate(cases)]
    with make_inbox(len(cases), components, stack='frame') as inbox:
        for unroll in unrolls:
            buffer = joined(unroll, unroll_format)
            assert buffer[0] == 1
            assert buffer.size == unroll_format.packed_nbytes
            put(inbox, buffer)
        assert_is_batch_of(inbox.take(len(cases)), unrolls, components)


@pytest.mark.parametrize('size', [1, 2, 4, 5])
def test_packed_stacks_are_those_of_their_definition(size):
    """Row t is frames t to t+C-1, but none before the first one of an episode that has begun."""
    rows, height, width = shape = (9, 2, 3)
    components = stack_components((*shape, size))
    random = np.random.default_rng(0)
    unrolls = []
    with make_inbox(20, components, stack='frame') as inbox:
        for number in range(20):
            frames = random.integers(256, size=(rows + size - 1, height, width), dtype=np.uint8)
            begins = random.random(rows) < number / 19
            rewards = np.zeros(rows, 'float32')
            buffer = np.array([1], np.uint8)
            for array in (np.int64(number), frames, rewards, begins):
                zeros = np.zeros(-buffer.size % 64, np.uint8)
                values = np.frombuffer(array.tobytes(), np.uint8)
                buffer = np.concatenate([buffer, zeros, values])
            put(inbox, buffer)
            stacks = np.empty((*shape, size), np.uint8)
            first = 0
            for row in range(rows):
                if begins[row]:
                    first = row + size - 1
                for place in range(size):
                    stacks[row, ..., place] = frames[max(row + place, first)]
            unrolls.append([np.int64(number), stacks, rewards])
        assert_is_batch_of(inbox.take(20), unrolls, components)


def test_stacks_that_cannot_be_packed_come_out_unchanged():
    shape = (5, 6, 7, 4)
    components = stack_components(shape)
    unroll_format = UnrollFormat(components, 'frame')
    unrolls = [stacked_unroll(shape, (2,), i) for i in range(3)]
    unrolls[1][1][3, 2, 2, 1] ^= 1
    buffers = [joined(unroll, unroll_format) for unroll in unrolls]
    assert [buffer[0] for buffer in buffers] == [1, 0, 1]
    assert buffers[1].size == unroll_format.nbytes
    with make_inbox(3, components, stack='frame') as inbox:
        for buffer in buffers:
            put(inbox, buffer)
        # Both forms in one batch.
        assert_is_batch_of(inbox.take(3), unrolls, components)


def test_invalid_packed_unrolls_are_refused():
    shape = (5, 6, 7, 4)
    components = stack_components(shape)
    unroll_format = UnrollFormat(components, 'frame')
    unroll = stacked_unroll(shape, (2,), 1)
    good = joined(unroll, unroll_format)
    unroll[2][4] = np.inf
    bad_begins = good.copy()
    # The array that says where episodes begin is the last.
    assert bad_begins[-5:].tolist() == [0, 0, 1, 0, 0]
    bad_begins[-1] = 3
    plain = good.copy()
    plain[0] = 0
    other_form = good.copy()
    other_form[0] = 2
    with make_inbox(1, components, stack='frame') as inbox:
        for buffer, reason in (
            (joined(unroll, unroll_format), "'reward' holds a value that is not finite"),
            (bad_begins, "'frame_begins' holds neither true nor false"),
            (good[:-1], f'it has {good.size - 1} bytes, not {good.size}'),
            (plain, f'it has {good.size} bytes, not {unroll_format.nbytes}'),
            (other_form, 'it is of form 2, which is not in [0, 1]'),
        ):
            with pytest.raises(tf.errors.InvalidArgumentError) as error:
                put(inbox, buffer)
            assert reason in str(error.value)
        assert put(inbox, good)


def test_packed_unrolls_from_several_threads():
    shape, num_threads, each, batch_size = (21, 84, 84, 4), 2, 12, 4
    components = stack_components(shape)
    unrolls = [
        stacked_unroll(shape, np.random.default_rng(i).integers(21, size=i % 4), i)
        for i in range(num_threads * each)
    ]
    # One that is sent plain.
    unrolls[5][1][:] = 7 * np.arange(math.prod(shape)).reshape(shape)
    with make_inbox(3, components, stack='frame') as inbox:
        take = tf.function(lambda: inbox.take(batch_size)).get_concrete_function()

        def send(thread):
            unroll_format = UnrollFormat(components, 'frame')
            for unroll in unrolls[thread::num_threads]:
                buffer = joined(unroll, unroll_format)
                assert (buffer[0] == 0) == (unroll[0] == 5)
                put(inbox, buffer, thread, client=thread)

        threads = [start(send, thread) for thread in range(num_threads)]
        seen = []
        for _ in range(num_threads * each // batch_size):
            batch = start(take).result(TIMEOUT)
            seen += (numbers := versions(batch))
            assert_is_batch_of(batch, [unrolls[number] for number in numbers], components)
        for thread in threads:
            thread.result(TIMEOUT)
        assert sorted(seen) == list(range(num_threads * each))
