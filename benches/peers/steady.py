"""A client for long runs: a steady rate over kept-alive connections, every request with a path of its own.

    python -m peers.steady PORT CONNECTIONS RATE LOG [PREFIX]

Requests ask for ``PREFIX/<connection>/<number>``, numbers counting from 0, connections from 1 and never used again.
RATE 0 is as fast as answers come. Runs until SIGTERM and prints a line of JSON every second; when a connection ends,
LOG gets a line ``connection answered waiting time``: numbers below ``answered`` were answered, and ``waiting`` (0 or
1) more was sent and was not. Lines that begin with ``!`` name a request whose answer was not a 200, and its status.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import os
import re
import signal
import sys
import time
from typing import Any, TextIO, cast

import uvloop

TICK_S = 0.002
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CLOSE = re.compile(rb"(?i)\r\nconnection: *close\r\n")


class Steady:
    """All connections of the client, and what they have counted."""

    def __init__(self, port: int, connections: int, rate: float, log: TextIO, prefix: str) -> None:
        self.port = port
        self.connections = connections
        self.rate = rate
        self.log = log
        self.prefix = prefix
        self.numbers = itertools.count(1)
        self.idle: collections.deque[Connection] = collections.deque()
        self.open: set[Connection] = set()
        self.stopping = False
        self.answered = self.failed = self.lost = self.closed = 0
        self.taken: list[float] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.set_exception_handler(self.fail)
        for _ in range(self.connections):
            loop.create_task(self.connect())
        due, last, told = 0.0, loop.time(), loop.time()
        while not self.stopping:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            # What could not be sent for a second is dropped, so that a pause is not followed by a burst.
            due = min(due + (now - last) * self.rate, self.rate)
            last = now
            while due >= 1 and self.idle:
                self.idle.popleft().ask()
                due -= 1
            if now - told >= 1:
                told = now
                self.tell()
        deadline = loop.time() + 10
        while any(connection.waiting for connection in self.open) and loop.time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.open):
            connection.end()
        self.tell()

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.stopping:
            try:
                await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port)
                return
            except OSError:
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.stopping = True

    def fail(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A fault of this client must not look like one of what it measures."""
        loop.default_exception_handler(context)
        os._exit(1)

    def tell(self) -> None:
        taken = sorted(self.taken)
        self.taken.clear()
        p99 = taken[int(len(taken) * 0.99)] * 1e6 if taken else 0.0
        counts = {name: getattr(self, name) for name in ("answered", "failed", "lost", "closed")}
        print(json.dumps({**counts, "p99_us": round(p99)}), flush=True)


class Connection(asyncio.Protocol):
    """One connection with one request at a time on it."""

    def __init__(self, client: Steady) -> None:
        self.client = client
        self.number = next(client.numbers)
        self.asked = self.got = 0
        self.waiting = False
        self.sent_at = 0.0
        self.buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.client.open.add(self)
        self.rest()

    def rest(self) -> None:
        if self.client.rate:
            self.client.idle.append(self)
        elif not self.client.stopping:
            self.ask()

    def ask(self) -> None:
        if self not in self.client.open:
            return
        path = f"{self.client.prefix}/{self.number}/{self.asked}"
        self.asked += 1
        self.waiting = True
        self.sent_at = time.monotonic()
        self.transport.write(b"GET %b HTTP/1.1\r\nHost: up.test\r\n\r\n" % path.encode())

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self.buffer, 0, end + 2)
        if length is None or len(self.buffer) < end + 4 + int(length[1]):
            return
        client = self.client
        if self.buffer[9:12] != b"200":
            client.failed += 1
            client.log.write(f"! {self.number} {self.got} {self.buffer[9:12].decode(errors='replace')}\n")
        last = _CLOSE.search(self.buffer, 0, end + 2) is not None
        self.buffer = b""
        self.got += 1
        self.waiting = False
        client.answered += 1
        client.taken.append(time.monotonic() - self.sent_at)
        if last:
            self.transport.close()
        else:
            self.rest()

    def connection_lost(self, error: Exception | None) -> None:
        if self in self.client.open:
            # A server may close what is idle; a request that was sent has to be answered.
            self.client.lost += self.waiting
            self.client.closed += not self.waiting
            self.record()
            asyncio.get_running_loop().create_task(self.client.connect())

    def end(self) -> None:
        """Closes the connection at the end of the run."""
        self.record()
        self.transport.abort()

    def record(self) -> None:
        client = self.client
        client.open.discard(self)
        client.log.write(f"{self.number} {self.got} {self.asked - self.got} {time.time():.1f}\n")
        client.log.flush()


def main(port: str, connections: str, rate: str, log: str, prefix: str = "") -> None:
    with open(log, "w", encoding="ascii") as sink:
        client = Steady(int(port), int(connections), float(rate), sink, prefix)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(client.run())


if __name__ == "__main__":
    main(*sys.argv[1:])
