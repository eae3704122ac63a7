"""The authorization port: what is asked, what is answered, and how a policy set is refused.

A ``Query`` is everything policy may look at; an ``Answer`` is one of three words with its reasons. Whoever
implements ``Authz`` fails closed: a query that cannot be evaluated is answered "deny", never raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol, TypeAlias

Verdict: TypeAlias = Literal["allow", "deny", "oversight"]
# A context attribute. Mappings occur only under "approval", times (or unix nanoseconds) only under "now".
Value: TypeAlias = str | int | bool | datetime | Mapping[str, object]

# What is done on the wire.
TRANSPORT: tuple[str, ...] = ("httpRead", "httpWrite", "tunnel", "tcp")
# What is said inside an HTTP request, by the group of the protocol. Asked besides the transport action, never alone.
PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    "mcp": ("mcpCall", "mcpRead", "mcpWrite"),
    "a2a": ("a2aSend", "a2aRead", "a2aWrite"),
    "llm": ("llmCall",),
}
INSIDE: tuple[str, ...] = tuple(action for actions in PROTOCOLS.values() for action in actions)
# Every action the proxy can ask about, and the action groups that each is in.
ACTIONS: tuple[str, ...] = (*TRANSPORT, *INSIDE)
GROUPS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(TRANSPORT, frozenset(("egress",))),
    **{action: frozenset(("egress", group)) for group, actions in PROTOCOLS.items() for action in actions},
}


@dataclass(frozen=True, slots=True)
class Query:
    """May ``principal`` do ``action`` on ``host``?

    principal, owner: entity ids of the agent and of the human it answers to, as policies write them.
    host: lower-case A-label name or canonical address literal, without port or trailing dot.
    context: ``method path scheme way fingerprint root`` (str), ``depth port`` (int), ``now`` (unix nanoseconds or an
    aware datetime), and where known ``currency ip rpc_method tool prompt uri model provider operation`` (str),
    ``amount_minor max_tokens tools`` (int), ``stream`` (bool) and ``approval`` (mapping with
    ``id satisfied approvals groups fingerprint`` and optionally ``profiles``, the oversight profiles that were
    satisfied). ``root`` is the id of the human at the root of the chain; ``fingerprint`` is "" until the action has
    one. With a ``tool`` or ``model`` the host is in the entity ``Tool`` or ``Model`` of that name. Only what
    ``Authz.reads`` names has to be there.
    expires_ns: unix nanoseconds after which the principal's authority ends, 0 for "not known"; caps caching.
    """

    principal: str
    org: str
    env: str
    owner: str
    action: str
    host: str
    context: Mapping[str, Value] = field(default_factory=dict)
    expires_ns: int = 0


@dataclass(frozen=True, slots=True)
class Watch:
    """What the policies for one host want to know about the protocols inside its HTTP requests.

    actions: those of ``INSIDE`` that some policy there tells from plain HTTP; to ask about any other
    adds nothing to the answer for the transport action. permits: those that a permit tells, so that they are not
    allowed without one. reads: context attributes that a policy may look at there, whatever the action. protocols: the
    groups of ``PROTOCOLS`` that any of this is about.
    """

    actions: frozenset[str] = frozenset()
    permits: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    protocols: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """What policy says, and why.

    verdict: "oversight" means a human may allow it: every profile in ``profiles`` has to be satisfied.
    reason: stable code: ``policy_permit policy_forbid policy_no_permit policy_error oversight_required
    host_not_normalised unknown_action``.
    detail: one sentence for a person; holds policy ids and descriptions, never values of the request.
    policies: ids of the determining policies, sorted. obligations: ``"quota:NAME"`` and ``"rate:N/UNIT"`` of the
    determining permits, sorted; only with "allow".
    """

    verdict: Verdict
    reason: str
    detail: str
    policies: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OversightProfile:
    """What a satisfied approval of one profile amounts to, for asking "would an approval help at all?".

    approvals: number of people who must say yes; groups: the approver groups they come from. None means unknown:
    the hypothetical approval is then as good as any could be.
    """

    approvals: int | None = None
    groups: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    """One mistake: file name, line (0 when it concerns the whole file), policy id ("" when none) and the reason."""

    file: str
    line: int
    policy: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        subject = f" policy {self.policy}:" if self.policy else ""
        return f"{place}:{subject} {self.reason}"


class PolicyError(Exception):
    """The policies cannot be used. ``problems`` holds every mistake that was found, in file order."""

    def __init__(self, problems: Sequence[PolicyProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class EngineUnsafe(Exception):
    """The policy engine does not behave as the decision algorithm relies on; nothing may be decided with it."""


class Authz(Protocol):
    """Decides. Synchronous and free of I/O, so that it can be asked on the request path."""

    @property
    def epoch(self) -> int:
        """Grows whenever an earlier answer may no longer hold; part of every cache key."""
        ...

    def decide(self, query: Query) -> Answer:
        """The answer under the current policies. Never raises for a bad query: that is a "deny"."""
        ...

    def lasting(self, query: Query) -> frozenset[str] | None:
        """Names of the context attributes on which an "allow" for ``query`` depends, besides who asks and for what.

        None when it is not allowed, or when the answer may be another one next time although nothing of that changed.
        """
        ...

    def reads(self, action: str) -> frozenset[str]:
        """Names of the context attributes that some policy for ``action`` may look at, so others need no effort."""
        ...

    def watch(self, host: str) -> Watch:
        """What has to be found out about requests to ``host`` beyond their heads; holds for one ``epoch``."""
        ...
