"""The circular buffer of batches that are trained on several times.

Luo et al. 2020, IMPACT (https://arxiv.org/abs/1912.00167): the last N batches are held, each is
used K times, and the oldest is replaced by the next one.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

Batch = TypeVar('Batch')


def reused(batches: Iterable[Batch], times: int, buffer_size: int) -> Iterator[tuple[Batch, bool]]:
    """Yields every batch several times, others in between.

    Each batch is used once when it comes, and then together with later ones, at even distances,
    the last time together with the one `buffer_size - 1` behind it. So there is one new batch for
    every `times` uses, never several at a time, and the actors are not made to wait in turns. At
    the start, when there are few batches, there are fewer uses. Nothing is copied.

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
