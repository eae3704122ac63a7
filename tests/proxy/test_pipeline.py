"""The whole path over real sockets: what each stage refuses, and that a broken plugin costs only its own requests."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from creto_hotpath.journal import Journal
from creto_hotpath.relay import Limits, Pool
from creto_platform.authz import Answer, Query, Watch
from creto_proxy.accept import Gateway
from creto_proxy.audit import Recorder, outcomes
from creto_proxy.authorize import Policy
from creto_proxy.clock import SystemClock
from creto_proxy.control import Control
from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress
from creto_proxy.gate import Gates
from creto_proxy.hookspecs import Client, ControlRequest, ControlResponse, Edits, Tap
from creto_proxy.identify import Identify, Links
from creto_proxy.meter import Meters
from creto_proxy.model import Address, Agent, Approval, Decision, Outcome, Request, Usage, Verdict
from creto_proxy.pipeline import Pipeline
from creto_proxy.settings import Endpoint
from creto_proxy.target import Targets
from creto_proxy.testing import make_agent
from creto_proxy.tls import CertificateAuthority
from creto_proxy.upstream import Upstreams

ALLOW = Decision(Verdict.ALLOW, "yes")


class Open:
    """Egress for everything."""

    def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
        return ALLOW

    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        return ALLOW

    def tls_mode(self, name: str, port: int) -> str | None:
        return None

    def raw_tcp(self, name: str | None, address: Address, port: int) -> bool:
        return False


class Policies:
    """An authz with one rule per host."""

    epoch = 1

    def __init__(self, **verdicts: str) -> None:
        self.verdicts = {name.replace("_", "."): verdict for name, verdict in verdicts.items()}

    def lasting(self, query: Query) -> frozenset[str] | None:
        return None

    def reads(self, action: str) -> frozenset[str]:
        return frozenset({"approval", "fingerprint"})

    def watch(self, host: str) -> Watch:
        return Watch()

    def decide(self, query: Query) -> Answer:
        verdict = self.verdicts.get(query.host, "allow")
        if verdict == "oversight" and "approval" in query.context:
            verdict = "allow"
        return Answer(verdict, f"policy_{verdict}", "", ("p1",), ("profile",) if verdict == "oversight" else ())  # type: ignore[arg-type]


class Hosts:
    """An authorizer that misbehaves for the host it is told about."""

    def __init__(self, act: Callable[[], Decision]) -> None:
        self._act = act

    def body_limit(self, request: Request) -> int:
        return 0

    def authorize(self, request: Request) -> Decision:
        return self._act() if request.host == "bad.test" else ALLOW


class Counting:
    """A meter that counts what it is asked to do."""

    def __init__(self) -> None:
        self.reserved = self.released = self.settled = 0

    def body_limit(self, request: Request) -> int:
        return 0

    def authorize(self, request: Request) -> Decision:
        self.reserved += 1
        return ALLOW

    def release(self, request: Request) -> None:
        self.released += 1

    def edits(self, request: Request) -> Edits | None:
        return None

    def tap(self, request: Request, status: int, content_type: str) -> Tap | None:
        return None

    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage:
        self.settled += 1
        return Usage("exact", "p", "m", {"input": 1}, 5)


class Person:
    """A gate that answers what it is told, and remembers the grants it spent."""

    def __init__(self, answer: Callable[[Request], Decision]) -> None:
        self._answer = answer
        self.bodies: list[bytes | None] = []
        self.spent = 0
        self.outcomes: list[Outcome] = []

    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        self.bodies.append(request.body)
        client.interim(102)
        return self._answer(request)

    def spend(self, request: Request) -> bool:
        self.spent += 1
        return True

    def settled(self, request: Request, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@dataclass
class Lab:
    """A gateway on loopback and an upstream that records what reached it."""

    port: int
    directory: Path
    upstream: asyncio.Server
    received: list[bytes] = field(default_factory=list)

    async def send(self, raw: bytes) -> bytes:
        """One connection, everything it answers until it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(raw)
        data = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        await writer.wait_closed()
        return data

    async def get(self, host: str, path: str = "/") -> bytes:
        return await self.send(f"GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.directory, "w"))


class NoResolver:
    def cached(self, name: str) -> Sequence[Address] | None:
        return None

    async def resolve(self, name: str) -> Sequence[Address]:
        raise OSError(f"{name} does not exist")


@asynccontextmanager
async def lab(tmp_path: Path, **parts: Any) -> AsyncIterator[Lab]:
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
                )
                received.append(head + await reader.readexactly(length))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    upstream = await asyncio.start_server(parts.get("serve", serve), "127.0.0.1", 0)
    up = upstream.sockets[0].getsockname()[1]
    hosts = ("good.test", "bad.test", "held.test", "denied.test")
    pins = {host: Endpoint(ipaddress.ip_address("127.0.0.1"), up) for host in hosts}
    pins["closed.test"] = Endpoint(ipaddress.ip_address("127.0.0.1"), 1)
    guard = Guard(parts.get("deadline_s", 5.0))
    links = Links()
    links.attach("lab", parts.get("agent", lambda: make_agent("a")))
    meter = parts.get("meter")
    journal = Journal(str(tmp_path), "w", flush="record")
    pipeline = Pipeline(
        identify=Identify(links, ()),
        policy=Policy(parts.get("policies", Policies(denied_test="deny", held_test="oversight"))),
        authorizers=(*parts.get("authorizers", ()), *((("meter", meter),) if meter else ())),
        gates=Gates([("gate", gate)] if (gate := parts.get("gate")) else [], guard),
        egress=Egress([("egress", parts.get("egress", Open()))], NoResolver(), pins, guard),
        upstreams=Upstreams(ssl.create_default_context(), Pool(), 2.0),
        meters=Meters([("meter", meter)] if meter else [], guard),
        recorder=Recorder(journal, threading.Event()),
        control=Control(parts.get("routes", ()), guard),
        guard=guard,
        clock=SystemClock(),
        tasks=set(),
        run="w",
        held_body_bytes=parts.get("held_body_bytes", 1000),
    )
    gateway = Gateway(
        pipeline,
        Targets(),
        Limits(),
        authority=CertificateAuthority(),
        names=lambda link, address: (),
        capacity=parts.get("capacity"),
    )
    sock = socket.create_server(("127.0.0.1", 0))
    await gateway.listen_proxy(sock, "lab", "explicit")
    with guard:
        try:
            yield Lab(sock.getsockname()[1], tmp_path, upstream, received)
        finally:
            await gateway.stop(parts.get("grace_s", 1.0))
            pipeline.upstreams.close()
            upstream.close()
            await upstream.wait_closed()
            journal.close()
            await asyncio.sleep(0.05)  # closed transports leave the loop one turn later




