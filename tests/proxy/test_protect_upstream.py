"""An upstream in trouble is left alone, its other addresses are used, and repeating stays within a budget."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import deque
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress, genuine
from creto_proxy.errors import Refused, Transient
from creto_proxy.model import Permit
from creto_proxy.protect.breaker import FORGET_S, MOST, Health
from creto_proxy.protect.retries import WINDOW_S, RetryBudget
from creto_proxy.testing import make_flow, make_request
from creto_proxy.tls import CertificateAuthority
from creto_proxy.upstream import Dialling

from ..ports import free_port
from .protect_lab import OK, Moved, Names, lab, post, server, until
from .test_egress_stage import Names as Guarding
from .test_express_lane import creto as express
from .test_pipeline import Person, approve

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def health(clock: Moved, **parts: float) -> Health:
    return Health(**{"failures": 3, "open_s": 10.0, **parts}, now=clock, chance=lambda: 0.5)  # type: ignore[arg-type]


# -- the breaker, over the wire


@pytest.mark.parametrize("answer", [b"", UNAVAILABLE], ids=["closes", "answers 503"])
async def test_an_open_breaker_refuses_at_once_without_dialling_until_one_try_succeeds(
    tmp_path: Path, answer: bytes
) -> None:
    clock = Moved()
    async with server(answer) as bad, lab(tmp_path, health=health(clock)) as here:
        for _ in range(3):
            assert (await here.get(bad.port)).status in (502, 503)
        seen = bad.connections, bad.requests
        refused = await here.get(bad.port)
        assert (refused.status, refused.reason, refused.fields["retry-after"]) == (503, "upstream_unavailable", "10")
        assert b"left alone" in refused.body and (bad.connections, bad.requests) == seen
        async with server() as good:
            assert (await here.get(good.port)).status == 200, "other destinations are not concerned"
        clock.now += 11
        assert (await here.get(bad.port)).fields.get("retry-after") is None, "this one went through"
        longer = await here.get(bad.port)
        assert (longer.status, longer.fields["retry-after"]) == (503, "20"), "and opened it for longer"
    assert [o.error for o in here.journal()].count("upstream_unavailable") >= 1


async def test_of_many_requests_one_tries_and_its_success_lets_all_through(tmp_path: Path) -> None:
    clock = Moved()
    async with lab(tmp_path, health=health(clock)) as here:
        port = free_port()
        for _ in range(3):
            assert (await here.get(port)).status == 502
        async with server(held=True, port=port) as back:
            assert (await here.get(port)).status == 503
            clock.now += 11
            trying = asyncio.create_task(here.get(port))
            await until(lambda: back.requests == 1)
            answers = await asyncio.gather(*(here.get(port) for _ in range(5)))
            assert {answer.status for answer in answers} == {503} and back.requests == 1
            back.hold.set()
            assert (await trying).status == 200
            assert [(await here.get(port)).status for _ in range(3)] == [200] * 3
            assert not here.pipeline.upstreams.health.bad


async def test_a_try_whose_agent_leaves_lets_the_next_try_after_another_pause(tmp_path: Path) -> None:
    clock = Moved()
    async with lab(tmp_path, health=health(clock)) as here:
        port = free_port()
        for _ in range(3):
            await here.get(port)
        async with server(held=True, port=port) as back:
            clock.now += 11
            reader, writer = await here.connect()
            writer.write(post(port, "up.test", "Content-Length: 0"))
            await until(lambda: back.requests == 1)
            writer.transport.abort()
            await until(lambda: not here.pipeline.tasks and all(d.exchange is None for _, d in here.gateway.open()))
            assert (await here.get(port)).status == 503
            clock.now += 11
            back.hold.set()
            assert (await here.get(port)).status == 200


async def test_an_answer_in_between_starts_the_count_anew(tmp_path: Path) -> None:
    answers = deque([UNAVAILABLE, UNAVAILABLE, OK, UNAVAILABLE, UNAVAILABLE, OK])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.popleft())

    async with server(serve) as flaky, lab(tmp_path, health=health(Moved())) as here:
        assert [(await here.get(flaky.port)).status for _ in range(6)] == [503, 503, 200, 503, 503, 200]


async def test_an_agent_that_hangs_up_or_a_404_says_nothing_about_the_upstream(tmp_path: Path) -> None:
    async with (
        server(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", held=True) as up,
        lab(tmp_path, health=health(Moved(), failures=1)) as here,
    ):
        reader, writer = await here.connect()
        writer.write(post(up.port, "up.test", "Content-Length: 0"))
        await until(lambda: up.requests == 1)
        writer.transport.abort()
        await until(lambda: all(d.exchange is None for _, d in here.gateway.open()))
        up.hold.set()
        assert (await here.get(up.port)).status == 404
        assert not here.pipeline.upstreams.health.bad


# -- several addresses


async def test_the_next_address_is_used_when_one_refuses_and_the_bad_one_is_passed_over_then(tmp_path: Path) -> None:
    names = Names(two_test=["127.0.0.2", "127.0.0.1"])
    bad = health(clock := Moved(), failures=100, eject_s=30.0)
    async with server() as up, lab(tmp_path, resolver=names, health=bad) as here:
        assert (await here.get(up.port, "two.test")).status == 200
        assert bad.ejected == 1
        here.pipeline.upstreams._pool.close()  # so that everything is dialled
        assert (await here.get(up.port, "two.test")).status == 200
        assert bad.ejected == 1, "it was not dialled again"
        clock.now += 31
        assert (await here.get(up.port, "two.test")).status == 200
        assert bad.ejected == 2, "after its time it was"


async def test_an_address_that_does_not_answer_costs_a_moment_not_the_request(tmp_path: Path) -> None:
    names = Names(two_test=["127.0.0.2", "127.0.0.1"])
    async with AsyncExitStack() as stack:
        up = await stack.enter_async_context(server())
        # A full backlog drops the SYN, as a dead machine does.
        silent = stack.enter_context(socket.create_server(("127.0.0.2", up.port), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        here = await stack.enter_async_context(lab(tmp_path, resolver=names, dialling=Dialling(60.0, 60.0)))
        assert (await here.get(up.port, "two.test")).status == 200
        assert here.pipeline.upstreams.health.ejected == 1


async def test_with_every_address_dead_the_answer_is_502_and_then_503(tmp_path: Path) -> None:
    names = Names(two_test=["127.0.0.2", "127.0.0.1"])
    async with lab(tmp_path, resolver=names, health=health(Moved())) as here:
        port = free_port()
        answers = [await here.get(port, "two.test") for _ in range(4)]
        assert [answer.status for answer in answers] == [502, 502, 502, 503]
        assert answers[-1].reason == "upstream_unavailable"


async def test_a_certificate_that_does_not_verify_is_tried_elsewhere_and_named_when_nothing_else_works(
    tmp_path: Path,
) -> None:
    ours, theirs = CertificateAuthority(), CertificateAuthority()
    trusting = ssl.create_default_context(cadata=ours.pem.decode())
    names = Names(two_test=["127.0.0.2", "127.0.0.1"])
    async with lab(tmp_path, resolver=names, context=trusting, health=health(Moved())) as here:
        wrong = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.2", 0, ssl=theirs.context("two.test"))
        port = wrong.sockets[0].getsockname()[1]
        request = make_request(host="two.test", port=port, scheme="https")
        permits = await here.pipeline.egress.permits(request)
        assert [permit.tls for permit in permits] == [True, True]
        with pytest.raises(Exception, match="does not verify") as failed:
            await here.pipeline.upstreams.connect(permits)
        assert getattr(failed.value, "reason", "") == "upstream_certificate"
        right = await asyncio.start_server(lambda r, w: None, "127.0.0.1", port, ssl=ours.context("two.test"))
        upstream = await here.pipeline.upstreams.connect(permits)
        assert upstream.key == permits[1].key
        upstream.transport.abort()
        for each in (wrong, right):
            each.close()
            await each.wait_closed()


# -- repeating


async def test_a_server_that_starts_again_within_a_moment_is_not_noticed(tmp_path: Path) -> None:
    async with lab(tmp_path, dialling=Dialling(30.0, 30.0, retries=1)) as here:
        port = free_port()
        asking = asyncio.create_task(here.get(port))
        await until(lambda: bool(here.pipeline.upstreams.health.bad))
        async with server(port=port):
            assert (await asking).status == 200
        assert here.pipeline.upstreams.retries.used == 1


async def test_without_budget_nothing_is_repeated(tmp_path: Path) -> None:
    budget = RetryBudget(percent=0, per_second=0)
    async with lab(tmp_path, dialling=Dialling(5.0, 5.0, retries=3), budget=budget) as here:
        assert (await here.get(free_port())).status == 502
        assert (budget.used, budget.denied) == (0, 1)


@pytest.mark.parametrize("budget", [RetryBudget(), RetryBudget(0, 0)], ids=["with budget", "without"])
async def test_a_kept_connection_that_died_is_replaced_within_the_budget(tmp_path: Path, budget: RetryBudget) -> None:
    """The upstream answers the first request of a connection and hangs up on the second."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")

    dialling = Dialling(5.0, 5.0, retries=1)
    async with server(serve) as up, lab(tmp_path, dialling=dialling, budget=budget) as here:
        assert (await here.get(up.port)).status == 200
        again = await here.get(up.port)
        assert again.status == (200 if budget.used else 502) and budget.used + budget.denied == 1


