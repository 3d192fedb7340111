"""Runs programs in processes that have imported TensorFlow, which costs seconds of a processor.

They are forked from one that has imported it and this project, and TensorFlow starts its
threads and devices only when it is used. What is not as after `python PROGRAM`: nothing is imported
for the first time, and functions registered with atexit are not called.
"""

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


class WarmProcess:
    """A program, as far as tests need `subprocess.Popen` for it; in a session of its own.

    When this process exits it is ended, if it has not been.

    Attributes:
      pid: the process's number.
    """

    def __init__(self, program, flags, environment, folder, outputs, file_bytes=None):
        """Starts it.

        Args:
          program: path of a Python program.
          flags: what follows it on the command line.
          environment: all variables, by name; of PYTHONPATH modules are found as usual.
          folder: it begins in.
          outputs: paths of stdout and stderr.
          file_bytes: that a file of it may have, at most.
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
            ),
            daemon=True,
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Returns the exit code, or None as long as there is none."""
        return self._process.exitcode

    def kill(self):
        """Ends it, if it has not ended."""
        self._process.kill()

    def wait(self, timeout=None):
        """Waits for the end; returns the exit code, minus the signal's number if one ended it."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return code


@functools.cache
def context():
    """Returns multiprocessing's context of processes that are forked from such a one."""
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(['warm_tensorflow'])
    # That process does not look where this one finds its modules.
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=f'{TESTS}{os.pathsep}{TESTS.parent}'):
        multiprocessing.forkserver.ensure_running()
    return found


def _run(program, flags, environment, folder, outputs, file_bytes):
    # A server that could not import it would say nothing, and tests would take minutes longer.
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
    sys.argv = [program, *flags]
    added = environment.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:0] = [os.path.dirname(program), *filter(None, added)]
    runpy.run_path(program, run_name='__main__')
