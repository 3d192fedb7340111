"""A test in a process of its own, beside the training: `python -m impala.evaluation.test_process`.

It reads a line of JSON from stdin, the settings of the test. Their `logdir` is a folder with a
checkpoint, in which the scores are written. The process ends with its parent, which closes stdin.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from impala.config import Config, ConfigError
from impala.errors import LevelError
from impala.runs.files import LogdirError
from impala.runs.tensorflow_start import starting_tensorflow

# Why a test failed, in its `logdir`.
FAILURE_FILE = 'failure.txt'

# Added to the niceness of the learner. Actor processes add theirs, and so do those of the test.
NICENESS = 10
# Seconds that the process gets to end its actors when its parent has ended.
_GRACE_SECONDS = 4.0


def _end_with_parent() -> None:
    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, name='parent', daemon=True).start()


def main(settings: dict[str, Any]) -> int:
    """Tests as the settings say; returns the exit code."""
    _end_with_parent()
    os.nice(NICENESS)
    with starting_tensorflow():
        import tensorflow as tf

        # The learner may need all memory of the GPUs, and all cores.
        tf.config.set_visible_devices([], 'GPU')
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    from impala.acting.actor_processes import ActorError
    from impala.evaluation.test_mode import EvaluationInterrupted, evaluate

    try:
        evaluate(Config.of(**settings))
        return 0
    except (EvaluationInterrupted, KeyboardInterrupt):
        return 1
    except (ActorError, ConfigError, LevelError, LogdirError) as error:
        failure = str(error)
    except Exception:
        failure = traceback.format_exc()
    with open(os.path.join(settings['logdir'], FAILURE_FILE), 'w', encoding='utf-8') as file:
        file.write(failure)
    return 1


if __name__ == '__main__':
    sys.exit(main(json.loads(sys.stdin.readline())))
