"""RMSProp as in TensorFlow 1, with which the paper's results were obtained.

It differs from Sonnet 2's: the running mean of squares starts at ones, not at zeros, which keeps
the first steps small, and epsilon is added inside the square root.
"""

from collections.abc import Sequence

import tensorflow as tf

from dynamic_batching.op_library import load_ops
from impala.learning.optimizers.optimizer import Optimizer

_ops = load_ops('impala.learning.optimizers')


class RMSProp(Optimizer):
    """RMSProp with the arithmetic of `tf.compat.v1.train.RMSPropOptimizer`, bit for bit.

    For gradient g of a parameter:

        mean_square <- decay * mean_square + (1 - decay) * g^2
        step        <- momentum * step + learning_rate * g / sqrt(mean_square + epsilon)
        parameter   <- parameter - step

    Attributes:
      mean_squares: f32 variables, one per parameter and shaped like it; start at ones.
      steps: f32 variables, one per parameter and shaped like it; start at zeros and, without
        momentum, may stay so.
    """

    def __init__(
        self,
        parameters: Sequence[tf.Variable],
        decay: float = 0.99,
        momentum: float = 0.0,
        epsilon: float = 0.1,
        name: str | None = None,
    ):
        """Makes the slots.

        Args:
          parameters: all variables that `apply` will ever be given.
          decay: decay of the running mean of squared gradients, per update.
          momentum: 0 for none.
          epsilon: added to the mean square, inside the root.
          name: of the module.
        """
        super().__init__(parameters, name)
        self._decay = decay
        self._momentum = momentum
        self._epsilon = epsilon
        self.mean_squares = [
            tf.Variable(tf.ones_like(p), trainable=False, name='mean_square') for p in parameters
        ]
        self.steps = [
            tf.Variable(tf.zeros_like(p), trainable=False, name='step') for p in parameters
        ]

    def apply(
        self,
        updates: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
        learning_rate: tf.Tensor | float,
    ) -> None:
        """Takes one step.

        Rows that an `IndexedSlices` does not mention stay as they are, slots included, as in
        TensorFlow 1.

        Args:
          updates: gradients, shaped like `parameters`; None leaves a parameter unchanged.
            In `IndexedSlices` no index may occur twice: see `sum_duplicates`.
          parameters: variables, some or all of those given at construction.
          learning_rate: f32 scalar.

        Raises:
          ValueError: the sequences differ in length, or a parameter was not given at construction.
        """
        indices = self._slots(updates, parameters)
        for update, parameter, index in zip(updates, parameters, indices, strict=True):
            if update is None:
                continue
            slots = {'var': parameter, 'ms': self.mean_squares[index], 'mom': self.steps[index]}
            arguments = {name: variable.handle for name, variable in slots.items()} | {
                'lr': learning_rate,
                'rho': self._decay,
                'momentum': self._momentum,
                'epsilon': self._epsilon,
            }
            if isinstance(update, tf.IndexedSlices):
                if _on_cpu(parameter):
                    tf.raw_ops.ResourceSparseApplyRMSProp(
                        grad=update.values, indices=update.indices, **arguments
                    )
                else:
                    self._apply_rows(update, learning_rate, **slots)
            elif not self._momentum and _on_cpu(parameter):
                _ops.apply_rms_prop(
                    parameter.handle,
                    self.mean_squares[index].handle,
                    update,
                    learning_rate,
                    decay=self._decay,
                    epsilon=self._epsilon,
                )
            else:
                tf.raw_ops.ResourceApplyRMSProp(grad=update, **arguments)

    def _apply_rows(
        self,
        update: tf.IndexedSlices,
        learning_rate: tf.Tensor | float,
        var: tf.Variable,
        ms: tf.Variable,
        mom: tf.Variable,
    ) -> None:
        """Does what ResourceSparseApplyRMSProp does, which TensorFlow has for CPUs only."""
        rows, gradient = update.indices, update.values

        def gather(variable: tf.Variable) -> tf.Tensor:
            return tf.raw_ops.ResourceGather(
                resource=variable.handle, indices=rows, dtype=variable.dtype
            )

        squares = self._decay * gather(ms) + (1 - self._decay) * tf.square(gradient)
        scale = learning_rate * tf.math.rsqrt(squares + self._epsilon)
        steps = self._momentum * gather(mom) + scale * gradient
        for scatter, variable, values in (
            (tf.raw_ops.ResourceScatterUpdate, ms, squares),
            (tf.raw_ops.ResourceScatterUpdate, mom, steps),
            (tf.raw_ops.ResourceScatterSub, var, steps),
        ):
            scatter(resource=variable.handle, indices=rows, updates=values)


def _on_cpu(parameter: tf.Variable) -> bool:
    return tf.DeviceSpec.from_string(parameter.device).device_type in (None, 'CPU')


def sum_duplicates(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Sums the slices that have the same index, so that each index occurs once.

    With duplicates, norm and square of the gradient differ from those of the dense one.

    Args:
      gradient: values `[N, ...]`, indices integer `[N]`.

    Returns:
      The same gradient with values `[M, ...]` and indices `[M]`, M <= N.
    """
    indices, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(indices))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)