async def test_what_was_approved_once_may_be_dialled_again_but_is_sent_once(tmp_path: Path) -> None:
    names = Names(held_test=["127.0.0.2", "127.0.0.1"])
    person = Person(approve)
    async with server() as up, lab(tmp_path, resolver=names, gate=person) as here:
        assert (await here.send(post(up.port, "held.test", "Content-Length: 3", b"abc"))).status == 200
        assert (up.requests, person.spent) == (1, 1)


async def test_what_was_approved_is_refused_before_the_grant_is_spent_while_the_breaker_is_open(tmp_path: Path) -> None:
    person = Person(approve)
    async with lab(tmp_path, gate=person, health=health(Moved())) as here:
        port = free_port()
        raw = post(port, "held.test", "Content-Length: 3", b"abc")
        answers = [(await here.send(raw)).status for _ in range(4)]
        assert answers == [502, 502, 502, 503] and person.spent == 0


# -- permits


async def test_every_accepted_address_gets_a_permit_of_its_own_in_the_order_of_the_answer() -> None:
    good, private, other = (ipaddress.ip_address(a) for a in ("203.0.113.9", "10.0.0.1", "1.1.1.1"))
    names = Names(api_example_com=[str(private), str(other), str(good)])
    egress = Egress([("egress", Guarding())], names, {}, Guard(1.0))
    permits = await egress.permits(make_request())
    assert [permit.address for permit in permits] == [other, good] and all(map(genuine, permits))
    assert await egress.permit(make_request()) == permits[0] == egress.permit_now(make_request())


