"""The whole relay between an agent and an upstream, on connections in memory."""

from __future__ import annotations

import asyncio
import re
from functools import cache
from types import ModuleType
from typing import Any

from creto_hotpath import _http1_py as http1
from creto_hotpath._http1_py import BadMessage

from .invariants import cuts, forms, same
from .oracles import h11_request, llhttp_requests

FORMS = forms("relay")
# Stands between what the agent sends and what the upstream answers to the first request.
ANSWER = b"<answer>"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Request = tuple[str, str, tuple[tuple[str, str], ...], bytes]


class Wire:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.closing = False

    def write(self, data: bytes) -> None:
        assert not self.closing or not data, "bytes after the close"
        self.out += data

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def write_eof(self) -> None:
        pass

    pause_reading = resume_reading = write_eof

    def can_write_eof(self) -> bool:
        return True

    def set_protocol(self, protocol: Any) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 0, 65536


class Lab:
    """One agent's connection, and every connection that was made to the upstream for it."""

    def __init__(self, form: ModuleType, answer: bytes) -> None:
        self.form = form
        self.answer = answer
        self.pool = form.Pool()
        self.upstreams: list[tuple[Any, Wire, int]] = []
        self.down = form.Downstream(self)
        self.wire = Wire()
        self.failed: list[str] = []

    def on_request(self, exchange: Any) -> None:
        if exchange.head.is_connect:
            exchange.respond(405, [], b"")
            return
        upstream = self.pool.acquire("up")
        if upstream is None:
            upstream, wire = self.form.Upstream(self.pool, "up"), Wire()
            upstream.connection_made(wire)
            self.upstreams.append((upstream, wire, 0))
        exchange.forward(upstream, host=None if exchange.head.authority else "h.test")

    def on_body(self, exchange: Any, body: bytes | None) -> None:
        raise AssertionError("nothing was collected")

    def on_stale(self, exchange: Any) -> None:
        exchange.respond(502, [], b"")

    def on_bad_request(self, error: BadMessage) -> bytes:
        return http1.plain_response(error.status, [], error.reason.encode(), http1.CLOSING)

    def on_end(self, exchange: Any) -> None:
        pass

    def on_close(self) -> None:
        pass

    async def settle(self) -> None:
        """Answers every request that has arrived whole."""
        moved = True
        while moved:
            await asyncio.sleep(0)
            moved = False
            for index, (upstream, wire, answered) in enumerate(self.upstreams):
                if not wire.closing and len(requests(bytes(wire.out))[0]) > answered:
                    self.upstreams[index] = (upstream, wire, answered + 1)
                    answer, self.answer = self.answer, PLAIN
                    upstream.data_received(answer)
                    if answer is not PLAIN and not wire.closing:
                        upstream.eof_received()
                        wire.closing = True
                        upstream.connection_lost(None)
                    moved = True

    async def play(self, parts: list[bytes]) -> tuple[list[bytes], bytes]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.failed.append(str(context)))
        self.down.connection_made(self.wire)
        for part in parts:
            if self.wire.closing:
                break
            if part:
                self.down.data_received(part)
                await self.settle()
        self.wire.closing or self.down.eof_received()
        await self.settle()
        self.wire.closing = True
        self.down.connection_lost(None)
        for upstream, wire, _ in self.upstreams:
            if not wire.closing:
                wire.closing = True
                upstream.connection_lost(None)
        self.pool.close()
        await asyncio.sleep(0)
        assert not self.failed, self.failed
        return [bytes(wire.out) for _, wire, _ in self.upstreams], bytes(self.wire.out)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def requests(data: bytes) -> tuple[list[Request], int]:
    """The whole requests at the start of ``data``, as the strict parser reads them, and where they end."""
    found: list[Request] = []
    at = 0
    try:
        while (head := http1.read_request(data, at)) is not None:
            framer = http1.BodyFramer(head.body, max(head.content_length, 0))
            content = framer.payload(data, head.end)
            if not framer.done:
                break
            at = framer.end if head.body != http1.NONE else head.end
            fields = tuple((n.lower(), v) for n, v in head.items() if n.lower() not in ("expect", "max-forwards"))
            found.append((head.method, head.origin_target, fields, content))
    except BadMessage:
        pass
    return found, at


def check_relay(data: bytes) -> None:
    """Nothing reaches the upstream that the agent did not ask for as a whole request, and others see it alike."""
    sent, _, answer = data.partition(ANSWER)
    answer = answer or PLAIN

    def play(form: ModuleType, parts: list[bytes]) -> tuple[list[bytes], bytes]:
        return _loop().run_until_complete(Lab(form, answer).play(parts))

    streams, said = same([(up, _undated(down)) for up, down in (play(form, [sent]) for form in FORMS)])
    asked = [(method, target, content) for method, target, _, content in requests(sent)[0]]
    whole = [requests(stream)[0] for stream in streams]
    remaining = iter(asked)
    for stream, seen in zip(streams, whole, strict=True):
        for method, target, _, content in seen:
            assert (method, target, content) in remaining, (seen, asked)
        _check_others(stream, len(seen))
    statuses = _statuses(said)
    rest = sent[requests(sent)[1] :]
    if b"\n" not in rest:
        statuses = []  # a line that never ends may be refused at its first byte or when it is given up
    for index, parts in enumerate(cuts(sent)):
        if index != 1 and index % 16:
            continue
        up, down = play(FORMS[-1], parts)
        assert [requests(stream)[0] for stream in up if requests(stream)[0]] == [seen for seen in whole if seen], parts
        assert not statuses or _statuses(down)[-1:] == statuses[-1:], (statuses, _statuses(down), parts)


def _undated(data: bytes) -> bytes:
    return re.sub(rb"\r\nDate: [^\r]*", b"", data)


def _statuses(data: bytes) -> list[bytes]:
    return re.findall(rb"(?:^|(?<=[\n}k\w]))HTTP/1\.1 (\d{3}) ", data)


def _check_others(stream: bytes, count: int) -> None:
    """h11 and llhttp must see as many whole requests in what an upstream gets."""
    rest, seen = stream, 0
    while rest and (found := h11_request(rest)) is not None and found[0].complete:
        seen, rest = seen + 1, found[1]
    assert seen == count, (seen, count, stream)
    messages = llhttp_requests(stream)
    assert messages is None or sum(message.complete for message in messages) == count, (messages, count, stream)