async def test_an_allowed_request_passes_and_is_recorded_with_its_usage(tmp_path: Path) -> None:
    async with lab(tmp_path, meter=Counting()) as here:
        answer = await here.get("good.test", "/x?secret=1")
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok")
        assert b"GET /x?secret=1 HTTP/1.1" in here.received[0] and b"Host: good.test\r\n" in here.received[0]
    [outcome] = here.journal()
    assert (outcome.decision, outcome.status, outcome.target, outcome.usage.cost_nano_usd) == ("allow", 200, "/x", 5)
    assert outcome.policies == ("p1",) and outcome.bytes_down > 0


async def test_a_denied_request_never_reaches_the_upstream(tmp_path: Path) -> None:
    meter = Counting()
    async with lab(tmp_path, meter=meter) as here:
        answer = await here.get("denied.test")
        assert answer.startswith(b"HTTP/1.1 403") and b'"policies":["p1"]' in answer
        assert here.received == [] and meter.reserved == 0
    assert [o.decision for o in here.journal()] == ["deny"]


def raises() -> Decision:
    raise RuntimeError("the api key is sk-123")


def sleeps() -> Decision:
    time.sleep(30)
    return ALLOW


def spins() -> Decision:
    while True:
        pass


def says_nothing() -> Decision:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("act", [raises, sleeps, spins, says_nothing])
async def test_an_authorizer_that_misbehaves_refuses_that_request_and_the_rest_go_on(
    tmp_path: Path, act: Callable[[], Decision]
) -> None:
    parts = {"authorizers": [("bad", Hosts(act))], "meter": (meter := Counting()), "deadline_s": 0.2}
    async with lab(tmp_path, **parts) as here:
        bad, good = await asyncio.gather(here.get("bad.test"), here.get("good.test"))
        assert bad.startswith(b"HTTP/1.1 503") and b"plugin bad" in bad and b"sk-123" not in bad
        assert good.endswith(b"ok")
        assert len(here.received) == 1
    assert meter.released == 1, "what was reserved for the refused request is given back"
    assert sorted(o.decision for o in here.journal()) == ["allow", "deny"]


