"""An Internet of the tests' own: one network namespace in which every address there is belongs to the stand-ins.

``creto`` runs inside it, so an agent's connection that should have been stopped does arrive, wherever it was headed,
and is seen. It has web servers on ports 80, 8080 (plain) and 443 (TLS) of every address, and one name server on
127.0.0.1:53, whose answers a test writes; each packet is noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates

A, AAAA = 1, 28
RESOLVER = "127.0.0.1:53"
LARGE = [bytes([number]) * (1 << 20) for number in range(64)]
LARGE_SHA256 = hashlib.sha256(b"".join(LARGE)).hexdigest()
EVENTS = 5
_EDNS_SIZE = 1232
_PLAIN_PORTS, _TLS_PORT = (80, 8080), 443
_PACKET_OUTGOING, _ETH_P_ALL = 4, 3
_SOCKETS = 6

# Runs inside the namespace: makes it a place where all addresses are local, and hands out its sockets.
_HOLDER = """
import socket, sys
from pyroute2 import IPRoute
with IPRoute() as route:
    lo = route.link_lookup(ifname="lo")[0]
    route.link("set", index=lo, state="up")
    for family, every in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
        route.route("add", dst=every, oif=lo, family=family, type="local", table=255, scope=254 if family == 2 else 0)
web = [socket.create_server(("::", p), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512) for p in (80, 8080, 443)]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 53))
tcp = socket.create_server(("127.0.0.1", 53))
tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)); tap.bind(("lo", 3))
channel = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(channel, [b"up"], [s.fileno() for s in (*web, udp, tcp, tap)])
channel.recv(1)
"""


@dataclass(frozen=True)
class Packet:
    """protocol: ``"tcp"`` for the first packet of a connection, ``"udp"``, or the number of any other protocol."""

    protocol: str
    destination: str
    port: int


@dataclass(frozen=True)
class Arrived:
    """A request that reached a web server: the address it was sent to, and what it said."""

    address: str
    port: int
    method: str
    host: str
    path: str


Records = Sequence[str] | Callable[[], Sequence[str]]


@dataclass
class Internet:
    """zone: addresses by name, or what gives them anew for each question; ttl_s: of every answer."""

    holder: int
    user_namespace: bool
    ca: Path
    zone: dict[str, Records] = field(default_factory=dict)
    ttl_s: int = 60
    asked: list[tuple[str, int]] = field(default_factory=list)
    requests: list[Arrived] = field(default_factory=list)
    packets: list[Packet] = field(default_factory=list)

    def enter(self) -> list[str]:
        """The command that runs what follows it inside."""
        user = ["--user", "--preserve-credentials"] if self.user_namespace else []
        return ["nsenter", "--target", str(self.holder), *user, "--net", "--"]

    def reset(self) -> None:
        self.zone.clear()
        self.ttl_s = 60
        for noted in (self.asked, self.requests, self.packets):
            noted.clear()

    def destinations(self, protocol: str) -> set[tuple[str, int]]:
        """Where packets went that are not the questions to its name server."""
        own = (RESOLVER.partition(":")[0], 53)
        return {(p.destination, p.port) for p in self.packets if p.protocol == protocol} - {own}


@contextlib.contextmanager
def internet(directory: Path, names: Sequence[str]) -> Iterator[Internet]:
    """Runs it for as long as the block lasts. Skips the test where the machine makes no namespaces."""
    ours, theirs = socket.socketpair()
    rootless = os.geteuid() != 0
    unshare = ["unshare", *(["--user", "--map-root-user"] if rootless else []), "--net", "--"]
    with ours, contextlib.ExitStack() as stack:
        holder = subprocess.Popen(
            [*unshare, sys.executable, "-c", _HOLDER, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        theirs.close()
        stack.callback(_end, holder)
        ours.settimeout(60)
        word, fds, _, _ = socket.recv_fds(ours, 2, _SOCKETS)
        if word != b"up":
            assert holder.stderr is not None
            pytest.skip(f"this machine makes no network namespaces: {holder.stderr.read().decode().strip()[-300:]}")
        *listeners, udp, tcp, tap = [stack.enter_context(socket.socket(fileno=fd)) for fd in fds]
        ca, context = certificates(directory, list(names))
        world = Internet(holder.pid, rootless, ca)
        stack.enter_context(_serving(world, listeners, context))
        stack.enter_context(_thread(udp, lambda: _answer_datagrams(world, udp)))
        stack.enter_context(_thread(tcp, lambda: _answer_streams(world, tcp)))
        stack.enter_context(_thread(tap, lambda: _note_packets(world, tap)))
        yield world


def _end(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.communicate()


@contextlib.contextmanager
def _thread(sock: socket.socket, serve: Callable[[], None]) -> Iterator[None]:
    """Serves in a thread, a short wait at a time, until the block ends."""
    sock.settimeout(0.1)
    ending = threading.Event()

    def run() -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                serve()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(60)


# -- names


def _answer_datagrams(world: Internet, sock: socket.socket) -> None:
    query, peer = sock.recvfrom(4096)
    answer = _answer(world, query)
    if len(answer) > _EDNS_SIZE:
        header = struct.unpack_from(">HHHHHH", answer)
        answer = struct.pack(">HHHHHH", header[0], header[1] | 0x0200, 1, 0, 0, 0) + _question(query)[2]
    sock.sendto(answer, peer)


def _answer_streams(world: Internet, listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock, contextlib.suppress(OSError):
        sock.settimeout(30)
        with sock.makefile("rb") as reader:
            (length,) = struct.unpack(">H", reader.read(2))
            answer = _answer(world, reader.read(length))
        sock.sendall(struct.pack(">H", len(answer)) + answer)


def _question(query: bytes) -> tuple[str, int, bytes]:
    """(name, type, its bytes)"""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
        at += 1 + query[at]
    return ".".join(labels), struct.unpack_from(">H", query, at + 1)[0], query[12 : at + 5]


def _answer(world: Internet, query: bytes) -> bytes:
    name, kind, question = _question(query)
    world.asked.append((name, kind))
    records = world.zone.get(name)
    texts = records() if callable(records) else records or ()
    addresses = [ipaddress.ip_address(text).packed for text in texts]
    fitting = [packed for packed in addresses if len(packed) == {A: 4, AAAA: 16}.get(kind, 0)]
    body = b"".join(b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, world.ttl_s, len(p)) + p for p in fitting)
    flags = 0x8180 | (3 if records is None else 0)
    return query[:2] + struct.pack(">HHHHH", flags, 1, len(fitting), 0, 0) + question + body


# -- packets


def _note_packets(world: Internet, tap: socket.socket) -> None:
    data, (_, ethertype, kind, *_) = tap.recvfrom(128)
    if kind == _PACKET_OUTGOING:
        return  # on loopback everything is seen going out and coming in
    if ethertype == 0x0800:
        protocol, destination, start = data[9], str(ipaddress.ip_address(data[16:20])), (data[0] & 15) * 4
    elif ethertype == 0x86DD:
        protocol, destination, start = data[6], str(ipaddress.ip_address(data[24:40])), 40
    else:
        return
    port = struct.unpack_from(">H", data, start + 2)[0] if protocol in (6, 17) else 0
    if protocol == 6 and data[start + 13] & 0x12 != 0x02:
        return  # not the SYN of a new connection
    if protocol == 17 and data[start : start + 2] == b"\0\x35":
        return  # an answer of the name server
    world.packets.append(Packet({6: "tcp", 17: "udp"}.get(protocol, str(protocol)), destination, port))


# -- web


@contextlib.contextmanager
def _serving(world: Internet, listeners: Sequence[socket.socket], context: Any) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(_application(world), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        for sock in listeners:
            tls = sock.getsockname()[1] == _TLS_PORT
            await web.SockSite(runner, sock, ssl_context=context if tls else None).start()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60), "the web servers did not start"
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def _application(world: Internet) -> web.Application:
    acknowledged = asyncio.Semaphore(0)

    @web.middleware
    async def note(request: web.Request, handler: Any) -> web.StreamResponse:
        assert request.transport is not None
        address, port = request.transport.get_extra_info("sockname")[:2]
        canonical = str(ipaddress.ip_address(address.removeprefix("::ffff:")))
        world.requests.append(Arrived(canonical, port, request.method, request.host, request.path))
        answer: web.StreamResponse = await handler(request)
        return answer

    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(message.data)
            elif message.type is WSMsgType.BINARY:
                await socket.send_bytes(message.data)
        return socket

    async def events(request: web.Request) -> web.StreamResponse:
        """Each event but the first is sent when the one before it was acknowledged, over another connection."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(EVENTS):
            if number:
                await acknowledged.acquire()
            await response.write(f"data: {number}\n\n".encode())
        await response.write_eof()
        return response

    async def acknowledge(request: web.Request) -> web.Response:
        acknowledged.release()
        return web.Response()

    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = sum(map(len, LARGE))
        await response.prepare(request)
        for piece in LARGE:
            await response.write(piece)
        await response.write_eof()
        return response

    async def hello(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"hello": request.host, "path": request.path})

    app = web.Application(middlewares=[note])
    app.router.add_get("/ws", echo)
    app.router.add_get("/events", events)
    app.router.add_post("/ack", acknowledge)
    app.router.add_get("/large", large)
    app.router.add_route("*", "/{tail:.*}", hello)
    return app


def await_quiet(world: Internet, seconds: float = 0.2) -> None:
    """Returns when no packet was noted for that long, so that "nothing came" means that nothing was under way."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        if len(world.packets) != seen:
            seen, since = len(world.packets), time.monotonic()
        time.sleep(0.02)
