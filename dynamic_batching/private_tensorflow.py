"""What the batcher needs of TensorFlow that has no public name, and why.

A release of TensorFlow may rename or remove these without notice.
"""

from typing import Any

from tensorflow.python.framework import auto_control_deps, auto_control_deps_utils
from tensorflow.python.util import nest


def let_calls_meet(op: str) -> None:
    """Has `tf.function` order calls of a stateful op by their data alone.

    Otherwise `tf.function` would run the calls of one batcher one after the other, because they
    share a resource, and they would never meet in a batch. Only what uses the results of a call
    waits for it; the rest of a function, or of a loop's turn, does not. Each answer to a call in a
    loop would otherwise start a task for every variable of the loop.

    Args:
      op: its type, such as `'DynamicBatch'`.
    """
    auto_control_deps_utils.register_read_only_resource_op(op)
    auto_control_deps.ASYNC_STATEFUL_OPS |= {op}


def paths(structure: Any) -> list[tuple[Any, ...]]:
    """Returns the path to each leaf of a nest, in the order of `tf.nest.flatten`.

    `tf.nest` does not have it; error messages name arguments by it.
    """
    return [path for path, _ in nest.flatten_with_tuple_paths(structure)]
