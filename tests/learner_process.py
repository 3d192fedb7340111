"""A learner that serves trajectories and weights, without training."""

import remote_peer

from impala.cluster.exchange import UnrollInbox
from impala.cluster.learner_service import LearnerConnection, LearnerService

DEADLINE = 3.0  # Seconds for a call.


class Learner:
    """A learner's inbox and service, and connections to it.

    Attributes:
      reports: lines of the service.
    """

    def __init__(self, capacity, address='localhost:0', secret=None):
        self.reports = []
        self.secret = secret
        self.open(capacity, address)
        self.address = f'localhost:{self.service.port}'
        self.connections = []

    def open(self, capacity, address):
        self.inbox = UnrollInbox(capacity, remote_peer.COMPONENTS, 'version')
        self.inbox.set_latest_version(1000)
        self.service = LearnerService(
            address, self.inbox, {'torso': 'deep'}, self.secret, self.reports.append
        )

    def connect(self, address=None, weights=()):
        connection = LearnerConnection(
            address or self.address,
            remote_peer.COMPONENTS,
            weights,
            secret=self.secret,
            deadline_seconds=DEADLINE,
        )
        self.connections.append(connection)
        return connection

    def restart(self, capacity):
        """Ends the service and starts another one at the same address."""
        self.inbox.close()
        self.service.close()
        self.open(capacity, self.address)

    def close(self):
        for connection in self.connections:
            connection.close()
        self.inbox.close()
        self.service.close()
