"""``creto keys revoke`` while an agent's connections are open: what a running sidecar with two workers does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from .nodes import Node, node
from .test_ways import free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates

AGENT = "spiffe://local/agent/sidecar"
SPLICED = "secure.allowed.test"


@contextlib.asynccontextmanager
async def echoes(pem: Path) -> AsyncIterator[tuple[int, int]]:
    """(port of a WebSocket server, port of a TLS server) that say everything back."""

    async def again(ws: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                await ws.send(message)

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = await asyncio.start_server(back, "127.0.0.1", 0, ssl=context)
    async with serve(again, "127.0.0.1", 0) as web, server:
        yield web.sockets[0].getsockname()[1], server.sockets[0].getsockname()[1]


def tunnel(proxy: int, ca: str) -> ssl.SSLSocket:
    """Spliced TLS in a CONNECT that has carried something."""
    sock = socket.create_connection(("127.0.0.1", proxy), timeout=20)
    sock.sendall(f"CONNECT {SPLICED}:443 HTTP/1.1\r\nHost: {SPLICED}:443\r\n\r\n".encode())
    assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    secure = ssl.create_default_context(cafile=ca).wrap_socket(sock, server_hostname=SPLICED)
    secure.sendall(b"hello")
    assert secure.recv(5) == b"hello"
    return secure


def ended(secure: ssl.SSLSocket) -> bool:
    """Whether the connection is cut; waits for it."""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError), secure:
        return secure.recv(1) == b""
    return True


def why(creto: Node, action: str) -> list[str]:
    """The reasons that the audit log gives for what was let through by that action."""
    records = [entry["record"] for entry in json.loads(creto.command("audit", "tail", "--json").stdout)]
    return [each["why"] for each in records if each["act"] == action and each["out"] == "failure"]


async def test_open_websockets_and_tunnels_end_with_their_agent(tmp_path: Path) -> None:
    ca, _ = certificates(tmp_path, [SPLICED])
    async with echoes(tmp_path / "standin.pem") as (web, secure):
        explicit = free_port()
        environment = {
            "CRETO_LISTEN__EXPLICIT": f"127.0.0.1:{explicit}",
            "CRETO_EGRESS__ALLOW": json.dumps(["up.allowed.test:80", f"{SPLICED}:443"]),
            "CRETO_EGRESS__TLS__SPLICE": json.dumps([SPLICED]),
            "CRETO_EGRESS__RESOLVE": json.dumps({"up.allowed.test": f"127.0.0.1:{web}", SPLICED: f"127.0.0.1:{secure}"}),
        }
        async with node(tmp_path, web, free_port(), "", "--workers", "2", environment=environment) as creto:
            await creto.ready()
            url = f"ws://127.0.0.1:{creto.port}/up/chat"
            async with contextlib.AsyncExitStack() as stack:
                sockets = [await stack.enter_async_context(connect(url, proxy=None)) for _ in range(4)]
                for number, ws in enumerate(sockets):
                    await ws.send(f"{number}")
                    assert await asyncio.wait_for(ws.recv(), 20) == f"{number}"
                tunnels = [await asyncio.to_thread(tunnel, explicit, str(ca)) for _ in range(4)]
                done = await asyncio.to_thread(creto.command, "keys", "revoke", "principal", AGENT, "--reason", "test")
                assert done.returncode == 0, done.stderr
                async with asyncio.timeout(20):
                    for ws in sockets:
                        with pytest.raises(websockets.ConnectionClosed):
                            await ws.recv()
                    assert [await asyncio.to_thread(ended, each) for each in tunnels] == [True] * 4
                with pytest.raises(websockets.InvalidStatus) as refused:
                    await connect(url, proxy=None)
                assert refused.value.response.status_code == 403
            assert await creto.end() == 0
            assert why(creto, "httpWrite") == ["identity_ended"] * 4
            assert why(creto, "tunnel") == ["identity_ended"] * 4
