"""A permit is made here only, for addresses every guard accepts at dial time."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest

from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress, genuine
from creto_proxy.errors import Refused, StageFailed
from creto_proxy.model import Address, Agent, Decision, Permit, Verdict
from creto_proxy.settings import Endpoint
from creto_proxy.testing import make_flow, make_request

PUBLIC, PRIVATE = ipaddress.ip_address("203.0.113.9"), ipaddress.ip_address("10.0.0.1")


class Names:
    """Allows one name and public addresses; literals by an exact rule."""

    def __init__(self, allowed: str = "api.example.com", literal: Address | None = None) -> None:
        self.allowed, self.literal = allowed, literal

    def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
        return Decision(Verdict.ALLOW if name == self.allowed else Verdict.DENY, "by_name")

    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        good = address == self.literal if name is None else not address.is_private or address == PUBLIC
        return Decision(Verdict.ALLOW if good else Verdict.DENY, "by_address")

    def tls_mode(self, name: str, port: int) -> str | None:
        return None

    def raw_tcp(self, name: str | None, address: Address, port: int) -> bool:
        return False


class Fixed:
    """A resolver with one answer."""

    def __init__(self, *addresses: Address) -> None:
        self.addresses = addresses

    def cached(self, name: str) -> Sequence[Address] | None:
        return None

    async def resolve(self, name: str) -> Sequence[Address]:
        return self.addresses


def egress(guard: object = None, *addresses: Address, pins: dict[str, Endpoint] | None = None) -> Egress:
    guards = [] if guard is None else [("egress", guard)]
    return Egress(guards, Fixed(*addresses), pins or {}, Guard(1.0))  # type: ignore[arg-type]


async def test_the_first_address_that_every_guard_accepts_is_permitted() -> None:
    permit = await egress(Names(), PRIVATE, PUBLIC).permit(make_request())
    assert (permit.address, permit.name, permit.port, permit.tls) == (PUBLIC, "api.example.com", 443, True)
    assert genuine(permit)


async def test_a_name_that_now_resolves_to_a_private_address_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        await egress(Names(), PRIVATE).permit(make_request())
    assert refused.value.reason == "by_address"


async def test_without_an_egress_plugin_nothing_may_leave() -> None:
    with pytest.raises(Refused) as refused:
        await egress(None, PUBLIC).permit(make_request())
    assert refused.value.reason == "no_egress_guard"


async def test_a_pin_is_the_operators_word_and_may_be_private() -> None:
    pins = {"api.example.com": Endpoint.parse("127.0.0.1:8443")}
    permit = await egress(Names(), pins=pins).permit(make_request())
    assert (str(permit.address), permit.port) == ("127.0.0.1", 8443)
    with pytest.raises(Refused):
        await egress(Names("other.example.com"), pins=pins).permit(make_request())


async def test_a_redirected_connection_is_dialled_where_the_agent_dialled_it_after_the_check() -> None:
    flow = make_flow(way="transparent")
    flow.original = (PRIVATE, 443)
    with pytest.raises(Refused):
        await egress(Names(), PUBLIC).permit(make_request(flow=flow))
    flow.original = (PUBLIC, 443)
    assert (await egress(Names(), PRIVATE).permit(make_request(flow=flow))).address == PUBLIC


async def test_an_address_literal_needs_its_own_rule() -> None:
    with pytest.raises(Refused):
        await egress(Names()).permit(make_request(host="203.0.113.9"))
    assert (await egress(Names(literal=PUBLIC)).permit(make_request(host="203.0.113.9"))).address == PUBLIC


async def test_the_strictest_of_several_guards_wins() -> None:
    two = Egress([("a", Names()), ("b", Names("other"))], Fixed(PUBLIC), {}, Guard(1.0))
    with pytest.raises(Refused):
        await two.permit(make_request())


def test_a_forged_permit_is_not_genuine() -> None:
    assert not genuine(Permit("api.example.com", PUBLIC, 443, True, seal=object()))


async def test_a_guard_that_raises_refuses() -> None:
    class Broken(Names):
        def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
            raise RuntimeError("boom")

    with pytest.raises(StageFailed):
        await egress(Broken(), PUBLIC).permit(make_request())
