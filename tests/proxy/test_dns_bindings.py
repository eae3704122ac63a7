"""Which addresses stay bound to which names, and for how long."""

from __future__ import annotations

import ipaddress

from creto_proxy.dns.bindings import GRACE_S, PER_ADDRESS, TTL_FLOOR_S, Bindings
from creto_proxy.testing import FakeClock

ONE, TWO = ipaddress.ip_address("93.184.216.34"), ipaddress.ip_address("2606:4700::1")


def bindings(clock: FakeClock, per_link: int = 100) -> Bindings:
    return Bindings(per_link=per_link, now_s=lambda: clock.now_ns() / 1e9)


def test_an_address_is_bound_on_its_own_link_only(clock: FakeClock) -> None:
    table = bindings(clock)
    table.record("run", "a.test", [ONE], 30)
    assert table.names("run", ONE) == ("a.test",)
    assert table.names("other", ONE) == ()
    assert table.names("run", TWO) == ()


def test_short_ttls_do_not_end_bindings_early(clock: FakeClock) -> None:
    table = bindings(clock)
    table.record("run", "a.test", [ONE], 1)
    clock.advance(TTL_FLOOR_S + GRACE_S - 1)
    assert table.names("run", ONE) == ("a.test",)
    clock.advance(2)
    assert table.names("run", ONE) == ()
    assert len(table) == 0


def test_long_ttls_are_kept_and_not_shortened_by_later_answers(clock: FakeClock) -> None:
    table = bindings(clock)
    table.record("run", "a.test", [ONE], 86400)
    table.record("run", "a.test", [ONE], 1)
    clock.advance(86400)
    assert table.names("run", ONE) == ("a.test",)


def test_names_behind_one_address_come_latest_first(clock: FakeClock) -> None:
    table = bindings(clock)
    for name in ("a.test", "b.test", "a.test"):
        table.record("run", name, [ONE], 30)
    assert table.names("run", ONE) == ("a.test", "b.test")


def test_a_link_holds_so_many_addresses_and_drops_the_least_used(clock: FakeClock) -> None:
    table = bindings(clock, per_link=3)
    addresses = [ipaddress.ip_address(0x5DB8D800 + n) for n in range(4)]
    table.record("run", "a.test", addresses[:3], 30)
    assert table.names("run", addresses[0])
    table.record("run", "a.test", addresses[3:], 30)
    assert [bool(table.names("run", address)) for address in addresses] == [True, False, True, True]


def test_an_address_holds_so_many_names(clock: FakeClock) -> None:
    table = bindings(clock)
    for n in range(PER_ADDRESS + 5):
        table.record("run", f"n{n}.test", [ONE], 30)
    assert len(table.names("run", ONE)) == PER_ADDRESS


def test_pins_hold_until_the_link_is_forgotten(clock: FakeClock) -> None:
    table = bindings(clock)
    table.pin("run", "a.test", ONE)
    clock.advance(10**6)
    assert table.names("run", ONE) == ("a.test",)
    table.forget("run")
    assert table.names("run", ONE) == ()
