"""Tests of impala/cluster/compression.py."""

import numpy as np
import pytest
import zstandard

from impala.cluster.compression import Compressor, decompress

SPARSE = [np.zeros(50_000, np.uint8), np.arange(1000, dtype=np.int32).view(np.uint8)]
NOISE = [np.random.default_rng(1).integers(256, size=50_000, dtype=np.uint8)]
LIMIT = 100_000


def body(buffers):
    return np.frombuffer(b''.join(bytes(buffer) for buffer in buffers), np.uint8)


@pytest.mark.parametrize('buffers', [SPARSE, NOISE])
def test_bytes_survive(buffers):
    compressed, is_compressed = Compressor('zstd').compress(buffers)
    assert is_compressed
    whole = decompress(body(compressed), LIMIT)
    assert whole.tobytes() == body(buffers).tobytes()
    assert whole.ctypes.data % 64 == 0


def test_what_does_not_shrink_is_sent_as_it_is_and_tried_again_later():
    compressor = Compressor('auto')
    assert compressor.compress(SPARSE)[1]
    buffers, is_compressed = compressor.compress(NOISE)
    assert buffers is NOISE and not is_compressed
    outcomes = [compressor.compress(SPARSE)[1] for _ in range(200)]
    assert outcomes == 100 * [False] + 100 * [True]


def test_nothing_is_compressed_on_request():
    assert Compressor('none').compress(SPARSE) == (SPARSE, False)


def test_lengths_are_checked_before_memory_is_allocated():
    # The frame says that it holds an exabyte.
    header = b'\x28\xb5\x2f\xfd\xc0\x00' + (1 << 60).to_bytes(8, 'little')
    for text, words in (
        (header, 'more than 100,000'),
        (zstandard.compress(bytes(LIMIT + 1)), 'more than'),
        # Without a length.
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10)), 'as a whole|more'),
    ):
        with pytest.raises(ValueError, match=words):
            decompress(np.frombuffer(text, np.uint8), LIMIT)


@pytest.mark.parametrize('text', [b'', b'GET / HTTP/1.1', zstandard.compress(bytes(9999))[:-3]])
def test_what_is_not_compressed_is_an_error(text):
    with pytest.raises(ValueError, match='compressed'):
        decompress(np.frombuffer(text, np.uint8), LIMIT)
