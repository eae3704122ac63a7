"""The sidecar's stub resolver against a name server on real sockets."""

from __future__ import annotations

import asyncio
import ipaddress
import struct

import pytest

from creto_proxy.dns.message import AAAA, A, Rcode
from creto_proxy.dns.resolver import ResolutionFailed, Resolver, families, system_servers
from creto_proxy.settings import Endpoint
from creto_proxy.testing import FakeClock

from ..ports import free_port
from .dns_lab import CNAME, Upstream, name_server

V4, V6 = "93.184.216.34", "2606:4700::1"
ZONE = {
    ("a.test", A): [("a.test", A, 30, V4)],
    ("a.test", AAAA): [("a.test", AAAA, 30, V6)],
    ("alias.test", A): [("alias.test", CNAME, 30, "a.test")],
    ("loop.test", A): [("loop.test", CNAME, 30, "pool.test")],
    ("pool.test", A): [("pool.test", CNAME, 30, "loop.test")],
    ("empty.test", 99): [],
}


def resolver(
    *upstreams: Upstream | Endpoint, versions: tuple[int, ...] = (4, 6), clock: FakeClock | None = None
) -> Resolver:
    servers = [u if isinstance(u, Endpoint) else u.endpoint for u in upstreams]
    ticking = clock or FakeClock()
    return Resolver(servers, timeout_s=0.2, usable=lambda: frozenset(versions), now_s=lambda: ticking.now_ns() / 1e9)


async def test_addresses_come_ipv4_first_and_only_for_families_with_a_route() -> None:
    async with name_server(ZONE) as upstream:
        assert [str(a) for a in await resolver(upstream).resolve("a.test")] == [V4, V6]
        assert [str(a) for a in await resolver(upstream, versions=(6,)).resolve("a.test")] == [V6]


async def test_answers_are_kept_for_their_ttl(clock: FakeClock) -> None:
    async with name_server(ZONE) as upstream:
        asking = resolver(upstream, clock=clock)
        assert asking.cached("a.test") is None
        await asking.resolve("a.test")
        assert [str(a) for a in asking.cached("a.test") or ()] == [V4, V6]
        await asking.resolve("a.test")
        assert len(upstream.asked) == 2
        clock.advance(31)
        assert asking.cached("a.test") is None
        await asking.resolve("a.test")
        assert len(upstream.asked) == 4


async def test_equal_questions_under_way_are_asked_once() -> None:
    async with name_server(ZONE) as upstream:
        asking = resolver(upstream)
        await asyncio.gather(*(asking.lookup("a.test", A) for _ in range(20)))
        assert upstream.asked == [("a.test", A)]


async def test_a_caller_that_gives_up_does_not_fail_the_others() -> None:
    async with name_server(ZONE) as upstream:
        asking = resolver(upstream)
        first = asyncio.ensure_future(asking.lookup("a.test", A))
        second = asyncio.ensure_future(asking.lookup("a.test", A))
        await asyncio.sleep(0)
        first.cancel()
        assert [str(a) for a in (await second).addresses] == [V4]


async def test_alias_without_address_is_asked_on() -> None:
    async with name_server(ZONE) as upstream:
        found = await resolver(upstream).lookup("alias.test", A)
        assert [str(a) for a in found.addresses] == [V4]
        assert upstream.asked == [("alias.test", A), ("a.test", A)]


async def test_endless_aliases_fail() -> None:
    async with name_server(ZONE) as upstream:
        with pytest.raises(ResolutionFailed, match="aliases"):
            await resolver(upstream).lookup("loop.test", A)
        assert len(upstream.asked) < 20


async def test_truncated_answer_is_asked_again_over_tcp() -> None:
    async with name_server(ZONE) as upstream:
        upstream.truncate = True
        upstream.zone[("many.test", A)] = [("many.test", A, 1, f"93.184.{n // 256}.{n % 256}") for n in range(400)]
        found = await resolver(upstream).lookup("many.test", A)
        assert len(found.addresses) == 400
        assert upstream.over_tcp == 1


