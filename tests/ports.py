"""Ports of this machine."""

import contextlib
import os
import socket


def free_ports(number):
    """Ports whose offsets of learners are free, too."""
    found = []
    # Ranges of their own for the processes that share the tests out: a port that one has found may
    # be free for a while yet.
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
