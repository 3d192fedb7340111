"""A port that leads to another one through a delay, as to a machine far away.

    python -m benchmarks.delayed_proxy LISTEN_PORT PORT DELAY_MS

What arrives is handed on after the delay, in each direction. It prints the bytes so far for every
line of its input. Not real: nothing is lost, and a connection may have any number of bytes on the
way, so that TCP's windows play no part; `benchmarks/network.py` has both.
"""

import collections
import selectors
import socket
import sys
import threading
import time

_PIECE_BYTES = 1 << 18


class _Way:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket):
        self.source = source
        self.target = target
        # (time due, data), in order; empty data ends the direction.
        self.pieces: collections.deque[tuple[float, memoryview]] = collections.deque()


class Proxy:
    """Accepts connections and hands on what they send.

    Attributes:
      bytes: handed on, both directions together.
    """

    def __init__(self, listen_port: int, port: int, delay_seconds: float):
        """Listens on the loopback interface.

        Args:
          listen_port: 0 selects a free one.
          port: of the loopback interface, to which connections lead.
          delay_seconds: of each piece of data.
        """
        self._port = port
        self._delay = delay_seconds
        self._listener = socket.create_server(('127.0.0.1', listen_port))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._ways: list[_Way] = []
        self.port = self._listener.getsockname()[1]
        self.bytes = 0

    def serve(self) -> None:
        """Never returns."""
        while True:
            dues = [way.pieces[0][0] for way in self._ways if way.pieces]
            wait = max(0.0, min(dues) - time.monotonic()) if dues else None
            for key, _ in self._selector.select(wait):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            now = time.monotonic()
            for way in list(self._ways):
                self._send(way, now)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(('127.0.0.1', self._port))
        except OSError:
            near.close()
            return
        for source, target in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way = _Way(source, target)
            self._ways.append(way)
            self._selector.register(source, selectors.EVENT_READ, way)

    def _receive(self, way: _Way) -> None:
        try:
            data = way.source.recv(_PIECE_BYTES)
        except OSError:
            data = b''
        way.pieces.append((time.monotonic() + self._delay, memoryview(data)))
        if not data:
            self._selector.unregister(way.source)

    def _send(self, way: _Way, now: float) -> None:
        while way.pieces and way.pieces[0][0] <= now:
            _, data = way.pieces.popleft()
            try:
                if data:
                    # Blocks if the receiver is slow, which the next pieces then are, too.
                    way.target.sendall(data)
                    self.bytes += len(data)
                else:
                    way.target.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            if not data:
                self._ways.remove(way)


def main() -> None:
    """Serves until its input ends."""
    listen_port, port, delay_ms = sys.argv[1:]
    proxy = Proxy(int(listen_port), int(port), float(delay_ms) / 1000)
    threading.Thread(target=proxy.serve, daemon=True).start()
    print(proxy.port, flush=True)
    for _ in sys.stdin:
        print(proxy.bytes, flush=True)


if __name__ == '__main__':
    main()
