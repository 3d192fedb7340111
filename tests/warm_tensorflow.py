"""Imports what experiment.py imports, TensorFlow first; see `warm_process`.

Packages of environments are left out, because `python -m impala.acting.actor` imports them.
"""

import gc
import os
import tempfile

from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import sonnet  # noqa: F401
    import tensorflow  # noqa: F401
    import tensorflow_probability  # noqa: F401

import impala.cluster.actor_job
import impala.cluster.replay_job
import impala.evaluation.test_mode
import impala.training  # noqa: F401
from impala.runs import learning_curve

# Matplotlib imports much, and searches its fonts, when it draws for the first time.
with tempfile.TemporaryDirectory() as _folder:
    learning_curve.draw(os.path.join(_folder, 'curve.png'), {})

# Otherwise garbage collection in each fork would visit these objects and copy their memory.
gc.freeze()
