"""What an agent can learn about its own requests, and about nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from creto_oversight.routes import ApprovalRoutes
from creto_proxy.hookspecs import ControlRequest, ControlResponse
from creto_proxy.model import Agent

from .harness import CaseClock, Fixed, Script, Station, Told, agent, inline, refund, rules, submit


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    station = Station(tmp_path, CaseClock(), Fixed({"pay": rules()}), Told())
    yield station
    station.crash()


async def asked(station: Station) -> str:
    return str((await submit(station.gate, refund())).facts["approval_id"])


async def get(
    station: Station,
    path: str,
    *,
    who: Agent | None = None,
    method: str = "GET",
    at: Mapping[float, Callable[[], object]] | None = None,
    **query: str,
) -> ControlResponse:
    routes = ApprovalRoutes(station.desk, Script(station.clock, at), inline, station.clock)
    return await routes.handle(ControlRequest(who or agent(), method, path, query, b""))


async def test_an_agent_sees_its_own_request(station: Station) -> None:
    request_id = await asked(station)
    response = await get(station, f"/v1/approvals/{request_id}")
    document: dict[str, Any] = response.document
    assert (response.status, document["id"], document["state"], document["open"]) == (200, request_id, "pending", True)
    assert not {"approvers", "votes", "shown", "rules"} & set(document)


async def test_requests_of_others_do_not_exist(station: Station) -> None:
    request_id = await asked(station)
    others = await get(station, f"/v1/approvals/{request_id}", who=agent("a2"))
    nobody = await get(station, "/v1/approvals/ovr_nothing")
    assert others.status == nobody.status == 404
    assert others.document == nobody.document


async def test_a_long_poll_ends_with_the_decision(station: Station) -> None:
    request_id = await asked(station)
    started = station.clock.now_ns()
    approve = {7.0: lambda: station.desk.decide(request_id, "human:alice", approve=True)}
    response = await get(station, f"/v1/approvals/{request_id}", at=approve, wait="30")
    assert (response.document["state"], station.clock.now_ns() - started) == ("approved", 7 * 10**9)
    assert response.document["grant_until"]


@pytest.mark.parametrize(("wait", "seconds"), [("0", 0), ("3", 3), ("1e6", 50)])
async def test_a_long_poll_ends_undecided_after_its_wait(station: Station, wait: str, seconds: int) -> None:
    request_id = await asked(station)
    started = station.clock.now_ns()
    response = await get(station, f"/v1/approvals/{request_id}", wait=wait)
    assert (response.document["state"], station.clock.now_ns() - started) == ("pending", seconds * 10**9)


async def test_a_denial_is_told_with_its_reason(station: Station) -> None:
    request_id = await asked(station)
    station.desk.decide(request_id, "human:alice", approve=False, comment="too much")
    document = (await get(station, f"/v1/approvals/{request_id}", wait="30")).document
    assert (document["state"], document["comment"]) == ("denied", "too much")


@pytest.mark.parametrize("wait", ["x", "-1", "nan", "inf", ""])
async def test_a_bad_wait_is_a_bad_request(station: Station, wait: str) -> None:
    assert (await get(station, f"/v1/approvals/{await asked(station)}", wait=wait)).status == 400


@pytest.mark.parametrize(("method", "path", "status"), [
    ("POST", "/v1/approvals/ovr_x", 405), ("DELETE", "/v1/approvals/ovr_x", 405),
    ("GET", "/v1/approvals", 404), ("GET", "/v1/approvals/", 404), ("GET", "/v1/approvals/a/b", 404),
])  # fmt: skip
async def test_nothing_else_is_answered(station: Station, method: str, path: str, status: int) -> None:
    assert (await get(station, path, method=method)).status == status


async def test_a_store_that_is_gone_is_said_to_be_gone(station: Station) -> None:
    request_id = await asked(station)
    station.store.close()
    assert (await get(station, f"/v1/approvals/{request_id}")).status == 503
