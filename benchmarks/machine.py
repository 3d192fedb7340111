"""Says what machine a benchmark ran on, as every table here must."""

import os
import platform


def describe() -> str:
    """Returns processor, usable cores, memory and Python version in one line."""
    model = platform.processor() or platform.machine()
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        for line in file:
            if line.startswith('model name'):
                model = line.partition(':')[2].strip()
                break
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return (
        f'{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, '
        f'Python {platform.python_version()}'
    )
