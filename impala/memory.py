"""Free memory of this machine, and whether a run fits into it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

# Reserve for what the estimates leave out (TensorFlow itself, activations, other programs): a share
# of the free memory, and at most this many bytes.
_SHARE_LEFT = 0.2
_MOST_LEFT = 10 * 10**9
# Private memory of an actor process on CartPole is 22 MB; most environments take far more.
ACTOR_PROCESS_BYTES = 20_000_000
# A need below this share of the total is not mentioned.
_SHARE_TO_TELL = 0.1


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory that a run requires.

    Attributes:
      what: its purpose, in the plural.
      nbytes: bytes, as a lower bound.
      flags: name -> value of the flags that determine it, the most important one first.
      nbytes_each: bytes that the first flag's value costs per unit.
    """

    what: str
    nbytes: int
    flags: Mapping[str, int]
    nbytes_each: float


def of_processes(num_environments: int, envs_per_process: int, flag: str) -> Need:
    """Returns what the actor processes of a machine need.

    Args:
      num_environments: environments on this machine.
      envs_per_process: environments that share a process.
      flag: name of the flag that has set their number.
    """
    return Need(
        'actor processes',
        -(-num_environments // envs_per_process) * ACTOR_PROCESS_BYTES,
        {flag: num_environments, 'envs_per_process': envs_per_process},
        ACTOR_PROCESS_BYTES / envs_per_process,
    )


def shortage(needs: Sequence[Need], room: int | None = None) -> str:
    """Returns a sentence for the user if the needs together exceed the room, '' if they fit.

    Args:
      needs: of a run.
      room: bytes; None for `room_bytes` of this machine.

    Returns:
      A sentence that names the most important flags and, if possible, a value of the first one that
      would fit.
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
    """Returns the bytes of memory that a run may plan to use: the free memory minus a reserve.

    Args:
      held: bytes that are in use now but will be free.
    """
    free = free_memory_bytes() + held
    return int(free - min(_SHARE_LEFT * free, _MOST_LEFT))


def free_memory_bytes(meminfo: str = '/proc/meminfo', cgroups: str = '/sys/fs/cgroup') -> int:
    """Returns the bytes of memory that this process can still get.

    Args:
      meminfo: the kernel's file about the machine's memory.
      cgroups: folder of the container's limits; need not exist.
    """
    with open(meminfo, encoding='utf-8') as file:
        (available,) = re.findall(r'^MemAvailable: +(\d+) kB$', file.read(), re.MULTILINE)
    free = [int(available) * 1024]
    # Files of cgroups version 2, then version 1.
    for limit, usage, statistics, prefix in (
        ('memory.max', 'memory.current', 'memory.stat', ''),
        (
            'memory/memory.limit_in_bytes',
            'memory/memory.usage_in_bytes',
            'memory/memory.stat',
            'total_',
        ),
    ):
        # The files may not exist, and 'max' stands for no limit.
        with contextlib.suppress(OSError, ValueError):
            left = int(_read(cgroups, limit)) - int(_read(cgroups, usage))
            # Cached files count as used, active ones too, but the kernel can drop them.
            pattern = rf'^{prefix}(?:in)?active_file (\d+)$'
            cached = re.findall(pattern, _read(cgroups, statistics), re.MULTILINE)
            free.append(left + sum(map(int, cached)))
    return max(0, min(free))


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding='utf-8') as file:
        return file.read()


def _gigabytes(nbytes: int) -> str:
    return f'{nbytes / 1e9:,.1f} GB'
