"""What is stored about one request for approval: plain values, no I/O, no clock. Times are unix nanoseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from creto_oversight.approvers import Directory
from creto_oversight.states import Event, State

Separation = Literal["none", "owner", "chain"]
SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Level:
    """Who may decide as well once ``after_s`` seconds have passed without a decision."""

    after_s: float
    approvers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """One oversight profile as it stood when the request was made; later configuration does not reach it.

    approvers: canonical names. groups: group -> members; group_quorum: group -> how many of its members must say yes,
    beside ``quorum`` distinct people in all. volatile, redact: JSON pointers (RFC 6901) into the body, the former not
    bound by the fingerprint, the latter not shown or stored. bind_headers: lower-case names bound by it.
    """

    name: str
    quorum: int
    approvers: tuple[str, ...]
    timeout_s: float
    deny_threshold: int = 1
    separation: Separation = "none"
    grant_ttl_s: float = 300
    deny_cooldown_s: float = 300
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group_quorum: Mapping[str, int] = field(default_factory=dict)
    escalation: tuple[Level, ...] = ()
    volatile: tuple[str, ...] = ()
    redact: tuple[str, ...] = ()
    bind_headers: tuple[str, ...] = ()
    allow_edit: bool = False

    def eligible(self, reached_s: float) -> frozenset[str]:
        """Everybody named as approver by the escalation steps up to ``reached_s``; steps add, they never remove."""
        added = (name for level in self.escalation if level.after_s <= reached_s for name in level.approvers)
        return frozenset((*self.approvers, *added))


@dataclass(frozen=True, slots=True)
class Vote:
    """One person's last word on one version. via: the identity it came through."""

    human: str
    approve: bool
    comment: str
    at_ns: int
    version: int
    via: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """The action as an approver sees it and as it is stored: secrets already replaced."""

    kind: str
    method: str
    scheme: str
    host: str
    port: int
    path: str
    query: str
    content_type: str
    headers: tuple[tuple[str, str], ...]
    body: str
    body_bytes: int
    body_sha256: str


@dataclass(frozen=True, slots=True)
class Previous:
    """An earlier request for the identical action, so that the approver sees that it is a repetition."""

    id: str
    state: State
    ended_ns: int


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """One request for approval and everything decided about it.

    fingerprint: of the action as submitted, which finds this request again. binding: of the action that may be sent;
    it differs from ``fingerprint`` only after an edit (``version`` > 1, ``substitute`` is then the body to send).
    revision counts writes, for compare-and-set. cooldown_ns: until when an identical submission gets the same no.
    owner: the process that spent the grant.
    """

    id: str
    agent: str
    chain: tuple[str, ...]
    fingerprint: str
    binding: str
    rules: tuple[Rules, ...]
    directory: Directory
    shown: Shown
    created_ns: int
    deadline_ns: int
    policies: tuple[str, ...] = ()
    run: str = ""
    state: State = State.PENDING
    revision: int = 1
    version: int = 1
    substitute: bytes | None = field(default=None, repr=False)
    votes: tuple[Vote, ...] = ()
    level: int = 0
    asked_ns: int | None = None
    paused_ns: int = 0
    question: str = ""
    answer: str = ""
    notified: bool = False
    decided_by: str = ""
    comment: str = ""
    ended_ns: int = 0
    grant_until_ns: int = 0
    cooldown_ns: int = 0
    owner: str = ""
    status: int = 0
    error: str = ""
    previous: Previous | None = None
    acknowledged: bool = False

    @property
    def root(self) -> str:
        """The human at the root of the delegation chain."""
        return self.chain[0]

    @property
    def profiles(self) -> tuple[str, ...]:
        return tuple(rules.name for rules in self.rules)

    @property
    def escalation_steps(self) -> tuple[float, ...]:
        """Seconds after which a level falls due, over all profiles; ``level`` counts the steps already taken."""
        return tuple(sorted({level.after_s for rules in self.rules for level in rules.escalation}))

    @property
    def reached_s(self) -> float:
        return self.escalation_steps[self.level - 1] if self.level else 0.0

    @property
    def yes(self) -> frozenset[str]:
        """The people whose approval stands for the current version."""
        return frozenset(v.human for v in self.votes if v.approve and v.version == self.version)

    @property
    def no(self) -> frozenset[str]:
        return frozenset(v.human for v in self.votes if not v.approve and v.version == self.version)

    @property
    def groups(self) -> frozenset[str]:
        """The groups that the people who approved belong to."""
        return frozenset(g for rules in self.rules for g, members in rules.groups.items() if self.yes & set(members))


@dataclass(frozen=True, slots=True)
class Happened:
    """One line of the request's history: ``actor`` is a canonical name, an agent id or "creto"."""

    event: Event
    actor: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """The request after something happened, and what to write into its history. No events: nothing to write."""

    request: ApprovalRequest
    events: tuple[Happened, ...] = ()
