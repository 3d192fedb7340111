"""A sweep whose members are forks of this process, for tests of anything but their start.

Run by `warm_process`, this process has imported TensorFlow already; see there why forking is safe.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
import types

from impala.runs import files
from impala.tools.sweep import sweep

_locks = []


def _lock(logdir):
    _locks.append(files.lock_logdir(logdir))
    return _locks[-1]


class _Member:
    """Stands in for `subprocess.Popen`: runs a Python program in a fork of this process."""

    def __init__(self, command, stdin, stdout, stderr, start_new_session, preexec_fn):
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        self._code = None
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                preexec_fn()
                code = _run(*command[1:], output=stdout.fileno())
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self):
        if self._code is None:
            process_id, status = os.waitpid(self._pid, os.WNOHANG)
            if process_id:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number):
        os.kill(self._pid, number)


def _run(program, *flags, output):
    """Runs a program as a new process would, and returns its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, number)
    # The lock of the sweep's folder must end with the sweep.
    os.close(_locks[0])
    sys.argv = [program, *flags]
    try:
        runpy.run_path(program, run_name='__main__')
    except SystemExit as end:
        return end.code
    return 0


if __name__ == '__main__':
    sweep.lock_logdir = _lock
    # Only the sweep's: its members start their actors as usual.
    sweep.subprocess = types.SimpleNamespace(
        Popen=_Member, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    sys.exit(sweep.main(sys.argv[1:]))
