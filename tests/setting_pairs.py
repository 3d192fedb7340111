"""Choices of settings for short runs that together have every pair of values.

`RUNS` is found by annealing. When `CHOICES` or `REFUSED` change, print new ones:

    python tests/setting_pairs.py
"""

import itertools

import numpy as np

# Values to combine of settings of spaces, network and learner; the first is the default, or stands
# for it.
CHOICES = {
    'learner_devices': ((), ('/cpu:0', '/cpu:1')),
    'debug': (False, True),
    'observation_keys': ((), ('picture', 'numbers')),
    'clip_actions': (False, True),
    'info_action_mask': (False, True),
    'torso': ('shallow', 'autoencoder', 'own_parts:Flat'),
    'latent_size': (64, 5),
    'autoencoder_cost': (1.0, 0.0),
    'core': ('none', 'lstm', 'gru', 'own_cores:Stack'),
    'core_size': (256, 5),
    'popart': (False, True),
    'bootstrap_truncated': (False, True),
    'normalize_observations': (False, True),
    'initializer': ('truncated_normal', 'orthogonal'),
    'compute_dtype': ('float32', 'bfloat16'),
    'loss': ('vtrace', 'appo', 'own_parts:renamed_loss'),
    'clip_epsilon': (0.2, 0.1),
    'sample_reuse': (1, 2, 4),
    'reuse_buffer': (1, 3),
    'replay_fraction': (0.0, 0.5),
    'replay_capacity': (10_000, 9),
    'replay_addresses': ((), ('localhost:1',)),
    'optimizer': ('rmsprop', 'adam'),
    'target_update_steps': (0, 2),
    'normalize_advantages': (False, True),
    'gae_advantages': (False, True),
    'kl_cost': (0.0, 0.1),
    'final_entropy_cost': (None, 0.0),
    'final_learning_rate': (0.0, 0.001),
    'loaders': (0, 2),
    'inference_device': ('', '/cpu:0'),
    'test_every_secs': (0.0, 3600.0),
    'hooks': ((), ('rewarding_hook:RewardingHook',)),
}

# Pairs that are refused whatever else is chosen.
REFUSED = {
    (('learner_devices', ('/cpu:0', '/cpu:1')), ('debug', True)),
    (('debug', True), ('replay_addresses', ('localhost:1',))),
    (('debug', True), ('loaders', 2)),
    (('debug', True), ('test_every_secs', 3600.0)),
    (('torso', 'shallow'), ('latent_size', 5)),
    (('torso', 'shallow'), ('autoencoder_cost', 0.0)),
    (('core', 'none'), ('core_size', 5)),
    (('core', 'own_cores:Stack'), ('core_size', 5)),
    (('popart', True), ('target_update_steps', 2)),
    (('loss', 'vtrace'), ('clip_epsilon', 0.1)),
    (('loss', 'vtrace'), ('target_update_steps', 2)),
    (('loss', 'vtrace'), ('normalize_advantages', True)),
    (('loss', 'vtrace'), ('gae_advantages', True)),
    (('loss', 'vtrace'), ('kl_cost', 0.1)),
    (('sample_reuse', 1), ('reuse_buffer', 3)),
    (('replay_fraction', 0.0), ('replay_capacity', 9)),
    (('replay_fraction', 0.0), ('replay_addresses', ('localhost:1',))),
    (('replay_capacity', 9), ('replay_addresses', ('localhost:1',))),
}

# One run a line, one digit per setting: the index of its value.
RUNS = (
    '101101012000001200010101011100001',
    '100110003011110101010100100011010',
    '100111111111100001111010000011011',
    '101102100011001002010100000101011',
    '100012112111110110000010001000111',
    '010000001101101210011001100100100',
    '011110002010010002111010000110000',
    '011002110000010101011011111010101',
    '011001113001001000000000000010100',
    '001102113000101212100011011100001',
    '001101003011000111011000110100111',
    '000101110000111112100000000001111',
    '000112011000001101100011100110000',
    '000110000010111210000000011011100',
    '001000002100010211110111111101111',
    '001002101100111202010110111110010',
)

# The first runs are on several devices, the next in debug mode; both take longer than others.
_ON_DEVICES, _IN_DEBUG_MODE, _OTHERS = 5, 4, 7


def pairs(choice):
    """Returns all pairs of settings of a choice, each as two of (name, value)."""
    return set(itertools.combinations(choice.items(), 2))


def all_pairs():
    """Returns the pairs of all values, possible or not."""
    return {
        pair
        for first, second in itertools.combinations(CHOICES, 2)
        for pair in itertools.product(
            [(first, value) for value in CHOICES[first]],
            [(second, value) for value in CHOICES[second]],
        )
    }


def choices():
    """Returns the choice of each of `RUNS`: name of a setting -> value."""
    return [
        {
            name: values[int(digit)]
            for (name, values), digit in zip(CHOICES.items(), run, strict=True)
        }
        for run in RUNS
    ]


def _search(seed, num_steps=300_000):
    """Returns digits of runs that have every pair, [num_runs, num_settings], or None."""
    random = np.random.default_rng(seed)
    values = [(name, value) for name in CHOICES for value in CHOICES[name]]
    setting_of = np.array([list(CHOICES).index(name) for name, _ in values])
    first = np.searchsorted(setting_of, np.arange(len(CHOICES)))
    is_possible = np.zeros((len(values), len(values)), bool)
    for pair in all_pairs() - REFUSED:
        i, j = map(values.index, pair)
        is_possible[i, j] = is_possible[j, i] = True
    is_possible_or_same = is_possible | np.eye(len(values), dtype=bool)
    # [num_runs, num_settings], numbers of values. Every setting but the first two may change.
    num_runs = _ON_DEVICES + _IN_DEBUG_MODE + _OTHERS
    runs = np.tile(first, (num_runs, 1))
    runs[:_ON_DEVICES, 0] += 1
    runs[_ON_DEVICES : _ON_DEVICES + _IN_DEBUG_MODE, 1] += 1

    def is_allowed(run):
        return is_possible_or_same[np.ix_(run, run)].all()

    def counts_of(run):
        chosen = np.isin(np.arange(len(values)), run)
        return np.outer(chosen, chosen)

    counts = sum(counts_of(run).astype(int) for run in runs)
    num_missing = np.count_nonzero(is_possible & (counts == 0))
    for step in range(num_steps):
        if not num_missing:
            return runs - first
        if random.random() < 0.5:
            missing = np.argwhere(is_possible & (counts == 0))
            new = missing[random.integers(len(missing))]
        else:
            new = random.integers(len(values), size=1)
        if setting_of[new].min() < 2:
            new = new[setting_of[new] >= 2]
        row = random.integers(num_runs)
        run = runs[row].copy()
        run[setting_of[new]] = new
        if not is_allowed(run):
            continue
        changed = counts - counts_of(runs[row]) + counts_of(run)
        still_missing = np.count_nonzero(is_possible & (changed == 0))
        temperature = max(0.1, 2 - 2 * step / num_steps)
        if random.random() < np.exp((num_missing - still_missing) / temperature):
            runs[row], counts, num_missing = run, changed, still_missing
    return None


if __name__ == '__main__':
    found = next(filter(lambda runs: runs is not None, map(_search, itertools.count())))
    for each in found:
        print(f'    {"".join(map(str, each))!r},')
