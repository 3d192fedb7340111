"""Ports of this machine."""

import contextlib
import os
import socket


def free_ports(number):
    """Returns free ports that are also free at the offsets that learners use."""
    found = []
    # Each pytest-xdist worker has its own range, because found ports stay free for a while.
    worker = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw'))
    port = 10_000 + 3_000 * (worker % 7) + os.getpid() % 900
    while len(found) < number:
        port += 1
        with contextlib.ExitStack() as stack:
            try:
                for offset in (0, 1000, 2000):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(('', port + offset))
            except OSError:
                continue
        found.append(port)
    return found
