"""The whole plugin contract, on one page.

A plugin is a class named by an entry point of the group ``creto``; ours are found exactly as a stranger's:

    [project.entry-points.creto]
    metering = "creto_metering:Metering"

The core constructs it once with its validated settings and the ``Core`` services (no side effects allowed there),
asks each hook below once, composes the answers into one immutable ``Stages`` tuple, calls ``start``, and from then
on calls the stage objects directly: hooks build, requests do not call hooks. A stage object answers synchronously
and fast; only ``Gate.hold`` and ``Routes.handle`` may await. Whatever raises or overruns its deadline refuses the
request it was working on, and nothing else.

Hooks that a plugin does not implement cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import pluggy

from creto_proxy.model import Address, Agent, Decision, Flow, Outcome, Request, Usage

if TYPE_CHECKING:
    import click
    from pydantic import BaseModel

    from creto_platform import Platform

API_VERSION = 1

Role = Literal["single", "worker", "controller"]

hookspec = pluggy.HookspecMarker("creto")
hookimpl = pluggy.HookimplMarker("creto")


class Clock(Protocol):
    """Time, so that tests can own it. ``now_ns`` is monotonic, ``unix_ns`` is wall clock."""

    def now_ns(self) -> int: ...
    def unix_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Core:
    """What the core lends to a plugin. state_dir is private (0700) and survives restarts; run is this run's id.

    role: "single" for a process that does everything (``creto run``). Under ``creto sidecar`` each "worker" carries
    requests, and the one "controller" per node carries none: it feeds consumers and is where a plugin runs what must
    happen once per node, such as sweeps and timers. Every process constructs and starts the plugin.
    providers: hosts that the configuration says are model providers, and which one each is.
    """

    platform: Platform
    clock: Clock
    state_dir: Path
    policies_dir: Path
    run: str
    role: Role = "single"
    providers: Mapping[str, str] = field(default_factory=dict)


class Identifier(Protocol):
    """Connection facts -> agent. None means "not mine"; when every identifier says None the flow is refused."""

    def identify(self, flow: Flow) -> Agent | None: ...


class Authorizer(Protocol):
    """Says whether a request may go on. Runs after the core's Cedar policy, in the configured plugin order.

    ``body_limit`` is asked first: 0 to decide on the head alone, N to be given up to N bytes of complete body in
    ``request.body`` (a larger body is refused with 413).

    A stage may have one more method, ``lease(request) -> Lease | None``, asked about a request it has just allowed: the
    answer says that it holds for others of the same shape, which then do not come here for half a second. Without it,
    or with None, every request does.
    """

    def body_limit(self, request: Request) -> int: ...
    def authorize(self, request: Request) -> Decision: ...


class Client(Protocol):
    """The agent's connection while its call is held: what a gate may do with it."""

    def interim(self, status: int) -> None:
        """Sends a 1xx heartbeat (100 or 102). Does nothing once the agent is gone."""
        ...

    @property
    def gone(self) -> bool: ...


class Gate(Protocol):
    """Holds an ESCALATE until a person answers.

    Returns a Decision: ALLOW (with ``request.approval`` set by the gate) lets policy run again with the approval in
    context; DENY refuses; ESCALATE means "not answered while it could be held" and becomes 428. ``spend`` is called
    immediately before the send and must consume the grant durably, exactly once; False refuses. ``settled`` is told
    how the send ended.
    """

    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision: ...
    def spend(self, request: Request) -> bool: ...
    def settled(self, request: Request, outcome: Outcome) -> None: ...


