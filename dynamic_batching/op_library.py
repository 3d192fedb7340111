"""Loads the compiled op library, once."""

import importlib.util

import tensorflow as tf


def _load():
    spec = importlib.util.find_spec('dynamic_batching._ops')
    if spec is None or spec.origin is None:
        raise ImportError(
            'The TensorFlow ops of dynamic_batching are not compiled; run `make install` or '
            '`pip install --no-build-isolation -e .` in the project folder.'
        )
    return tf.load_op_library(spec.origin)


ops = _load()
