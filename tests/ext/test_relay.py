"""The relay over real sockets on uvloop: an agent, the relay with a minimal handler, and a scripted upstream."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from creto_hotpath._http1_py import CLOSING, BadMessage, plain_response
from creto_hotpath._relay_py import Limits

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Origin = Callable[[Reader, Writer], Awaitable[None]]
KEY = "origin"
# More than the kernel buffers of two loopback connections take.
MANY = 24 << 20
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Reverse:
    """The smallest handler that proxies: everything goes to the one origin."""

    def __init__(self, world: World) -> None:
        self.world = world

    def on_request(self, exchange: Any) -> None:
        self.world.requests.append(exchange)
        self.send(exchange)

    def send(self, exchange: Any, **how: Any) -> None:
        upstream = self.world.pool.acquire(KEY)
        if upstream is not None:
            exchange.forward(upstream, **how)
        else:
            self.world.spawn(self.connect(exchange, how))

    async def connect(self, exchange: Any, how: dict[str, Any]) -> None:
        exchange.forward(await self.world.dial(), **how)

    def on_body(self, exchange: Any, body: bytes | None) -> None:
        self.world.bodies.append(body)
        self.send(exchange)

    def on_stale(self, exchange: Any) -> None:
        self.world.stale += 1
        self.world.spawn(self.connect(exchange, {}))

    def on_end(self, exchange: Any) -> None:
        self.world.ended.append(exchange)
        self.world.notify()

    def on_bad_request(self, error: BadMessage) -> bytes:
        self.world.refused.append((error.status, error.reason))
        return plain_response(error.status, [], error.reason.encode(), CLOSING)

    def on_close(self) -> None:
        self.world.closed += 1
        self.world.notify()


class Collecting(Reverse):
    limit = 100_000

    def on_request(self, exchange: Any) -> None:
        exchange.collect(self.limit)


class World:
    """One relay, one origin, and what happened."""

    def __init__(self, relay: ModuleType) -> None:
        self.relay = relay
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context["message"]))
        self.pool = relay.Pool()
        self.requests: list[Any] = []
        self.bodies: list[bytes | None] = []
        self.ended: list[Any] = []
        self.refused: list[tuple[int, str]] = []
        self.errors: list[str] = []
        self.expected_errors: list[str] = []
        self.connections: list[Any] = []
        self.stale = 0
        self.closed = 0
        self.accepted = 0
        self._changed = asyncio.Event()
        self._servers: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[Writer] = []
        self.sockets: list[socket.socket] = []

    async def start(
        self,
        origin: Origin,
        handler: Callable[[World], Any] = Reverse,
        limits: Limits | None = None,
        origin_tls: ssl.SSLContext | None = None,
    ) -> None:
        async def accept(reader: Reader, writer: Writer) -> None:
            self.accepted += 1
            self._writers.append(writer)
            try:
                await origin(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        def connection() -> Any:
            made = self.relay.Downstream(handler(self), limits=limits or Limits())
            self.connections.append(made)
            return made

        upstream = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=origin_tls)
        relay = await self.loop.create_server(connection, "127.0.0.1", 0)
        self._servers += [upstream, relay]
        self.origin_port = upstream.sockets[0].getsockname()[1]
        self.port = relay.sockets[0].getsockname()[1]

    async def dial(self) -> Any:
        make = lambda: self.relay.Upstream(self.pool, KEY)  # noqa: E731
        _, upstream = await self.loop.create_connection(make, "127.0.0.1", self.origin_port)
        return upstream

    async def agent(self) -> tuple[Reader, Writer]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        self._writers.append(writer)
        return reader, writer

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def notify(self) -> None:
        self._changed.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), 0.01)
            except TimeoutError:
                pass

    def ticks(self, seconds: float) -> None:
        """Lets the relay's clock run without waiting."""
        wheel = self.relay.wheel_of(self.loop)
        for _ in range(int(seconds / 0.5) + 2):
            wheel.advance()

    async def stop(self) -> None:
        self.pool.close()
        for server in self._servers:
            server.close()
        for connection in self.connections:
            if not connection.closed:
                connection.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        for sock in self.sockets:
            sock.close()
        for writer in self._writers:
            writer.transport.abort()
        for writer in self._writers:
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


Scenario = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def play(form: Callable[[str], ModuleType]) -> Callable[[Scenario], World]:
    """Runs a scenario on a fresh uvloop and gives the world it played in."""

    def run(scenario: Scenario) -> World:
        worlds: list[World] = []

        async def main() -> None:
            world = World(form("relay"))
            worlds.append(world)
            try:
                async with asyncio.timeout(60):
                    await scenario(world)
            finally:
                await world.stop()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
        assert worlds[0].errors == worlds[0].expected_errors
        return worlds[0]

    return run


