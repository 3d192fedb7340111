"""A learner that serves trajectories and weights, without training."""

import itertools

import remote_peer

from impala.cluster.exchange import UnrollInbox, WeightsBoard
from impala.cluster.transport import LearnerConnection

DEADLINE = 2.0  # Seconds for a call.

_names = (str(number) for number in itertools.count())


class Learner:
    """A learner's inbox and board under unique names, and connections to them."""

    def __init__(self, address, capacity):
        self.name = next(_names)
        self.inbox = UnrollInbox(capacity, remote_peer.COMPONENTS, 'version', self.name)
        self.inbox.set_latest_version(1000)
        self.board = WeightsBoard('{"torso": "deep"}', self.name)
        self.address = address
        self.connections = []

    def connect(self, address=None, weights=()):
        connection = LearnerConnection(
            address or self.address,
            remote_peer.COMPONENTS,
            weights,
            DEADLINE,
            inbox=self.name,
            board=self.name,
        )
        self.connections.append(connection)
        return connection

    def close(self):
        for connection in self.connections:
            connection.close()
        self.inbox.close()
        self.board.close()
