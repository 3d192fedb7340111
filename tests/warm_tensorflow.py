"""Imports what is made with TensorFlow, as experiment.py does; see `warm_process`."""

from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import sonnet  # noqa: F401
    import tensorflow  # noqa: F401
    import tensorflow_probability  # noqa: F401
