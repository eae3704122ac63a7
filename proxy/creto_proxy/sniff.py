"""The first bytes of a connection, looked at and left there: the socket can then be spliced, intercepted or parsed."""

from __future__ import annotations

import asyncio
import socket
import struct

from creto_proxy.errors import Permanent
from creto_proxy.tls import MAX_HELLO_WIRE, Hello, parse_client_hello

PEEK_TIMEOUT_S = 3.0
# Readiness is level-triggered: half a hello would spin. The pauses grow, so that many halves do not keep creto busy.
PEEK_PAUSE_S = 0.001
PEEK_PAUSE_MAX_S = 0.1


async def peek(sock: socket.socket) -> bytes | Hello:
    """The first bytes of a connection, left in the kernel; a ``Hello`` once a whole ClientHello is there.

    Raises Permanent when nothing useful comes within ``PEEK_TIMEOUT_S`` and BadHello for broken TLS.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PEEK_TIMEOUT_S
    pause_s = PEEK_PAUSE_S
    while True:
        try:
            data = sock.recv(MAX_HELLO_WIRE, socket.MSG_PEEK)
        except BlockingIOError:
            data = b""
        else:
            if not data:
                raise Permanent("The connection was closed before it said anything.", reason="closed_early")
        hello = parse_client_hello(data)
        if hello is None:
            return data
        if isinstance(hello, Hello):
            return hello
        if loop.time() >= deadline:
            raise Permanent(
                "Nothing came that names its destination. A protocol where the server speaks first needs a rule: "
                '[egress] allow = ["tcp://host:port"].',
                reason="silent_connection",
            )
        if data:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PEEK_PAUSE_MAX_S)
        else:
            await _readable(sock, deadline - loop.time())


async def _readable(sock: socket.socket, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        async with asyncio.timeout(max(0.0, timeout_s)):
            await ready
    except TimeoutError:
        return
    finally:
        loop.remove_reader(sock)


def reset(sock: socket.socket) -> None:
    """Closes with RST, so that the agent fails at once instead of reading an empty answer.

    A socket that a transport took and closed, as after a TLS handshake that the agent broke off, is left alone.
    """
    if sock.fileno() < 0:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
