"""A name server of the tests' own, on real loopback sockets, that also knows how to misbehave."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from creto_proxy.settings import Endpoint

from ..ports import free_port

A, CNAME, AAAA = 1, 5, 28


def wire_name(name: str) -> bytes:
    return b"".join(bytes((len(part),)) + part.encode() for part in name.split(".") if part) + b"\0"


def question(name: str, kind: int = A, *, ident: int = 7, flags: int = 0x0100, edns: int | None = None) -> bytes:
    """A client's query for ``name``, its letters as given."""
    extra = b"" if edns is None else b"\0" + struct.pack(">HHIH", 41, edns, 0, 0)
    head = struct.pack(">HHHHHH", ident, flags, 1, 0, 0, 1 if extra else 0)
    return head + wire_name(name) + struct.pack(">HH", kind, 1) + extra


def record(owner: str, kind: int, ttl: int, value: str) -> bytes:
    data = wire_name(value) if kind == CNAME else ipaddress.ip_address(value).packed
    return wire_name(owner) + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data


@dataclass(frozen=True)
class Reply:
    """What a client can read off an answer."""

    ident: int
    rcode: int
    truncated: bool
    question: bytes
    addresses: list[str]
    ttls: list[int]


def read_reply(data: bytes) -> Reply:
    ident, flags, questions, answers, _, _ = struct.unpack_from(">HHHHHH", data)
    at = 12
    if questions:
        while data[at]:
            at += 1 + data[at]
        at += 5
    asked = data[12:at]
    addresses, ttls = [], []
    for _ in range(answers):
        assert data[at : at + 2] == b"\xc0\x0c"
        _, _, ttl, length = struct.unpack_from(">HHIH", data, at + 2)
        addresses.append(str(ipaddress.ip_address(data[at + 12 : at + 12 + length])))
        ttls.append(ttl)
        at += 12 + length
    return Reply(ident, flags & 0xF, bool(flags & 0x200), asked, addresses, ttls)


Zone = Mapping[tuple[str, int], list[tuple[str, int, int, str]]]


@dataclass
class Upstream:
    """zone: (name, type) -> records (owner, type, ttl, value). ``asked`` lists every query that arrived."""

    endpoint: Endpoint
    zone: dict[tuple[str, int], list[tuple[str, int, int, str]]]
    asked: list[tuple[str, int]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    idents: list[int] = field(default_factory=list)
    over_tcp: int = 0
    rcode: int = 0
    silent: bool = False
    truncate: bool = False
    # May turn an answer into the datagrams that are sent instead.
    tamper: Callable[[bytes], list[bytes]] | None = None

    def answer(self, data: bytes, *, tcp: bool) -> bytes:
        at, labels = 12, []
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode().lower())
            at += 1 + data[at]
        kind = struct.unpack_from(">H", data, at + 1)[0]
        name = ".".join(labels)
        self.asked.append((name, kind))
        self.idents.append(struct.unpack_from(">H", data)[0])
        rows = self.zone.get((name, kind))
        known = any(owner == name for owner, _ in self.zone)
        rcode = self.rcode or (0 if rows is not None or known else 3)
        rows = [] if rows is None or rcode else rows
        if self.truncate and not tcp:
            return data[:2] + struct.pack(">HHHHH", 0x8380, 1, 0, 0, 0) + data[12 : at + 5]
        body = b"".join(record(*row) for row in rows)
        return data[:2] + struct.pack(">HHHHH", 0x8180 | rcode, 1, len(rows), 0, 0) + data[12 : at + 5] + body


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = self._upstream.answer(data, tcp=False)
        self._upstream.sources.append(addr[1])
        if self._upstream.silent:
            return
        for part in self._upstream.tamper(reply) if self._upstream.tamper else [reply]:
            self._transport.sendto(part, addr)


@asynccontextmanager
async def name_server(zone: Zone | None = None) -> AsyncIterator[Upstream]:
    """Serves ``zone`` over UDP and TCP on one free port of 127.0.0.1."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(Endpoint(ipaddress.IPv4Address("127.0.0.1"), 0), dict(zone or {}))

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        reply = upstream.answer(await reader.readexactly(length), tcp=True)
        upstream.over_tcp += 1
        writer.write(struct.pack(">H", len(reply)) + reply)
        await writer.drain()
        writer.close()

    port = free_port()  # free for datagrams too
    server = await asyncio.start_server(stream, "127.0.0.1", port)
    transport, _ = await loop.create_datagram_endpoint(lambda: _Udp(upstream), local_addr=("127.0.0.1", port))
    upstream.endpoint = Endpoint(ipaddress.IPv4Address("127.0.0.1"), port)
    try:
        yield upstream
    finally:
        transport.close()
        server.close()
        await server.wait_closed()
