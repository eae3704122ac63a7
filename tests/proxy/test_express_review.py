"""What the express lane must not change: who is refused, who is counted, and that one request leaves one record."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from creto_hotpath.express import Standing
from creto_proxy import express
from creto_proxy.model import Flow

from .test_express_lane import PERMIT, Here, creto

FORBID = '@id("no") forbid (principal, action, resource);'


async def test_a_request_that_fails_in_the_lane_leaves_one_record(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT) as here:
        assert (await here.ask("/up/a", method="POST", body=b"x"))[0] == 200
        here.writer.write(b"POST /up/b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\nno\r\n")
        answer = await asyncio.wait_for(here.reader.read(), 60)
        assert answer.startswith(b"HTTP/1.1 400 ") and here.taken == 1
        assert [(o.target, o.status) for o in here.journal()] == [("/base/a", 200), ("/base/b", 400)]


async def test_a_connection_is_counted_whatever_its_first_request_was(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT, config="[limits]\nconnections_per_agent = 1\n") as here:
        assert (await here.ask("/up/a"))[0] == 200
        other = Here(here.service, here.port)
        await other.connect()
        other.writer.write(b"OPTIONS /up/a HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\n\r\n")
        assert (await asyncio.wait_for(other.reader.readuntil(b"\r\n\r\n"), 60)).startswith(b"HTTP/1.1 200 ")
        status, problem = await other.ask("/up/b")
        other.writer.close()
        assert (status, problem["reason"]) == (429, "too_many_connections")


class Gate:
    """Connecting to upstreams waits until it is opened."""

    def __init__(self, upstreams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = asyncio.Event()
        self.opened = asyncio.Event()
        connect = type(upstreams).connect

        async def late(stage: Any, permits: Any, request: Any = None) -> Any:
            self.waiting.set()
            await self.opened.wait()
            return await connect(stage, permits, request)

        monkeypatch.setattr(type(upstreams), "connect", late)


async def test_what_was_permitted_under_old_policies_teaches_nothing_under_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with creto(tmp_path, PERMIT) as here:
        gate = Gate(here.service.pipeline.upstreams, monkeypatch)
        early = asyncio.create_task(here.ask("/up/a"))
        await gate.waiting.wait()
        (tmp_path / "policies" / "1.cedar").write_text(FORBID)
        here.service.platform.authz.reload()  # type: ignore[attr-defined]
        other = Here(here.service, here.port)
        await other.connect()
        assert (await other.ask("/up/a"))[0] == 403
        gate.opened.set()
        assert (await early)[0] == 200
        statuses = [(await each.ask("/up/a"))[0] for each in (here, other)]
        other.writer.close()
        assert statuses == [403, 403]
        assert here.taken == 0


async def test_a_second_begins_when_the_request_came_not_when_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []

    def noted(**facts: Any) -> Any:
        ends.append(facts["expires_ns"])
        return made(**facts)

    made = Standing
    monkeypatch.setattr(express, "Standing", noted)
    async with creto(tmp_path, PERMIT) as here:
        gate = Gate(here.service.pipeline.upstreams, monkeypatch)
        early = asyncio.create_task(here.ask("/up/a"))
        await gate.waiting.wait()
        connecting = here.service.pipeline.clock.now_ns()
        gate.opened.set()
        assert (await early)[0] == 200
        assert len(ends) == 1 and ends[0] < connecting + int(express.LEASE_S * 1e9)


async def test_connections_that_differ_in_protocol_or_credentials_share_no_lane(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT) as here:
        lanes = here.service.pipeline.lanes
        assert lanes is not None
        flow = Flow(id=1, link="lab", way="explicit", peer="", bound_names=("a.test",))
        assert lanes.lane(flow) is lanes.lane(replace(flow, id=2))
        others = {"http2": True, "credentials": "x", "sni": "a.test", "port": 8080, "tls": True, "link": "other"}
        kinds = [lanes.lane(replace(flow, **{name: value})) for name, value in others.items()]  # type: ignore[arg-type]
        assert len({id(lane) for lane in (*kinds, lanes.lane(flow))}) == len(kinds) + 1


async def test_there_is_a_most_that_all_lanes_keep_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express, "_STANDINGS", 4)
    reads_path = 'forbid (principal, action, resource) when { context.path == "/base/no" };'
    async with creto(tmp_path, PERMIT, reads_path) as here:
        lanes = here.service.pipeline.lanes
        assert lanes is not None
        kept = []
        for number in range(6):
            await here.ask(f"/up/{number}")
            kept.append(sum(len(lane) for lane in lanes._lanes.values()))
        assert kept == [1, 2, 3, 4, 1, 2]
