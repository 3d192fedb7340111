"""The circular buffer of batches that are trained on several times.

Luo et al. 2020, IMPACT (https://arxiv.org/abs/1912.00167): the buffer holds the last N batches,
each is used K times, and the next one replaces the oldest.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

Batch = TypeVar('Batch')


def reused(batches: Iterable[Batch], times: int, buffer_size: int) -> Iterator[tuple[Batch, bool]]:
    """Yields every batch several times, with others in between.

    A batch is used when it comes, and again at even intervals until `buffer_size - 1` later ones
    have come. So one of `times` uses is of a new batch, and actors deliver batches at an even rate.
    While the buffer fills, there are fewer uses. Nothing is copied.

    Args:
      batches: read one by one, when the next is due.
      times: K, uses of each; 1 yields the batches as they come.
      buffer_size: N, batches held; 1 uses each batch K times in a row.

    Yields:
      A batch, and whether this is its first use.
    """
    buffer: collections.deque[Batch] = collections.deque(maxlen=buffer_size)
    ages = [round(use * (buffer_size - 1) / max(1, times - 1)) for use in range(times)]
    for batch in batches:
        buffer.appendleft(batch)
        for use, age in enumerate(ages):
            if age < len(buffer):
                yield buffer[age], use == 0
