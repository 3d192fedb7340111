"""Imports what is made with TensorFlow, as experiment.py does; see `warm_process`."""

from impala.quiet_start import quiet_tensorflow

with quiet_tensorflow():
    import sonnet  # noqa: F401
    import tensorflow  # noqa: F401
    import tensorflow_probability  # noqa: F401
