"""The express lane: what takes it, what is left to the handler, and that it charges and records as the handler would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from .conftest import Form

ONE = (1,)
HOST = "up.test"


class Asked:
    """A handler that forwards everything, and teaches the lane what it has forwarded."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def on_request(self, exchange: Any) -> None:
        self.lab.asked.append(exchange.head.target)
        upstream = self.lab.pool.acquire("key")
        if upstream is not None:
            self.send(exchange, upstream)
        else:
            self.lab.spawn(self.connect(exchange))

    async def connect(self, exchange: Any) -> None:
        self.send(exchange, await self.lab.dial())

    def send(self, exchange: Any, upstream: Any) -> None:
        if self.lab.teaches:
            self.lab.learned.append(self.lab.learn(exchange.head, upstream))
        exchange.forward(upstream, host=HOST)

    def on_stale(self, exchange: Any) -> None:
        self.lab.spawn(self.connect(exchange))

    def on_end(self, exchange: Any) -> None:
        self.lab.ended += 1

    def on_body(self, exchange: Any, body: bytes | None) -> None: ...
    def on_bad_request(self, error: Any) -> bytes:
        return f"HTTP/1.1 {error.status} no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

    def on_close(self) -> None: ...


class Lab:
    """One connection's lane between an origin that answers "ok" and a client on a real socket."""

    def __init__(self, form: Form, directory: Path, limit: int, options: dict[str, Any]) -> None:
        self.form = form
        directory.mkdir(exist_ok=True)
        size = options.pop("segment_bytes", 1 << 20)
        self.journal = form("journal").Journal(str(directory), "w", flush="record", segment_bytes=size)
        self.padding = options.pop("padding", b"")
        self.table = form("admit").DecisionTable(64)
        self.table.epoch = 1
        self.quota = form("quota").QuotaTable(str(directory / "quota.tab"))
        self.key = self.quota.key("budget")
        self.quota.define(self.key, form("quota").TOTAL, limit)
        self.path = self.quota.path([(self.key, 0)])
        self.pool = form("relay").Pool()
        self.exact = options.pop("exact", False)
        self.life_ns = options.pop("life_ns", 60 * 10**9)
        self.base = options.pop("base", "")
        self.lane = form("express").Express(self.journal, **options)
        self.asked: list[str] = []
        self.learned: list[bool] = []
        self.received: list[bytes] = []
        self.ended = 0
        self.teaches = True
        self.closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._writers: list[asyncio.StreamWriter] = []

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def learn(self, head: Any, upstream: Any) -> bool:
        express = self.form("express")
        standing = express.Standing(
            stack=upstream.stack,
            host=HOST,
            table=self.table,
            epoch=self.table.epoch,
            expires_ns=time.monotonic_ns() + self.life_ns,
            record=(b"\x9c" if self.padding else b"\x9b", *range(express.FACTS), *([self.padding] if self.padding else [])),
            base=self.base,
            quota=self.quota,
            path=self.path,
            amounts=ONE,
            ttl_ns=10**9,
        )
        learned: bool = self.lane.learn(head, standing, exact=self.exact)
        return learned

    async def dial(self) -> Any:
        make = lambda: self.form("relay").Upstream(self.pool, "key")  # noqa: E731
        _, upstream = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", self.origin)
        return upstream

    async def start(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.append(writer)
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    size = next((int(x[16:]) for x in head.split(b"\r\n") if x.startswith(b"Content-Length: ")), 0)
                    self.received.append(head + await reader.readexactly(size))
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        loop = asyncio.get_running_loop()
        origin = await asyncio.start_server(serve, "127.0.0.1", 0)
        relay = await loop.create_server(
            lambda: self.form("relay").Downstream(Asked(self), lane=self.lane), "127.0.0.1", 0
        )
        self._servers = [origin, relay]
        self.origin = origin.sockets[0].getsockname()[1]
        self.port = relay.sockets[0].getsockname()[1]
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, target: str = "/a", *fields: str, method: str = "GET", body: bytes = b"") -> bytes:
        """The status line and body of one answer on the connection that is kept."""
        head = [f"{method} {target} HTTP/1.1", f"Host: {HOST}", *fields]
        if body:
            head.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        answer = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)
        return answer.partition(b"\r\n")[0] + b" " + await self.reader.readexactly(2)

    def drop_origin(self) -> None:
        """The origin closes the connections it has, without a word."""
        for writer in self._writers:
            writer.transport.abort()

    def records(self) -> list[list[Any]]:
        found: list[list[Any]] = []
        for path in self.form("journal").files.segments(Path(self.journal.path).parent, "w"):
            found += [msgpack.unpackb(payload) for payload, _ in self.form("journal").read_frames(path)]
        return found

    async def stop(self) -> None:
        self.writer.close()
        for server in self._servers:
            server.close()
        self.pool.close()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0.02)
        self.journal.close()
        self.quota.close()


