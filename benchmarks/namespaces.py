"""Several hosts on one machine: Linux network namespaces, joined by a slow or lossy network.

A namespace has its own interfaces, routes, ports and firewall; what runs in one reaches another
over the network alone. Between them is a thread of this process instead of a kernel queue; each
host is a TUN device to it. It forwards every packet after a delay, or drops it, as `tc netem` does
in kernels that have it. The transport, TCP with its retransmissions, is the kernel's own.

Needs root, `ip` of iproute2 and /dev/net/tun.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time

# Of linux/if_tun.h.
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MAX_PACKET = 65536


class Unavailable(Exception):
    """Namespaces cannot be made here; the text says why."""


class Host:
    """A namespace with the loopback interface and one to the others.

    Attributes:
      name: as `ip netns` has it.
      address: its IPv4 address.
      prefix: arguments that, put before a command, run it there.
    """

    def __init__(self, name: str, address: str):
        """Makes the namespace.

        Args:
          name: unique on this machine; at most 15 characters.
          address: its own, of a network with 24 bits.

        Raises:
          Unavailable: it cannot be made.
        """
        self.address = address
        self.name = name
        self.prefix = ['ip', 'netns', 'exec', self.name]
        _run('ip', 'netns', 'add', self.name)
        try:
            self.tun = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack('16sH22x', name.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(self.tun, _TUNSETIFF, request)
            _run('ip', 'link', 'set', name, 'netns', self.name)
            _run('ip', '-n', self.name, 'address', 'add', f'{address}/24', 'dev', name)
            for interface in ('lo', name):
                _run('ip', '-n', self.name, 'link', 'set', interface, 'up')
        except (OSError, Unavailable) as error:
            _run('ip', 'netns', 'delete', self.name)
            raise Unavailable(f'a TUN device cannot be made: {error}') from error

    def run(self, *command: str) -> str:
        """Runs a command there to its end.

        Returns:
          Its output.

        Raises:
          Unavailable: it fails.
        """
        return _run(*self.prefix, *command)

    def close(self) -> None:
        """Removes the namespace. Processes that still run there lose their network."""
        os.close(self.tun)
        _run('ip', 'netns', 'delete', self.name)


class Network:
    """Hosts that reach each other by their addresses. A context manager.

    Attributes:
      hosts: the first is meant for the learner.
      is_cut: while it is set, all packets are lost.
      packets, lost: since the beginning.
      bytes: that were handed on, headers included.
    """

    def __init__(
        self,
        num_hosts: int,
        delay_seconds: float = 0.0,
        loss: float = 0.0,
        congestion_control: str = '',
    ):
        """Makes the hosts.

        Args:
          num_hosts: at most 254.
          delay_seconds: of every packet; a round trip takes twice as long.
          loss: probability that a packet is lost, in either direction.
          congestion_control: of TCP, as the kernel calls it; by default the machine's own.

        Raises:
          Unavailable: they cannot be made here.
        """
        self._delay = delay_seconds
        self._loss = loss
        self._dice = random.Random(1)
        self.is_cut = False
        self.packets = self.lost = self.bytes = 0
        self.hosts: list[Host] = []
        self._wake, self._wake_end = os.pipe()
        self._thread = threading.Thread(target=self._forward, name='network')
        try:
            for number in range(1, num_hosts + 1):
                self.hosts.append(Host(f'imp{os.getpid()}-{number}', f'10.77.0.{number}'))
                if congestion_control:
                    setting = f'net.ipv4.tcp_congestion_control={congestion_control}'
                    self.hosts[-1].run('sysctl', '-q', '-w', setting)
        except BaseException:
            self._close_hosts()
            raise

    def __enter__(self) -> 'Network':
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._wake_end)
        self._thread.join()
        os.close(self._wake)
        self._close_hosts()

    def _close_hosts(self) -> None:
        for host in self.hosts:
            host.close()

    def _forward(self) -> None:
        """Forwards packets between hosts."""
        tuns = {socket.inet_aton(host.address): host.tun for host in self.hosts}
        poll = select.epoll()
        poll.register(self._wake, select.EPOLLIN)
        for tun in tuns.values():
            poll.register(tun, select.EPOLLIN)
        # (time due, order of arrival, receiving host, packet).
        on_the_way: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while True:
            wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
            for source, _ in poll.poll(wait):
                if source == self._wake:
                    poll.close()
                    return
                # A limited number at a time from a host that sends many.
                for _ in range(64):
                    try:
                        packet = os.read(source, _MAX_PACKET)
                    except BlockingIOError:
                        break
                    target = tuns.get(packet[16:20])
                    if packet[0] >> 4 != 4 or target is None:
                        continue
                    self.packets += 1
                    if self.is_cut or self._dice.random() < self._loss:
                        self.lost += 1
                        continue
                    due = time.monotonic() + self._delay
                    heapq.heappush(on_the_way, (due, next(order), target, packet))
            now = time.monotonic()
            while on_the_way and on_the_way[0][0] <= now:
                _, _, target, packet = heapq.heappop(on_the_way)
                self.bytes += len(packet)
                # A host that cannot take more loses the packet, like a full queue.
                with contextlib.suppress(OSError):
                    os.write(target, packet)


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise Unavailable(f'{command[0]} is not installed') from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f'exit code {error.returncode}'
        raise Unavailable(f'`{" ".join(command)}` says: {said}') from error
    return result.stdout
