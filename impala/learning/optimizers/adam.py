"""Adam for replicas that stay equal; Sonnet's cannot train replicas."""

from collections.abc import Sequence

import tensorflow as tf

from impala.learning.optimizers.optimizer import Optimizer


class Adam(Optimizer):
    """Adam: Kingma & Ba 2015 (https://arxiv.org/abs/1412.6980), in the order of its section 2.

    For gradient g of a parameter at update t = 1, 2, ...:

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        rate <- learning_rate sqrt(1 - beta2^t) / (1 - beta1^t)
        parameter <- parameter - rate m / (sqrt(v) + epsilon)

    Attributes:
      means: f32 variables, m, one per parameter and shaped like it; start at zeros.
      mean_squares: f32 variables, v, likewise.
      updates: i64 variable, t, how often `apply` was called.
    """

    def __init__(
        self,
        parameters: Sequence[tf.Variable],
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        name: str | None = None,
    ):
        """Makes the slots.

        Args:
          parameters: all variables that `apply` will ever be given.
          beta1: decay of the running mean of gradients, per update.
          beta2: decay of the running mean of squared gradients, per update.
          epsilon: added to the root.
          name: of the module.
        """
        super().__init__(parameters, name)
        self._beta1 = beta1
        self._beta2 = beta2
        self._epsilon = epsilon
        self.means = [
            tf.Variable(tf.zeros_like(p), trainable=False, name='mean') for p in parameters
        ]
        self.mean_squares = [
            tf.Variable(tf.zeros_like(p), trainable=False, name='mean_square') for p in parameters
        ]
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name='updates')

    def apply(
        self,
        updates: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
        learning_rate: tf.Tensor | float,
    ) -> None:
        """Takes one step.

        Args:
          updates: gradients, shaped like `parameters`; None leaves a parameter unchanged. An
            `IndexedSlices` counts as the dense gradient that it stands for.
          parameters: variables, some or all of those given at construction.
          learning_rate: f32 scalar.

        Raises:
          ValueError: the sequences differ in length, or a parameter was not given at construction.
        """
        slots = self._slots(updates, parameters)
        # Adds to the variable of the replica that is computing, which `assign_add` cannot do.
        tf.raw_ops.AssignAddVariableOp(resource=self.updates.handle, value=tf.constant(1, tf.int64))
        # In float64, as 1 - beta2^t is a small difference at first.
        done = tf.cast(self.updates.read_value(), tf.float64)
        powers = [
            tf.cast(tf.pow(tf.constant(beta, tf.float64), done), tf.float32)
            for beta in (self._beta1, self._beta2)
        ]
        for update, parameter, index in zip(updates, parameters, slots, strict=True):
            if update is None:
                continue
            tf.raw_ops.ResourceApplyAdam(
                var=parameter.handle,
                m=self.means[index].handle,
                v=self.mean_squares[index].handle,
                beta1_power=powers[0],
                beta2_power=powers[1],
                lr=learning_rate,
                beta1=self._beta1,
                beta2=self._beta2,
                epsilon=self._epsilon,
                grad=tf.convert_to_tensor(update),
            )
