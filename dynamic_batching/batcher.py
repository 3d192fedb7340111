"""The in-process dynamic batcher: a decorator that batches concurrent calls of a function.

    @batch_fn
    def act(frame, state):  # uint8 [B, H, W, C], float32 [B, N]
        ...

    act(frame, state)  # uint8 [1, H, W, C], float32 [1, N], from any thread, tf.function or loop

Each caller passes one row and gets its own row back. `batch_fn_with_options` sets how long callers
wait for each other. It also takes an input signature; without one, the first call determines
structure, dtypes and shapes of the rows.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from dynamic_batching.op_library import load_ops
from dynamic_batching.private_tensorflow import let_calls_meet, paths

_ops = load_ops('dynamic_batching')

let_calls_meet('DynamicBatch')
tf.no_gradient('DynamicBatch')


class BatchedFunction:
    """A function whose concurrent calls are computed together; made by the decorators below.

    The input signature, or the first call where there is none, determines structure, dtypes and
    shapes of the arguments; all calls must agree with them. The first call traces the function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        minimum_batch_size: int,
        maximum_batch_size: int,
        timeout_ms: int | None,
        input_signature: Sequence[Any] | None,
    ):
        self.__name__ = getattr(function, '__name__', type(function).__name__)
        self.__doc__ = function.__doc__
        self._function = function
        self._minimum_batch_size = minimum_batch_size
        self._maximum_batch_size = maximum_batch_size
        self._timeout_ms = timeout_ms
        self._signature: tuple[Any, Any] | None = None
        if input_signature is not None:
            # In the form of a call's arguments: positional and keyword.
            self._signature = (tuple(input_signature), {})
            _check_signature(self.__name__, self._signature)
        self._lock = threading.Lock()
        self._closed = False
        self._traced: _Traced | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes one row.

        Args:
          *args: nests of tensors `[1, ...]` of numbers, bools or strings.
          **kwargs: likewise.

        Returns:
          The function's results for this row, as tensors `[1, ...]` in the same structure.

        Raises:
          tf.errors.CancelledError: the batcher was closed, before or while the call waited.
          tf.errors.InvalidArgumentError: shapes or dtypes differ from those of the input signature
            or, where there is none, of the first call.
          ValueError: the structure differs, or there is no input signature and a shape is unknown
            in the first call.
          tf.errors.OpError: the function failed; every caller of the batch gets its error.
        """
        traced = self._traced
        if traced is None:
            traced = self._trace(args, kwargs)
        rows = traced.check(self.__name__, args, kwargs)
        # Rows are gathered on the host, whatever the caller's device.
        with tf.device('CPU:0'):
            results = _ops.dynamic_batch(
                handle=traced.handle,
                rows=rows,
                Tout=traced.output_types,
                output_shapes=traced.output_shapes,
            )
        return traced.restore(results)

    def close(self) -> None:
        """Fails waiting and future calls with `CancelledError`; a running batch is asked to stop.

        May be called at any time, repeatedly and from any thread.
        """
        # Without the lock, so as not to wait for a thread that is tracing.
        self._closed = True
        if self._traced is not None:
            with tf.init_scope(), tf.device('CPU:0'):
                _ops.dynamic_batcher_close(self._traced.handle)

    def _trace(self, args: Any, kwargs: Any) -> '_Traced':
        with self._lock:
            if self._traced is None:
                if self._closed:
                    raise tf.errors.CancelledError(
                        None, None, f"The batcher of '{self.__name__}' is closed."
                    )
                specs = self._signature or _specs_of_call(self.__name__, args, kwargs)
                self._traced = _Traced(self, specs)
        if self._closed:
            self.close()
        return self._traced

    @property
    def _static_batch_size(self) -> int | None:
        is_static = (
            self._timeout_ms is None and self._minimum_batch_size == self._maximum_batch_size
        )
        return self._minimum_batch_size if is_static else None


class _Traced:
    """The function traced for rows of given specs, and its batcher.

    Args:
      batched: the function to trace.
      specs: positional and keyword arguments, nests of `tf.TensorSpec`; the batcher replaces their
        leading dimension.
    """

    def __init__(self, batched: BatchedFunction, specs: tuple[Any, Any]):
        name = batched.__name__
        self._settled_by = 'the first call' if batched._signature is None else 'the input signature'
        self._structure = specs
        self._input_names = _input_names(specs)
        self._types = [spec.dtype for spec in tf.nest.flatten(specs)]
        self._shapes = [
            tf.TensorShape([1]).concatenate(spec.shape[1:]) for spec in tf.nest.flatten(specs)
        ]
        batch = tf.TensorShape([batched._static_batch_size])
        # The batcher belongs to no graph, because it serves callers in all graphs.
        with tf.init_scope(), tf.device(None):
            if not tf.executing_eagerly():
                raise RuntimeError(
                    f"'{name}' is batched, which needs TensorFlow 2's eager runtime."
                )

            @tf.function
            def compute(*rows):
                args, kwargs = tf.nest.pack_sequence_as(self._structure, rows)
                return batched._function(*args, **kwargs)

            # Keep a reference: the runtime deletes functions that Python no longer refers to.
            self._function = compute.get_concrete_function(
                *(
                    tf.TensorSpec(batch.concatenate(shape[1:]), dtype)
                    for shape, dtype in zip(self._shapes, self._types, strict=True)
                )
            )
            for captured in self._function.captured_inputs:
                if tf.is_symbolic_tensor(captured):
                    raise ValueError(
                        f"'{name}' is batched and uses {captured.name} of the graph that calls it. "
                        'Pass it as an argument.'
                    )
            outputs = self._function.outputs
            for i, output in enumerate(outputs):
                if output.shape.rank == 0:
                    raise ValueError(
                        f"Output {i} of '{name}' is a scalar, but must have the leading dimension "
                        'of the batch.'
                    )
            self.output_types = [output.dtype for output in outputs]
            self.output_shapes = [
                tf.TensorShape([1]).concatenate(output.shape[1:])
                if output.shape.rank is not None
                else output.shape
                for output in outputs
            ]
            with tf.device('CPU:0'):
                self.handle = _ops.dynamic_batcher(
                    captured=self._function.captured_inputs,
                    f=self._function,
                    label=name,
                    input_names=self._input_names,
                    input_types=self._types,
                    row_shapes=self._shapes,
                    num_outputs=len(outputs),
                    minimum_batch_size=batched._minimum_batch_size,
                    maximum_batch_size=batched._maximum_batch_size,
                    timeout_ms=-1 if batched._timeout_ms is None else batched._timeout_ms,
                )

    def check(self, name: str, args: Any, kwargs: Any) -> list[tf.Tensor]:
        """Returns the arguments as flat tensors, or raises an error if they do not fit."""
        try:
            tf.nest.assert_same_structure(self._structure, (args, kwargs))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The arguments of '{name}' are not of the structure of {self._settled_by}: {error}"
            ) from error
        rows = []
        for input_name, value, dtype, shape in zip(
            self._input_names,
            tf.nest.flatten((args, kwargs)),
            self._types,
            self._shapes,
            strict=True,
        ):
            row = tf.convert_to_tensor(value, dtype_hint=dtype)
            if row.dtype != dtype:
                raise tf.errors.InvalidArgumentError(
                    None,
                    None,
                    f"Input {input_name} of '{name}' has type {row.dtype.name}, but the batcher "
                    f'was made for {dtype.name}',
                )
            if not row.shape.is_compatible_with(shape):
                raise tf.errors.InvalidArgumentError(
                    None,
                    None,
                    f"Input {input_name} of '{name}' has shape {row.shape}, but the batcher was "
                    f'made for {shape}',
                )
            rows.append(row)
        return rows

    def restore(self, results: list[tf.Tensor]) -> Any:
        """Packs flat results into the structure that the function returned."""
        remaining = iter(results)
        # Where the function returned None instead of a tensor, its callers get None.
        return tf.nest.map_structure(
            lambda output: None if output is None else next(remaining),
            self._function.structured_outputs,
        )


def _specs_of_call(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns the specs of a call's rows, or raises an error if they cannot hold for all calls."""
    rows = [tf.convert_to_tensor(value) for value in tf.nest.flatten((args, kwargs))]
    if not rows:
        raise ValueError(f"'{name}' is called without tensors, so that there is nothing to batch.")
    for input_name, row in zip(_input_names((args, kwargs)), rows, strict=True):
        if row.shape.rank is None or not row.shape[1:].is_fully_defined():
            raise ValueError(
                f"The first call of '{name}' settles its shapes, but that of input {input_name} is "
                f'not known: {row.shape}. Use tf.ensure_shape, or an input signature.'
            )
        if row.shape.rank == 0 or row.shape[0] not in (1, None):
            raise tf.errors.InvalidArgumentError(
                None,
                None,
                f"Input {input_name} of '{name}' has shape {row.shape}, but must have leading "
                'dimension 1.',
            )
    specs = [tf.TensorSpec(row.shape, row.dtype) for row in rows]
    return tf.nest.pack_sequence_as((args, kwargs), specs)


