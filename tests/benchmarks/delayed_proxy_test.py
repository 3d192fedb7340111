"""Tests of benchmarks/delayed_proxy.py with a server that echoes."""

import socket
import subprocess
import sys
import threading
import time

DELAY_MS = 100


def test_data_arrives_unchanged_after_the_delay():
    sent = bytes(range(256)) * 8000
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def echo():
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        echoing = threading.Thread(target=echo)
        echoing.start()
        port = str(listener.getsockname()[1])
        with subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.delayed_proxy', '0', port, str(DELAY_MS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as proxy:
            address = ('127.0.0.1', int(proxy.stdout.readline()))
            with socket.create_connection(address) as connection:
                began = time.monotonic()
                connection.sendall(b'x')
                assert connection.recv(1) == b'x'
                assert time.monotonic() - began >= 2 * DELAY_MS / 1000
                writing = threading.Thread(target=connection.sendall, args=(sent,))
                writing.start()
                received = b''
                while len(received) < len(sent):
                    received += connection.recv(1 << 16)
                writing.join()
                assert received == sent
                # The end travels, too.
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b''
            print(file=proxy.stdin, flush=True)
            assert int(proxy.stdout.readline()) == 2 * (len(sent) + 1)
            proxy.stdin.close()
        echoing.join()
