"""The HTTP/2 part of the accept stage: which connections speak it, how many, and what each stream becomes."""

from __future__ import annotations

from typing import Protocol

from creto_hotpath.relay import Downstream
from creto_proxy.errors import Permanent
from creto_proxy.h2.agents import AgentConnection, Bounds
from creto_proxy.h2.entry import Entry
from creto_proxy.model import Agent, Flow
from creto_proxy.protect import Seat


class Accepts(Protocol):
    """The gateway, as it is used here."""

    def converse(self, flow: Flow, agent: Agent | None) -> Downstream: ...
    def converse_in_stream(self, flow: Flow, agent: Agent | None, grpc: bool, seat: Seat) -> Downstream: ...
    def refuse_unread(self, flow: Flow, agent: Agent | None, error: Permanent) -> None: ...
    def seat(self, agent: Agent | None) -> Seat: ...


class Http2:
    """The connections that speak HTTP/2 or have not said yet. len(): how many."""

    def __init__(self, gateway: Accepts, bounds: Bounds) -> None:
        self._gateway = gateway
        self._bounds = bounds
        self._waiting: set[Entry] = set()
        self._open: set[AgentConnection] = set()

    def __len__(self) -> int:
        return len(self._open) + len(self._waiting)

    def entry(self, flow: Flow, agent: Agent | None) -> Entry:
        """The protocol of a new connection that may turn out to be either."""

        def http2() -> AgentConnection:
            connection = AgentConnection(self, flow, agent, self._bounds, self._gateway.seat(agent))
            self._open.add(connection)
            return connection

        entry = Entry(
            lambda: self._gateway.converse(flow, agent), http2, self._waiting.discard, self._bounds.idle_s
        )
        self._waiting.add(entry)
        return entry

    def never_connected(self, entry: Entry) -> None:
        self._waiting.discard(entry)

    def drain(self, *, replaced: bool = False) -> None:
        """Says so on every connection; each closes once its streams have ended. replaced: those that have not spoken
        yet may be about to, and are kept for what they will say."""
        for entry in [] if replaced else list(self._waiting):
            entry.drain()
        for connection in list(self._open):
            connection.drain()

    def abort(self) -> None:
        """Cuts off what is left."""
        for entry in list(self._waiting):
            entry.abort()
        for connection in list(self._open):
            connection.abort()

    # -- what connections ask for

    def h2_downstream(self, flow: Flow, agent: Agent | None, grpc: bool, seat: Seat) -> Downstream:
        return self._gateway.converse_in_stream(flow, agent, grpc, seat)

    def h2_refused(self, flow: Flow, agent: Agent | None, reason: str, status: int = 400) -> None:
        """Leaves a record of a request, or of a whole connection, that could not be read."""
        error = Permanent(f"HTTP/2: {reason}.", reason=f"http2_{reason}", status=status)
        self._gateway.refuse_unread(flow, agent, error)

    def h2_gone(self, connection: AgentConnection) -> None:
        self._open.discard(connection)
