"""The worked cases, through one adapter: JSON in, what the desk and the gate did out."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from creto_oversight.engine import CommandRefused
from creto_oversight.fingerprint import Action, Unhashable, fingerprint
from creto_oversight.hold import heartbeat
from creto_oversight.requests import ApprovalRequest, Level, Rules
from creto_proxy.model import Agent, Decision, Verdict
from creto_proxy.testing import FakeClient, FakeHeaders, make_outcome, make_request

from .harness import CaseClock, Fixed, Station, Told, escalated

_DIRECTORY = Path(os.environ.get("CRETO_CASES_DIR") or Path(__file__).parents[2] / "cases")
CASES = json.loads((_DIRECTORY / "oversight.json").read_text())["cases"]

_POLICY = {
    "id", "quorum", "eligible", "deny_threshold", "timeout_s", "on_timeout", "escalation", "grant_ttl_s",
    "grant_max_uses", "separation", "allow_edit", "deny_cooldown_s",
}  # fmt: skip
_OPERATIONS = {
    "submit", "decide", "edit", "request_info", "answer", "cancel", "disconnect", "tick", "crash", "restart",
    "policy_change", "revoke_agent",
}  # fmt: skip
_EXPECTED = {
    "state", "http", "created", "upstream_calls", "approvals", "problem", "decided_by", "level", "version", "question",
    "notifications", "upstream_body", "modified", "held_http",
}  # fmt: skip


def unknown_words(case: dict[str, Any]) -> set[str]:
    """What a case uses that this adapter cannot play or check."""
    events = case["events"]
    words = set(case["policy"]) - _POLICY
    words |= {event["op"] for event in events} - _OPERATIONS
    words |= {key for event in events for key in event["expect"]} - _EXPECTED
    words |= {event["fault"] for event in events if "fault" in event} - {"crash_before_outcome"}
    words |= {event["decision"] for event in events if event["op"] == "decide"} - {"approve", "deny"}
    return words | ({"grant_max_uses"} if case["policy"].get("grant_max_uses", 1) != 1 else set())


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in CASES if case["kind"] == kind]


def rules_of(policy: dict[str, Any]) -> Rules:
    return Rules(
        name=policy["id"],
        quorum=policy["quorum"],
        approvers=tuple(policy["eligible"]),
        timeout_s=policy["timeout_s"],
        deny_threshold=policy.get("deny_threshold", 1),
        separation=policy.get("separation", "none"),
        grant_ttl_s=policy.get("grant_ttl_s", 300),
        deny_cooldown_s=policy.get("deny_cooldown_s", 300),
        escalation=tuple(Level(level["after_s"], tuple(level["add"])) for level in policy.get("escalation", ())),
        allow_edit=policy.get("allow_edit", False),
    )


def body_of(action: dict[str, Any]) -> bytes | None:
    if "raw_body" in action:
        return str(action["raw_body"]).encode()
    return json.dumps(action["body"]).encode() if action.get("body") is not None else None


def action_of(who: str, action: dict[str, Any]) -> Action:
    url = urlsplit(action["url"])
    return Action(
        agent=who,
        kind=action["kind"],
        method=action["method"],
        scheme=url.scheme,
        host=(url.hostname or "").lower(),
        port=url.port or {"https": 443, "http": 80}[url.scheme],
        path=url.path or "/",
        query=url.query,
        content_type=action.get("content_type"),
        body=body_of(action),
    )


@dataclass
class Held:
    task: asyncio.Task[dict[str, Any]]
    client: FakeClient


class Play:
    """Plays the events of one case. The core around the gate is reduced to identity, policy, send and outcome."""

    def __init__(self, case: dict[str, Any], directory: Path) -> None:
        self.directory = directory
        self.clock = CaseClock()
        self.told = Told()
        requester = case["requester"]
        self.agent = Agent(
            requester["agent"], requester["agent"], tuple(requester["delegation_chain"]), bytes(32), (), 4e9
        )
        self.profiles = Fixed({case["policy"]["id"]: rules_of(case["policy"])})
        self.profile = case["policy"]["id"]
        self.station = self.start()
        self.current = ""
        self.sent: list[bytes] = []
        self.forbidden = ""
        self.held: list[Held] = []

    def start(self) -> Station:
        return Station(self.directory, self.clock, self.profiles, self.told)

    async def run(self, event: dict[str, Any]) -> dict[str, Any]:
        """What the event led to, under the names that cases expect."""
        self.clock.set(event["at"])
        told_before = len(self.told.events)
        got: dict[str, Any] = await getattr(self, f"play_{event['op']}")(event) or {}
        await self.resume_held(got)
        got["upstream_calls"] = len(self.sent)
        got["notifications"] = len(self.told.events) - told_before
        if self.current:
            self.describe(self.station.desk.look(self.current), got)
        return got

    def describe(self, request: ApprovalRequest, got: dict[str, Any]) -> None:
        got |= {
            "state": str(request.state),
            "approvals": len(request.yes),
            "version": request.version,
            "level": request.level,
            "question": request.question,
            "decided_by": request.decided_by,
        }

    async def resume_held(self, got: dict[str, Any]) -> None:
        self.station.bells.ring()
        for held in self.held:
            for _ in range(10):
                await asyncio.sleep(0)
            if held.task.done():
                got["held_http"] = held.task.result().get("http")
        self.held = [held for held in self.held if not held.task.done()]

    async def play_submit(self, event: dict[str, Any]) -> dict[str, Any]:
        client = FakeClient()
        before = self.current
        if not event.get("hold"):
            got = await self.pass_through(event, client)
        else:
            task = asyncio.create_task(self.pass_through(event, client))
            self.held.append(Held(task, client))
            for _ in range(10):
                await asyncio.sleep(0)
            with self.station.store.reading() as session:
                self.current = session.listed(limit=1)[0].id
            got = {}
        return {"created": self.current != before, **got}

    async def pass_through(self, event: dict[str, Any], client: FakeClient) -> dict[str, Any]:
        if self.forbidden:
            return {"http": 403, "problem": self.forbidden}
        action = event["action"]
        url = urlsplit(action["url"])
        fields = {"Content-Type": action["content_type"]} if action.get("content_type") else {}
        fields |= {"User-Agent": "curl/8"} if event.get("hold") else {"Prefer": "wait=0"}
        request = make_request(
            action["method"],
            host=(url.hostname or "").lower(),
            port=url.port or {"https": 443, "http": 80}[url.scheme],
            scheme=url.scheme,
            path=url.path,
            query=url.query,
            headers=fields,
            body=body_of(action),
            agent=self.agent,
        )
        decision = await self.station.gate.hold(request, escalated(self.profile), client)
        self.current = str(decision.facts.get("approval_id", self.current))
        if not decision.allowed:
            return refused(decision)
        if self.forbidden or client.gone:
            return {"http": 403, "problem": self.forbidden}
        if not self.station.gate.spend(request):
            return {"http": 409, "problem": "grant-spent"}
        self.sent.append(request.body or b"")
        got = {"upstream_body": json.loads(request.body or b"null"), "modified": bool(decision.facts.get("modified"))}
        if event.get("fault") is None:
            self.station.gate.settled(request, make_outcome(request, decision="approved"))
            return {"http": 200, **got}
        return got

    async def play_decide(self, event: dict[str, Any]) -> dict[str, Any]:
        desk = self.station.desk
        approve, comment = (
            event["decision"] == "approve",
            event.get("comment", "no" if event["decision"] == "deny" else ""),
        )
        return attempt(
            lambda: desk.decide(
                self.current,
                event["by"],
                approve=approve,
                comment=comment,
                version=event.get("version"),
                via=event.get("via", ""),
            )
        )

    async def play_edit(self, event: dict[str, Any]) -> dict[str, Any]:
        action = action_of(self.agent.id, event["action"])
        body = action.body or b""
        desk = self.station.desk
        return attempt(
            lambda: desk.edit(
                self.current, event["by"], binding=fingerprint(action), body=body, shown_body=body.decode()
            )
        )

    async def play_request_info(self, event: dict[str, Any]) -> dict[str, Any]:
        return attempt(lambda: self.station.desk.ask(self.current, event["by"], event["question"]))

    async def play_answer(self, event: dict[str, Any]) -> dict[str, Any]:
        return attempt(lambda: self.station.desk.answer(self.current, event["agent"], event["text"]))

    async def play_cancel(self, event: dict[str, Any]) -> dict[str, Any]:
        actor = event.get("by") or event.get("agent") or self.agent.id
        return attempt(lambda: self.station.desk.cancel(self.current, actor, event.get("comment", "")))

    async def play_disconnect(self, event: dict[str, Any]) -> None:
        for held in self.held:
            held.client.gone = True

    async def play_tick(self, event: dict[str, Any]) -> None:
        self.station.desk.sweep()

    async def play_crash(self, event: dict[str, Any]) -> None:
        self.station.crash()
        self.station.store.open()  # only to look at what a dead process left

    async def play_restart(self, event: dict[str, Any]) -> None:
        self.station.crash()
        self.station = self.start()
        self.station.desk.sweep()

    async def play_policy_change(self, event: dict[str, Any]) -> None:
        self.forbidden = "policy-denied" if event["decision"] == "deny" else ""

    async def play_revoke_agent(self, event: dict[str, Any]) -> None:
        if event["agent"] == self.agent.id:
            self.forbidden = "identity-revoked"


def refused(decision: Decision) -> dict[str, Any]:
    http = 428 if decision.verdict is Verdict.ESCALATE else decision.status
    return {"http": http, "problem": decision.reason.replace("_", "-"), "detail": decision.detail}


def attempt(command: Any) -> dict[str, Any]:
    try:
        command()
    except CommandRefused as error:
        return {"http": error.status, "problem": error.problem, "detail": error.detail}
    return {"http": 200}


@pytest.fixture
def closing() -> Iterator[list[Play]]:
    plays: list[Play] = []
    yield plays
    for play in plays:
        play.station.crash()


@pytest.mark.parametrize("case", of_kind("state_machine"))
async def test_state_machine_case(case: dict[str, Any], tmp_path: Path, closing: list[Play]) -> None:
    if unknown_words(case):
        pytest.skip(f"uses what is not built: {', '.join(sorted(unknown_words(case)))}")
    play = Play(case, tmp_path)
    closing.append(play)
    for number, event in enumerate(case["events"]):
        got = await play.run(event)
        assert {key: got.get(key) for key in event["expect"]} == event["expect"], f"event {number}: {event['op']}"
    assert play.station.store.verify_history() > 0


@pytest.mark.parametrize("case", of_kind("fingerprint"))
def test_fingerprint_case(case: dict[str, Any]) -> None:
    given, expect = case["given"], case["expect"]
    if set(given) - {"agent", "a", "b", "agent_b", "volatile"} or set(expect) - {"equal", "fp_a", "fp_b"}:
        pytest.skip(f"says more than this adapter knows: {sorted(given)} -> {sorted(expect)}")
    volatile = given.get("volatile", ())
    first = fingerprint(action_of(given["agent"], given["a"]), volatile)
    second = fingerprint(action_of(given.get("agent_b", given["agent"]), given["b"]), volatile)
    assert {"equal": first == second, "fp_a": first, "fp_b": second} | expect == {
        "equal": first == second,
        "fp_a": first,
        "fp_b": second,
    }


@pytest.mark.parametrize("case", of_kind("client"))
def test_client_case_gets_a_heartbeat_it_survives(case: dict[str, Any]) -> None:
    given = case["given"]
    if "heartbeat" not in given:
        pytest.skip("about MCP answers, which the core writes")
    headers = FakeHeaders({"User-Agent": given["user_agent"], **given.get("headers", {})})
    beat = heartbeat(headers)
    timeout_s = float(given.get("headers", {}).get("x-stainless-read-timeout", given.get("timeout_s", 300)))
    assert beat.status == int(given["heartbeat"])
    assert beat.every_s < timeout_s
    assert beat.limit_s > given["decision_after_s"]


def test_an_altered_action_field_alters_the_fingerprint() -> None:
    """Whatever the cases sample, each field of the formula counts."""
    action = action_of("agent:a1", {"kind": "http", "method": "POST", "url": "https://h.test/p", "body": {"a": 1}})
    action = replace(action, content_type="application/json")
    changes: dict[str, Any] = {
        "agent": "agent:a2", "kind": "tunnel", "method": "PUT", "scheme": "http", "host": "i.test", "port": 444,
        "path": "/q", "query": "x", "content_type": "text/plain", "headers": (("x-http-method", "PUT"),), "body": None,
    }  # fmt: skip
    others = [replace(action, **{name: value}) for name, value in changes.items()]
    prints = [fingerprint(each) for each in (action, *others)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    "body",
    [b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b"{", b"\xff", b"",
     b'\xef\xbb\xbf{}', b'"\\ud800"', b"[" * 200_000],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_json_that_parsers_read_differently_has_no_fingerprint(body: bytes) -> None:
    action = Action("a", "http", "POST", "https", "h.test", 443, "/", "", "application/json", body=body)
    with pytest.raises(Unhashable) as refusal:
        fingerprint(action)
    assert refusal.value.status == 422


def test_integers_that_jcs_cannot_write_are_bound_by_their_bytes() -> None:
    def printed(body: bytes) -> str:
        return fingerprint(Action("a", "http", "POST", "https", "h.test", 443, "/", "", "application/json", body=body))

    assert printed(b'{"id":9007199254740993}') != printed(b'{"id":9007199254740992}')


def test_other_bodies_are_bound_by_their_bytes() -> None:
    def printed(body: bytes, content_type: str | None) -> str:
        return fingerprint(Action("a", "http", "POST", "https", "h.test", 443, "/", "", content_type, body=body))

    assert printed(b"a=1&b=2", "application/x-www-form-urlencoded") != printed(
        b"b=2&a=1", "application/x-www-form-urlencoded"
    )
    assert printed(b'{"a": 1}', None) != printed(b'{"a":1}', None)
    assert printed(b'{"a": 1}', "application/vnd.api+json") == printed(b'{"a":1}', "application/vnd.api+json")


def test_volatile_parts_are_not_bound_and_everything_else_is() -> None:
    def printed(body: object) -> str:
        raw = json.dumps(body).encode()
        action = Action("a", "http", "POST", "https", "h.test", 443, "/", "", "application/json", body=raw)
        return fingerprint(action, ("/meta/id", "/items/0/at"))

    first = printed({"meta": {"id": 1, "to": "x"}, "items": [{"at": 1, "n": 1}]})
    assert first == printed({"meta": {"id": 2, "to": "x"}, "items": [{"at": 9, "n": 1}]})
    assert first == printed({"meta": {"to": "x"}, "items": [{"n": 1}]})
    assert first != printed({"meta": {"id": 1, "to": "y"}, "items": [{"at": 1, "n": 1}]})
    assert first != printed({"meta": {"id": 1, "to": "x"}, "items": [{"at": 1, "n": 2}]})
