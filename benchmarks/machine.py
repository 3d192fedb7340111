"""Describes the machine of a benchmark; every table states it."""

import os
import platform

# Instructions that TensorFlow's speed depends on; a model's name does not always determine them.
_INSTRUCTIONS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')


def describe() -> str:
    """Returns processor, usable cores, memory and Python version in one line."""
    model = platform.processor() or platform.machine()
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        # Of the first processor.
        lines = file.read().partition('\n\n')[0].splitlines()
    fields = {name.strip(): text.strip() for name, _, text in (x.partition(':') for x in lines)}
    model = fields.get('model name', model)
    present = fields.get('flags', '').split()
    if instructions := [name for name in _INSTRUCTIONS if name in present]:
        model += f' with {", ".join(instructions)}'
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return (
        f'{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, '
        f'Python {platform.python_version()}'
    )
