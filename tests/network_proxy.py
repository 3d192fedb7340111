"""A network between jobs that can hold back, count and cut traffic."""

import contextlib
import socket
import threading


class Proxy:
    """A network between actors and learner.

    Attributes:
      address: where actors connect.
      sent: bytes that actors sent, including those held back.
    """

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.address = f'127.0.0.1:{self._listener.getsockname()[1]}'
        self.sent = 0
        self._sockets = []
        self._changed = threading.Condition()
        self._held = set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, *directions):
        """Holds back traffic 'up' to or 'down' from the learner; by default, none."""
        with self._changed:
            self._held = set(directions)
            self._changed.notify_all()

    def cut(self):
        """Breaks all open connections."""
        with self._changed:
            sockets, self._sockets = self._sockets, []
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._closed = True
        self._listener.close()
        self.cut()
        self.hold()

    def _accept(self):
        while True:
            try:
                actor = self._listener.accept()[0]
                learner = socket.create_connection(('127.0.0.1', self._port))
            except OSError:
                if self._closed:
                    return
                actor.close()
                continue
            with self._changed:
                self._sockets += [actor, learner]
            for source, target, way in ((actor, learner, 'up'), (learner, actor, 'down')):
                threading.Thread(target=self._pump, args=(source, target, way), daemon=True).start()

    def _pump(self, source, target, way):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if way == 'up':
                    self.sent += len(data)
                with self._changed:
                    self._changed.wait_for(lambda: way not in self._held)
                target.sendall(data)
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