async def read_message(reader: Reader) -> tuple[bytes, bytes]:
    """(head, body as it came on the wire) of the next message; ConnectionError at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise ConnectionError(error.partial) from None
    lower = head.lower()
    length = re.search(rb"\r\ncontent-length: (\d+)", lower)
    if b"transfer-encoding: chunked" in lower:
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.readuntil(b"\r\n")
        return head, body
    return head, await reader.readexactly(int(length[1])) if length else b""


def answering(*answers: bytes, seen: list[tuple[bytes, bytes]] | None = None) -> Origin:
    """An origin that answers requests in turn, and then closes."""

    async def origin(reader: Reader, writer: Writer) -> None:
        for answer in answers:
            message = await read_message(reader)
            if seen is not None:
                seen.append(message)
            writer.write(answer)
        await reader.read()

    return origin


async def ask(world: World, *pieces: bytes) -> tuple[Reader, Writer]:
    reader, writer = await world.agent()
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    return reader, writer


def get(target: str = "/", *fields: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/{version}", "Host: a", *fields, "", ""]).encode()


def reset(writer: Writer) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def until_closed(reader: Reader) -> bytes:
    """Everything up to the close; a reset counts as one, and shows as b"<reset>"."""
    received = b""
    try:
        while piece := await reader.read(65536):
            received += piece
    except ConnectionResetError:
        return received + b"<reset>"
    return received


def test_requests_on_one_connection_share_a_pooled_upstream(play: Any) -> None:
    async def scenario(world: World) -> None:
        seen: list[tuple[bytes, bytes]] = []
        await world.start(answering(OK, OK, OK, seen=seen))
        reader, writer = await world.agent()
        for target in ("/1", "/2", "/3"):
            writer.write(get(target))
            assert (await read_message(reader))[1] == b"ok"
        assert [head.split()[1] for head, _ in seen] == [b"/1", b"/2", b"/3"]
        assert world.accepted == 1 and len(world.pool) == 1

    world = play(scenario)
    assert [exchange.completed for exchange in world.ended] == [True] * 3


def test_pipelined_requests_are_judged_each_and_answered_in_order(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            while True:
                head, body = await read_message(reader)
                answer = head.split()[1] + body
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

        await world.start(origin)
        post = b"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
        reader, _ = await ask(world, get("/1") + post + get("/3", "Connection: close"))
        assert [(await read_message(reader))[1] for _ in range(3)] == [b"/1", b"/2abc", b"/3"]
        assert await until_closed(reader) == b""

    assert len(play(scenario).requests) == 3


def test_head_may_come_one_byte_at_a_time(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, writer = await world.agent()
        for byte in b"\r\n" + get("/slow"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_message(reader))[1] == b"ok"

    play(scenario)


def test_http10_closes_unless_asked_to_stay(play: Any) -> None:
    async def scenario(world: World) -> None:
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        await world.start(answering(OK, OK, chunked))
        reader, writer = await ask(world, get(version="1.0"))
        answer = await until_closed(reader)
        assert b"Connection: close\r\n" in answer and answer.endswith(b"\r\n\r\nok")
        reader, writer = await ask(world, get("/", "Connection: keep-alive", version="1.0"))
        head, _ = await read_message(reader)
        assert b"Connection: keep-alive\r\n" in head
        writer.write(get("/", "Connection: keep-alive", version="1.0"))
        answer = await until_closed(reader)
        assert b"chunked" not in answer and answer.endswith(b"\r\n\r\nhello")

    play(scenario)


def test_chunked_bodies_pass_without_extensions_and_trailers(play: Any) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def scenario(world: World) -> None:
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-T: v\r\n\r\n"
        await world.start(answering(answer, seen=seen))
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await ask(world, head, b"5;a", b"=b\r\nhel", b"lo\r\n0\r\nX-T: 1\r\n", b"\r\n")
        received = await reader.readuntil(b"0\r\n\r\n")
        assert received.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n") and b"X-T" not in received

    play(scenario)
    assert seen[0][1] == b"5\r\nhello\r\n0\r\n\r\n"


def test_collecting_relay_answers_expect_itself(play: Any) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def scenario(world: World) -> None:
        await world.start(answering(OK, seen=seen), Collecting)
        head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await ask(world, head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"5\r\nhello\r\n0\r\n\r\n")
        assert (await read_message(reader))[1] == b"ok"

    world = play(scenario)
    assert world.bodies == [b"hello"]
    assert seen[0][1] == b"hello" and b"Expect" not in seen[0][0] and b"Content-Length: 5\r\n" in seen[0][0]


def test_streaming_relay_forwards_expect_and_the_100(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"Expect: 100-continue\r\n" in head
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert await reader.readexactly(5) == b"hello"
            writer.write(OK)
            await reader.read()

        await world.start(origin)
        head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        reader, writer = await ask(world, head)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"hello")
        assert (await read_message(reader))[1] == b"ok"

    play(scenario)


def test_interim_responses_reach_http11_clients_only(play: Any) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"

    async def scenario(world: World) -> None:
        await world.start(answering(hints + hints + OK, hints + OK))
        reader, _ = await ask(world, get())
        heads = [await reader.readuntil(b"\r\n\r\n") for _ in range(3)]
        assert [head.split()[1] for head in heads] == [b"103", b"103", b"200"] and b"Link: </x>" in heads[0]
        reader, _ = await ask(world, get(version="1.0"))
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")

    play(scenario)


def test_flood_of_interim_responses_is_an_error(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(b"HTTP/1.1 102 Processing\r\n\r\n" * 100))
        reader, _ = await ask(world, get())
        assert b"HTTP/1.1 502 " in await until_closed(reader)

    assert play(scenario).ended[0].error == "too_many_interim_responses"


def test_held_call_gets_heartbeats(play: Any) -> None:
    class Held(Reverse):
        def on_request(self, exchange: Any) -> None:
            exchange.interim(102)
            exchange.interim(100)
            with pytest.raises(ValueError, match="heartbeat"):
                exchange.interim(200)
            self.world.requests.append(exchange)

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Held)
        reader, _ = await ask(world, get())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 102 ")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        world.requests[0].respond(403, [("X-Why", "no")], b"denied")
        head, body = await read_message(reader)
        assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n") and b"X-Why: no\r\n" in head and body == b"denied"
        world.requests[0].interim(102)
        world.requests[0].respond(200, [], b"twice")

    world = play(scenario)
    assert [(end.status, end.completed, end.gone) for end in world.ended] == [(403, True, False)]


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    ],
)
def test_bodiless_answers_end_with_their_head(play: Any, method: str, answer: bytes) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(answer, OK))
        reader, writer = await ask(world, get().replace(b"GET", method.encode()))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.split()[1] == answer.split()[1]
        assert (b"Content-Length: 5\r\n" in head) == (b"Content-Length: 5\r\n" in answer)
        writer.write(get())
        assert (await read_message(reader))[1] == b"ok"
        assert world.accepted == 1

    play(scenario)


def test_early_answer_reaches_a_client_that_is_still_sending(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
            await reader.read()

        await world.start(origin)
        reader, writer = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n", b"x" * 1000)
        head, body = await read_message(reader)
        assert head.startswith(b"HTTP/1.1 413 ") and b"Connection: close\r\n" in head and body == b"big"
        writer.write(b"x" * 1000)
        assert await until_closed(reader) == b""
        assert len(world.pool) == 0

    assert play(scenario).ended[0].completed


@pytest.mark.parametrize(
    ("answer", "missing"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", b"10"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"0\r\n\r\n"),
    ],
)
def test_truncated_answer_stays_truncated(play: Any, answer: bytes, missing: bytes) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(answer)

        await world.start(origin)
        reader, _ = await ask(world, get())
        received = await until_closed(reader)
        assert received.split(b"\r\n\r\n", 1)[1].replace(b"<reset>", b"").startswith(answer.split(b"\r\n\r\n", 1)[1])
        assert not received.endswith(b"0\r\n\r\n")

    world = play(scenario)
    assert [(end.completed, end.error, end.status) for end in world.ended] == [(False, "upstream_closed", 200)]


def test_close_delimited_answer_is_delimited_for_the_agent(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")

        await world.start(origin)
        reader, _ = await ask(world, get())
        assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        reader, _ = await ask(world, get(version="1.0"))
        assert (await until_closed(reader)).endswith(b"\r\n\r\nhello")

    assert [end.completed for end in play(scenario).ended] == [True, True]


def test_reset_upstream_resets_a_close_delimited_answer(play: Any) -> None:
    async def scenario(world: World) -> None:
        go = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")
            await go.wait()
            reset(writer)

        await world.start(origin)
        reader, _ = await ask(world, get(version="1.0"))
        await reader.readuntil(b"hello")
        go.set()
        assert await until_closed(reader) == b"<reset>"

    assert not play(scenario).ended[0].completed


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    ],
)
def test_upstream_garbage_is_a_502(play: Any, answer: bytes) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(answer))
        reader, _ = await ask(world, get())
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 502 ") and received.count(b"HTTP/1.1") == 1
        assert len(world.pool) == 0

    world = play(scenario)
    assert [(end.status, end.completed) for end in world.ended] == [(502, False)]


def test_bad_chunk_after_the_head_cuts_the_answer_off(play: Any) -> None:
    async def scenario(world: World) -> None:
        go = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await go.wait()
            writer.write(b"zz\r\n")
            await reader.read()

        await world.start(origin)
        reader, _ = await ask(world, get())
        await reader.readuntil(b"hello\r\n")
        go.set()
        assert b"0\r\n\r\n" not in await until_closed(reader)

    assert play(scenario).ended[0].error == "bad_chunk_size"


def test_bytes_behind_an_answer_are_never_given_to_the_next_request(play: Any) -> None:
    evil = OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"

    async def scenario(world: World) -> None:
        await world.start(answering(evil))
        reader, writer = await ask(world, get())
        assert (await read_message(reader))[1] == b"ok"
        assert len(world.pool) == 0
        writer.write(get())
        assert (await read_message(reader))[1] == b"ok"
        assert world.accepted == 2

    play(scenario)


def test_unasked_bytes_on_an_idle_connection_close_it(play: Any) -> None:
    async def scenario(world: World) -> None:
        go = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(OK)
            await go.wait()
            writer.write(OK)
            await reader.read()

        await world.start(origin)
        reader, _ = await ask(world, get())
        await read_message(reader)
        assert len(world.pool) == 1
        go.set()
        await world.until(lambda: len(world.pool) == 0)

    play(scenario)


class Upgrading(Reverse):
    def on_request(self, exchange: Any) -> None:
        exchange.allow_upgrade = exchange.head.upgrade == "websocket"
        super().on_request(exchange)


def switching(reader: Reader, writer: Writer) -> Awaitable[None]:
    async def origin() -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        protocol = re.search(rb"Upgrade: (\S+)", head)
        name = protocol[1] if protocol else b"websocket"
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: " + name + b"\r\n\r\nhi ")
        while data := await reader.read(100):
            writer.write(data.upper())
        writer.write(b" bye")

    return origin()


def test_websocket_becomes_a_tunnel(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(switching, Upgrading)
        head = get("/ws", "Connection: Upgrade", "Upgrade: websocket")
        reader, writer = await ask(world, head + b"early ")
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 ") and b"Connection: upgrade\r\nUpgrade: websocket\r\n" in answer
        assert await reader.readexactly(9) == b"hi EARLY "
        writer.write(b"late")
        assert await reader.readexactly(4) == b"LATE"
        writer.write_eof()
        assert await until_closed(reader) == b" bye"
        await world.until(lambda: world.closed == 1)

    world = play(scenario)
    end = world.ended[0]
    assert (len(world.ended), end.status, end.completed, end.error) == (1, 101, True, "")
    assert end.bytes_down > len(b"hi EARLY LATE bye") and len(world.pool) == 0


@pytest.mark.parametrize(
    ("handler", "fields"),
    [
        (Reverse, ("Connection: Upgrade", "Upgrade: websocket")),
        (Upgrading, ()),
        (Upgrading, ("Connection: upgrade", "Upgrade: h2c")),
    ],
)
def test_101_that_was_not_agreed_to_is_a_502(play: Any, handler: type[Reverse], fields: tuple[str, ...]) -> None:
    async def scenario(world: World) -> None:
        await world.start(switching, handler)
        reader, _ = await ask(world, get("/", *fields))
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 502 ")

    assert play(scenario).ended[0].error == "unasked_upgrade"


def test_each_event_of_a_stream_is_passed_on_at_once(play: Any) -> None:
    async def scenario(world: World) -> None:
        read: asyncio.Queue[None] = asyncio.Queue()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in (b"data: a\n\n", b"data: b\n\n"):
                writer.write(b"9\r\n" + event + b"\r\n")
                await read.get()
            writer.write(b"0\r\n\r\n")
            await reader.read()

        await world.start(origin)
        reader, _ = await ask(world, get())
        for event in (b"data: a\n\n", b"data: b\n\n"):
            assert (await reader.readuntil(event)).endswith(event)
            read.put_nowait(None)
        assert (await reader.readuntil(b"0\r\n\r\n")) == b"\r\n0\r\n\r\n"

    play(scenario)


class Watching:
    """A tap that keeps what it sees; ``rewrites`` makes it shout."""

    def __init__(self, rewrites: bool) -> None:
        self.rewrites = rewrites
        self.seen = b""
        self.finished = 0

    def feed(self, data: bytes) -> bytes | None:
        self.seen += data
        return data.upper() if self.rewrites else None

    def finish(self) -> bytes | None:
        self.finished += 1
        return b"!" if self.rewrites else None


class Tapped(Reverse):
    rewrites = False

    def on_request(self, exchange: Any) -> None:
        exchange.on_response = self.on_response
        super().on_request(exchange)

    def on_response(self, exchange: Any, head: Any) -> Any:
        exchange.context = Watching(self.rewrites)
        return exchange.context


class Rewriting(Tapped):
    rewrites = True


TAPPED = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhello you",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\n yo\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nhello yo",
]


@pytest.mark.parametrize("answer", TAPPED, ids=["length", "chunked", "close"])
@pytest.mark.parametrize("handler", [Tapped, Rewriting])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_tap_sees_the_content_and_may_replace_it(play: Any, answer: bytes, handler: type[Tapped], version: str) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            # The head and the first half of the body in one piece, the rest in another.
            at = answer.index(b"\r\n\r\n") + 8
            writer.write(answer[:at])
            await asyncio.sleep(0.01)
            writer.write(answer[at:] if b"Length" not in answer else answer[at:-1])

        await world.start(origin, handler)
        reader, _ = await ask(world, get("/", "Connection: close", version=version))
        received = await until_closed(reader)
        head, body = received.split(b"\r\n\r\n", 1)
        if b"chunked" in head:
            assert version == "1.1" and b"Content-Length" not in head and body.endswith(b"0\r\n\r\n")
            body = b"".join(re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n", body, re.S))
        assert body == (b"HELLO YO!" if handler.rewrites else b"hello yo")

    end = play(scenario).ended[0]
    assert end.completed and end.context.seen == b"hello yo" and end.context.finished == 1


def test_tap_of_a_bodiless_answer_sees_nothing(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(b"HTTP/1.1 204 No Content\r\n\r\n"), Rewriting)
        reader, _ = await ask(world, get("/", "Connection: close"))
        assert (await until_closed(reader)).endswith(b"\r\n\r\n")

    end = play(scenario).ended[0]
    assert (end.context.seen, end.context.finished) == (b"", 1)


def test_tap_that_raises_fails_the_request(play: Any) -> None:
    class Broken(Tapped):
        def on_response(self, exchange: Any, head: Any) -> Any:
            tap = super().on_response(exchange, head)
            tap.feed = lambda data: 1 // 0
            return tap

    async def scenario(world: World) -> None:
        world.expected_errors = ["creto relay: a tap failed"]
        await world.start(answering(OK), Broken)
        reader, _ = await ask(world, get())
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 502 ")

    assert play(scenario).ended[0].error == "tap_failed"


def test_agent_that_leaves_takes_the_upstream_with_it(play: Any) -> None:
    async def scenario(world: World) -> None:
        gone = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
            await until_closed(reader)
            gone.set()

        await world.start(origin)
        reader, writer = await ask(world, get())
        await reader.readuntil(b"hello")
        writer.close()
        await gone.wait()
        await world.until(lambda: world.closed == 1)

    world = play(scenario)
    assert [(end.gone, end.completed, end.error) for end in world.ended] == [(True, False, "client_gone")]


@pytest.mark.parametrize("how", ["close", "abort", "end"])
def test_exchange_that_nobody_else_holds_can_end(play: Any, how: str) -> None:
    class Forgetful(Reverse):
        def on_request(self, exchange: Any) -> None:
            self.send(exchange)

        def on_end(self, exchange: Any) -> None:
            self.world.refused.append((exchange.status, exchange.error))

    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
            if how != "end":
                await until_closed(reader)

        await world.start(origin, Forgetful)
        for _ in range(20):
            reader, writer = await ask(world, get())
            await reader.readuntil(b"hello")
            if how == "abort":
                writer.transport.abort()
            elif how == "close":
                writer.write_eof()
        await world.until(lambda: world.closed == 20)

    error = "upstream_closed" if how == "end" else "client_gone"
    assert play(scenario).refused == [(200, error)] * 20


def test_agent_that_leaves_while_held_is_noticed(play: Any) -> None:
    class Held(Reverse):
        def on_request(self, exchange: Any) -> None:
            self.world.requests.append(exchange)
            self.world.notify()

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Held)
        _, writer = await ask(world, get())
        await world.until(lambda: bool(world.requests))
        writer.close()
        await world.until(lambda: bool(world.ended))
        upstream = await world.dial()
        world.requests[0].forward(upstream)
        assert len(world.pool) == 1 and upstream.uses == 0

    assert play(scenario).ended[0].gone


class Sink:
    """A transport that only remembers."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def write(self, data: bytes) -> None:
        self.events.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_on_end_comes_before_the_last_bytes(form: Any) -> None:
    relay = form("relay")
    events: list[Any] = []

    class Noting:
        def on_request(self, exchange: Any) -> None:
            exchange.forward(upstream)

        def on_end(self, exchange: Any) -> None:
            events.append(("end", exchange.bytes_down, exchange.status))

    async def main() -> None:
        downstream = relay.Downstream(Noting())
        downstream.connection_made(Sink(events))
        upstream.connection_made(Sink([]))
        downstream.data_received(get())
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
        upstream.data_received(head + b"ab")
        upstream.data_received(b"cd")
        await asyncio.sleep(0)

    upstream = relay.Upstream(relay.Pool(), KEY)
    asyncio.run(main())
    first, end, last = events
    assert first.endswith(b"\r\n\r\nab") and last == b"cd"
    assert end == ("end", len(first) + 2, 200)


