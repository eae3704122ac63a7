"""Other people's HTTP parsers: where they see messages begin and end in what creto forwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import h11
import httptools

# Creto bounds heads at 64 KiB and adds its own fields to that.
_HEAD_LIMIT = 1 << 18


@dataclass
class Seen:
    """One message as a parser saw it. first: the method, or the status; names are lower-case."""

    first: bytes = b""
    target: bytes = b""
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False

    def values(self, name: bytes) -> list[bytes]:
        return [value for field_name, value in self.fields if field_name == name]


class Rejected(Exception):
    """The parser refuses what it was given."""


def h11_request(data: bytes) -> tuple[Seen, bytes] | None:
    """The first request as h11 reads it and the bytes after it; None when its head is incomplete. Raises Rejected."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_LIMIT)
    connection.receive_data(data)
    return _h11_message(connection)


def h11_response(data: bytes, method: bytes, closed: bool) -> tuple[Seen, bytes] | None:
    """The final response to a ``method`` request. closed: end of file follows ``data``."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_LIMIT)
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"h.test")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    if closed:
        connection.receive_data(b"")
    return _h11_message(connection)


def _h11_message(connection: h11.Connection) -> tuple[Seen, bytes] | None:
    seen: Seen | None = None
    while True:
        try:
            event: Any = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise Rejected(str(error)) from None
        if isinstance(event, h11.Request):
            seen = Seen(event.method, event.target, list(event.headers))
        elif isinstance(event, (h11.Response, h11.InformationalResponse)):
            seen = Seen(b"%d" % event.status_code, b"", list(event.headers))
            if isinstance(event, h11.InformationalResponse):
                seen.complete = True
                return seen, connection.trailing_data[0]
        elif isinstance(event, h11.Data) and seen is not None:
            seen.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage) and seen is not None:
            seen.complete = True
            return seen, connection.trailing_data[0]
        else:
            return None if seen is None else (seen, b"")


class _Llhttp:
    """Collects what httptools (llhttp, the parser of node) reports."""

    def __init__(self) -> None:
        self.messages: list[Seen] = []

    def on_message_begin(self) -> None:
        self.messages.append(Seen())

    def on_url(self, url: bytes) -> None:
        self.messages[-1].target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.messages[-1].fields.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.messages[-1].body += body

    def on_message_complete(self) -> None:
        self.messages[-1].complete = True


def llhttp_requests(data: bytes) -> list[Seen] | None:
    """Every request llhttp sees in ``data``; None when it does not know the method. Raises Rejected."""
    found = _Llhttp()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserInvalidMethodError:
        return None
    except httptools.HttpParserError as error:
        raise Rejected(f"{type(error).__name__}: {error}") from None
    return found.messages


def llhttp_responses(data: bytes) -> list[Seen]:
    """Every response llhttp sees in ``data``. Raises Rejected."""
    found = _Llhttp()
    parser = httptools.HttpResponseParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserError as error:
        raise Rejected(f"{type(error).__name__}: {error}") from None
    return found.messages
