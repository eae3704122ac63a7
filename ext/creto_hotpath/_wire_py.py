"""Plain connections: the event loop's own transports. The compiled form has transports of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

P = TypeVar("P", bound=asyncio.BaseProtocol)


class Listener(Protocol):
    """Accepts on a listening socket until it is closed."""

    def close(self) -> None: ...


async def listen(factory: Callable[[], asyncio.BaseProtocol], sock: socket.socket, backlog: int) -> Listener:
    """Connects ``factory()`` to each connection that ``sock``, bound and TCP, accepts; gives what closes it again."""
    return await asyncio.get_running_loop().create_server(factory, sock=sock, backlog=backlog)


async def attach(protocol: asyncio.BaseProtocol, sock: socket.socket) -> asyncio.Transport:
    """Connects ``protocol`` to a connected TCP socket, which belongs to the transport that this gives back."""
    transport: Any
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, sock)
    made: asyncio.Transport = transport
    return made


async def dial(factory: Callable[[], P], address: str, port: int) -> tuple[asyncio.Transport, P]:
    """(transport, protocol) of a TCP connection to the IP ``address``. Raises OSError when it cannot be had."""
    return await asyncio.get_running_loop().create_connection(factory, address, port)
