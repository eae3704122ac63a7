"""WebSockets through creto with real clients and servers: what a plugin sees, changes and ends, and what it costs
nobody who is not watched."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from .websocket_lab import (
    CLIENT,
    GRANTED,
    REQUEST,
    Watching,
    closing,
    echoing,
    frame,
    lab,
    on_uvloop,
    raw,
    refusing,
    scripted,
)

# More than the kernel buffers of two loopback connections take.
MANY = 32 << 20


# -- passing, changing, refusing


@pytest.mark.parametrize("way", ["reverse", "connect"])
def test_a_watched_connection_carries_every_message_and_each_is_seen_both_ways(tmp_path: Path, way: str) -> None:
    watch = Watching()
    messages: list[str | bytes] = ["", "grüße", b"", bytes(range(256)), "x" * 200_000, b"y" * 70_000]

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, watch) as here:
            options = {**CLIENT, "proxy": here.proxy} if way == "connect" else CLIENT
            url = "ws://up.test:80/chat" if way == "connect" else here.url
            async with connect(url, max_size=None, **options) as ws:
                for message in messages:
                    await ws.send(message)
                    assert await ws.recv() == message
                await ws.send(iter(["in ", "three ", "pieces"]))
                assert await ws.recv() == "in three pieces"
            await echo.closed.wait()
            assert echo.closes == [(1000, "")]
            outcomes = await here.recorded()
        assert [(o.status, o.error, o.decision) for o in outcomes if o.status] == [(101, "", "allow")]

    on_uvloop(scenario())
    whole = [
        ("text" if isinstance(m, str) else "binary", m.encode() if isinstance(m, str) else m)
        for m in [*messages, "in three pieces"]
    ]
    assert watch.seen == [(direction, *message) for message in whole for direction in ("up", "down")]


def test_a_connection_that_nobody_watches_is_a_plain_tunnel_with_its_extensions(tmp_path: Path) -> None:
    watch = Watching(paths=["/watched"])

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, watch) as here:
            async with connect(f"{here.url}/chat", **{**CLIENT, "compression": "deflate"}) as ws:
                assert [each.name for each in ws.protocol.extensions] == ["permessage-deflate"]
                await ws.send("a" * 1000)
                assert await ws.recv() == "a" * 1000
            async with connect(f"{here.url}/watched", **{**CLIENT, "compression": "deflate"}) as ws:
                assert ws.protocol.extensions == []
                await ws.send("b")
                assert await ws.recv() == "b"
            assert echo.extensions[0] is not None and echo.extensions[1] is None

    on_uvloop(scenario())
    assert [request.path for request in watch.opened] == ["/chat", "/watched"]
    assert [data for _, _, data in watch.seen] == [b"b", b"b"]


def test_a_payload_can_be_replaced(tmp_path: Path) -> None:
    def redact(direction: str, kind: str, data: bytes) -> bytes:
        return data.replace(b"4111 1111", b"[card]") if direction == "up" else data + b"!"

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, Watching(redact)) as here:
            async with connect(here.url, **CLIENT) as ws:
                await ws.send("pay with 4111 1111")
                assert await ws.recv() == "pay with [card]!"

    on_uvloop(scenario())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_refused_message_reaches_nobody_and_both_sides_are_told(tmp_path: Path, direction: str) -> None:
    got: list[str | bytes] = []

    async def scenario() -> None:
        async def upstream(ws: ServerConnection) -> None:
            if direction == "down":
                await ws.send("a secret")
            with contextlib.suppress(websockets.ConnectionClosed):
                async for message in ws:
                    got.append(message)
            closes.append((ws.close_code or 0, ws.close_reason or ""))

        closes: list[tuple[int, str]] = []
        async with (
            serve(upstream, "127.0.0.1", 0) as server,
            lab(tmp_path, server.sockets[0].getsockname()[1], refusing()) as here,
        ):
            async with connect(here.url, **CLIENT) as ws:
                if direction == "up":
                    await ws.send("fine")
                    await ws.send("a secret")
                with pytest.raises(websockets.ConnectionClosed):
                    await ws.recv()
                assert (ws.close_code, ws.close_reason) == (1008, "no_secrets: Not that.")
            [outcome] = await here.recorded()
            while not closes:
                await asyncio.sleep(0.01)
        assert closes == [(1008, "no_secrets")]
        assert (outcome.status, outcome.error) == (101, "no_secrets")

    on_uvloop(scenario())
    assert got == (["fine"] if direction == "up" else [])


def test_messages_before_a_refused_one_in_the_same_segment_arrive(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with echoing(compression=None) as echo, lab(tmp_path, echo.port, refusing()) as here:
            async with raw(here, REQUEST + frame(1, b"one") + frame(1, b"secret") + frame(1, b"three")) as (reader, _):
                await reader.readuntil(b"\r\n\r\n")
                rest = await reader.read()
                assert rest in (
                    closing(1008, "no_secrets: Not that."),
                    frame(1, b"one", mask=None) + closing(1008, "no_secrets: Not that."),
                )
            await echo.closed.wait()
        assert echo.closes == [(1008, "no_secrets")]

    on_uvloop(scenario())


def raising(direction: str, kind: str, data: bytes) -> bytes:
    raise RuntimeError("the token is sk-123")


def hanging(direction: str, kind: str, data: bytes) -> bytes:
    while True:
        pass


@pytest.mark.parametrize(("verdict", "reason"), [(raising, "stage_failed"), (hanging, "stage_timeout")])
def test_a_plugin_that_fails_closes_the_connection_and_nothing_else(
    tmp_path: Path, verdict: Callable[..., bytes], reason: str
) -> None:
    async def scenario() -> None:
        only = Watching(verdict, paths=["/bad"])
        async with echoing() as echo, lab(tmp_path, echo.port, only, deadline_s=0.2) as here:
            async with connect(f"{here.url}/good", **CLIENT) as good, connect(f"{here.url}/bad", **CLIENT) as bad:
                await bad.send("x")
                with pytest.raises(websockets.ConnectionClosed):
                    await bad.recv()
                assert bad.close_code == 1011 and "sk-123" not in (bad.close_reason or "")
                await good.send("y")
                assert await good.recv() == "y"
            ends = {o.target: o.error for o in await here.recorded(2)}
        assert ends == {"/good": "", "/bad": reason}

    on_uvloop(scenario())


def test_a_plugin_that_cannot_say_whether_it_watches_refuses_the_upgrade(tmp_path: Path) -> None:
    class Undecided:
        def open(self, request: object) -> None:
            raise RuntimeError("no")

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, Undecided()) as here:
            async with raw(here) as (reader, _):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
            assert echo.extensions == []

    on_uvloop(scenario())


def test_a_message_larger_than_the_limit_closes_with_1009(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, Watching(), max_message_bytes=1000) as here:
            async with connect(here.url, **CLIENT) as ws:
                await ws.send(b"x" * 1000)
                assert await ws.recv() == b"x" * 1000
                await ws.send(b"x" * 1001)
                with pytest.raises(websockets.ConnectionClosed):
                    await ws.recv()
                assert ws.close_code == 1009
            [outcome] = await here.recorded()
        assert outcome.error == "message_too_large"

    on_uvloop(scenario())


# -- the protocol, end to end


def test_pings_and_closes_go_end_to_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, Watching()) as here:
            async with connect(here.url, **CLIENT) as ws:
                await (await ws.ping(b"are you there"))
                await ws.close(4321, "enough")
                assert (ws.close_code, ws.close_reason) == (4321, "enough")
            await echo.closed.wait()
        assert echo.closes == [(4321, "enough")]

    on_uvloop(scenario())


def test_a_close_from_the_server_comes_through_and_what_it_still_had_to_say_before_it(tmp_path: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GRANTED)
        assert (await reader.readexactly(8))[0] == 0x88  # the agent's Close
        writer.write(frame(1, b"last words", mask=None) + closing(1000, ""))

    async def scenario() -> None:
        async with scripted(script) as port, lab(tmp_path, port, Watching()) as here:
            async with raw(here, REQUEST + closing(1000, "", mask=b"1234")) as (reader, _):
                assert await reader.read() == _relayed(GRANTED) + frame(1, b"last words", mask=None) + closing(1000, "")

    on_uvloop(scenario())


def _relayed(head: bytes) -> bytes:
    """The head as creto writes it."""
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
        b"Connection: upgrade\r\nUpgrade: websocket\r\nVia: 1.1 creto\r\n\r\n"
    )


def test_frames_behind_the_answer_to_the_upgrade_are_judged_wherever_its_bytes_are_cut(tmp_path: Path) -> None:
    """A server may speak in the very segment that grants the upgrade."""
    wire = b"HTTP/1.1 103 Early Hints\r\n\r\n" + GRANTED + frame(1, b"fine", mask=None) + frame(1, b"secret", mask=None)
    at = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire[:at])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(wire[at:])
        await reader.read()

    async def scenario() -> None:
        nonlocal at
        async with scripted(script) as port, lab(tmp_path, port, refusing()) as here:
            for at in range(0, len(wire), 3):
                async with raw(here) as (reader, _):
                    answer = await reader.read()
                    assert answer.endswith(frame(1, b"fine", mask=None) + closing(1008, "no_secrets: Not that.")), at

    on_uvloop(scenario())


@pytest.mark.parametrize(
    ("agent", "upstream", "code", "reason"),
    [
        pytest.param(frame(1, b"x", mask=None), b"", 1002, "websocket_protocol", id="agent does not mask"),
        pytest.param(frame(1, b"\xff"), b"", 1007, "websocket_text", id="agent sends no UTF-8"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", b"", 1002, "websocket_protocol", id="agent goes on with HTTP"),
        pytest.param(b"", frame(1, b"x"), 1002, "websocket_protocol", id="upstream masks"),
        pytest.param(b"", b"HTTP/1.1 200 OK\r\n\r\n", 1002, "websocket_protocol", id="upstream goes on with HTTP"),
    ],
)
def test_what_is_no_websocket_ends_both_sides(
    tmp_path: Path, agent: bytes, upstream: bytes, code: int, reason: str
) -> None:
    heard: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GRANTED + upstream)
        heard.append(await reader.read())

    async def scenario() -> None:
        async with scripted(script) as port, lab(tmp_path, port, Watching()) as here:
            async with raw(here, REQUEST + agent) as (reader, _):
                await reader.readuntil(b"\r\n\r\n")
                last = await reader.read()
            [outcome] = await here.recorded()
        assert last[0] == 0x88 and struct.unpack("!H", last[2:4])[0] == code
        assert (outcome.status, outcome.error) == (101, reason)
        assert heard[0][0] == 0x88 and len(heard) == 1

    on_uvloop(scenario())


def test_an_extension_that_was_not_offered_is_refused(tmp_path: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            GRANTED[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n" + frame(1, b"x", mask=None, rsv=4)
        )
        await reader.read()

    async def scenario() -> None:
        async with scripted(script) as port, lab(tmp_path, port, Watching()) as here:
            async with raw(here) as (reader, _):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502")
            [outcome] = await here.recorded()
        assert (outcome.status, outcome.error) == (502, "unasked_extension")

    on_uvloop(scenario())


def test_an_upgrade_that_is_not_granted_is_answered_as_ever_and_both_connections_go_on(tmp_path: Path) -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for body in (b"no", b"yes"):
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (403 if body == b"no" else 200, len(body)))
            await writer.drain()
            writer.write(body)
            await reader.readuntil(b"\r\n\r\n")

    async def scenario() -> None:
        async with scripted(script) as port, lab(tmp_path, port, watch := Watching()) as here:
            async with raw(here) as (reader, writer):
                assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 403")
                writer.write(b"GET /up/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await reader.readuntil(b"yes")).startswith(b"HTTP/1.1 200")
            assert connections == 1 and watch.seen == []

    on_uvloop(scenario())


def test_the_subprotocol_is_between_agent_and_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with echoing(subprotocols=["realtime"]) as echo, lab(tmp_path, echo.port, Watching()) as here:
            async with connect(here.url, subprotocols=["other", "realtime"], **CLIENT) as ws:  # type: ignore[list-item]
                assert ws.subprotocol == "realtime"

    on_uvloop(scenario())


@pytest.mark.parametrize("first", ["agent", "upstream"])
def test_a_side_that_has_said_all_it_will_still_gets_what_the_other_says_and_why_it_ended(
    tmp_path: Path, first: str
) -> None:
    """Half-closed by one side, then broken by the other."""
    heard: list[bytes] = []

    async def scenario() -> None:
        ready = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GRANTED)
            if first == "upstream":
                writer.write(frame(1, b"bye", mask=None))
                writer.write_eof()
                heard.append(await reader.read())
            else:
                heard.append(await reader.read())  # the agent's half is closed
                writer.write(frame(1, b"fine", mask=None) + frame(1, b"secret", mask=None))
            ready.set()

        async with scripted(script) as port, lab(tmp_path, port, refusing()) as here:
            async with raw(here) as (reader, writer):
                await reader.readuntil(b"\r\n\r\n")
                if first == "agent":
                    writer.write(frame(1, b"bye"))
                    writer.write_eof()
                    assert await reader.read() == frame(1, b"fine", mask=None) + closing(1008, "no_secrets: Not that.")
                else:
                    assert await reader.read() == frame(1, b"bye", mask=None)
                    writer.write(frame(1, b"secret"))
                await ready.wait()
            [outcome] = await here.recorded()
        assert outcome.error == "no_secrets"

    on_uvloop(scenario())
    last = heard[0][-len(closing(1008, "no_secrets", mask=b"1234")) :]
    assert (last[0] == 0x88) == (first == "upstream")


def test_a_flood_of_tiny_frames_leaves_others_their_turn_and_loses_nothing(tmp_path: Path) -> None:
    """One segment holds thousands of them; each connection gets a few per turn of the loop."""
    count = 6_000
    watch = Watching(paths=["/flood"])
    turns: list[int] = []

    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GRANTED)
            size = count * len(frame(1, b"x"))
            await reader.readexactly(size)
            writer.write(frame(1, b"y", mask=None) * count)
            writer.write_eof()
            assert await reader.read() == b""

        async with scripted(script) as port, lab(tmp_path, port, watch) as here:
            async with raw(here, REQUEST.replace(b"/up/ws", b"/up/flood")) as (reader, writer):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(frame(1, b"x") * count)
                writer.write_eof()
                while len(watch.seen) < count:
                    turns.append(len(watch.seen))
                    await asyncio.sleep(0)
                assert await reader.read() == frame(1, b"y", mask=None) * count

    on_uvloop(scenario())
    assert len(watch.seen) == 2 * count
    assert max(b - a for a, b in zip(turns, turns[1:], strict=False)) <= 1000


# -- backpressure


@pytest.mark.parametrize("direction", ["up", "down"])
def test_who_does_not_read_stops_who_writes(tmp_path: Path, direction: str) -> None:
    """The sender's own buffer has to hold what the other side does not take: creto does not."""
    chunk = frame(2, bytes(65000), mask=b"abcd" if direction == "up" else None)
    count = MANY // 65000
    far: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def scenario() -> None:
        open_, done = asyncio.Event(), asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GRANTED)
            far.append((reader, writer))
            open_.set()
            await done.wait()

        async with scripted(script) as port, lab(tmp_path, port, Watching()) as here:
            async with raw(here) as near:
                await near[0].readuntil(b"\r\n\r\n")
                await open_.wait()
                source, sink = (near[1], far[0][0]) if direction == "up" else (far[0][1], near[0])
                for _ in range(count):
                    source.write(chunk)
                conversation = next(iter(here.gateway._open))
                passage = conversation._passage
                assert passage is not None and passage._upgrade is not None and passage._upgrade._watched is not None
                agent, upstream = passage._exchange.downstream.transport, passage._upgrade._watched._real
                reads, writes = (agent, upstream) if direction == "up" else (upstream, agent)
                while reads.is_reading():
                    await asyncio.sleep(0.001)
                held = writes.get_write_buffer_size()
                got = 0
                while got < count * len(chunk):
                    got += len(await sink.read(1 << 20))
                assert 0 < held < 2 << 20
            done.set()

    on_uvloop(scenario())
