"""Arrays in one buffer, each at a multiple of 64 bytes, so that its owner can use them in place."""

from collections.abc import Sequence

import numpy as np

from impala.experience.replay import ALIGNMENT
from impala.trajectory import ArraySpec


class ArrayLayout:
    """Where arrays lie in a buffer: in order, with as few zeros between them as possible.

    Attributes:
      nbytes: bytes of the buffer.
    """

    def __init__(self, specs: Sequence[ArraySpec], start: int = 0):
        """Determines where each array begins.

        Args:
          specs: of the arrays.
          start: bytes at the beginning of the buffer that are not for arrays.
        """
        self._dtypes = [np.dtype(spec.dtype) for spec in specs]
        self._shapes = [tuple(spec.shape) for spec in specs]
        self._slices: list[slice] = []
        self._gaps: list[np.ndarray] = []
        self.nbytes = start
        for spec in specs:
            begin = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
            self._gaps.append(np.zeros(begin - self.nbytes, np.uint8))
            self.nbytes = begin + spec.nbytes
            self._slices.append(slice(begin, self.nbytes))

    def check(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> None:
        """Checks shapes and dtypes.

        Args:
          arrays: to be checked.
          names: of the arrays, for the error.

        Raises:
          ValueError: an array is another one, or there are fewer or more.
        """
        specs = zip(names, self._shapes, self._dtypes, arrays, strict=True)
        for name, shape, dtype, array in specs:
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f'{name} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}'
                )

    def buffers(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns what follows the start of the buffer.

        Args:
          arrays: as specified.

        Returns:
          Arrays, each u8 `[N]`: views of contiguous arrays, copies of others, and zeros.
        """
        buffers = []
        for gap, array in zip(self._gaps, arrays, strict=True):
            buffers += [gap, np.ascontiguousarray(array).reshape(-1).view(np.uint8)]
        return [buffer for buffer in buffers if buffer.size]

    def arrays(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays in a buffer, as views.

        Args:
          buffer: u8 `[N]`.

        Raises:
          ValueError: it has another number of bytes.
        """
        if buffer.size != self.nbytes:
            raise ValueError(f'there are {buffer.size:,} bytes, not {self.nbytes:,}')
        return [
            buffer[place].view(dtype).reshape(shape)
            for place, dtype, shape in zip(self._slices, self._dtypes, self._shapes, strict=True)
        ]
