"""How TensorFlow is started: quietly, with oneDNN's convolutions, and sharing GPUs."""

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator

from impala.runs.start_progress import starting

# Loading usually takes a few seconds, which nobody need be told of.
_LONG_SECONDS = 6.0


def _write(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, f'{line}\n'.encode())


@contextlib.contextmanager
def starting_tensorflow() -> Iterator[None]:
    """Surrounds the first import of TensorFlow, which reads environment variables then or later.

    TF_ENABLE_ONEDNN_OPTS: on x86 processors TensorFlow uses oneDNN unasked only with instructions
    made for neural networks. Without them, too, oneDNN takes half the time or less for a train
    step. Whoever sets the variable decides.

    TF_FORCE_GPU_ALLOW_GROWTH: the first process that uses a GPU takes all of its memory otherwise,
    and a test, a sweep's other runs or an actor job beside it would get none. Whoever sets the
    variable decides.

    TF_CPP_MIN_LOG_LEVEL: what TensorFlow's C++ code says before it looks at that is kept off the
    terminal, too. Who sets that variable gets to see it all, and so does everybody if loading
    fails. What goes to the terminal if it takes long is one line that says so.
    """
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