def _check_signature(name: str, signature: tuple[Any, Any]) -> None:
    """Raises a ValueError if a spec of an input signature is not the spec of a row."""
    specs = tf.nest.flatten(signature)
    if not specs:
        raise ValueError(f"The input signature of '{name}' has no tensors to batch.")
    for input_name, spec in zip(_input_names(signature), specs, strict=True):
        if not isinstance(spec, tf.TensorSpec):
            raise ValueError(
                f"Input {input_name} in the input signature of '{name}' must be a tf.TensorSpec, "
                f'but is {spec!r}.'
            )
        shape = spec.shape
        if not shape.rank or shape[0] not in (1, None) or not shape[1:].is_fully_defined():
            raise ValueError(
                f"Input {input_name} in the input signature of '{name}' has shape {shape}, but "
                'must have leading dimension 1, which None stands for, too, and all others known.'
            )


def _input_names(arguments: tuple[Any, Any]) -> list[str]:
    """Returns names such as `0.observation.frame` or `state.1` for the tensors in the arguments."""
    return ['.'.join(str(part) for part in path[1:]) for path in paths(arguments)]


def batch_fn_with_options(
    minimum_batch_size: int = 1,
    maximum_batch_size: int = 1024,
    timeout_ms: int | None = 100,
    input_signature: Sequence[Any] | None = None,
) -> Callable[[Callable[..., Any]], BatchedFunction]:
    """Makes a decorator like `batch_fn` that also sets when a batch is computed.

    At most one batch is computed at a time. The next one starts as soon as the previous one has
    ended and either `minimum_batch_size` callers wait or one has waited for `timeout_ms`. If
    minimum and maximum are equal and there is no time-out, the function is traced with that static
    batch size.

    Args:
      minimum_batch_size: rows to wait for.
      maximum_batch_size: maximum number of rows in a batch; further callers wait for the next.
      timeout_ms: milliseconds after which a batch is computed with fewer rows than the minimum;
        None to wait forever.
      input_signature: as in `tf.function`, a sequence with a nest of `tf.TensorSpec` per argument;
        callers then pass all arguments by position. Shapes are those of a caller's row,
        `[1, ...]`; `[None, ...]` means the same. A call that does not match the signature fails
        alone, even if it is the first. Without a signature, all calls must match the first one.

    Returns:
      A decorator that returns a `BatchedFunction`.

    Raises:
      ValueError: not 1 <= minimum_batch_size <= maximum_batch_size, or a negative time-out. The
        decorator raises it if the input signature contains anything but specs of rows.
    """
    if not 1 <= minimum_batch_size <= maximum_batch_size:
        raise ValueError(
            '1 <= minimum_batch_size <= maximum_batch_size must hold, but they are '
            f'{minimum_batch_size} and {maximum_batch_size}.'
        )
    if timeout_ms is not None and timeout_ms < 0:
        raise ValueError(f'timeout_ms must be None or not negative, but is {timeout_ms}.')
    return lambda function: BatchedFunction(
        function, minimum_batch_size, maximum_batch_size, timeout_ms, input_signature
    )


def batch_fn(function: Callable[..., Any]) -> BatchedFunction:
    """Computes concurrent calls of a function of tensors together.

    Args:
      function: maps nests of tensors `[B, ...]` to a nest of tensors `[B, ...]`, row by row. It is
        traced once, on the first call, whose dtypes and shapes all others must have;
        `batch_fn_with_options` takes an input signature instead. Its variables are read anew for
        each batch. TensorFlow optimizes it like a tf.function, with the options of
        `tf.config.optimizer` that were set before TensorFlow was first used.

    Returns:
      A `BatchedFunction`, to be called with nests of tensors `[1, ...]`. Gradients do not flow
      through it. In a tf.function, only ops that use a call's results wait for it: the call may run
      concurrently with calls of later iterations of a `tf.while_loop` (`parallel_iterations`), and
      is dropped if its results are not used. Its side effects are not ordered with those of the
      tf.function.
    """
    return batch_fn_with_options()(function)
