"""Loads the compiled library for processes that never load TensorFlow."""

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

HANDLE, I32, U32, U64, F32, F64 = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_float,
    ctypes.c_double,
)
INT, POINTER = ctypes.c_int, ctypes.c_void_p
U32_POINTER = ctypes.POINTER(ctypes.c_uint32)

# Returned by the library instead of an action or a count.
CLOSED, OUT_OF_ORDER = -1, -2


class ClosedError(Exception):
    """The batcher is closed and gives no more actions."""


class Signature(NamedTuple):
    """A function of the library: its name without the prefix, its result, its arguments."""

    name: str
    result: Any
    arguments: tuple[Any, ...]


def load_functions(prefix: str, signatures: Sequence[Signature]) -> ctypes.CDLL:
    """Returns the library, with the types of the functions of one of its parts declared.

    Args:
      prefix: of the functions' names, for instance `'actor_client'`.
      signatures: of the functions.

    Raises:
      ImportError: the library is not compiled.
    """
    spec = importlib.util.find_spec('dynamic_batching._actor_client')
    if spec is None or spec.origin is None:
        raise ImportError(
            'The actor client of dynamic_batching is not compiled; run `make install` or '
            '`pip install --no-build-isolation -e .` in the project folder.'
        )
    library = ctypes.CDLL(spec.origin)
    for name, result, arguments in signatures:
        function = getattr(library, f'{prefix}_{name}')
        function.restype, function.argtypes = result, arguments
    return library
