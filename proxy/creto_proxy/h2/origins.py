"""HTTP/2 to upstreams: one connection per permit key carries the exchanges of many agents' connections, each of which
sees an upstream connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Any, cast

from creto_hotpath.h2 import Session, SessionError
from creto_hotpath.http1 import HEAD_LIMIT, BadMessage, BodyFramer, read_request
from creto_hotpath.relay import Pool, Upstream
from creto_proxy.errors import UpstreamUnreachable
from creto_proxy.h2.endpoint import CANCEL, PROTOCOL_ERROR, REFUSED_STREAM, Endpoint, Pair, Stream
from creto_proxy.h2.message import Malformed, TooLarge, is_grpc, request_pairs, response_head, trailer_fields
from creto_proxy.h2.streams import AgentStream
from creto_proxy.model import Permit, Request
from creto_proxy.sockets import Dialled

# Origins are far: a megabyte on the way keeps a 100 Mbit/s path of 80 ms full.
_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 4 << 20
# However many an origin allows: beyond this another connection is opened.
_MAX_STREAMS = 250
_NO_BODY_STATUS = frozenset({204, 304})
# How many upstreams are remembered to have declined HTTP/2 before all of them are forgotten.
_DECLINED = 4096

ALPN, PRIOR, NOT = "alpn", "prior", ""


class OriginStream(Stream):
    """One exchange with an origin: takes the relay's HTTP/1.1 request, gives it an HTTP/1.1 response."""

    endpoint: OriginConnection

    def __init__(self, endpoint: OriginConnection, key: Hashable) -> None:
        super().__init__(endpoint, 0)
        self.upstream = Upstream(endpoint.once, key)
        self.upstream.http2 = True
        self.protocol = self.upstream
        self._framer: BodyFramer | None = None
        self._head_only = False
        self.answered = False
        self._sent = False

    @property
    def _agent(self) -> AgentStream | None:
        """The other end, when it speaks HTTP/2 too."""
        exchange = self.upstream.exchange
        transport: Any = None if exchange is None else exchange.downstream.transport
        return transport if isinstance(transport, AgentStream) else None

    # -- what the relay writes: an HTTP/1.1 request

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closed or self._sent:
            return
        whole = bytes(data)
        at = 0
        if self._framer is None:
            try:
                at = self._begin(whole)
            except (BadMessage, SessionError) as error:
                self.lose(error)
                return
        framer = self._framer
        if framer is not None and self.id and not self._sent:
            self._queue(framer.payload(whole, at))
            if framer.done:
                self._sent = True
                agent = self._agent
                self.endpoint.session.end(self.id, [] if agent is None else agent.trailers)
        self.endpoint.schedule()

    def writelines(self, pieces: Iterable[bytes | memoryview]) -> None:
        self.write(b"".join(pieces))

    def _begin(self, data: bytes) -> int:
        """Opens the stream with the head at the start of ``data``; where the body begins."""
        head = read_request(data, 0)
        if head is None:  # the relay writes whole, canonical heads
            raise SessionError("incomplete_head")
        self._head_only = head.is_head
        agent = self._agent
        trailers = agent is not None and agent.fields.trailers
        pairs = request_pairs(head, self.endpoint.scheme, trailers=trailers)
        framer = self._framer = BodyFramer(head.body, head.content_length, 400)
        ended = framer.done and not (agent is not None and agent.trailers)
        self.id = self.endpoint.begin(self, pairs, ended)
        self._sent = ended
        return head.end

    # -- what the origin sends

    def headers(self, pairs: list[Pair], ended: bool) -> None:
        """Raises Malformed or TooLarge."""
        if self.answered:
            if not ended:
                raise Malformed("headers_inside_body")
            agent = self._agent
            if agent is not None:
                agent.response_trailers = trailer_fields(pairs)
            return
        status, head, length = response_head(pairs, ended=ended, bodiless=self._head_only)
        if status < 200:
            if ended:
                raise Malformed("interim_ends_stream")
        else:
            bodiless = self._head_only or status in _NO_BODY_STATUS
            if ended and length > 0 and not bodiless:
                raise Malformed("content_length_mismatch")
            self.answered = True
            self.chunked = length < 0 and not ended and not bodiless
        protocol = self.protocol
        if protocol is not None:
            protocol.data_received(head)

    def stopped(self, code: int, *, unprocessed: bool = False) -> None:
        """The origin reset the stream, or its connection ended. unprocessed: it says that it has done nothing with it,
        so that it may be sent again whatever it is (RFC 9113 section 8.7)."""
        self.upstream.unprocessed = unprocessed
        agent = self._agent
        if agent is not None and code and not unprocessed:
            agent.reset_code = code
        self.lose(ConnectionResetError("the origin reset the stream") if code else None)

    # -- the end

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """The relay wants no more of it: cancelled, unless both sides have said all."""
        if self.closed:
            return
        done = self._sent and self.heard_end
        self.lose()
        self.endpoint.dismiss(self, cancel=not done)


