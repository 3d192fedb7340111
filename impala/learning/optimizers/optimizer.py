"""What the optimizers have in common: slots for parameters that are known beforehand."""

from collections.abc import Sequence

import sonnet as snt
import tensorflow as tf


class Optimizer(snt.Module):
    """Knows the parameters that it has slots for.

    Slots are made at construction, not at the first update, so that a checkpoint restored before it
    finds its variables.
    """

    def __init__(self, parameters: Sequence[tf.Variable], name: str | None = None):
        """Takes the parameters.

        Args:
          parameters: all variables that `apply` will ever be given.
          name: of the module.
        """
        super().__init__(name=name)
        self._indices = {parameter.ref(): i for i, parameter in enumerate(parameters)}

    def _slots(
        self,
        updates: Sequence[tf.Tensor | tf.IndexedSlices | None],
        parameters: Sequence[tf.Variable],
    ) -> list[int]:
        """Returns the index of each parameter's slots.

        Raises:
          ValueError: the sequences differ in length, or a parameter was not given at construction.
        """
        if len(updates) != len(parameters):
            raise ValueError(f'{len(updates)} updates for {len(parameters)} parameters')
        for parameter in parameters:
            if parameter.ref() not in self._indices:
                raise ValueError(f'the optimizer has no slots for the parameter {parameter.name}')
        return [self._indices[parameter.ref()] for parameter in parameters]
