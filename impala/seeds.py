"""Derived seeds. Does not import TensorFlow, because actor processes import it."""

import numpy as np


def derived_seed(*numbers: int) -> int:
    """Returns a seed that differs from those of other numbers, up to a chance of 1 in 2**31.

    Consecutive seeds would suffice within a run, but then runs with the seeds 1 and 2 would share
    all environments except the first and the last.

    Args:
      *numbers: nonnegative integers. Seeds of one kind are derived from equally many numbers.

    Returns:
      A seed in `[0, 2**31)`.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & (2**31 - 1)
