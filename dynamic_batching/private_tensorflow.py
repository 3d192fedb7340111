"""The private TensorFlow functions that the batcher needs, and why.

A release of TensorFlow may rename or remove them without notice.
"""

from typing import Any

from tensorflow.python.framework import auto_control_deps, auto_control_deps_utils
from tensorflow.python.util import nest


def let_calls_meet(op: str) -> None:
    """Makes `tf.function` order calls of a stateful op by their data dependencies alone.

    By default `tf.function` would run the calls of one batcher one after the other, because they
    share a resource, so that they would never meet in a batch. It would also make the rest of a
    function or loop iteration wait for a call, so that each call in a loop would start a task for
    every loop variable on return. With this, only ops that use the results of a call wait for it.

    Args:
      op: type of the op, such as `'DynamicBatch'`.
    """
    auto_control_deps_utils.register_read_only_resource_op(op)
    auto_control_deps.ASYNC_STATEFUL_OPS |= {op}


def paths(structure: Any) -> list[tuple[Any, ...]]:
    """Returns the path to each leaf of a nest, in the order of `tf.nest.flatten`.

    `tf.nest` has no such function. Error messages name arguments by their paths.
    """
    return [path for path, _ in nest.flatten_with_tuple_paths(structure)]
