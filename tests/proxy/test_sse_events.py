"""Server-sent events one by one: each reaches the agent before the next is written, whoever looks on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from creto_proxy.hookspecs import Tap
from creto_proxy.model import Request

from .test_pipeline import Counting, lab

EVENTS = [b'data: {"n": %d, "text": "%s"}\n\n' % (n, b"x" * 180) for n in range(20)]


class Looking:
    """A tap that sees the events, or takes part in passing them on."""

    def __init__(self, rewrites: bool) -> None:
        self.rewrites = rewrites
        self.seen = b""

    def feed(self, data: bytes) -> bytes | None:
        self.seen += data
        return data

    def finish(self) -> bytes | None:
        return None


class Metering(Counting):
    def __init__(self, tap: Looking) -> None:
        super().__init__()
        self.looking = tap

    def tap(self, request: Request, status: int, content_type: str) -> Tap | None:
        assert content_type == "text/event-stream"
        return self.looking


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("tap", [None, Looking(False), Looking(True)], ids=["unseen", "seen", "rewritten"])
async def test_each_event_arrives_before_the_next_is_written(tmp_path: Path, framing: str, tap: Looking | None) -> None:
    arrived = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        fields = b"Transfer-Encoding: chunked\r\n" if framing == "chunked" else b"Connection: close\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + fields + b"\r\n")
        for event in EVENTS:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event) if framing == "chunked" else event)
            await arrived.acquire()
        if framing == "chunked":
            writer.write(b"0\r\n\r\n")
        writer.close()

    meter = Metering(tap) if tap is not None else None
    async with lab(tmp_path, serve=serve, meter=meter) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET http://good.test/events HTTP/1.1\r\nHost: good.test\r\nAccept: text/event-stream\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and b"chunked" in head
        async with asyncio.timeout(60):
            for event in EVENTS:
                # The upstream writes the next one only now that this one is here.
                assert await reader.readexactly(len(b"%x\r\n" % len(event)) + len(event) + 2) == b"%x\r\n%s\r\n" % (
                    len(event),
                    event,
                )
                arrived.release()
            assert await reader.readexactly(5) == b"0\r\n\r\n"
        writer.close()
    if tap is not None:
        assert tap.seen == b"".join(EVENTS) * (tap.seen.count(EVENTS[0]))
