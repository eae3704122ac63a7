"""One state directory with everything on it that decides, and time in the test's hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from creto_oversight.approvers import Directory
from creto_oversight.desk import Caps, Desk
from creto_oversight.gate import OversightGate
from creto_oversight.owners import OWNERS, Owner
from creto_oversight.requests import SECOND_NS, ApprovalRequest, Rules
from creto_oversight.states import Event
from creto_oversight.store import DATABASE, Store
from creto_oversight.watch import Bell
from creto_proxy.model import Agent, Decision, Request, Verdict
from creto_proxy.testing import FakeClient, make_outcome, make_request

T = TypeVar("T")
T0_NS = 1_767_323_045 * SECOND_NS
MANY = Caps(100, 100, 100, 100)


class CaseClock:
    """A clock set to any time; its monotonic side only ever moves forward."""

    def __init__(self, unix_ns: int = T0_NS) -> None:
        self._unix_ns = unix_ns
        self._elapsed_ns = 0

    def set(self, at_s: float) -> None:
        unix_ns = T0_NS + round(at_s * SECOND_NS)
        self._elapsed_ns += max(0, unix_ns - self._unix_ns)
        self._unix_ns = unix_ns

    def advance(self, seconds: float) -> None:
        self._unix_ns += round(seconds * SECOND_NS)
        self._elapsed_ns += round(seconds * SECOND_NS)

    def now_ns(self) -> int:
        return self._elapsed_ns

    def unix_ns(self) -> int:
        return self._unix_ns


@dataclass
class Told:
    """A notifier that remembers, and may be broken."""

    events: list[tuple[str, Event]] = field(default_factory=list)
    broken: bool = False

    def notify(self, request: ApprovalRequest, event: Event) -> None:
        if self.broken:
            raise OSError("nobody is there")
        self.events.append((request.id, event))


@dataclass(frozen=True)
class Fixed:
    """Profiles as rules, without the checks of the settings: cases name agents as approvers on purpose."""

    by_name: dict[str, Rules]
    people: Directory = Directory()
    hold_max_s: float = 110
    held_max: int = 100

    def undefined(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(names) - set(self.by_name)))

    def rules(self, name: str) -> Rules:
        return self.by_name[name]

    def directory(self) -> Directory:
        return self.people


class RungByHand:
    """Rings every bell when the test says so; waiting takes as long as it takes."""

    def __init__(self) -> None:
        self._bells: set[asyncio.Event] = set()

    @contextmanager
    def attached(self, request_id: str) -> Iterator[Bell]:
        event = asyncio.Event()
        self._bells.add(event)

        class HandBell:
            async def wait(self, timeout_s: float) -> bool:
                await event.wait()
                event.clear()
                return True

        try:
            yield HandBell()
        finally:
            self._bells.discard(event)

    def ring(self) -> None:
        for event in self._bells:
            event.set()


class Script:
    """Waiting moves the clock instead of the test; ``at[seconds]`` runs when it gets there."""

    def __init__(self, clock: CaseClock, at: Mapping[float, Callable[[], object]] | None = None) -> None:
        self._clock = clock
        self._started_ns = clock.now_ns()
        self._at = sorted((at or {}).items())

    @contextmanager
    def attached(self, request_id: str) -> Iterator[Bell]:
        yield self

    async def wait(self, timeout_s: float) -> bool:
        elapsed_s = (self._clock.now_ns() - self._started_ns) / SECOND_NS
        if self._at and self._at[0][0] <= elapsed_s + timeout_s:
            due_s, action = self._at.pop(0)
            self._clock.advance(max(0.0, due_s - elapsed_s))
            action()
            return True
        self._clock.advance(timeout_s)
        return False


async def inline(call: Callable[[], T]) -> T:
    """An offload that runs the call where it is."""
    return call()


def agent(name: str = "a1", chain: tuple[str, ...] = ("human:erin", "agent:a0", "agent:a1")) -> Agent:
    return Agent(f"agent:{name}", name, chain, bytes(32), ("platform", f"agent:{name}"), 4e9)


def rules(name: str = "pay", approvers: tuple[str, ...] = ("human:alice", "human:bob"), **changes: object) -> Rules:
    values: dict[str, object] = {"quorum": 1, "timeout_s": 3600, **changes}
    return Rules(name=name, approvers=approvers, **values)  # type: ignore[arg-type]


def refund(amount: int = 800, *, who: Agent | None = None, headers: dict[str, str] | None = None) -> Request:
    """``POST https://api.stripe.com/v1/refunds`` that asks for no holding unless ``headers`` say otherwise."""
    body = json.dumps({"amount": amount, "charge": "ch_1"}).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {"Prefer": "wait=0"} if headers is None else headers
    return make_request(
        "POST", host="api.stripe.com", path="/v1/refunds", headers=fields, body=body, agent=who or agent()
    )


class Station:
    """A desk and a gate as one process has them; ``crash`` drops it as kill -9 would."""

    def __init__(self, directory: Path, clock: CaseClock, profiles: Fixed, told: Told, caps: Caps = MANY) -> None:
        self.clock = clock
        self.profiles = profiles
        self.store = Store(directory / DATABASE)
        self.owner = Owner(directory / OWNERS)
        self.desk = Desk(self.store, self.owner, caps, clock, told)
        self.bells = RungByHand()
        self.gate = self.gate_with(self.bells)
        self.store.open()
        self.owner.take()

    def gate_with(self, watch: RungByHand | Script) -> OversightGate:
        return OversightGate(self.desk, watch, inline, self.profiles, self.clock, "test")

    def crash(self) -> None:
        self.owner.release()
        self.store.close()


def escalated(*profiles: str) -> Decision:
    return Decision(Verdict.ESCALATE, "oversight_required", policies=("refund-over-5",), profiles=profiles or ("pay",))


async def submit(gate: OversightGate, request: Request, *profiles: str) -> Decision:
    return await gate.hold(request, escalated(*profiles), FakeClient())


async def send(station: Station, request: Request, sent: list[bytes], *, status: int = 200) -> Decision:
    """What the core does with an action that policy escalates: hold, spend, send, settle."""
    decision = await submit(station.gate, request)
    if decision.allowed and station.gate.spend(request):
        sent.append(request.body or b"")
        station.gate.settled(request, make_outcome(request, decision="approved", status=status))
    return decision