async def test_a_redirected_connection_goes_where_it_was_dialled_first_and_never_where_a_guard_says_no() -> None:
    good, private, other = (ipaddress.ip_address(a) for a in ("203.0.113.9", "10.0.0.1", "1.1.1.1"))
    names = Names(api_example_com=[str(other), str(private), str(good)])
    egress = Egress([("egress", Guarding())], names, {}, Guard(1.0))
    flow = make_flow(way="transparent")
    flow.original = (good, 443)
    assert [permit.address for permit in await egress.permits(make_request(flow=flow))] == [good, other]
    flow.original = (private, 443)
    with pytest.raises(Refused):
        await egress.permits(make_request(flow=flow))


# -- the rules by themselves


def permits(count: int) -> list[Permit]:
    return [Permit("x.test", ipaddress.ip_address(0x7F000001 + n), 80, False, None) for n in range(count)]


@given(st.lists(st.sampled_from(["connect", "fail", "answer", "wait", "use"]), max_size=60), st.integers(1, 4))
def test_whatever_happens_something_is_usable_again_in_bounded_time(events: list[str], count: int) -> None:
    clock = Moved()
    here = health(clock, open_max_s=60.0)
    addresses = permits(count)
    for number, event in enumerate(events):
        key = addresses[number % count].key
        if event == "answer":
            here.answered(key)
            assert key not in here.bad
        elif event == "wait":
            clock.now += 5
        elif event == "use":
            try:
                found = here.usable(addresses)
            except Transient as error:
                assert 0 < error.retry_after_s <= 75
            else:
                assert set(found) <= set(addresses) and len(set(found)) == len(found)
        else:
            here.failed(key, "boom", connecting=event == "connect")
    clock.now += 76
    assert here.usable(addresses)


