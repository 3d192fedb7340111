"""The bytes of an unroll on its way to the learner.

The first byte says which form follows: 0 is plain, the arrays as they are; 1 is packed, each frame
of a stack once. Then come the arrays, each at a multiple of 64 bytes, so that they can be read in
place. `UnrollInbox` reads both forms; FormOf() in impala/cluster/cc/exchange.cc lays them out, too.
"""

from collections.abc import Sequence

import numpy as np

from impala.cluster.array_layout import ArrayLayout
from impala.experience.replay import Packing
from impala.trajectory import UnrollArray

# The first byte of a buffer.
_PLAIN, _PACKED = np.array([0], np.uint8), np.array([1], np.uint8)


class UnrollFormat:
    """How unrolls lie in their buffers. One thread at a time may use it.

    Attributes:
      nbytes: bytes of a plain unroll.
      packed_nbytes: bytes of a packed unroll; `nbytes` if there is no stack.
    """

    def __init__(self, components: Sequence[UnrollArray], stack: str | None = None):
        """Determines the sizes.

        Args:
          components: the arrays of an unroll, as in the learner's inbox.
          stack: name of the array, uint8 `[T+1, H, W, C]`, that is a stack of frames, as in the
            learner's inbox.
        """
        self._packing = Packing(components, stack)
        self._names = [f"component '{component.name}'" for component in components]
        self._plain = ArrayLayout(components, _PLAIN.size)
        self._packed = ArrayLayout(self._packing.packed, _PACKED.size)
        self.nbytes = self._plain.nbytes
        self.packed_nbytes = self.nbytes if stack is None else self._packed.nbytes

    @property
    def max_nbytes(self) -> int:
        """Bytes of the larger form."""
        return max(self.nbytes, self.packed_nbytes)

    def buffers(self, unroll: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the buffers of an unroll, packed if its stack can be; see `Packing`.

        Values are not checked: the inbox does that.

        Args:
          unroll: the arrays.

        Returns:
          Arrays, each u8 `[N]`, to be sent one after another. They are views of contiguous arrays,
          which must not change until then, and copies of other arrays and of a stack's frames.

        Raises:
          ValueError: an array does not have the shape and dtype of its component.
        """
        self._plain.check(unroll, self._names)
        stack = self._packing.stack
        if stack is None:
            return [_PLAIN, *self._plain.buffers(unroll)]
        frames, begins = (
            np.empty(self._packing.packed[i].shape, self._packing.packed[i].dtype)
            for i in (stack, -1)
        )
        if not self._packing.pack_stack(unroll[stack], frames, begins):
            return [_PLAIN, *self._plain.buffers(unroll)]
        packed = [*unroll[:stack], frames, *unroll[stack + 1 :], begins]
        return [_PACKED, *self._packed.buffers(packed)]