def test_one_write_carries_head_and_body(form: Any) -> None:
    relay = form("relay")
    down: list[Any] = []
    up: list[Any] = []

    class Passing:
        def on_request(self, exchange: Any) -> None:
            exchange.forward(upstream)

        def on_end(self, exchange: Any) -> None:
            pass

    async def main() -> None:
        downstream = relay.Downstream(Passing())
        downstream.connection_made(Sink(down))
        upstream.connection_made(Sink(up))
        downstream.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        upstream.data_received(OK)

    upstream = relay.Upstream(relay.Pool(), KEY)
    asyncio.run(main())
    assert len(up) == len(down) == 1 and up[0].endswith(b"\r\n\r\nhi") and down[0].endswith(b"\r\n\r\nok")


def stale_origin(requests: list[bytes]) -> Origin:
    async def origin(reader: Reader, writer: Writer) -> None:
        head, _ = await read_message(reader)
        requests.append(head)
        writer.write(OK)
        # Takes the second request of a connection and closes without a word.
        await reader.readuntil(b"\r\n\r\n")
        requests.append(b"lost")
        reset(writer)

    return origin


def test_stale_pooled_connection_is_replaced_once(play: Any) -> None:
    requests: list[bytes] = []

    async def scenario(world: World) -> None:
        await world.start(stale_origin(requests))
        reader, writer = await ask(world, get("/1"))
        await read_message(reader)
        writer.write(get("/2"))
        assert (await read_message(reader))[1] == b"ok"

    world = play(scenario)
    assert world.stale == 1 and [end.status for end in world.ended] == [200, 200]
    assert [head.split()[1] if head != b"lost" else head for head in requests] == [b"/1", b"lost", b"/2"]


