"""Loads compiled libraries of TensorFlow ops."""

import importlib.util
from types import ModuleType

import tensorflow as tf


def load_ops(package: str) -> ModuleType:
    """Returns the compiled TensorFlow ops of a package, as a module of functions.

    TensorFlow loads each library only once.

    Args:
      package: package with the library as its extension module `_ops`, such as
        `'dynamic_batching'`.

    Raises:
      ImportError: the library is not compiled.
    """
    spec = importlib.util.find_spec(f'{package}._ops')
    if spec is None or spec.origin is None:
        raise ImportError(
            f'The TensorFlow ops of {package} are not compiled; run `make install` or '
            '`pip install --no-build-isolation -e .` in the project folder.'
        )
    return tf.load_op_library(spec.origin)
