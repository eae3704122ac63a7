"""What controller, workers and operators say to each other: msgpack maps, each behind its length, over a unix socket.

    u32 length of what follows, at most ``MAX_FRAME``      big-endian
    a msgpack map; "say" names the message

A worker inherits its end of a socket pair, so nobody else can speak for it. Operators connect to the control socket,
which is theirs alone (0600), and are asked for their user id all the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgpack

log = logging.getLogger("creto.control")

MAX_FRAME = 1 << 20
HEADER = struct.Struct(">I")
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7))

Message = Mapping[str, Any]


class BadFrame(ValueError):
    """What came in is no message; the text says why."""


def frame(message: Message) -> bytes:
    """The bytes of one message."""
    payload: bytes = msgpack.packb(dict(message), use_bin_type=True, unicode_errors="backslashreplace")
    return HEADER.pack(len(payload)) + payload


def take(received: bytearray) -> Message | None:
    """Removes the first whole message from ``received``; None when there is none yet. Raises BadFrame."""
    if len(received) < HEADER.size:
        return None
    (length,) = HEADER.unpack_from(received)
    if length > MAX_FRAME:
        raise BadFrame(f"a message says it is {length} bytes long")
    end = HEADER.size + length
    if len(received) < end:
        return None
    payload = bytes(received[HEADER.size : end])
    del received[:end]
    try:
        message = msgpack.unpackb(payload, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrame(f"a message is not msgpack: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("say"), str):
        raise BadFrame("a message is not a map that says something")
    return message


class Channel(asyncio.Protocol):
    """One end of a conversation. ``heard(channel, message)`` for each message, ``lost(channel)`` once at its end."""

    def __init__(
        self,
        heard: Callable[[Channel, Message], None],
        lost: Callable[[Channel], None],
        received: bytes = b"",
    ) -> None:
        """received: what another program image had read of a message that was not complete."""
        self._heard = heard
        self._lost = lost
        self._received = bytearray(received)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while self._transport is not None and (message := take(self._received)) is not None:
                self._heard(self, message)
        except BadFrame as error:
            log.error("%s; the conversation is ended", error)
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._lost(self)

    def say(self, what: str, **facts: Any) -> None:
        """Sends a message; does nothing once the other end is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame({"say": what, **facts}))

    def close(self) -> None:
        """Ends it after what has been said; ``lost`` is still called."""
        if self._transport is not None:
            self._transport.close()

    def detach(self) -> tuple[int, bytes]:
        """A descriptor of the socket, which stays open, and what was read of an incomplete message. Says no more."""
        transport, self._transport = self._transport, None
        if transport is None:
            raise BrokenPipeError("the other end is gone")
        transport.pause_reading()
        fd = os.dup(transport.get_extra_info("socket").fileno())
        transport.abort()
        return fd, bytes(self._received)


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as this user, or as root (SO_PEERCRED, unix(7))."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (os.geteuid(), 0)


def bind(path: Path) -> socket.socket:
    """A listening control socket (0600) at ``path``, whose directory must be private. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _at(path, sock.bind)
        path.chmod(0o600)
        sock.listen(16)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def call(path: Path, what: str, timeout_s: float = 10.0) -> Message:
    """Says one thing to the controller at ``path`` and gives its answer. Raises OSError and BadFrame."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        _at(path, sock.connect)
        if not same_user(sock):
            raise PermissionError(f"{path} is served by another user")
        sock.sendall(frame({"say": what}))
        received = bytearray()
        while (answer := take(received)) is None:
            if not (data := sock.recv(65536)):
                raise ConnectionResetError(f"{path}: no answer")
            received += data
        return answer


def _at(path: Path, use: Callable[[str], None]) -> None:
    """``use`` with a name for ``path`` that fits into the 108 bytes of a socket address, however deep it lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        use(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
