"""The bytes of the learner's weights on their way to the actors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from impala.cluster.array_layout import ArrayLayout
from impala.trajectory import ArraySpec


class WeightsFormat:
    """How the weights of a network lie in their buffers. Any thread may use it.

    As bfloat16, float32 arrays of two or more dimensions take half of the bytes, and each number is
    rounded to 8 significant bits. Arrays of fewer dimensions, such as biases and statistics of
    observations, are small and stay exact.

    Attributes:
      nbytes: bytes of the weights.
    """

    def __init__(self, specs: Sequence[ArraySpec], bfloat16: bool = False):
        """Determines the sizes.

        Args:
          specs: of the weights.
          bfloat16: whether weights are sent as bfloat16.
        """
        self._names = [f'weight {i}' for i in range(len(specs))]
        self._own = ArrayLayout(specs)
        self._rounded = [
            bfloat16 and len(spec.shape) > 1 and np.dtype(spec.dtype) == np.float32
            for spec in specs
        ]
        self._sent = ArrayLayout(
            [
                dataclasses.replace(spec, dtype='bfloat16') if rounded else spec
                for spec, rounded in zip(specs, self._rounded, strict=True)
            ]
        )
        self.nbytes = self._sent.nbytes

    def buffers(self, weights: Sequence[Any]) -> list[np.ndarray]:
        """Returns the buffers of weights.

        Args:
          weights: arrays or eager tensors. A variable must be read first; later updates do not
            change what was read.

        Returns:
          Arrays, each u8 `[N]`, to be sent one after another. They are views of the weights, except
          for those sent as bfloat16.

        Raises:
          ValueError: a weight does not have its shape and dtype.
        """
        arrays = [np.asarray(weight) for weight in weights]
        self._own.check(arrays, self._names)
        return self._sent.buffers(
            [
                array.astype(ml_dtypes.bfloat16) if rounded else array
                for array, rounded in zip(arrays, self._rounded, strict=True)
            ]
        )

    def weights(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Returns the weights in a buffer: views, except for those sent as bfloat16.

        Args:
          buffer: u8 `[N]`, the joined `buffers`.

        Raises:
          ValueError: it has another number of bytes.
        """
        return [
            array.astype(np.float32) if rounded else array
            for array, rounded in zip(self._sent.arrays(buffer), self._rounded, strict=True)
        ]
