"""The actor's client of the shared-memory batcher, for processes that never load TensorFlow."""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dynamic_batching.client_library import (
    F32,
    F64,
    HANDLE,
    I32,
    INT,
    OUT_OF_ORDER,
    U32,
    U32_POINTER,
    U64,
    ClosedError,
    Signature,
    load_functions,
)

__all__ = ['ActorClient', 'ArraySpec', 'ClosedError']


class ArraySpec(Protocol):
    """Any object with a shape and the name of a NumPy dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one array, without time and batch dimensions."""

    @property
    def dtype(self) -> str:
        """Name of the dtype, for instance `'float32'`."""


_SIGNATURES = [
    Signature('connect', HANDLE, (INT, U32)),
    Signature('disconnect', None, (HANDLE,)),
    Signature('num_unrolls', U32, (HANDLE,)),
    Signature('rows', U32, (HANDLE,)),
    Signature('unroll_bytes', U64, (HANDLE,)),
    Signature('num_observations', U32, (HANDLE,)),
    Signature('observation_bytes', U64, (HANDLE, U32)),
    Signature('observation', HANDLE, (HANDLE, U32)),
    Signature('action_bytes', U64, (HANDLE,)),
    Signature('action', HANDLE, (HANDLE,)),
    Signature('is_idle', INT, (HANDLE,)),
    Signature('position', U32_POINTER, (HANDLE,)),
    Signature('check_observation', None, (HANDLE, U32)),
    Signature('non_finite_value', F32, (HANDLE, U32)),
    Signature('send', I32, (HANDLE, F64, INT, INT, INT)),
    Signature('finish', None, (HANDLE,)),
    Signature('wait', I32, (HANDLE,)),
]


