"""Small real servers that the tests need beside the demo's stand-ins."""

from __future__ import annotations

import contextlib
import functools
import http.server
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return None


@contextlib.contextmanager
def serving_files(directory: Path, name: str) -> Iterator[tuple[int, Path]]:
    """(port, CA file) of an HTTPS server for the files in ``directory``, certified for ``name``."""
    with tempfile.TemporaryDirectory() as keys:
        ca, context = certificates(Path(keys), [name])
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(directory))
        )
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1], ca
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def serving_mcp(name: str) -> Iterator[tuple[int, Path]]:
    """(port, CA file) of a real MCP server over streamable HTTP with one tool, certified for ``name``."""
    import asyncio

    import uvicorn
    from mcp.server import MCPServer
    from mcp.server.transport_security import TransportSecuritySettings

    server = MCPServer("tools")

    @server.tool()
    def add(a: int, b: int) -> str:
        return str(a + b)

    with tempfile.TemporaryDirectory() as directory:
        ca, _ = certificates(Path(directory), [name])
        chain = str(Path(directory) / "standin.pem")
        app = server.streamable_http_app(transport_security=TransportSecuritySettings(allowed_hosts=[name, f"{name}:*"]))
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, ssl_certfile=chain, ssl_keyfile=chain, log_level="error", loop="asyncio"
        )
        web = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(web.serve()), daemon=True)
        thread.start()
        started = threading.Event()
        while not web.started and thread.is_alive():
            started.wait(0.02)
        try:
            yield web.servers[0].sockets[0].getsockname()[1], ca
        finally:
            web.should_exit = True
            thread.join(60)


@dataclass(frozen=True)
class Slow:
    """arrived: released once per request that came in. go: lets every answer end."""

    port: int
    arrived: threading.Semaphore
    go: threading.Event


SLOW_PARTS = 3


@contextlib.contextmanager
def serving_slowly() -> Iterator[Slow]:
    """A plain HTTP server that sends the head and first part of its answer at once, the rest when it is told to."""
    arrived, go = threading.Semaphore(0), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(b"part") * SLOW_PARTS))
            self.end_headers()
            self.wfile.write(b"part")
            arrived.release()
            go.wait(200)
            with contextlib.suppress(OSError):
                self.wfile.write(b"part" * (SLOW_PARTS - 1))

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Slow(server.server_address[1], arrived, go)
    finally:
        go.set()
        server.shutdown()
        server.server_close()
