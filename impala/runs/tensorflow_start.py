"""Starts TensorFlow: quietly, with oneDNN's convolutions, and with shared GPUs."""

import contextlib
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Iterator

from impala.runs.start_progress import starting

# Loading usually takes a few seconds, which needs no report.
_LONG_SECONDS = 6.0


def _write(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, f'{line}\n'.encode())


@contextlib.contextmanager
def starting_tensorflow() -> Iterator[None]:
    """Surrounds the first import of TensorFlow and sets its environment variables.

    Variables that the user has set are unchanged.

    TF_ENABLE_ONEDNN_OPTS=1: on x86 processors without instructions for neural networks, TensorFlow
    does not use oneDNN by default, although it at least halves the time of a train step.

    TF_FORCE_GPU_ALLOW_GROWTH=true: otherwise the first process that uses a GPU takes all of its
    memory and leaves none for a test, an actor job or another run of a sweep.

    TF_CPP_MIN_LOG_LEVEL=3: hides the messages of TensorFlow's C++ code. Those that it prints before
    it reads the variable are hidden, too, and shown only if loading fails. If loading takes long,
    one line says so.

    Python collects no garbage meanwhile: searching the many objects that modules make would take a
    fifth of the time. They stay exempt from later collections.
    """
    with _without_collection(), _quietly():
        yield


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    if platform.machine() == 'x86_64':
        os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
    os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
    if 'TF_CPP_MIN_LOG_LEVEL' in os.environ:
        yield
        return
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            with starting(lambda text: _write(stderr, text), 'TensorFlow is loaded', _LONG_SECONDS):
                yield
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
