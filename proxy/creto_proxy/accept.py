"""Sockets become flows: where a connection came from, what it was meant for, and which protocol it speaks.

Three ways in share everything after this file. On the transparent way nothing is believed before it is looked at:
the first bytes are peeked at (they stay in the kernel), so the same socket can be spliced, intercepted or read as
HTTP. A CONNECT on the explicit way becomes such a socket once it is granted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import resource
import socket
from collections.abc import Callable, Sequence
from typing import cast

from creto_hotpath.http1 import BadMessage
from creto_hotpath.relay import Downstream, Exchange, Limits
from creto_proxy.control import HOST as CONTROL_HOST
from creto_proxy.egress import literal
from creto_proxy.errors import CretoError, Permanent, Refused
from creto_proxy.identify import proxy_credentials
from creto_proxy.jail.network import original_destination
from creto_proxy.model import Address, Agent, Decision, Flow, Request, Usage, Verdict, Way
from creto_proxy.pipeline import Passage, Pipeline
from creto_proxy.refusal import render
from creto_proxy.sniff import peek, reset
from creto_proxy.target import Targets
from creto_proxy.tls import BadHello, CertificateAuthority, Hello
from creto_proxy.tunnels import Tunnels, bare_request

log = logging.getLogger("creto.accept")

_METHOD_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&'*+-.^_`|~0123456789 ")

# Journal, ledger, audit log and keys must always find a descriptor, however many connections agents open.
_RESERVED_DESCRIPTORS = 128
# What was cut off at the end is closed, and so recorded, within a few turns of the loop.
_RECORDING_S = 1.0

Names = Callable[[str, Address], Sequence[str]]


class Conversation:
    """One agent connection that speaks HTTP/1: a ``Passage`` for each of its requests, in order."""

    def __init__(self, gateway: Gateway, flow: Flow, agent: Agent | None) -> None:
        self._gateway = gateway
        self._flow = flow
        self._agent = agent
        self._passage: Passage | None = None

    def on_request(self, exchange: Exchange) -> None:
        gateway, flow = self._gateway, self._flow
        self._passage = None
        try:
            agent = self._agent_of(exchange)
            request = gateway.targets.request(exchange.head, flow, agent, exchange.received_ns)
        except CretoError as error:
            gateway.refuse_early(exchange, flow, self._agent, error)
            return
        if request.kind == "tunnel":
            gateway.pipeline.spawn(gateway.connect(self, exchange, flow, request))
            return
        self._passage = Passage(gateway.pipeline, exchange, request)
        self._passage.begin()

    def _agent_of(self, exchange: Exchange) -> Agent:
        if self._flow.way == "explicit" and not self._flow.bound_names:
            self._flow.credentials = proxy_credentials(exchange.head.headers.get("proxy-authorization"))
        agent = self._gateway.pipeline.identify(self._flow)
        if agent is None:  # the one it was is kept: its refusals are on record, too
            status = 407 if self._flow.way == "explicit" and not self._flow.bound_names else 403
            raise Permanent("This connection belongs to no known agent.", reason="unknown_agent", status=status)
        self._agent = agent
        return agent

    def on_body(self, exchange: Exchange, body: bytes | None) -> None:
        if self._passage is not None:
            self._passage.body(body)

    def on_stale(self, exchange: Exchange) -> None:
        if self._passage is not None:
            self._passage.stale()

    def on_end(self, exchange: Exchange) -> None:
        if self._passage is not None:
            self._passage.end()
            self._passage = None

    def on_bad_request(self, error: BadMessage) -> bytes:
        status, headers, body = render(Permanent(str(error), reason=error.reason, status=error.status), None)
        return raw_response(status, headers, body)

    def on_close(self) -> None:
        self._gateway.closed(self)

    def abort(self) -> None:
        """Breaks the request under way, which records it as far as it got."""
        if self._passage is not None:
            self._passage.abort()

    @property
    def busy(self) -> bool:
        """True while a request is under way."""
        return self._passage is not None


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
    ) -> None:
        """capacity: agent connections at a time, by default what the process' descriptors allow; more are reset."""
        self.pipeline = pipeline
        self.targets = targets
        self._limits = limits
        self._authority = authority
        self._names = names
        self._ids = itertools.count(1)
        self._open: dict[Conversation, Downstream] = {}
        self._servers: list[asyncio.Server] = []
        self._loops: list[asyncio.Task[None]] = []
        self._tunnels = Tunnels(pipeline)
        self._sorting = 0
        self._capacity = capacity
        self._crowded = False

    # -- listeners

    async def listen_proxy(self, sock: socket.socket, link: str, way: Way) -> None:
        """Explicit and reverse listeners: plain HTTP/1 from the first byte."""
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            if self._full(link):
                return _Turned()
            flow = Flow(id=next(self._ids), link=link, way=way, peer="")
            return cast(asyncio.Protocol, self._downstream(flow, None))

        self._servers.append(await loop.create_server(connection, sock=sock))

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
            if self._full(link):
                reset(sock)
                continue
            self.pipeline.spawn(self._redirected(sock, str(peer[0]), link))

    def _full(self, link: str) -> bool:
        """Whether one more connection is too many; said once each time it comes to that."""
        if self._capacity is None:
            self._capacity = room()
        crowded = len(self._open) + len(self._tunnels) + self._sorting >= self._capacity
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
        self._sorting += 1
        try:
            await self._sort(sock, flow, agent)
        except CretoError as error:
            self._refuse_flow(sock, flow, agent, error)
        except (OSError, BadHello) as error:
            self._refuse_flow(sock, flow, agent, Permanent(str(error) or "connection broken", reason="bad_connection"))
        finally:
            self._sorting -= 1

    async def _sort(self, sock: socket.socket, flow: Flow, agent: Agent) -> None:
        name = flow.bound_names[0] if flow.bound_names else None
        if flow.original is not None and self.pipeline.egress.raw_tcp(name, flow.original[0], flow.port):
            await self._tunnels.open(sock, flow, agent, name or str(flow.original[0]), "tcp")
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

    async def _http(self, sock: socket.socket, flow: Flow, agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self._downstream(flow, agent), sock)

    async def _tls(self, sock: socket.socket, flow: Flow, agent: Agent, hello: Hello) -> None:
        name = hello.sni
        if name is None:
            raise _denied("no_server_name", "TLS without a server name cannot be tied to an allowed host.")
        flow.sni = name
        if name == CONTROL_HOST or name not in flow.bound_names:
            raise _denied(
                "ip_not_resolved_for_name", f"The address dialled was not answered for {name} on this link."
            )
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
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(
            lambda: self._downstream(flow, agent), sock, ssl=self._authority.context(name), ssl_handshake_timeout=10.0
        )

    def _downstream(self, flow: Flow, agent: Agent | None) -> Downstream:
        conversation = Conversation(self, flow, agent)
        protocol = Downstream(conversation, limits=self._limits, scheme="https" if flow.tls else "http")
        self._open[conversation] = protocol
        return protocol

    async def connect(self, conversation: Conversation, exchange: Exchange, flow: Flow, request: Request) -> None:
        """CONNECT: granted when the name may be reached; what flows inside is then judged like any connection."""
        address = literal(request.host)
        try:
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
        sock = _dup(transport)
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
        self.pipeline.recorder.record(
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
            )
        )

    def name_refused(self, link: str, agent: Agent, name: str, decision: Decision) -> None:
        """Records that DNS refused a name: for most programs that is how a refusal looks."""
        flow = Flow(id=next(self._ids), link=link, way="transparent", peer="", bound_names=(name,))
        self._record_refusal(flow, agent, Refused(decision), 0, None, "", action="resolve")
        log.warning("refused: DNS for %s (%s)%s", name, decision.reason, _hint(name, decision))

    # -- the end

    def closed(self, conversation: Conversation) -> None:
        self._open.pop(conversation, None)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stops accepting, lets what is under way end for ``grace_s``, then breaks it."""
        for task in self._loops:
            task.cancel()
        for server in self._servers:
            server.close()
        for protocol in list(self._open.values()):
            protocol.drain()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._busy() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self._tunnels.abort()
        for task in list(self.pipeline.tasks):
            task.cancel()
        for conversation in list(self._open):
            conversation.abort()
        deadline = asyncio.get_running_loop().time() + _RECORDING_S
        while self._recording() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)

    def _busy(self) -> bool:
        return bool(self.pipeline.tasks) or self._recording()

    def _recording(self) -> bool:
        """Whether something is open that leaves a record when it closes."""
        return bool(self._tunnels) or any(each.busy for each in self._open)


def room() -> int:
    """Agent connections that fit into this process' descriptors, of which it takes as many as it may have: each needs
    another to its upstream, and idle ones to upstreams are kept."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, (limit - _RESERVED_DESCRIPTORS) // 3)


class _Turned(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def _hint(name: str, decision: Decision) -> str:
    return f"; to allow it: --allow {name}, or [egress] allow" if decision.reason == "host_not_allowed" else ""


def raw_response(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """A complete HTTP/1.1 response that closes the connection."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = f"HTTP/1.1 {status} \r\n{fields}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + body


def _dup(transport: asyncio.Transport) -> socket.socket:
    """The socket under a transport, kept open while the transport itself is let go without a FIN or RST."""
    sock = transport.get_extra_info("socket")
    copy = socket.fromfd(sock.fileno(), sock.family, sock.type)
    copy.setblocking(False)
    transport.close()
    return copy


def _denied(reason: str, detail: str, status: int = 403) -> Refused:
    return Refused(Decision(Verdict.DENY, reason, detail, status=status))
