"""Memory: how much there is, and whether what a run is going to need fits into it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

# What is left for what no estimate knows of: TensorFlow itself, activations, other programs. A part
# of what is free, and on a large machine no more than so many bytes.
_SHARE_LEFT = 0.2
_MOST_LEFT = 10 * 10**9
# What is less than this part of all is not worth a word.
_SHARE_TO_TELL = 0.1


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory that a run cannot do without.

    Attributes:
      what: it is for, in the plural.
      nbytes: at least.
      flags: name -> value of those that it follows from, the one that matters most first.
      nbytes_each: of one more of the first flag's value.
    """

    what: str
    nbytes: int
    flags: Mapping[str, int]
    nbytes_each: float


def shortage(needs: Sequence[Need], room: int | None = None) -> str:
    """Returns what is wrong if all needs together are more than there is room for, '' if not.

    Args:
      needs: of a run.
      room: bytes; None for `room_bytes` of this machine.

    Returns:
      A sentence for the user with the flags that matter most and, where there is one, a value of
      the first that would do.
    """
    room = room_bytes() if room is None else room
    total = sum(need.nbytes for need in needs)
    if total <= room:
        return ''
    largest = sorted(needs, key=lambda need: -need.nbytes)
    parts = [
        f'{_gigabytes(need.nbytes)} for {need.what} ('
        + ', '.join(f'--{name}={value}' for name, value in need.flags.items())
        + ')'
        for need in largest
        if need.nbytes >= _SHARE_TO_TELL * total
    ]
    name, value = next(iter(largest[0].flags.items()))
    most = int(value - (total - room) / largest[0].nbytes_each)
    advice = f'--{name}={most} would do' if most >= 1 else 'give smaller values'
    return (
        f'This run needs {_gigabytes(total)} of memory or more, and there is room for '
        f'{_gigabytes(room)}, most of what is free now: {", ".join(parts)}; {advice}.'
    )


def room_bytes(held: int = 0) -> int:
    """Returns the bytes of memory that a run may plan with: of what is free now, a part.

    Args:
      held: bytes that are in use and will be free.
    """
    free = free_memory_bytes() + held
    return int(free - min(_SHARE_LEFT * free, _MOST_LEFT))


def free_memory_bytes(meminfo: str = '/proc/meminfo', cgroups: str = '/sys/fs/cgroup') -> int:
    """Returns the bytes of memory that this process could still be given.

    Args:
      meminfo: file in which the kernel tells of the machine's memory.
      cgroups: folder of the limits of the container that it is in, if it is in one.
    """
    with open(meminfo, encoding='utf-8') as file:
        (available,) = re.findall(r'^MemAvailable: +(\d+) kB$', file.read(), re.MULTILINE)
    free = [int(available) * 1024]
    # Of the second and the first version of such limits.
    for limit, usage, statistics, prefix in (
        ('memory.max', 'memory.current', 'memory.stat', ''),
        (
            'memory/memory.limit_in_bytes',
            'memory/memory.usage_in_bytes',
            'memory/memory.stat',
            'total_',
        ),
    ):
        # There are no such files, or there is no limit, which reads 'max'.
        with contextlib.suppress(OSError, ValueError):
            left = int(_read(cgroups, limit)) - int(_read(cgroups, usage))
            # Files that were read count as used, but make room, also those that were read twice.
            pattern = rf'^{prefix}(?:in)?active_file (\d+)$'
            cached = re.findall(pattern, _read(cgroups, statistics), re.MULTILINE)
            free.append(left + sum(map(int, cached)))
    return max(0, min(free))


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding='utf-8') as file:
        return file.read()


def _gigabytes(nbytes: int) -> str:
    return f'{nbytes / 1e9:,.1f} GB'
