"""The nouns of the request path, in the order a request meets them.

Everything here is a plain value: no I/O, no clock, no plugin. Stages take these and give these back, so this file
is the vocabulary shared by the core and every plugin. Two rules hold the path together:

- *Permission is a value.* A ``Decision`` has no default and always carries its reason; a ``Permit`` can only be
  made by ``egress.py`` and is the only thing ``upstream.py`` accepts.
- *The strictest answer wins.* ``Decision.stricter`` orders DENY over ESCALATE over ALLOW.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from creto_hotpath.ask import Ask, Tariff, plain

if TYPE_CHECKING:
    from creto_hotpath.http1 import ResponseHead
    from creto_hotpath.quota import QuotaPath, QuotaTable
    from creto_hotpath.relay import Tap

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# How a connection arrived. "control" never reaches the network: it is the agent asking creto itself.
Way: TypeAlias = Literal["transparent", "explicit", "reverse"]
# What is sent: one HTTP exchange, or bytes both ways without a look inside (CONNECT, TLS splice, plain TCP).
Kind: TypeAlias = Literal["http", "tunnel", "tcp"]
# How sure the numbers in a Usage are. Absent, zero and estimated are three different things.
Certainty: TypeAlias = Literal["none", "exact", "estimated", "unknown"]


@dataclass(frozen=True, slots=True)
class Agent:
    """A non-human identity, verified, with the way its authority came down from a human.

    id: SPIFFE id of the agent. chain: SPIFFE ids from the root human to this agent, both included.
    chain_digest: SHA-256 over the delegation tokens (32 bytes), what journal and audit carry instead of them.
    path: quota levels from the widest to the agent itself, e.g. ``("platform", "org:acme", "team:ml", "agent:a1")``.
    expires_at: unix seconds after which the delegation no longer holds.
    """

    id: str
    name: str
    chain: tuple[str, ...]
    chain_digest: bytes
    path: tuple[str, ...]
    expires_at: float
    org: str = "local"
    env: str = "dev"

    @property
    def root(self) -> str:
        """SPIFFE id of the human at the root of the chain."""
        return self.chain[0]

    @property
    def depth(self) -> int:
        """Number of delegation steps between the human and this agent."""
        return len(self.chain) - 1


@dataclass(slots=True)
class Flow:
    """One accepted connection and what is known of it before any byte is believed.

    link: name of the listener or namespace link; identity hangs on it, never on the source address.
    original: destination the agent dialled (transparent mode only).
    bound_names: names that ``original`` was answered for by our own DNS on this link; for a CONNECT the name asked for.
    port: the port the agent dialled or asked for; 0 where the request itself must say.
    sni: server name of the TLS session, None on plain connections. tls: it is terminated here. http2: the agent speaks
    HTTP/2, and this is one stream of its connection.
    """

    id: int
    link: str
    way: Way
    peer: str
    original: tuple[Address, int] | None = None
    bound_names: tuple[str, ...] = ()
    port: int = 0
    sni: str | None = None
    tls: bool = False
    credentials: str | None = field(default=None, repr=False)
    http2: bool = False


class Headers(Protocol):
    """Read-only view over the header fields of a parsed head; names are matched without case."""

    def get(self, name: str) -> str | None: ...
    def getall(self, name: str) -> list[str]: ...
    def items(self) -> list[tuple[str, str]]: ...


class Verdict(enum.IntEnum):
    """What a stage says. The numeric order is the order of strictness."""

    ALLOW = 1
    ESCALATE = 2
    DENY = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer to "may it?".

    reason: stable snake_case code (``policy_forbid``, ``budget_exhausted``, ``host_not_allowed``), for programs.
    detail: one sentence for a person, saying what to do next. Never contains secrets or body text.
    policies: ids of the policies that determined the answer.
    profiles: oversight profiles a human must satisfy; only with ESCALATE.
    obligations: annotations of the permitting policies that later stages must honour, e.g. ``("quota:llm-day",)``.
    retry_after_s: for refusals that time cures (429), seconds until it is worth asking again.
    facts: what the refusing stage measured (``limit``, ``used``, ``reset_at``...), copied into the problem body.
    """

    verdict: Verdict
    reason: str
    detail: str = ""
    policies: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    status: int = 403
    retry_after_s: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def allowed(self) -> bool:
        return self.verdict is Verdict.ALLOW

    def stricter(self, other: Decision) -> Decision:
        """The stricter of the two; on a tie this one, with the other's policies, profiles and obligations joined."""
        if other.verdict > self.verdict:
            return other
        if self.verdict > other.verdict or self.verdict is Verdict.DENY:
            return self
        return Decision(
            verdict=self.verdict,
            reason=self.reason,
            detail=self.detail,
            policies=tuple(dict.fromkeys(self.policies + other.policies)),
            profiles=tuple(dict.fromkeys(self.profiles + other.profiles)),
            obligations=tuple(dict.fromkeys(self.obligations + other.obligations)),
            status=self.status,
        )


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request costs on a path of the shared quota table: held before the send, charged at its end.

    amounts: one number for each meter of the path. ttl_ns: how long it is held if nobody ends it.
    """

    table: QuotaTable
    path: QuotaPath
    amounts: tuple[int, ...]
    ttl_ns: int


@dataclass(frozen=True, slots=True)
class Metering:
    """How model requests that ask for the same are metered: what each may use, and what it did use.

    charge: where that is held, None for nowhere; its amounts are those of ``tariff``. tap: for an answer with that
    content type. account: given the tap, the status, whether the answer was completed, and what was held, says what is
    charged and what was used. edits, rewrite: to the head, and to the body, of what is sent.
    """

    tariff: Tariff
    tap: Callable[[str], Tap | None]
    account: Callable[[Tap | None, int, bool, tuple[int, int, int]], tuple[tuple[int, int, int], Usage]]
    charge: Charge | None = None
    edits: Mapping[str, str | None] | None = None
    rewrite: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A stage's word that its ALLOW holds, for half a second, for every request of the same shape.

    The shape is agent, connection, method, scheme, host, port, upgrade and the fields by which protocols are told
    apart; the path only when ``exact``; never query or any other field. asks: of the body, what ``Request.ask`` finds
    there, which must then be the same; else the body counts for nothing. charge: what each of them costs. metering:
    instead, how each of them is metered.
    """

    exact: bool = False
    charge: Charge | None = None
    asks: bool = False
    metering: Metering | None = None