class OriginConnection(Endpoint):
    """One HTTP/2 connection to an upstream. gone(connection) is called when it takes no more streams."""

    lingers = False

    def __init__(self, key: Hashable, scheme: bytes, gone: Callable[[OriginConnection], None], idle_s: float) -> None:
        super().__init__()
        self.key = key
        self.scheme = scheme
        # Nothing is ever kept in it: streams are not connections.
        self.once = Pool(per_key=0)
        self._gone = gone
        self._idle_s = idle_s
        self._streams: dict[int, OriginStream] = {}
        self._waiting: set[OriginStream] = set()
        self._leaving = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        session = Session(
            True, stream_window=_STREAM_WINDOW, connection_window=_CONNECTION_WINDOW, header_list=HEAD_LIMIT
        )
        self._open(transport, session, 0)
        self._rest()

    @property
    def room(self) -> bool:
        """Whether it takes one more stream."""
        if self._leaving or self.ending or self.transport.is_closing():
            return False
        return len(self._streams) + len(self._waiting) < min(_MAX_STREAMS, self.session.peer_max_streams)

    def lend(self) -> Upstream:
        """An upstream connection for one exchange."""
        stream = OriginStream(self, self.key)
        self._waiting.add(stream)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        stream.upstream.connection_made(stream)
        return stream.upstream

    def begin(self, stream: OriginStream, pairs: list[Pair], ended: bool) -> int:
        """Raises SessionError."""
        stream_id = int(self.session.open(pairs, ended))
        self._waiting.discard(stream)
        self._streams[stream_id] = stream
        return stream_id

    def dismiss(self, stream: OriginStream, *, cancel: bool) -> None:
        self._waiting.discard(stream)
        if stream.id and cancel:
            self.session.reset(stream.id, CANCEL)
            self._streams.pop(stream.id, None)
            self.schedule()
        self._rest()

    def _rest(self) -> None:
        """Closes after a while without streams, at once when no more may come."""
        if self._streams or self._waiting or self.ending:
            return
        if self._leaving:
            self.leave()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._idle_s, self.leave)

    # -- events

    def stream(self, stream_id: int) -> Stream | None:
        return self._streams.get(stream_id)

    def headers(self, stream_id: int, pairs: list[Pair], ended: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        try:
            stream.headers(pairs, ended)
        except (Malformed, TooLarge):
            self.session.reset(stream_id, PROTOCOL_ERROR)
            self._streams.pop(stream_id, None)
            stream.stopped(PROTOCOL_ERROR)
            self._rest()

    def stream_closed(self, stream_id: int, code: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None and not stream.heard_end:
            stream.stopped(code, unprocessed=code == REFUSED_STREAM and not stream.answered)
        self._rest()

    def going_away(self, last: int, code: int) -> None:
        self._withdraw()
        for stream_id in [number for number in self._streams if number > last]:
            self._streams.pop(stream_id).stopped(code, unprocessed=True)
        self._rest()

    def broken(self, reason: str) -> None:
        self._withdraw()

    def _withdraw(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._gone(self)

    def leave(self) -> None:
        self._withdraw()
        super().leave()

    def eof_received(self) -> bool:
        return False

    def lost_streams(self, error: BaseException | None) -> None:
        streams = [*self._streams.values(), *self._waiting]
        self._streams.clear()
        self._waiting.clear()
        for stream in streams:
            stream.lose(error)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._withdraw()
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)


class Origins:
    """The HTTP/2 connections to upstreams, by permit key. prior: (host, port) that are spoken to in HTTP/2 unasked."""

    def __init__(self, prior: Sequence[tuple[str, int]] = (), *, idle_s: float = 30.0) -> None:
        self.prior = frozenset(prior)
        self._idle_s = idle_s
        self._open: dict[Hashable, list[OriginConnection]] = {}
        self._dialling: dict[Hashable, asyncio.Future[None]] = {}
        self._declined: set[Hashable] = set()

    def way(self, permit: Permit, request: Request) -> str:
        """How HTTP/2 is to be had for this request: ALPN, PRIOR knowledge, or NOT.

        Only what came by HTTP/2 may need it. Without TLS nothing can be negotiated: gRPC needs it, and an agent that
        spoke it to the origin without a proxy in mind knows that it is there.
        """
        if request.headers.get("upgrade") is not None:
            return NOT  # to another protocol than HTTP/2, which has no such field
        known = bool(self.prior) and (request.host, request.port) in self.prior
        if not request.flow.http2 and not known:
            return NOT
        if permit.tls:
            return ALPN
        return PRIOR if known or request.flow.way == "transparent" or needs_http2(request) else NOT

    def idle(self, permit: Permit, request: Request, pool: Pool) -> Upstream | None:
        """What is open already and will do for this request; one of ``pool`` where HTTP/2 was offered and declined."""
        way = self.way(permit, request)
        if way == NOT or (way == ALPN and permit.key in self._declined and not needs_http2(request)):
            return cast(Upstream | None, pool.acquire(permit.key))
        return self.acquire(permit.key)

    async def connect(
        self, permits: Sequence[Permit], request: Request, pool: Pool, dial: Callable[[], Awaitable[Dialled]]
    ) -> Upstream:
        """An exchange on an open connection, on one that is just being dialled, or on one made by ``dial``; nobody's
        approval is spent on a connection that may be dead already. Raises what ``dial`` does, and UpstreamUnreachable
        when gRPC finds HTTP/1.1 only."""
        key = permits[0].key
        while request.approval is None and key not in self._declined:
            upstream = self.acquire(key)
            if upstream is not None:
                return upstream
            dialling = self._dialling.get(key)
            if dialling is None:
                break
            await asyncio.wait([dialling])
        done = self._dialling[key] = asyncio.get_running_loop().create_future()
        try:
            return self._arrived(await dial(), request, pool)
        finally:
            if self._dialling.get(key) is done:
                del self._dialling[key]
            done.set_result(None)

    def _arrived(self, arriving: Dialled, request: Request, pool: Pool) -> Upstream:
        transport, permit = arriving.transport, arriving.permit
        session = transport.get_extra_info("ssl_object")
        if session is None or session.selected_alpn_protocol() == "h2":
            self._declined.discard(permit.key)
            return self.adopt(permit, transport, arriving.received)
        if needs_http2(request):
            transport.abort()
            raise UpstreamUnreachable(f"{permit.name} does not offer HTTP/2.", reason="upstream_no_http2")
        if len(self._declined) >= _DECLINED:
            self._declined.clear()
        self._declined.add(permit.key)
        upstream = Upstream(pool, permit.key)
        transport.set_protocol(upstream)
        upstream.connection_made(transport)
        transport.resume_reading()
        return upstream

    def acquire(self, key: Hashable) -> Upstream | None:
        """An exchange on an open connection, the newest first; None when there is no room."""
        for connection in reversed(self._open.get(key, ())):
            if connection.room:
                return connection.lend()
        return None

    def adopt(self, permit: Permit, transport: asyncio.Transport, received: bytes) -> Upstream:
        """An exchange on a new connection that turned out, or is known, to speak HTTP/2."""
        connection = OriginConnection(permit.key, b"https" if permit.tls else b"http", self._forget, self._idle_s)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        self._open.setdefault(permit.key, []).append(connection)
        upstream = connection.lend()
        transport.resume_reading()
        if received:
            connection.data_received(received)
        return upstream

    def _forget(self, connection: OriginConnection) -> None:
        known = self._open.get(connection.key)
        if known is not None and connection in known:
            known.remove(connection)
            if not known:
                del self._open[connection.key]

    def close(self) -> None:
        for connection in [each for group in self._open.values() for each in group]:
            connection.leave()


def needs_http2(request: Request) -> bool:
    """Whether nothing but HTTP/2 will do: gRPC has no other form."""
    content_type = request.headers.get("content-type")
    return content_type is not None and is_grpc(content_type.encode("latin-1", "replace"))
