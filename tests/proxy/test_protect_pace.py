"""What comes regularly, but too slowly to be honest, ends with an outcome; what is merely slow does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from creto_hotpath.relay import Limits
from creto_proxy.protect import Memory, Pace, Protection

from .protect_lab import OK, Answer, Lab, answer_of, lab, post, server, until

GIGABYTE = 1 << 30


def pace(rate: float = 1000.0, grace_s: float = 0.3, silence_s: float = 60.0) -> Pace:
    return Pace(body_rate=rate, grace_s=grace_s, silence_s=silence_s)


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads whatever comes and never answers."""
    while await reader.read(65536):
        pass


async def trickle(writer: asyncio.StreamWriter, piece: bytes, every_s: float) -> None:
    """``piece`` again and again until the connection is gone."""
    try:
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(every_s)
    except ConnectionError:
        return


@asynccontextmanager
async def sending(here: Lab, head: bytes, piece: bytes, every_s: float = 0.05) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await here.connect()
    writer.write(head)
    feeding = asyncio.create_task(trickle(writer, piece, every_s))
    try:
        yield reader
    finally:
        feeding.cancel()
        writer.transport.abort()
        await asyncio.gather(feeding, return_exceptions=True)


LENGTH, CHUNKED = f"Content-Length: {GIGABYTE}", "Transfer-Encoding: chunked"


@pytest.mark.parametrize(("framing", "piece"), [(LENGTH, b"x"), (CHUNKED, b"1\r\nx\r\n")], ids=["length", "chunked"])
@pytest.mark.parametrize("host", ["up.test", "held.test"], ids=["streamed", "collected"])
async def test_a_body_a_byte_at_a_time_ends_with_408_and_an_outcome(
    tmp_path: Path, host: str, framing: str, piece: bytes
) -> None:
    """The relay's own deadline (30 s here) starts anew with each byte, so it alone would wait for ever."""
    memory = Memory(1 << 20)
    protection = Protection(pace=pace(), memory=memory)
    large = {"held_body_bytes": 200} if framing == CHUNKED else {"held_body_bytes": GIGABYTE}
    if host == "held.test" and framing == LENGTH:
        framing = "Content-Length: 200"
    async with server(swallow) as up, lab(tmp_path, protection=protection, gate=object(), **large) as here:
        async with sending(here, post(up.port, host, framing), piece) as reader:
            answer = await asyncio.wait_for(answer_of(reader), 60)
            assert (answer.status, answer.reason) == (408, "body_too_slow")
            assert await reader.read() == b"", "and the connection is closed"
            await until(lambda: memory.used == 0)
        assert protection.pace is not None and protection.pace.ended == 1
    assert [(o.status, o.error) for o in here.journal()] == [(408, "body_too_slow")]


async def test_a_slow_body_above_the_rate_and_a_slow_answer_are_left_alone(tmp_path: Path) -> None:
    thinking = asyncio.Event()

    async def think(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(3000)
        await thinking.wait()
        writer.write(OK)

    watching = pace(rate=100.0)
    async with server(think) as up, lab(tmp_path, protection=Protection(pace=watching)) as here:
        reader, writer = await here.connect()
        writer.write(post(up.port, "up.test", "Content-Length: 3000"))
        for _ in range(15):
            writer.write(bytes(200))
            await asyncio.sleep(0.1)
        looks = watching._timer
        for _ in range(4):  # it thinks for as long as four looks take, which is long over the grace of the body
            await until(lambda before=looks: watching._timer is not before)  # type: ignore[misc]
            looks = watching._timer
        thinking.set()
        assert (await answer_of(reader)).status == 200
        writer.close()
        assert watching.ended == 0


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf",
    ],
    ids=["length", "half a chunk"],
)
async def test_an_answer_that_stops_in_the_middle_is_cut_off_and_counts_against_the_upstream(
    tmp_path: Path, begun: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begun)
        await reader.read()

    protection = Protection(pace=pace(silence_s=0.5))
    async with server(serve) as up, lab(tmp_path, protection=protection) as here:
        reader, writer = await here.connect()
        writer.write(post(up.port, "up.test", "Content-Length: 0"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert len(here.pipeline.upstreams.health.bad) == 1
    assert [(o.status, o.error) for o in here.journal()] == [(200, "upstream_silent")]


async def test_an_upstream_that_stops_reading_a_body_is_given_up(tmp_path: Path) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        while not writer.is_closing():
            await asyncio.sleep(0.05)
            try:
                writer.transport.get_extra_info("socket").getpeername()
            except OSError:
                return

    protection = Protection(pace=pace(silence_s=0.5))
    async with server(deaf) as up, lab(tmp_path, protection=protection) as here:
        async with sending(here, post(up.port, "up.test", LENGTH), bytes(1 << 20), 0.0) as reader:
            answer = await asyncio.wait_for(answer_of(reader), 60)
            assert answer.status in (504, 0)  # 0: what was still being sent reset the connection
    assert [(o.status, o.error) for o in here.journal()] == [(504, "upstream_not_reading")]


async def test_events_that_come_now_and_then_and_tunnels_that_are_silent_go_on(tmp_path: Path) -> None:
    async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 40\r\n\r\n")
        for _ in range(4):
            writer.write(b"data: 1234")
            await asyncio.sleep(0.6)

    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        writer.write(await reader.read(100))
        await reader.read()

    watching = pace(silence_s=2.0)
    async with (
        server(events) as up,
        server(switch) as other,
        lab(tmp_path, protection=Protection(pace=watching)) as here,
    ):
        reader, writer = await here.connect()
        head = f"GET http://up.test:{other.port}/ HTTP/1.1\r\nHost: up.test:{other.port}\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        answer: Answer = await here.get(up.port)
        assert (answer.status, len(answer.body)) == (200, 40)
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        writer.transport.abort()
        assert watching.ended == 0


async def test_heads_and_kept_connections_have_deadlines_of_their_own(tmp_path: Path) -> None:
    limits = Limits(head_s=0.5, idle_s=0.5)
    async with lab(tmp_path, limits=limits) as here:
        reader, writer = await here.connect()
        assert await asyncio.wait_for(reader.read(), 60) == b"", "an unused connection is closed"
        async with sending(here, b"GET http://up.test/ HTTP/1.1\r\n", b"a") as slow:
            assert (await asyncio.wait_for(answer_of(slow), 60)).status == 408
        writer.close()
    assert [(o.status, o.error) for o in here.journal()] == [(408, "head_timeout")]
