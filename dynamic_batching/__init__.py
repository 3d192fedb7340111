"""Dynamic batching: computes concurrent calls of a function of tensors together.

`batch_fn` and `batch_fn_with_options` turn any function of nested tensors into one whose concurrent
callers share batches. The names resolve on first use, because actor processes import
`dynamic_batching.actor_client` and must not load TensorFlow.
"""

import importlib
from typing import Any

__all__ = ['batch_fn', 'batch_fn_with_options']


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module('dynamic_batching.batcher'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
