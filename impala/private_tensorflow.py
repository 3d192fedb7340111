"""The private TensorFlow functions that the project needs, and why.

A release of TensorFlow may rename or remove them without notice. `dynamic_batching`, a package of
its own, has a module of the same name for its own needs.
"""

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import ops


def abort_collectives(reason: str) -> None:
    """Fails pending and future collective operations with `tf.errors.UnavailableError`.

    No public function ends such a wait: a learner whose peer has stopped would hang in its train
    step.

    Args:
      reason: text of the errors.
    """
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)


def disable_coordination_service() -> None:
    """Keeps `tf.distribute.MultiWorkerMirroredStrategy` from starting its coordination service.

    The service intercepts SIGTERM, and makes a learner hang at its end if the first learner is
    gone. It has no public switch. Call this before making the strategy.
    """
    context.context().configure_coordination_service(service_type='')


def shared_tensor(array: np.ndarray) -> tf.Tensor:
    """Returns an eager tensor on the CPU that shares the memory of an array.

    `tf.convert_to_tensor` copies. `tf.experimental.dlpack` does not, but then whichever thread
    drops the tensor frees the array, and waits for Python's lock to do so; here Python frees it
    when it drops its next tensor.

    Args:
      array: must not be written to while the tensor is in use. It is copied if its address is not a
        multiple of 64 bytes or it is not contiguous.
    """
    context.ensure_initialized()
    with tf.device('/cpu:0'):
        return ops.EagerTensor(array, context.context().device_name)
