# cython: annotation_typing=False, nonecheck=True
"""The relay: HTTP/1.1 between an agent and upstreams, one object per connection, no task, future or timer per request.

This one source runs as plain Python and, with the C types of ``_relay_c.pxd``, compiled. Received bytes go to the
other side as the object they came in, a head leaves together with the body bytes at hand in one write, and each side
stops reading while the other cannot take more. What may be sent at all is decided by a ``Handler``; nothing of a
request is sent before it says so.

    agent -> Downstream -> Handler.on_request(exchange) -> exchange.forward(upstream) -> Upstream -> agent

RFC 9110, RFC 9112; a rejected CONNECT closes (RFC 9931 section 8).
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from creto_hotpath import _http1_py as http1
elif __name__.endswith("_c"):
    import creto_hotpath._http1_c as http1
else:
    import creto_hotpath._http1_py as http1

# Where the body of the current request goes.
_HELD, _COLLECTING, _STREAMING, _DISCARDING, _COMPLETE = range(5)
# How the body of a response goes on: bytes as they are, payload in chunks of our own, or payload until close.
_PASS, _CHUNK, _BARE = range(3)
# What an upstream connection is doing.
_IDLE, _HEAD, _BODY = range(3)
_NO_BODY, _BY_LENGTH, _BY_CHUNKS, _BY_CLOSE = http1.NONE, http1.LENGTH, http1.CHUNKED, http1.CLOSE
_NO_FRAMING, _CHUNKED_FRAMING = http1.NO_FRAMING, http1.CHUNKED_FRAMING
_SILENT, _CLOSING, _KEEPING, _UPGRADING = http1.SILENT, http1.CLOSING, http1.KEEPING, http1.UPGRADING

# Below this a copy behind the head costs less than a second buffer in writev.
_COALESCE = 16384
# Nobody needs more 1xx than this for one request; a flood of them would never look like progress.
_INTERIM_LIMIT = 64
_LINGER_BYTES = 1 << 20

_TICK_S = 0.5
_FOREVER = 1 << 28  # four years, in ticks
_SLOTS = 512
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
_INTERIM = {100: b"HTTP/1.1 100 Continue\r\n\r\n", 102: b"HTTP/1.1 102 Processing\r\n\r\n"}
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much a connection may take.

    head_s: from the first byte of a head to its last. idle_s: between requests. body_s: without a byte of a body that
    is wanted. stall_s: without the peer reading what was written. response_s: from the end of a request to the head
    of its answer (504). linger_s: how long a closed connection still drains what the agent sends, so that it can read
    the last answer. hold_bytes: request bytes kept while the handler decides, then reading stops. drain_bytes: rest
    of a body that is thrown away to keep the connection after an early answer. via: our pseudonym in Via.
    """

    head_s: float = 10.0
    idle_s: float = 75.0
    body_s: float = 30.0
    stall_s: float = 120.0
    response_s: float = 600.0
    linger_s: float = 2.0
    hold_bytes: int = 65536
    drain_bytes: int = 262144
    via: str = "creto"


class Tap(Protocol):
    """Sees the content of one response, in order. When ``rewrites``, what it returns is sent instead."""

    rewrites: bool

    def feed(self, data: bytes) -> bytes | None: ...
    def finish(self) -> bytes | None: ...


class Handler(Protocol):
    """Decides what happens with the requests of one connection.

    ``on_request`` must lead, now or later, to one of ``respond``, ``forward``, ``tunnel``, ``detach`` or ``abort``.
    ``on_body`` follows ``collect``; None means larger than the limit. ``on_end`` comes exactly once per exchange,
    before its last bytes are handed to the transport. ``on_bad_request`` gives the whole response for a message that
    is refused (4xx) or an upstream that failed (502, 504); the connection closes after it. ``on_stale`` is asked to
    ``forward`` once more when a pooled connection turned out to be closed before it answered.
    """

    def on_request(self, exchange: Exchange) -> None: ...
    def on_body(self, exchange: Exchange, body: bytes | None) -> None: ...
    def on_end(self, exchange: Exchange) -> None: ...
    def on_bad_request(self, error: http1.BadMessage) -> bytes: ...
    def on_stale(self, exchange: Exchange) -> None: ...
    def on_close(self) -> None: ...


def _ticks(seconds: float) -> int:
    """Whole ticks that last at least ``seconds``."""
    return min(math.ceil(seconds / _TICK_S) + 1, _FOREVER)


class Pace:
    """``Limits`` in the terms of the wheel and of the wire, made once for all connections that have them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.via = limits.via.lower().encode("ascii")
        self.hold_bytes = limits.hold_bytes
        self.drain_bytes = limits.drain_bytes
        self.head_ticks = _ticks(limits.head_s)
        self.idle_ticks = _ticks(limits.idle_s)
        self.body_ticks = _ticks(limits.body_s)
        self.stall_ticks = _ticks(limits.stall_s)
        self.response_ticks = _ticks(limits.response_s)
        self.linger_ticks = _ticks(limits.linger_s)


_paces: weakref.WeakValueDictionary[Limits, Pace] = weakref.WeakValueDictionary()


def _pace_of(limits: Limits) -> Pace:
    pace = _paces.get(limits)
    if pace is None:
        pace = _paces[limits] = Pace(limits)
    return pace


class Timed:
    """Something that may be told that its time is up. One deadline at a time; moving it later costs one store."""

    def __init__(self) -> None:
        self.wheel: Wheel | None = None
        self.deadline = 0
        self.slot = 0

    def expire(self) -> None:
        """Called once when the deadline has passed."""

    def _arm(self, ticks: int) -> None:
        wheel = self.wheel
        if wheel is None:
            return
        self.deadline = wheel.now + ticks
        if self.slot == 0 or self.slot > self.deadline:
            wheel.place(self)


class Wheel:
    """Deadlines of every connection on one event loop, behind one timer of half a second.

    An item waits in the slot of a tick not later than its deadline; when the tick comes, an item whose deadline has
    moved on is placed again. Arming is O(1); a tick costs what is in its slot. The timer stops while nothing waits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = 1
        self.placed = 0
        self.running = False
        self.slots: list[set[Timed]] = [set() for _ in range(_SLOTS)]

    def place(self, item: Timed) -> None:
        if item.slot:
            self.slots[item.slot % _SLOTS].discard(item)
        else:
            self.placed += 1
        item.slot = min(item.deadline, self.now + _SLOTS - 1)
        self.slots[item.slot % _SLOTS].add(item)
        if not self.running:
            self.running = True
            self.loop.call_later(_TICK_S, self._tick)

    def drop(self, item: Timed) -> None:
        item.deadline = 0
        if item.slot:
            self.slots[item.slot % _SLOTS].discard(item)
            item.slot = 0
            self.placed -= 1

    def advance(self) -> None:
        """One tick."""
        self.now += 1
        now = self.now
        due = self.slots[now % _SLOTS]
        if not due:
            return
        self.slots[now % _SLOTS] = set()
        for item in due:
            self._judge(item)

    def _judge(self, item: Timed) -> None:
        now = self.now
        if item.slot != now:
            return
        item.slot = 0
        self.placed -= 1
        if item.deadline == 0:
            return
        if item.deadline > now:
            self.place(item)
            return
        item.deadline = 0
        try:
            item.expire()
        except Exception as error:
            _report(self.loop, "a deadline failed", error)

    def _tick(self) -> None:
        self.running = False
        self.advance()
        if self.placed and not self.running:
            self.running = True
            self.loop.call_later(_TICK_S, self._tick)


