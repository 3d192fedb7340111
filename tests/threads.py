"""Threads that return the results of functions."""

import concurrent.futures
import threading


def start(function, *args):
    """Runs a function in a thread and returns its future."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
