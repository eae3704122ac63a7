"""No agent takes everything: requests, connections, memory and the loop itself are shared out, creto stays reachable."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_hotpath.relay import Limits as RelayLimits
from creto_proxy.errors import Transient
from creto_proxy.hookspecs import Client
from creto_proxy.model import Decision, Request
from creto_proxy.protect import Agents, Arrivals, Load, Memory, Protection
from creto_proxy.protect.load import MOST
from creto_proxy.settings import Limits, Protect

from .protect_lab import Moved, answer_of, lab, post, server, until
from .test_pipeline import approve

CONTROL = b"GET http://creto.internal/v1/whoami HTTP/1.1\r\nHost: creto.internal\r\n\r\n"


def get(port: int) -> bytes:
    return f"GET http://up.test:{port}/ HTTP/1.1\r\nHost: up.test:{port}\r\n\r\n".encode()


# -- requests and connections of one agent


async def test_an_agent_has_so_many_requests_under_way_and_can_still_ask_creto(tmp_path: Path) -> None:
    agents = Agents(requests=2, connections=0)
    async with server(held=True) as up, lab(tmp_path, protection=Protection(agents=agents)) as here:
        waiting = [asyncio.create_task(here.get(up.port)) for _ in range(2)]
        await until(lambda: up.requests == 2)
        refused = await here.get(up.port)
        assert (refused.status, refused.reason, refused.fields["retry-after"]) == (429, "too_many_requests", "1")
        assert (await here.send(CONTROL)).status == 200
        up.hold.set()
        assert [(await each).status for each in waiting] == [200, 200]
        assert (await here.get(up.port)).status == 200
        assert [requests for requests, _ in agents.in_use().values()] == [0]
    assert sorted(o.status for o in here.journal()) == [200, 200, 200, 429]


async def test_places_are_given_back_however_a_request_ends(tmp_path: Path) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")

    agents = Agents(requests=5, connections=5)
    protection = Protection(agents=agents)
    async with server(broken) as cut, server(held=True) as up, lab(tmp_path, protection=protection) as here:
        assert (await here.get(cut.port)).status == 0
        assert (await here.get(1)).status == 502
        assert (await here.send(get(up.port).replace(b"up.test", b"no host"))).status == 400
        reader, writer = await here.connect()
        writer.write(get(up.port))
        await until(lambda: up.requests == 1)
        assert list(agents.in_use().values()) == [(1, 1)]
        writer.transport.abort()
        await until(lambda: list(agents.in_use().values()) == [(0, 0)])


async def test_an_agent_has_so_many_connections_and_a_tunnel_is_one(tmp_path: Path) -> None:
    agents = Agents(requests=0, connections=2)
    async with server() as up, lab(tmp_path, protection=Protection(agents=agents)) as here:
        first, second = await here.connect(), await here.connect()
        for reader, writer in (first, second):
            writer.write(get(up.port))
            assert (await answer_of(reader)).status == 200
        refused = await here.send(get(up.port))
        assert (refused.status, refused.reason) == (429, "too_many_connections")
        writer = first[1]
        writer.write(f"CONNECT up.test:{up.port} HTTP/1.1\r\nHost: up.test:{up.port}\r\n\r\n".encode())
        assert (await answer_of(first[0])).status == 200
        writer.write(b"GET / HTTP/1.1\r\nHost: up.test:%d\r\n\r\n" % up.port)
        assert (await answer_of(first[0])).status == 200
        assert list(agents.in_use().values()) == [(0, 2)]
        assert (await here.send(get(up.port))).status == 429
        for _, each in (first, second):
            each.close()
        await until(lambda: list(agents.in_use().values()) == [(0, 0)])
        assert (await here.send(get(up.port))).status == 200


async def test_a_tls_handshake_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    agents = Agents(requests=5, connections=5)
    async with lab(tmp_path, protection=Protection(agents=agents)) as here:
        for _ in range(10):
            reader, writer = await here.connect()
            writer.write(b"CONNECT up.test:443 HTTP/1.1\r\nHost: up.test:443\r\n\r\n")
            assert (await answer_of(reader)).status == 200
            writer.write(client_hello() + b"\x17\x03\x03\x00\x05hello" * 50)
            await reader.read()
            writer.close()
        await until(lambda: here.gateway.connections == 0)
        assert list(agents.in_use().values()) == [(0, 0)]
    assert [o.error for o in here.journal()] == ["bad_connection"] * 10


def client_hello() -> bytes:
    import ssl

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="up.test")
    with pytest.raises(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


async def test_connections_that_come_too_fast_by_one_link_are_reset(tmp_path: Path) -> None:
    clock = Moved()
    async with server() as up, lab(tmp_path, protection=Protection(arrivals=Arrivals(3, clock))) as here:
        assert [(await here.get(up.port)).status for _ in range(4)] == [200, 200, 200, 0]
        clock.now += 0.34
        assert [(await here.get(up.port)).status for _ in range(2)] == [200, 0]


@given(st.lists(st.floats(0, 2), max_size=100), st.integers(1, 20))
def test_no_second_has_more_arrivals_than_twice_its_rate(gaps: list[float], rate: int) -> None:
    clock = Moved()
    arrivals = Arrivals(rate, clock)
    admitted = []
    for gap in gaps:
        clock.now += gap
        if arrivals.admit("link"):
            admitted.append(clock.now)
        assert sum(at > clock.now - 1 for at in admitted) <= 2 * rate
    assert arrivals.admit("another link")


# -- memory


class Waiting:
    """A gate that says yes when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.held = 0

    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        self.held += 1
        await self.go.wait()
        return approve(request)

    def spend(self, request: Request) -> bool:
        return True

    def settled(self, request: Request, outcome: object) -> None:
        return None