_wheels: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Wheel] = weakref.WeakKeyDictionary()


def wheel_of(loop: asyncio.AbstractEventLoop) -> Wheel:
    """The wheel of that loop, made on first use."""
    wheel = _wheels.get(loop)
    if wheel is None:
        wheel = _wheels[loop] = Wheel(loop)
    return wheel


def _report(loop: asyncio.AbstractEventLoop, what: str, error: BaseException) -> None:
    loop.call_exception_handler({"message": f"creto relay: {what}", "exception": error})


def reset(transport: Any) -> None:
    """Closes with RST, so that a body that only ends with the connection cannot be taken for complete."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # not a TCP socket, or already gone
    transport.abort()


class Stack:
    """Idle connections of one key, the last one used on top. Lives as long as somebody may want or return one."""

    def __init__(self, pool: Pool, key: Hashable) -> None:
        self.pool = pool
        self.key = key
        self.idle: list[Upstream] = []

    def acquire(self) -> Upstream | None:
        """An open connection, or None."""
        if not self.idle:
            return None
        return self._take(self.idle.pop())

    def _take(self, upstream: Upstream) -> Upstream:
        upstream.deadline = 0
        return upstream

    def close(self) -> None:
        """Closes what is idle."""
        idle = self.idle
        self.idle = []
        for upstream in idle:
            upstream.expire()


class Pool:
    """Idle upstream connections, the last one used first, so that the others can age out.

    per_key: how many stay open for one key; idle_s: how long. Memory: one list per key with connections.
    """

    def __init__(self, *, idle_s: float = 30.0, per_key: int = 1024) -> None:
        self.idle_ticks = _ticks(idle_s)
        self.per_key = per_key
        self.closed = False
        self.stacks: weakref.WeakValueDictionary[Hashable, Stack] = weakref.WeakValueDictionary()

    def stack(self, key: Hashable) -> Stack:
        """The idle connections that were made for ``key``; to be kept by whoever asks for them often."""
        stack = self.stacks.get(key)
        if stack is None:
            stack = self.stacks[key] = Stack(self, key)
        return stack

    def acquire(self, key: Hashable) -> Upstream | None:
        """An open connection that was made for ``key``, or None."""
        stack = self.stacks.get(key)
        return None if stack is None else stack.acquire()

    def _keep(self, upstream: Upstream) -> bool:
        stack = upstream.stack
        if self.closed or len(stack.idle) >= self.per_key:
            return False
        stack.idle.append(upstream)
        upstream._arm(self.idle_ticks)
        return True

    def _forget(self, upstream: Upstream) -> None:
        idle = upstream.stack.idle
        if upstream in idle:
            idle.remove(upstream)

    def __len__(self) -> int:
        return sum(len(stack.idle) for stack in list(self.stacks.values()))

    def close(self) -> None:
        """Closes what is idle; connections in use close when they come back."""
        self.closed = True
        for stack in list(self.stacks.values()):
            stack.close()


class Upstream(Timed):
    """One connection to an upstream: an ``asyncio`` protocol, made by whoever dials.

    key: connections with equal keys are interchangeable. It serves one exchange at a time and goes back to the pool
    only after a response whose end is certain, with nothing behind it. unprocessed: set before ``connection_lost`` by
    a transport whose peer says that it did nothing with the request (RFC 9113 section 8.7). http2: set by a transport
    that turns HTTP/2 into what is read here.
    """

    def __init__(self, pool: Pool, key: Hashable) -> None:
        super().__init__()
        self.pool = pool
        self.key = key
        self.stack: Stack = pool.stack(key)
        self.transport: Any = None
        self._send: Any = None
        self.exchange: Exchange | None = None
        self.pending: bytes | None = None
        self.state = _IDLE
        self.uses = 0
        self.paused = False
        self.keep = False
        self.heard = False
        self.unprocessed = False
        self.http2 = False
        self.closed = True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._send = transport.write
        self.closed = False
        self.wheel = wheel_of(asyncio.get_running_loop())

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nobody asked. Kept, these bytes would be taken for the answer to the next request.
            self._discard()
            return
        self.heard = True
        if self.state == _BODY:
            exchange._body(self, data)
            return
        if self.pending is not None:
            judged = _ends_line(self.pending, data)
            data = self.pending + data
            if not judged and len(data) < 65536:
                self.pending = data
                return
            self.pending = None
        self._heads(exchange, data)

    def _heads(self, exchange: Exchange, data: bytes) -> None:
        """Interim heads and the final one at the start of ``data``."""
        start = 0
        while True:
            try:
                head = http1.read_response(data, start, exchange.head.is_head)
            except http1.BadMessage as error:
                exchange._fail(502, error.reason)
                return
            if head is None:
                self.pending = data[start:] if start else data
                return
            head.http2 = self.http2
            if head.status >= 200 or head.status == 101:
                break
            exchange._relay_interim(head)
            start = head.end
            if exchange._over or start == len(data):
                return
        self.state = _BODY
        self.keep = head.keep_alive
        exchange._response(self, head, data)

    def eof_received(self) -> bool:
        exchange = self.exchange
        if exchange is not None and self.state == _BODY:
            exchange._end_of_stream(self)
        # Waiting for the close would mean waiting until the upstream has read what it no longer wants.
        self._broken()
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self._broken()
        if self.wheel is not None:
            self.wheel.drop(self)

    def _broken(self) -> None:
        exchange = self.exchange
        heard = self.heard
        self._discard()
        if exchange is None:
            return
        exchange.upstream = None
        if heard:
            exchange._fail(502, "upstream_closed")
        else:
            exchange._retry(self.unprocessed)

    def pause_writing(self) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.downstream._stall(True)

    def resume_writing(self) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.downstream._stall(False)

    def expire(self) -> None:
        if self.exchange is None:
            self._discard()

    def release(self) -> None:
        """Gives an unused or finished connection back to the pool."""
        self.exchange = None
        self.pending = None
        self.state = _IDLE
        self.heard = False
        if self.closed:
            return
        self._pause(False)
        if not self.pool._keep(self):
            self._discard()

    def _discard(self) -> None:
        self.exchange = None
        self.pending = None
        if not self.closed:
            self.closed = True
            self.pool._forget(self)
            self.transport.abort()

    def _begin(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.state = _HEAD
        self.uses += 1

    def _pause(self, paused: bool) -> None:
        if paused == self.paused or self.closed:
            return
        self.paused = paused
        if paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _surrender(self) -> Any:
        """Stops being the protocol of this connection, which somebody else takes over."""
        self.exchange = None
        self.closed = True
        if self.wheel is not None:
            self.wheel.drop(self)
        return self.transport


class Lane:
    """Takes requests that the handler need not be asked about, because what it said of others like them still stands.

    ``take`` forwards the exchange, sets ``Exchange.lane`` to itself and returns True, or leaves everything as it is
    and returns False. What it took ends in ``done``, instead of ``Handler.on_end``. ``stale`` undoes ``take`` when the
    connection was closed before it answered, so that the handler is asked after all, or returns False when it may not.
    """

    def take(self, exchange: Exchange) -> bool:
        return False

    def done(self, exchange: Exchange) -> None:
        pass

    def stale(self, exchange: Exchange) -> bool:
        return False


class Exchange:
    """One request and its answer. The verbs may be called at once or later, each only while the exchange is open.

    Whoever ends an exchange from inside the relay does so through a local name: ``_end`` may drop the last reference
    to it, and compiled code calls a method of ``self.exchange`` without holding one.

    Facts, final in ``Handler.on_end``: status (0: none sent), bytes_up and bytes_down (sent to the upstream and to the
    agent, heads included), received_ns, forwarded_ns, first_byte_ns, ended_ns (monotonic; 0: never), completed,
    error (snake_case, "" when none), gone (the agent left). ``on_response`` and ``allow_upgrade`` are set before
    ``forward``; ``context`` and ``hold`` belong to the handler, or to the ``lane`` that took the exchange.
    """

    def __init__(self, downstream: Downstream, head: http1.RequestHead) -> None:
        self.downstream = downstream
        self.head = head
        self.upstream: Upstream | None = None
        self.on_response: Callable[[Exchange, http1.ResponseHead], Tap | None] | None = None
        self.allow_upgrade = False
        self.context: Any = None
        self.lane: Lane | None = None
        self.hold = 0
        self.body: bytes | None = None
        self.status = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.received_ns = http1.now_ns()
        self.forwarded_ns = 0
        self.first_byte_ns = 0
        self.ended_ns = 0
        self.completed = False
        self.error = ""
        self.gone = False
        self._over = False
        self._sent = False
        self._continued = False
        self._retried = False
        self._switching = False
        self._interims = 0
        self._limit = 0
        self._size = 0
        self._parts: list[bytes] | None = None
        self._framer: http1.BodyFramer | None = None
        self._framing = _NO_FRAMING
        self._at = 0
        self._tap: Tap | None = None
        self._shape = _PASS

    @property
    def over(self) -> bool:
        """Whether ``on_end`` has been called."""
        return self._over

    @property
    def receiving(self) -> bool:
        """Whether more of the request's body is wanted and has not come."""
        return self.downstream.exchange is self and self.downstream.intake in (_COLLECTING, _STREAMING)

    @property
    def collected(self) -> int:
        """Bytes of the body that ``collect`` has so far."""
        return self._size

    @property
    def idempotent(self) -> bool:
        """Whether doing it twice is doing it once (RFC 9110 9.2.2, or the client's own Idempotency-Key)."""
        return self.head.method in _IDEMPOTENT or self.head.get("idempotency-key") is not None

    def collect(self, limit: int) -> None:
        """Buffers the whole body, then calls ``on_body``; asks for it when the client waits for 100 Continue."""
        downstream = self.downstream
        if self._over:
            return
        if downstream.intake == _COMPLETE:
            self._deliver(self.body or b"")
            return
        if self.head.content_length > limit:
            self._deliver(None)
            return
        self._limit = limit
        self._parts = []
        downstream.intake = _COLLECTING
        if self.head.expect_continue and not self._continued and downstream.pending is None:
            self.interim(100)
        downstream._arm(downstream.pace.body_ticks)
        downstream._resume_body()

    def _collected(self, piece: bytes) -> None:
        self._size += len(piece)
        downstream = self.downstream
        if self._parts is None:
            return
        if self._size > self._limit:
            self._parts = None
            if downstream.intake != _COMPLETE:
                downstream.intake = _HELD
                downstream.deadline = 0
            self._deliver(None)
            return
        self._parts.append(piece)
        if downstream.intake == _COMPLETE:
            self.body = b"".join(self._parts)
            self._parts = None
            self._deliver(self.body)

    def _deliver(self, body: bytes | None) -> None:
        downstream = self.downstream
        try:
            downstream.handler.on_body(self, body)
        except Exception as error:
            downstream._handler_failed(self, error)

    def interim(self, status: int) -> None:
        """Sends 100 or 102, to an HTTP/1.1 client that is still there and has not been answered."""
        if self._over or self._sent or self.head.minor == 0:
            return
        if status == 100:
            self._continued = True
        data = _INTERIM.get(status)
        if data is None:
            raise ValueError("only 100 and 102 can be sent as a heartbeat")
        self.bytes_down += len(data)
        self.downstream._write(data)

    def respond(self, status: int, headers: Sequence[tuple[str, str]], body: bytes, *, close: bool = False) -> None:
        """Answers without an upstream, or in its place while nothing of its answer was sent.

        A rejected CONNECT, and a body too large to be thrown away, close the connection.
        """
        if self._over:
            return
        if self._sent:
            raise RuntimeError("the answer has already begun")
        downstream = self.downstream
        head = self.head
        if close or head.is_connect:
            downstream.keep = False
        downstream._settle_keep()
        data = http1.plain_response(status, headers, body, downstream._connection(), head.is_head)
        self._drop_upstream()
        self._sent = True
        self.status = status
        self.bytes_down += len(data)
        self.completed = True
        self._end()
        downstream._write(data)
        downstream._after()

    def forward(
        self,
        upstream: Upstream,
        *,
        target: str | None = None,
        host: str | None = None,
        edits: Mapping[str, str | None] | http1.Prepared | None = None,
        body: bytes | None = None,
        tap: Tap | None = None,
    ) -> None:
        """Sends the request to ``upstream`` and relays both ways until the end.

        target, host, edits: as ``http1.request_bytes``. body: replaces the collected one. tap: unless ``on_response``
        gives one. An exchange that is over gives the connection back. Raises ValueError for what cannot stand in a
        head, RuntimeError when it was forwarded before or a body is replaced that was not collected.
        """
        self._forward(upstream, target, host, edits, body, tap)

    def _forward(
        self,
        upstream: Upstream,
        target: str | None,
        host: str | None,
        edits: Mapping[str, str | None] | http1.Prepared | None,
        body: bytes | None,
        tap: Tap | None,
    ) -> None:
        if self._over:
            upstream.release()
            return
        if self._sent or self.upstream is not None:
            raise RuntimeError("already forwarded")
        if upstream.closed:
            self._retry(False)
            return
        downstream = self.downstream
        head = self.head
        if head.is_connect:
            raise RuntimeError("CONNECT is answered by tunnel() or detach()")
        self._tap = tap
        self._switching = self.allow_upgrade and head.upgrade is not None and head.upgrade.lower() != "h2c"
        if body is None:
            body = self.body
        data = b""
        start = stop = 0
        framing = head.content_length
        try:
            if body is not None:
                if downstream.intake != _COMPLETE:
                    raise RuntimeError("a body can only be replaced after collect()")
                if head.chunked or framing >= 0 or body:
                    framing = len(body)
                data = body
                stop = len(body)
            elif downstream.intake != _COMPLETE:
                if head.chunked:
                    framing = _CHUNKED_FRAMING
                data, start, stop = downstream._body_at_hand()
            expect = head.expect_continue and not self._continued and downstream.intake != _COMPLETE and start == stop
            coalesced = stop - start <= _COALESCE
            end = stop if coalesced else start
            out = http1.request_bytes(
                head, target, host, edits, framing, expect, self._switching, downstream.pace.via, data, start, end
            )
        except http1.BadMessage as error:
            upstream.release()
            self._fail(error.status, error.reason)
            return
        except (ValueError, RuntimeError):
            upstream.release()
            raise
        upstream._begin(self)
        self.upstream = upstream
        self.forwarded_ns = http1.now_ns()
        if downstream.intake != _COMPLETE:
            downstream.intake = _STREAMING
        self.bytes_up += len(out)
        if coalesced:
            upstream._send(out)
        else:
            self.bytes_up += stop - start
            upstream.transport.writelines((out, _cut(data, start, stop)))
        if downstream.blocked:
            upstream._pause(True)
        downstream._sent_up()

    def _retry(self, unprocessed: bool) -> None:
        """The connection was closed before it answered. unprocessed: it said that it has done nothing with our bytes.
        """
        downstream = self.downstream
        fresh = self.forwarded_ns == 0
        in_hand = downstream.intake == _COMPLETE and (self.head.body == _NO_BODY or self.body is not None)
        lane = self.lane
        again = getattr(downstream.handler, "on_stale" if lane is None else "on_request", None)
        replayable = fresh or (in_hand and (unprocessed or self.idempotent))
        if self._retried or again is None or not replayable:
            self._fail(502, "upstream_closed")
            return
        if lane is not None and not lane.stale(self):
            self._fail(502, "upstream_closed")
            return
        self._retried = True
        self.forwarded_ns = 0
        downstream.deadline = 0
        downstream.stalled = False
        downstream._flow()
        try:
            again(self)
        except Exception as error:
            downstream._handler_failed(self, error)

    def _relay_interim(self, head: http1.ResponseHead) -> None:
        self._interims += 1
        if self._interims > _INTERIM_LIMIT:
            self._fail(502, "too_many_interim_responses")
        elif self.head.minor == 1:
            self._continued = self._continued or head.status == 100
            data = http1.response_bytes(head, _NO_FRAMING, _SILENT, self.downstream.pace.via, b"", 0, 0)
            self.bytes_down += len(data)
            self.downstream._write(data)

    def _response(self, upstream: Upstream, head: http1.ResponseHead, data: bytes) -> None:
        """The final head has come, ``data`` holds it and whatever followed it."""
        downstream = self.downstream
        self.first_byte_ns = http1.now_ns()
        if downstream.intake == _COMPLETE:
            downstream.deadline = 0
        if self.on_response is not None:
            try:
                self._tap = self.on_response(self, head)
            except Exception as error:
                downstream._handler_failed(self, error)
            if self._over:
                return
        if head.status == 101:
            self._switch(upstream, head, data)
            return
        try:
            self._shape_body(head, len(data))
            last = self._pass_on(head, data)
        except http1.BadMessage as error:
            self._fail(502, error.reason)
            return
        except Exception as error:
            downstream._report("a tap failed", error)
            self._fail(502, "tap_failed")
            return
        if last is None:
            return
        self._finish(upstream, upstream.keep and self._at == len(data), last)

    def _shape_body(self, head: http1.ResponseHead, received: int) -> None:
        """Chooses how the body goes on and what the head says about it; ``_at`` is where it ends, if it is at hand."""
        downstream = self.downstream
        body = head.body
        rewrites = self._tap is not None and self._tap.rewrites
        self._shape = _PASS
        self._framing = head.content_length
        self._at = head.end
        if body == _BY_LENGTH and self._tap is None and head.content_length <= received - head.end:
            self._at += head.content_length
        elif body == _NO_BODY:
            if self._tap is not None:
                self._tap.finish()
                self._tap = None
            if head.status == 204:
                self._framing = _NO_FRAMING
            elif head.chunked and self.head.minor == 1:
                self._framing = _CHUNKED_FRAMING
        else:
            self._framer = http1.BodyFramer(body, head.content_length, 502)
            if body != _BY_LENGTH or rewrites:
                if self.head.minor == 1:
                    self._framing = _CHUNKED_FRAMING
                    if body != _BY_CHUNKS or self._tap is not None:
                        self._shape = _CHUNK
                else:
                    self._framing = _NO_FRAMING
                    self._shape = _BARE
                    downstream.keep = False
        downstream._settle_keep()

    def _pass_on(self, head: http1.ResponseHead, data: bytes) -> bytes | None:
        """Sends the head with the body bytes at hand; gives them back unsent when they complete the response."""
        downstream = self.downstream
        framer = self._framer
        source = data
        start = head.end
        stop = self._at
        done = True
        if framer is None:
            pass
        elif self._shape == _PASS and self._tap is None:
            stop = self._at = framer.feed(data, start)
            if framer.cleaned is not None:
                source = framer.cleaned
                start = 0
                stop = len(source)
            done = framer.done
        else:
            source = self._through(framer.payload(data, start))
            self._at = framer.end
            done = framer.done
            if done:
                source += self._tail()
            start = 0
            stop = len(source)
        coalesced = done or stop - start <= _COALESCE
        out = http1.response_bytes(
            head,
            self._framing,
            downstream._connection(),
            downstream.pace.via,
            source,
            start,
            stop if coalesced else start,
        )
        self._sent = True
        self.status = head.status
        self.bytes_down += len(out)
        if done:
            return out
        if coalesced:
            downstream._write(out)
        else:
            self.bytes_down += stop - start
            downstream.transport.writelines((out, _cut(source, start, stop)))
        return None

    def _body(self, upstream: Upstream, data: bytes) -> None:
        """More of the response body."""
        framer = self._framer
        if framer is None:
            return
        try:
            if self._shape == _PASS and self._tap is None:
                end = framer.feed(data, 0)
                if framer.cleaned is not None:
                    out = framer.cleaned
                else:
                    out = data if end == len(data) else data[:end]
            else:
                out = self._through(framer.payload(data, 0))
                end = framer.end
                if framer.done:
                    out += self._tail()
        except http1.BadMessage as error:
            self._fail(502, error.reason)
            return
        except Exception as error:
            self.downstream._report("a tap failed", error)
            self._fail(502, "tap_failed")
            return
        self.bytes_down += len(out)
        if framer.done:
            self._finish(upstream, upstream.keep and end == len(data), out)
        elif out:
            self.downstream._write(out)

    def _through(self, payload: bytes) -> bytes:
        """What the agent gets for a piece of content."""
        if not payload:
            return b""
        tap = self._tap
        if tap is not None:
            changed = tap.feed(payload)
            if tap.rewrites:
                payload = changed or b""
        if self._shape == _CHUNK and payload:
            return http1.chunk(payload)
        return payload

    def _tail(self) -> bytes:
        """What the agent gets after the last of the content."""
        out = b""
        if self._tap is not None:
            rest = self._tap.finish()
            if self._tap.rewrites and rest:
                out = http1.chunk(rest) if self._shape == _CHUNK else rest
        return out + _LAST_CHUNK if self._shape == _CHUNK else out

    def _end_of_stream(self, upstream: Upstream) -> None:
        """The upstream has said that nothing more will come, which ends a body that has no other end."""
        framer = self._framer
        if framer is None or framer.kind != _BY_CLOSE:
            return
        try:
            out = self._tail()
        except Exception as error:
            self.downstream._report("a tap failed", error)
            self._fail(502, "tap_failed")
            return
        self.bytes_down += len(out)
        self._finish(upstream, False, out)

    def _finish(self, upstream: Upstream, reusable: bool, last: bytes) -> None:
        downstream = self.downstream
        if downstream.intake != _COMPLETE:
            reusable = False
        self.upstream = None
        upstream.exchange = None
        self.completed = True
        self._end()
        if last:
            downstream._write(last)
        if reusable:
            upstream.release()
        else:
            upstream._discard()
        downstream._after()

    def _fail(self, status: int, reason: str) -> None:
        """Ends an exchange that cannot be completed: with ``status`` while nothing was sent, else by cutting it off."""
        if self._over:
            return
        downstream = self.downstream
        self.error = reason
        self._drop_upstream()
        if self._sent:
            self._end()
            downstream._cut_off(self._shape == _BARE)
            return
        self._sent = True
        self.status = status
        data = downstream._refusal(http1.BadMessage(status, reason))
        self.bytes_down += len(data)
        self._end()
        downstream._write(data)
        downstream._shut(True)

    def abort(self, reason: str = "aborted") -> None:
        """Cuts both sides off. reason: what ``error`` says then, unless it says something already."""
        if self._over:
            return
        self.error = self.error or reason
        self._drop_upstream()
        self._end()
        self.downstream._cut_off(True)

    def _leave(self) -> None:
        """The agent is gone."""
        self.gone = True
        self.error = self.error or "client_gone"
        self._drop_upstream()
        self._end()

    def _drop_upstream(self) -> None:
        upstream = self.upstream
        if upstream is not None:
            self.upstream = None
            upstream._discard()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self.ended_ns = http1.now_ns()
        downstream = self.downstream
        downstream.exchange = None
        self.on_response = None
        lane = self.lane
        try:
            if lane is not None:
                lane.done(self)
            else:
                downstream.handler.on_end(self)
        except Exception as error:
            downstream._report("on_end failed", error)

    def _switch(self, upstream: Upstream, head: http1.ResponseHead, data: bytes) -> None:
        """101 Switching Protocols."""
        downstream = self.downstream
        agreed = head.upgrade
        asked = self.head.upgrade
        if (
            not self._switching
            or downstream.intake != _COMPLETE
            or agreed is None
            or asked is None
            or agreed.lower() != asked.lower()
        ):
            self._fail(502, "unasked_upgrade")
            return
        out = http1.response_bytes(head, _NO_FRAMING, _UPGRADING, downstream.pace.via, data, head.end, len(data))
        self._sent = True
        self.status = 101
        self.bytes_down += len(out)
        downstream._write(out)
        transport = upstream._surrender()
        self.upstream = None
        self._pump(transport)

    def accept_tunnel(self) -> None:
        """Tells the client of a CONNECT that its bytes go through from here (no framing fields, RFC 9110 9.3.6)."""
        if self._over or self._sent:
            return
        if not self.head.is_connect:
            raise RuntimeError("only CONNECT opens a tunnel")
        data = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self._sent = True
        self.status = 200
        self.bytes_down += len(data)
        self.downstream._write(data)

    def tunnel(self, upstream_transport: Any) -> Tunnel | None:
        """Bytes both ways until both sides are closed, then ``on_end`` and ``on_close``. None: the agent is gone."""
        if self._over:
            upstream_transport.abort()
            return None
        self.accept_tunnel()
        self.forwarded_ns = http1.now_ns()
        return self._pump(upstream_transport)

    def _pump(self, transport: Any) -> Tunnel:
        downstream = self.downstream
        initial = downstream._surrender()
        stall_s = downstream.pace.limits.stall_s
        return Tunnel(downstream.transport, transport, initial, self._tunnel_closed, stall_s=stall_s)

    def _tunnel_closed(self, tunnel: Tunnel) -> None:
        self.bytes_up += tunnel.bytes_up
        self.bytes_down += tunnel.bytes_down
        self.error = tunnel.error
        self.completed = not tunnel.error
        self._end()
        self.downstream._closed()

    def detach(self) -> tuple[Any, bytes]:
        """The agent's transport, reading paused and without protocol, and the bytes it has sent after the head.

        Ends the exchange (``on_end``) and the connection as far as the relay is concerned: no ``on_close`` follows.
        """
        if self._over:
            raise RuntimeError("the exchange is over")
        self.accept_tunnel()
        downstream = self.downstream
        leftover = downstream._surrender()
        transport = downstream.transport
        transport.pause_reading()
        transport.set_protocol(_Parked())
        self.completed = True
        self._end()
        return transport, leftover