async def test_name_that_does_not_exist_and_name_without_address_are_told_apart() -> None:
    async with name_server(ZONE) as upstream:
        asking = resolver(upstream)
        assert (await asking.lookup("none.test", A)).rcode is Rcode.NXDOMAIN
        assert (await asking.lookup("empty.test", A)).rcode is Rcode.NOERROR
        for name, rcode in (("none.test", Rcode.NXDOMAIN), ("empty.test", Rcode.NOERROR)):
            with pytest.raises(ResolutionFailed) as caught:
                await asking.resolve(name)
            assert caught.value.rcode is rcode
            assert isinstance(caught.value, OSError)


async def test_dead_and_failing_servers_are_passed_over() -> None:
    async with name_server() as failing, name_server(ZONE) as good:
        failing.rcode = 2
        dead = Endpoint(ipaddress.IPv4Address("127.0.0.1"), free_port())
        found = await resolver(dead, failing, good).lookup("a.test", A)
        assert [str(a) for a in found.addresses] == [V4]


async def test_when_nobody_answers_it_says_whom_it_asked() -> None:
    async with name_server(ZONE) as upstream:
        upstream.silent = True
        with pytest.raises(ResolutionFailed, match=str(upstream.endpoint)) as caught:
            await resolver(upstream).lookup("a.test", A)
        assert caught.value.rcode is Rcode.SERVFAIL
        assert len(upstream.asked) == 2


async def test_forged_answers_are_dropped_and_the_true_one_awaited() -> None:
    async with name_server(ZONE) as upstream:

        def forge(reply: bytes) -> list[bytes]:
            other_id = struct.pack(">H", struct.unpack_from(">H", reply)[0] ^ 1) + reply[2:]
            other_name = reply.replace(b"\x01a\x04test", b"\x01b\x04test")
            evil = [part[:-4] + b"\x0a\0\0\1" for part in (other_id, other_name)]
            return [*evil, b"", reply[:5], reply]

        upstream.tamper = forge
        found = await resolver(upstream).lookup("a.test", A)
        assert [str(a) for a in found.addresses] == [V4]


async def test_every_question_has_its_own_port_and_id(clock: FakeClock) -> None:
    async with name_server(ZONE) as upstream:
        asking = resolver(upstream, clock=clock)
        for _ in range(12):
            await asking.lookup("a.test", A)
            clock.advance(31)
        assert len(set(upstream.sources)) > 6
        assert len(set(upstream.idents)) > 6


@pytest.mark.parametrize("name", ["", "a..test", "x" * 64])
async def test_what_is_no_name_is_not_asked(name: str) -> None:
    async with name_server(ZONE) as upstream:
        with pytest.raises(ResolutionFailed):
            await resolver(upstream).resolve(name)
        assert upstream.asked == []


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 1.1.1.1\nnameserver 2606:4700::1\n", ["1.1.1.1:53", "[2606:4700::1]:53"]),
        ("# nameserver 9.9.9.9\nsearch corp.test\nnameserver\nnameserver nonsense\n", ["127.0.0.1:53"]),
        ("nameserver 1.1.1.1\n" * 5, ["1.1.1.1:53"] * 3),
        ("", ["127.0.0.1:53"]),
        ("  nameserver\t127.0.0.53   # stub\noptions edns0\n", ["127.0.0.53:53"]),
    ],
)
def test_resolv_conf_is_read_as_the_c_library_reads_it(text: str, servers: list[str]) -> None:
    assert [str(server) for server in system_servers(text)] == servers


def test_families_never_come_out_empty() -> None:
    assert families() <= {4, 6} and families()


def test_a_resolver_for_one_endpoint_or_the_system() -> None:
    endpoint = Endpoint(ipaddress.IPv4Address("127.0.0.1"), 5353)
    assert isinstance(Resolver.from_endpoint(endpoint), Resolver)
    assert isinstance(Resolver.from_endpoint(None), Resolver)