BODY = 8000


async def test_what_is_held_stays_within_its_budget_and_all_of_it_comes_back(tmp_path: Path) -> None:
    """Whole bodies waiting for a person, halves that go on coming, and agents that leave in the middle."""
    gate, memory = Waiting(), Memory(100_000)
    parts = {"gate": gate, "protection": Protection(memory=memory), "held_body_bytes": 10_000}
    async with server() as up, lab(tmp_path, **parts) as here:
        whole = [asyncio.create_task(here.send(post(up.port, "held.test", f"Content-Length: {BODY}", bytes(BODY))))
                 for _ in range(5)]  # fmt: skip
        await until(lambda: gate.held == 5)
        assert memory.used == 5 * BODY
        halves = [await here.connect() for _ in range(3)]
        for number, (_, writer) in enumerate(halves):
            framing = "Transfer-Encoding: chunked" if number == 2 else f"Content-Length: {BODY}"
            writer.write(post(up.port, "held.test", framing, b"4\r\nhalf"))
        await until(lambda: memory.used == 5 * BODY + 2 * BODY + 10_000)
        raw = post(up.port, "held.test", f"Content-Length: {BODY}", bytes(BODY))
        more = [asyncio.create_task(here.send(raw)) for _ in range(20)]
        await until(lambda: sum(each.done() for each in more) == 18 and gate.held == 7)
        refused = [each.result() for each in more if each.done()]
        assert {(each.status, each.reason) for each in refused} == {(503, "memory_pressure")}
        assert {each.fields["retry-after"] for each in refused} == {"1"}
        assert (await here.send(CONTROL)).status == 200
        asked = await here.send(post(80, "creto.internal", "Content-Length: 3", b"abc"))
        assert asked.status == 404, "there is room for questions to creto itself"
        assert memory.used <= memory.peak <= memory.limit
        for _, writer in halves:
            writer.transport.abort()
        await until(lambda: memory.used == 7 * BODY)
        assert (await here.get(up.port)).status == 200, "what holds no body is not concerned"
        gate.go.set()
        assert [(await each).status for each in whole] == [200] * 5
        assert sorted([(await each).status for each in more]) == [200] * 2 + [503] * 18
        await until(lambda: memory.used == 0)
        assert memory.refused == 18


async def test_a_body_that_turns_out_too_large_is_given_back_too(tmp_path: Path) -> None:
    memory = Memory(100_000)
    parts = {"gate": Waiting(), "protection": Protection(memory=memory), "held_body_bytes": 1000}
    async with lab(tmp_path, **parts) as here:
        chunked = post(1, "held.test", "Transfer-Encoding: chunked", b"7d0\r\n" + bytes(2000) + b"\r\n")
        assert (await here.send(chunked)).status == 413
        assert (await here.send(post(1, "held.test", "Content-Length: 2000", bytes(2000)))).status == 413
        await until(lambda: memory.used == 0)
        assert memory.peak == 1000


