"""What agents are told, and what that costs upstream."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creto_proxy.dns import CONTROL_ADDRESS, SYNTHETIC, Bindings, Budget, DnsServer, Resolver
from creto_proxy.dns.message import AAAA, A
from creto_proxy.errors import StageFailed
from creto_proxy.model import Address, Agent, Decision, Verdict
from creto_proxy.settings import Endpoint
from creto_proxy.testing import FakeClock

from ..ports import free_port
from .dns_lab import CNAME, Upstream, name_server, question, read_reply

PUBLIC, OTHER, PRIVATE = "93.184.216.34", "93.184.216.35", "169.254.169.254"
REFUSED, SERVFAIL, NXDOMAIN = 5, 2, 3
PIN = Endpoint(ipaddress.IPv4Address("127.0.0.1"), 8443)

ZONE = {
    ("api.allowed.test", A): [("api.allowed.test", A, 30, PUBLIC)],
    ("api.allowed.test", AAAA): [("api.allowed.test", AAAA, 30, "2606:4700::1")],
    ("meta.allowed.test", A): [("meta.allowed.test", A, 30, PRIVATE)],
    ("mixed.allowed.test", A): [("mixed.allowed.test", A, 30, "10.200.0.1"), ("mixed.allowed.test", A, 30, OTHER)],
    ("alias.allowed.test", A): [("alias.allowed.test", CNAME, 9, "cdn.test"), ("cdn.test", A, 30, PUBLIC)],
    ("evil.test", A): [("evil.test", A, 30, PUBLIC)],
}

AGENT = Agent("spiffe://local/agent/a", "a", ("spiffe://local/human/h",), bytes(32), (), 0.0)


@dataclass
class Lab:
    """A DnsServer under a simple policy: names below allowed.test, public addresses."""

    upstream: Upstream
    clock: FakeClock
    told: list[tuple[str, str]] = field(default_factory=list)
    versions: frozenset[int] = frozenset((4, 6))
    fault: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.bindings = Bindings(now_s=self.now_s)
        self.server = self.make()

    def now_s(self) -> float:
        return self.clock.now_ns() / 1e9

    def make(self, budget: Budget | None = None) -> DnsServer:
        resolver = Resolver([self.upstream.endpoint], timeout_s=0.2, usable=lambda: self.versions, now_s=self.now_s)
        return DnsServer(
            link="run",
            agent=lambda: AGENT,
            decide=self.decide,
            address_allowed=self.address_allowed,
            resolver=resolver,
            bindings=self.bindings,
            pins={"pinned.allowed.test": PIN, "pinned.evil.test": PIN},
            refused=lambda link, agent, name, decision: self.told.append((name, decision.reason)),
            budget=budget or Budget(),
            now_s=self.now_s,
        )

    def decide(self, agent: Agent, name: str, port: int | None) -> Decision:
        if self.fault is not None:
            self.fault()
        allowed = name.endswith(".allowed.test")
        return Decision(Verdict.ALLOW if allowed else Verdict.DENY, "host_allowed" if allowed else "host_not_allowed")

    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        return Decision(Verdict.ALLOW if address.is_global else Verdict.DENY, "address_not_public")

    async def ask(self, name: str, kind: int = A) -> tuple[int, list[str]]:
        data = await self.server.reply(question(name, kind))
        assert data is not None
        reply = read_reply(data)
        return reply.rcode, reply.addresses

    def names(self, address: str) -> tuple[str, ...]:
        return self.bindings.names("run", ipaddress.ip_address(address))


@pytest.fixture
async def lab(clock: FakeClock) -> AsyncIterator[Lab]:
    async with name_server(ZONE) as upstream:
        yield Lab(upstream, clock)


async def test_allowed_name_is_answered_and_bound(lab: Lab) -> None:
    assert await lab.ask("api.allowed.test") == (0, [PUBLIC])
    assert await lab.ask("api.allowed.test", AAAA) == (0, ["2606:4700::1"])
    assert lab.names(PUBLIC) == lab.names("2606:4700::1") == ("api.allowed.test",)


async def test_refused_name_causes_no_packet_and_is_told(lab: Lab) -> None:
    assert await lab.ask("evil.test") == (REFUSED, [])
    assert await lab.ask("secret-data.evil.test", AAAA) == (REFUSED, [])
    assert lab.upstream.asked == []
    assert lab.told == [("evil.test", "host_not_allowed"), ("secret-data.evil.test", "host_not_allowed")]


async def test_the_questions_of_one_lookup_are_one_refusal(lab: Lab) -> None:
    for kind in (A, AAAA, A):
        await lab.ask("evil.test", kind)
    assert len(lab.told) == 1
    lab.clock.advance(5)
    await lab.ask("evil.test")
    assert len(lab.told) == 2


@pytest.mark.parametrize("kind", [2, 10, 12, 15, 16, 33, 251, 252, 255, 1234])
async def test_types_that_carry_more_than_addresses_are_refused(lab: Lab, kind: int) -> None:
    assert await lab.ask("api.allowed.test", kind) == (REFUSED, [])
    assert lab.upstream.asked == []
    assert lab.told == [("api.allowed.test", "dns_type_refused")]


@pytest.mark.parametrize("kind", [64, 65])
async def test_service_bindings_are_empty_so_no_ech_key_is_learned(lab: Lab, kind: int) -> None:
    assert await lab.ask("api.allowed.test", kind) == (0, [])
    assert await lab.ask("evil.test", kind) == (REFUSED, [])
    assert lab.upstream.asked == []


async def test_class_other_than_internet_is_refused(lab: Lab) -> None:
    reply = await lab.server.reply(question("api.allowed.test")[:-2] + b"\0\3")
    assert reply is not None and read_reply(reply).rcode == REFUSED


async def test_private_answer_is_filtered_and_told(lab: Lab) -> None:
    assert await lab.ask("meta.allowed.test") == (0, [])
    assert lab.told == [("meta.allowed.test", "dns_answer_filtered")]
    assert lab.names(PRIVATE) == ()


async def test_mixed_answer_keeps_its_public_part(lab: Lab) -> None:
    assert await lab.ask("mixed.allowed.test") == (0, [OTHER])
    assert lab.names("10.200.0.1") == ()
    assert lab.told == []


async def test_alias_is_flattened_and_the_asked_name_is_bound(lab: Lab) -> None:
    data = await lab.server.reply(question("alias.allowed.test"))
    assert data is not None
    assert (read_reply(data).addresses, read_reply(data).ttls) == ([PUBLIC], [9])
    assert lab.names(PUBLIC) == ("alias.allowed.test",)


async def test_rebinding_never_hands_out_the_second_address(lab: Lab) -> None:
    lab.upstream.zone[("r.allowed.test", A)] = [("r.allowed.test", A, 1, PUBLIC)]
    assert await lab.ask("r.allowed.test") == (0, [PUBLIC])
    lab.upstream.zone[("r.allowed.test", A)] = [("r.allowed.test", A, 1, "127.0.0.1")]
    lab.clock.advance(2)
    assert await lab.ask("r.allowed.test") == (0, [])
    assert lab.names("127.0.0.1") == ()


async def test_pinned_name_has_an_address_of_its_own_if_it_is_allowed(lab: Lab) -> None:
    rcode, [address] = await lab.ask("pinned.allowed.test")
    assert rcode == 0 and ipaddress.ip_address(address) in SYNTHETIC
    assert lab.names(address) == ("pinned.allowed.test",)
    assert await lab.ask("pinned.allowed.test", AAAA) == (0, [])
    assert await lab.ask("pinned.evil.test") == (REFUSED, [])
    assert lab.upstream.asked == []


async def test_control_host_is_always_there(lab: Lab) -> None:
    assert await lab.ask("creto.internal") == (0, [str(CONTROL_ADDRESS)])
    assert await lab.ask("CRETO.Internal", AAAA) == (0, [])
    assert lab.names(str(CONTROL_ADDRESS)) == ("creto.internal",)


async def test_family_without_a_route_is_not_given_out(clock: FakeClock) -> None:
    async with name_server(ZONE) as upstream:
        lab = Lab(upstream, clock, versions=frozenset((4,)))
        assert await lab.ask("api.allowed.test", AAAA) == (0, [])
        assert upstream.asked == []


async def test_upstream_failures_keep_their_meaning(lab: Lab) -> None:
    assert await lab.ask("none.allowed.test") == (NXDOMAIN, [])
    lab.upstream.rcode = 2
    assert await lab.ask("broken.allowed.test") == (SERVFAIL, [])


async def test_failing_guard_refuses_that_question_only(lab: Lab) -> None:
    def fail() -> None:
        raise StageFailed("the guard failed")

    lab.fault = fail
    assert await lab.ask("api.allowed.test") == (SERVFAIL, [])
    lab.fault = None
    assert await lab.ask("api.allowed.test") == (0, [PUBLIC])


async def test_budget_bounds_different_names(lab: Lab) -> None:
    lab.server = lab.make(Budget(names=2))
    rcodes = [(await lab.ask(f"data{n}.allowed.test"))[0] for n in range(4)]
    assert rcodes == [NXDOMAIN, NXDOMAIN, REFUSED, REFUSED]
    assert len(lab.upstream.asked) == 2
    assert lab.told[0] == ("data2.allowed.test", "dns_budget")


async def test_budget_bounds_the_rate_and_fills_again(lab: Lab) -> None:
    lab.server = lab.make(Budget(queries_per_s=1, burst=3))
    lab.upstream.zone[("z.allowed.test", A)] = [("z.allowed.test", A, 0, PUBLIC)]  # never cached
    assert [(await lab.ask("z.allowed.test"))[0] for _ in range(5)] == [0, 0, 0, REFUSED, REFUSED]
    lab.clock.advance(2)
    assert (await lab.ask("z.allowed.test"))[0] == 0


async def test_cached_answers_cost_no_budget(lab: Lab) -> None:
    lab.server = lab.make(Budget(queries_per_s=0.001, burst=1))
    assert {(await lab.ask("api.allowed.test"))[0] for _ in range(10)} == {0}


async def test_rotating_addresses_are_bound_before_they_are_told(lab: Lab) -> None:
    for n in range(500):
        address = f"93.184.{n // 250}.{n % 250}"
        lab.upstream.zone[("cdn.allowed.test", A)] = [("cdn.allowed.test", A, 0, address)]
        assert await lab.ask("cdn.allowed.test") == (0, [address])
        assert "cdn.allowed.test" in lab.names(address)
    assert "cdn.allowed.test" in lab.names("93.184.0.0")


async def test_binding_is_recorded_before_the_datagram_leaves(lab: Lab) -> None:
    order: list[str] = []
    record = lab.bindings.record

    def noted(link: str, name: str, addresses: Iterable[Address], ttl_s: float) -> None:
        order.append("bound")
        record(link, name, addresses, ttl_s)

    lab.bindings.record = noted  # type: ignore[method-assign]

    class Watched(socket.socket):
        def sendto(self, *args: object) -> int:
            order.append("sent")
            return super().sendto(*args)  # type: ignore[call-overload, no-any-return]

    with Watched(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        await lab.server.serve([sock], [])
        await over_udp(sock.getsockname(), question("api.allowed.test"))
        lab.server.close()
    assert order == ["bound", "sent"]


async def over_udp(to: tuple[str, int], data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect(to)
        client.send(data)
        async with asyncio.timeout(60):
            return await loop.sock_recv(client, 4096)


async def over_tcp(to: tuple[str, int], *messages: bytes) -> list[bytes]:
    reader, writer = await asyncio.open_connection(*to)
    replies = []
    async with asyncio.timeout(60):
        for message in messages:
            writer.write(struct.pack(">H", len(message)) + message)
        for _ in messages:
            (length,) = struct.unpack(">H", await reader.readexactly(2))
            replies.append(await reader.readexactly(length))
        writer.close()
        await writer.wait_closed()
    return replies


@pytest.fixture
async def served(lab: Lab) -> AsyncIterator[tuple[str, int]]:
    """The lab's server on one port of 127.0.0.1, UDP and TCP."""
    with socket.create_server(("127.0.0.1", free_port())) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.setblocking(False)
        udp.bind(tcp.getsockname())
        udp.setblocking(False)
        await lab.server.serve([udp], [tcp])
        yield tcp.getsockname()
        lab.server.close()
        lab.server.close()


