"""Connections whose bytes nobody looks into: spliced TLS and plain TCP, judged once and as a whole."""

from __future__ import annotations

import socket

from creto_hotpath import wire
from creto_hotpath.relay import Tunnel
from creto_proxy.errors import CretoError, Permanent, Refused
from creto_proxy.model import Agent, Decision, Flow, Kind, Request, Usage, Verdict
from creto_proxy.pipeline import Pipeline
from creto_proxy.protect import InFlight
from creto_proxy.sniff import reset
from creto_proxy.sockets import Parked
from creto_proxy.target import request_id


class NoFields:
    """The header fields of something that has none."""

    def get(self, name: str) -> str | None:
        return None

    def getall(self, name: str) -> list[str]:
        return []

    def items(self) -> list[tuple[str, str]]:
        return []


def bare_request(flow: Flow, agent: Agent, kind: Kind, action: str, scheme: str, host: str, now_ns: int) -> Request:
    """A request that is known by where it goes alone."""
    return Request(
        id=request_id(),
        flow=flow,
        agent=agent,
        kind=kind,
        action=action,
        method="",
        scheme=scheme,
        host=host,
        port=flow.port,
        path="",
        query="",
        headers=NoFields(),
        received_ns=now_ns,
    )


class Tunnels:
    """Opens tunnels and remembers those that are open."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._pumps: set[Tunnel] = set()

    def __len__(self) -> int:
        return len(self._pumps)

    def abort(self) -> None:
        for pump in list(self._pumps):
            pump.abort()

    async def open(self, sock: socket.socket, flow: Flow, agent: Agent, name: str, kind: Kind) -> None:
        """Judges the connection as a whole and pumps its bytes when it is allowed; resets it when it is not."""
        pipeline = self._pipeline
        scheme = "tcp" if kind == "tcp" else "tls"
        request = bare_request(flow, agent, kind, kind, scheme, name, pipeline.clock.now_ns())
        decision: Decision | None = None
        upstream: Parked | None = None
        share: InFlight | None = None
        held_ns = 0
        try:
            pipeline.recorder.require()
            share = pipeline.protection.enter(agent.id)
            decision = pipeline.authorize(request)
            if decision.verdict is Verdict.ESCALATE:
                decision, held_ns = await pipeline.ask(request, decision, SilentClient(sock))
            if not decision.allowed:
                raise Refused(decision)
            permits = pipeline.upstreams.usable(await pipeline.egress.permits(request))
            upstream = await pipeline.upstreams.open_raw(permits)
            await pipeline.spend(request)
            agent_side = Parked()
            await wire.attach(agent_side, sock)
        except (CretoError, OSError) as error:
            pipeline.meters.release(request)
            if share is not None:
                share.leave()
            if upstream is not None:
                upstream.transport.abort()
            refusal = error if isinstance(error, CretoError) else Permanent(str(error), reason="name_not_found")
            decision = refusal.decision if isinstance(refusal, Refused) else decision
            self._record(request, decision, held_ns, error=refusal.reason)
            reset(sock)
            return
        if share is not None:
            share.connections += 1
        opened = pipeline.clock.now_ns()
        early = upstream.received
        if early:
            agent_side.transport.write(early)  # a server that speaks first

        def closed(pump: Tunnel) -> None:
            self._pumps.discard(pump)
            if share is not None:
                share.leave()
                share.disconnect()
            pipeline.revocations.leave(pump)
            usage = pipeline.meters.settle(request, None, status=0, completed=True)
            down = len(early) + pump.bytes_down
            up, why = pump.bytes_up, "identity_ended" if pump in revoked else ""
            self._record(request, decision, held_ns, usage=usage, up=up, down=down, opened=opened, error=why)

        def revoke() -> None:
            revoked.add(pump)
            pump.abort()

        revoked: set[Tunnel] = set()
        pump = Tunnel(agent_side.transport, upstream.transport, agent_side.received, closed)
        self._pumps.add(pump)
        pipeline.revocations.enter(pump, request, revoke)

    def _record(
        self,
        request: Request,
        decision: Decision | None,
        held_ns: int,
        *,
        usage: Usage | None = None,
        up: int = 0,
        down: int = 0,
        opened: int = 0,
        error: str = "",
    ) -> None:
        pipeline = self._pipeline
        now = pipeline.clock.now_ns()
        start = opened or now
        outcome = pipeline.outcome(
            request,
            decision,
            status=0,
            error="" if decision is not None and error == decision.reason else error,
            usage=usage or Usage(),
            bytes_up=up,
            bytes_down=down,
            creto_ns=max(0, start - request.received_ns - held_ns),
            held_ns=held_ns,
            upstream_ns=now - start,
            total_ns=now - request.received_ns,
        )
        pipeline.record(outcome, decision)
        if request.approval is not None:
            pipeline.settle(request, outcome)


class SilentClient:
    """The client of a held connection that speaks no HTTP: it cannot be kept warm, only watched."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def interim(self, status: int) -> None:
        return None

    @property
    def gone(self) -> bool:
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