async def test_what_waits_unread_in_a_connection_is_bounded_for_each(tmp_path: Path) -> None:
    """An agent that sends on while its call is held is not read any more."""
    gate = Waiting()
    limits = RelayLimits(hold_bytes=16384)
    async with server() as up, lab(tmp_path, gate=gate, limits=limits, held_body_bytes=10_000) as here:
        reader, writer = await here.connect()
        writer.write(post(up.port, "held.test", "Content-Length: 3", b"abc"))
        await until(lambda: gate.held == 1)
        writer.write(bytes(32 << 20))
        await asyncio.sleep(0.1)  # nothing to await: it must not be read
        assert writer.transport.get_write_buffer_size() > 1 << 20
        writer.transport.abort()
        gate.go.set()


# -- load


async def test_while_overloaded_new_requests_are_refused_first_and_creto_answers(tmp_path: Path) -> None:
    load = Load(chance=lambda: 0.5)
    async with server() as up, lab(tmp_path, protection=Protection(load=load)) as here:
        load.shedding = 0.6
        refused = await here.get(up.port)
        assert (refused.status, refused.reason) == (503, "overloaded") and int(refused.fields["retry-after"]) >= 1
        assert up.connections == 0 and load.refused == 1
        assert (await here.send(CONTROL)).status == 200
        load.shedding = 0.4
        assert (await here.get(up.port)).status == 200
    assert [(o.status, o.error) for o in here.journal()] == [(503, "overloaded"), (200, "")]


async def test_a_held_request_is_answered_while_others_are_turned_away(tmp_path: Path) -> None:
    gate, load = Waiting(), Load(chance=lambda: 0.0)
    async with server() as up, lab(tmp_path, gate=gate, protection=Protection(load=load)) as here:
        held = asyncio.create_task(here.send(post(up.port, "held.test", "Content-Length: 3", b"abc")))
        await until(lambda: gate.held == 1)
        load.shedding = MOST
        assert (await here.get(up.port)).status == 503
        gate.go.set()
        assert (await held).status == 200


async def test_a_loop_that_is_kept_busy_sheds_and_recovers_by_itself() -> None:
    load = Load(0.1)
    load.start()
    try:
        async with asyncio.timeout(90):
            while not load.shedding:
                time.sleep(0.15)  # what a loop is kept busy by
                await asyncio.sleep(0)
            assert load.lag_s > 0.1
            while load.shedding:
                await asyncio.sleep(0.01)
    finally:
        load.stop()


@given(st.lists(st.floats(0, 2), max_size=200))
def test_shedding_is_a_part_that_grows_while_it_is_late_and_ends_when_it_is_not(lags: list[float]) -> None:
    clock = Moved()
    load = Load(0.25, now=clock)
    for lag in lags:
        clock.now += 0.1 + lag
        before = load.shedding
        load.look(clock.now, lag)
        assert 0 <= load.shedding <= MOST
        if load.lag_s > 0.25:
            assert load.shedding > before or load.shedding == MOST
        else:
            assert load.shedding < before or load.shedding == 0
    for _ in range(60):
        clock.now += 0.1
        load.look(clock.now, 0.0)
    assert load.shedding == 0


def test_one_slow_stage_or_one_stopped_process_sheds_nothing() -> None:
    clock = Moved()
    load = Load(0.25, now=clock)
    for number in range(100):
        lag = 5.0 if number % 20 == 19 else 0.3 if number % 5 == 0 else 0.0
        clock.now += 0.1 + lag
        load.look(clock.now, lag)
        assert load.shedding == 0


# -- configuration


def test_what_is_off_is_none_and_the_default_limits_no_agent() -> None:
    default = Protection.configured(Limits(), Protect())
    assert default.agents is None and default.arrivals is None and default.load.shedding == 0
    limited = Protection.configured(
        Limits(requests_per_agent=1, connections_per_second=5, held_total_bytes=64), Protect(shed_lag_ms=0)
    )
    assert limited.agents is not None and limited.arrivals is not None
    with pytest.raises(Transient, match="holds as many"):
        limited.memory.take(65)
    limited.load.start()  # off: no loop is needed


def test_an_unlimited_memory_still_counts() -> None:
    memory = Memory()
    memory.take(1 << 40)
    memory.give(1 << 40)
    assert (memory.used, memory.peak, memory.refused) == (0, 1 << 40, 0)
