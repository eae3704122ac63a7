"""Answers an agent's DNS on one link: only allowed names are asked for, only acceptable addresses come back.

DNS is a way out by itself (a name can carry data to whoever runs its servers), so a refused name causes no packet at
all, record types that carry free text are refused, and what allowed names may carry is bounded by a budget. Every
address is bound to its name on this link before the reply is sent; connections are judged by these bindings.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from creto_proxy.control import HOST as CONTROL_HOST
from creto_proxy.dns.bindings import Bindings
from creto_proxy.dns.message import (
    AAAA,
    HTTPS,
    SVCB,
    A,
    Malformed,
    Query,
    Rcode,
    encode_error,
    encode_reply,
    is_internet,
    parse_query,
)
from creto_proxy.dns.resolver import Found, ResolutionFailed, Resolver
from creto_proxy.errors import CretoError
from creto_proxy.model import Address, Agent, Decision, Verdict
from creto_proxy.settings import Endpoint

log = logging.getLogger("creto.dns")

# For benchmarks between networks, so never a real destination (RFC 2544, 198.18.0.0/15).
SYNTHETIC = ipaddress.IPv4Network("198.18.0.0/15")
CONTROL_ADDRESS = SYNTHETIC[1]
_SYNTHETIC_TTL_S = 60

_TCP_LIMIT = 65535
_TCP_IDLE_S = 10.0
_TCP_CONNECTIONS = 64
_PENDING = 512
# Programs ask for A and AAAA of one name, and ask again: one refusal to tell about.
_REPEAT_S = 2.0
_REPEATS_KEPT = 256

NameRule: TypeAlias = Callable[[Agent, str, int | None], Decision]
AddressRule: TypeAlias = Callable[[Agent, str | None, Address, int | None], Decision]
_Peer: TypeAlias = tuple[Any, ...]
Refusal: TypeAlias = Callable[[str, Agent, str, Decision], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """What one link may send upstream: questions per second (with a burst), and different names altogether."""

    queries_per_s: float = 200.0
    burst: int = 2000
    names: int = 5000


@dataclass(frozen=True, slots=True)
class _Reply:
    rcode: Rcode
    addresses: tuple[Address, ...] = ()
    ttl_s: int = 0


_EMPTY = _Reply(Rcode.NOERROR)
_REFUSED = _Reply(Rcode.REFUSED)


class DnsServer:
    """DNS of one link.

    agent: who is on the link now. decide, address_allowed: the egress stage's rules for a name and for an address.
    pins: names that live where the operator says; they get an address of ``SYNTHETIC`` that is theirs alone. refused:
    told of every name that was refused or whose addresses were all filtered, once per burst of equal questions.
    """

    def __init__(
        self,
        *,
        link: str,
        agent: Callable[[], Agent],
        decide: NameRule,
        address_allowed: AddressRule,
        resolver: Resolver,
        bindings: Bindings,
        pins: Mapping[str, Endpoint] | None = None,
        refused: Refusal | None = None,
        budget: Budget = Budget(),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._agent = agent
        self._decide = decide
        self._address_allowed = address_allowed
        self._resolver = resolver
        self._bindings = bindings
        self._tell = refused
        self._budget = budget
        self._now_s = now_s
        self._tokens = float(budget.burst)
        self._filled_s = now_s()
        self._asked: set[str] = set()
        self._told: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._synthetic = synthetic_addresses(pins or {})
        for name, address in self._synthetic.items():
            bindings.pin(link, name, address)

    async def serve(self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]) -> None:
        """Answers on these non-blocking sockets until ``close``; they stay the caller's to close."""
        loop = asyncio.get_running_loop()
        for sock in udp:
            # A reader and not sock_recvfrom, which uvloop does not have.
            loop.add_reader(sock, self._datagram, sock)
            self._sockets.append(sock)
        for sock in tcp:
            self._servers.append(await asyncio.start_server(self._stream, sock=sock.dup()))

    def close(self) -> None:
        """Stops answering. Idempotent."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock)
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        self._sockets.clear()
        self._servers.clear()

    async def reply(self, data: bytes, *, limit: int | None = None) -> bytes | None:
        """The answer to one message, at most ``limit`` bytes (None: what a datagram may have); None for no answer."""
        query = self._parsed(data)
        if not isinstance(query, Query):
            return query
        answer = self._at_once(query) or await self._upstream(query)
        return _encoded(query, answer, limit)

    # -- transports

    def _datagram(self, sock: socket.socket) -> None:
        try:
            data, peer = sock.recvfrom(_TCP_LIMIT)
        except OSError:
            return
        query = self._parsed(data)
        if not isinstance(query, Query):
            if query is not None:
                _send(sock, query, peer)
            return
        answer = self._at_once(query)
        if answer is None and len(self._tasks) >= _PENDING:
            answer = _Reply(Rcode.SERVFAIL)
        if answer is not None:
            _send(sock, _encoded(query, answer, None), peer)
            return
        task = asyncio.get_running_loop().create_task(self._later(sock, query, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _later(self, sock: socket.socket, query: Query, peer: _Peer) -> None:
        answer = await self._upstream(query)
        if sock.fileno() >= 0:
            _send(sock, _encoded(query, answer, None), peer)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= _TCP_CONNECTIONS:
            writer.close()
            return
        self._connections += 1
        try:
            while True:
                async with asyncio.timeout(_TCP_IDLE_S):
                    (length,) = struct.unpack(">H", await reader.readexactly(2))
                    data = await reader.readexactly(length)
                answer = await self.reply(data, limit=_TCP_LIMIT)
                if answer is None:
                    return
                writer.write(struct.pack(">H", len(answer)) + answer)
                async with asyncio.timeout(_TCP_IDLE_S):
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            return
        finally:
            self._connections -= 1
            writer.close()

    # -- decisions

    @staticmethod
    def _parsed(data: bytes) -> Query | bytes | None:
        """The query, or what to answer instead, or None for silence."""
        try:
            return parse_query(data)
        except Malformed as error:
            return None if error.rcode is None else encode_error(data, error.rcode)

    def _at_once(self, query: Query) -> _Reply | None:
        """The reply when nobody has to be asked."""
        agent = self._agent()
        name = query.name
        if not is_internet(query) or query.kind not in (A, AAAA, HTTPS, SVCB):
            detail = f"DNS gives addresses only; {query.kind_name} records are not answered."
            return self._refuse(agent, name, Decision(Verdict.DENY, "dns_type_refused", detail))
        if name == CONTROL_HOST:
            return self._own(query, CONTROL_ADDRESS)
        try:
            decision = self._decide(agent, name, None)
        except CretoError as error:
            log.warning("DNS for %s failed: %s", self._link, error)
            self._report(agent, name, Decision(Verdict.DENY, error.reason, error.detail))
            return _Reply(Rcode.SERVFAIL)
        if not decision.allowed:
            return self._refuse(agent, name, decision)
        if query.kind not in (A, AAAA):
            # Empty, so that clients take A and AAAA and never learn ECH keys or other ports (RFC 9460 section 3).
            return _EMPTY
        if name in self._synthetic:
            return self._own(query, self._synthetic[name])
        if not self._resolver.usable(query.kind):
            return _EMPTY
        found = self._resolver.cached_kind(name, query.kind)
        if found is not None:
            return self._answer(agent, name, found)
        if not self._afford(name):
            detail = "This agent asks DNS for more than its budget."
            return self._refuse(agent, name, Decision(Verdict.DENY, "dns_budget", detail, status=429))
        return None

    async def _upstream(self, query: Query) -> _Reply:
        try:
            found = await self._resolver.lookup(query.name, query.kind)
            return self._answer(self._agent(), query.name, found)
        except ResolutionFailed as error:
            log.info("%s", error)
            return _Reply(error.rcode if error.rcode is Rcode.NXDOMAIN else Rcode.SERVFAIL)
        except CretoError as error:
            log.warning("DNS for %s failed: %s", self._link, error)
            return _Reply(Rcode.SERVFAIL)

    def _own(self, query: Query, address: Address) -> _Reply:
        return _Reply(Rcode.NOERROR, (address,), _SYNTHETIC_TTL_S) if query.kind == A else _EMPTY

    def _answer(self, agent: Agent, name: str, found: Found) -> _Reply:
        """Filters, binds, and only then gives the reply away."""
        if found.rcode is not Rcode.NOERROR:
            return _Reply(found.rcode)
        allowed, refusal = [], None
        for address in found.addresses:
            decision = self._address_allowed(agent, name, address, None)
            if decision.allowed:
                allowed.append(address)
            else:
                refusal = refusal or decision
        if refusal is not None and not allowed:
            self._report(agent, name, Decision(Verdict.DENY, "dns_answer_filtered", refusal.detail))
        self._bindings.record(self._link, name, allowed, found.ttl_s)
        return _Reply(Rcode.NOERROR, tuple(allowed), int(found.ttl_s))

    def _refuse(self, agent: Agent, name: str, decision: Decision) -> _Reply:
        self._report(agent, name, decision)
        return _REFUSED

    def _report(self, agent: Agent, name: str, decision: Decision) -> None:
        key, now = (name, decision.reason), self._now_s()
        last = self._told.get(key)
        if self._tell is None or (last is not None and now - last < _REPEAT_S):
            return
        self._told[key] = now
        self._told.move_to_end(key)
        if len(self._told) > _REPEATS_KEPT:
            self._told.popitem(last=False)
        self._tell(self._link, agent, name, decision)

    def _afford(self, name: str) -> bool:
        """Takes one question, and the name if it is new, from the budget."""
        now = self._now_s()
        self._tokens = min(self._budget.burst, self._tokens + (now - self._filled_s) * self._budget.queries_per_s)
        self._filled_s = now
        if self._tokens < 1 or (name not in self._asked and len(self._asked) >= self._budget.names):
            return False
        self._tokens -= 1
        self._asked.add(name)
        return True


def synthetic_addresses(pins: Mapping[str, Endpoint]) -> dict[str, Address]:
    """An address of its own for the control host and for every pinned name; the same pins give the same addresses.

    Raises ValueError when there are more names than addresses (131,070).
    """
    names = [CONTROL_HOST, *sorted(name for name in pins if name != CONTROL_HOST)]
    if len(names) > SYNTHETIC.num_addresses - 2:
        raise ValueError(f"{len(names)} names are pinned; there are addresses for {SYNTHETIC.num_addresses - 2}")
    return {name: SYNTHETIC[index] for index, name in enumerate(names, start=1)}


def _encoded(query: Query, answer: _Reply, limit: int | None) -> bytes:
    return encode_reply(
        query, answer.rcode, answer.addresses, answer.ttl_s, limit=query.size if limit is None else limit
    )


def _send(sock: socket.socket, data: bytes, peer: _Peer) -> None:
    try:
        sock.sendto(data, peer)
    except OSError:
        pass  # a full buffer or a client that is gone: DNS clients ask again