@dataclass(frozen=True, slots=True)
class Approval:
    """A human answer, as policy sees it at send time. Made by the gate from its own durable record, never cached."""

    id: str
    satisfied: bool
    approvals: int
    groups: frozenset[str]
    fingerprint: str
    approvers: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()


@dataclass(slots=True)
class Request:
    """What an agent asks to do, normalised: every stage decides on this and on nothing else.

    id: UUIDv7, 16 bytes; the id of the outcome in journal, ledger and audit.
    host: lower-case A-label name or canonical address literal, without port or trailing dot.
    path, query: of the target; ``path`` starts with "/" and is in canonical spelling (see ``paths``), ``query`` is
    without "?" and never recorded. sent_path: the path as the agent spelled it, which is what is sent.
    body: complete only when some stage asked for it through ``body_limit``; None otherwise.
    resource: what is acted on where a host says too little, e.g. "tool:search", "model:gpt-4o"; "" for plain HTTP.
    trace: the W3C traceparent that came with it when it is well-formed, else "".
    fingerprint: of exactly this action, set by the gate that holds it; policy compares it with the approval's.
    notes: working memory of plugins for this request, keyed by plugin name. Created on first use.
    answer: the head of what it was answered, once that is there.
    """

    id: bytes
    flow: Flow
    agent: Agent
    kind: Kind
    action: str
    method: str
    scheme: str
    host: str
    port: int
    path: str
    query: str = field(repr=False)
    headers: Headers = field(repr=False)
    received_ns: int
    body: bytes | None = field(default=None, repr=False)
    approval: Approval | None = None
    fingerprint: str = ""
    sent_path: str = field(default="", repr=False)
    resource: str = ""
    trace: str = ""
    answer: ResponseHead | None = field(default=None, repr=False)
    _notes: dict[str, Any] | None = field(default=None, repr=False)
    _asked: tuple[bytes, Ask | None] | None = field(default=None, repr=False)

    @property
    def ask(self) -> Ask | None:
        """What the body asks of a model, when it is so plain that every parser finds the same; read at most once."""
        body = self.body
        if not body:
            return None
        if self._asked is None or self._asked[0] is not body:
            self._asked = (body, plain(body))
        return self._asked[1]

    @property
    def notes(self) -> dict[str, Any]:
        if self._notes is None:
            self._notes = {}
        return self._notes

    @property
    def destination(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to dial one verified address under one name. Only ``egress.py`` makes one (see ``Seal``).

    name: what the certificate must say when ``tls``. address: verified by the resolver and the egress guards.
    """

    name: str
    address: Address
    port: int
    tls: bool
    seal: object

    @property
    def key(self) -> tuple[str, Address, int, bool]:
        """Connections with equal keys are interchangeable, so they may be pooled together."""
        return (self.name, self.address, self.port, self.tls)


@dataclass(slots=True)
class Usage:
    """What one request used. Tokens follow the OpenAI sense: ``input`` includes cached reads and writes.

    tokens: e.g. ``{"input": 12, "output": 7, "cache_read": 0, "reasoning": 0}``. cost_nano_usd: integer nano-dollars.
    """

    certainty: Certainty = "none"
    provider: str = ""
    model: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    cost_nano_usd: int = 0


@dataclass(slots=True)
class Outcome:
    """One finished (or refused) request: the journal record from which ledger, audit log and report are derived.

    decision: "allow", "deny" or "approved" (allowed after a person said yes).
    status: HTTP status the agent saw, 0 when none was sent. Times are nanoseconds; ``creto_ns`` excludes waiting for
    the upstream and for people. There is no query, credential or body in it, by construction. Fields are only ever
    added at the end, each with a default, so that older journals stay readable.
    """

    id: bytes
    at_unix_ns: int
    agent: str
    chain: tuple[str, ...]
    chain_digest: bytes
    path: tuple[str, ...]
    link: str
    way: str
    kind: str
    action: str
    method: str
    scheme: str
    host: str
    port: int
    target: str
    decision: str
    reason: str
    policies: tuple[str, ...]
    approval_id: str
    status: int
    error: str
    usage: Usage
    bytes_up: int
    bytes_down: int
    creto_ns: int
    held_ns: int
    upstream_ns: int
    total_ns: int
    run: str = ""
    resource: str = ""
    trace: str = ""

    def __iter__(self) -> Iterator[Any]:
        for name in self.__slots__:
            yield getattr(self, name)
