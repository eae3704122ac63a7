"""Holding a call, and what the agent gets when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from creto_oversight.desk import Caps
from creto_oversight.gate import outcome_event
from creto_oversight.requests import ApprovalRequest
from creto_oversight.states import Event, State
from creto_proxy.model import Decision, Request, Verdict
from creto_proxy.testing import FakeClient, FakeHeaders, make_outcome, make_request

from .harness import CaseClock, Fixed, Script, Station, Told, agent, escalated, refund, rules, send, submit

HELD_BY_100 = {"User-Agent": "python-requests/2.34.2", "Content-Type": "application/json"}
HELD_BY_102 = {"User-Agent": "curl/8", "Content-Type": "application/json"}
PROFILES = {
    "pay": rules(),
    "ops": rules("ops", ("human:carol",)),
    "loose": rules("loose", volatile=("/charge", "/amount"), redact=("/charge",)),
    "strict": rules("strict", volatile=("/charge",), bind_headers=("stripe-account",)),
}


@pytest.fixture
def clock() -> CaseClock:
    return CaseClock()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def station(tmp_path: Path, clock: CaseClock, told: Told) -> Iterator[Station]:
    station = Station(tmp_path, clock, Fixed(PROFILES), told)
    yield station
    station.crash()


def only(station: Station) -> ApprovalRequest:
    with station.store.reading() as session:
        [request] = session.listed()
    return request


async def hold(
    station: Station, request: Request, at: Mapping[float, Callable[[], object]], client: FakeClient | None = None
) -> Decision:
    """Holds while the clock runs; ``at`` maps seconds to callables."""
    gate = station.gate_with(Script(station.clock, at))
    return await gate.hold(request, escalated(), client or FakeClient())


def decider(station: Station, *, approve: bool = True, comment: str = "fine") -> Callable[[], object]:
    return lambda: station.desk.decide(only(station).id, "human:alice", approve=approve, comment=comment)


async def test_a_held_call_goes_on_when_a_person_approves(station: Station) -> None:
    request, client = refund(headers=HELD_BY_102), FakeClient()
    decision = await hold(station, request, {40: decider(station)}, client)
    assert (decision.verdict, decision.reason) == (Verdict.ALLOW, "approved")
    assert request.approval is not None and request.approval.satisfied
    assert request.approval.fingerprint == request.fingerprint != ""
    assert (request.approval.approvals, request.approval.approvers) == (1, ("human:alice",))
    assert client.interims == [102, 102]
    assert station.gate.spend(request)
    assert not station.gate.spend(request), "a grant is spent once"


async def test_a_denial_reaches_the_agent_with_its_reason(station: Station) -> None:
    decision = await hold(
        station, refund(headers=HELD_BY_102), {3: decider(station, approve=False, comment="too much")}
    )
    assert (decision.verdict, decision.reason, decision.status) == (Verdict.DENY, "approval_denied", 403)
    assert decision.detail == "Denied by alice: too much"
    again = await submit(station.gate, refund())
    assert (again.reason, again.facts["approval_id"]) == ("approval_denied", decision.facts["approval_id"])
    assert again.retry_after_s == 300


async def test_an_undecided_call_ends_in_428_before_its_client_gives_up(station: Station, clock: CaseClock) -> None:
    started = clock.now_ns()
    client = FakeClient()
    decision = await hold(station, refund(headers=HELD_BY_100), {}, client)
    assert (decision.verdict, decision.reason, decision.status) == (Verdict.ESCALATE, "approval_pending", 428)
    assert clock.now_ns() - started == 110 * 10**9
    assert set(client.interims) == {100}
    assert decision.facts["poll"] == f"/v1/approvals/{decision.facts['approval_id']}"
    assert (decision.facts["state"], decision.facts["retry_after_s"]) == ("pending", 30)
    assert decision.profiles == ("pay",)


async def test_a_deadline_that_passes_while_held_refuses(tmp_path: Path, clock: CaseClock) -> None:
    station = Station(tmp_path, clock, Fixed({"pay": rules(timeout_s=5)}), Told())
    started = clock.now_ns()
    decision = await hold(station, refund(headers=HELD_BY_102), {})
    assert (decision.verdict, decision.reason) == (Verdict.DENY, "approval_timed_out")
    assert clock.now_ns() - started == 5 * 10**9
    station.crash()


async def test_an_unknown_client_is_held_briefly_and_gets_no_heartbeat(station: Station, clock: CaseClock) -> None:
    started, client = clock.now_ns(), FakeClient()
    decision = await hold(station, refund(headers={"Content-Type": "application/json"}), {}, client)
    assert decision.verdict is Verdict.ESCALATE
    assert (clock.now_ns() - started, client.interims) == (4 * 10**9, [])


async def test_a_client_that_hangs_up_leaves_a_grant_that_the_next_identical_call_uses(station: Station) -> None:
    client, started = FakeClient(), station.clock.now_ns()
    decision = await hold(station, refund(headers=HELD_BY_102), {2: lambda: setattr(client, "gone", True)}, client)
    assert decision.verdict is Verdict.ESCALATE
    assert station.clock.now_ns() - started == 2 * 10**9
    station.desk.decide(only(station).id, "human:alice", approve=True)
    sent: list[bytes] = []
    assert (await send(station, refund(), sent)).allowed
    assert (len(sent), only(station).state) == (1, State.EXECUTED)


async def test_a_question_reaches_a_held_agent_at_once(station: Station, clock: CaseClock) -> None:
    started = clock.now_ns()
    question = {2.0: lambda: station.desk.ask(only(station).id, "human:alice", "which order?")}
    decision = await hold(station, refund(headers=HELD_BY_102), question)
    assert (decision.verdict, decision.facts["question"]) == (Verdict.ESCALATE, "which order?")
    assert clock.now_ns() - started == 2 * 10**9


async def test_no_more_calls_are_held_than_allowed(tmp_path: Path, clock: CaseClock) -> None:
    station = Station(tmp_path, clock, Fixed(PROFILES, held_max=0), Told())
    started = clock.now_ns()
    assert (await hold(station, refund(headers=HELD_BY_102), {})).status == 428
    assert clock.now_ns() == started
    station.crash()


async def test_people_are_told_once_and_only_after_the_request_is_stored(station: Station, told: Told) -> None:
    await submit(station.gate, refund())
    await submit(station.gate, refund())
    assert told.events == [(only(station).id, Event.SUBMITTED)]
    assert only(station).notified


async def test_a_notifier_that_fails_decides_nothing_and_is_tried_again(
    station: Station, told: Told, clock: CaseClock
) -> None:
    told.broken = True
    assert (await submit(station.gate, refund())).status == 428
    assert not only(station).notified
    told.broken = False
    clock.advance(6)
    station.desk.sweep()
    station.desk.sweep()
    assert told.events == [(only(station).id, Event.SUBMITTED)]


async def test_another_agent_or_delegation_cannot_use_a_grant(station: Station) -> None:
    await submit(station.gate, refund())
    first = only(station).id
    station.desk.decide(first, "human:alice", approve=True)
    other = await submit(station.gate, refund(who=agent("a2")))
    assert other.verdict is Verdict.ESCALATE and other.facts["approval_id"] != first
    moved = await submit(station.gate, refund(who=agent(chain=("human:mallory", "agent:a1"))))
    assert moved.verdict is Verdict.ESCALATE and moved.facts["approval_id"] != first
    assert station.desk.look(first).state is State.CANCELLED


async def test_an_approval_of_one_profile_does_not_answer_for_another(station: Station, told: Told) -> None:
    await submit(station.gate, refund())
    first = only(station).id
    station.desk.decide(first, "human:alice", approve=True)
    both = await submit(station.gate, refund(), "pay", "ops")
    assert both.verdict is Verdict.ESCALATE and both.profiles == ("pay", "ops")
    assert station.desk.look(first).state is State.CANCELLED
    assert (first, Event.CANCELLED) in told.events


@pytest.mark.parametrize(
    "change",
    [
        {"body": b'{"amount": 9900, "charge": "ch_1"}'},
        {"path": "/v1/refunds/all"},
        {"method": "PUT"},
        {"query": "x=1"},
        {"host": "evil.example.com"},
        {"port": 8443},
    ],
)
async def test_what_changed_after_the_approval_is_not_sent(station: Station, change: dict[str, object]) -> None:
    request = refund()
    await submit(station.gate, request)
    station.desk.decide(only(station).id, "human:alice", approve=True)
    assert (await submit(station.gate, request)).allowed
    for name, value in change.items():
        setattr(request, name, value)
    assert not station.gate.spend(request)
    assert only(station).state is State.APPROVED


async def test_a_method_override_is_part_of_what_is_approved(station: Station) -> None:
    request = refund()
    await submit(station.gate, request)
    station.desk.decide(only(station).id, "human:alice", approve=True)
    assert (await submit(station.gate, request)).allowed
    request.headers = FakeHeaders([*request.headers.items(), ("X-HTTP-Method-Override", "DELETE")])
    assert not station.gate.spend(request)


async def test_a_request_nobody_approved_cannot_be_spent(station: Station) -> None:
    assert not station.gate.spend(refund())
    forged = refund()
    await submit(station.gate, forged)
    station.desk.decide(only(station).id, "human:alice", approve=True)
    assert (await submit(station.gate, forged)).allowed
    assert forged.approval is not None
    forged.approval = replace(forged.approval, id="ovr_other")
    assert not station.gate.spend(forged)


async def test_two_identical_calls_share_one_request_and_one_send(station: Station) -> None:
    first, second = refund(), refund()
    await submit(station.gate, first)
    station.desk.decide(only(station).id, "human:alice", approve=True)
    assert (await submit(station.gate, first)).allowed
    assert (await submit(station.gate, second)).allowed
    assert station.gate.spend(first)
    assert not station.gate.spend(second)
    busy = await submit(station.gate, refund())
    assert (busy.reason, busy.status) == ("approval_in_use", 409)


async def test_a_lapsed_grant_is_asked_for_again(station: Station, clock: CaseClock) -> None:
    await submit(station.gate, refund())
    first = only(station).id
    station.desk.decide(first, "human:alice", approve=True)
    clock.advance(300)
    again = await submit(station.gate, refund())
    assert (again.status, station.desk.look(first).state) == (428, State.TIMED_OUT)
    previous = station.desk.look(str(again.facts["approval_id"])).previous
    assert previous is not None and previous.id == first


async def test_volatile_parts_count_only_when_every_profile_says_so(station: Station) -> None:
    one = await submit(station.gate, refund(1), "loose")
    assert (await submit(station.gate, refund(2), "loose")).facts["approval_id"] == one.facts["approval_id"]
    strict = await submit(station.gate, refund(3), "loose", "strict")
    assert (await submit(station.gate, refund(4), "loose", "strict")).facts["approval_id"] != strict.facts[
        "approval_id"
    ]


async def test_header_fields_a_profile_binds_are_bound(station: Station) -> None:
    def request(account: str) -> Request:
        fields = {"Content-Type": "application/json", "Prefer": "wait=0", "Stripe-Account": account}
        return refund(headers=fields)

    one = await submit(station.gate, request("acct_1"), "strict")
    two = await submit(station.gate, request("acct_2"), "strict")
    assert one.facts["approval_id"] != two.facts["approval_id"]


async def test_asking_too_much_is_refused_and_nobody_is_told(tmp_path: Path, clock: CaseClock) -> None:
    told = Told()
    station = Station(
        tmp_path, clock, Fixed(PROFILES), told, Caps(open_agent=2, open_root=3, minute_agent=5, minute_root=9)
    )
    assert [(await submit(station.gate, refund(n))).status for n in range(2)] == [428, 428]
    third = await submit(station.gate, refund(2))
    assert (third.verdict, third.reason, third.status) == (Verdict.DENY, "approval_flood", 429)
    assert (await submit(station.gate, refund(0))).status == 428, "joining an open request is not asking again"
    assert (await submit(station.gate, refund(3, who=agent("a2")))).status == 428
    assert (await submit(station.gate, refund(4, who=agent("a3")))).reason == "approval_flood", "same human behind it"
    assert len(told.events) == 3
    station.crash()


async def test_new_requests_per_minute_are_limited_even_when_all_are_decided(tmp_path: Path, clock: CaseClock) -> None:
    station = Station(tmp_path, clock, Fixed(PROFILES), Told(), Caps(9, 9, minute_agent=2, minute_root=9))
    for number in range(2):
        asked = await submit(station.gate, refund(number))
        station.desk.decide(str(asked.facts["approval_id"]), "human:alice", approve=False, comment="no")
        clock.advance(10)
    flood = await submit(station.gate, refund(2))
    assert (flood.reason, flood.retry_after_s) == ("approval_flood", 40.0)
    clock.advance(40)
    assert (await submit(station.gate, refund(2))).status == 428
    station.crash()


@pytest.mark.parametrize(
    ("fields", "body", "reason", "status"),
    [
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"{}", "approval_body_encoded", 415),
        ({"Content-Type": "application/json"}, b'{"a":1,"a":2}', "approval_ambiguous_body", 422),
        ({"Content-Length": "12"}, None, "approval_body_unknown", 413),
        ({"Transfer-Encoding": "chunked"}, None, "approval_body_unknown", 413),
        ({}, b"x" * ((1 << 20) + 1), "approval_body_too_large", 413),
    ],
)
async def test_what_cannot_be_shown_or_bound_is_refused_without_asking(
    station: Station, told: Told, fields: dict[str, str], body: bytes | None, reason: str, status: int
) -> None:
    decision = await submit(station.gate, make_request("POST", headers=fields, body=body))
    assert (decision.verdict, decision.reason, decision.status) == (Verdict.DENY, reason, status)
    assert told.events == []


async def test_two_content_types_are_refused(station: Station) -> None:
    fields = [("Content-Type", "application/json"), ("content-type", "text/plain")]
    assert (await submit(station.gate, make_request("POST", headers=fields, body=b"{}"))).status == 400


@pytest.mark.parametrize("profiles", [("nobody",), ("pay", "nobody")])
async def test_an_undefined_profile_is_a_refusal(station: Station, profiles: tuple[str, ...]) -> None:
    decision = await submit(station.gate, refund(), *profiles)
    assert (decision.verdict, decision.reason) == (Verdict.DENY, "approval_profile_unknown")


async def test_an_escalation_without_a_profile_is_a_refusal(station: Station) -> None:
    decision = await station.gate.hold(refund(), Decision(Verdict.ESCALATE, "x"), FakeClient())
    assert decision.reason == "approval_profile_unknown"


async def test_a_store_that_is_gone_refuses(station: Station) -> None:
    request = refund()
    await submit(station.gate, request)
    station.desk.decide(only(station).id, "human:alice", approve=True)
    assert (await submit(station.gate, request)).allowed
    station.store.close()
    assert (await submit(station.gate, refund(2))).reason == "approval_unavailable"
    assert not station.gate.spend(request)
    station.gate.settled(request, make_outcome(request))


async def test_what_is_stored_has_no_credentials(station: Station) -> None:
    fields = {
        "Content-Type": "application/json", "Prefer": "wait=0", "Authorization": "Bearer SECRET",
        "Cookie": "sid=SECRET", "X-Api-Key": "SECRET", "x-goog-api-key": "SECRET", "X-Amz-Security-Token": "SECRET",
        "X-Trace": "kept",
    }  # fmt: skip
    body = b'{"charge":"SECRET","password":"SECRET","nested":[{"client_secret":"SECRET","note":"kept"}]}'
    request = make_request("POST", headers=fields, body=body, query="api_key=SECRET&limit=5")
    await submit(station.gate, request, "loose")
    shown = only(station).shown
    assert shown.query == "api_key=[redacted]&limit=5"
    assert shown.body == (
        '{"charge":"[redacted]","password":"[redacted]","nested":[{"client_secret":"[redacted]","note":"kept"}]}'
    )
    assert ("X-Trace", "kept") in shown.headers
    station.store.close()
    assert b"SECRET" not in b"".join(path.read_bytes() for path in station.store.path.parent.glob("*.db*"))


@pytest.mark.parametrize(
    ("changes", "event"),
    [
        ({"status": 200}, Event.SUCCEEDED),
        ({"status": 404}, Event.FAILED),
        ({"status": 500}, Event.FAILED),
        ({"status": 502}, Event.FAILED),
        ({"status": 200, "error": "agent_gone"}, Event.SUCCEEDED),
        ({"status": 504, "error": "upstream_timeout"}, Event.LOST),
        ({"status": 502, "error": "upstream_closed"}, Event.LOST),
        ({"status": 0, "error": "agent_gone"}, Event.LOST),
        ({"status": 502, "error": "upstream_unreachable"}, Event.FAILED),
        ({"status": 403, "decision": "deny"}, Event.FAILED),
        ({"status": 0, "upstream_ns": 0}, Event.FAILED),
    ],
)
def test_how_a_send_ended(changes: dict[str, object], event: Event) -> None:
    outcome = make_outcome(refund(), decision="approved")
    for name, value in changes.items():
        setattr(outcome, name, value)
    assert outcome_event(outcome) is event


async def test_an_edited_body_is_what_is_sent_and_bound(tmp_path: Path, clock: CaseClock) -> None:
    station = Station(tmp_path, clock, Fixed({"pay": rules(allow_edit=True)}), Told())
    await submit(station.gate, refund(800))
    station.desk.edit(
        only(station).id, "human:alice", binding="sha256:new", body=b'{"amount":1}', shown_body='{"amount":1}'
    )
    request = refund(800)
    decision = await submit(station.gate, request)
    assert decision.allowed and decision.facts["modified"]
    assert (request.body, request.fingerprint) == (b'{"amount":1}', "sha256:new")
    assert station.gate.spend(request)
    station.crash()