class EgressGuard(Protocol):
    """Says which names may be asked for and which addresses may be dialled.

    ``name_allowed`` is asked by DNS (port None: "on any port?") and again per connection with the real port;
    ``address_allowed`` is asked for every address of an answer and again at dial time. ``tls_mode`` says what to do
    with TLS for that name: "intercept", "splice"; ``raw_tcp`` whether bytes that are neither TLS nor HTTP may pass.

    A guard whose class says ``stable = True`` answers by its arguments and its settings alone, so that requests like
    one it has just let through need not come here for half a second.
    """

    def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision: ...
    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision: ...
    def tls_mode(self, name: str, port: int) -> str | None: ...
    def raw_tcp(self, name: str | None, address: Address, port: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes to a request before it is sent: fields to set (None removes) and, when not None, the new body."""

    headers: Mapping[str, str | None]
    body: bytes | None = None


class Tap(Protocol):
    """Sees the decoded body of one response, in order.

    When ``rewrites`` is False ``feed`` only looks and its return value is ignored. When True the relay sends what
    ``feed`` and ``finish`` return instead, re-framed as chunked.
    """

    rewrites: bool

    def feed(self, data: bytes) -> bytes | None: ...
    def finish(self) -> bytes | None: ...


class Meter(Protocol):
    """Reserves before the send, watches the answer, settles after it.

    ``authorize`` is the reservation (same rules as ``Authorizer``). ``release`` gives a reservation back when the
    request is not sent after all. ``edits`` and ``tap`` may be None. ``settle`` is called exactly once for every
    request that was sent, with the tap that watched it; it must not block and must not raise for odd upstreams.
    """

    def body_limit(self, request: Request) -> int: ...
    def authorize(self, request: Request) -> Decision: ...
    def release(self, request: Request) -> None: ...
    def edits(self, request: Request) -> Edits | None: ...
    def tap(self, request: Request, status: int, content_type: str) -> Tap | None: ...
    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage: ...


# "up" is from the agent to the upstream, "down" back.
Direction: TypeAlias = Literal["up", "down"]
MessageKind: TypeAlias = Literal["text", "binary"]


class MessageWatch(Protocol):
    """Sees every message of one WebSocket, complete and in order, before the other side does.

    ``message`` returns the payload that goes on (``data`` itself or another; UTF-8 when kind is "text"), or a Decision:
    ALLOW passes ``data`` on, anything else ends the connection with 1008, and its reason stands in the outcome.
    """

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision: ...


class Messages(Protocol):
    """Says, before an upgrade to WebSocket is sent, whether its messages are to be seen; None costs nothing."""

    def open(self, request: Request) -> MessageWatch | None: ...


class Consumer(Protocol):
    """Derives durable state from the journal: called in a worker thread, in order, at least once.

    ``position`` returns the byte offset up to which a journal segment has been applied (0 when never seen);
    ``apply`` must store the records *and* the new position in one transaction, so that a crash replays without
    losing or doubling.
    """

    name: str

    def position(self, segment: str) -> int: ...
    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """A call to ``http://creto.internal``: path without query, query parameters, JSON body bytes."""

    agent: Agent
    method: str
    path: str
    query: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class ControlResponse:
    """status and a JSON-serialisable document; ``headers`` are added as they are."""

    status: int
    document: Any
    headers: Mapping[str, str] | None = None


class Routes(Protocol):
    """Answers under a path prefix of ``http://creto.internal``, e.g. "/v1/approvals"."""

    prefix: str

    async def handle(self, request: ControlRequest) -> ControlResponse: ...


@dataclass(frozen=True, slots=True)
class RedirectPorts:
    """Where the sidecar listens inside an agent's network namespace."""

    tcp: int
    dns: int


class Redirect(Protocol):
    """Installs the kernel rules that leave an agent no way around the sidecar.

    Called inside the agent's fresh network namespace, before the agent exists, in a process that owns it. Raises
    ``Unsupported`` with what to do when the kernel cannot.
    """

    def install(self, ports: RedirectPorts) -> None: ...


@runtime_checkable
class DefinesProfiles(Protocol):
    """Settings that name who can approve what: profile -> (people needed, the groups they come from or None).

    Policies may only name profiles that exist; a model behind ``Plugin.Settings`` offers them by this method.
    """

    def oversight_profiles(self) -> Mapping[str, tuple[int, frozenset[str] | None]]: ...


@runtime_checkable
class Plugin(Protocol):
    """The shape of the class behind an entry point."""

    name: ClassVar[str]
    api: ClassVar[int]
    Settings: ClassVar[type[BaseModel]]

    def __init__(self, settings: Any, core: Core) -> None: ...

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        """Sub-commands for ``creto``; each gets an ``Operator`` as its click context object."""
        ...

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Hooks:
    """The hooks, each asked once at start. Returning None means "this plugin does not do that"."""

    @hookspec
    def creto_identifier(self) -> Identifier | None: ...

    @hookspec
    def creto_authorizer(self) -> Authorizer | None: ...

    @hookspec
    def creto_gate(self) -> Gate | None: ...

    @hookspec
    def creto_egress_guard(self) -> EgressGuard | None: ...

    @hookspec
    def creto_redirect(self) -> Redirect | None: ...

    @hookspec
    def creto_meter(self) -> Meter | None: ...

    @hookspec
    def creto_messages(self) -> Messages | None: ...

    @hookspec
    def creto_consumer(self) -> Consumer | None: ...

    @hookspec
    def creto_routes(self) -> Routes | None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    """Every stage object of every plugin, in configured order: the immutable tuple that requests walk."""

    identifiers: tuple[Identifier, ...] = ()
    authorizers: tuple[Authorizer, ...] = ()
    gates: tuple[Gate, ...] = ()
    guards: tuple[EgressGuard, ...] = ()
    redirects: tuple[Redirect, ...] = ()
    meters: tuple[Meter, ...] = ()
    messages: tuple[Messages, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    routes: tuple[Routes, ...] = ()
