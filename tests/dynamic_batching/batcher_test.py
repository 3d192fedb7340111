"""Tests of the in-process batcher.

Callers are real threads and graphs. Batched functions also return the batch size. Deadlocks and
lost callers show as time-outs of `run_all`.
"""

import collections
import concurrent.futures
import gc
import os
import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation
from warm_process import WarmProcess

from dynamic_batching import batch_fn, batch_fn_with_options

TIMEOUT = 30  # Seconds; reached only by a deadlock.


def run_all(functions, expect_errors=False):
    """Runs each function in a thread; returns their results or errors."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), 'deadlock'
    if not expect_errors:
        for result in results:
            if isinstance(result, Exception):
                raise result
    return results


def start(function):
    """Runs a function in a thread and returns its future."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def batch_size_of(x):
    """Returns int32 `[B]`, with the batch size in every row."""
    return tf.fill([tf.shape(x)[0]], tf.shape(x)[0])


class Gate:
    """A batched function that blocks until it is opened, so that callers queue up."""

    def __init__(self, **options):
        self._started = tf.queue.FIFOQueue(1000, tf.int32)
        self._opened = tf.queue.FIFOQueue(1000, tf.int32)
        self.batched = batch_fn_with_options(**options)(self._compute)

    def _compute(self, x):
        with tf.control_dependencies([self._started.enqueue(tf.shape(x)[0])]):
            opened = self._opened.dequeue()
        with tf.control_dependencies([opened]):
            return x + 1, batch_size_of(x)

    def wait_until_started(self):
        return int(self._started.dequeue())

    def open(self, batches=1):
        for _ in range(batches):
            self._opened.enqueue(0)


def test_every_thread_gets_its_own_row():
    @batch_fn_with_options(minimum_batch_size=8, maximum_batch_size=8, timeout_ms=None)
    def square(x):
        return x * x, batch_size_of(x)

    results = run_all([lambda i=i: square(tf.constant([[float(i), 2.0 * i]])) for i in range(8)])
    for i, (squares, size) in enumerate(results):
        np.testing.assert_array_equal(squares, [[i**2, 4 * i**2]])
        np.testing.assert_array_equal(size, [8])


def test_nests_and_dtypes_are_restored():
    point = collections.namedtuple('point', 'x y')

    @batch_fn_with_options(minimum_batch_size=2, timeout_ms=None)
    def nested(p, *, extra):
        return {
            'point': point(p.y, [p.x]),
            'text': tf.strings.join([extra['text'], '!']),
            'nothing': None,
            'flag': tf.logical_not(extra['flag']),
        }

    def call(i):
        return nested(
            point(np.full([1, 2], i, np.uint8), tf.fill([1], tf.cast(i, tf.bfloat16))),
            extra={
                'text': tf.constant([f'caller {i} with a text too long to be stored inline']),
                'flag': np.array([i == 1]),
            },
        )

    for i, result in enumerate(run_all([lambda i=i: call(i) for i in range(2)])):
        assert isinstance(result['point'], point)
        assert result['nothing'] is None
        assert result['point'].x.dtype == tf.bfloat16
        assert result['point'].x.shape == [1] and float(result['point'].x[0]) == i
        assert result['point'].y[0].dtype == tf.uint8
        np.testing.assert_array_equal(result['point'].y[0], [[i, i]])
        assert result['text'].numpy() == [
            f'caller {i} with a text too long to be stored inline!'.encode()
        ]
        np.testing.assert_array_equal(result['flag'], [i != 1])


