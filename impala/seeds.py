"""Seeds that follow from others. It knows no TensorFlow: actor processes import it."""

import numpy as np


def derived_seed(*numbers: int) -> int:
    """Returns a seed that differs, but for a chance in 2**31, for all other numbers.

    Seeds next to each other would do as seeds of one run, but environments of runs with the seeds 1
    and 2 would be the same ones but for the first and the last.

    Args:
      numbers: nonnegative; as many in each place that seeds of one kind come from.

    Returns:
      In `[0, 2**31)`.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) & (2**31 - 1)
