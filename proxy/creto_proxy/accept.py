"""Sockets become flows: where a connection came from, what it was meant for, and which protocol it speaks.

Three ways in share everything after this file. On the transparent way nothing is believed before it is looked at:
the first bytes are peeked at (they stay in the kernel), so the same socket can be spliced, intercepted or read as
HTTP. A CONNECT on the explicit way becomes such a socket once it is granted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

from creto_hotpath import wire
from creto_hotpath.relay import Downstream, Exchange, Limits
from creto_proxy.control import HOST as CONTROL_HOST
from creto_proxy.conversation import Conversation, StreamConversation
from creto_proxy.egress import literal
from creto_proxy.errors import CretoError, Permanent, Refused
from creto_proxy.h2.accepting import Http2
from creto_proxy.h2.agents import Bounds
from creto_proxy.jail.network import original_destination
from creto_proxy.model import Address, Agent, Decision, Flow, Request, Usage, Verdict, Way
from creto_proxy.pipeline import Pipeline
from creto_proxy.protect import Seat
from creto_proxy.refusal import render
from creto_proxy.sniff import peek, reset
from creto_proxy.sockets import Turned, accept_tls, duplicate, room
from creto_proxy.target import Targets
from creto_proxy.tls import BadHello, CertificateAuthority, Hello
from creto_proxy.tunnels import Tunnels, bare_request

log = logging.getLogger("creto.accept")

_METHOD_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&'*+-.^_`|~0123456789 ")

# Connections that may wait to be accepted; the kernel's net.core.somaxconn bounds it further.
BACKLOG = 4096
# How long an agent may take for its TLS handshake.
_HANDSHAKE_S = 10.0
# What was cut off at the end is closed, and so recorded, within a few turns of the loop.
_RECORDING_S = 1.0

Names = Callable[[str, Address], Sequence[str]]


class Gateway:
    """The accept stage: owns the listeners and the connections that came in by them."""

    def __init__(
        self,
        pipeline: Pipeline,
        targets: Targets,
        limits: Limits,
        *,
        authority: CertificateAuthority,
        names: Names,
        capacity: int | None = None,
        http2: Bounds | None = None,
        stream_idle_s: float = 600.0,
    ) -> None:
        """capacity: agent connections at a time, by default what the process' descriptors allow; more are reset.
        http2: spoken, within these bounds. stream_idle_s: how long a gRPC request may be silent."""
        self.pipeline = pipeline
        self.targets = targets
        self._limits = limits
        self._authority = authority
        self._names = names
        self._ids = itertools.count(1)
        self._open: dict[Conversation, Downstream] = {}
        self._servers: list[wire.Listener] = []
        self._loops: list[asyncio.Task[None]] = []
        self._tunnels = Tunnels(pipeline)
        self._http2 = Http2(self, http2) if http2 is not None else None
        self._grpc_limits = replace(limits, body_s=stream_idle_s)
        if http2 is not None:
            authority.offer_http2()
        self._sorting = 0
        self._draining = False
        self._capacity = capacity
        self._crowded = False

    # -- listeners

    async def listen_proxy(self, sock: socket.socket, link: str, way: Way) -> None:
        """Explicit and reverse listeners: plain HTTP/1 from the first byte."""

        def connection() -> asyncio.Protocol:
            if not self._admits(link):
                return Turned()
            flow = Flow(id=next(self._ids), link=link, way=way, peer="")
            if self._http2 is not None:
                return self._http2.entry(flow, None)
            return cast(asyncio.Protocol, self.converse(flow, None))

        self._servers.append(await wire.listen(connection, sock, BACKLOG))

    def listen_transparent(self, sock: socket.socket, link: str) -> None:
        """A listener inside an agent's namespace, fed by REDIRECT."""
        sock.setblocking(False)
        self._loops.append(asyncio.get_running_loop().create_task(self._accept_redirected(sock, link)))

    async def _accept_redirected(self, listener: socket.socket, link: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("accept on %s: %s", link, error)
                await asyncio.sleep(0.05)  # out of descriptors: the backlog keeps the others waiting
                continue
            sock.setblocking(False)
            if not self._admits(link):
                reset(sock)
                continue
            self.pipeline.spawn(self._redirected(sock, str(peer[0]), link))

    def _admits(self, link: str) -> bool:
        arrivals = self.pipeline.protection.arrivals
        return not self._full(link) and (arrivals is None or arrivals.admit(link))

    def _full(self, link: str) -> bool:
        """Whether one more connection is too many; said once each time it comes to that."""
        if self._capacity is None:
            self._capacity = room()
        crowded = self.connections >= self._capacity
        if crowded and not self._crowded:
            log.warning("%s: more than %d connections at a time; further ones are reset", link, self._capacity)
        self._crowded = crowded
        return crowded

    async def _redirected(self, sock: socket.socket, peer: str, link: str) -> None:
        try:
            destination = original_destination(sock)
        except OSError:
            destination = None  # gone already
        if destination is None:
            sock.close()  # dialled directly: forwarding it would loop
            return
        address, port = destination
        flow = Flow(
            id=next(self._ids),
            link=link,
            way="transparent",
            peer=peer,
            original=destination,
            bound_names=tuple(self._names(link, address)),
            port=port,
        )
        await self.serve(sock, flow)

    # -- one connection whose first bytes decide

    async def serve(self, sock: socket.socket, flow: Flow) -> None:
        """Identifies the agent, looks at the first bytes, and hands the socket to what they are."""
        agent = self.pipeline.identify(flow)
        if agent is None:
            reset(sock)
            return
        agents = self.pipeline.protection.agents
        share = agents.of(agent.id) if agents is not None else None
        self._sorting += 1
        try:
            if share is not None:
                share.connect()
        except CretoError as error:
            self._sorting -= 1
            self._refuse_flow(sock, flow, agent, error)
            return
        try:
            await self._sort(sock, flow, agent)
        except CretoError as error:
            self._refuse_flow(sock, flow, agent, error)
        except (OSError, BadHello) as error:
            self._refuse_flow(sock, flow, agent, Permanent(str(error) or "connection broken", reason="bad_connection"))
        finally:
            self._sorting -= 1
            if share is not None:
                share.disconnect()  # what became of it has counted itself by now

    async def _sort(self, sock: socket.socket, flow: Flow, agent: Agent) -> None:
        destination = await self.pipeline.egress.raw_tcp(flow)
        if destination is not None:
            await self._tunnels.open(sock, flow, agent, destination, "tcp")
            return
        first = await peek(sock)
        if isinstance(first, Hello):
            await self._tls(sock, flow, agent, first)
        elif first[0] in _METHOD_BYTES:
            await self._http(sock, flow, agent)
        else:
            raise _denied(
                "unknown_protocol",
                'Neither HTTP nor TLS. Plain TCP needs a rule: [egress] allow = ["tcp://host:port"].',
            )

    async def _http(self, sock: socket.socket, flow: Flow, agent: Agent, context: ssl.SSLContext | None = None) -> None:
        """Speaks HTTP on that socket from now on, under TLS with ``context``. Raises OSError when TLS fails."""
        if self._http2 is not None:
            entry = self._http2.entry(flow, agent)
            try:
                await _attach(entry, sock, context)
            except BaseException:
                self._http2.never_connected(entry)
                raise
            return
        conversation = Conversation(self, flow, agent)
        protocol = self._open[conversation] = self._downstream(conversation, flow)
        try:
            await _attach(protocol, sock, context)
        except BaseException:
            self.closed(conversation)  # a protocol that was never connected is not told that it was lost
            raise
        agents = self.pipeline.protection.agents
        if agents is not None and conversation in self._open:
            conversation.seated(agents.of(agent.id))

    async def _tls(self, sock: socket.socket, flow: Flow, agent: Agent, hello: Hello) -> None:
        name = hello.sni
        if name is None:
            raise _denied("no_server_name", "TLS without a server name cannot be tied to an allowed host.")
        flow.sni = name
        if name == CONTROL_HOST or name not in flow.bound_names:
            raise _denied("ip_not_resolved_for_name", f"The address dialled was not answered for {name} on this link.")
        decision = self.pipeline.egress.name_decision(agent, name, flow.port)
        if not decision.allowed and not decision.reason.startswith("host_not_allowed"):
            raise Refused(decision)
        if decision.allowed and self.pipeline.egress.tls_mode(name, flow.port) == "splice":
            if hello.ech:
                raise _denied("ech", "Encrypted ClientHello hides the server name; it cannot be spliced.")
            await self._tunnels.open(sock, flow, agent, name, "tunnel")
            return
        # A host that is not allowed is intercepted too, so that the refusal can be read instead of guessed.
        flow.tls = True
        await self._http(sock, flow, agent, self._authority.context(name))

    def converse(self, flow: Flow, agent: Agent | None) -> Downstream:
        """The protocol of a connection that speaks HTTP/1."""
        conversation = Conversation(self, flow, agent)
        protocol = self._open[conversation] = self._downstream(conversation, flow)
        agents = self.pipeline.protection.agents
        if agent is not None and agents is not None:
            conversation.seated(agents.of(agent.id))
        return protocol

    def converse_in_stream(self, flow: Flow, agent: Agent | None, grpc: bool, seat: Seat) -> Downstream:
        """The protocol of one HTTP/2 stream, which the relay takes for a connection. seat: that of the connection."""
        conversation = StreamConversation(self, flow, agent, grpc, seat)
        limits = self._grpc_limits if grpc else self._limits
        protocol = self._open[conversation] = self._downstream(conversation, flow, limits)
        return protocol

    def seat(self, agent: Agent | None) -> Seat:
        """The place of an HTTP/2 connection among its agent's; taken already where that was counted before it spoke."""
        agents = self.pipeline.protection.agents
        seat = Seat()
        if agent is not None and agents is not None:
            seat.share = agents.of(agent.id)
            seat.share.connections += 1
        return seat

    def _downstream(self, conversation: Conversation, flow: Flow, limits: Limits | None = None) -> Downstream:
        lanes = self.pipeline.lanes
        return Downstream(
            conversation,
            limits=limits or self._limits,
            scheme="https" if flow.tls else "http",
            lane=None if lanes is None else lanes.lane(flow),
            http2=flow.http2,
        )

    async def connect(self, conversation: Conversation, exchange: Exchange, flow: Flow, request: Request) -> None:
        """CONNECT: granted when the name may be reached; what flows inside is then judged like any connection."""
        address = literal(request.host)
        try:
            if flow.http2:
                raise Permanent("Open tunnels by HTTP/1.1 CONNECT.", reason="connect_in_http2", status=501)
            self.pipeline.recorder.require()
            if address is None:
                decision = self.pipeline.egress.name_decision(request.agent, request.host, request.port)
            else:
                decision = self.pipeline.egress.address_decision(request.agent, None, address, request.port)
            if not decision.allowed:
                raise Refused(decision)
        except CretoError as error:
            self.refuse_early(exchange, flow, request.agent, error, request)
            return
        if exchange.over:
            return
        self.closed(conversation)
        transport, leftover = exchange.detach()
        if leftover:
            transport.abort()  # RFC 9110 section 9.3.6: tunnel bytes come after the 2xx
            return
        sock = duplicate(transport)
        inner = Flow(
            id=flow.id,
            link=flow.link,
            way=flow.way,
            peer=flow.peer,
            bound_names=(request.host,),
            port=request.port,
            credentials=flow.credentials,
        )
        if address is not None:
            inner.original = (address, request.port)
        await self.serve(sock, inner)

    # -- refusals before there is a request to judge

    def refuse_early(
        self, exchange: Exchange, flow: Flow, agent: Agent | None, error: CretoError, request: Request | None = None
    ) -> None:
        """Answers and records a request that did not get as far as the stages."""
        status, headers, body = render(error, request)
        if status == 407:
            headers = [*headers, ("Proxy-Authenticate", 'Basic realm="creto"')]
        exchange.respond(status, headers, body, close=True)
        if agent is not None:
            self._record_refusal(flow, agent, error, status, request, exchange.head.method)

    def refuse_unread(self, flow: Flow, agent: Agent | None, error: CretoError) -> None:
        """Records what could not even be read as a request, when it is known whose it was."""
        agent = agent or self.pipeline.identify(flow)
        if agent is not None:
            self._record_refusal(flow, agent, error, error.status, None, "")

    def _refuse_flow(self, sock: socket.socket, flow: Flow, agent: Agent, error: CretoError) -> None:
        self._record_refusal(flow, agent, error, 0, None, "")
        reset(sock)

    def _record_refusal(
        self,
        flow: Flow,
        agent: Agent,
        error: CretoError,
        status: int,
        request: Request | None,
        method: str,
        action: str = "",
    ) -> None:
        now = self.pipeline.clock.now_ns()
        if request is None:
            name = flow.sni or (flow.bound_names[0] if flow.bound_names else None)
            host = name or (str(flow.original[0]) if flow.original else "")
            scheme = "dns" if action else ("https" if flow.sni else ("http" if status else "tcp"))
            request = bare_request(flow, agent, "http" if status else "tcp", action, scheme, host, now)
            request.method = method
        decision = error.decision if isinstance(error, Refused) else None
        self.pipeline.record(
            self.pipeline.outcome(
                request,
                decision,
                status=status,
                error="" if decision is not None else error.reason,
                usage=Usage(),
                bytes_up=0,
                bytes_down=0,
                creto_ns=0,
                held_ns=0,
                upstream_ns=0,
                total_ns=0,
            ),
            decision,
        )

    def name_refused(self, link: str, agent: Agent, name: str, decision: Decision) -> None:
        """Records that DNS refused a name: for most programs that is how a refusal looks."""
        flow = Flow(id=next(self._ids), link=link, way="transparent", peer="", bound_names=(name,))
        self._record_refusal(flow, agent, Refused(decision), 0, None, "", action="resolve")
        log.warning("refused: DNS for %s (%s)%s", name, decision.reason, _hint(name, decision))

    # -- the end

    def closed(self, conversation: Conversation) -> None:
        self._open.pop(conversation, None)
        conversation.give_place()

    def open(self) -> Iterable[tuple[Conversation, Downstream]]:
        """The connections that speak HTTP."""
        return self._open.items()

    def in_lane(self, conversation: Conversation) -> bool:
        """Whether the request under way on that connection was taken by an express lane."""
        protocol = self._open.get(conversation)
        exchange = None if protocol is None else protocol.exchange
        return exchange is not None and exchange.lane is not None

    def begins(self, conversation: Conversation) -> None:
        """A request begins; while this process drains, its answer is the last one of its connection."""
        if self._draining and (protocol := self._open.get(conversation)) is not None:
            protocol.drain()

    @property
    def connections(self) -> int:
        """Connections of agents that are open now; a stream of HTTP/2 counts, it may need one to its upstream."""
        return len(self._open) + len(self._tunnels) + self._sorting + (len(self._http2) if self._http2 else 0)

    async def stop(self, grace_s: float = 5.0, *, replaced: bool = False) -> None:
        """Stops accepting, lets what is under way end for ``grace_s``, then breaks it.

        replaced: another process accepts from the same sockets, so nothing hurries. A connection between requests is
        kept until the answer to its next one says that it closes: an agent that is just writing loses nothing.
        """
        for task in self._loops:
            task.cancel()
        for server in self._servers:
            server.close()
        self._draining = True
        if self.pipeline.lanes is not None:
            self.pipeline.lanes.close()
        if self._http2 is not None:
            self._http2.drain(replaced=replaced)
        for protocol in list(self._open.values()):
            if protocol.exchange is not None or not replaced:
                protocol.drain()
        deadline = asyncio.get_running_loop().time() + grace_s
        while (self._busy() or (replaced and self.connections)) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        if replaced and self._http2 is not None:
            self._http2.drain()
        for protocol in list(self._open.values()):
            protocol.drain()
        self._tunnels.abort()
        for task in list(self.pipeline.tasks):
            task.cancel()
        for conversation, protocol in list(self._open.items()):
            conversation.abort()
            exchange = protocol.exchange
            if exchange is not None and exchange.lane is not None:
                exchange.abort()
        deadline = asyncio.get_running_loop().time() + _RECORDING_S
        while self._recording() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        if self._http2 is not None:
            self._http2.abort()

    def _busy(self) -> bool:
        return bool(self.pipeline.tasks) or self._recording()

    def _recording(self) -> bool:
        """Whether something is open that leaves a record when it closes."""
        return bool(self._tunnels) or any(each.exchange is not None for each in self._open.values())


async def _attach(protocol: asyncio.BaseProtocol, sock: socket.socket, context: ssl.SSLContext | None) -> None:
    if context is None:
        await wire.attach(protocol, sock)
    else:
        await accept_tls(protocol, sock, context, _HANDSHAKE_S)


def _hint(name: str, decision: Decision) -> str:
    return f"; to allow it: --allow {name}, or [egress] allow" if decision.reason == "host_not_allowed" else ""


def _denied(reason: str, detail: str, status: int = 403) -> Refused:
    return Refused(Decision(Verdict.DENY, reason, detail, status=status))
