"""The sidecar's own stub resolver: asks the configured or the system's name servers, and believes only exact answers.

``/etc/hosts`` and search domains are not used: an agent's name means the same on every machine. Each question goes out
on a fresh socket, so from a random port, with a random id, connected, so that only the asked server can answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from creto_proxy.dns.message import AAAA, MAX_ALIASES, A, Answer, Malformed, Rcode, encode_query, parse_answer
from creto_proxy.model import Address
from creto_proxy.settings import Endpoint

RESOLV_CONF = Path("/etc/resolv.conf")
_PORT = 53
_MAX_SERVERS = 3  # as the C library, resolv.conf(5)
_ROUNDS = 2

_ROUTES_S = 5.0  # laptops change networks

CACHE_NAMES = 4096
_TTL_MAX_S = 3600
# Without a SOA record to read (RFC 2308) a negative answer is worth asking again soon.
_NEGATIVE_TTL_S = 5.0


class ResolutionFailed(OSError):
    """The name has no answer: it does not exist (``rcode`` NXDOMAIN), or nobody could say (SERVFAIL)."""

    def __init__(self, name: str, rcode: Rcode, why: str) -> None:
        super().__init__(f"{name} does not resolve: {why}")
        self.name = name
        self.rcode = rcode


@dataclass(frozen=True, slots=True)
class Found:
    """addresses of one kind, maybe none, and for how many seconds they may be kept; rcode NOERROR or NXDOMAIN."""

    rcode: Rcode
    addresses: tuple[Address, ...]
    ttl_s: float


def system_servers(text: str) -> list[Endpoint]:
    """The name servers of a resolv.conf, in order, at most three; the local host when it names none."""
    servers = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                servers.append(Endpoint(ipaddress.ip_address(words[1]), _PORT))
            except ValueError:
                continue
    return servers[:_MAX_SERVERS] or [Endpoint(ipaddress.ip_address("127.0.0.1"), _PORT)]


def families() -> frozenset[int]:
    """Address families (4, 6) for which this machine has a route to the outside. Sends nothing."""
    found = set()
    for version, family, place in ((4, socket.AF_INET, "192.0.2.1"), (6, socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((place, _PORT))
            found.add(version)
        except OSError:
            continue
    # A machine without any route may still reach pinned names and private networks.
    return frozenset(found or (4,))


class Resolver:
    """Name -> addresses, cached by TTL; equal questions under way are asked once.

    servers: whom to ask; by default those of ``/etc/resolv.conf``, read again when it changes.
    """

    def __init__(
        self,
        servers: Sequence[Endpoint] | None = None,
        *,
        timeout_s: float = 2.0,
        usable: Callable[[], frozenset[int]] = families,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = list(servers) if servers else None
        self._timeout_s = timeout_s
        self._usable = usable
        self._now_s = now_s
        self._routes: frozenset[int] = frozenset()
        self._routes_until = float("-inf")
        self._system: tuple[float, list[Endpoint]] | None = None
        self._cache: OrderedDict[tuple[str, int], tuple[float, Found]] = OrderedDict()
        self._asking: dict[tuple[str, int], asyncio.Task[Found]] = {}

    @classmethod
    def from_endpoint(cls, server: Endpoint | None) -> Resolver:
        """A resolver that asks ``server``, or the system's servers when None."""
        return cls(None if server is None else [server])

    def usable(self, kind: int) -> bool:
        """False for AAAA on a machine without IPv6 (A without IPv4): such an address could not be dialled."""
        now = self._now_s()
        if now >= self._routes_until:
            self._routes, self._routes_until = self._usable(), now + _ROUTES_S
        return (4 if kind == A else 6) in self._routes

    def cached(self, name: str) -> tuple[Address, ...] | None:
        """The addresses ``resolve`` would give without asking anybody; None when it would have to ask."""
        found = [self.cached_kind(name, kind) for kind in (A, AAAA) if self.usable(kind)]
        if any(answer is None for answer in found):
            return None
        addresses = tuple(address for answer in found if answer for address in answer.addresses)
        return addresses or None

    def cached_kind(self, name: str, kind: int) -> Found | None:
        """The kept answer with the time it has left, None when there is none."""
        entry = self._cache.get((name, kind))
        if entry is None:
            return None
        expires, found = entry
        left = expires - self._now_s()
        if left <= 0:
            del self._cache[name, kind]
            return None
        self._cache.move_to_end((name, kind))
        return Found(found.rcode, found.addresses, left)

    async def resolve(self, name: str) -> tuple[Address, ...]:
        """Addresses of ``name`` that can be dialled from here, IPv4 first; never empty.

        Raises ``ResolutionFailed`` (an OSError) when there are none or nobody answers.
        """
        kinds = [kind for kind in (A, AAAA) if self.usable(kind)]
        results = await asyncio.gather(*(self.lookup(name, kind) for kind in kinds), return_exceptions=True)
        addresses: list[Address] = []
        failure: ResolutionFailed | None = None
        for result in results:
            if isinstance(result, ResolutionFailed):
                failure = result
            elif isinstance(result, BaseException):
                raise result
            else:
                addresses += result.addresses
                if result.rcode is Rcode.NXDOMAIN:
                    failure = failure or ResolutionFailed(name, Rcode.NXDOMAIN, "there is no such name")
        if addresses:
            return tuple(addresses)
        raise failure or ResolutionFailed(name, Rcode.NOERROR, "it has no address")

    async def lookup(self, name: str, kind: int) -> Found:
        """Addresses of one kind (``A`` or ``AAAA``). Raises ``ResolutionFailed`` when no server answers."""
        cached = self.cached_kind(name, kind)
        if cached is not None:
            return cached
        key = (name, kind)
        task = self._asking.get(key)
        if task is None:
            # A task of its own, so that one caller giving up does not fail the others.
            task = asyncio.get_running_loop().create_task(self._ask(name, kind))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key, None))
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def _ask(self, name: str, kind: int) -> Found:
        at, ttl_s = name, float(_TTL_MAX_S)
        for _ in range(MAX_ALIASES + 1):
            answer = await self._ask_servers(at, kind)
            if answer.alias is not None and answer.rcode == Rcode.NOERROR:
                # The server gave an alias and left its addresses to us.
                at, ttl_s = answer.alias, min(ttl_s, answer.ttl_s)
                continue
            if answer.addresses:
                return self._keep(name, kind, Found(Rcode.NOERROR, answer.addresses, min(ttl_s, answer.ttl_s)))
            return self._keep(name, kind, Found(Rcode(answer.rcode), (), _NEGATIVE_TTL_S))
        raise ResolutionFailed(name, Rcode.SERVFAIL, "its aliases do not end")

    def _keep(self, name: str, kind: int, found: Found) -> Found:
        if found.ttl_s > 0:
            self._cache[name, kind] = (self._now_s() + found.ttl_s, found)
            self._cache.move_to_end((name, kind))
            while len(self._cache) > CACHE_NAMES:
                self._cache.popitem(last=False)
        return found

    async def _ask_servers(self, name: str, kind: int) -> Answer:
        """The first usable answer; servers in turn, twice."""
        try:
            encode_query(0, name, kind)
        except ValueError as error:
            raise ResolutionFailed(name, Rcode.NXDOMAIN, "it is not a host name") from error
        why = "no name server answered"
        for server in self._servers() * _ROUNDS:
            try:
                answer = await _exchange_udp(server, name, kind, self._timeout_s)
                if answer.truncated:
                    answer = await _exchange_tcp(server, name, kind, self._timeout_s)
            except TimeoutError:
                why = f"{server} did not answer"
                continue
            except (OSError, Malformed, asyncio.IncompleteReadError) as error:
                why = f"{server}: {error}"
                continue
            if answer.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN) and not answer.truncated:
                return answer
            why = f"{server} answered {_rcode_name(answer.rcode)}"
        raise ResolutionFailed(name, Rcode.SERVFAIL, why)

    def _servers(self) -> list[Endpoint]:
        if self._fixed is not None:
            return self._fixed
        try:
            changed = os.stat(RESOLV_CONF).st_mtime
            if self._system is None or self._system[0] != changed:
                self._system = (changed, system_servers(RESOLV_CONF.read_text(errors="replace")))
        except OSError:
            self._system = (0.0, system_servers(""))
        return self._system[1]


