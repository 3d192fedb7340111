import itertools

import numpy as np

from impala.seeds import derived_seed


def test_seeds_are_distinct_and_uniform():
    numbers = list(itertools.product(range(5), range(5), range(100)))
    seeds = [derived_seed(*each) for each in numbers]
    assert len(set(seeds)) == len(numbers)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [derived_seed(*each) for each in numbers]
    # Uniform: the mean of 2,500 is within five standard errors of the middle.
    assert abs(np.mean(seeds) / 2**31 - 0.5) < 5 / np.sqrt(12 * len(seeds))


def test_counts_beyond_32_bits_have_distinct_seeds():
    assert len({derived_seed(2**29 - 1, count) for count in (0, 2**32, 2**40, 2**63 - 1)}) == 4