def broken(base: type, method: str) -> Any:
    """An instance of ``base`` whose ``method`` raises."""

    def boom(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    made = type("Broken", (base,), {method: boom})
    return made(approve) if base is Person else made()


@pytest.mark.parametrize("method", ["name_allowed", "edits", "authorize", "body_limit"])
async def test_every_stage_before_the_send_refuses_when_it_raises(tmp_path: Path, method: str) -> None:
    parts = {"egress": broken(Open, method)} if method == "name_allowed" else {"meter": broken(Counting, method)}
    async with lab(tmp_path, **parts) as here:
        answer = await here.get("good.test")
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert here.received == []
    assert len(here.journal()) == 1


async def test_a_meter_that_fails_to_settle_leaves_usage_unknown_and_the_answer_whole(tmp_path: Path) -> None:
    async with lab(tmp_path, meter=broken(Counting, "settle")) as here:
        assert (await here.get("good.test")).endswith(b"ok")
    assert [o.usage.certainty for o in here.journal()] == ["unknown"]


def approve(request: Request) -> Decision:
    request.fingerprint = "sha256:x"
    request.approval = Approval("ovr_1", True, 1, frozenset(), "sha256:x")
    return ALLOW


def post(host: str, body: bytes = b"abc") -> bytes:
    head = f"POST http://{host}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_an_approved_request_is_spent_once_sent_whole_and_settled(tmp_path: Path) -> None:
    person, meter = Person(approve), Counting()
    async with lab(tmp_path, gate=person, meter=meter) as here:
        answer = await here.send(post("held.test"))
        assert answer.startswith(b"HTTP/1.1 102") and answer.endswith(b"ok")
        assert person.bodies == [b"abc"] and here.received[0].endswith(b"abc") and person.spent == 1
        assert meter.reserved - meter.released == 1
    [outcome] = here.journal()
    assert (outcome.decision, outcome.approval_id) == ("approved", "ovr_1")
    deadline = time.monotonic() + 60
    while not person.outcomes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [o.status for o in person.outcomes] == [200]


@pytest.mark.parametrize(
    ("decision", "status"),
    [
        (Decision(Verdict.DENY, "approval_denied", "no"), 403),
        (Decision(Verdict.ESCALATE, "approval_pending", facts={"approval_id": "ovr_1"}), 428),
    ],
)
async def test_without_a_yes_nothing_is_sent(tmp_path: Path, decision: Decision, status: int) -> None:
    async with lab(tmp_path, gate=Person(lambda r: decision)) as here:
        answer = await here.send(post("held.test"))
        assert f"HTTP/1.1 {status}".encode() in answer
        assert here.received == []


async def test_what_needs_a_person_is_refused_without_a_gate_and_when_the_gate_raises(tmp_path: Path) -> None:
    async with lab(tmp_path) as here:
        assert b"approval_unavailable" in await here.send(post("held.test"))
    async with lab(tmp_path, gate=broken(Person, "hold")) as here:
        assert b"HTTP/1.1 503" in await here.send(post("held.test"))
    async with lab(tmp_path, gate=broken(Person, "spend")) as here:
        assert b"HTTP/1.1 503" in await here.send(post("held.test"))
        assert here.received == []


async def test_a_held_body_larger_than_the_limit_is_413(tmp_path: Path) -> None:
    async with lab(tmp_path, gate=Person(approve)) as here:
        assert b"HTTP/1.1 413" in await here.send(post("held.test", b"x" * 1001))
        assert here.received == []


async def test_an_upstream_that_refuses_connections_is_502_and_one_without_address_too(tmp_path: Path) -> None:
    meter = Counting()
    async with lab(tmp_path, meter=meter) as here:
        assert b"upstream_unreachable" in await here.get("closed.test")
        assert b"name_not_found" in await here.get("nowhere.test")
    assert meter.released == 2 and meter.settled == 0


async def test_control_paths_answer_and_a_broken_route_costs_only_itself(tmp_path: Path) -> None:
    class Route:
        prefix = "/v1/broken"

        async def handle(self, request: ControlRequest) -> ControlResponse:
            raise RuntimeError("boom")

    async with lab(tmp_path, routes=[("bad", Route())]) as here:
        assert b"HTTP/1.1 503" in await here.get("creto.internal", "/v1/broken")
        whoami = await here.get("creto.internal", "/v1/whoami")
        assert json.loads(whoami.partition(b"\r\n\r\n")[2])["name"] == "a"
        assert b"HTTP/1.1 404" in await here.get("creto.internal", "/nope")


async def test_a_full_disk_refuses_new_requests_until_it_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path) as here:
        monkeypatch.setattr(Recorder, "healthy", property(lambda self: False))
        monkeypatch.setattr(Recorder, "probe", lambda self: False)
        answer = await here.get("good.test")
        assert b"HTTP/1.1 503" in answer and b"journal_unavailable" in answer
        monkeypatch.undo()
        assert (await here.get("good.test")).endswith(b"ok")
    assert here.received and len(here.received) == 1

