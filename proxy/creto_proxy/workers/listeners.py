"""The listening sockets, all of them the controller's for its whole life: one per worker and listener.

With SO_REUSEPORT the kernel spreads new connections over the sockets of a listener (socket(7)), and each has a queue of
its own. A worker only borrows its socket, so what waits in the queue of one that died waits for its successor, and what
is in the queue of one that is replaced is served by the next. A socket that was once opened is never closed while its
listener is configured: with fewer workers than before, a worker gets several.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from creto_proxy.accept import BACKLOG
from creto_proxy.config import Config
from creto_proxy.errors import ConfigError
from creto_proxy.settings import Endpoint

WAYS = ("explicit", "reverse")
# How long an address may still be held by the workers of a controller that was killed.
_HELD_S = 1.0


@dataclass(slots=True)
class Listener:
    """A configured endpoint and its sockets. key: way and endpoint as configured."""

    way: str
    key: str
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it really listens."""
        host, port = self.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def of_slot(self, slot: int, slots: int) -> list[socket.socket]:
        return self.sockets[slot::slots]


def open_listeners(config: Config, inherited: Mapping[str, list[int]] | None = None) -> list[Listener]:
    """Each configured listener with a socket for every worker. inherited: descriptors by ``Listener.key``, which stay
    the caller's.

    Raises ConfigError naming every one that cannot be had, or that others than this machine's programs could reach:
    who connects to a listener is its agent.
    """
    problems: list[str] = []
    listeners: list[Listener] = []
    inherited = inherited or {}
    for way, endpoint in _configured(config):
        if not endpoint.address.is_loopback:
            problems.append(f"listen.{way}: {endpoint} can be reached from elsewhere; use a loopback address")
            continue
        listener = Listener(way, f"{way} {endpoint}")
        listener.sockets += [socket.socket(fileno=os.dup(fd)) for fd in inherited.get(listener.key, ())]
        listeners.append(listener)
        try:
            _fill(listener, endpoint, config.sidecar.slots)
        except OSError as error:
            problems.append(f"listen.{way}: cannot listen on {endpoint}: {os.strerror(error.errno or 0).lower()}")
    if problems:
        close(listeners)
        raise ConfigError(problems)
    return listeners


def close(listeners: list[Listener]) -> None:
    for listener in listeners:
        for sock in listener.sockets:
            sock.close()


def _configured(config: Config) -> Iterator[tuple[str, Endpoint]]:
    for way in WAYS:
        endpoint = getattr(config.listen, way)
        if endpoint is not None:
            yield way, endpoint


def _fill(listener: Listener, endpoint: Endpoint, slots: int) -> None:
    """Opens what is missing. Those of the first start listen at once; those that a reload adds begin when their
    workers do, because connections would wait in vain in front of workers that cannot start."""
    first = not listener.sockets
    port = endpoint.port
    if not first:
        port = listener.sockets[0].getsockname()[1]
    elif port:
        _require_free(endpoint)
    while len(listener.sockets) < slots:
        sock = _bound(endpoint, port, shared=True)
        listener.sockets.append(sock)
        port = sock.getsockname()[1]
        if first:
            sock.listen(BACKLOG)


def _require_free(endpoint: Endpoint) -> None:
    """Raises OSError when somebody listens there: SO_REUSEPORT alone would let two cretos share one address."""
    until = time.monotonic() + _HELD_S
    while True:
        try:
            with _bound(endpoint, endpoint.port, shared=False) as probe:
                probe.listen(1)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
        time.sleep(0.05)


def _bound(endpoint: Endpoint, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((str(endpoint.address), port))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
