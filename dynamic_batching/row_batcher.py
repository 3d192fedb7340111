"""The batcher of actor processes whose policy is on another machine. Without TensorFlow."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamic_batching.activity import Activity, ActorState
from dynamic_batching.actor_client import ArraySpec
from dynamic_batching.client_library import (
    CLOSED,
    HANDLE,
    I32,
    INT,
    POINTER,
    U32,
    U64,
    ClosedError,
    Signature,
    load_functions,
)

_SIGNATURES = [
    Signature('create', HANDLE, (INT, U32, U32, POINTER, U64)),
    Signature('delete', None, (HANDLE,)),
    Signature('row_bytes', U64, (HANDLE,)),
    Signature('collect', I32, (HANDLE, U32, U64, POINTER)),
    Signature('answer', None, (HANDLE, POINTER, U32, POINTER)),
    Signature('reset', None, (HANDLE, U32)),
    Signature('close', None, (HANDLE,)),
    Signature('activity', INT, (HANDLE, POINTER, POINTER, POINTER)),
]

# Bytes of the reward, the episode's return, steps and frames, and the end.
_FIXED_FIELDS = (4, 4, 4, 4, 1)


class RowBatcher:
    """Gathers the rows of waiting actors as bytes to send, and hands back what comes in answer.

    To the actor processes it looks like `UnrollBatcher`, but it has neither unrolls nor recurrent
    states: these are where the policy is.

    `collect` and `answer` are for one thread, all other methods for any.

    Attributes:
      fd: file descriptor of the segment, for `ActorClient`.
      num_actors: number of actors.
      row_bytes: bytes of a row; see `dynamic_batching.wire_row`.
    """

    def __init__(self, num_actors: int, observation: Sequence[ArraySpec], action: ArraySpec):
        """Makes the shared memory.

        Args:
          num_actors: at least one.
          observation: specs of the observation's arrays.
          action: spec of an action.

        Raises:
          MemoryError: there is no memory for a row of each actor.
        """
        library = load_functions('row_batcher', _SIGNATURES)
        self._delete = library.row_batcher_delete
        self._collect = library.row_batcher_collect
        self._answer = library.row_batcher_answer
        self._reset = library.row_batcher_reset
        self._close = library.row_batcher_close
        self._activity = library.row_batcher_activity
        self.num_actors = num_actors
        row_bytes = np.array([*_FIXED_FIELDS, *map(_nbytes, observation)], np.uint64)
        is_scalar = (tuple(action.shape), np.dtype(action.dtype)) == ((), np.int32)
        self._action_spec = tuple(action.shape), np.dtype(action.dtype)
        self.fd = os.memfd_create('rows')
        self._handle: Any = library.row_batcher_create(
            self.fd,
            num_actors,
            len(row_bytes),
            row_bytes.ctypes.data,
            0 if is_scalar else _nbytes(action),
        )
        if not self._handle:
            raise MemoryError(f'no memory for the rows of {num_actors} actors')
        self.row_bytes: int = library.row_batcher_row_bytes(self._handle)
        self._rows = np.empty((num_actors, self.row_bytes), np.uint8)

    def collect(self, minimum: int, timeout_ms: float) -> np.ndarray:
        """Sleeps, without Python's lock, until rows wait, and returns all that do.

        Args:
          minimum: rows that must wait; proportionally fewer suffice while some actors have not
            started, have finished or are late.
          timeout_ms: milliseconds after which one row suffices. The actors that still act are then
            late, until their next rows.

        Returns:
          u8 `[N, row_bytes]`, valid until the next call.

        Raises:
          ClosedError: the batcher is closed.
        """
        count = self._collect(self._handle, minimum, int(timeout_ms * 1e6), self._rows.ctypes.data)
        if count == CLOSED:
            raise ClosedError('the batcher is closed')
        return self._rows[:count]

    def answer(self, rows: np.ndarray, actions: np.ndarray) -> None:
        """Wakes actors with their actions; skips those that were reset since `collect`.

        Args:
          rows: returned by the last `collect`.
          actions: `[N, ...]`, in the rows' order.

        Raises:
          ValueError: the actions do not fit the rows or their spec.
        """
        shape, dtype = self._action_spec
        if actions.dtype != dtype or actions.shape != (len(rows), *shape):
            raise ValueError(f'{actions.dtype} {actions.shape} are no actions of {len(rows)} rows')
        actions = np.ascontiguousarray(actions)
        self._answer(self._handle, rows.ctypes.data, len(rows), actions.ctypes.data)

    def reset_actor(self, actor: int) -> None:
        """Forgets the row of an actor, whose process must have ended."""
        self._reset(self._handle, actor)

    def activity(self) -> Activity:
        """Returns the present activity of all actors."""
        states, progress, _, closed = self._observe()
        return Activity([ActorState(state) for state in states], progress, closed)

    def answered_rows(self) -> list[int]:
        """Returns, for each actor, the rows answered since its last reset."""
        return self._observe()[2]

    def close(self) -> None:
        """Fails all waiting calls here and in the actor processes. May be called again."""
        self._close(self._handle)

    def _observe(self) -> tuple[list[int], list[int], list[int], bool]:
        states = np.empty(self.num_actors, np.uint32)
        progress, answered = np.empty((2, self.num_actors), np.int64)
        closed = self._activity(
            self._handle, states.ctypes.data, progress.ctypes.data, answered.ctypes.data
        )
        return states.tolist(), progress.tolist(), answered.tolist(), bool(closed)

    def __del__(self) -> None:
        if hasattr(self, 'fd'):
            os.close(self.fd)
        handle: Any = getattr(self, '_handle', None)
        if handle:
            self._delete(handle)


def _nbytes(spec: ArraySpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
