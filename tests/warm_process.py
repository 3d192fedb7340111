"""Runs programs in processes that have already imported TensorFlow, which saves seconds.

They are forks of a process that has imported TensorFlow and this project. That is safe because
TensorFlow starts its threads and devices on first use. Unlike with `python PROGRAM`, nothing is
imported for the first time, and functions registered with atexit are not called.
"""

import ctypes
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile
import unittest.mock

TESTS = pathlib.Path(__file__).resolve().parent

# Of <sched.h>.
_CLONE_NEWNET = 0x40000000


class WarmProcess:
    """A program in its own session, with the parts of `subprocess.Popen` that tests need.

    It is killed when this process exits.

    Attributes:
      pid: process id.
    """

    def __init__(self, program, flags, environment, folder, outputs, file_bytes=None, network=None):
        """Starts the program.

        Args:
          program: path of a Python program.
          flags: its command-line arguments.
          environment: all its environment variables; PYTHONPATH works as usual.
          folder: its working directory.
          outputs: paths of stdout and stderr.
          file_bytes: maximum size of a file that it writes.
          network: name of its network namespace; by default that of this process.
        """
        for path in outputs:
            pathlib.Path(path).touch()
        self._process = context().Process(
            target=_run,
            args=(
                str(program),
                list(map(str, flags)),
                dict(environment),
                str(folder),
                list(map(str, outputs)),
                file_bytes,
                network,
            ),
            daemon=True,
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Returns the exit code, or None while the program runs."""
        return self._process.exitcode

    def kill(self):
        """Kills the program if it still runs."""
        self._process.kill()

    def wait(self, timeout=None):
        """Waits for the end; returns the exit code, or minus the signal that ended the program."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return code


@functools.cache
def context():
    """Returns a multiprocessing context whose processes have imported TensorFlow."""
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(['warm_tensorflow'])
    # The fork server does not inherit this process's sys.path.
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=f'{TESTS}{os.pathsep}{TESTS.parent}'):
        multiprocessing.forkserver.ensure_running()
    return found


def _run(program, flags, environment, folder, outputs, file_bytes, network):
    # A failed preload is silent and would slow the tests down by minutes.
    assert 'warm_tensorflow' in sys.modules
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    for number, path in enumerate((os.devnull, *outputs)):
        descriptor = os.open(path, os.O_RDWR | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if network is not None:
        _enter(network)
    sys.argv = [program, *flags]
    added = environment.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:0] = [os.path.dirname(program), *filter(None, added)]
    runpy.run_path(program, run_name='__main__')


def _enter(network):
    """Moves this process, which has one thread, to a network namespace."""
    descriptor = os.open(f'/run/netns/{network}', os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f'cannot enter {network}')
    os.close(descriptor)
