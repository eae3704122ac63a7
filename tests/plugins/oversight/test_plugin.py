"""The plugin as the core uses it: real files, real threads, real waiting."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from creto_oversight import Oversight
from creto_oversight.states import State
from creto_oversight.store import DATABASE, Store
from creto_proxy.hookspecs import ControlRequest
from creto_proxy.model import Verdict
from creto_proxy.plugins import Plugins
from creto_proxy.testing import EPOCH_NS, FakeClient, compose_plugin, escalate, make_core, make_outcome, make_request

from .harness import CaseClock, Fixed, Station, Told

ME = pwd.getpwuid(os.getuid()).pw_name
SETTINGS = {"profiles": {"default": {"approvers": [ME]}}}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Plugins]:
    plugins = compose_plugin(Oversight, tmp_path, SETTINGS)
    await plugins.start()
    yield plugins
    assert await plugins.stop() == []


async def one_pending(directory: Path) -> str:
    """Id of the request, as soon as there is one."""
    store = Store(directory / DATABASE)
    store.open()
    try:
        while True:
            with store.reading() as session:
                found = session.listed()
            if found:
                return found[0].id
            await asyncio.sleep(0.01)
    finally:
        store.close()


async def test_a_held_call_notices_a_decision_of_another_process(running: Plugins, tmp_path: Path) -> None:
    [gate] = running.stages.gates
    request = make_request("POST", headers={"User-Agent": "curl/8"})
    held = asyncio.create_task(gate.hold(request, escalate(), FakeClient()))
    request_id = await one_pending(tmp_path)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            other = Station(tmp_path, CaseClock(EPOCH_NS), Fixed({}), Told())
            status = 0 if other.desk.decide(request_id, f"human:{ME}", approve=True).state is State.APPROVED else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, pid, 0))[1]) == 0
    decision = await held
    assert decision.verdict is Verdict.ALLOW
    assert await asyncio.to_thread(gate.spend, request)
    await asyncio.to_thread(gate.settled, request, make_outcome(request, decision="approved"))
    [routes] = running.stages.routes
    response = await routes.handle(ControlRequest(request.agent, "GET", f"/v1/approvals/{request_id}", {}, b""))
    assert response.document["state"] == "executed"


async def test_many_calls_are_held_at_once_and_each_gets_its_own_answer(running: Plugins, tmp_path: Path) -> None:
    [gate] = running.stages.gates
    requests = [make_request("POST", path=f"/{n}", headers={"User-Agent": "curl/8"}) for n in range(8)]
    held = [asyncio.create_task(gate.hold(each, escalate(), FakeClient())) for each in requests]
    other = Station(tmp_path, CaseClock(EPOCH_NS), Fixed({}), Told())
    while True:
        with other.store.reading() as session:
            found = session.listed()
        if len(found) == len(requests):
            break
        await asyncio.sleep(0.01)
    for each in found:
        approve = int(each.shown.path[1:]) % 2 == 0
        other.desk.decide(each.id, f"human:{ME}", approve=approve, comment="odd")
    decisions = await asyncio.gather(*held)
    assert [decision.allowed for decision in decisions] == [n % 2 == 0 for n in range(8)]
    other.crash()


async def test_constructing_has_no_side_effects(tmp_path: Path) -> None:
    compose_plugin(Oversight, tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == []


async def test_a_plugin_that_is_not_started_refuses(tmp_path: Path) -> None:
    [gate] = compose_plugin(Oversight, tmp_path, SETTINGS).stages.gates
    decision = await gate.hold(make_request("POST"), escalate(), FakeClient())
    assert (decision.verdict, decision.reason) == (Verdict.DENY, "approval_unavailable")


async def test_starting_settles_what_a_killed_process_left(tmp_path: Path) -> None:
    first = compose_plugin(Oversight, tmp_path, SETTINGS)
    await first.start()
    [gate] = first.stages.gates
    request = make_request("POST", headers={"Prefer": "respond-async"})
    request_id = str((await gate.hold(request, escalate(), FakeClient())).facts["approval_id"])
    other = Station(tmp_path, CaseClock(EPOCH_NS), Fixed({}), Told())
    other.desk.decide(request_id, f"human:{ME}", approve=True)
    assert (await gate.hold(request, escalate(), FakeClient())).allowed
    assert gate.spend(request)
    await first.stop()  # the owner's lock is gone, the outcome never came
    second = compose_plugin(Oversight, tmp_path, SETTINGS, core=make_core(tmp_path))
    await second.start()
    assert other.desk.look(request_id).state is State.INDETERMINATE
    await second.stop()
    other.crash()
