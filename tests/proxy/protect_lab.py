"""A gateway on loopback whose limits a test chooses, and upstreams that behave as they are told."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from creto_hotpath.journal import Journal
from creto_hotpath.relay import Limits, Pool
from creto_platform.authz import Watch
from creto_proxy.accept import Gateway
from creto_proxy.audit import Recorder, outcomes
from creto_proxy.authorize import Policy
from creto_proxy.clock import SystemClock
from creto_proxy.control import Control
from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress
from creto_proxy.gate import Gates
from creto_proxy.identify import Identify, Links
from creto_proxy.meter import Meters
from creto_proxy.model import Address, Outcome
from creto_proxy.pipeline import Pipeline
from creto_proxy.protect import Protection
from creto_proxy.protect.breaker import Health
from creto_proxy.target import Targets
from creto_proxy.testing import make_agent
from creto_proxy.tls import CertificateAuthority
from creto_proxy.upstream import Dialling, Upstreams

from .test_pipeline import Open, Policies

LOOPBACK = ipaddress.ip_address("127.0.0.1")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Rules(Policies):
    """One rule per host, and nothing to look for inside requests."""

    def watch(self, host: str) -> Watch:
        return Watch()


class Moved:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Names:
    """A resolver that knows what it was told, at once."""

    def __init__(self, **zone: Sequence[str]) -> None:
        self.zone = {name.replace("_", "."): [ipaddress.ip_address(a) for a in known] for name, known in zone.items()}

    def cached(self, name: str) -> Sequence[Address] | None:
        return self.zone.get(name, [LOOPBACK])

    async def resolve(self, name: str) -> Sequence[Address]:
        return self.zone.get(name, [LOOPBACK])


@dataclass
class Answer:
    """status 0: the connection was cut off without one."""

    status: int
    fields: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def reason(self) -> str:
        return str(json.loads(self.body)["reason"])


async def answer_of(reader: asyncio.StreamReader) -> Answer:
    """The next final answer, in whole; what is cut off has status 0."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        body = await reader.readexactly(int(fields.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0)
    status = int(head[0].split()[1])
    return await answer_of(reader) if status < 200 else Answer(status, fields, body)


@dataclass
class Lab:
    port: int
    directory: Path
    pipeline: Pipeline
    gateway: Gateway

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, raw: bytes) -> Answer:
        """One request on a connection of its own."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            return await asyncio.wait_for(answer_of(reader), 60)
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass

    async def get(self, port: int, host: str = "up.test", path: str = "/") -> Answer:
        return await self.send(f"GET http://{host}:{port}{path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.directory, "w"))


def post(port: int, host: str, framing: str, body: bytes = b"") -> bytes:
    return f"POST http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\n{framing}\r\n\r\n".encode() + body


@asynccontextmanager
async def lab(tmp_path: Path, **parts: Any) -> AsyncIterator[Lab]:
    """parts: health, dialling, budget, protection, limits, resolver, gate, authorizers, held_body_bytes."""
    guard = Guard(5.0)
    links = Links()
    links.attach("lab", lambda: make_agent("a"))
    journal = Journal(str(tmp_path), "w", flush="record")
    gate = parts.get("gate")
    context = parts.get("context") or ssl.create_default_context()
    pipeline = Pipeline(
        identify=Identify(links, ()),
        policy=Policy(Rules(held_test="oversight")),
        authorizers=tuple(parts.get("authorizers", ())),
        gates=Gates([("gate", gate)] if gate else [], guard),
        egress=Egress([("egress", Open())], parts.get("resolver", Names()), {}, guard),
        upstreams=Upstreams(
            context,
            Pool(),
            parts.get("dialling", Dialling(5.0, 2.0, retries=0)),
            health=parts.get("health", Health()),
            budget=parts.get("budget"),
        ),
        meters=Meters([], guard),
        recorder=Recorder(journal, threading.Event()),
        control=Control((), guard),
        guard=guard,
        clock=SystemClock(),
        tasks=set(),
        run="w",
        held_body_bytes=parts.get("held_body_bytes", 1000),
        protection=parts.get("protection", Protection()),
    )
    gateway = Gateway(
        pipeline,
        Targets(),
        parts.get("limits", Limits()),
        authority=CertificateAuthority(),
        names=lambda link, address: (),
        capacity=parts.get("capacity"),
    )
    sock = socket.create_server(("127.0.0.1", 0))
    await gateway.listen_proxy(sock, "lab", "explicit")
    pipeline.protection.load.start()
    if pipeline.protection.pace is not None:
        pipeline.protection.pace.start(gateway.open)
    with guard:
        try:
            yield Lab(sock.getsockname()[1], tmp_path, pipeline, gateway)
        finally:
            pipeline.protection.load.stop()
            if pipeline.protection.pace is not None:
                pipeline.protection.pace.stop()
            await gateway.stop(0.0)
            pipeline.upstreams.close()
            journal.close()
            await asyncio.sleep(0.05)  # closed transports leave the loop one turn later


@dataclass
class Server:
    """port; connections and requests: how many came. hold: answers wait for it."""

    port: int
    connections: int = 0
    requests: int = 0
    hold: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def server(
    answer: bytes | Serve = OK, *, address: str = "127.0.0.1", port: int = 0, held: bool = False
) -> AsyncIterator[Server]:
    """answer: what each request gets, or what is done with each connection."""
    here = Server(port)
    if not held:
        here.hold.set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.connections += 1
        try:
            if callable(answer):
                await answer(reader, writer)
                return
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                here.requests += 1
                length = next(
                    (int(each[15:]) for each in head.split(b"\r\n") if each.lower().startswith(b"content-length:")), 0
                )
                await reader.readexactly(length)
                await here.hold.wait()
                if not answer:
                    return
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, address, port)
    here.port = listening.sockets[0].getsockname()[1]
    try:
        yield here
    finally:
        here.hold.set()
        listening.close()
        await listening.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    """Waits, at most a minute, for ``condition``."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