def _ends_line(before: bytes, data: bytes) -> bool:
    """Whether ``data`` ends a line, or ruins one: with a CR before anything but LF."""
    return b"\n" in data or b"\r" in data[:-1] or before.endswith(b"\r")


def _cut(data: bytes, start: int, stop: int) -> bytes | memoryview:
    """Part of ``data`` without a copy."""
    if start == 0 and stop == len(data):
        return data
    return memoryview(data)[start:stop]


class Downstream(Timed):
    """One connection of an agent: an ``asyncio`` protocol that gives each request to its handler.

    Requests are answered in the order they came, one at a time; those sent ahead wait in ``pending``. scheme: what
    the agent speaks on this connection, "http" or "https". lane: is offered each request before the handler. http2: it
    is a stream of a connection that speaks HTTP/2.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        limits: Limits | None = None,
        scheme: str = "http",
        lane: Lane | None = None,
        http2: bool = False,
    ) -> None:
        super().__init__()
        self.handler = handler
        self.http2 = http2
        self.lane = lane
        self.scheme = scheme
        # Ten thousand connections may be idle, so what they have in common is kept once.
        self.pace = _pace_of(limits or Limits())
        self.transport: Any = None
        self.exchange: Exchange | None = None
        self.framer: http1.BodyFramer | None = None
        self.pending: bytes | None = None
        self.pos = 0
        self.intake = _COMPLETE
        self.drained = 0
        self.requests = 0
        self.keep = True
        self.draining = False
        self.reading = True
        self.full = False
        self.stalled = False
        self.blocked = False
        self.parsing = False
        self.heading = False
        self.shut = False
        self.surrendered = False
        self.closed = True

    @property
    def limits(self) -> Limits:
        """What the connection may take."""
        return self.pace.limits

    def _report(self, what: str, error: BaseException) -> None:
        wheel = self.wheel
        if wheel is not None:
            _report(wheel.loop, what, error)

    def adopt(self, transport: Any, leftover: bytes = b"") -> None:
        """Takes over a connection that something else has read ``leftover`` from."""
        transport.set_protocol(self)
        self.connection_made(transport)
        transport.resume_reading()
        if leftover:
            self.data_received(leftover)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.closed = False
        self.wheel = wheel_of(asyncio.get_running_loop())
        self._idle()

    def data_received(self, data: bytes) -> None:
        if self.shut:
            self.drained += len(data)
            if self.drained > _LINGER_BYTES:
                self.transport.abort()
        elif self.exchange is not None:
            if self.intake == _STREAMING or self.intake == _COLLECTING:
                self._take(data, 0)
            else:
                self._pile(data)
        elif self.intake == _DISCARDING:
            self._throw_away(data, 0)
        elif self.pending is None:
            self._parse(data, 0)
        else:
            self._more_head(data)

    def _more_head(self, data: bytes) -> None:
        waiting = self.pending
        ends = waiting is None or _ends_line(waiting, data)
        self._pile(data)
        waiting = self.pending
        # An unfinished line cannot change the answer, so one byte at a time costs no parse each.
        if waiting is not None and not self.blocked and (ends or len(waiting) >= 65536):
            self._parse(waiting, self.pos)

    def _pile(self, data: bytes) -> None:
        if self.pending is None:
            self.pending = data
        else:
            self.pending = self.pending[self.pos :] + data
        self.pos = 0
        self._measure()

    def _measure(self) -> None:
        """Reading stops while too much is waiting."""
        full = self.pending is not None and len(self.pending) - self.pos >= self.pace.hold_bytes
        if full != self.full:
            self.full = full
            self._flow()

    def _flow(self) -> None:
        wanted = self.shut or not (self.full or self.stalled)
        if wanted == self.reading or self.closed:
            return
        self.reading = wanted
        if wanted:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()
        if not self.blocked and (self.intake == _STREAMING or self.intake == _COLLECTING):
            if wanted:
                self._arm(self.pace.body_ticks)
            else:
                self.deadline = 0

    def _stall(self, stalled: bool) -> None:
        """The upstream takes no more, or again."""
        self.stalled = stalled
        self._flow()

    def _parse(self, data: bytes, start: int) -> None:
        """Requests in ``data`` from ``start``, until one is in progress or bytes are missing."""
        self.parsing = True
        try:
            while True:
                if start >= len(data):
                    self.pending = None
                    self._idle()
                    break
                if self.blocked:
                    # Answers the agent does not read must not pile up here.
                    self.pending = data
                    self.pos = start
                    break
                try:
                    head = http1.read_request(data, start)
                except http1.BadMessage as error:
                    self._refuse(error)
                    break
                if head is None:
                    self._partial(data, start)
                    break
                self._begin(head, data)
                if self.exchange is not None or self.intake != _COMPLETE or self.shut or self.closed:
                    break
                start = self.pos
                if self.pending is not None:
                    data = self.pending
                else:
                    start = len(data)
        finally:
            self.parsing = False
        self._measure()

    def _partial(self, data: bytes, start: int) -> None:
        rest = data[start:] if start else data
        self.pending = rest
        self.pos = 0
        if rest == b"\r\n":
            # What some old clients send after a body: kept, as it is allowed once, but not the beginning of a head.
            if self.heading or self.deadline == 0:
                self._idle()
            return
        if not self.heading:
            self.heading = True
            self._arm(self.pace.head_ticks)

    def _idle(self) -> None:
        self.heading = False
        if self.draining:
            self._shut(False)
            return
        self._arm(self.pace.idle_ticks)

    def _begin(self, head: http1.RequestHead, data: bytes) -> None:
        head.http2 = self.http2
        self.pos = head.end
        self.pending = data if head.end < len(data) else None
        self.heading = False
        self.deadline = 0
        self.keep = head.keep_alive and not self.draining
        if head.body == _NO_BODY:
            self.intake = _COMPLETE
        else:
            self.intake = _HELD
            self.drained = 0
            self.framer = http1.BodyFramer(head.body, head.content_length, 400)
        if head.via_names(self.pace.via):
            self._refuse(http1.BadMessage(508, "via_loop"))
            return
        if head.max_forwards == 0:
            self._last_hop(head)
            return
        self.requests += 1
        exchange = Exchange(self, head)
        self.exchange = exchange
        lane = self.lane
        try:
            if lane is None or not lane.take(exchange):
                self.handler.on_request(exchange)
        except Exception as error:
            self._handler_failed(exchange, error)

    def _last_hop(self, head: http1.RequestHead) -> None:
        """Max-Forwards has run out (RFC 9110 7.6.2). TRACE is not reflected: it could show fields that were added."""
        if head.minor == 0:
            self.keep = False
        self._settle_keep()
        status = 200 if head.method == "OPTIONS" else 405
        self._write(http1.plain_response(status, (("Allow", "OPTIONS"),), b"", self._connection()))
        self._after()

    def _handler_failed(self, exchange: Exchange, error: BaseException) -> None:
        self._report("a handler failed", error)
        exchange._fail(500, "internal_error")

    def _body_at_hand(self) -> tuple[bytes, int, int]:
        """Body bytes that came with the head, as they are to be forwarded: (data, start, stop)."""
        data = self.pending
        framer = self.framer
        if data is None or framer is None:
            return b"", 0, 0
        start = self.pos
        stop = framer.feed(data, start)
        self._consumed(data, stop)
        if framer.cleaned is not None:
            return framer.cleaned, 0, len(framer.cleaned)
        return data, start, stop

    def _consumed(self, data: bytes, end: int) -> None:
        """The body has been followed up to ``end``; what is left belongs to the next request."""
        framer = self.framer
        if framer is not None and framer.done:
            self.intake = _COMPLETE
            self.framer = None
            self.deadline = 0
        self.pending = data if end < len(data) else None
        self.pos = end
        if self.full or self.pending is not None:
            self._measure()

    def _resume_body(self) -> None:
        data = self.pending
        if data is not None:
            self.pending = None
            self._take(data, self.pos)
        if self.full:
            self._measure()

    def _take(self, data: bytes, start: int) -> None:
        """Body bytes for the exchange in progress."""
        exchange = self.exchange
        framer = self.framer
        if exchange is None or framer is None:
            return
        collecting = self.intake == _COLLECTING
        piece: bytes | memoryview
        try:
            if collecting:
                piece = framer.payload(data, start)
                end = framer.end
            else:
                end = framer.feed(data, start)
                piece = framer.cleaned if framer.cleaned is not None else _cut(data, start, end)
        except http1.BadMessage as error:
            exchange._fail(error.status, error.reason)
            return
        self._consumed(data, end)
        if self.intake != _COMPLETE:
            self._arm(self.pace.body_ticks)
        if collecting:
            exchange._collected(bytes(piece))
            return
        upstream = exchange.upstream
        if upstream is not None and len(piece):
            exchange.bytes_up += len(piece)
            upstream._send(piece)
            self._sent_up()

    def _sent_up(self) -> None:
        """After bytes went to the upstream: what is waited for now?"""
        if self.blocked:
            return
        if self.intake == _COMPLETE:
            self._arm(self.pace.response_ticks)
        elif self.reading:
            self._arm(self.pace.body_ticks)
        if self.full:
            self._measure()

    def _throw_away(self, data: bytes, start: int) -> None:
        """The rest of a body that was answered before it had come."""
        framer = self.framer
        if framer is None:
            return
        self.drained += len(data) - start
        try:
            end = framer.feed(data, start)
        except http1.BadMessage:
            self._shut(True)
            return
        self._consumed(data, end)
        if self.intake == _COMPLETE:
            self._next()
        elif self.drained > self.pace.drain_bytes:
            self._shut(True)
        else:
            self.pending = None

    def _settle_keep(self) -> None:
        """Decides, before a head is written, whether the connection can go on after this answer."""
        if self.draining:
            self.keep = False
        if self.keep and self.intake != _COMPLETE:
            framer = self.framer
            exchange = self.exchange
            waits = exchange is not None and exchange.head.expect_continue and not exchange._continued
            if framer is None or waits or (framer.kind == _BY_LENGTH and framer.left > self.pace.drain_bytes):
                self.keep = False

    def _connection(self) -> int:
        """What the head of the answer says about the connection."""
        if not self.keep:
            return _CLOSING
        exchange = self.exchange
        return _KEEPING if exchange is not None and exchange.head.minor == 0 else _SILENT

    def _write(self, data: bytes) -> None:
        if not self.closed:
            self.transport.write(data)

    def _after(self) -> None:
        """An exchange is over and its answer written."""
        if self.closed or self.shut:
            return
        self.stalled = False
        if not self.reading:
            self._flow()
        if not self.keep:
            self._shut(self.intake != _COMPLETE)
        elif self.intake != _COMPLETE:
            # For all of the rest, however it comes: nobody waits for it.
            self.intake = _DISCARDING
            self._arm(self.pace.body_ticks)
            data = self.pending
            if data is not None:
                self._throw_away(data, self.pos)
        else:
            self._next()

    def _next(self) -> None:
        if self.parsing:
            return
        data = self.pending
        if data is None:
            self._idle()
        else:
            self._parse(data, self.pos)

    def _refusal(self, error: http1.BadMessage) -> bytes:
        try:
            return self.handler.on_bad_request(error)
        except Exception as failure:
            self._report("on_bad_request failed", failure)
            return http1.plain_response(error.status, (), b"", _CLOSING)

    def _refuse(self, error: http1.BadMessage) -> None:
        self._write(self._refusal(error))
        self._shut(True)

    def _shut(self, linger: bool) -> None:
        """Closes after what was written. linger: the agent may still be sending, and must get to read the answer."""
        if self.closed or self.shut:
            return
        self.shut = True
        self.pending = None
        self.framer = None
        self.drained = 0
        self._flow()
        if linger and self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
            self._arm(self.pace.linger_ticks)
        else:
            self.transport.close()
            self._arm(self.pace.stall_ticks)

    def _cut_off(self, hard: bool) -> None:
        """Ends the connection so that the answer in progress is seen to be incomplete."""
        if self.closed:
            return
        self.shut = True
        if hard:
            reset(self.transport)
        else:
            self.transport.abort()

    def _surrender(self) -> bytes:
        """Stops being the protocol of this connection; the bytes that came after the head."""
        leftover = b"" if self.pending is None else self.pending[self.pos :]
        self.pending = None
        self.surrendered = True
        self.closed = True
        self.shut = True
        if self.wheel is not None:
            self.wheel.drop(self)
        return leftover

    def drain(self) -> None:
        """Lets the request in progress finish, then closes."""
        self.draining = True
        self.keep = False
        between = self.pending is None or self.pending == b"\r\n"
        if self.exchange is None and between and self.intake == _COMPLETE:
            self._shut(False)

    def expire(self) -> None:
        exchange = self.exchange
        if self.shut:
            self.transport.abort()
        elif self.blocked:
            if exchange is not None:
                exchange.error = "agent_stalled"
                exchange._leave()
            self._cut_off(True)
        elif exchange is None:
            if self.heading:
                self._refuse(http1.BadMessage(408, "head_timeout"))
            else:
                self._shut(False)
        elif self.intake == _COMPLETE:
            exchange._fail(504, "upstream_timeout")
        else:
            exchange._fail(408, "body_timeout")

    def pause_writing(self) -> None:
        self.blocked = True
        exchange = self.exchange
        if exchange is not None:
            upstream = exchange.upstream
            if upstream is not None:
                upstream._pause(True)
        self._arm(self.pace.stall_ticks)

    def resume_writing(self) -> None:
        self.blocked = False
        if self.closed or self.shut:
            return
        self.deadline = 0
        exchange = self.exchange
        if exchange is not None:
            if self.reading and (self.intake == _STREAMING or self.intake == _COLLECTING):
                self._arm(self.pace.body_ticks)
            upstream = exchange.upstream
            if upstream is not None:
                upstream._pause(False)
        elif self.intake == _COMPLETE:
            self._next()

    def eof_received(self) -> bool:
        # A half-closed client cannot be told from one that has gone, and held calls must notice the latter.
        exchange = self.exchange
        if exchange is not None:
            exchange._leave()
        self.shut = True
        self._arm(self.pace.stall_ticks)
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.surrendered:
            return
        self.closed = True
        self.shut = True
        self.pending = None
        self.framer = None
        if self.wheel is not None:
            self.wheel.drop(self)
        exchange = self.exchange
        if exchange is not None:
            exchange._leave()
        self._closed()

    def _closed(self) -> None:
        try:
            self.handler.on_close()
        except Exception as error:
            self._report("on_close failed", error)


class _Parked:
    """Holds the place of a protocol on a detached transport, which is not reading."""

    def connection_made(self, transport: Any) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        pass

    def eof_received(self) -> bool:
        return True

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    def connection_lost(self, exc: BaseException | None) -> None:
        pass


class Side:
    """One end of a tunnel."""

    def __init__(self, tunnel: Tunnel, transport: Any) -> None:
        self.tunnel = tunnel
        self.transport = transport
        self.peer: Side | None = None
        self.received = 0
        self.ended = False
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        self.received += len(data)
        if peer is not None and not peer.closed:
            peer.transport.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        return self.tunnel._half_closed(self)

    def pause_writing(self) -> None:
        if self.peer is not None and not self.peer.closed:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        # Reading again after end of file would report it again.
        if self.peer is not None and not self.peer.closed and not self.peer.ended:
            self.peer.transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.closed = True
        self.tunnel._lost(self, exc)


class Tunnel(Timed):
    """Bytes both ways between two transports, unseen, with backpressure and half-close.

    a: the agent's side, b: the other; initial: bytes already received from a. on_close(tunnel) is called once, when
    both sides are closed. bytes_up: from a to b, bytes_down: back. error: "" or why it ended early. A side that no
    longer reads or answers is cut off stall_s seconds after the other has closed.
    """

    def __init__(
        self,
        a: Any,
        b: Any,
        initial: bytes = b"",
        on_close: Callable[[Tunnel], None] | None = None,
        *,
        stall_s: float = 120.0,
    ) -> None:
        super().__init__()
        self.on_close = on_close
        self.error = ""
        self.stall_ticks = _ticks(stall_s)
        self.loop: Any = asyncio.get_running_loop()
        self.wheel = wheel_of(self.loop)
        self.left = Side(self, a)
        self.right = Side(self, b)
        self.left.peer = self.right
        self.right.peer = self.left
        self._attach(self.left)
        self._attach(self.right)
        if self.left.closed or self.right.closed:
            self.error = "closed_early"
            self.abort()
            if self.left.closed and self.right.closed:
                self.loop.call_soon(self._done)
            return
        if initial:
            self.left.received += len(initial)
            b.write(initial)
        self._follow(self.left)
        self._follow(self.right)

    @property
    def bytes_up(self) -> int:
        return self.left.received

    @property
    def bytes_down(self) -> int:
        return self.right.received

    def _attach(self, side: Side) -> None:
        if side.transport.is_closing():
            # Its connection_lost may have been delivered to whoever had it before.
            side.closed = True
        else:
            side.transport.set_protocol(side)

    def _follow(self, side: Side) -> None:
        """Starts reading, unless the other side has more to write than it likes."""
        peer = side.peer
        if peer is not None and peer.transport.get_write_buffer_size() > peer.transport.get_write_buffer_limits()[1]:
            side.transport.pause_reading()
        else:
            side.transport.resume_reading()

    def _half_closed(self, side: Side) -> bool:
        """Whether the transport of ``side``, which sends no more, stays open for writing."""
        peer = side.peer
        if peer is None or peer.closed:
            return False
        if peer.ended or not peer.transport.can_write_eof():
            peer.transport.close()
            self._arm(self.stall_ticks)
            return False
        peer.transport.write_eof()
        return True

    def _lost(self, side: Side, exc: BaseException | None) -> None:
        peer = side.peer
        if exc is not None and not self.error:
            self.error = "connection_reset"
        if peer is None or peer.closed:
            self._done()
        elif self.error:
            reset(peer.transport)
        else:
            peer.transport.close()
            self._arm(self.stall_ticks)

    def _done(self) -> None:
        if self.wheel is not None:
            self.wheel.drop(self)
        on_close = self.on_close
        self.on_close = None
        if on_close is not None:
            on_close(self)

    def expire(self) -> None:
        self.error = self.error or "stalled"
        self.abort()

    def abort(self) -> None:
        """Cuts off both sides."""
        self.error = self.error or "aborted"
        if not self.left.closed:
            self.left.transport.abort()
        if not self.right.closed:
            self.right.transport.abort()
