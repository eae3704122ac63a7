"""Requests like those that were judged before, answered without asking again. Plain-Python form.

Every stage of the pipeline is asked once about a request; where all of their answers hold for each request of the same
shape, the caller keeps them as a ``Standing``, for half a second at most. ``Express`` is the lane that requests of such
a shape take: look up, charge the quotas, forward on an idle connection, and write the outcome into the journal.

The *shape* is what the answers may depend on: where the request is to, its method, the values of some named fields
and, for a standing kept as exact, its path as spelled. Whatever else a request has, a body in particular, must be
indifferent to every stage, unless the standing is ``Metered``: then it is for bodies that ask for the same of a model
(see ``ask``) and are here before the request is taken. A request with any other of the named fields, an upgrade, proxy
credentials, an expectation or HTTP/1.0 is left to the handler. So is everything that is not a plain yes: an idle
connection that is missing, a quota that refuses, a journal that cannot be written.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgpack

from creto_hotpath._admit_py import DecisionTable
from creto_hotpath._ask_py import Tariff, plain
from creto_hotpath._ask_types import Ask
from creto_hotpath._counters_py import Counters
from creto_hotpath._http1_py import Prepared
from creto_hotpath._journal_py import Journal
from creto_hotpath._quota_py import QuotaPath, QuotaTable
from creto_hotpath._quota_types import QuotaBusy, QuotaFull, QuotaTableError
from creto_hotpath._relay_py import Exchange, Lane, Stack, Tap, Upstream

if TYPE_CHECKING:
    from creto_hotpath._http1_py import RequestHead, ResponseHead

# What stands in a record for a fact that is only known at the end of the exchange.
ID: Final = 0
AT: Final = 1
TARGET: Final = 2
STATUS: Final = 3
ERROR: Final = 4
BYTES_UP: Final = 5
BYTES_DOWN: Final = 6
CRETO_NS: Final = 7
UPSTREAM_NS: Final = 8
TOTAL_NS: Final = 9
TRACE: Final = 10
FACTS: Final = 11
# Only in a record with ``Metered``: the bytes that its ``settle`` gives.
USAGE: Final = 11

KEY_LIMIT: Final = 1024
LIMIT: Final = 4096
ASKS: Final = 256
CLASSES: Final = 6
CELLS: Final = 7

_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack
# Paths that some server would read otherwise than they are spelled; see ``creto_proxy.paths``.
_ODD = ("%", "\\", ";", "//", "/.")
# What W3C Trace Context writes today; any other spelling is for the handler to read.
_TRACE = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[0-3]")


class Keeper(Protocol):
    """Who set a lane up, for what happens too seldom to be worth doing without a call."""

    def cells(self, standing: Standing, status_class: int) -> Sequence[int]:
        """Cells of the counters for answers of that class (0: none was sent): requests, decisions, bytes up, bytes
        down, then the histograms of the total, creto's own and the upstream's time."""
        ...

    def again(self) -> bool:
        """Whether a request whose connection was closed before it answered may be sent once more."""
        ...

    def ended(self, exchange: Exchange, standing: Standing) -> None:
        """An exchange ended otherwise than with an answer below 500, or while an upstream is in trouble."""
        ...


class Share:
    """How many requests one agent has under way: ``count`` of ``limit``."""

    __slots__ = ("count", "limit")

    def __init__(self, limit: int) -> None:
        self.count = 0
        self.limit = limit

    def enter(self) -> bool:
        """Takes a place for one request; False when there is none."""
        if self.count >= self.limit:
            return False
        self.count += 1
        return True

    def leave(self) -> None:
        """Gives the place back."""
        self.count -= 1


class Valve:
    """While ``closed``, nothing takes any of the lanes that were made with it."""

    __slots__ = ("closed",)

    def __init__(self) -> None:
        self.closed = False


class Metered:
    """How a model request is metered.

    tariff: what it may use, which is reserved before it is sent. watch: as ``Exchange.on_response``, gives the tap of
    its answer. settle: told of the tap, the status, whether the answer was completed, and what was reserved; says what
    is charged (None: what was reserved stands until its time is up) and what stands in the record, as msgpack. edits:
    to its head. rewrite: gives the body to send instead of its own.
    """

    __slots__ = ("edits", "rewrite", "settle", "tariff", "watch")

    def __init__(
        self,
        *,
        tariff: Tariff,
        watch: Callable[[Exchange, ResponseHead], Tap | None],
        settle: Callable[[Tap | None, int, bool, tuple[int, int, int]], tuple[tuple[int, ...] | None, bytes]],
        edits: Mapping[str, str | None] | None = None,
        rewrite: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.tariff = tariff
        self.watch = watch
        self.settle = settle
        self.edits = Prepared(edits) if edits else None
        self.rewrite = rewrite


class Standing:
    """What all stages said about the requests of one shape, and what is done with them.

    stack: idle connections to where they go. host: the Host field they are sent with. base, strip: the path is sent
    with ``base`` instead of its first ``strip`` bytes. table, epoch: void once the table is of another epoch.
    expires_ns: monotonic. record: the journal record as msgpack, cut where facts of the exchange go: bytes, and
    numbers that name the fact. quota, path, amounts, ttl_ns: what is reserved before the send and charged at the end;
    quota None: nothing. share: where the requests of the agent under way are counted, None when they are not.
    context: the caller's own. metered: then it holds for model requests, and ``amounts`` count for nothing.
    """

    __slots__ = ("_cells", "amounts", "base", "context", "epoch", "expires_ns", "host", "metered", "path", "quota",
                 "record", "share", "stack", "strip", "table", "ttl_ns")  # fmt: skip

    def __init__(
        self,
        *,
        stack: Stack,
        host: str,
        table: DecisionTable,
        epoch: int,
        expires_ns: int,
        record: Sequence[bytes | int],
        base: str = "",
        strip: int = 0,
        quota: QuotaTable | None = None,
        path: QuotaPath | None = None,
        amounts: tuple[int, ...] = (),
        ttl_ns: int = 1,
        share: Share | None = None,
        context: Any = None,
        metered: Metered | None = None,
    ) -> None:
        facts = FACTS + (metered is not None)
        if any(not isinstance(part, bytes) and not 0 <= part < facts for part in record):
            raise ValueError("a record is made of bytes and of numbers that name a fact")
        if (quota is None) != (path is None):
            raise ValueError("a quota path goes with its table")
        self.stack = stack
        self.host = host
        self.table = table
        self.epoch = epoch
        self.expires_ns = expires_ns
        self.record = tuple(record)
        self.base = base
        self.strip = strip
        self.quota = quota
        self.path = path
        self.amounts = amounts
        self.ttl_ns = ttl_ns
        self.share = share
        self.context = context
        self.metered = metered
        self._cells: list[Sequence[int] | None] = [None] * CLASSES

    def cells_of(self, keeper: Keeper, status: int) -> Sequence[int]:
        at = min(max(status // 100, 0), CLASSES - 1)
        cells = self._cells[at]
        if cells is None:
            cells = self._cells[at] = keeper.cells(self, at)
        return cells


class Express(Lane):
    """The lane of connections that came in the same way: same agent, same listener, same name where one is known.

    journal: where outcomes go. named: fields whose values are part of the shape; a field in ``barred`` is one that the
    handler must see. prefixes: given where the first part of the path says where the request is to (longest first);
    else it is the authority that does. absolute: requests carry their authority in the target. sampling: a request
    whose caller records its trace is for the handler. keeper, counters, reuses: where it is counted, the last the cell
    for connections used again. valve: shuts it. bad: upstreams in trouble; while there are any the handler chooses.
    Memory: ``LIMIT`` standings of each kind; when there are more, all are forgotten.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        named: Sequence[str] = (),
        barred: Sequence[str] = (),
        prefixes: Sequence[str] | None = None,
        absolute: bool = False,
        sampling: bool = False,
        keeper: Keeper | None = None,
        counters: Counters | None = None,
        reuses: int = 0,
        valve: Valve | None = None,
        bad: Mapping[Any, Any] | None = None,
    ) -> None:
        if counters is not None and keeper is None:
            raise ValueError("counters need a keeper that knows their cells")
        self.journal = journal
        self.sampling = sampling
        self.keeper = keeper
        self.counters = counters
        self.reuses = reuses
        self.valve = valve or Valve()
        self.bad = {} if bad is None else bad
        self.named = tuple(name.lower() for name in named)
        self.barred = frozenset(name.lower() for name in barred)
        self.prefixes = None if prefixes is None else tuple(prefixes)
        self.absolute = absolute
        self.taken = 0
        self._general: dict[tuple[str | None, ...], Standing] = {}
        self._exact: dict[tuple[str | None, ...], Standing | dict[Ask, Standing]] = {}

    def __len__(self) -> int:
        asks = sum(len(kept) if isinstance(kept, dict) else 1 for kept in self._exact.values())
        return len(self._general) + asks

    def clear(self) -> None:
        """Forgets every standing."""
        self._general.clear()
        self._exact.clear()

    def learn(self, head: RequestHead, standing: Standing, *, exact: bool, body: bytes | None = None) -> bool:
        """Keeps a standing for requests of the shape of ``head``; False when they cannot go this way.

        body: only for those whose bodies ask the same of a model, and for no other path.
        """
        shape = self._shape(head)
        if shape is None:
            return False
        key, rest, _ = shape
        if body is not None:
            ask = plain(body)
            if ask is None:
                return False
            kept = self._exact.get((*key, _path(rest)))
            asks = kept if isinstance(kept, dict) else {}
            if len(asks) >= ASKS:
                asks.clear()
            asks[ask] = standing
            self._keep(self._exact, (*key, _path(rest)), asks)
        elif exact:
            self._keep(self._exact, (*key, _path(rest)), standing)
        elif _plain(rest):
            self._keep(self._general, key, standing)
        else:
            return False
        return True

    def _keep(self, standings: dict[tuple[str | None, ...], Any], key: tuple[str | None, ...], kept: Any) -> None:
        if len(standings) >= LIMIT and key not in standings:
            standings.clear()
        standings[key] = kept

    def _shape(self, head: RequestHead) -> tuple[tuple[str | None, ...], str, str] | None:
        """What the request is looked up by, without its path; its target from the path on; its trace."""
        if head.is_connect or head.minor == 0 or head.expect_continue or head.upgrade is not None:
            return None
        place = self._place(head)
        if place is None:
            return None
        scope, rest = place
        values: dict[str, str] = {}
        trace = ""
        for name, value in head.headers.items():
            name = name.lower()
            if name in self.barred or name in ("proxy-authorization", "upgrade"):
                return None
            if name == "traceparent":
                if trace or not _TRACE.fullmatch(value) or (self.sampling and value[-1] in "13"):
                    return None
                trace = value
            if name in self.named:
                if name in values:
                    return None
                values[name] = value
        key = (scope, head.method, *(values.get(name) for name in self.named))
        if sum(len(part or "") + 1 for part in key) + len(_path(rest)) > KEY_LIMIT:
            return None
        return key, rest, trace

    def _place(self, head: RequestHead) -> tuple[str, str] | None:
        """Where the request is to, as the key says it, and the rest of its target."""
        target = head.target
        if self.absolute:
            if head.form != "absolute":
                return None
            at = target.index("://") + 3
            end = min((i for i in (target.find("/", at), target.find("?", at)) if i >= 0), default=len(target))
            scope, rest = target[:end], target[end:]
        elif head.form != "origin":
            return None
        elif self.prefixes is None:
            scope, rest = head.headers.get("host") or "", target
        else:
            prefix = next((p for p in self.prefixes if target == p or target.startswith((p + "/", p + "?"))), None)
            if prefix is None:
                return None
            scope, rest = prefix, target[len(prefix) :]
        return (scope, rest) if rest.startswith("/") else None

    def _find(self, exchange: Exchange) -> tuple[Standing, str, str] | None:
        head = exchange.head
        if not self._general and not self._exact:
            return None
        shape = self._shape(head)
        if shape is None:
            return None
        key, rest, trace = shape
        standing: Standing | dict[Ask, Standing] | None = self._general.get(key) if _plain(rest) else None
        if standing is None:
            standing = self._exact.get((*key, _path(rest)))
        if isinstance(standing, dict):
            standing = _asked(standing, exchange)
        return None if standing is None else (standing, rest, trace)

    def take(self, exchange: Exchange) -> bool:
        if self.valve.closed or self.bad:
            return False
        found = self._find(exchange)
        if found is None or not self.journal.healthy:
            return False
        standing, rest, trace = found
        if standing.expires_ns <= exchange.received_ns or standing.table.epoch != standing.epoch:
            return False
        if not standing.stack.idle:
            return False
        amounts = standing.amounts
        if standing.metered is not None:
            estimated = standing.metered.tariff.amounts(_size(exchange))
            if estimated is None:
                return False
            amounts = estimated
        # The first request of a connection is where the handler counts the connection.
        if standing.share is not None and (exchange.downstream.requests == 1 or not standing.share.enter()):
            return False
        hold = 0
        if standing.quota is not None and standing.path is not None:
            try:
                hold = standing.quota.reserve(standing.path, amounts, time.time_ns(), standing.ttl_ns, False)
            except (QuotaBusy, QuotaFull, QuotaTableError):
                hold = 0  # the handler meets the same and knows how to say so
            if hold <= 0:
                if standing.share is not None:
                    standing.share.leave()
                return False
        upstream = standing.stack.acquire()
        assert upstream is not None
        self.taken += 1
        if self.counters is not None:
            self.counters.add(self.reuses)
        exchange.context = (standing, _path(rest), trace)
        exchange.hold = hold
        exchange.lane = self
        if standing.metered is None:
            exchange.forward(upstream, target=standing.base + rest, host=standing.host)
        else:
            self._forward_read(exchange, upstream, standing, standing.base + rest)
        return True

    def _forward_read(self, exchange: Exchange, upstream: Upstream, standing: Standing, target: str) -> None:
        """Forwards a model request, whose body was collected or waits behind its head."""
        downstream, metered, body = exchange.downstream, standing.metered, exchange.body
        assert metered is not None
        if body is None:
            data, framer = downstream.pending, downstream.framer
            assert data is not None and framer is not None
            # Kept until the end: it may have to be sent once more.
            exchange.body = body = framer.payload(data, downstream.pos)
            downstream._consumed(data, framer.end)
        exchange.on_response = metered.watch
        if metered.rewrite is not None:
            try:
                body = metered.rewrite(body)
            except BaseException:
                upstream.release()
                raise
        exchange.forward(upstream, target=target, host=standing.host, edits=metered.edits, body=body)

    def stale(self, exchange: Exchange) -> bool:
        standing, _, _ = exchange.context
        if self.keeper is not None and not self.keeper.again():
            return False
        exchange.context = None
        exchange.lane = None
        if standing.share is not None:
            standing.share.leave()
        # What closed one idle connection has closed them all, or soon will.
        standing.stack.close()
        if standing.quota is not None:
            standing.quota.release(exchange.hold)
        return True

    def done(self, exchange: Exchange) -> None:
        standing, path, trace = exchange.context
        if standing.share is not None:
            standing.share.leave()
        if self.keeper is not None and (exchange.status >= 500 or exchange.error or self.bad):
            self.keeper.ended(exchange, standing)
        now_ns = time.time_ns()
        actual: tuple[int, ...] | None = standing.amounts
        usage = b""
        if standing.metered is not None:
            held = standing.metered.tariff.amounts(_size(exchange))
            assert held is not None  # it was reserved
            actual, usage = standing.metered.settle(exchange._tap, exchange.status, exchange.completed, held)
        try:
            if standing.quota is not None and actual is not None:
                if not standing.quota.commit(exchange.hold, actual, now_ns):
                    standing.quota.charge(standing.path, actual, now_ns)
        finally:
            # A table that fails leaves the reservation as it stands; the record is written all the same.
            self._write(exchange, standing, path, trace, now_ns, usage)

    def _write(
        self, exchange: Exchange, standing: Standing, path: str, trace: str, now_ns: int, usage: bytes
    ) -> None:
        decided = exchange.forwarded_ns or exchange.ended_ns
        facts = (
            _uuid7(now_ns),
            now_ns,
            standing.base + path,
            exchange.status,
            exchange.error,
            exchange.bytes_up,
            exchange.bytes_down,
            max(0, decided - exchange.received_ns),
            max(0, exchange.ended_ns - decided),
            exchange.ended_ns - exchange.received_ns,
            trace,
        )
        self._count(exchange, standing, facts)
        packed = [*map(_pack, facts), usage]
        self.journal.append(b"".join(part if isinstance(part, bytes) else packed[part] for part in standing.record))
        self.journal.flush()

    def _count(self, exchange: Exchange, standing: Standing, facts: Sequence[Any]) -> None:
        if self.counters is None or self.keeper is None:
            return
        requests, decisions, up, down, total, own, upstream = standing.cells_of(self.keeper, exchange.status)
        self.counters.add(requests)
        self.counters.add(decisions)
        self.counters.add(up, exchange.bytes_up)
        self.counters.add(down, exchange.bytes_down)
        self.counters.observe(total, facts[TOTAL_NS])
        self.counters.observe(own, facts[CRETO_NS])
        if facts[UPSTREAM_NS]:
            self.counters.observe(upstream, facts[UPSTREAM_NS])


def _asked(asks: dict[Ask, Standing], exchange: Exchange) -> Standing | None:
    """Which holds for a request whose body was collected, or has come with its head, all of it."""
    downstream, body, size = exchange.downstream, exchange.body, _size(exchange)
    if body is None:
        if size <= 0 or downstream.pending is None or len(downstream.pending) - downstream.pos < size:
            return None
        body = downstream.pending[downstream.pos : downstream.pos + size]
    ask = plain(body)
    return None if ask is None else asks.get(ask)


def _size(exchange: Exchange) -> int:
    return exchange.head.content_length if exchange.body is None else len(exchange.body)


def _path(rest: str) -> str:
    return rest.partition("?")[0]


def _plain(rest: str) -> bool:
    path = _path(rest)
    return not any(odd in path for odd in _ODD)


def _uuid7(unix_ns: int) -> bytes:
    """A UUIDv7 (RFC 9562 section 5.7)."""
    noise = int.from_bytes(os.urandom(10), "big")
    high = 0x7000 | noise & 0xFFF
    low = 0x8000_0000_0000_0000 | noise >> 12 & (1 << 62) - 1
    return ((unix_ns // 1_000_000) << 80 | high << 64 | low).to_bytes(16, "big")
