"""HTTP/2 framing by the pure-Python h2 package: what ``_h2_c`` is held to, and what runs where nghttp2 is missing.

A ``Session`` is one connection, without sockets: ``receive`` takes bytes and gives events, ``to_send`` gives bytes.
Bodies handed to ``write`` wait here until the peer's windows allow them. The connection's window is given back as data
comes, so that one slow stream cannot stop the others; a stream's window only when its reader calls ``consume``.

Events are tuples (kind, stream, value, code):
HEADERS: value is a list of (name, value) as received, code 1 when the stream ends with it. DATA: value is the content.
END: the peer ended the stream. ENDED: our end of the stream was put into ``to_send``. CLOSED: the stream is gone, code
is the error (0: none). GOAWAY: stream is the last one that the peer handles. SETTINGS: the peer changed its settings.
REFUSED: the peer opened more streams than it may and was told so; h2 ends such a connection instead.

RFC 9113, RFC 7541. Fields are not judged here: see ``creto_proxy.h2.message``.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import (
    DenialOfServiceError,
    H2Error,
    NoSuchStreamError,
    ProtocolError,
    StreamClosedError,
    TooManyStreamsError,
)
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream
from hpack.exceptions import HPACKError
from hyperframe.frame import Frame, GoAwayFrame

from creto_hotpath._h2_types import CLOSED, DATA, END, ENDED, GOAWAY, HEADERS, SETTINGS, SessionError, reason_of

Pair = tuple[bytes, bytes]
SessionEvent = tuple[int, int, Any, int]

_FRAME = 16384
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADED = (RequestReceived, ResponseReceived, InformationalResponseReceived, TrailersReceived)


class _Connection(H2Connection):
    """h2 treats a received GOAWAY as the end; RFC 9113 section 6.8 lets the streams below it finish."""

    MAX_CLOSED_STREAMS = 1000

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        state = self.state_machine.state
        answer = super()._receive_goaway_frame(frame)
        self.state_machine.state = state
        return answer

    def clear_outbound_data_buffer(self) -> None:
        return None


    def _begin_new_stream(self, stream_id: int, allowed_ids: AllowedStreamIDs) -> H2Stream:
        stream = super()._begin_new_stream(stream_id, allowed_ids)
        if not self.config.client_side:
            # h2 would end the whole connection for one request whose body is not as long as it said.
            vars(stream)["_initialize_content_length"] = lambda headers: None
        return stream


def _why(error: ProtocolError) -> str:
    """The reason that nghttp2 would give. (It refuses only the one stream that is too many; h2 cannot.)"""
    if isinstance(error, TooManyStreamsError):
        return "too_many_streams"
    return "compression_error" if isinstance(error.__cause__, HPACKError) else reason_of(int(error.error_code))


class _Stream:
    __slots__ = ("ended", "heard_end", "pieces", "sent_end", "size", "taken", "trailers")

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.taken = 0
        self.ended = False
        self.sent_end = False
        self.heard_end = False
        self.trailers: list[Pair] | None = None


class Session:
    """One side of one connection. client: whether it is the one that opens streams."""

    def __init__(
        self,
        client: bool,
        *,
        max_streams: int = 100,
        stream_window: int = 65535,
        connection_window: int = 1048576,
        header_list: int = 65536,
    ) -> None:
        self._h2 = _Connection(
            H2Configuration(
                client_side=client,
                header_encoding=None,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        values: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: stream_window,
            SettingCodes.MAX_HEADER_LIST_SIZE: header_list,
            SettingCodes.ENABLE_PUSH: 0,
        }
        if not client:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = max_streams
            values[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1  # RFC 8441
        self._h2.local_settings = Settings(client=client, initial_values=values)
        self._h2.max_inbound_frame_size = self._h2.local_settings.max_frame_size
        self._header_limit = 4 * header_list
        self._h2.decoder.max_header_list_size = self._header_limit
        self._batch = stream_window // 2
        self._connection_batch = connection_window // 2
        self._connection_taken = 0
        self._streams: dict[int, _Stream] = {}
        self._ready: dict[int, None] = {}
        self._events: list[SessionEvent] = []
        self._terminated = False
        self._failed = ""
        self._preface = b"" if client else _PREFACE
        self._h2.initiate_connection()
        if connection_window > 65535:
            self._h2.increment_flow_control_window(connection_window - 65535)

    # -- in

    def receive(self, data: bytes) -> list[SessionEvent]:
        """What came of ``data``. Raises SessionError."""
        if self._terminated:
            return self.take_events()
        greeting = data[: len(self._preface)]
        if not self._preface.startswith(greeting):
            raise SessionError("bad_preface")
        self._preface = self._preface[len(greeting) :]
        try:
            for event in self._h2.receive_data(data):
                self._note(event)
        except DenialOfServiceError as error:
            self._terminated = True
            raise SessionError("header_list_too_large", int(error.error_code)) from error
        except ProtocolError as error:
            self._terminated = True
            self._failed = _why(error)
        return self.take_events()

    def _note(self, event: Event) -> None:
        events = self._events
        if isinstance(event, _HEADED):
            stream_id = event.stream_id
            self._streams.setdefault(stream_id, _Stream())
            end = getattr(event, "stream_ended", None) is not None
            events.append((HEADERS, stream_id, event.headers, int(end)))
        elif isinstance(event, DataReceived):
            padding = event.flow_controlled_length - len(event.data)
            if padding:
                self.consume(event.stream_id, padding)
            self._consume_connection(event.flow_controlled_length)
            if event.data:
                events.append((DATA, event.stream_id, event.data, 0))
        elif isinstance(event, StreamEnded):
            events.append((END, event.stream_id, None, 0))
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.heard_end = True
                self._retire(event.stream_id, stream)
        elif isinstance(event, StreamReset):
            if self._streams.pop(event.stream_id, None) is not None:
                self._ready.pop(event.stream_id, None)
                events.append((CLOSED, event.stream_id, None, int(event.error_code)))
        elif isinstance(event, ConnectionTerminated):
            events.append((GOAWAY, event.last_stream_id or 0, None, int(event.error_code or 0)))
        elif isinstance(event, RemoteSettingsChanged):
            events.append((SETTINGS, 0, None, 0))
            self._wake_all()
        elif isinstance(event, SettingsAcknowledged):
            self._h2.decoder.max_header_list_size = self._header_limit
        elif isinstance(event, WindowUpdated):
            self._wake_all()

    def _wake_all(self) -> None:
        for stream_id, stream in self._streams.items():
            if stream.size or (stream.ended and not stream.sent_end):
                self._ready[stream_id] = None

    def _retire(self, stream_id: int, stream: _Stream) -> None:
        if stream.heard_end and stream.sent_end and self._streams.pop(stream_id, None) is not None:
            self._events.append((CLOSED, stream_id, None, 0))

    def take_events(self) -> list[SessionEvent]:
        """Events that came of sending."""
        events = self._events
        self._events = []
        return events

    @property
    def failed(self) -> str:
        """Why the connection is ending by an error found while framing; empty when it is not."""
        return self._failed

    @property
    def over(self) -> bool:
        """Whether nothing will be read or written any more."""
        return self._terminated and not self._h2._data_to_send

    # -- out

    def to_send(self, limit: int = 65536) -> bytes:
        """Up to about ``limit`` bytes for the peer, streams taking turns; b"" when there is nothing or no window."""
        if self._terminated:
            return self._h2.data_to_send()
        budget = limit
        while self._ready and budget > 0:
            stream_id = next(iter(self._ready))
            del self._ready[stream_id]
            stream = self._streams.get(stream_id)
            if stream is not None:
                budget -= self._push(stream_id, stream)
        return self._h2.data_to_send()

    def _push(self, stream_id: int, stream: _Stream) -> int:
        """One frame of a stream's body, or its end; bytes."""
        try:
            room = min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size, _FRAME)
            if stream.size:
                if room <= 0:
                    return 0
                piece = stream.pieces.popleft()
                if len(piece) > room:
                    stream.pieces.appendleft(piece[room:])
                    piece = piece[:room]
                stream.size -= len(piece)
                last = stream.ended and not stream.size and stream.trailers is None
                self._h2.send_data(stream_id, piece, end_stream=last)
                size = len(piece)
            elif stream.ended:
                last, size = True, 0
                if stream.trailers is not None:
                    self._h2.send_headers(stream_id, stream.trailers, end_stream=True)
                else:
                    self._h2.send_data(stream_id, b"", end_stream=True)
            else:
                return 0
        except (StreamClosedError, NoSuchStreamError):
            self._streams.pop(stream_id, None)
            return 0
        if last:
            self._sent_end(stream_id, stream)
        elif stream.size or stream.ended:
            self._ready[stream_id] = None
        return size

    def _sent_end(self, stream_id: int, stream: _Stream) -> None:
        stream.sent_end = True
        self._events.append((ENDED, stream_id, None, 0))
        self._retire(stream_id, stream)

    def open(self, pairs: list[Pair], end: bool) -> int:
        """A new stream with this request; its id. Raises SessionError when no more can be opened."""
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, pairs, end_stream=end)
        except H2Error as error:
            raise SessionError("no_more_streams") from error
        stream = self._streams[stream_id] = _Stream()
        if end:
            self._sent_end(stream_id, stream)
        return stream_id

    def headers(self, stream_id: int, pairs: list[Pair], end: bool, interim: bool = False) -> None:
        """The head of an answer; interim: a 1xx that another follows."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        try:
            self._h2.send_headers(stream_id, pairs, end_stream=end)
        except (StreamClosedError, NoSuchStreamError):
            return
        if end:
            self._sent_end(stream_id, stream)

    def write(self, stream_id: int, data: bytes) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and data:
            stream.pieces.append(data)
            stream.size += len(data)
            self._ready[stream_id] = None

    def end(self, stream_id: int, trailers: list[Pair] | None = None) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.ended = True
            stream.trailers = trailers or None
            self._ready[stream_id] = None

    def queued(self, stream_id: int) -> int:
        """Bytes of the stream's body that wait here."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.size

    def consume(self, stream_id: int, size: int) -> None:
        """The reader has taken ``size`` bytes of the stream, which may send that much more."""
        stream = self._streams.get(stream_id)
        if stream is None or self._terminated or stream.heard_end:
            return
        stream.taken += size
        if stream.taken >= self._batch:
            try:
                self._h2.increment_flow_control_window(stream.taken, stream_id)
            except H2Error:
                return  # the peer ended or reset the stream within the bytes being read
            stream.taken = 0

    def _consume_connection(self, size: int) -> None:
        self._connection_taken += size
        if self._connection_taken >= self._connection_batch:
            self._h2.increment_flow_control_window(self._connection_taken)
            self._connection_taken = 0

    def reset(self, stream_id: int, code: int) -> None:
        if self._streams.pop(stream_id, None) is None or self._terminated:
            return
        self._ready.pop(stream_id, None)
        try:
            self._h2.reset_stream(stream_id, code)
        except H2Error:
            return
        self._events.append((CLOSED, stream_id, None, code))

    def goaway(self, code: int, terminate: bool = True) -> None:
        """Says that no further stream is taken; terminate: nor is anything sent or read any more."""
        if self._terminated:
            return
        if terminate:
            self._terminated = True
            self._h2._terminate_connection(ErrorCodes(code))
            return
        frame = GoAwayFrame(0)
        frame.last_stream_id = self._h2.highest_inbound_stream_id
        frame.error_code = code
        # h2's own close_connection() would refuse to finish the streams that are open (RFC 9113 section 6.8).
        self._h2._prepare_for_sending([frame])

    @property
    def peer_max_streams(self) -> int:
        """How many streams the peer lets us have open."""
        return int(self._h2.remote_settings.max_concurrent_streams)
