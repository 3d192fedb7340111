"""Compression of unrolls on their way to the learner, by zstd (RFC 8878)."""

from collections.abc import Sequence

import numpy as np
import zstandard

from impala.cluster.channel import Buffer
from impala.experience.replay import aligned

# The fastest of the regular levels: Atari's frames hardly shrink further with others.
_LEVEL = 1
# `auto` compresses unrolls that shrink at least to this share, as Atari's do (to a hundredth), and
# otherwise tries again after so many. Frames of DeepMind Lab and ViZDoom shrink to a half, for more
# processor time than a fast network takes.
_MAX_SHARE = 0.25
_NUM_SKIPPED = 100
# Bytes of memory that decompression may need; this level needs 512 KB.
_MAX_WINDOW = 1 << 23


class Compressor:
    """Compresses unrolls where that pays. One thread at a time may use it."""

    def __init__(self, mode: str):
        """Takes the setting `wire_compression`: `'auto'`, `'zstd'` or `'none'`."""
        self._mode = mode
        self._num_skipped = 0
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)

    def compress(self, buffers: Sequence[Buffer]) -> tuple[Sequence[Buffer], bool]:
        """Returns the buffers of a message's body, and whether they are compressed.

        Args:
          buffers: u8 arrays, to be sent one after another.
        """
        if self._mode == 'none':
            return buffers, False
        if self._num_skipped:
            self._num_skipped -= 1
            return buffers, False
        whole = np.concatenate(buffers)
        compressed = self._compressor.compress(whole.data)
        if self._mode == 'auto' and len(compressed) > _MAX_SHARE * len(whole):
            self._num_skipped = _NUM_SKIPPED
            return buffers, False
        return [compressed], True


def decompress(body: np.ndarray, max_bytes: int) -> np.ndarray:
    """Returns the bytes of a compressed body, u8 `[N]`, which TensorFlow can use without a copy.

    Args:
      body: u8, joined buffers of `Compressor.compress`.
      max_bytes: greatest N, checked before memory is allocated.

    Raises:
      ValueError: the body is malformed, or longer than that.
    """
    try:
        size = zstandard.get_frame_parameters(body.data).content_size
        if size > max_bytes:
            raise ValueError(f'the unroll has {size:,} bytes, more than {max_bytes:,}')
        whole = aligned((size,), np.dtype('uint8'))
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        with decompressor.stream_reader(body.data) as reader:
            if size and reader.readinto(whole) != size:
                raise ValueError('the unroll is not compressed as a whole')
    except zstandard.ZstdError as error:
        raise ValueError(f'the unroll is not compressed by zstd ({error})') from error
    return whole
