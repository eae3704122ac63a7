"""creto and a real server in threads of this process, for clients that are real SDKs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from creto_proxy.plugins import configure
from creto_proxy.service import Service, assemble
from creto_proxy.tls import CertificateAuthority

CONFIG = """
[common]
state_dir = "{directory}/state"
owner = "alice"
[policy]
dir = "{directory}/policies"
[limits]
drain_s = 0
[plugins]
disabled = ["oversight", "metering"]
[egress]
allow = ["server.test:80"]
[egress.resolve]
"server.test" = "127.0.0.1:{upstream}"
[[reverse]]
name = "up"
upstream = "http://server.test"
"""


@contextlib.contextmanager
def in_thread(
    serve: Callable[[Callable[[], None]], Awaitable[None]], new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> Iterator[None]:
    """``serve(started)`` in a loop of its own for the length of the block, then cancelled."""
    started = threading.Event()
    tasks: list[asyncio.Future[None]] = []

    async def main() -> None:
        tasks.append(asyncio.ensure_future(serve(started.set)))
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]

    def run() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not started.wait(0.1):
            assert thread.is_alive(), "it did not start"
        yield
    finally:
        tasks[0].get_loop().call_soon_threadsafe(tasks[0].cancel)
        thread.join()


@contextlib.contextmanager
def governed(directory: Path, *policies: str, upstream: int) -> Iterator[str]:
    """Base URL under which an agent reaches ``server.test``, which is at 127.0.0.1:upstream."""
    (directory / "policies").mkdir()
    (directory / "policies" / "sdk.cedar").write_text("\n".join(policies))
    file = directory / "creto.toml"
    file.write_text(CONFIG.format(directory=directory, upstream=upstream))
    with in_front(file) as (_, port):
        yield f"http://127.0.0.1:{port}/up"


@contextlib.contextmanager
def in_front(file: Path) -> Iterator[tuple[Service, int]]:
    """A creto with that configuration, and the port at which an agent reaches its reverse routes."""
    service: Service = assemble(*configure(file, environ={}), run="sdk", authority=CertificateAuthority())
    listener = socket.create_server(("127.0.0.1", 0))

    async def serve(started: Callable[[], None]) -> None:
        async with service.running():
            service.attach("sdk", "tester")
            await service.gateway.listen_proxy(listener, "sdk", "reverse")
            started()
            await asyncio.Event().wait()

    with listener, in_thread(serve, asyncio.new_event_loop):
        yield service, listener.getsockname()[1]


@contextlib.contextmanager
def served(app: Any) -> Iterator[int]:
    """The port of an ASGI application."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_level="error", loop="asyncio"))

    async def serve(started: Callable[[], None]) -> None:
        running = asyncio.ensure_future(web.serve(sockets=[listener]))
        while not web.started and not running.done():
            await asyncio.sleep(0.01)
        started()
        try:
            await asyncio.Event().wait()
        finally:
            web.should_exit = web.force_exit = True
            await running

    with listener, in_thread(serve, asyncio.new_event_loop):
        yield listener.getsockname()[1]
