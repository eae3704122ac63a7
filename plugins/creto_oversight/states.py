"""The life of an approval request, as one table.

Everything else asks this table: the engine may only do what a row allows, the store only writes what the engine did.
A state without rows is terminal and therefore sticky, whatever the clock does later.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """Where a request stands. Open states wait for people; APPROVED holds a grant nobody has used yet."""

    PENDING = "pending"
    ESCALATED = "escalated"
    INFO_REQUESTED = "info_requested"
    APPROVED = "approved"
    EXECUTING = "executing"
    EXECUTED = "executed"
    FAILED = "failed"
    INDETERMINATE = "indeterminate"
    DENIED = "denied"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class Event(enum.StrEnum):
    """What happened. The first group moves a request through the table; the second is only written down."""

    VOTED = "voted"
    GRANTED = "granted"
    REFUSED = "refused"
    EXPIRED = "expired"
    LAPSED = "lapsed"
    ESCALATED = "escalated"
    ASKED = "asked"
    ANSWERED = "answered"
    EDITED = "edited"
    CANCELLED = "cancelled"
    SPENT = "spent"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"

    SUBMITTED = "submitted"
    NOTIFIED = "notified"
    VOTE_REFUSED = "vote_refused"
    ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True, slots=True)
class Row:
    """In ``state``, ``event`` leads to ``to``; ``when`` says what picks the row if an event has two."""

    state: State
    event: Event
    to: State
    when: str = ""


S, E = State, Event

TABLE: tuple[Row, ...] = (
    Row(S.PENDING, E.VOTED, S.PENDING, "neither quorum nor veto yet"),
    Row(S.PENDING, E.EDITED, S.PENDING, "earlier votes void"),
    Row(S.PENDING, E.GRANTED, S.APPROVED, "quorum of every profile"),
    Row(S.PENDING, E.REFUSED, S.DENIED, "deny threshold of any profile"),
    Row(S.PENDING, E.ESCALATED, S.ESCALATED, "a level is due"),
    Row(S.PENDING, E.ASKED, S.INFO_REQUESTED),
    Row(S.PENDING, E.EXPIRED, S.TIMED_OUT, "deadline"),
    Row(S.PENDING, E.CANCELLED, S.CANCELLED),
    Row(S.ESCALATED, E.VOTED, S.ESCALATED, "neither quorum nor veto yet"),
    Row(S.ESCALATED, E.EDITED, S.ESCALATED, "earlier votes void"),
    Row(S.ESCALATED, E.GRANTED, S.APPROVED, "quorum of every profile"),
    Row(S.ESCALATED, E.REFUSED, S.DENIED, "deny threshold of any profile"),
    Row(S.ESCALATED, E.ESCALATED, S.ESCALATED, "the next level is due"),
    Row(S.ESCALATED, E.ASKED, S.INFO_REQUESTED),
    Row(S.ESCALATED, E.EXPIRED, S.TIMED_OUT, "deadline"),
    Row(S.ESCALATED, E.CANCELLED, S.CANCELLED),
    Row(S.INFO_REQUESTED, E.VOTED, S.INFO_REQUESTED, "neither quorum nor veto yet"),
    Row(S.INFO_REQUESTED, E.EDITED, S.INFO_REQUESTED, "earlier votes void"),
    Row(S.INFO_REQUESTED, E.GRANTED, S.APPROVED, "quorum of every profile"),
    Row(S.INFO_REQUESTED, E.REFUSED, S.DENIED, "deny threshold of any profile"),
    Row(S.INFO_REQUESTED, E.ASKED, S.INFO_REQUESTED, "a better question"),
    Row(S.INFO_REQUESTED, E.ANSWERED, S.PENDING, "no level was reached"),
    Row(S.INFO_REQUESTED, E.ANSWERED, S.ESCALATED, "a level was reached"),
    Row(S.INFO_REQUESTED, E.EXPIRED, S.TIMED_OUT, "deadline"),
    Row(S.INFO_REQUESTED, E.CANCELLED, S.CANCELLED),
    Row(S.APPROVED, E.SPENT, S.EXECUTING, "grant consumed, nothing sent yet"),
    Row(S.APPROVED, E.LAPSED, S.TIMED_OUT, "grant never used"),
    Row(S.APPROVED, E.CANCELLED, S.CANCELLED),
    Row(S.EXECUTING, E.SUCCEEDED, S.EXECUTED),
    Row(S.EXECUTING, E.FAILED, S.FAILED, "never sent, or answered with an error"),
    Row(S.EXECUTING, E.LOST, S.INDETERMINATE, "sent or not, nobody knows"),
)

OPEN = frozenset({S.PENDING, S.ESCALATED, S.INFO_REQUESTED})
TERMINAL = frozenset(State) - {row.state for row in TABLE}
LIVE = frozenset(State) - TERMINAL

_NEXT: dict[tuple[State, Event], tuple[State, ...]] = {}
for _row in TABLE:
    _NEXT[_row.state, _row.event] = (*_NEXT.get((_row.state, _row.event), ()), _row.to)


class NoSuchTransition(Exception):
    """The table has no row for that; a mistake in the engine or a request that somebody else already moved."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a request that is {state} cannot be {event}")
        self.state = state
        self.event = event


def step(state: State, event: Event, *, to: State | None = None) -> State:
    """The state after ``event``. ``to`` picks among several rows. Raises NoSuchTransition when no row allows it."""
    targets = _NEXT.get((state, event), ())
    if to is None and len(targets) == 1:
        return targets[0]
    if to in targets:
        return to
    raise NoSuchTransition(state, event)