@asynccontextmanager
async def lab(form: Form, directory: Path, limit: int = 1000, **options: Any) -> AsyncIterator[Lab]:
    here = Lab(form, directory, limit, options)
    await here.start()
    try:
        yield here
    finally:
        await here.stop()


async def test_the_second_request_of_a_shape_is_not_asked_about(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        assert await here.ask("/a?q=1") == b"HTTP/1.1 200 OK ok"
        assert await here.ask("/b?q=2", "X-Other: 1") == b"HTTP/1.1 200 OK ok"
        assert here.asked == ["/a?q=1"] and here.lane.taken == 1
        assert here.received[1].startswith(b"GET /b?q=2 HTTP/1.1\r\nHost: up.test\r\n")
        assert here.ended == 1, "what the lane took ends in the lane"


async def test_it_charges_and_records_what_it_takes(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        before = time.time_ns()
        await here.ask("/b/c?secret=1")
        state = here.quota.state(here.key, time.time_ns())
        assert (state.used, state.reserved) == (1, 0)
        [record] = here.records()
        identity, at, target, status, error, up, down, creto, upstream, total, trace = record
        assert identity[6] >> 4 == 7 and identity[8] >> 6 == 2 and len(identity) == 16
        assert abs(int.from_bytes(identity[:6], "big") - at // 10**6) <= 1 and before <= at <= time.time_ns()
        assert (target, status, error, trace) == ("/b/c", 200, "", "")
        assert up == len(here.received[1]) and down > 40
        assert creto >= 0 and 0 < upstream <= total


async def test_ids_do_not_repeat(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        for _ in range(200):
            await here.ask()
        assert len({record[0] for record in here.records()}) == 199


@pytest.mark.parametrize(
    "fields",
    [("Upgrade: websocket", "Connection: upgrade"), ("Proxy-Authorization: Basic eDp5",), ("X-Barred: 1",), ("x-baRRed:",)],
)
async def test_what_the_handler_must_see_it_sees(form: Form, tmp_path: Path, fields: tuple[str, ...]) -> None:
    async with lab(form, tmp_path, barred=("X-Barred",)) as here:
        await here.ask()
        await here.ask("/a", *fields)
        assert len(here.asked) == 2 and here.lane.taken == 0 and here.learned == [True, False]


async def test_values_of_named_fields_are_part_of_the_shape(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, named=("accept", "mcp-method")) as here:
        await here.ask("/a", "Accept: x")
        await here.ask("/a", "ACCEPT: x")
        assert here.lane.taken == 1
        for fields in [(), ("Accept: y",), ("Accept:",), ("Mcp-Method: x",), ("Accept: x", "Mcp-Method:")]:
            await here.ask("/a", *fields)
        assert here.lane.taken == 1 and len(here.asked) == 6
        await here.ask("/a", "Accept: x", "Accept: x")
        assert here.lane.taken == 1 and here.learned[-1] is False, "a field that comes twice has no one value"


async def test_methods_and_hosts_are_part_of_the_shape(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        await here.ask(method="DELETE")
        assert here.lane.taken == 0
        here.writer.write(b"GET /a HTTP/1.1\r\nHost: other.test\r\n\r\n")
        await here.reader.readuntil(b"ok")
        assert here.lane.taken == 0 and len(here.asked) == 3


@pytest.mark.parametrize("target", ["/a%2Fb", "/a//b", "/a/./b", "/a;x=1", "/a\\b", "/.a", "/%61"])
async def test_a_path_that_servers_read_differently_is_asked_about(form: Form, tmp_path: Path, target: str) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        await here.ask(target)
        assert here.asked == ["/a", target] and here.learned == [True, False]


async def test_an_exact_standing_is_for_one_path_only(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, exact=True) as here:
        for target in ("/a%2F", "/a%2F?x", "/a%2f", "/a%2F/b", "/"):
            await here.ask(target)
        assert here.asked == ["/a%2F", "/a%2f", "/a%2F/b", "/"]


async def test_bodies_stream_through_the_lane(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask(method="POST", body=b"one")
        await here.ask(method="POST", body=b"two" * 40_000)
        assert here.lane.taken == 1 and here.received[1].endswith(b"two" * 40_000)
        assert here.records()[0][5] == len(here.received[1])


async def test_routes_by_prefix_replace_it(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, prefixes=("/up/eu", "/up"), base="/v1") as here:
        here.teaches = True
        await here.ask("/up/x")
        await here.ask("/up/y?z")
        assert here.received[1].startswith(b"GET /v1/y?z HTTP/1.1") and here.records()[0][2] == "/v1/y"
        await here.ask("/up/eu/x")
        await here.ask("/upper/x")
        await here.ask("/up")
        assert here.lane.taken == 1 and here.learned == [True, True, False, False]


async def test_requests_to_a_proxy_are_known_by_their_authority(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, absolute=True) as here:
        for target in ("http://a.test/x", "http://a.test/y", "http://a.test:81/x", "https://a.test/x", "/x", "http://a.test?q"):
            await here.ask(target)
        assert here.lane.taken == 1
        assert here.received[1].startswith(b"GET /y HTTP/1.1\r\nHost: up.test\r\n")


async def test_a_standing_ends_with_its_time(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, life_ns=0) as here:
        await here.ask()
        await here.ask()
        assert here.lane.taken == 0


async def test_a_standing_ends_with_its_policies(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        here.teaches = False
        here.table.epoch = 2
        await here.ask()
        assert here.lane.taken == 0 and len(here.asked) == 2
        here.lane.clear()
        assert len(here.lane) == 0


async def test_a_quota_that_refuses_is_left_to_the_handler_and_counted_by_it(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, limit=3) as here:
        for _ in range(6):
            await here.ask()
        assert here.lane.taken == 3 and len(here.asked) == 3
        state = here.quota.state(here.key, time.time_ns())
        assert (state.used, state.reserved, state.denied) == (3, 0, 0)


async def test_without_an_idle_connection_the_handler_dials(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        here.pool.acquire("key").release()
        taken = here.pool.acquire("key")
        await here.ask()
        assert here.lane.taken == 0 and len(here.asked) == 2
        taken.release()
        await here.ask()
        assert here.lane.taken == 1
        assert here.quota.state(here.key, time.time_ns()).used == 1


async def test_a_connection_that_died_gives_the_request_back(form: Form, tmp_path: Path) -> None:
    """The origin closes while the request is on its way; the handler is asked and dials."""
    async with lab(form, tmp_path) as here:
        await here.ask()
        upstream = here.pool.acquire("key")
        upstream.release()
        await here.ask()
        # Reading is paused, so that the relay cannot know yet that the origin is gone.
        upstream.transport.pause_reading()
        here.drop_origin()
        await asyncio.sleep(0.02)
        asking = asyncio.create_task(here.ask("/again"))
        await asyncio.sleep(0.05)
        upstream.transport.resume_reading()
        assert await asking == b"HTTP/1.1 200 OK ok"
        assert here.asked == ["/a", "/again"] and here.lane.taken == 2
        state = here.quota.state(here.key, time.time_ns())
        assert (state.used, state.reserved) == (1, 0), "what was held for it is given back"
        assert [record[2] for record in here.records()] == ["/a"], "the handler records what it did itself"


async def test_an_unhealthy_journal_keeps_everything_off_the_lane(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()

        class Broken:
            healthy = False

        if form.compiled:
            pytest.skip("the compiled lane takes compiled journals only; the journal's own tests break it")
        here.lane.journal = Broken()
        await here.ask()
        assert here.lane.taken == 0


async def test_an_agent_that_leaves_is_recorded_and_charged(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path) as here:
        await here.ask()
        here.writer.write(b"POST /slow HTTP/1.1\r\nHost: up.test\r\nContent-Length: 9\r\n\r\nhalf")
        here.lane.clear()
        await here.writer.drain()
        while len(here.asked) < 2:
            await asyncio.sleep(0.005)
        here.writer.write(b"-done")
        await here.reader.readuntil(b"ok")
        here.writer.write(b"POST /gone HTTP/1.1\r\nHost: up.test\r\nContent-Length: 9\r\n\r\nhalf")
        while here.lane.taken < 1:
            await asyncio.sleep(0.005)
        here.writer.transport.abort()
        while not here.records():
            await asyncio.sleep(0.005)
        [record] = here.records()
        assert (record[2], record[4]) == ("/gone", "client_gone")
        state = here.quota.state(here.key, time.time_ns())
        assert (state.used, state.reserved) == (1, 0)


def test_a_standing_must_make_sense(form: Form, tmp_path: Path) -> None:
    express, relay = form("express"), form("relay")
    table = form("quota").QuotaTable(str(tmp_path / "q.tab"))
    given: dict[str, Any] = {
        "stack": relay.Pool().stack("k"), "host": "h", "table": form("admit").DecisionTable(8), "epoch": 1, "expires_ns": 1,
    }  # fmt: skip
    with pytest.raises(ValueError):
        express.Standing(**given, record=(b"x", express.FACTS))
    with pytest.raises(ValueError):
        express.Standing(**given, record=(), quota=table)
    table.close()


async def test_standings_are_bounded(form: Form, tmp_path: Path) -> None:
    async with lab(form, tmp_path, exact=True) as here:
        await here.ask("/first")
        parse = form("http1").read_request
        upstream = here.pool.acquire("key")
        for n in range(form("express").LIMIT):
            here.learn(parse(f"GET /{n} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode(), 0), upstream)
        upstream.release()
        assert 0 < len(here.lane) <= form("express").LIMIT
        long = "/" + "x" * form("express").KEY_LIMIT
        await here.ask(long)
        assert here.learned[-1] is False


async def test_records_are_whole_again_when_read(form: Form, tmp_path: Path) -> None:
    """However little of them was written: targets of any length, over the ends of segments, from two lanes in turn."""
    async with lab(form, tmp_path, segment_bytes=3000) as here, lab(form, tmp_path / "b", segment_bytes=3000) as other:
        await here.ask()
        await other.ask()
        targets = ["/", "/" + "x" * 240, "/" + "y" * 300, "/" + "z" * 900, "/a", "/b" * 40, "/c"] * 6
        for target in targets:
            await here.ask(target)
            await other.ask("/other")
        assert here.lane.taken == other.lane.taken == len(targets)
        assert [record[2] for record in here.records()] == targets
        assert {record[2] for record in other.records()} == {"/other"}
        assert all(record[3] == 200 and record[4] == "" and record[9] > 0 for record in here.records())
        assert len(form("journal").files.segments(tmp_path, "w")) > 1


async def test_a_record_takes_a_fraction_of_what_it_says(both: tuple[Form, Form], tmp_path: Path) -> None:
    compiled, _ = both
    async with lab(compiled, tmp_path, padding=b"\xda\x01\x00" + b"p" * 256) as here:
        await here.ask()
        for _ in range(50):
            await here.ask("/b")
        assert len(here.records()) == 50 and all(len(record) == 12 for record in here.records())
        assert sum(path.stat().st_size for path in compiled("journal").files.segments(tmp_path, "w")) >= 50 * 60
        assert here.journal.offset < 50 * 150, "of 330 bytes each"