async def test_serves_datagrams_and_streams(served: tuple[str, int]) -> None:
    reply = read_reply(await over_udp(served, question("aPi.Allowed.Test", ident=77)))
    assert (reply.ident, reply.addresses, reply.question) == (77, [PUBLIC], question("aPi.Allowed.Test")[12:])
    first, second = await over_tcp(served, question("api.allowed.test"), question("evil.test", ident=8))
    assert read_reply(first).addresses == [PUBLIC]
    assert (read_reply(second).ident, read_reply(second).rcode) == (8, REFUSED)


def test_serves_on_uvloop(clock: FakeClock) -> None:
    async def run() -> None:
        async with name_server(ZONE) as upstream:
            lab = Lab(upstream, clock)
            with (
                socket.create_server(("127.0.0.1", free_port())) as tcp,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            ):
                tcp.setblocking(False)
                udp.bind(tcp.getsockname())
                udp.setblocking(False)
                await lab.server.serve([udp], [tcp])
                assert read_reply(await over_udp(udp.getsockname(), question("api.allowed.test"))).addresses == [PUBLIC]
                [reply] = await over_tcp(tcp.getsockname(), question("api.allowed.test"))
                assert read_reply(reply).addresses == [PUBLIC]
                lab.server.close()

    uvloop.run(run())


