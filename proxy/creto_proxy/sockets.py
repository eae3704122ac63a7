"""What the listeners need of sockets and descriptors."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from typing import TypeVar, cast

from creto_hotpath import wire
from creto_hotpath.tls import Secured
from creto_proxy.model import Permit

P = TypeVar("P", bound=asyncio.BaseProtocol)

# Journal, ledger, audit log and keys must always find a descriptor, however many connections agents open.
_RESERVED_DESCRIPTORS = 128


def room() -> int:
    """Agent connections that fit into this process' descriptors, of which it takes as many as it may have: each needs
    another to its upstream, and idle ones to upstreams are kept."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, (limit - _RESERVED_DESCRIPTORS) // 3)


class Turned(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def raw_response(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """A complete HTTP/1.1 response that closes the connection."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = f"HTTP/1.1 {status} \r\n{fields}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + body


def duplicate(transport: asyncio.Transport) -> socket.socket:
    """The socket under a transport, kept open while the transport itself is let go without a FIN or RST."""
    sock = transport.get_extra_info("socket")
    copy = socket.fromfd(sock.fileno(), sock.family, sock.type)
    copy.setblocking(False)
    transport.close()
    return copy


async def accept_tls(
    protocol: asyncio.BaseProtocol, sock: socket.socket, context: ssl.SSLContext, timeout_s: float
) -> None:
    """Connects ``protocol`` to what is said under TLS on that socket. Raises OSError, ssl.SSLError among them, when the
    handshake fails or takes longer than ``timeout_s``; the socket is closed then."""
    secured = Secured(protocol, context, timeout_s=timeout_s)
    await wire.attach(secured, sock)
    await _handshake(secured)


async def dial_tls(
    protocol: P, context: ssl.SSLContext, name: str, address: str, port: int
) -> tuple[asyncio.Transport, P]:
    """Connects ``protocol`` to what ``address`` says under TLS, as ``name``. Raises OSError, ssl.SSLError and
    ssl.SSLCertVerificationError among them; how long it may take is the caller's to bound."""
    secured = Secured(protocol, context, server_hostname=name)
    await wire.dial(lambda: secured, address, port)
    await _handshake(secured)
    return cast(asyncio.Transport, secured), protocol


async def _handshake(secured: Secured) -> None:
    try:
        await secured.secured()
    except BaseException:
        secured.abort()
        raise


class Parked(asyncio.Protocol):
    """Holds a new connection still, and keeps what it said before whoever will own it is there.

    Event loops may start to read only after ``connection_made``, so pausing there is not enough.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.pause_reading()


class Dialled(Parked):
    """A connection that was made by ``permit``."""

    def __init__(self, permit: Permit) -> None:
        super().__init__()
        self.permit = permit
