"""An agent's HTTP/2 connection: each stream becomes a request that the relay and its stages see as HTTP/1.1."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Protocol

from creto_hotpath.h2 import Session
from creto_hotpath.http1 import HEAD_LIMIT
from creto_hotpath.relay import Downstream
from creto_proxy.h2.endpoint import NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, Endpoint, Pair, Stream
from creto_proxy.h2.guard import PREFACE
from creto_proxy.h2.message import Malformed, NotServed, RequestFields, TooLarge, trailer_fields
from creto_proxy.h2.streams import AgentStream, WebSocketStream
from creto_proxy.model import Agent, Flow
from creto_proxy.protect import Seat

# Agents are near: a window of 64 KiB is a round trip on loopback, and with it a stream costs little while it is held.
_STREAM_WINDOW = 65535
_CONNECTION_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """max_streams: at a time on one connection. head_s: for the preface, and for a header block to end. idle_s: without
    a stream. via: our pseudonym, by which answers of our own are told from relayed ones."""

    max_streams: int = 100
    head_s: float = 30.0
    idle_s: float = 75.0
    via: bytes = b"creto"


class Edge(Protocol):
    """What the accept stage does for a connection."""

    def h2_downstream(self, flow: Flow, agent: Agent | None, grpc: bool, seat: Seat) -> Downstream: ...
    def h2_refused(self, flow: Flow, agent: Agent | None, reason: str, status: int = 400) -> None: ...
    def h2_gone(self, connection: AgentConnection) -> None: ...


class AgentConnection(Endpoint):
    """One HTTP/2 connection of an agent."""

    def __init__(self, edge: Edge, flow: Flow, agent: Agent | None, bounds: Bounds, seat: Seat) -> None:
        super().__init__()
        self._seat = seat
        self.bounds = bounds
        self._edge = edge
        self._flow = flow
        self._agent = agent
        self._streams: dict[int, AgentStream] = {}
        self._unread: set[int] = set()
        self._absolute = flow.way == "explicit" and not flow.bound_names
        self._draining = False
        self._greeted = False
        self._active_at = 0.0
        self._block_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # -- life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        session = Session(
            False,
            max_streams=self.bounds.max_streams,
            stream_window=_STREAM_WINDOW,
            connection_window=_CONNECTION_WINDOW,
            header_list=HEAD_LIMIT,
        )
        self._open(transport, session, len(PREFACE))
        self._active_at = self.loop.time()
        self._timer = self.loop.call_later(self.bounds.head_s, self._tick)

    def adopt(self, transport: asyncio.Transport, data: bytes) -> None:
        """Takes over a connection of which ``data`` has been read."""
        transport.set_protocol(self)
        self.connection_made(transport)
        transport.resume_reading()
        if data:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        self._greeted = True
        super().data_received(data)
        guard = self._guard
        if guard is None or not guard.in_block:
            self._block_since = 0.0
        elif not self._block_since:
            self._block_since = self.loop.time()

    def _tick(self) -> None:
        """Looks at what may have waited too long; the next look is when something could have again."""
        now = self.loop.time()
        live = any(not stream.finished for stream in self._streams.values())
        if not self._greeted or (self._block_since and now - self._block_since >= self.bounds.head_s):
            self.fail("head_timeout", PROTOCOL_ERROR)
        elif not live and not self._block_since and now - self._active_at >= self.bounds.idle_s:
            self.leave()
        else:
            self._timer = self.loop.call_later(min(self.bounds.head_s, self.bounds.idle_s), self._tick)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        self._seat.give()
        self._edge.h2_gone(self)

    # -- streams

    def stream(self, stream_id: int) -> Stream | None:
        return self._streams.get(stream_id)

    def headers(self, stream_id: int, pairs: list[Pair], ended: bool) -> None:
        known = self._streams.get(stream_id)
        try:
            if known is not None:
                if not ended:
                    raise Malformed("headers_inside_body")
                known.trailers = _trailers(pairs)
            elif self._draining:
                self.session.reset(stream_id, REFUSED_STREAM)
            elif len(self._streams) >= self.bounds.max_streams:
                self.session.reset(stream_id, REFUSED_STREAM)
                self.turned_away()
            else:
                self._request(stream_id, RequestFields(pairs), ended)
        except Malformed as error:
            self._malformed(stream_id, error.reason)
        except TooLarge:
            self._decline(stream_id, b"431", "fields_too_large", ended)
        except NotServed as error:
            self._decline(stream_id, b"501", error.reason, ended)

    def _decline(self, stream_id: int, status: bytes, reason: str, ended: bool) -> None:
        """Answers with nothing but a status."""
        self._edge.h2_refused(self._flow, self._agent, reason, int(status))
        self.session.headers(stream_id, [(b":status", status), (b"content-length", b"0")], True)
        if not ended:
            self._unread.add(stream_id)

    def turned_away(self) -> None:
        self._edge.h2_refused(self._flow, self._agent, "too_many_streams")
        self._charge("stream")

    def _request(self, stream_id: int, fields: RequestFields, ended: bool) -> None:
        if ended and fields.length > 0:
            raise Malformed("content_length_mismatch")
        if self._flow.tls and fields.scheme == b"http":
            raise Malformed("scheme_mismatch")
        self._active_at = self.loop.time()
        kind = WebSocketStream if fields.websocket else AgentStream
        stream = self._streams[stream_id] = kind(self, stream_id, fields, self.bounds.via)
        # A flow of its own: what is learnt of one request must not be taken for another's.
        flow = replace(self._flow, http2=True)
        downstream = self._edge.h2_downstream(flow, self._agent, fields.grpc, self._seat)
        stream.begin(downstream, absolute=self._absolute, ended=ended)
        if self._seat.refused:
            self._take_no_more()

    def _event(self, kind: int, stream_id: int, value: object, code: int) -> None:
        try:
            super()._event(kind, stream_id, value, code)
        except Malformed as error:
            self._malformed(stream_id, error.reason)

    def _malformed(self, stream_id: int, reason: str) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._edge.h2_refused(self._flow, self._agent, reason)
        else:
            stream.break_off(f"http2_{reason}")
        self.session.reset(stream_id, PROTOCOL_ERROR)
        self._charge("malformed")

    def _charge(self, reason: str) -> None:
        """Raises Flood when there was too much of it."""
        if self._guard is not None:
            self._guard.charge(reason)

    def sent_end(self, stream_id: int) -> None:
        self._active_at = self.loop.time()
        stream = self._streams.get(stream_id)
        if stream_id in self._unread or (stream is not None and stream.finished and not stream.heard_end):
            # The answer is complete and the rest of the request not wanted (RFC 9113 section 8.1).
            self.session.reset(stream_id, NO_ERROR)
            self.schedule()

    def stream_closed(self, stream_id: int, code: int) -> None:
        self._unread.discard(stream_id)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.gone(code)

    def going_away(self, last: int, code: int) -> None:
        """The agent leaves; what is open is still answered."""
        if not self._draining:
            self._take_no_more()

    def lost_streams(self, error: BaseException | None) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.lose(error)

    # -- the end

    def broken(self, reason: str) -> None:
        self._edge.h2_refused(self._flow, self._agent, reason)

    def drain(self) -> None:
        """Takes no new streams and closes once the open ones have ended."""
        if not self.closed and not self._draining:
            self._take_no_more()
            self.flush()

    def _take_no_more(self) -> None:
        self._draining = True
        self.session.goaway(NO_ERROR, False)

    def flushed(self) -> None:
        if self._draining and not self._streams:
            self.leave()

    @property
    def busy(self) -> bool:
        """False: what is under way is recorded by the conversations of its streams."""
        return False

    def abort(self) -> None:
        """Cuts the connection off."""
        if not self.closed:
            self.transport.abort()


def _trailers(pairs: list[Pair]) -> list[Pair]:
    try:
        return trailer_fields(pairs)
    except TooLarge:
        raise Malformed("trailers_too_large") from None
