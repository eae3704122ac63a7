"""A reverse proxy as one would write it with aiohttp: a server, a ClientSession with a pool, uvloop.

    python aiohttp_proxy.py PORT UPSTREAM_URL [CERTIFICATE]

Bodies are read whole in both directions; with a certificate (PEM, key included) both sides speak TLS.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, TCPConnector, web

HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade", "content-length")
)
SESSION: web.AppKey[ClientSession] = web.AppKey("session", ClientSession)


def application(upstream: str, secure: bool) -> web.Application:
    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=0, keepalive_timeout=300, ssl=False if secure else True)
        async with ClientSession(connector=connector, auto_decompress=False) as app[SESSION]:
            yield

    async def forward(request: web.Request) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        body = await request.read() if request.can_read_body else None
        async with request.app[SESSION].request(
            request.method, upstream + request.path_qs, headers=headers, data=body, allow_redirects=False
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    app = web.Application(client_max_size=1 << 24)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


if __name__ == "__main__":
    certificate = sys.argv[3] if len(sys.argv) > 3 else ""
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    web.run_app(
        application(sys.argv[2], bool(certificate)),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        ssl_context=context,
        access_log=None,
        print=None,
        keepalive_timeout=3600,
        backlog=4096,
        loop=uvloop.new_event_loop(),
    )
