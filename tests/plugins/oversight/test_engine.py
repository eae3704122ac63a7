"""The rules of deciding, as tables and by property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_oversight import engine
from creto_oversight.approvers import Directory, canonical
from creto_oversight.engine import CommandRefused, Standing
from creto_oversight.requests import SECOND_NS, ApprovalRequest, Change, Level, Rules, Shown
from creto_oversight.states import LIVE, OPEN, TABLE, TERMINAL, Event, NoSuchTransition, State, step

from .harness import T0_NS, rules

SHOWN = Shown("http", "POST", "https", "h.test", 443, "/", "", "", (), "", 0, "")


def request(*profiles: Rules, chain: tuple[str, ...] = ("human:erin", "agent:a1"), **changes: Any) -> ApprovalRequest:
    chosen = profiles or (rules(),)
    return ApprovalRequest(
        id="ovr_1", agent="agent:a1", chain=chain, fingerprint="F", binding="F", rules=chosen, directory=Directory(),
        shown=SHOWN, created_ns=T0_NS, deadline_ns=T0_NS + round(min(r.timeout_s for r in chosen) * SECOND_NS),
        **changes,
    )  # fmt: skip


def vote(found: ApprovalRequest, human: str, approve: bool = True, at_s: float = 1, **more: Any) -> ApprovalRequest:
    comment = more.pop("comment", "because")
    now_ns = T0_NS + round(at_s * SECOND_NS)
    return engine.vote(found, human, approve=approve, comment=comment, now_ns=now_ns, **more).request


def refusal(command: Callable[[], object]) -> str:
    with pytest.raises(CommandRefused) as caught:
        command()
    return caught.value.problem


def test_a_quorum_counts_people_not_votes() -> None:
    found = request(rules(quorum=2))
    found = vote(vote(found, "human:alice"), "human:alice", via="slack:T1/U1")
    assert (found.state, len(found.yes)) == (State.PENDING, 1)
    assert vote(found, "human:bob").state is State.APPROVED


def test_the_last_vote_of_a_person_counts() -> None:
    found = vote(request(rules(quorum=2, deny_threshold=2)), "human:alice")
    found = vote(found, "human:alice", approve=False)
    assert not found.yes
    assert found.no == {"human:alice"}


def test_denials_are_counted_before_approvals() -> None:
    found = vote(request(rules(quorum=1, deny_threshold=2)), "human:alice", approve=False)
    assert found.state is State.PENDING
    assert vote(found, "human:bob", approve=False).state is State.DENIED


def test_every_profile_must_be_satisfied_and_each_may_veto() -> None:
    finance, legal = rules("finance", ("human:alice",)), rules("legal", ("human:carol",))
    found = vote(request(finance, legal), "human:alice")
    assert found.state is State.PENDING
    assert vote(found, "human:carol").state is State.APPROVED
    assert vote(found, "human:carol", approve=False).state is State.DENIED


def test_groups_must_all_be_represented() -> None:
    both = rules(
        approvers=("human:alice", "human:bob", "human:carol"), quorum=2, group_quorum={"finance": 1, "legal": 1},
        groups={"finance": ("human:alice", "human:bob"), "legal": ("human:carol",)},
    )  # fmt: skip
    found = vote(vote(request(both), "human:alice"), "human:bob")
    assert found.state is State.PENDING
    assert found.groups == {"finance"}
    found = vote(found, "human:carol")
    assert found.state is State.APPROVED
    assert found.groups == {"finance", "legal"}


@pytest.mark.parametrize(
    ("separation", "human", "may"),
    [
        ("none", "human:erin", True),
        ("owner", "human:erin", False),
        ("owner", "human:frank", True),
        ("chain", "human:erin", False),
        ("chain", "human:frank", False),
        ("chain", "human:alice", True),
        ("owner", "human:ERIN", False),
    ],
)
def test_separation_of_duties(separation: str, human: str, may: bool) -> None:
    people = ("human:erin", "human:frank", "human:alice", "human:ERIN")
    chain = ("spiffe://local/human/erin", "spiffe://other/human/frank", "spiffe://local/agent/a1")
    found = request(rules(approvers=people, separation=separation), chain=chain)
    if may:
        assert vote(found, human).state is State.APPROVED
    else:
        assert refusal(lambda: vote(found, human)) == "approver-not-eligible"
    assert vote(found, human, approve=False).state is State.DENIED, "whoever is kept apart may still deny"


@pytest.mark.parametrize("voter", ["agent:a0", "spiffe://local/agent/a0", "alice", "human:", "human:mallory", ""])
def test_only_listed_humans_vote(voter: str) -> None:
    found = request(rules(approvers=("agent:a0", "spiffe://local/agent/a0", "alice", "human:", "human:alice")))
    assert refusal(lambda: vote(found, voter)) == "approver-not-eligible"
    assert refusal(lambda: vote(found, voter, approve=False)) == "approver-not-eligible"


def test_a_denial_needs_a_reason() -> None:
    assert refusal(lambda: vote(request(), "human:alice", approve=False, comment="  ")) == "reason-required"


def test_a_decision_on_an_older_version_does_not_count() -> None:
    assert refusal(lambda: vote(request(version=2), "human:alice", version=1)) == "stale-version"


def test_a_repeated_decision_is_a_success_without_effect() -> None:
    found = vote(request(), "human:alice")
    again = engine.vote(found, "human:alice", approve=True, comment="because", now_ns=T0_NS)
    assert again == Change(found)
    assert refusal(lambda: vote(found, "human:bob")) == "already-decided"
    assert refusal(lambda: vote(found, "human:alice", approve=False)) == "already-decided"


def test_escalation_adds_approvers_and_keeps_votes_and_deadline() -> None:
    found = request(rules(quorum=2, escalation=(Level(60, ("human:dan",)), Level(90, ("human:eve",))), timeout_s=120))
    found = vote(found, "human:alice")
    assert refusal(lambda: vote(found, "human:dan")) == "approver-not-eligible"
    found = engine.advance(found, T0_NS + 60 * SECOND_NS).request
    assert (found.state, found.level, found.deadline_ns) == (State.ESCALATED, 1, T0_NS + 120 * SECOND_NS)
    assert refusal(lambda: vote(found, "human:eve")) == "approver-not-eligible"
    assert vote(found, "human:dan", at_s=61).state is State.APPROVED


def test_escalations_of_two_profiles_fall_due_each_in_its_time() -> None:
    slow = rules("slow", ("human:alice",), escalation=(Level(90, ("human:dan",)),))
    fast = rules("fast", ("human:alice",), escalation=(Level(30, ("human:eve",)),))
    found = engine.advance(request(slow, fast), T0_NS + 30 * SECOND_NS).request
    assert found.rules[1].eligible(found.reached_s) == {"human:alice", "human:eve"}
    assert found.rules[0].eligible(found.reached_s) == {"human:alice"}


def test_a_question_holds_up_escalation_but_not_the_deadline() -> None:
    found = request(rules(escalation=(Level(60, ("human:dan",)),), timeout_s=200))
    found = engine.ask(found, "human:alice", "which order?", T0_NS + 50 * SECOND_NS).request
    found = engine.advance(found, T0_NS + 100 * SECOND_NS).request
    assert (found.state, found.level) == (State.INFO_REQUESTED, 0)
    assert refusal(lambda: engine.answer(found, "agent:a2", "7", T0_NS)) == "not-requester"
    found = engine.answer(found, "agent:a1", "order 7", T0_NS + 100 * SECOND_NS).request
    assert (found.state, found.answer, engine.due_ns(found)) == (State.PENDING, "order 7", T0_NS + 110 * SECOND_NS)
    assert engine.advance(found, T0_NS + 200 * SECOND_NS).request.state is State.TIMED_OUT


def test_an_unused_grant_lapses_and_may_be_asked_for_again() -> None:
    found = vote(request(rules(grant_ttl_s=30)), "human:alice", at_s=1)
    assert engine.standing(found, T0_NS + 30 * SECOND_NS) is Standing.GRANT
    late = T0_NS + 31 * SECOND_NS
    assert refusal(lambda: engine.spend(found, "me", late)) == "grant-spent"
    found = engine.advance(found, late).request
    assert (found.state, engine.standing(found, late)) == (State.TIMED_OUT, Standing.NEW)


def test_a_no_stands_for_the_cooldown() -> None:
    denied = vote(request(rules(deny_cooldown_s=300)), "human:alice", approve=False, at_s=1)
    assert engine.standing(denied, T0_NS + 300 * SECOND_NS) is Standing.REFUSED
    assert engine.standing(denied, T0_NS + 301 * SECOND_NS) is Standing.NEW


def test_an_unknown_outcome_blocks_until_a_person_has_looked() -> None:
    spent = engine.spend(vote(request(), "human:alice"), "me", T0_NS).request
    lost = engine.settle(spent, Event.LOST, T0_NS).request
    assert engine.standing(lost, T0_NS + 10**18) is Standing.UNKNOWN
    seen = engine.acknowledge(lost, "os:alice", "it never arrived").request
    assert (seen.state, engine.standing(seen, T0_NS)) == (State.INDETERMINATE, Standing.NEW)


def test_an_edit_needs_permission_and_somebody_who_could_approve() -> None:
    def edit(found: ApprovalRequest, human: str) -> ApprovalRequest:
        return engine.edit(found, human, binding="G", body=b"{}", shown_body="{}", now_ns=T0_NS).request

    assert refusal(lambda: edit(request(), "human:alice")) == "edit-not-allowed"
    found = request(rules(allow_edit=True, quorum=2, separation="owner"), chain=("human:alice", "agent:a1"))
    assert refusal(lambda: edit(found, "human:alice")) == "approver-not-eligible"
    edited = edit(found, "human:bob")
    assert (edited.version, edited.binding, edited.fingerprint) == (2, "G", "F")
    assert edited.yes == {"human:bob"}


def test_a_request_is_cancelled_only_while_nothing_is_spent() -> None:
    assert engine.cancel(request(), "os:alice", "", T0_NS).request.state is State.CANCELLED
    approved = vote(request(), "human:alice")
    assert engine.cancel(approved, "os:alice", "", T0_NS).request.state is State.CANCELLED
    spent = engine.spend(approved, "me", T0_NS).request
    assert refusal(lambda: engine.cancel(spent, "os:alice", "", T0_NS)) == "already-decided"


def test_the_table_leads_out_of_no_terminal_state_and_reaches_every_state() -> None:
    assert {row.to for row in TABLE} | {State.PENDING} == set(State)
    assert {
        State.EXECUTED,
        State.FAILED,
        State.INDETERMINATE,
        State.DENIED,
        State.TIMED_OUT,
        State.CANCELLED,
    } == TERMINAL
    assert {row.state for row in TABLE if row.to is State.EXECUTING} == {State.APPROVED}
    assert {row.state for row in TABLE if row.to is State.APPROVED} == OPEN
    for state in TERMINAL:
        for event in Event:
            with pytest.raises(NoSuchTransition):
                step(state, event)
    assert LIVE == OPEN | {State.APPROVED, State.EXECUTING}


def test_names_of_people_and_agents_have_one_form() -> None:
    assert canonical("spiffe://local/human/alice") == "human:alice" == canonical("human:alice")
    assert canonical("spiffe://local/agent/human:alice") == "agent:human:alice"
    assert canonical("spiffe://local/human/") == "spiffe://local/human/"


def test_an_identity_leads_to_at_most_one_person() -> None:
    directory = Directory({"os:ali": "human:alice", "slack:T/U": "human:alice"}, frozenset({"human:alice"}))
    assert directory.resolve("os:ali") == "human:alice"
    assert directory.resolve("os:alice") is None, "a person whose identities are listed has no others"
    assert directory.resolve("os:bob") == "human:bob"
    assert [directory.resolve(odd) for odd in ("slack:T/V", "os:", "bob", "", "human:bob")] == [None] * 5


PEOPLE = ["human:alice", "human:bob", "human:erin", "agent:a0", "agent:a1", "human:mallory"]
COMMANDS = st.one_of(
    st.tuples(st.just("vote"), st.sampled_from(PEOPLE), st.booleans()),
    st.tuples(st.just("wait"), st.integers(0, 80), st.none()),
    st.tuples(st.just("ask"), st.sampled_from(PEOPLE), st.none()),
    st.tuples(st.just("answer"), st.sampled_from(PEOPLE), st.none()),
    st.tuples(st.just("edit"), st.sampled_from(PEOPLE), st.none()),
    st.tuples(st.just("cancel"), st.none(), st.none()),
    st.tuples(st.just("spend"), st.none(), st.none()),
    st.tuples(st.just("settle"), st.sampled_from([Event.SUCCEEDED, Event.FAILED, Event.LOST]), st.none()),
)
PROFILES = st.builds(
    lambda quorum, deny, separation, edit: rules(
        approvers=("human:alice", "human:bob", "human:erin", "agent:a0"), quorum=quorum, deny_threshold=deny,
        allow_edit=edit, separation=separation, timeout_s=100, grant_ttl_s=40,
        escalation=(Level(50, ("human:mallory",)),),
    ),
    st.integers(1, 3), st.integers(1, 2), st.sampled_from(["none", "owner", "chain"]), st.booleans(),
)  # fmt: skip


def perform(found: ApprovalRequest, command: tuple[str, Any, Any], now_ns: int) -> Change:
    """What the command does; one that is refused does nothing."""
    name, who, what = command
    calls: dict[str, Callable[[], Change]] = {
        "vote": lambda: engine.vote(found, who, approve=what, comment="x", now_ns=now_ns),
        "ask": lambda: engine.ask(found, who, "?", now_ns),
        "answer": lambda: engine.answer(found, who, "!", now_ns),
        "edit": lambda: engine.edit(found, who, binding="G", body=b"", shown_body="", now_ns=now_ns),
        "cancel": lambda: engine.cancel(found, "os:x", "", now_ns),
        "spend": lambda: engine.spend(found, "me", now_ns),
        "settle": lambda: engine.settle(found, who, now_ns),
        "wait": lambda: Change(found),
    }
    try:
        return calls[name]()
    except CommandRefused:
        return Change(found)


@settings(max_examples=100, deadline=None)
@given(PROFILES, st.lists(COMMANDS, max_size=30))
def test_no_sequence_of_commands_breaks_the_table(profile: Rules, commands: list[tuple[str, Any, Any]]) -> None:
    """Every change of state is a row, terminal is for ever, one grant and one spending at most, and only with the
    votes of enough people who may."""
    found = request(profile)
    now_ns = T0_NS
    events: list[Event] = []
    for command in commands:
        if command[0] == "wait":
            now_ns += command[1] * SECOND_NS
        for result in (engine.advance(found, now_ns), perform(engine.advance(found, now_ns).request, command, now_ns)):
            assert found.state not in TERMINAL or not result.events
            events += [happened.event for happened in result.events]
            found = result.request
        assert found.deadline_ns == T0_NS + 100 * SECOND_NS
        if found.state in OPEN:
            assert now_ns < found.deadline_ns
        if found.state is State.APPROVED:
            assert now_ns < found.grant_until_ns
            assert len({human for human in found.yes if human.startswith("human:")}) >= profile.quorum
            assert profile.separation == "none" or len(found.yes - {"human:erin"}) >= profile.quorum
    assert events.count(Event.GRANTED) <= 1
    assert events.count(Event.SPENT) <= events.count(Event.GRANTED)
    assert not found.yes & {"agent:a0", "agent:a1"}


def test_replacing_a_state_by_hand_does_not_make_a_grant() -> None:
    """A grant without an end in the future is none."""
    assert refusal(lambda: engine.spend(replace(request(), state=State.APPROVED), "me", T0_NS)) == "grant-spent"