def test_request_that_may_have_had_an_effect_is_not_repeated(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(stale_origin([]), Collecting)
        reader, writer = await ask(world, get("/1"))
        await read_message(reader)
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 502 ")

    world = play(scenario)
    assert world.stale == 0 and world.ended[1].error == "upstream_closed"


def test_upstream_that_died_before_the_send_is_replaced(play: Any) -> None:
    class Late(Reverse):
        async def connect(self, exchange: Any, how: dict[str, Any]) -> None:
            upstream = await self.world.dial()
            if not self.world.stale:
                upstream.connection_lost(None)
            exchange.forward(upstream, **how)

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Late)
        reader, _ = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        assert (await read_message(reader))[1] == b"ok"

    assert play(scenario).stale == 1


def test_own_via_is_a_loop(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, _ = await ask(world, get("/", "Via: 1.1 creto"))
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 508 ")

    world = play(scenario)
    assert world.requests == [] and world.refused == [(508, "via_loop")] and world.accepted == 0


def test_last_hop_answers_options_and_trace_itself(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, writer = await ask(world, get("/", "Max-Forwards: 0").replace(b"GET", b"OPTIONS"))
        assert (await read_message(reader))[0].startswith(b"HTTP/1.1 200 ")
        writer.write(get("/", "Max-Forwards: 0").replace(b"GET", b"TRACE"))
        assert (await read_message(reader))[0].startswith(b"HTTP/1.1 405 ")

    world = play(scenario)
    assert world.requests == [] and world.accepted == 0


@pytest.mark.parametrize(
    "message",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"\x16\x03\x01\x00\x05hello",
    ],
)
def test_smuggling_shapes_never_reach_the_handler(play: Any, message: bytes) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, _ = await ask(world, message + get("/smuggled"))
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1 ") == 1

    world = play(scenario)
    assert world.requests == [] and world.accepted == 0 and len(world.refused) == 1


def test_bad_chunk_in_a_request_is_refused_and_never_completed_upstream(play: Any) -> None:
    seen: list[bytes] = []

    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            seen.append(await until_closed(reader))

        await world.start(origin)
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await ask(world, head + b"5\r\nhello\r\n")
        await world.until(lambda: bool(world.requests) and world.requests[0].forwarded_ns > 0)
        writer.write(b"-1\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400 ")
        await world.until(lambda: bool(seen))

    assert play(scenario).ended[0].error == "bad_chunk_size"
    assert b"0\r\n\r\n" not in seen[0]


class Connecting(Reverse):
    """CONNECT opens a tunnel to the origin, except to denied.test."""

    def on_request(self, exchange: Any) -> None:
        self.world.requests.append(exchange)
        if exchange.head.authority[0] == "denied.test":
            exchange.respond(403, [], b"no")
        elif exchange.head.is_connect:
            self.world.spawn(self.open(exchange))
        else:
            self.send(exchange)

    async def open(self, exchange: Any) -> None:
        transport, _ = await self.world.loop.create_connection(asyncio.Protocol, "127.0.0.1", self.world.origin_port)
        exchange.tunnel(transport)


async def shouting(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(100):
        writer.write(data.upper())
    writer.write(b" bye")


def test_connect_tunnels_bytes_and_half_closes(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(shouting, Connecting)
        reader, writer = await ask(world, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\nearly ")
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and b"ontent-" not in answer and b"chunked" not in answer
        assert await reader.readexactly(6) == b"EARLY "
        writer.write(b"GET / HTTP/9.9\r\n")
        assert await reader.readexactly(16) == b"GET / HTTP/9.9\r\n"
        writer.write_eof()
        assert await until_closed(reader) == b" bye"
        await world.until(lambda: world.closed == 1)

    world = play(scenario)
    end = world.ended[0]
    assert (len(world.ended), end.status, end.completed, end.bytes_up) == (1, 200, True, 22)
    assert end.bytes_down == len(b"HTTP/1.1 200 Connection established\r\n\r\n") + 26


def test_rejected_connect_closes_and_nothing_after_it_is_a_request(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(shouting, Connecting)
        reader, _ = await ask(
            world, b"CONNECT denied.test:443 HTTP/1.1\r\nHost: denied.test:443\r\n\r\n" + get("/smuggled")
        )
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 403 ") and received.count(b"HTTP/1.1") == 1

    world = play(scenario)
    assert len(world.requests) == 1 and world.accepted == 0


def test_reset_inside_a_tunnel_is_passed_on(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await reader.read(4)
            reset(writer)

        await world.start(origin, Connecting)
        reader, writer = await ask(world, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\nping")
        await reader.readuntil(b"\r\n\r\n")
        assert await until_closed(reader) == b"<reset>"
        await world.until(lambda: world.closed == 1)

    end = play(scenario).ended[0]
    assert (end.completed, end.error) == (False, "connection_reset")


def test_detached_connection_is_handed_over_with_its_leftover(play: Any) -> None:
    class Detaching(Reverse):
        def on_request(self, exchange: Any) -> None:
            if exchange.head.is_connect:
                transport, leftover = exchange.detach()
                assert not transport.is_reading() and leftover.startswith(b"GET /inner")
                inner = self.world.relay.Downstream(Reverse(self.world))
                inner.adopt(transport, leftover)
            else:
                self.send(exchange)

    async def scenario(world: World) -> None:
        await world.start(answering(OK, OK), Detaching)
        reader, writer = await ask(world, b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n" + get("/inner"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert (await read_message(reader))[1] == b"ok"
        writer.write(get("/again"))
        assert (await read_message(reader))[1] == b"ok"
        assert world.closed == 0
        writer.close()
        await world.until(lambda: world.closed == 1)

    world = play(scenario)
    assert [end.head.method for end in world.ended] == ["CONNECT", "GET", "GET"]
    assert [end.completed for end in world.ended] == [True] * 3


def test_verbs_that_make_no_sense_are_errors(play: Any) -> None:
    class Wrong(Reverse):
        def on_request(self, exchange: Any) -> None:
            self.world.requests.append(exchange)
            self.world.spawn(self.try_all(exchange))

        async def try_all(self, exchange: Any) -> None:
            if exchange.head.is_connect:
                with pytest.raises(RuntimeError, match="tunnel"):
                    exchange.forward(await self.world.dial())
                exchange.respond(403, [], b"")
                return
            with pytest.raises(RuntimeError, match="CONNECT"):
                exchange.accept_tunnel()
            with pytest.raises(ValueError, match="edits"):
                exchange.forward(await self.world.dial(), edits={"content-length": "1"})
            first, second = await self.world.dial(), await self.world.dial()
            exchange.forward(first)
            with pytest.raises(RuntimeError, match="already"):
                exchange.forward(second)

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Wrong)
        reader, writer = await ask(world, get())
        assert (await read_message(reader))[1] == b"ok"
        writer.write(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 403 ")

    assert len(play(scenario).ended) == 2


def test_slow_head_times_out(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, writer = await ask(world, b"GET / HT")
        await asyncio.sleep(0.05)
        world.ticks(5)
        writer.write(b"TP/1.1\r\n")
        await asyncio.sleep(0.05)
        world.ticks(6)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408 ")

    assert play(scenario).refused == [(408, "head_timeout")]


def test_idle_connection_times_out_without_a_word(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK))
        reader, writer = await ask(world, get())
        await read_message(reader)
        world.ticks(60)
        assert not world.connections[0].transport.is_closing()
        world.ticks(20)
        assert await until_closed(reader) == b""

    assert play(scenario).refused == []


def test_body_without_progress_times_out(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await until_closed(reader)

        await world.start(origin)
        reader, writer = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
        await world.until(lambda: bool(world.requests) and world.requests[0].forwarded_ns > 0)
        world.ticks(25)
        writer.write(b"x")
        await asyncio.sleep(0.05)
        world.ticks(25)
        assert world.ended == []
        world.ticks(31)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408 ")

    assert play(scenario).ended[0].error == "body_timeout"


def test_upstream_that_does_not_answer_times_out(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await until_closed(reader)

        await world.start(origin, limits=Limits(response_s=20))
        reader, _ = await ask(world, get())
        await world.until(lambda: bool(world.requests) and world.requests[0].forwarded_ns > 0)
        world.ticks(21)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 504 ")

    assert play(scenario).ended[0].error == "upstream_timeout"


def test_held_request_has_no_deadline(play: Any) -> None:
    class Held(Reverse):
        def on_request(self, exchange: Any) -> None:
            self.world.requests.append(exchange)
            self.world.notify()

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Held)
        reader, _ = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
        await world.until(lambda: bool(world.requests))
        world.ticks(10000)
        world.requests[0].respond(200, [], b"late")
        assert (await read_message(reader))[1] == b"late"

    play(scenario)


def test_slow_agent_slows_the_upstream_down(play: Any) -> None:
    size = MANY

    async def scenario(world: World) -> None:
        sent = 0

        async def origin(reader: Reader, writer: Writer) -> None:
            nonlocal sent
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while sent < size:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()
            await reader.read()

        await world.start(origin)
        sock = socket.create_connection(("127.0.0.1", world.port))
        world.sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(get("/", "Connection: close"))
        before = -1
        while not sent or sent != before:
            before = sent
            await asyncio.sleep(0.1)
        assert 0 < sent < size
        assert world.connections[0].transport.get_write_buffer_size() < 1 << 20
        sock.setblocking(False)
        received = 0
        while piece := await world.loop.sock_recv(sock, 1 << 18):
            received += len(piece)
        assert received > size

    end = play(scenario).ended[0]
    assert end.completed and end.bytes_down > size


def test_slow_upstream_slows_the_agent_down(play: Any) -> None:
    size = MANY

    async def scenario(world: World) -> None:
        go = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await go.wait()
            left = size
            while left:
                left -= len(await reader.read(65536))
            writer.write(OK)
            await reader.read()

        await world.start(origin)
        reader, writer = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < size:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()

        world.spawn(send())
        before = -1
        while not sent or sent != before:
            before = sent
            await asyncio.sleep(0.1)
        assert 0 < sent < size
        assert world.requests[0].bytes_up < size
        go.set()
        assert (await read_message(reader))[1] == b"ok"

    assert play(scenario).ended[0].bytes_up > size


def test_unread_requests_are_held_back(play: Any) -> None:
    class Held(Reverse):
        def on_request(self, exchange: Any) -> None:
            self.world.requests.append(exchange)

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Held, Limits(hold_bytes=4096))
        reader, writer = await ask(world, get())
        writer.write(get("/next") * 20_000)
        await world.until(lambda: bool(world.connections) and not world.connections[0].transport.is_reading())
        assert len(world.requests) == 1
        world.requests[0].respond(200, [], b"1")
        assert (await read_message(reader))[1] == b"1"
        await world.until(lambda: len(world.requests) == 2)

    play(scenario)


def test_body_larger_than_the_limit_is_reported(play: Any) -> None:
    class Small(Collecting):
        limit = 4

        def on_body(self, exchange: Any, body: bytes | None) -> None:
            self.world.bodies.append(body)
            exchange.respond(413 if body is None else 200, [], body or b"")

    async def scenario(world: World) -> None:
        await world.start(answering(OK), Small)
        reader, writer = await world.agent()
        for message, status in (
            (b"Content-Length: 4\r\n\r\nabcd", b"200"),
            (b"Content-Length: 5\r\n\r\nabcde", b"413"),
            (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\nabc\r\n0\r\n\r\n", b"413"),
            (b"Content-Length: 0\r\n\r\n", b"200"),
        ):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\n" + message)
            head, _ = await read_message(reader)
            assert head.split()[1] == status and b"close" not in head

    assert play(scenario).bodies == [b"abcd", None, None, b""]


class Denying(Reverse):
    def on_request(self, exchange: Any) -> None:
        exchange.respond(403, [], b"no")


def test_denied_request_with_a_small_body_keeps_the_connection(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK), Denying)
        reader, writer = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
        assert (await read_message(reader))[1] == b"no"
        writer.write(b"worldPOST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        assert (await read_message(reader))[1] == b"no"
        writer.write(b"0\r\n\r\n" + get())
        assert (await read_message(reader))[1] == b"no"

    assert [end.status for end in play(scenario).ended] == [403, 403, 403]


@pytest.mark.parametrize("fields", [b"Content-Length: 9000000\r\n", b"Content-Length: 9\r\nExpect: 100-continue\r\n"])
def test_denied_request_whose_body_nobody_wants_closes(play: Any, fields: bytes) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK), Denying)
        reader, _ = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
        received = await until_closed(reader)
        assert b"Connection: close\r\n" in received and received.endswith(b"no")
        world.ticks(3)
        await world.until(lambda: world.closed == 1)

    play(scenario)


def test_replaced_body_and_edited_head_are_sent(play: Any) -> None:
    seen: list[tuple[bytes, bytes]] = []

    class Editing(Collecting):
        def on_body(self, exchange: Any, body: bytes | None) -> None:
            assert exchange.body == body
            self.send(exchange, body=b"x" * 20_000, target="/v2", host="b.test", edits={"X-Key": "k"})

    async def scenario(world: World) -> None:
        await world.start(answering(OK, seen=seen), Editing)
        reader, _ = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        assert (await read_message(reader))[1] == b"ok"

    play(scenario)
    head, body = seen[0]
    assert head.startswith(b"POST /v2 HTTP/1.1\r\nHost: b.test\r\n") and b"X-Key: k\r\n" in head
    assert body == b"x" * 20_000 and b"Content-Length: 20000\r\n" in head


def test_handler_that_raises_refuses_the_request(play: Any) -> None:
    class Broken(Reverse):
        def on_request(self, exchange: Any) -> None:
            raise KeyError("policy")

    async def scenario(world: World) -> None:
        world.expected_errors = ["creto relay: a handler failed"]
        await world.start(answering(OK), Broken)
        reader, _ = await ask(world, get())
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 500 ")

    world = play(scenario)
    assert [end.status for end in world.ended] == [500] and world.accepted == 0


def test_response_hook_that_raises_refuses_the_answer(play: Any) -> None:
    class Broken(Tapped):
        def on_response(self, exchange: Any, head: Any) -> Any:
            raise KeyError("tap")

    async def scenario(world: World) -> None:
        world.expected_errors = ["creto relay: a handler failed"]
        await world.start(answering(OK), Broken)
        reader, _ = await ask(world, get())
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 500 ")

    assert play(scenario).ended[0].status == 500


def test_abort_cuts_both_sides_off(play: Any) -> None:
    async def scenario(world: World) -> None:
        gone = asyncio.Event()

        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello")
            await until_closed(reader)
            gone.set()

        await world.start(origin)
        reader, _ = await ask(world, get())
        await reader.readuntil(b"hello")
        world.requests[0].abort()
        assert await until_closed(reader) == b"<reset>"
        await gone.wait()

    world = play(scenario)
    assert [(end.error, end.completed, end.gone) for end in world.ended] == [("aborted", False, False)]


def test_facts_of_an_exchange_add_up(play: Any) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def scenario(world: World) -> None:
        await world.start(answering(OK, seen=seen))
        reader, _ = await ask(world, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        head, body = await read_message(reader)
        end = world.ended[0]
        assert end.bytes_down == len(head) + len(body)
        assert end.bytes_up == len(seen[0][0]) + 2
        assert 0 < end.received_ns <= end.forwarded_ns <= end.first_byte_ns <= end.ended_ns
        assert (end.status, end.completed, end.error, end.gone, end.over) == (200, True, "", False, True)

    play(scenario)


def test_drain_finishes_what_is_in_progress(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            world.connections[0].drain()
            writer.write(OK)
            await reader.read()

        await world.start(origin)
        idle, _ = await world.agent()
        await world.until(lambda: len(world.connections) == 1 and world.connections[0].transport is not None)
        world.connections.pop().drain()
        assert await until_closed(idle) == b""
        reader, _ = await ask(world, get())
        received = await until_closed(reader)
        assert b"Connection: close\r\n" in received and received.endswith(b"ok")

    play(scenario)


def test_pool_hands_out_the_last_used_and_forgets_the_rest(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK, OK))
        world.pool = world.relay.Pool(idle_s=10, per_key=2)
        ups = [await world.dial() for _ in range(3)]
        for upstream in ups:
            upstream.release()
        assert len(world.pool) == 2 and ups[2].closed
        assert world.pool.acquire(KEY) is ups[1]
        assert world.pool.acquire("other") is None
        world.ticks(11)
        assert len(world.pool) == 0 and ups[0].closed and not ups[1].closed
        world.pool.close()
        ups[1].release()
        assert ups[1].closed and len(world.pool) == 0

    play(scenario)


def test_idle_upstream_that_closes_leaves_the_pool(play: Any) -> None:
    async def scenario(world: World) -> None:
        async def origin(reader: Reader, writer: Writer) -> None:
            await read_message(reader)
            writer.write(OK)

        await world.start(origin)
        reader, _ = await ask(world, get())
        await read_message(reader)
        await world.until(lambda: len(world.pool) == 0)

    play(scenario)


def test_tunnel_waits_for_whoever_reads_slowly(play: Any) -> None:
    size = MANY

    async def scenario(world: World) -> None:
        go = asyncio.Event()
        got = 0

        async def origin(reader: Reader, writer: Writer) -> None:
            nonlocal got
            await go.wait()
            while piece := await reader.read(65536):
                got += len(piece)
            writer.write(b"%d" % got)

        await world.start(origin, Connecting)
        reader, writer = await ask(world, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < size:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()
            writer.write_eof()

        world.spawn(send())
        before = -1
        while not sent or sent != before:
            before = sent
            await asyncio.sleep(0.1)
        go.set()
        assert await until_closed(reader) == b"%d" % size
        await world.until(lambda: world.closed == 1)

    end = play(scenario).ended[0]
    assert end.completed and end.bytes_up == size


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for "localhost" with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "localhost.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem))
    return file


def contexts(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server, client)"""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    return server, ssl.create_default_context(cafile=str(certificate))


class Intercepting(Reverse):
    """Starts TLS inside a CONNECT and gives what comes out of it to a relay of its own."""

    server: ssl.SSLContext

    def on_request(self, exchange: Any) -> None:
        if exchange.head.is_connect:
            transport, leftover = exchange.detach()
            assert leftover == b""
            self.world.spawn(self.start_tls(transport))
        else:
            exchange.allow_upgrade = True
            super().on_request(exchange)

    async def start_tls(self, transport: Any) -> None:
        inner = self.world.relay.Downstream(type(self)(self.world), scheme="https")
        self.world.connections.append(inner)
        secure = await self.world.loop.start_tls(transport, inner, self.server, server_side=True)
        inner.connection_made(secure)


async def tls_agent(world: World, client: ssl.SSLContext) -> tuple[Reader, Writer]:
    reader, writer = await ask(world, b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    await writer.start_tls(client, server_hostname="localhost")
    return reader, writer


def test_tls_is_intercepted_inside_a_connect(play: Any, certificate: Path) -> None:
    server, client = contexts(certificate)

    async def scenario(world: World) -> None:
        await world.start(answering(OK, OK), type("Here", (Intercepting,), {"server": server}))
        reader, writer = await tls_agent(world, client)
        for target in ("/1", "/2"):
            writer.write(get(target))
            assert (await read_message(reader))[1] == b"ok"
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400 ")
        await world.until(lambda: world.closed == 1)

    world = play(scenario)
    assert [end.downstream.scheme for end in world.ended] == ["http", "https", "https"]


def test_websocket_inside_intercepted_tls_is_tunnelled(play: Any, certificate: Path) -> None:
    server, client = contexts(certificate)

    async def scenario(world: World) -> None:
        await world.start(switching, type("Here", (Intercepting,), {"server": server}))
        reader, writer = await tls_agent(world, client)
        writer.write(get("/ws", "Connection: Upgrade", "Upgrade: websocket"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        writer.write(b"frame")
        assert await reader.readexactly(8) == b"hi FRAME"
        writer.close()
        await world.until(lambda: world.closed == 1)

    assert play(scenario).ended[-1].status == 101


def test_upstream_behind_tls_is_pooled_too(play: Any, certificate: Path) -> None:
    server, client = contexts(certificate)

    async def scenario(world: World) -> None:
        async def dial() -> Any:
            _, upstream = await world.loop.create_connection(
                lambda: world.relay.Upstream(world.pool, KEY),
                "127.0.0.1",
                world.origin_port,
                ssl=client,
                server_hostname="localhost",
            )
            return upstream

        await world.start(answering(OK, OK, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel"), origin_tls=server)
        world.dial = dial  # type: ignore[method-assign]
        reader, writer = await world.agent()
        for _ in range(2):
            writer.write(get())
            assert (await read_message(reader))[1] == b"ok"
        assert world.accepted == 1 and len(world.pool) == 1

    play(scenario)


def test_nothing_outlives_its_connection(play: Any) -> None:
    async def scenario(world: World) -> None:
        await world.start(answering(OK, OK, OK))
        for _ in range(3):
            reader, writer = await ask(world, get("/", "Connection: close"))
            await until_closed(reader)
        await world.until(lambda: world.closed == 3)
        world.pool.close()
        await world.until(lambda: world.relay.wheel_of(world.loop).placed == 0)

    world = play(scenario)
    assert [end.completed for end in world.ended] == [True] * 3