def test_the_pause_doubles_up_to_its_limit_and_is_never_the_same_for_all() -> None:
    clock = Moved()
    here = Health(failures=1, open_s=1.0, open_max_s=8.0, now=clock, chance=lambda: 0.5)
    [permit] = permits(1)
    pauses = []
    for _ in range(6):
        here.failed(permit.key, "boom")
        pauses.append(here.bad[permit.key].until - clock.now)
        clock.now = here.bad[permit.key].until
        assert here.allows(permit.key) and not here.allows(permit.key)
    assert pauses == [1, 2, 4, 8, 8, 8]
    low, high = (Health(failures=1, open_s=1.0, now=clock, chance=lambda c=c: c) for c in (0.0, 1.0))  # type: ignore[misc]
    for each in (low, high):
        each.failed(permit.key, "boom")
    assert low.bad[permit.key].until < high.bad[permit.key].until


def test_ejection_grows_and_never_takes_more_than_its_part() -> None:
    clock = Moved()
    here = Health(failures=0, eject_s=10.0, eject_max_percent=50, now=clock)
    four = permits(4)
    here.failed(four[0].key, "boom", connecting=True)
    assert here.usable(four) == (*four[1:], four[0])
    here.failed(four[0].key, "boom", connecting=True)
    assert here.bad[four[0].key].ejected_until - clock.now == 20
    for permit in four[1:]:
        here.failed(permit.key, "boom", connecting=True)
    ejected = [permit for permit in four if clock.now < here.bad[permit.key].ejected_until]
    assert ejected == four, "all of them failed"
    assert here.usable(four) == (four[0], four[1], four[2], four[3]), "so two of them are not passed over, in order"
    assert here.usable(four[:1]) == (four[0],), "the only address is never passed over"


def test_only_so_much_is_remembered_and_not_for_ever() -> None:
    clock = Moved()
    here = Health(now=clock)
    for number in range(MOST + 10):
        here.failed(number, "boom")
    assert len(here.bad) == MOST
    clock.now += FORGET_S + 1
    here.failed("new", "boom")
    assert list(here.bad) == ["new"]


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50)), max_size=80))
def test_retries_never_exceed_their_part_of_the_requests_of_a_window(steps: list[tuple[float, int]]) -> None:
    clock = Moved()
    budget = RetryBudget(percent=20, per_second=0.5, now=clock)
    sent, taken = 0, []
    for wait_s, requests in steps:
        clock.now += wait_s
        budget.requests += requests
        sent += requests
        if budget.take():
            taken.append(clock.now)
        recent = [at for at in taken if at > clock.now - WINDOW_S]
        assert len(recent) <= max(5, 0.2 * sent) + 1
    assert budget.used == len(taken)
    assert budget.used + budget.denied == len(steps)


def test_a_busy_minute_buys_retries_for_the_next_seconds_only() -> None:
    clock = Moved()
    budget = RetryBudget(percent=20, per_second=0, now=clock)
    for _ in range(100):
        clock.now += 0.1
        budget.requests += 10
    assert sum(budget.take() for _ in range(1000)) == 200
    clock.now += 60
    budget.take()  # the window is looked at again
    clock.now += 60
    assert not budget.take()


async def test_requests_that_take_an_express_lane_widen_the_budget(tmp_path: Path) -> None:
    config = "[upstream]\nretry_percent = 20\nretry_min_per_s = 0\n"
    async with express(tmp_path, "permit (principal, action, resource);", config=config) as here:
        for number in range(20):
            assert await here.ask(f"/up/{number}") == (200, b"ok")
        assert here.taken == 19
        assert sum(here.service.pipeline.upstreams.again() for _ in range(10)) == 4, "a fifth of twenty"


def test_requests_counted_elsewhere_may_be_forgotten_there() -> None:
    budget = RetryBudget(percent=20, per_second=0, now=Moved())
    counts = iter([10, 3, 8])
    budget.elsewhere = lambda: next(counts)
    for expected in (10, 10, 15):
        budget.take()
        assert budget.requests == expected
