"""Other people's WebSocket clients and servers on both sides of creto."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import websockets
from aiohttp import web
from websockets.asyncio.client import connect

from .websocket_lab import (
    CLIENT,
    Watching,
    echoing,
    lab,
    on_uvloop,
    refusing,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates


async def _aiohttp_echo(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(protocols=["chat"])
    await ws.prepare(request)
    async for message in ws:
        if message.type is aiohttp.WSMsgType.TEXT:
            await ws.send_str(message.data)
        else:
            await ws.send_bytes(message.data)
    return ws


@asynccontextmanager
async def aiohttp_echo() -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/{path:.*}", _aiohttp_echo)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("watched", [True, False])
def test_aiohttp_talks_to_aiohttp(tmp_path: Path, watched: bool) -> None:
    watch = Watching()

    async def scenario() -> None:
        async with aiohttp_echo() as port, lab(tmp_path, port, *([watch] if watched else [])) as here:
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(here.url.replace("ws:", "http:"), protocols=["chat"], compress=15) as ws:
                    assert ws.protocol == "chat"
                    await ws.send_str("grüße " * 1000)
                    assert (await ws.receive_str()) == "grüße " * 1000
                    await ws.send_bytes(bytes(1000))
                    assert (await ws.receive_bytes()) == bytes(1000)
                    await ws.close(code=4000, message=b"done")
                assert ws.close_code == 1000, "which is what aiohttp's server answers to every Close"

    on_uvloop(scenario())
    assert len(watch.seen) == (4 if watched else 0)


@pytest.mark.parametrize("watched", [True, False])
def test_websockets_over_tls_on_both_sides(tmp_path: Path, watched: bool) -> None:
    """wss:// through CONNECT: the agent's TLS ends here, the upstream's begins here."""
    ca, context = certificates(tmp_path, ["up.test"])
    watch = refusing()

    async def scenario() -> None:
        trusts = ssl.create_default_context(cafile=str(ca))
        stages = [watch] if watched else []
        async with echoing(ssl=context) as echo, lab(tmp_path, echo.port, *stages, tls=trusts) as here:
            own = here.gateway._authority.write(tmp_path)
            agent = ssl.create_default_context(cafile=str(own))
            async with connect("wss://up.test/chat", ssl=agent, **{**CLIENT, "proxy": here.proxy}) as ws:
                await ws.send(b"x" * 300_000)
                assert await ws.recv() == b"x" * 300_000
                await ws.send("secret")
                if not watched:
                    assert await ws.recv() == "secret"
                else:
                    with pytest.raises(websockets.ConnectionClosed):
                        await ws.recv()
                    assert ws.close_code == 1008
            await echo.closed.wait()
        assert echo.closes == [(1008, "no_secrets") if watched else (1000, "")]

    on_uvloop(scenario())


NODE = """
const ws = new WebSocket(process.argv[1], ["chat"]);
const heard = [];
ws.onopen = () => { ws.send("grüße"); ws.send(new Uint8Array([1, 2, 3])); ws.send("secret"); };
ws.onmessage = async (event) => {
  heard.push(typeof event.data === "string" ? event.data : event.data.size);
};
ws.onclose = (event) => console.log(JSON.stringify({ heard, code: event.code, reason: event.reason, protocol: ws.protocol }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_nodes_own_websocket(tmp_path: Path) -> None:
    async def scenario() -> bytes:
        async with echoing(subprotocols=["chat"]) as echo, lab(tmp_path, echo.port, refusing()) as here:
            node = await asyncio.create_subprocess_exec(
                "node", "--experimental-websocket", "-e", NODE, here.url,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, err = await node.communicate()
            if b"bad option" in err or b"WebSocket is not defined" in err:
                pytest.skip("this node has no WebSocket of its own")
            assert node.returncode == 0, err
            return out

    said = json.loads(on_uvloop(scenario()))
    # What came before the refused message may or may not have been echoed by then.
    assert said["heard"] == ["grüße", 3][: len(said["heard"])]
    assert (said["code"], said["reason"], said["protocol"]) == (1008, "no_secrets: Not that.", "chat")
