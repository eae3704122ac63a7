"""A gateway on uvloop with one explicit and one reverse listener in front of one upstream, for WebSocket tests."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import uvloop
import websockets
from websockets.asyncio.server import ServerConnection, serve

from creto_hotpath.journal import Journal
from creto_hotpath.relay import Limits, Pool
from creto_proxy.accept import Gateway
from creto_proxy.audit import Recorder, outcomes
from creto_proxy.authorize import Policy
from creto_proxy.clock import SystemClock
from creto_proxy.control import Control
from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress
from creto_proxy.gate import Gates
from creto_proxy.hookspecs import Direction, MessageKind, Messages
from creto_proxy.identify import Identify, Links
from creto_proxy.meter import Meters
from creto_proxy.model import Agent, Decision, Outcome, Request, Verdict
from creto_proxy.pipeline import Pipeline
from creto_proxy.revocation import Revocations
from creto_proxy.settings import Endpoint
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.testing import make_agent
from creto_proxy.tls import CertificateAuthority
from creto_proxy.upstream import Upstreams
from creto_proxy.websocket import Watchers

from .test_pipeline import NoResolver, Open, Policies

REQUEST = (
    b"GET /up/ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
GRANTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
CLIENT: dict[str, Any] = {"compression": None, "proxy": None, "ping_interval": None}

T = TypeVar("T")
Judgement = Callable[[Direction, MessageKind, bytes], bytes | Decision]


def on_uvloop(scenario: Coroutine[Any, Any, T], patience_s: float = 90.0) -> T:
    """What ``scenario`` returns, run on the event loop that creto runs on. Whatever a callback raised fails it too."""
    failures: list[dict[str, Any]] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with asyncio.timeout(patience_s):
            return await scenario

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(main())
    assert failures == [], failures
    return result


class Watching:
    """A messages stage and its watch in one. ``seen`` are the messages it was asked about, ``opened`` the requests."""

    def __init__(self, verdict: Judgement = lambda direction, kind, data: data, *, paths: Sequence[str] = ()) -> None:
        """paths: the only ones it wants to see; none means all."""
        self._verdict = verdict
        self._paths = tuple(paths)
        self.seen: list[tuple[Direction, MessageKind, bytes]] = []
        self.opened: list[Request] = []

    def open(self, request: Request) -> Watching | None:
        self.opened.append(request)
        return self if not self._paths or request.path in self._paths else None

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision:
        self.seen.append((direction, kind, data))
        return self._verdict(direction, kind, data)


@dataclass
class Lab:
    """explicit, reverse: ports of the listeners. Requests to ``/up/...`` on the reverse one go to the upstream."""

    explicit: int
    reverse: int
    gateway: Gateway
    pipeline: Pipeline
    directory: Path

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.reverse}/up"

    @property
    def proxy(self) -> str:
        return f"http://127.0.0.1:{self.explicit}"

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.directory, "w"))

    async def recorded(self, count: int = 1) -> list[Outcome]:
        """The journal, once it holds ``count`` outcomes."""
        while len(found := self.journal()) < count:
            await asyncio.sleep(0.01)
        return found


@asynccontextmanager
async def lab(
    directory: Path,
    upstream: int,
    *stages: Messages,
    agent: Callable[[], Agent] | None = None,
    egress: Open | None = None,
    max_message_bytes: int = 1 << 20,
    deadline_s: float = 5.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Lab]:
    """tls: the context that trusts the upstream's certificate, for ``up.test``; None for a plain upstream."""
    guard = Guard(deadline_s)
    links = Links()
    links.attach("lab", agent or (lambda: make_agent("a")))
    journal = Journal(str(directory), "w", flush="record")
    pins = {"up.test": Endpoint(ipaddress.ip_address("127.0.0.1"), upstream)}
    pipeline = Pipeline(
        identify=Identify(links, ()),
        policy=Policy(cast(Any, Policies())),
        authorizers=(),
        gates=Gates([], guard),
        egress=Egress([("egress", egress or Open())], NoResolver(), pins, guard),
        upstreams=Upstreams(tls or ssl.create_default_context(), Pool(), 2.0),
        meters=Meters([], guard),
        recorder=Recorder(journal, threading.Event()),
        control=Control((), guard),
        guard=guard,
        clock=SystemClock(),
        tasks=set(),
        run="w",
        held_body_bytes=1000,
        messages=Watchers([(f"watch{n}", stage) for n, stage in enumerate(stages)], guard, max_message_bytes),
    )
    # As the service has it, but asked more often, so that a test need not wait for a second.
    object.__setattr__(pipeline, "revocations", Revocations(pipeline.identify, guard, interval_s=0.02))
    base = "https://up.test" if tls else "http://up.test"
    gateway = Gateway(
        pipeline,
        Targets([ReverseRoute.parse("up", base)]),
        Limits(stall_s=5.0),
        authority=CertificateAuthority(),
        names=lambda link, address: (),
    )
    listeners = {}
    for way in ("explicit", "reverse"):
        sock = socket.create_server(("127.0.0.1", 0))
        listeners[way] = sock.getsockname()[1]
        await gateway.listen_proxy(sock, "lab", "explicit" if way == "explicit" else "reverse")
    with guard:
        try:
            yield Lab(listeners["explicit"], listeners["reverse"], gateway, pipeline, directory)
        finally:
            await gateway.stop(1.0)
            pipeline.upstreams.close()
            journal.close()
            await asyncio.sleep(0.05)  # closed transports leave the loop one turn later


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bytes | None = b"\x01\x02\x03\x04", rsv: int = 0
) -> bytes:
    """One frame as an agent sends it; mask None as an upstream does."""
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    masked = 0x80 if mask is not None else 0
    if len(payload) < 126:
        head += bytes([masked | len(payload)])
    elif len(payload) < 65536:
        head += bytes([masked | 126]) + struct.pack("!H", len(payload))
    else:
        head += bytes([masked | 127]) + struct.pack("!Q", len(payload))
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


class Echo:
    """A ``websockets`` server that says everything back, and remembers how each connection was closed."""

    def __init__(self) -> None:
        self.closes: list[tuple[int, str]] = []
        self.closed = asyncio.Event()
        self.extensions: list[str | None] = []
        self.port = 0

    async def __call__(self, ws: ServerConnection) -> None:
        assert ws.request is not None
        self.extensions.append(ws.request.headers.get("Sec-WebSocket-Extensions"))
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                await ws.send(message)
        await ws.wait_closed()
        self.closes.append((ws.close_code or 0, ws.close_reason or ""))
        self.closed.set()


@asynccontextmanager
async def echoing(**options: Any) -> AsyncIterator[Echo]:
    echo = Echo()
    async with serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None, **options) as server:
        echo.port = server.sockets[0].getsockname()[1]
        yield echo


@asynccontextmanager
async def scripted(
    script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Port of an upstream that reads a request head and then does what the script says."""
    failures: list[BaseException] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # how a connection that was cut off looks
        except BaseException as error:
            failures.append(error)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
    assert failures == []


@asynccontextmanager
async def raw(here: Lab, first: bytes = REQUEST) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", here.reverse)
    writer.write(first)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def closing(code: int, reason: str, *, mask: bytes | None = None) -> bytes:
    return frame(8, struct.pack("!H", code) + reason.encode(), mask=mask)


def refusing(reason: str = "no_secrets", detail: str = "Not that.") -> Watching:
    """A watch that refuses messages with "secret" in them."""

    def verdict(direction: str, kind: str, data: bytes) -> bytes | Decision:
        return Decision(Verdict.DENY, reason, detail) if b"secret" in data else data

    return Watching(verdict)
