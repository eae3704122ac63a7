"""A gateway on uvloop, in a thread of its own, so that programs and blocking clients can be pointed at it.

``explicit`` and ``reverse`` are its listeners; ``tls`` is a port that reaches an intercepted ``localhost``: what
connects there is tunnelled through the explicit listener, as a client that was told of the proxy would do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

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
from creto_proxy.h2.agents import Bounds
from creto_proxy.h2.origins import Origins
from creto_proxy.identify import Identify, Links
from creto_proxy.meter import Meters
from creto_proxy.model import Outcome
from creto_proxy.pipeline import Pipeline
from creto_proxy.protect import Protection
from creto_proxy.settings import Endpoint
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.testing import make_agent
from creto_proxy.tls import CertificateAuthority, upstream_context
from creto_proxy.upstream import Upstreams

from .test_pipeline import NoResolver, Open, Policies

T = TypeVar("T")


class Rules(Policies):
    """One rule per host, and nothing to look for inside requests."""

    def watch(self, host: str) -> Watch:
        return Watch()


HOSTS = ("good.test", "bad.test", "denied.test", "held.test", "localhost")


@dataclass
class Lab:
    loop: asyncio.AbstractEventLoop
    directory: Path
    gateway: Gateway
    ca: Path
    explicit: int = 0
    reverse: int = 0
    tls: int = 0
    forwarder: asyncio.Server | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)

    def on_loop(self, work: Coroutine[Any, Any, T], patience_s: float = 90.0) -> T:
        """What ``work`` returns, run beside the gateway."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patience_s)

    @property
    def proxy(self) -> str:
        return f"http://127.0.0.1:{self.explicit}"

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.directory, "w"))

    def recorded(self, count: int = 1) -> list[Outcome]:
        """The journal, once it holds ``count`` outcomes."""
        waiting = threading.Event()
        for _ in range(6000):
            if len(found := self.journal()) >= count:
                return found
            waiting.wait(0.01)
        raise AssertionError(f"{len(found)} outcomes instead of {count}: {found}")


def framings() -> dict[str, Any]:
    """The session classes of both framings, as far as they are built."""
    found = {"h2": import_module("creto_hotpath._h2_py").Session}
    if find_spec("creto_hotpath._h2_c") is not None:
        found["nghttp2"] = import_module("creto_hotpath._h2_c").Session
    return found


@contextlib.contextmanager
def framed_by(name: str) -> Iterator[None]:
    """Has both sides of creto use that framing. Skips where it is not built."""
    session = framings().get(name)
    if session is None:
        pytest.skip(f"creto was built without {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("creto_proxy.h2.agents.Session", session)
        patch.setattr("creto_proxy.h2.origins.Session", session)
        yield


@contextlib.contextmanager
def h2_lab(
    directory: Path,
    origin: int = 1,
    *,
    bounds: Bounds | None = None,
    limits: Limits | None = None,
    origin_ca: Path | None = None,
    prior: bool = False,
    **parts: Any,
) -> Iterator[Lab]:
    """origin: the port of the server that every name stands for. prior: it is known to speak HTTP/2."""
    journal = Journal(str(directory), "w", flush="record")
    guard = Guard(5.0)
    links = Links()
    links.attach("lab", lambda: make_agent("a"))
    authority = CertificateAuthority()
    ca = authority.write(directory)
    loop = uvloop.new_event_loop()
    context = upstream_context(origin_ca)
    negotiating = upstream_context(origin_ca, http2=True)
    known: list[tuple[str, int]] = [(name, 80) for name in HOSTS] if prior else []

    async def start() -> Lab:
        pins: Mapping[str, Endpoint] = {name: Endpoint(ipaddress.ip_address("127.0.0.1"), origin) for name in HOSTS}
        pipeline = Pipeline(
            identify=Identify(links, ()),
            policy=Policy(parts.get("policies", Rules(denied_test="deny", held_test="oversight"))),
            authorizers=tuple(parts.get("authorizers", ())),
            gates=Gates([("gate", gate)] if (gate := parts.get("gate")) else [], guard),
            egress=Egress([("egress", parts.get("egress", Open()))], NoResolver(), pins, guard),
            upstreams=Upstreams(context, Pool(), 2.0, origins=Origins(known), negotiating=negotiating),
            meters=Meters([], guard),
            recorder=Recorder(journal, threading.Event()),
            control=Control((), guard),
            guard=guard,
            clock=SystemClock(),
            tasks=set(),
            run="w",
            held_body_bytes=parts.get("held_body_bytes", 100_000),
            protection=parts.get("protection", Protection()),
            messages=parts.get("messages"),
        )
        scheme = parts.get("scheme", "http")
        gateway = Gateway(
            pipeline,
            Targets([ReverseRoute.parse(name.partition(".")[0], f"{scheme}://{name}") for name in HOSTS]),
            limits or Limits(),
            authority=authority,
            names=lambda link, address: (),
            http2=bounds or Bounds(),
        )
        lab = Lab(loop, directory, gateway, ca)
        loop.set_exception_handler(lambda _, trouble: lab.failures.append(trouble))
        for way in ("explicit", "reverse"):
            sock = socket.create_server(("127.0.0.1", 0))
            setattr(lab, way, sock.getsockname()[1])
            await gateway.listen_proxy(sock, "lab", "explicit" if way == "explicit" else "reverse")
        lab.forwarder = await _forwarder(lab.explicit)
        lab.tls = lab.forwarder.sockets[0].getsockname()[1]
        return lab

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    lab = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield lab
    finally:

        async def stop() -> None:
            if lab.forwarder is not None:
                lab.forwarder.close()
            await lab.gateway.stop(1.0)
            lab.gateway.pipeline.upstreams.close()
            await asyncio.sleep(0.05)  # closed transports leave the loop one turn later
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        journal.close()
    assert lab.failures == [], lab.failures


async def _forwarder(explicit: int) -> asyncio.Server:
    """A listener whose connections are tunnelled to ``localhost`` at that port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the latter is uvloop's word for a closed transport
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        back, forth = await asyncio.open_connection("127.0.0.1", explicit)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            forth.write(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
            await back.readuntil(b"\r\n\r\n")
            await asyncio.gather(pump(reader, forth), pump(back, writer))
        writer.close()
        forth.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server


@contextlib.contextmanager
def http1_origin(body: bytes = b"ok", tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """(port, requests) of an HTTP/1.1 server that answers everything with ``body``."""
    seen: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def talk(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain if tls is None else tls.wrap_socket(plain, server_side=True) as sock:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    if not (more := sock.recv(65536)):
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                content, data = _content(sock, head.lower(), data)
                seen.append(head + b"\r\n\r\n" + content)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = server.accept()
                threading.Thread(target=talk, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1], seen
    finally:
        server.close()


def _content(sock: socket.socket, head: bytes, data: bytes) -> tuple[bytes, bytes]:
    """(body as sent, bytes after it). Raises OSError when it ends early."""

    def more() -> bytes:
        if not (received := sock.recv(65536)):
            raise ConnectionError("cut off")
        return received

    if b"transfer-encoding: chunked" in head:
        while not data.endswith(b"0\r\n\r\n"):
            data += more()
        return data, b""
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")), 0)
    while len(data) < length:
        data += more()
    return data[:length], data[length:]


def tls_client(ca: Path, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(list(protocols))
    return context
