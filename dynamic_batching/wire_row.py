"""The form in which rows of actors travel to a policy on another machine.

A row is a header and then the bytes of the observation's arrays, in order and without gaps:
`dynamic_batching/cc/wire_row.h`.
"""

import numpy as np

HEADER = np.dtype(
    [
        ('actor', '<u4'),  # Index among the actors that share a connection.
        ('reward', '<f4'),
        ('episode_return', '<f4'),
        ('episode_step', '<i4'),
        ('episode_frames', '<i4'),
        # Bit 0: the reward was not finite; bit i + 1: observation i. Then the first such value.
        ('non_finite', '<u4'),
        ('non_finite_value', '<f4'),
        ('end', 'u1'),  # `EpisodeEnd`.
        ('is_first', 'u1'),  # Whether the actor's process has started anew.
        ('unused', 'u1', 2),
    ]
)


def headers(rows: np.ndarray) -> np.ndarray:
    """Returns the headers of rows, as a structured array `[N]`.

    Args:
      rows: u8 `[N, row_bytes]`.
    """
    return np.ascontiguousarray(rows[:, : HEADER.itemsize]).view(HEADER)[:, 0]
