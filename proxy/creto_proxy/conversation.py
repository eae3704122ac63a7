"""One connection of an agent that speaks HTTP, as the relay's handler: each of its requests becomes a ``Passage``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath.http1 import BadMessage
from creto_hotpath.relay import Exchange
from creto_proxy.errors import CretoError, Permanent
from creto_proxy.identify import proxy_credentials
from creto_proxy.model import Agent, Flow
from creto_proxy.pipeline import Passage
from creto_proxy.protect import InFlight, Seat
from creto_proxy.refusal import render
from creto_proxy.sockets import raw_response

if TYPE_CHECKING:
    from creto_proxy.accept import Gateway


class Conversation:
    """One agent connection that speaks HTTP/1: a ``Passage`` for each of its requests, in order."""

    # Ten thousand connections may be idle.
    __slots__ = ("_agent", "_flow", "_gateway", "_passage", "_share")

    def __init__(self, gateway: Gateway, flow: Flow, agent: Agent | None) -> None:
        self._gateway = gateway
        self._flow = flow
        self._agent = agent
        self._share: InFlight | None = None
        self._passage: Passage | None = None

    def on_request(self, exchange: Exchange) -> None:
        gateway, flow = self._gateway, self._flow
        self._passage = None
        gateway.begins(self)
        try:
            agent = self._agent_of(exchange)
            request = gateway.targets.request(exchange.head, flow, agent, exchange.received_ns)
        except CretoError as error:
            gateway.refuse_early(exchange, flow, self._agent, error)
            return
        if request.kind == "tunnel":
            gateway.pipeline.spawn(gateway.connect(self, exchange, flow, request))
            return
        self._passage = Passage(gateway.pipeline, exchange, request, self._share)
        self._passage.begin()

    def _agent_of(self, exchange: Exchange) -> Agent:
        if self._flow.way == "explicit" and not self._flow.bound_names:
            given = exchange.head.headers.getall("proxy-authorization")
            if len(given) > 1:
                detail = "Proxy-Authorization is there more than once."
                raise Permanent(detail, reason="duplicate_identity", status=400)
            self._flow.credentials = proxy_credentials(given[0] if given else None)
        agent = self._gateway.pipeline.identify(self._flow)
        if agent is None:  # the one it was is kept: its refusals are on record, too
            status = 407 if self._flow.way == "explicit" and not self._flow.bound_names else 403
            raise Permanent("This connection belongs to no known agent.", reason="unknown_agent", status=status)
        self._agent = agent
        if self._share is None and self._gateway.pipeline.protection.agents is not None:
            self._take_place(agent)
        return agent

    def _take_place(self, agent: Agent) -> None:
        """Counts this connection as one of its agent's. Raises Transient when that has too many."""
        agents = self._gateway.pipeline.protection.agents
        if agents is not None:
            share = agents.of(agent.id)
            share.connect()
            self._share = share

    def seated(self, share: InFlight) -> None:
        """This connection was counted as one of its agent's before it spoke HTTP."""
        share.connections += 1
        self._share = share

    def give_place(self) -> None:
        if self._share is not None:
            self._share.disconnect()
            self._share = None

    def on_body(self, exchange: Exchange, body: bytes | None) -> None:
        if self._passage is not None:
            self._passage.body(body)
            if exchange.lane is not None:
                self._passage = None

    def on_stale(self, exchange: Exchange) -> None:
        if self._passage is not None:
            self._passage.stale()

    def on_end(self, exchange: Exchange) -> None:
        if self._passage is not None:
            self._passage.end()
            self._passage = None

    def on_bad_request(self, error: BadMessage) -> bytes:
        refusal = Permanent(str(error), reason=error.reason, status=error.status)
        # What fails in an express lane has a passage neither, but the lane records it.
        if self._passage is None and not self._gateway.in_lane(self):
            self._gateway.refuse_unread(self._flow, self._agent, refusal)
        status, headers, body = render(refusal, None)
        return raw_response(status, headers, body)

    def on_close(self) -> None:
        self._gateway.closed(self)

    def abort(self) -> None:
        """Breaks the request under way, which records it as far as it got."""
        if self._passage is not None:
            self._passage.abort()

    @property
    def expected(self) -> int:
        return self._passage.expected if self._passage is not None else 0

    def overdue(self, status: int, reason: str, detail: str) -> None:
        if self._passage is not None:
            self._passage.overdue(status, reason, detail)


class StreamConversation(Conversation):
    """One stream of an HTTP/2 connection, with its one request. The connection is counted, once, the stream is not."""

    __slots__ = ("_grpc", "_seat")

    def __init__(self, gateway: Gateway, flow: Flow, agent: Agent | None, grpc: bool, seat: Seat) -> None:
        super().__init__(gateway, flow, agent)
        self._grpc = grpc
        self._seat = seat

    def _take_place(self, agent: Agent) -> None:
        agents = self._gateway.pipeline.protection.agents
        if agents is not None:
            share = agents.of(agent.id)
            self._seat.take(share)
            self._share = share

    def give_place(self) -> None:
        self._share = None

    def overdue(self, status: int, reason: str, detail: str) -> None:
        if not (self._grpc and reason == "body_too_slow"):  # a message stream speaks when it has something to say
            super().overdue(status, reason, detail)
