"""Puts unrolls through `tf.distribute.experimental.rpc`, to compare it with actor jobs' sessions.

A client calls functions that the server has registered, and cannot send a graph of its own. No job
uses this; `python -m benchmarks.ingest --rounds=5` measures it, docs/scaling.md has the findings.

Arrays travel as strings of their bytes: TensorFlow packs other tensors element by element, which
carries a thirtieth as many bytes a second.
"""

import secrets
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from impala.cluster.exchange import UnrollInbox
from impala.trajectory import UnrollArray

# The limit of gRPC, which this interface cannot change.
_MESSAGE_BYTES = 4 * 2**20


class RegisteredServer:
    """Lets clients put unrolls into an inbox of this process, and do nothing else.

    Attributes:
      port: port on which it listens.
    """

    def __init__(
        self, inbox: UnrollInbox, components: Sequence[UnrollArray], host: str = 'localhost'
    ):
        """Starts the server on a free port.

        Args:
          inbox: where unrolls go.
          components: the arrays of an unroll.
          host: the interface on which it listens; `0.0.0.0` is all of them.
        """
        # Port 0 would work, but the server does not tell which port it was given.
        with socket.create_server((host, 0)) as probe:
            self.port: int = probe.getsockname()[1]

        scalars = [tf.int32, tf.string, tf.string, tf.int64, tf.int64]
        strings = [tf.string] * len(components)

        # It captures no tensor: surplus arguments of a call would take the place of captured ones.
        @tf.function(input_signature=[tf.TensorSpec([], dtype) for dtype in scalars + strings])
        def put(actor, host, level, client, sequence, *arrays):
            unroll = [
                tf.reshape(tf.io.decode_raw(array, component.dtype), component.shape)
                for array, component in zip(arrays, components, strict=True)
            ]
            return inbox.put(unroll, actor, client, sequence, host, level)

        self._server = tf.distribute.experimental.rpc.Server.create('grpc', f'{host}:{self.port}')
        self._server.register('put', put)
        self._server.start()


class RegisteredConnection:
    """A client's end of its connection to a `RegisteredServer`."""

    def __init__(self, address: str, timeout_seconds: float = 120):
        """Connects.

        Args:
          address: the server's address, `host:port`.
          timeout_seconds: seconds after which a call fails.

        Raises:
          tf.errors.OpError: no server answers.
        """
        self._client = tf.distribute.experimental.rpc.Client.create(
            # Clients of the same name and address are one resource.
            'grpc',
            address,
            name=secrets.token_hex(8),
            timeout_in_ms=round(timeout_seconds * 1000),
        )
        self._id = tf.constant(secrets.randbits(62), tf.int64)
        self._host = tf.constant(socket.gethostname())

    def put(self, unroll: Sequence[Any], actor: int, level: str, sequence: int) -> bool:
        """Sends an unroll and waits until it is in the server's inbox.

        Args:
          unroll: the arrays, with the dtypes of the server's components.
          actor: the actor's number.
          level: the level that it plays.
          sequence: greater than that of the previous unroll; unchanged if an unroll is sent again.

        Returns:
          False if the unroll was a duplicate.

        Raises:
          ValueError: the unroll is larger than a message can be.
          tf.errors.InvalidArgumentError: the server rejects the unroll.
          tf.errors.DeadlineExceededError: no answer in time; the unroll may still enter the inbox.
          tf.errors.OpError: the call failed.
        """
        strings = [np.asarray(array).tobytes() for array in unroll]
        if (size := sum(map(len, strings))) >= _MESSAGE_BYTES:
            raise ValueError(f'{size:,} bytes do not fit into a message of {_MESSAGE_BYTES:,}.')
        answer = self._client.call(
            'put',
            [
                tf.constant(actor),
                self._host,
                tf.constant(level),
                self._id,
                tf.constant(sequence, tf.int64),
                *map(tf.constant, strings),
            ],
            output_specs=tf.TensorSpec([], tf.bool),
        )
        code, message = (tensor.numpy() for tensor in answer.get_error())
        if code:
            error = tf.compat.v1.errors.exception_type_from_error_code(int(code))
            raise error(None, None, message.decode(errors='replace'))
        return bool(answer.get_value())
