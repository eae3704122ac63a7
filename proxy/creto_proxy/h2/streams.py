"""The streams of an agent, as transports of the relay: HTTP/2 on the agent's side, HTTP/1.1 on the relay's."""

from __future__ import annotations

from collections.abc import Iterable

from creto_hotpath.http1 import BadMessage, BodyFramer, ResponseHead, read_response
from creto_hotpath.relay import Downstream
from creto_proxy.h2 import grpc
from creto_proxy.h2.endpoint import CANCEL, INTERNAL_ERROR, PROTOCOL_ERROR, Endpoint, Pair, Reader, Stream
from creto_proxy.h2.message import Malformed, RequestFields, response_pairs


class AgentStream(Stream):
    """One request. trailers: those of the request, once they came. response_trailers, reset_code: left here by the
    origin's stream, for the end of the answer, and for the reset in its place."""

    def __init__(self, endpoint: Endpoint, stream_id: int, fields: RequestFields, via: bytes) -> None:
        """via: our pseudonym, by which answers of our own are told from relayed ones."""
        super().__init__(endpoint, stream_id)
        self.fields = fields
        self.trailers: list[Pair] = []
        self.response_trailers: list[Pair] = []
        self.reset_code = INTERNAL_ERROR
        self.finished = False
        self._via = via
        self._left = fields.length
        self._framer: BodyFramer | None = None

    def begin(self, downstream: Downstream, *, absolute: bool, ended: bool) -> None:
        """Hands the request to the relay. Its body follows."""
        bodiless = ended or self.fields.websocket or self.fields.method == b"CONNECT"
        self.protocol = downstream
        self.chunked = not bodiless and self.fields.length < 0
        downstream.connection_made(self)
        downstream.data_received(self.fields.head(absolute=absolute, ended=bodiless))

    def receive(self, data: bytes) -> None:
        if self._left >= 0:
            self._left -= len(data)
            if self._left < 0:
                raise Malformed("content_length_mismatch")
        super().receive(data)

    def break_off(self, reason: str) -> None:
        """Ends the request under way, which is recorded with that reason; one that was answered has its record."""
        downstream = self.protocol
        exchange = downstream.exchange if isinstance(downstream, Downstream) else None
        self.reset_code = PROTOCOL_ERROR
        if exchange is not None:
            exchange.abort(reason)
        self.lose()

    def receive_end(self) -> None:
        if self._left > 0:
            raise Malformed("content_length_mismatch")
        super().receive_end()

    # -- what the relay writes: an HTTP/1.1 response

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.finished or self.closed:
            return
        whole = bytes(data)
        at = 0
        while self._framer is None and at < len(whole):
            try:
                head = read_response(whole, at, self.fields.method == b"HEAD")
            except BadMessage:
                head = None
            if head is None:  # the relay writes whole, canonical heads
                self.abort()
                return
            at = head.end
            if head.status >= 200:
                self._begin(head, whole)
            elif head.status == 101:
                self._switch(head, whole[at:])
                break
            elif not self.fields.grpc:  # gRPC libraries do not know interim answers
                self.endpoint.session.headers(self.id, response_pairs(head), False, True)
        if self._framer is not None and not self.finished:
            self._queue(self._framer.payload(whole, at))
            if self._framer.done:
                self.endpoint.session.end(self.id, self.response_trailers)
                self._finish()
        self.endpoint.schedule()

    def writelines(self, pieces: Iterable[bytes | memoryview]) -> None:
        self.write(b"".join(pieces))

    def _begin(self, head: ResponseHead, data: bytes) -> None:
        session = self.endpoint.session
        framer = self._framer = BodyFramer(head.body, head.content_length, 502)
        if self.fields.grpc and not head.via_names(self._via):
            session.headers(self.id, grpc.refusal(head, framer.payload(data, head.end)), True)
            self._finish()
            return
        done = framer.done and not self.response_trailers
        pairs = response_pairs(head)
        if self.fields.grpc and done:  # "Trailers-Only": what is not a trailer of the origin's would look like one
            pairs = [pair for pair in pairs if pair[0] != b"content-length"]
        session.headers(self.id, pairs, done)
        if done:
            self._finish()

    def _switch(self, head: ResponseHead, rest: bytes) -> None:
        """The relay grants an upgrade, which nobody asked for on a stream like this."""
        self.abort()

    def _finish(self) -> None:
        self.finished = True
        self.endpoint.schedule()
        self.lose()

    def close(self) -> None:
        """The relay has said all it will."""
        self.abort()

    def abort(self) -> None:
        """An answer that is not complete is seen to be so."""
        if not self.finished and not self.closed:
            self.endpoint.session.reset(self.id, self.reset_code)
            self.endpoint.schedule()
            self.lose()

    def gone(self, code: int) -> None:
        """Both sides have ended the stream, or one has reset it with ``code``."""
        self.lose()


class WebSocketStream(AgentStream):
    """A WebSocket (RFC 8441). To the relay it is a connection whose first request asks for an upgrade; once that is
    granted the stream's content is what flows in its tunnel, END_STREAM is its FIN, and CANCEL its RST."""

    def __init__(self, endpoint: Endpoint, stream_id: int, fields: RequestFields, via: bytes) -> None:
        super().__init__(endpoint, stream_id, fields, via)
        self._open = False
        self._said_end = False

    def _deliver(self) -> None:
        # What comes early waits here: after a refusal the relay would read it as another request.
        if self._open:
            super()._deliver()

    def _deliver_end(self, protocol: Reader) -> None:
        if not protocol.eof_received():
            self.close()

    def _begin(self, head: ResponseHead, data: bytes) -> None:
        if head.status < 300:  # to the agent that would mean that its WebSocket is open
            self.abort()
        else:
            super()._begin(head, data)

    def _switch(self, head: ResponseHead, rest: bytes) -> None:
        pairs = [(name, value) for name, value in response_pairs(head) if name != b"sec-websocket-accept"]
        pairs[0] = (b":status", b"200")
        self.endpoint.session.headers(self.id, pairs, False)
        self._open = True
        self.reset_code = CANCEL
        if rest:
            self._queue(rest)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._open:
            super().write(data)
        elif not self.closed and not self._said_end:
            self._queue(bytes(data))
            self.endpoint.schedule()

    def can_write_eof(self) -> bool:
        return self._open

    def write_eof(self) -> None:
        if not self.closed and not self._said_end:
            self._said_end = True
            self.endpoint.session.end(self.id)
            self.endpoint.schedule()

    def close(self) -> None:
        if self._open and not self.closed:
            self.write_eof()
            self._finish()
        else:
            self.abort()

    def break_off(self, reason: str) -> None:
        if self._open:
            self.lose(ConnectionResetError(reason))
        else:
            super().break_off(reason)

    def gone(self, code: int) -> None:
        if code:
            self.lose(ConnectionResetError("the agent reset the stream"))
        elif not self._open or not self.heard_end:
            self.lose()
        # Else what it said last may still wait for the upstream; the relay closes after it.
