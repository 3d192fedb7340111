"""The hashes of words."""

import numpy as np

from impala.environments.instructions import hash_instruction


def test_instruction_hash():
    # The check value of CRC-32/ISO-HDLC in the catalogue of CRC algorithms.
    bucket = 0xCBF43926 % 999 + 1
    hashed = hash_instruction('  123456789, "123456789"')
    assert hashed.dtype == np.int32
    assert hashed.tolist() == [bucket, bucket] + [0] * 30
    assert (hash_instruction('Go TO the_ball!') > 0).sum() == 4
    np.testing.assert_array_equal(hash_instruction('GO to'), hash_instruction('go TO'))
    assert not hash_instruction('').any()
    many = hash_instruction(' '.join(f'w{i}' for i in range(5000)))
    assert many.shape == (32,) and many.min() >= 1
    buckets = {int(hash_instruction(f'w{i}')[0]) for i in range(20_000)}
    assert buckets == set(range(1, 1000))
