"""Tests of impala/cluster/exchange.py, from within one process.

A call that waits forever shows as a time-out.
"""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation
from threads import start

from impala.cluster.exchange import UnrollInbox, WeightsBoard
from impala.learning.optimizers.rmsprop import RMSProp
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
NAMES = [component.name for component in COMPONENTS]
_names = (f'inbox {number}' for number in itertools.count())
_sequences = itertools.count(1)


@contextlib.contextmanager
def make_inbox(capacity=4, components=COMPONENTS, latest_version=1000):
    """An inbox with a unique name, which is closed when the block ends."""
    inbox = UnrollInbox(capacity, components, 'policy_version', next(_names))
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
    return [tf.constant(array) for array in (unroll | replaced).values()]


def put(inbox, unroll, actor=0, client=0, sequence=None):
    return inbox.put(unroll, actor, client, next(_sequences) if sequence is None else sequence)


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.001)


def versions(batch):
    return batch.components[0].numpy().tolist()


def assert_is_batch_of(batch, unrolls):
    """Compares a batch with NumPy's stack of the unrolls."""
    for i, component in enumerate(COMPONENTS):
        axis = 1 if component.time_major else 0
        expected = np.stack([unroll[i].numpy() for unroll in unrolls], axis)
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
        ((-1, 1, '', 1), 'is not negative'),
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
    num_threads, each, batch_size = 4, 8, 4
    with make_inbox(3, components) as inbox:

        def send(actor):
            for i in range(each):
                frame = tf.fill([rows, size], tf.cast(actor * each + i, tf.uint8))
                put(inbox, [tf.constant(actor * each + i, tf.int64), frame], actor, client=actor)

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
        ('level_id', np.int64(1), "'level_id' is int64[], not int32[]"),
        ('state', np.full(6, np.nan, 'float32'), "'state' holds a value that is not finite"),
        ('reward', np.array([0, 1, 2, -np.inf], 'float32'), "'reward' holds a value that is not"),
        ('half', np.full((T + 1, 2), np.inf, 'float16'), "'half' holds a value that is not finite"),
        ('frame', np.zeros((T, H, W), 'uint8'), "'frame' is uint8[3,4,5], not uint8[4,4,5]"),
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


def test_wrong_number_of_components_is_refused():
    with make_inbox() as inbox, pytest.raises(tf.errors.InvalidArgumentError, match='7 components'):
        put(inbox, make_unroll(1)[:-1])


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
        function = tf.function(lambda: put(inbox, make_unroll(1), 0, 8, 1))
        cancelled = start(manager.get_cancelable_function(function.get_concrete_function()))
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
    with make_inbox(2, [COMPONENTS[0], UnrollArray((T + 1, 50), 'uint8', 'frame')]) as inbox:
        unroll = [tf.TensorSpec([], tf.int64), tf.TensorSpec([T + 1, 50], tf.uint8)]
        scalar = tf.TensorSpec([], tf.int64)

        @tf.function(input_signature=[unroll, scalar, scalar])
        def put_from(unroll, client, sequence):
            return inbox.put(unroll, tf.cast(client, tf.int32), client, sequence)

        concrete = put_from.get_concrete_function()
        num_cancelled = []

        def send(client):
            random = np.random.default_rng(client)
            for i in range(each):
                number = tf.constant(client * each + i, tf.int64)
                frame = tf.fill([T + 1, 50], tf.cast(number, tf.uint8))
                while True:
                    manager = cancellation.CancellationManager()
                    timer = threading.Timer(random.uniform(0, 0.004), manager.start_cancel)
                    timer.start()
                    try:
                        manager.get_cancelable_function(concrete)(
                            number, frame, tf.constant(client, tf.int64), tf.constant(i, tf.int64)
                        )
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


def test_name_is_taken_until_its_inbox_is_closed():
    name = next(_names)
    inbox = UnrollInbox(1, COMPONENTS, 'policy_version', name)
    with pytest.raises(tf.errors.AlreadyExistsError, match=name):
        UnrollInbox(1, COMPONENTS, 'policy_version', name)
    inbox.close()
    again = UnrollInbox(1, COMPONENTS, 'policy_version', name)
    put(again, make_unroll(0))
    assert versions(again.take(1)) == [0]
    again.close()


def test_inconsistent_components_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match='int64 scalar'):
        UnrollInbox(1, COMPONENTS, 'level_id', next(_names))
    scalar = UnrollArray((), 'float32', 'reward', time_major=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match='no dimension for time'):
        UnrollInbox(1, [COMPONENTS[0], scalar], 'policy_version', next(_names))


