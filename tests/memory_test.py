"""Tests of impala/memory.py, on made-up machines and this one."""

import re

import pytest

from impala.memory import Need, free_memory_bytes, room_bytes, shortage

UNROLLS = Need('unrolls', 6 * 10**9, {'queue_capacity': 5, 'num_actors': 1}, 10**9)
BATCHES = Need('batches', 3 * 10**9, {'batch_size': 30}, 10**8)
WEIGHTS = Need('weights', 10**8, {'width': 100}, 10**6)


def test_there_is_no_shortage_if_everything_fits():
    assert shortage([UNROLLS, BATCHES], 9 * 10**9) == ''
    assert shortage([], 0) == ''


@pytest.mark.parametrize(
    ('needs', 'room', 'sentence'),
    [
        (
            [BATCHES, UNROLLS, WEIGHTS],
            7_200_000_000,
            'This run needs 9.1 GB of memory or more, and there is room for 7.2 GB, most of what '
            'is free now: 6.0 GB for unrolls (--queue_capacity=5, --num_actors=1), 3.0 GB for '
            'batches (--batch_size=30); --queue_capacity=3 would do.',
        ),
        (
            [UNROLLS, BATCHES],
            10**9,
            'This run needs 9.0 GB of memory or more, and there is room for 1.0 GB, most of what '
            'is free now: 6.0 GB for unrolls (--queue_capacity=5, --num_actors=1), 3.0 GB for '
            'batches (--batch_size=30); give smaller values.',
        ),
    ],
)
def test_a_shortage_names_the_flags_that_matter_most(needs, room, sentence):
    assert shortage(needs, room) == sentence


def test_free_memory_respects_container_limits(tmp_path):
    meminfo = tmp_path / 'meminfo'
    meminfo.write_text('MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    5000 kB\n')

    def free():
        return free_memory_bytes(str(meminfo), str(tmp_path))

    assert free() == 5000 * 1024
    (tmp_path / 'memory.max').write_text('max\n')
    assert free() == 5000 * 1024
    (tmp_path / 'memory.current').write_text('900000\n')
    (tmp_path / 'memory.stat').write_text('anon 7\ninactive_file 200000\nactive_file 100000\n')
    assert free() == 5000 * 1024
    # 100,000 are free, and 300,000 are page cache.
    (tmp_path / 'memory.max').write_text('1000000\n')
    assert free() == 400_000
    old = tmp_path / 'memory'
    old.mkdir()
    (old / 'memory.limit_in_bytes').write_text('800000\n')
    (old / 'memory.usage_in_bytes').write_text('700000\n')
    (old / 'memory.stat').write_text(
        'inactive_file 1\nactive_file 1\ntotal_inactive_file 15000\ntotal_active_file 5000\n'
    )
    assert free() == 120_000
    (old / 'memory.usage_in_bytes').write_text('900000\n')
    assert free() == 0


def test_there_is_room_for_a_part_of_the_free_memory():
    with open('/proc/meminfo') as file:
        total = int(re.search(r'MemTotal: +(\d+)', file.read())[1]) * 1024
    free = free_memory_bytes()
    assert 0 < room_bytes() < free - min(0.1 * free, 5 * 10**9) < total
    # The reserve is capped, as large machines need no more of it.
    assert room_bytes(10**12) > 0.98 * 10**12
