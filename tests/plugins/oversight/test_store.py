"""The durable record under hostile clocks, hands and neighbours."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creto_oversight.engine import CommandRefused
from creto_oversight.fingerprint import Action, fingerprint
from creto_oversight.owners import Owner
from creto_oversight.requests import Change, Happened
from creto_oversight.states import LIVE, Event, State
from creto_oversight.store import DATABASE, Conflict, HistoryBroken, Store, StoreUnavailable

from .harness import CaseClock, Fixed, Station, Told, agent, refund, rules, submit

PROFILES = Fixed({"pay": rules(quorum=1)})


def start(directory: Path, clock: CaseClock | None = None) -> Station:
    return Station(directory, clock or CaseClock(), PROFILES, Told())


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    station = start(tmp_path)
    yield station
    station.crash()


async def asked(station: Station, amount: int = 800) -> str:
    return str((await submit(station.gate, refund(amount))).facts["approval_id"])


def in_child(work: Callable[[], bool]) -> int:
    """Pid of a forked child that exits with 0 when ``work`` says True."""
    pid = os.fork()
    if pid:
        return pid
    status = 9
    try:
        status = 0 if work() else 1
    finally:
        os._exit(status)


def successes(pids: list[int]) -> int:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert set(statuses) <= {0, 1}, "a process failed in a way nobody foresaw"
    return statuses.count(0)


async def test_two_processes_that_decide_at_once_decide_once(tmp_path: Path) -> None:
    """alice approves and bob denies every request, each in a process of its own."""
    station = start(tmp_path)
    ids = [await asked(station, amount) for amount in range(12)]
    station.crash()

    def decide(human: str, approve: bool) -> bool:
        mine = start(tmp_path)
        for request_id in ids:
            try:
                mine.desk.decide(request_id, human, approve=approve, comment="x")
            except CommandRefused as error:
                if error.problem != "already-decided":
                    return False
        return True

    assert successes([in_child(lambda: decide("human:alice", True)), in_child(lambda: decide("human:bob", False))]) == 2
    station = start(tmp_path)
    for request_id in ids:
        request = station.desk.look(request_id)
        events = [line.event for line in station.desk.history(request_id)]
        assert events.count("granted") + events.count("refused") == 1
        assert (request.state is State.APPROVED) == ("granted" in events)
        assert request.decided_by == ("human:alice" if request.state is State.APPROVED else "human:bob")
    assert station.store.verify_history() > len(ids)
    station.crash()


async def test_a_grant_is_spent_by_one_process_only(tmp_path: Path) -> None:
    station = start(tmp_path)
    ids = [await asked(station, amount) for amount in range(5)]
    for request_id in ids:
        station.desk.decide(request_id, "human:alice", approve=True)
    bindings = {request_id: station.desk.look(request_id).binding for request_id in ids}
    station.crash()
    for request_id in ids:

        def spend(request_id: str = request_id) -> bool:
            try:
                start(tmp_path).desk.spend(request_id, agent=agent(), binding=bindings[request_id])
            except CommandRefused:
                return False
            return True

        assert successes([in_child(spend) for _ in range(4)]) == 1


async def test_a_spent_grant_of_a_dead_process_has_an_unknown_outcome(tmp_path: Path) -> None:
    station = start(tmp_path)
    request_id = await asked(station)
    binding = station.desk.decide(request_id, "human:alice", approve=True).binding
    station.crash()

    def spend() -> bool:
        return start(tmp_path).desk.spend(request_id, agent=agent(), binding=binding).state is State.EXECUTING

    assert successes([in_child(spend)]) == 1
    station = start(tmp_path)
    assert station.desk.look(request_id).state is State.EXECUTING
    station.desk.sweep()
    assert station.desk.look(request_id).state is State.INDETERMINATE
    station.crash()


async def test_a_spent_grant_of_a_living_process_is_left_alone(tmp_path: Path, station: Station) -> None:
    request_id = await asked(station)
    binding = station.desk.decide(request_id, "human:alice", approve=True).binding
    station.desk.spend(request_id, agent=agent(), binding=binding)
    other = start(tmp_path)
    other.desk.sweep()
    assert station.desk.look(request_id).state is State.EXECUTING
    other.crash()


def test_an_owner_lives_until_it_lets_go(tmp_path: Path) -> None:
    first, second = Owner(tmp_path / "owners"), Owner(tmp_path / "owners")
    first.take()
    second.take()
    assert first.alive(first.id) and second.alive(first.id)
    first.release()
    assert not second.alive(first.id) and not second.alive("1-never")
    second.release()


async def test_a_deadline_met_by_anybody_stays_met_when_the_clock_goes_back(tmp_path: Path) -> None:
    clock = CaseClock()
    station = start(tmp_path, clock)
    request_id = await asked(station)
    clock.set(3600)
    station.desk.sweep()
    station.crash()
    clock = CaseClock()
    station = start(tmp_path, clock)
    assert station.desk.look(request_id).state is State.TIMED_OUT
    with pytest.raises(CommandRefused, match="timed_out"):
        station.desk.decide(request_id, "human:alice", approve=True)
    station.crash()


async def test_a_clock_that_steps_back_does_not_lengthen_a_deadline(tmp_path: Path) -> None:
    clock = CaseClock()
    station = start(tmp_path, clock)
    request_id = await asked(station)
    clock.advance(3599)
    clock.set(0)
    clock.advance(1)
    assert station.desk.look(request_id).state is State.TIMED_OUT
    station.crash()


async def test_a_write_from_a_stale_read_is_refused(station: Station) -> None:
    before = station.desk.look(await asked(station))
    station.desk.decide(before.id, "human:bob", approve=False, comment="no")
    late = Change(replace(before, state=State.APPROVED), (Happened(Event.GRANTED, "x"),))
    with pytest.raises(Conflict), station.store.writing(durable=True) as session:
        session.save(before, late, None, 0)
    assert station.desk.look(before.id).state is State.DENIED
    assert "granted" not in [line.event for line in station.desk.history(before.id)]


async def test_a_vote_counted_on_a_stale_read_is_refused(station: Station) -> None:
    before = station.desk.look(await asked(station))
    with station.store.writing(durable=True) as session:
        session.save(before, Change(replace(before, question="?")), None, 0)
    with pytest.raises(Conflict), station.store.writing(durable=True) as session:
        session.save(before, Change(replace(before, question="!")), None, 0)
    assert station.desk.look(before.id).question == "?"


@pytest.mark.parametrize("change", ["agent", "chain", "binding"])
async def test_a_grant_is_spent_only_by_whom_and_for_what_it_was_given(station: Station, change: str) -> None:
    request = station.desk.decide(await asked(station), "human:alice", approve=True)
    who = agent("a2") if change == "agent" else agent(chain=("human:x", "agent:a1")) if change == "chain" else agent()
    with pytest.raises(CommandRefused, match="another"):
        station.desk.spend(request.id, agent=who, binding="sha256:other" if change == "binding" else request.binding)
    assert station.desk.look(request.id).state is State.APPROVED


async def test_a_second_live_request_for_one_action_cannot_be_stored(station: Station) -> None:
    request = station.desk.look(await asked(station))
    twin = Change(replace(request, id="ovr_twin"), (Happened(Event.SUBMITTED, "x"),))
    with pytest.raises(StoreUnavailable, match="UNIQUE"), station.store.writing(durable=False) as session:
        session.add(twin, None, 0)


def tamper(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize("verb", ["UPDATE oversight_event SET actor='x'", "DELETE FROM oversight_event"])
async def test_history_cannot_be_rewritten_by_mistake(station: Station, verb: str) -> None:
    await asked(station)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tamper(station.store.path, verb)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE oversight_event SET actor = 'human:bob' WHERE event = 'voted'",
        "UPDATE oversight_event SET facts = '{}' WHERE event = 'voted'",
        "UPDATE oversight_event SET at_ns = at_ns + 1 WHERE event = 'voted'",
        "DELETE FROM oversight_event WHERE event = 'voted'",
    ],
)
async def test_history_that_was_rewritten_on_purpose_does_not_verify(station: Station, statement: str) -> None:
    request_id = await asked(station)
    station.desk.decide(request_id, "human:alice", approve=True)
    station.store.close()
    tamper(
        station.store.path,
        "DROP TRIGGER oversight_event_no_update",
        "DROP TRIGGER oversight_event_no_delete",
        statement,
    )
    station.store.open()
    with pytest.raises(HistoryBroken) as broken:
        station.store.verify_history()
    assert broken.value.seq >= 3


async def test_a_refused_vote_is_written_down(station: Station) -> None:
    request_id = await asked(station)
    with pytest.raises(CommandRefused):
        station.desk.decide(request_id, "human:mallory", approve=True, via="os:mallory")
    line = station.desk.history(request_id)[-1]
    assert (line.event, line.actor, line.facts["problem"]) == ("vote_refused", "human:mallory", "approver-not-eligible")


def test_the_file_is_private(station: Station) -> None:
    for path in station.store.path.parent.glob(f"{DATABASE}*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_a_newer_creto_is_left_alone(tmp_path: Path) -> None:
    start(tmp_path).crash()
    tamper(tmp_path / DATABASE, "UPDATE oversight_meta SET schema = 99")
    store = Store(tmp_path / DATABASE)
    with pytest.raises(StoreUnavailable, match="schema 99"):
        store.open()
    store.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database, certainly not" * 100)
    store = Store(tmp_path / DATABASE)
    with pytest.raises(StoreUnavailable, match="oversight.db"):
        store.open()
    store.close()


VERBS = st.sampled_from(["submit", "approve", "deny", "spend", "settle", "wait", "sweep", "cancel"])
ACTIONS = st.lists(st.tuples(VERBS, st.integers(0, 1)), max_size=25)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ACTIONS)
async def test_there_are_never_two_grants_for_one_action(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    clock = CaseClock()
    station = start(tmp_path_factory.mktemp("store"), clock)
    spent = approvals = 0
    for name, amount in actions:
        with station.store.reading() as session:
            latest = session.latest(agent().id, _fingerprint(amount))
        try:
            if name == "submit":
                await submit(station.gate, refund(amount))
            elif name == "wait":
                clock.advance(200)
            elif name == "sweep":
                station.desk.sweep()
            elif latest is not None and name in ("approve", "deny"):
                before = latest.state
                after = station.desk.decide(latest.id, "human:alice", approve=name == "approve", comment="x")
                approvals += after.state is State.APPROVED and before is not State.APPROVED
            elif latest is not None and name == "spend":
                station.desk.spend(latest.id, agent=agent(), binding=latest.binding)
                spent += 1
            elif latest is not None and name == "settle":
                station.desk.settle(latest.id, Event.SUCCEEDED, status=200)
            elif latest is not None:
                station.desk.cancel(latest.id, "os:x", "")
        except CommandRefused:
            continue
        assert spent <= approvals
        with station.store.reading() as session:
            live = [request.fingerprint for request in session.listed(states=LIVE)]
        assert len(live) == len(set(live))
    station.store.verify_history()
    station.crash()


def _fingerprint(amount: int) -> str:
    return fingerprint(Action.of(refund(amount)))
