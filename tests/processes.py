"""Checks processes and waits for them."""

import time

import psutil

TIMEOUT = 60  # Seconds; reached only when something is broken.


def wait_until(condition):
    """Calls a function until it returns a true value; returns that."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def is_running(process_id):
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def janitor(parent, folder):
    # A process that has just started may not show its command line yet.
    return wait_until(
        lambda: next((child for child in parent.children() if folder in child.cmdline()), None)
    )
