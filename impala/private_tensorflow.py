"""What the project needs of TensorFlow that has no public name, and why.

A release of TensorFlow may rename or remove these without notice. `dynamic_batching`, which stands
alone, has a module of the same name for its own needs.
"""

import tensorflow as tf
from tensorflow.python.eager import context


def abort_collectives(reason: str) -> None:
    """Fails a collective operation that waits for other processes, and all later ones.

    No public function ends such a wait: a learner whose peer has stopped would stay in its train
    step.

    Args:
      reason: text of the `tf.errors.UnavailableError` that they raise.
    """
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)


def disable_coordination_service() -> None:
    """Has `tf.distribute.MultiWorkerMirroredStrategy` not start its coordination service.

    The service takes SIGTERM for itself and has a learner hang at its end when the first one is
    gone. It has no public switch. Call this before the strategy is made.
    """
    context.context().configure_coordination_service(service_type='')