class ActorClient:
    """One actor's connection to the batcher.

    Observations are copied directly into the unroll that the learner will get. Waiting for an
    action uses no CPU: the process sleeps in the kernel, and other Python threads may run.

    The reward and float32 observations are checked: non-finite values are replaced by 0, and the
    batcher discards the unroll instead of queuing it.
    """

    def __init__(
        self,
        fd: int,
        actor: int,
        observation: Sequence[ArraySpec],
        action: ArraySpec | None = None,
    ):
        """Connects.

        Args:
          fd: file descriptor of the batcher's segment; may be closed afterwards.
          actor: index of the actor.
          observation: specs of the observation's arrays, in the batcher's order.
          action: spec of an action; None for an i32 scalar.

        Raises:
          ValueError: the segment belongs to another build of this project, has no such actor, or
            was made for other observations or actions.
        """
        library = load_functions('actor_client', _SIGNATURES)
        self._disconnect = library.actor_client_disconnect
        self._send_row = library.actor_client_send
        self._wait = library.actor_client_wait
        self._finish = library.actor_client_finish
        self._is_idle = library.actor_client_is_idle
        self._non_finite_value = library.actor_client_non_finite_value
        self._handle = library.actor_client_connect(fd, actor)
        if not self._handle:
            raise ValueError(
                f'descriptor {fd} is not a segment of this build of the batcher, or has no actor '
                f'{actor}'
            )
        handle = self._handle
        rows = library.actor_client_rows(handle)
        num_unrolls = library.actor_client_num_unrolls(handle)
        unroll_bytes = library.actor_client_unroll_bytes(handle)
        sizes = [
            library.actor_client_observation_bytes(handle, i)
            for i in range(library.actor_client_num_observations(handle))
        ]
        self._specs = [(tuple(spec.shape), np.dtype(spec.dtype)) for spec in observation]
        expected = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._specs]
        if sizes != expected:
            raise ValueError(
                f'the batcher was made for observations of {sizes} bytes, not {expected}'
            )
        self._action = self._action_memory(library, action)
        self._arrays = []
        for i, (shape, dtype) in enumerate(self._specs):
            if dtype == np.float32:
                library.actor_client_check_observation(handle, i)
            memory = (ctypes.c_uint8 * (unroll_bytes * num_unrolls)).from_address(
                library.actor_client_observation(handle, i)
            )
            item_strides = np.empty(shape, dtype).strides
            self._arrays.append(
                np.ndarray(
                    (num_unrolls, rows, *shape),
                    dtype,
                    memory,
                    strides=(unroll_bytes, sizes[i], *item_strides),
                )
            )
        self._position = library.actor_client_position(handle)

    def start(self, end: int, observation: Sequence[np.ndarray]) -> dict[int, float]:
        """Sends the first row of the first episode, with reward 0.

        Args:
          end: `EpisodeEnd` of the row.
          observation: arrays with the specs' shapes and dtypes.

        Returns:
          See `send`.

        Raises:
          ClosedError: the batcher is closed.
          RuntimeError: the actor has started before and was not reset since.
          ValueError: an array does not fit its spec.
        """
        # An actor that has started may be in the middle of an unroll.
        if not self._is_idle(self._handle):
            raise RuntimeError('the actor has started before and was not reset since')
        return self._send(0.0, 0, end, observation, True)

    def send(
        self, reward: float, end: int, observation: Sequence[np.ndarray], frames: int = 1
    ) -> dict[int, float]:
        """Sends the row that the last action led to.

        Also sums up the episode's return, steps and frames, which start again after an `end` of
        TERMINATED or TRUNCATED. The return is the sum of the rewards as given, finite or not, in
        double precision.

        Args:
          reward: reward of the last action.
          end: `EpisodeEnd` of the row.
          observation: see `start`.
          frames: frames that the last action lasted.

        Returns:
          The non-finite float32 values, usually none: 0 -> the reward, i + 1 -> the first such
          value of observation i.

        Raises:
          ClosedError: the batcher is closed.
          RuntimeError: the actor has not started, or has not waited for the previous action.
          ValueError: an array does not fit its spec.
        """
        return self._send(float(reward), frames, end, observation, False)

    def begin(self, end: int, observation: Sequence[np.ndarray]) -> dict[int, float]:
        """Sends the first row of an episode after a row that was the last of the one before.

        Usually `send` does both in one row. This row has reward 0; no step led to it, so it has the
        return, steps and frames of the row before.

        Args:
          end: how the episode before ended, TERMINATED or TRUNCATED.
          observation: see `start`.

        Returns, Raises: see `send`.
        """
        if self._is_idle(self._handle):
            raise RuntimeError('the actor has not started')
        return self._send(0.0, 0, end, observation, True)

    def finish(self) -> None:
        """Ends this actor: batches then need proportionally fewer rows."""
        self._finish(self._handle)

    def wait(self) -> Any:
        """Sleeps until the last row is answered, and returns its action: an integer or an array.

        Raises:
          ClosedError: the batcher is closed.
          RuntimeError: no row was sent.
        """
        action = self._wait(self._handle)
        if action < 0:
            _raise(action, 'a row is sent before its action is waited for')
        return action if self._action is None else self._action.copy()

    def _action_memory(self, library: ctypes.CDLL, action: ArraySpec | None) -> np.ndarray | None:
        """Returns the memory to which the batcher writes actions; None for an i32 scalar."""
        shape, dtype = ((), 'int32') if action is None else (tuple(action.shape), action.dtype)
        is_scalar = shape == () and dtype == 'int32'
        expected = 0 if is_scalar else int(np.prod(shape)) * np.dtype(dtype).itemsize
        size = library.actor_client_action_bytes(self._handle)
        if size != expected:
            raise ValueError(
                f'the batcher was made for actions that are {_kind_of_action(size)}, not '
                f'{_kind_of_action(expected)}'
            )
        if is_scalar:
            return None
        address = library.actor_client_action(self._handle)
        memory = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def _send(
        self,
        reward: float,
        frames: int,
        end: int,
        observation: Sequence[np.ndarray],
        is_begin: bool,
    ) -> dict[int, float]:
        unroll, row = self._position[0], self._position[1]
        for target, array, spec in zip(self._arrays, observation, self._specs, strict=True):
            if (array.shape, array.dtype) != spec:
                raise ValueError(
                    f'an observation is {array.dtype} {list(array.shape)}, its spec says '
                    f'{spec[1]} {list(spec[0])}'
                )
            target[unroll, row] = array
        result = self._send_row(self._handle, reward, frames, end, is_begin)
        if not result:
            return {}
        if result < 0:
            _raise(result, 'start comes before the first row, and wait between two of them')
        return {
            i: self._non_finite_value(self._handle, i)
            for i in range(len(self._specs) + 1)
            if result >> i & 1
        }

    def __del__(self) -> None:
        handle: Any = getattr(self, '_handle', None)
        if handle:
            self._arrays, self._action = [], None
            self._disconnect(handle)


def _raise(failure: int, rule: str) -> None:
    if failure == OUT_OF_ORDER:
        raise RuntimeError(rule)
    raise ClosedError('the batcher is closed')


def _kind_of_action(size: int) -> str:
    return f'arrays of {size} bytes' if size else 'int32 scalars'
