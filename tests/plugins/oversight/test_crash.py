"""kill -9 between every two steps: no action sent twice, none without a grant, no open request forgotten."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from creto_oversight.requests import ApprovalRequest
from creto_oversight.states import OPEN, Event, State
from creto_proxy.testing import make_outcome

from .harness import CaseClock, Fixed, Station, Told, refund, rules, submit

PROFILES = Fixed({"pay": rules()})
KILLED = 9


def sends(directory: Path) -> int:
    path = directory / "sent"
    return len(path.read_bytes()) if path.exists() else 0


class Upstream:
    """Counts what it was sent in a file, so that the count survives whoever sent it."""

    def __init__(self, directory: Path, step: Callable[[], None]) -> None:
        self._path = directory / "sent"
        self._step = step

    def send(self) -> None:
        self._step()
        with self._path.open("ab") as file:
            file.write(b".")
        self._step()


class Announcer(Told):
    """A notifier whose every call is a step as well."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self._step = step

    def notify(self, request: ApprovalRequest, event: Event) -> None:
        self._step()
        super().notify(request, event)
        self._step()


async def agent_calls(station: Station, upstream: Upstream) -> None:
    """One attempt of the agent, as the core carries it out."""
    request = refund()
    decision = await submit(station.gate, request)
    if decision.allowed and station.gate.spend(request):
        upstream.send()
        station.gate.settled(request, make_outcome(request, decision="approved"))


async def story(directory: Path, clock: CaseClock, step: Callable[[], None]) -> None:
    """The agent asks, a person approves, the agent asks again and is let through."""
    station = Station(directory, clock, PROFILES, Announcer(step))
    upstream = Upstream(directory, step)
    for moment in ("before_cursor_execute", "after_cursor_execute", "commit"):
        event.listen(Engine, moment, step)
    await agent_calls(station, upstream)
    with station.store.reading() as session:
        [request] = session.listed()
    station.desk.decide(request.id, "human:alice", approve=True)
    await agent_calls(station, upstream)


def killed_at(number: int, directory: Path) -> int:
    """Plays the story in a child that dies at its step ``number``; its exit code, 0 when the story was shorter."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        left = number

        def step(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(KILLED)

        asyncio.run(story(directory, CaseClock(), step))
        status = 0
    finally:
        os._exit(status)


def latest(station: Station) -> ApprovalRequest | None:
    with station.store.reading() as session:
        found = session.listed()
    assert len(found) <= 1, "a crash never makes a second request for the same action"
    return found[0] if found else None


async def check_what_a_crash_left(directory: Path) -> State | None:
    clock, told = CaseClock(), Told()
    clock.advance(10)
    station = Station(directory, clock, PROFILES, told)
    station.desk.sweep()
    found = latest(station)
    before = sends(directory)
    assert before <= 1
    if before:
        assert found is not None and found.state in (State.EXECUTED, State.INDETERMINATE)
        history = [line.event for line in station.desk.history(found.id)]
        assert history.index("granted") < history.index("spent"), "nothing is sent without a grant"
    if found is not None and found.state in OPEN:
        assert found.id in [request.id for request in station.desk.listed()]
        assert found.notified, "who should decide has been told by now"
    upstream = Upstream(directory, lambda: None)
    if found is None or found.state not in (State.EXECUTED, State.FAILED):
        await agent_calls(station, upstream)
        now = latest(station)
        assert now is not None
        if now.state in OPEN:
            station.desk.decide(now.id, "human:alice", approve=True)
            await agent_calls(station, upstream)
    unknown = found is not None and found.state is State.INDETERMINATE
    assert sends(directory) == (before if unknown else 1)
    station.store.verify_history()
    station.crash()
    return found.state if found is not None else None


def test_killed_between_any_two_steps_the_action_is_never_sent_twice(tmp_path: Path) -> None:
    states: set[State | None] = set()
    for number in range(400):
        directory = tmp_path / str(number)
        directory.mkdir()
        status = killed_at(number, directory)
        assert status in (0, KILLED)
        states.add(asyncio.run(check_what_a_crash_left(directory)))
        if status == 0:
            break
    else:
        raise AssertionError("the story has no end")
    assert number > 30
    assert states >= {None, State.PENDING, State.APPROVED, State.INDETERMINATE, State.EXECUTED}
