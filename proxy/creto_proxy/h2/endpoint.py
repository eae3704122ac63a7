"""What both sides of HTTP/2 share: one connection that carries streams, and a stream as a transport for the relay."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol, cast

from creto_hotpath.h2 import CLOSED, DATA, END, ENDED, GOAWAY, HEADERS, REFUSED, SETTINGS, Session, SessionError
from creto_hotpath.http1 import chunk
from creto_proxy.h2.guard import Flood, Guard

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR = 0, 1, 2
REFUSED_STREAM, CANCEL = 7, 8

# Bytes of one stream that wait for the peer's window before its source is told to stop, and to go on.
HIGH_WATER = 65536
LOW_WATER = 16384
# How long a connection that was refused still drains what comes, so that the GOAWAY can be read.
LINGER_S = 2.0
# A transport that cannot half-close (TLS) would only throw away: shorter.
LINGER_TLS_S = 0.25
_LAST_CHUNK = b"0\r\n\r\n"

Pair = tuple[bytes, bytes]


class Reader(Protocol):
    """What the relay's two protocols have in common, as a stream drives them."""

    def data_received(self, data: bytes, /) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: BaseException | None, /) -> None: ...


class Stream:
    """One stream, as the transport of a relay connection. What the peer sends waits here while the relay does not read;
    only what the relay took is given back to the peer's window."""

    def __init__(self, endpoint: Endpoint, stream_id: int) -> None:
        self.endpoint = endpoint
        self.id = stream_id
        self.protocol: Reader | None = None
        self.chunked = False
        self.reading = True
        self.closed = False
        self.blocked = False
        self.heard_end = False
        self._told_end = False
        self._incoming: deque[bytes] = deque()
        self._delivering = False

    # -- from the peer

    def receive(self, data: bytes) -> None:
        """Content, in order."""
        if self.closed:
            self.endpoint.session.consume(self.id, len(data))
            return
        self._incoming.append(data)
        self._deliver()

    def receive_end(self) -> None:
        self.heard_end = True
        self._deliver()

    def _deliver(self) -> None:
        if self._delivering or self.protocol is None:
            return
        self._delivering = True
        try:
            while self.reading and not self.closed:
                if self._incoming:
                    data = self._incoming.popleft()
                    self.endpoint.session.consume(self.id, len(data))
                    self.protocol.data_received(chunk(data) if self.chunked else data)
                elif self.heard_end and not self._told_end:
                    self._told_end = True
                    self._deliver_end(self.protocol)
                else:
                    break
        finally:
            self._delivering = False
        self.endpoint.schedule()

    def _deliver_end(self, protocol: Reader) -> None:
        if self.chunked:
            protocol.data_received(_LAST_CHUNK)

    def lose(self, error: BaseException | None = None) -> None:
        """The stream is over for the relay; it hears so in the next turn of the loop, as from any transport."""
        if self.closed:
            return
        self.closed = True
        self.blocked = False
        self._incoming.clear()
        protocol = self.protocol
        self.protocol = None
        if protocol is not None:
            self.endpoint.loop.call_soon(protocol.connection_lost, error)

    # -- from the relay

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self._deliver()

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return int(self.endpoint.session.queued(self.id))

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return LOW_WATER, HIGH_WATER

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Of the connection; there is no socket that belongs to one stream."""
        return default if name == "socket" else self.endpoint.transport.get_extra_info(name, default)

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def _queue(self, data: bytes) -> None:
        """Content for the peer; tells the relay to wait when too much is waiting."""
        session = self.endpoint.session
        session.write(self.id, data)
        if not self.blocked and self.protocol is not None and session.queued(self.id) > HIGH_WATER:
            self.blocked = True
            self.endpoint.blocked[self.id] = self
            self.protocol.pause_writing()

    @property
    def relieved(self) -> bool:
        """Whether it need not wait any more."""
        return self.closed or self.endpoint.session.queued(self.id) <= LOW_WATER

    def relieve(self) -> None:
        """Tells the relay to go on."""
        self.blocked = False
        if self.protocol is not None:
            self.protocol.resume_writing()


class Endpoint(asyncio.Protocol):
    """One connection: bytes in, events to its streams, frames out once per turn of the loop."""

    # Whether a peer that still sends is given time to read why it was refused.
    lingers = True
    session: Session
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.blocked: dict[int, Stream] = {}
        self.ending = False
        self.closed = False
        self._guard: Guard | None = None
        self._scheduled = False
        self._stuck = False
        self._last: asyncio.TimerHandle | None = None

    def _open(self, transport: asyncio.BaseTransport, session: Session, preface: int) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.session = session
        self._guard = Guard(self.loop.time, preface=preface)
        self.flush()

    # -- what the two sides do differently

    def headers(self, stream_id: int, pairs: list[Pair], ended: bool) -> None:
        raise NotImplementedError

    def stream(self, stream_id: int) -> Stream | None:
        raise NotImplementedError

    def stream_closed(self, stream_id: int, code: int) -> None:
        raise NotImplementedError

    def sent_end(self, stream_id: int) -> None:
        """Our end of the stream went out."""

    def turned_away(self) -> None:
        """The peer opened one stream more than it may, and was told so."""

    def going_away(self, last: int, code: int) -> None:
        """The peer takes no streams after ``last``."""

    def flushed(self) -> None:
        """Nothing is waiting here."""

    def broken(self, reason: str) -> None:
        """The connection ends because of what the peer sent."""

    # -- in

    def data_received(self, data: bytes) -> None:
        if self.ending or self._guard is None:
            return
        try:
            self._guard.feed(data)
            events = self.session.receive(data)
            for kind, stream_id, value, code in events:
                self._event(kind, stream_id, value, code)
                if kind == CLOSED and code:
                    # Errors that the peer made us answer cost it nothing either (CVE-2025-8671).
                    self._guard.charge("reset")
        except Flood as error:
            self.fail(error.reason, error.code)
            return
        except SessionError as error:
            self.fail(error.reason, error.code)
            return
        self.flush()
        if not self.ending and (reason := self.session.failed):
            self.broken(reason)
            self._end_after_flush()

    def _event(self, kind: int, stream_id: int, value: Any, code: int) -> None:
        if kind == HEADERS:
            self.headers(stream_id, value, bool(code))
        elif kind == DATA:
            stream = self.stream(stream_id)
            if stream is not None:
                stream.receive(value)
            else:
                self.session.consume(stream_id, len(value))
        elif kind == END:
            stream = self.stream(stream_id)
            if stream is not None:
                stream.receive_end()
        elif kind == CLOSED:
            self.stream_closed(stream_id, code)
        elif kind == ENDED:
            self.sent_end(stream_id)
        elif kind == GOAWAY:
            self.going_away(stream_id, code)
        elif kind == SETTINGS:
            self.schedule()
        elif kind == REFUSED:
            self.turned_away()

    # -- out

    def schedule(self) -> None:
        """Frames leave at the end of this turn of the loop, together."""
        if not self._scheduled and not self.closed:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        self._scheduled = False
        if self.closed:
            return
        while not self._stuck:
            out = self.session.to_send()
            if not out:
                break
            self.transport.write(out)
        for kind, stream_id, value, code in self.session.take_events():
            self._event(kind, stream_id, value, code)
        if self.blocked:
            for stream in list(self.blocked.values()):
                if stream.relieved:
                    # Out first: what goes on now may at once have too much again.
                    del self.blocked[stream.id]
                    stream.relieve()
        if not self.ending:
            self.flushed()

    def pause_writing(self) -> None:
        self._stuck = True

    def resume_writing(self) -> None:
        self._stuck = False
        self.flush()

    # -- the end

    def fail(self, reason: str, code: int) -> None:
        """GOAWAY with ``code``, then the end."""
        if self.ending:
            return
        self.broken(reason)
        self.session.goaway(code)
        self._end_after_flush()

    def leave(self) -> None:
        """GOAWAY without an error, then the end."""
        if not self.ending:
            self.session.goaway(NO_ERROR)
            self._end_after_flush()

    def _end_after_flush(self) -> None:
        self.ending = True
        self.flush()
        if self.closed:
            return
        self.lost_streams(None)
        if not self.lingers:
            self.transport.close()
        elif self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
            self._last = self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self._last = self.loop.call_later(LINGER_TLS_S, self.transport.close)

    def lost_streams(self, error: BaseException | None) -> None:
        """Every stream is over."""
        raise NotImplementedError

    def connection_lost(self, exc: BaseException | None) -> None:
        self.closed = True
        self.ending = True
        if self._last is not None:
            self._last.cancel()
        self.lost_streams(exc)
        self.blocked.clear()