def test_statistics_of_actors():
    with make_inbox() as inbox:
        inbox.put(make_unroll(1), 4, 1, 1, 'far', 'rooms')
        inbox.put(make_unroll(9), 4, 1, 2, 'far', 'tunnels', 'well')
        inbox.put(make_unroll(2), 0, 2, 1, 'near', 'rooms')
        statistics = inbox.statistics()
        assert statistics.queued == 3
        assert list(statistics.actors) == [0, 4]
        far = statistics.actors[4]
        assert (far.host, far.level, far.accepted, far.last_version) == ('far', 'tunnels', 2, 9)
        assert (far.notes, statistics.actors[0].notes) == ('well', '')
        assert 0 <= far.seconds_since_seen < TIMEOUT
        with pytest.raises(tf.errors.InvalidArgumentError, match='notes of an actor are too long'):
            inbox.put(make_unroll(3), 4, 1, 3, 'far', 'rooms', 'x' * 4097)


@pytest.fixture
def board():
    board = WeightsBoard('the settings', next(_names))
    yield board
    board.close()


def specs(*tensors):
    return [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]


def test_board_shows_the_latest_weights(board):
    assert board.version() == (-1, False)
    weights = [tf.constant([1.0, 2.0]), tf.constant([[3]], tf.int32)]
    with pytest.raises(tf.errors.NotFoundError, match='no weights'):
        board.read(specs(*weights))
    board.publish(weights, 3)
    board.publish([2 * weight for weight in weights], 4)
    assert board.version() == (4, False)
    version, values = board.read(specs(*weights))
    assert int(version) == 4
    np.testing.assert_array_equal(values[0], [2.0, 4.0])
    np.testing.assert_array_equal(values[1], [[6]])
    board.finish()
    assert board.version() == (4, True)


def test_board_refuses_other_networks(board):
    board.publish([tf.zeros([2, 3])], 0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r'float\[2,3\], not float\[3,2\]'):
        board.read([tf.TensorSpec([3, 2], tf.float32)])
    with pytest.raises(tf.errors.InvalidArgumentError, match='1 weights, not 0'):
        board.read([])


def _assign(variable):
    return lambda: variable.assign(tf.fill(variable.shape, -1.0))


def _assign_sub(variable):
    return lambda: variable.assign_sub(tf.ones(variable.shape))


def _scatter(variable):
    return lambda: variable.scatter_nd_update([[0]], [[-1.0] * variable.shape[1]])


def _rmsprop(variable):
    optimizer = RMSProp([variable])
    return lambda: optimizer.apply([tf.ones(variable.shape)], [variable], 0.1)


def _sparse_rmsprop(variable):
    optimizer = RMSProp([variable])
    row = tf.IndexedSlices(tf.ones([1, variable.shape[1]]), tf.constant([2]))
    return lambda: optimizer.apply([row], [variable], 0.1)


@pytest.mark.parametrize('mode', ['eager', 'same_function', 'function', 'compiled'])
@pytest.mark.parametrize('make_update', [_assign, _assign_sub, _scatter, _rmsprop, _sparse_rmsprop])
def test_updates_of_a_variable_do_not_reach_published_weights(board, make_update, mode):
    before = np.arange(6000, dtype='float32').reshape(60, 100)
    variable = tf.Variable(before)
    update = make_update(variable)

    def publish():
        board.publish([variable], tf.constant(1, tf.int64))

    if mode == 'same_function':

        @tf.function
        def publish_and_update():
            publish()
            update()

        publish_and_update()
    else:
        publish()
        # XLA supports neither sparse updates nor our own ops.
        compiled = mode == 'compiled' and make_update not in (_rmsprop, _sparse_rmsprop)
        (update if mode == 'eager' else tf.function(update, jit_compile=compiled))()
    _, (published,) = board.read(specs(variable))
    np.testing.assert_array_equal(published, before)
    assert (variable.numpy() != before).any()


def test_publishing_does_not_copy(board):
    def address(tensor):
        # `numpy` would copy.
        return np.asarray(memoryview(tensor)).__array_interface__['data'][0]

    weight = tf.Variable(np.arange(1000, dtype='float32'))
    before = weight.read_value()
    board.publish([weight], 1)
    _, (published,) = board.read(specs(weight))
    assert address(published) == address(before)
    weight.assign_add(tf.ones([1000]))
    assert address(weight.read_value()) != address(published)


def test_closed_board_refuses_calls(board):
    board.publish([tf.zeros([2])], 1)
    board.close()
    with pytest.raises(tf.errors.CancelledError, match='closed'):
        board.version()
    with pytest.raises(tf.errors.CancelledError, match='closed'):
        board.read([tf.TensorSpec([2], tf.float32)])