def _seen(task: asyncio.Task[Found]) -> None:
    """Marks a failure as retrieved, in case every caller has gone."""
    if not task.cancelled():
        task.exception()


def _rcode_name(rcode: int) -> str:
    try:
        return Rcode(rcode).name
    except ValueError:
        return f"RCODE{rcode}"


async def _exchange_udp(server: Endpoint, name: str, kind: int, timeout_s: float) -> Answer:
    """One question, one socket. Datagrams that do not answer it are dropped, as a forger's would be."""
    loop = asyncio.get_running_loop()
    ident = secrets.randbelow(1 << 16)
    done: asyncio.Future[Answer] = loop.create_future()
    family = socket.AF_INET if server.address.version == 4 else socket.AF_INET6

    def readable() -> None:
        try:
            data = sock.recv(1 << 16)
            answer = parse_answer(data, ident, name, kind)
        except (BlockingIOError, Malformed):
            return
        except OSError as error:  # connection refused: ICMP says nobody listens there
            if not done.done():
                done.set_exception(error)
            return
        if not done.done():
            done.set_result(answer)

    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((str(server.address), server.port))
        loop.add_reader(sock, readable)
        try:
            sock.send(encode_query(ident, name, kind))
            async with asyncio.timeout(timeout_s):
                return await done
        finally:
            loop.remove_reader(sock)


async def _exchange_tcp(server: Endpoint, name: str, kind: int, timeout_s: float) -> Answer:
    ident = secrets.randbelow(1 << 16)
    query = encode_query(ident, name, kind)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(str(server.address), server.port)
        try:
            writer.write(struct.pack(">H", len(query)) + query)
            (length,) = struct.unpack(">H", await reader.readexactly(2))
            return parse_answer(await reader.readexactly(length), ident, name, kind)
        finally:
            writer.close()
