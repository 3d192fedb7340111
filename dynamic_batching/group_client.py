"""The batcher's client of actors on another machine, whose rows arrive together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamic_batching.actor_client import ArraySpec
from dynamic_batching.client_library import (
    CLOSED,
    HANDLE,
    I32,
    INT,
    OUT_OF_ORDER,
    POINTER,
    U32,
    U64,
    ClosedError,
    Signature,
    load_functions,
)
from dynamic_batching.wire_row import headers

_CANCELLED = -4

_SIGNATURES = [
    Signature('connect', HANDLE, (INT, POINTER, U32)),
    Signature('disconnect', None, (HANDLE,)),
    Signature('row_bytes', U64, (HANDLE,)),
    Signature('action_bytes', U64, (HANDLE,)),
    Signature('check_observation', None, (HANDLE, U32)),
    Signature('check', I32, (HANDLE, POINTER, U64)),
    Signature('step', I32, (HANDLE, POINTER, U64, POINTER)),
    Signature('forget', None, (HANDLE, U32)),
    Signature('skip_silent', None, (HANDLE, U64)),
    Signature('cancel', None, (HANDLE,)),
]


class CancelledError(Exception):
    """`GroupClient.cancel` was called."""


class GroupClient:
    """Several actors' connection to the batcher, for rows that come from another machine.

    A call per step writes the rows of all actors into their unrolls and sleeps, without Python's
    lock, until all are answered. Rows are checked as those of `ActorClient` are.

    One thread at a time may call `check`, `step` and `forget`; the batcher must reset the actors
    only between these calls.

    Attributes:
      row_bytes: bytes of a row; see `dynamic_batching.wire_row`.
    """

    def __init__(
        self,
        fd: int,
        actors: Sequence[int],
        observation: Sequence[ArraySpec],
        action: ArraySpec,
    ):
        """Connects.

        Args:
          fd: file descriptor of the batcher's segment; may be closed afterwards.
          actors: indices of the actors in the batcher. Rows refer to them by their position here.
          observation: specs of the observation's arrays, in the batcher's order.
          action: spec of an action.

        Raises:
          ValueError: the segment belongs to another build of this project, lacks an actor, or was
            made for actions of another size.
        """
        library = load_functions('group_client', _SIGNATURES)
        self._disconnect = library.group_client_disconnect
        self._check = library.group_client_check
        self._step = library.group_client_step
        self._forget = library.group_client_forget
        self._skip_silent = library.group_client_skip_silent
        self._cancel = library.group_client_cancel
        self._actors = np.array(actors, np.uint32)
        self._handle: Any = library.group_client_connect(
            fd, self._actors.ctypes.data, len(self._actors)
        )
        if not self._handle:
            raise ValueError(
                f'descriptor {fd} is not a segment of this build of the batcher, or lacks one of '
                f'the actors {list(actors)}'
            )
        self.row_bytes: int = library.group_client_row_bytes(self._handle)
        self._action_shape, self._action_dtype = tuple(action.shape), np.dtype(action.dtype)
        action_bytes = library.group_client_action_bytes(self._handle) or 4
        if action_bytes != int(np.prod(self._action_shape)) * self._action_dtype.itemsize:
            raise ValueError(f'the batcher was made for actions of {action_bytes} bytes')
        for i, spec in enumerate(observation):
            if np.dtype(spec.dtype) == np.float32:
                library.group_client_check_observation(self._handle, i)

    def check(self, rows: np.ndarray) -> list[int]:
        """Checks rows before `step`, and says which actors the batcher must reset before.

        Args:
          rows: u8 `[N, row_bytes]`, contiguous.

        Returns:
          The positions of the actors whose processes have started anew.

        Raises:
          ValueError: they are not rows of different actors of this group, or the last row of one of
            them has not been answered.
        """
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self.row_bytes:
            raise ValueError(f'rows have {self.row_bytes} bytes, not {rows.dtype} {rows.shape}')
        num_first = self._check(self._handle, rows.ctypes.data, len(rows))
        if num_first < 0:
            raise ValueError(
                'the last row of an actor has not been answered'
                if num_first == OUT_OF_ORDER
                else 'the rows are not those of different actors of this group'
            )
        if num_first == 0:
            return []
        sent = headers(rows)
        return sent['actor'][sent['is_first'] != 0].tolist()

    def step(self, rows: np.ndarray) -> np.ndarray:
        """Sends rows and sleeps until all are answered.

        The first row of an actor that the batcher has reset begins an unroll with the initial
        recurrent state, so a row whose episode has not ended gets `EpisodeEnd.TERMINATED`.

        Args:
          rows: u8 `[N, row_bytes]`, accepted by `check`.

        Returns:
          The actions `[N, ...]`, in the rows' order.

        Raises:
          ClosedError: the batcher is closed.
          CancelledError: `cancel` was called. The batcher must reset the actors.
        """
        actions = np.empty((len(rows), *self._action_shape), self._action_dtype)
        failure = self._step(self._handle, rows.ctypes.data, len(rows), actions.ctypes.data)
        if failure == CLOSED:
            raise ClosedError('the batcher is closed')
        if failure == _CANCELLED:
            raise CancelledError('the group is cancelled')
        return actions

    def forget(self, position: int) -> None:
        """Forgets an actor's last action, after the batcher has reset the actor."""
        self._forget(self._handle, position)

    def skip_silent(self, seconds: float) -> None:
        """Lets no batch wait for actors that have sent nothing for this long after an action.

        Their next row ends that. Thread-safe.
        """
        self._skip_silent(self._handle, int(seconds * 1e9))

    def cancel(self) -> None:
        """Ends a `step` that waits, and every later one that would. Thread-safe."""
        self._cancel(self._handle)

    def __del__(self) -> None:
        handle: Any = getattr(self, '_handle', None)
        if handle:
            self._disconnect(handle)
