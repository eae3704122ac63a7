"""Clients that a proxy has to bear: some send a request head one byte a second, some hardly read their answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

from peers.programs import NAME, Peer

HEADS = 8
READERS = 4
BYTE_EVERY_S = 1.0
READ_BYTES = 4096
READ_EVERY_S = 0.1
# A head may take 30 s by default from when a worker accepts the connection, for which one whose worker was killed waits
# until there is another; a cut is noticed with the next byte.
CUT_WITHIN_S = 60.0


class SlowClients:
    """Runs until ``stop``; each client begins again when it was cut off or done."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._cut: list[float] = []
        self._read = self._answers = 0
        behaviours = [self._send_slowly] * HEADS + [self._read_slowly] * READERS
        self._threads = [threading.Thread(target=self._again, args=(each,), daemon=True) for each in behaviours]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)

    def result(self) -> dict[str, Any]:
        longest = max(self._cut, default=0.0)
        return {
            "heads_cut": len(self._cut),
            "longest_head_s": round(longest, 1),
            "stuck": sum(each > CUT_WITHIN_S for each in self._cut),
            "slow_bytes_read": self._read,
            "slow_answers": self._answers,
        }

    def _again(self, behaviour: Any) -> None:
        while not self._end.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._peer.port), 10) as sock:
                behaviour(sock)
            self._end.wait(0.5)

    def _send_slowly(self, sock: socket.socket) -> None:
        begun = time.monotonic()
        head = f"GET {self._peer.prefix}/slow HTTP/1.1\r\nHost: {NAME}\r\nX-Padding: {'x' * 400}\r\n\r\n".encode()
        sock.settimeout(BYTE_EVERY_S)
        for byte in head:
            try:
                sock.sendall(bytes([byte]))
                gone = sock.recv(65536)
            except TimeoutError:
                gone = None
            except OSError:
                gone = b""
            if gone is not None or self._end.is_set():
                break
        if not self._end.is_set():
            with self._lock:
                self._cut.append(time.monotonic() - begun)

    def _read_slowly(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(f"GET {self._peer.prefix}/files/large HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
        while not self._end.wait(READ_EVERY_S):
            received = len(sock.recv(READ_BYTES))
            with self._lock:
                self._read += received
            if not received:
                break
        with self._lock:
            self._answers += 1
