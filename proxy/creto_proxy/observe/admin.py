"""The admin listener: health, metrics and status for operators and monitoring, never for agents.

A listener of its own, on loopback, that only answers GET and changes nothing. It is not a way to the network, and no
request of an agent comes here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import web

from creto_hotpath.http1 import BadMessage, split_authority
from creto_proxy.errors import ConfigError
from creto_proxy.observe.scrape import OPENMETRICS, TEXT, Scrape
from creto_proxy.settings import Endpoint
from creto_proxy.workers.status import NodeStatus

_BACKLOG = 64
# Whoever is on this machine can connect. Neither a crowd nor one that never finishes its request may last.
_MOST = 64
_LIFE_S = 30.0
# Who is still being answered when creto ends waits no longer than this.
_SHUTDOWN_S = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def admin_socket(endpoint: Endpoint) -> socket.socket:
    """The listening socket. Raises ConfigError for an address that others than this machine's programs could reach, and
    when it cannot be had."""
    if not endpoint.address.is_loopback:
        raise ConfigError([f"admin.listen: {endpoint} can be reached from elsewhere; use a loopback address"])
    family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((str(endpoint.address), endpoint.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise ConfigError([f"admin.listen: cannot listen on {endpoint}: {reason}"]) from None


class Admin:
    """Serves one socket until it is stopped."""

    def __init__(self, sock: socket.socket, scrape: Scrape, status: Callable[[], NodeStatus]) -> None:
        self._sock = sock
        self._scrape = scrape
        self._status = status
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        host, port = self._sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        app = web.Application(middlewares=[_local_names_only], client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/status", self._document)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_S
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, sock=self._sock, backlog=_BACKLOG)

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server if self._runner is not None else None
        if server is None or len(server.connections) >= _MOST:
            return _Turned()
        handler = server()
        asyncio.get_running_loop().call_later(_LIFE_S, handler.force_close)
        return handler

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._sock.close()

    async def _metrics(self, request: web.Request) -> web.Response:
        openmetrics = "application/openmetrics-text" in request.headers.get("Accept", "")
        body = await asyncio.to_thread(self._scrape, self._status(), openmetrics=openmetrics)
        return web.Response(body=body, headers={"Content-Type": OPENMETRICS if openmetrics else TEXT})

    async def _livez(self, request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _readyz(self, request: web.Request) -> web.Response:
        status = self._status()
        document = {"ready": status.ready, "waiting": list(status.waiting)}
        return web.json_response(document, status=200 if status.ready else 503)

    async def _document(self, request: web.Request) -> web.Response:
        return web.json_response(self._status().document())


class _Turned(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


@web.middleware
async def _local_names_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A web page that had its name pointed at this machine must not read what is told here (DNS rebinding)."""
    response: web.StreamResponse
    if not _is_local(request.headers.get("Host", "")):
        response = web.json_response({"error": "ask for this listener by its loopback address"}, status=421)
    else:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
    response.force_close()  # one request each: whatever is open for long never finished its own
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _is_local(authority: str) -> bool:
    try:
        host, _ = split_authority(authority)
    except BadMessage:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