def test_loops_in_functions_in_threads():
    @batch_fn
    def double(x):
        return 2 * x

    @tf.function
    def loop(start, n):
        total = tf.zeros([1], tf.int64)
        for i in tf.range(n):
            total += double(start + i)
        return total

    n = 300
    results = run_all(
        [lambda i=i: loop(tf.constant([i], tf.int64), tf.constant(n, tf.int64)) for i in range(10)]
    )
    for i, result in enumerate(results):
        assert result.numpy() == [2 * (n * i + n * (n - 1) // 2)]


def test_loops_in_one_function_share_batches():
    @batch_fn_with_options(minimum_batch_size=4, maximum_batch_size=4, timeout_ms=None)
    def size(x):
        return x + 1, batch_size_of(x)

    @tf.function
    def loops():
        outputs = []
        for caller in range(4):
            value, sizes = tf.constant([caller]), tf.zeros([1], tf.int32)
            for _ in tf.range(50):
                value, batch_size = size(value)
                sizes += batch_size
            outputs.append((value, sizes))
        return outputs

    # The minimum has no time-out, so this deadlocks unless the loops share batches.
    (outputs,) = run_all([loops])
    for caller, (value, sizes) in enumerate(outputs):
        assert value.numpy() == [caller + 50]
        assert sizes.numpy() == [4 * 50]


def test_independent_loop_iterations_share_a_batch():
    @batch_fn_with_options(minimum_batch_size=3, maximum_batch_size=3, timeout_ms=None)
    def size(x):
        return batch_size_of(x)

    @tf.function
    def loop(x):
        sizes = tf.zeros([1], tf.int32)
        for _ in tf.range(3):
            sizes += size(x)
        return sizes

    # This deadlocks if an iteration waits for the previous iteration's call.
    (sizes,) = run_all([lambda: loop(tf.zeros([1]))])
    assert sizes.numpy() == [3 * 3]


def test_a_graph_drops_a_call_whose_results_are_unused():
    calls = []
    record = batch_fn(lambda x: tf.py_function(lambda y: (calls.append(1), y)[1], [x], x.dtype))
    record(tf.zeros([1]))

    @tf.function
    def call(x):
        _ = record(x) + 1
        return x

    call(tf.zeros([1]))
    assert calls == [1]


def test_equal_calls_in_one_function_are_not_merged():
    @batch_fn_with_options(minimum_batch_size=3, maximum_batch_size=3, timeout_ms=None)
    def size(x):
        return batch_size_of(x)

    @tf.function
    def calls(x):
        return [size(x) for _ in range(3)]

    (sizes,) = run_all([lambda: calls(tf.zeros([1]))])
    assert [int(s[0]) for s in sizes] == [3, 3, 3]


def test_equal_calls_through_an_inner_function_are_not_merged():
    @batch_fn_with_options(minimum_batch_size=2, maximum_batch_size=2, timeout_ms=None)
    def size(x):
        return batch_size_of(x)

    inner = tf.function(size)

    @tf.function
    def calls(x):
        return inner(x), inner(x)

    (sizes,) = run_all([lambda: calls(tf.zeros([1]))])
    assert [int(s[0]) for s in sizes] == [2, 2]


def test_static_batch_size():
    shapes = []

    def record(x):
        shapes.append(x.shape.as_list())
        return x

    static = batch_fn_with_options(2, 2, None)(record)
    run_all([lambda: static(tf.zeros([1, 3]))] * 2)
    dynamic = batch_fn_with_options(2, 2, 0)(record)
    dynamic(tf.zeros([1, 3]))
    assert shapes == [[2, 3], [None, 3]]


def test_static_shape_of_results_in_a_graph():
    double = batch_fn(lambda x: 2 * x)

    @tf.function
    def call(x):
        y = double(x)
        assert y.shape == [1, 3]
        return y

    np.testing.assert_array_equal(call(tf.ones([1, 3])), [[2, 2, 2]])


def test_variables_are_read_anew_and_may_be_created_inside():
    class Scale(tf.Module):
        w = None

        def __call__(self, x):
            if self.w is None:
                self.w = tf.Variable(3.0)
            return self.w * x

    scale = Scale()
    batched = batch_fn(scale)
    assert batched(tf.ones([1])).numpy() == [3.0]
    scale.w.assign(5.0)
    assert batched(tf.ones([1])).numpy() == [5.0]
    results = run_all([lambda: tf.function(batched)(tf.ones([1]))] * 4)
    assert [float(r[0]) for r in results] == [5.0] * 4


def test_a_returned_input_is_a_copy():
    @batch_fn_with_options(minimum_batch_size=2, timeout_ms=None)
    def identity(x):
        return x

    kept = [
        run_all([lambda i=i: identity(tf.fill([1, 2000], i)) for i in (2 * k, 2 * k + 1)])
        for k in range(20)
    ]
    for k, pair in enumerate(kept):
        for i, result in enumerate(pair):
            np.testing.assert_array_equal(result, np.full([1, 2000], 2 * k + i))


def test_one_caller_without_a_minimum():
    assert batch_fn(batch_size_of)(tf.zeros([1])).numpy() == [1]


def test_a_batch_below_the_minimum_starts_at_the_time_out():
    batched = batch_fn_with_options(minimum_batch_size=10, timeout_ms=50)(batch_size_of)
    sizes = [int(size[0]) for size in run_all([lambda: batched(tf.zeros([1]))] * 3)]
    assert sorted(sizes) in ([3, 3, 3], [1, 2, 2], [1, 1, 1])


def test_more_callers_than_the_maximum_take_several_batches():
    gate = Gate(minimum_batch_size=1, maximum_batch_size=4)
    gate.open(100)
    results = run_all([lambda i=i: gate.batched(tf.constant([i])) for i in range(10)])
    assert [int(value[0]) for value, _ in results] == list(range(1, 11))
    assert all(1 <= int(size[0]) <= 4 for _, size in results)


def test_callers_that_arrive_during_a_batch_share_the_next():
    gate = Gate(minimum_batch_size=1, maximum_batch_size=6)
    first = start(lambda: gate.batched(tf.constant([0])))
    assert gate.wait_until_started() == 1
    loop = tf.function(lambda i: gate.batched(i))
    waiting = [start(lambda i=i: loop(tf.constant([i]))) for i in range(9)]
    batches = []
    answered = 0
    while answered < 9:
        gate.open()
        batches.append(gate.wait_until_started())
        answered += batches[-1]
    gate.open()
    assert first.result(TIMEOUT)[1].numpy() == [1]
    assert sorted(int(f.result(TIMEOUT)[0][0]) for f in waiting) == list(range(1, 10))
    assert max(batches) <= 6 and sum(batches) == 9


def test_varying_number_of_callers():
    batched = batch_fn_with_options(minimum_batch_size=4, maximum_batch_size=5, timeout_ms=5)(
        lambda x: x + 1
    )

    @tf.function
    def loop(x, n):
        for _ in tf.range(n):
            x = batched(x)
        return x

    counts = [1, 3, 40, 80, 7, 120, 2, 60]
    results = run_all([lambda n=n: loop(tf.zeros([1], tf.int32), tf.constant(n)) for n in counts])
    assert [int(r[0]) for r in results] == counts


def test_invalid_options():
    for options in ((0, 1, 1), (3, 2, 1), (1, 1, -1)):
        with pytest.raises(ValueError):
            batch_fn_with_options(*options)


def test_bad_shape_dtype_or_structure_fails_only_that_caller():
    batched = batch_fn_with_options(minimum_batch_size=2, maximum_batch_size=2, timeout_ms=None)(
        lambda x: (x['a'], batch_size_of(x['a']))
    )
    good = {'a': tf.ones([1, 2])}
    run_all([lambda: batched(good)] * 2)
    waiting = start(lambda: batched(good))

    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0.a .*\(1, 3\).*\(1, 2\)'):
        batched({'a': tf.ones([1, 3])})
    with pytest.raises(tf.errors.InvalidArgumentError, match='Input 0.a .*float64.*float32'):
        batched({'a': tf.ones([1, 2], tf.float64)})
    with pytest.raises(ValueError, match='structure'):
        batched({'b': tf.ones([1, 2])})

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def unknown_shape(x):
        return batched({'a': x})

    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0.a .*\[1,3\].*\[1,2\]'):
        unknown_shape(tf.ones([1, 3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0.a .*\[2,2\].*\[1,2\]'):
        unknown_shape(tf.ones([2, 2]))

    assert not waiting.done()
    assert unknown_shape(tf.ones([1, 2]))[1].numpy() == [2]
    assert waiting.result(TIMEOUT)[1].numpy() == [2]


def test_a_bad_first_call_leaves_the_batcher_usable():
    batched = batch_fn(lambda x: tf.matmul(x, tf.ones([3, 1])))
    with pytest.raises(ValueError):
        batched(tf.ones([1, 2]))
    with pytest.raises(tf.errors.InvalidArgumentError, match='leading dimension 1'):
        batched(tf.ones([2, 3]))
    with pytest.raises(ValueError, match='ensure_shape'):
        tf.function(batched, input_signature=[tf.TensorSpec([1, None])])(tf.ones([1, 3]))
    assert batched(tf.ones([1, 3])).numpy() == [[3.0]]


def test_a_bad_first_call_fails_alone_with_an_input_signature():
    traced = []

    def act(frame, state):
        traced.append((frame.shape.as_list(), frame.dtype, state['cell'].dtype))
        return tf.cast(frame[:, 0], tf.float32) + state['cell'], batch_size_of(frame)

    batched = batch_fn_with_options(
        minimum_batch_size=2,
        timeout_ms=None,
        input_signature=[
            tf.TensorSpec([None, 3], tf.uint8),
            {'cell': tf.TensorSpec([1], tf.float32)},
        ],
    )(act)
    frame, state = tf.constant([[4, 5, 6]], tf.uint8), {'cell': tf.constant([0.5])}

    # All of these can be traced.
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Input 0 of 'act'.*float32.*uint8"):
        batched(tf.cast(frame, tf.float32), state)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0 .*\(1, 4\).*\(1, 3\)'):
        batched(tf.zeros([1, 4], tf.uint8), state)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0 .*\(2, 3\).*\(1, 3\)'):
        batched(tf.zeros([2, 3], tf.uint8), state)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 1.cell .*float64.*float32'):
        batched(frame, {'cell': tf.constant([0.5], tf.float64)})
    for wrong in ({'hidden': state['cell']}, state['cell']):
        with pytest.raises(ValueError, match="'act' .* structure of the input signature"):
            batched(frame, wrong)
    with pytest.raises(ValueError, match="'act' .* structure of the input signature"):
        batched(frame, state=state)

    @tf.function(input_signature=[tf.TensorSpec(None, tf.uint8)])
    def unknown_shape(frame):
        return batched(frame, state)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r'Input 0 .*\[1,4\].*\[1,3\]'):
        unknown_shape(tf.zeros([1, 4], tf.uint8))

    results = run_all([lambda: batched(frame, state), lambda: unknown_shape(frame)])
    assert [(float(x[0]), int(size[0])) for x, size in results] == [(4.5, 2)] * 2
    assert traced == [([None, 3], tf.uint8, tf.float32)]


def test_a_static_batch_size_with_an_input_signature():
    shapes = []

    def record(x):
        shapes.append(x.shape.as_list())
        return x

    batched = batch_fn_with_options(2, 2, None, [tf.TensorSpec([1, 3])])(record)
    run_all([lambda: batched(tf.zeros([1, 3]))] * 2)
    assert shapes == [[2, 3]]


@pytest.mark.parametrize(
    ('signature', 'pattern'),
    [
        ([], "signature of 'identity' has no tensors"),
        ([tf.TensorSpec([3])], r'Input 0 .*\(3,\), but must have leading dimension 1'),
        ([{'a': tf.TensorSpec([])}], r'Input 0.a .*\(\), but must have leading dimension 1'),
        ([tf.TensorSpec([1]), tf.TensorSpec(None)], 'Input 1 .*unknown.*leading dimension 1'),
        ([tf.TensorSpec([None, None])], r'Input 0 .*\(None, None\).*all others known'),
        ([tf.float32], 'Input 0 .*must be a tf.TensorSpec, but is tf.float32'),
    ],
)
def test_invalid_input_signatures(signature, pattern):
    def identity(*x):
        return x

    with pytest.raises(ValueError, match=pattern):
        batch_fn_with_options(input_signature=signature)(identity)


def test_an_assertion_fails_every_caller_of_its_batch_and_no_later_one():
    @batch_fn_with_options(minimum_batch_size=3, maximum_batch_size=3, timeout_ms=None)
    def positive(x):
        tf.debugging.assert_positive(x, 'not positive')
        return x

    def call(value):
        return lambda: positive(tf.constant([value]))

    errors = run_all([call(1), call(-1), call(1)], expect_errors=True)
    for error in errors:
        assert isinstance(error, tf.errors.InvalidArgumentError) and 'not positive' in str(error)
    assert [int(r[0]) for r in run_all([call(1), call(2), call(3)])] == [1, 2, 3]


def test_a_python_exception_fails_every_caller_of_its_batch():
    def raise_if_negative(x):
        if (x < 0).any():
            raise KeyError('an error of its own')
        return x

    @batch_fn_with_options(minimum_batch_size=2, maximum_batch_size=2, timeout_ms=None)
    def python(x):
        return tf.ensure_shape(tf.numpy_function(raise_if_negative, [x], tf.int32), [2])

    def call(value):
        return lambda: python(tf.constant([value]))

    for error in run_all([call(1), call(-1)], expect_errors=True):
        assert isinstance(error, tf.errors.OpError) and 'an error of its own' in str(error)
    assert [int(r[0]) for r in run_all([call(1), call(2)])] == [1, 2]


def test_wrong_leading_dimension_of_a_result():
    batched = batch_fn_with_options(2, 2, 10_000)(lambda x: (x, x[:1]))
    for error in run_all([lambda: batched(tf.ones([1, 3]))] * 2, expect_errors=True):
        assert isinstance(error, tf.errors.InvalidArgumentError)
        assert 'Output 1' in str(error) and '[1,3] for a batch of 2' in str(error)
    with pytest.raises(ValueError, match='scalar'):
        batch_fn(tf.reduce_sum)(tf.ones([1, 3]))


def test_tensors_of_the_calling_graph_must_be_arguments():
    @tf.function
    def caller(x):
        return batch_fn(lambda y: x + y)(x)

    with pytest.raises((ValueError, TypeError), match='argument|captured'):
        caller(tf.ones([1]))


def test_close_fails_waiting_and_later_callers():
    batched = batch_fn_with_options(minimum_batch_size=3, timeout_ms=None)(lambda x: x)
    loop = tf.function(lambda x: batched(x))
    settled = run_all([lambda: loop(tf.zeros([1]))] * 3)
    assert len(settled) == 3
    waiting = [start(lambda: batched(tf.zeros([1]))), start(lambda: loop(tf.zeros([1])))]
    run_all([batched.close] * 4)
    for future in waiting:
        with pytest.raises(tf.errors.CancelledError, match='closed'):
            future.result(TIMEOUT)
    for call in (batched, loop):
        with pytest.raises(tf.errors.CancelledError, match='closed'):
            call(tf.zeros([1]))


def test_close_before_the_first_call():
    batched = batch_fn(lambda x: x)
    batched.close()
    with pytest.raises(tf.errors.CancelledError, match='closed'):
        batched(tf.zeros([1]))


def test_close_stops_the_running_batch():
    gate = Gate(minimum_batch_size=1)
    first = start(lambda: gate.batched(tf.zeros([1])))
    gate.wait_until_started()
    second = start(lambda: gate.batched(tf.zeros([1])))
    gate.batched.close()
    for future in (first, second):
        with pytest.raises(tf.errors.CancelledError, match='closed'):
            future.result(TIMEOUT)


def test_close_from_a_destructor():
    class Owner:
        def __init__(self):
            self.batched = batch_fn_with_options(minimum_batch_size=2, timeout_ms=None)(lambda x: x)
            run_all([lambda: self.batched(tf.zeros([1]))] * 2)

        def __del__(self):
            self.batched.close()

    owner = Owner()
    waiting = start(lambda call=owner.batched: call(tf.zeros([1])))
    del owner
    gc.collect()
    with pytest.raises(tf.errors.CancelledError, match='closed'):
        waiting.result(TIMEOUT)


def test_a_graph_outlives_the_decorated_function():
    def trace():
        batched = batch_fn_with_options(2, 2, 5)(lambda x: x + 1)
        return tf.function(batched).get_concrete_function(tf.TensorSpec([1]))

    concrete = trace()
    gc.collect()
    assert [float(r[0]) for r in run_all([lambda: concrete(tf.ones([1]))] * 2)] == [2, 2]


def test_cancelling_a_graph_releases_its_slot_and_leaves_others_alone():
    batched = batch_fn_with_options(minimum_batch_size=2, maximum_batch_size=2, timeout_ms=None)(
        lambda x: (x, batch_size_of(x))
    )
    function = tf.function(lambda x: batched(x))
    run_all([lambda: function(tf.zeros([1]))] * 2)

    for _ in range(20):
        manager = cancellation.CancellationManager()
        concrete = function.get_concrete_function(tf.TensorSpec([1]))
        cancelable = manager.get_cancelable_function(concrete)
        cancelled = start(lambda call=cancelable: call(tf.constant([1.0])))
        manager.start_cancel()
        with pytest.raises(tf.errors.CancelledError):
            cancelled.result(TIMEOUT)
        # If the slot stayed taken, one of these two would share a batch with the cancelled caller
        # and the other would wait forever.
        results = run_all([lambda i=i: function(tf.constant([i])) for i in (2.0, 3.0)])
        assert [(float(x[0]), int(size[0])) for x, size in results] == [(2, 2), (3, 2)]


def test_cancelling_one_caller_of_a_running_batch_leaves_the_other_alone():
    gate = Gate(minimum_batch_size=2, maximum_batch_size=2, timeout_ms=None)
    manager = cancellation.CancellationManager()
    concrete = tf.function(lambda x: gate.batched(x)).get_concrete_function(tf.TensorSpec([1]))
    cancelled = start(lambda: manager.get_cancelable_function(concrete)(tf.constant([1.0])))
    other = start(lambda: gate.batched(tf.constant([2.0])))
    assert gate.wait_until_started() == 2
    manager.start_cancel()
    gate.open()
    assert other.result(TIMEOUT)[0].numpy() == [3.0]
    with pytest.raises(tf.errors.CancelledError):
        cancelled.result(TIMEOUT)


def test_cancelling_all_callers_of_a_batch_stops_it():
    gate = Gate(minimum_batch_size=1)
    manager = cancellation.CancellationManager()
    concrete = tf.function(lambda x: gate.batched(x)).get_concrete_function(tf.TensorSpec([1]))
    cancelled = start(lambda: manager.get_cancelable_function(concrete)(tf.constant([1.0])))
    gate.wait_until_started()
    manager.start_cancel()
    with pytest.raises(tf.errors.CancelledError):
        cancelled.result(TIMEOUT)
    gate.open()
    assert gate.batched(tf.constant([2.0]))[0].numpy() == [3.0]


def test_closing_while_many_call():
    for _ in range(10):
        batched = batch_fn_with_options(minimum_batch_size=3, timeout_ms=1)(lambda x: x + 1)

        @tf.function
        def loop(x):
            while tf.constant(True):
                x = batched(x)  # noqa: B023
            return x

        batched(tf.zeros([1]))
        callers = [start(lambda: loop(tf.zeros([1]))) for _ in range(4)]
        closing = [start(batched.close) for _ in range(2)]
        for future in callers:
            with pytest.raises(tf.errors.CancelledError, match='closed'):
                future.result(TIMEOUT)
        for future in closing:
            future.result(TIMEOUT)


def test_batcher_inside_a_batched_function():
    inner = batch_fn(lambda x: x * 2)

    @batch_fn
    def outer(x):
        return tf.map_fn(lambda row: inner(row[tf.newaxis])[0], x)

    results = run_all([lambda i=i: outer(tf.constant([float(i)])) for i in range(5)])
    assert [float(r[0]) for r in results] == [0, 2, 4, 6, 8]


ANOTHER_DEVICE = """
import tensorflow as tf
from dynamic_batching import batch_fn
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.device('CPU:1'):
    w = tf.Variable(2.0)
    constant = tf.constant(1.0)
assert 'CPU:1' in w.device

@batch_fn
def placed(x):
    with tf.device('CPU:1'):
        return w * x + constant

with tf.device('CPU:1'):
    assert placed(tf.ones([1])).numpy() == [3.0]
    assert tf.function(placed)(tf.ones([1])).numpy() == [3.0]
w.assign(4.0)
assert placed(tf.ones([1])).numpy() == [5.0]
"""


def run_alone(folder, code):
    """Runs code in a process of its own, in which TensorFlow has not started."""
    (folder / 'code.py').write_text(code)
    outputs = folder / 'stdout', folder / 'stderr'
    process = WarmProcess(folder / 'code.py', [], os.environ, folder, outputs)
    try:
        assert process.wait(120) == 0, outputs[1].read_text()
    finally:
        process.kill()


def test_variables_and_operations_on_another_device(tmp_path):
    # Devices can only be added before TensorFlow uses them.
    run_alone(tmp_path, ANOTHER_DEVICE)


OPTIMIZED = """
import tensorflow as tf
from dynamic_batching import batch_fn
# This graph optimization removes assertions.
tf.config.optimizer.set_experimental_options({'debug_stripper': True})

@batch_fn
def optimized(x):
    tf.debugging.assert_less(x, 0)
    return x + 1

assert optimized(tf.constant([1])).numpy() == [2]
assert tf.function(optimized)(tf.constant([2])).numpy() == [3]
"""


def test_the_function_is_optimized_like_any_other(tmp_path):
    # The option would affect other tests.
    run_alone(tmp_path, OPTIMIZED)


def test_a_function_that_calls_a_compiled_one():
    # Unlike other functions, a compiled one is not inlined into its caller.
    weight = tf.Variable(2)
    double = tf.function(lambda x: x * weight, jit_compile=True, autograph=False)
    outer = batch_fn(lambda x: double(x) + 1)
    results = run_all([lambda i=i: outer(tf.constant([i])) for i in range(6)])
    assert [int(result[0]) for result in results] == [1, 3, 5, 7, 9, 11]


def test_inputs_and_variables_that_the_function_does_not_use():
    first, second = tf.Variable(2), tf.Variable(3)

    def triple(unused, x):
        first * 5  # Unused.
        return x * second

    batched = batch_fn(triple)
    results = run_all([lambda i=i: batched(tf.zeros([1]), tf.constant([i])) for i in range(6)])
    assert [int(result[0]) for result in results] == [0, 3, 6, 9, 12, 15]
    ignores_last = batch_fn(lambda x, unused: x + 1)
    assert int(ignores_last(tf.constant([1]), tf.zeros([1]))[0]) == 2