async def test_long_answer_is_whole_over_tcp(lab: Lab, served: tuple[str, int]) -> None:
    rows = [("many.allowed.test", A, 30, f"93.184.{n // 250}.{n % 250}") for n in range(200)]
    lab.upstream.truncate = True
    lab.upstream.zone[("many.allowed.test", A)] = rows
    assert read_reply(await over_udp(served, question("many.allowed.test"))).truncated
    [whole] = await over_tcp(served, question("many.allowed.test"))
    assert len(read_reply(whole).addresses) == 200


async def test_malformed_messages_do_not_stop_the_server(served: tuple[str, int]) -> None:
    broken = await over_udp(served, question("api.allowed.test") + b"trailing")
    assert read_reply(broken).rcode == 1
    reader, writer = await asyncio.open_connection(*served)
    writer.write(b"\0\2hi")
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert read_reply(await over_udp(served, question("api.allowed.test"))).addresses == [PUBLIC]


async def test_datagram_with_a_slow_upstream_does_not_hold_up_others(lab: Lab, served: tuple[str, int]) -> None:
    lab.upstream.silent = True
    slow = asyncio.ensure_future(over_udp(served, question("slow.allowed.test")))
    assert read_reply(await over_udp(served, question("evil.test"))).rcode == REFUSED
    assert not slow.done()
    assert read_reply(await slow).rcode == SERVFAIL


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda tail: question("a.test")[:12] + tail)))
def test_garbage_is_answered_with_an_error_or_not_at_all(data: bytes) -> None:
    async def run() -> None:
        lab = Lab(Upstream(PIN, {}), FakeClock())
        reply = await lab.server.reply(data)
        assert reply is None or reply[:2] == data[:2]
        assert lab.upstream.asked == []

    asyncio.run(run())
