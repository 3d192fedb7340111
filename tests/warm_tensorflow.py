"""Imports TensorFlow as experiment.py does, and what it imports after it; see `warm_process`.

The packages of environments are left out: `python -m impala.acting.actor` imports them.
"""

import gc

from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import sonnet  # noqa: F401
    import tensorflow  # noqa: F401
    import tensorflow_probability  # noqa: F401

import impala.cluster.actor_job
import impala.cluster.replay_job
import impala.evaluation.test_mode
import impala.training  # noqa: F401

# Else each forked process looks for garbage among these objects, and copies their memory to do so.
gc.freeze()
