"""Instructions as networks read them: hashes of words."""

import re
import zlib

import numpy as np

from impala.trajectory import INSTRUCTION_BUCKETS

INSTRUCTION_LENGTH = 32


def hash_instruction(instruction: str) -> np.ndarray:
    """Hashes the words of an instruction, the same way in every process and on every machine.

    Args:
      instruction: its words are the longest runs of letters and digits; case does not matter.

    Returns:
      int32 `[INSTRUCTION_LENGTH]`: a bucket in `[1, 999]` for each word, then zeros.
      Words beyond `INSTRUCTION_LENGTH` are dropped.
    """
    buckets = np.zeros(INSTRUCTION_LENGTH, np.int32)
    words = re.findall(r'[^\W_]+', instruction.lower())[:INSTRUCTION_LENGTH]
    for i, word in enumerate(words):
        buckets[i] = zlib.crc32(word.encode()) % (INSTRUCTION_BUCKETS - 1) + 1
    return buckets
