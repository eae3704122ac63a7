"""HTTP/1.1 heads and bodies: strict parsing, exact framing, canonical rewriting. Compiled unless the twin is asked for.

RFC 9110 and RFC 9112. ``parse_request`` and ``parse_response`` give lazy heads: a field becomes ``str`` when somebody
asks for it. ``BodyFramer`` follows a body, ``request_bytes`` and ``response_bytes`` write what goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._http1_py import (
    CHUNKED,
    CHUNKED_FRAMING,
    CLOSE,
    CLOSING,
    FIELD_LIMIT,
    HEAD_LIMIT,
    KEEPING,
    LENGTH,
    NO_FRAMING,
    NONE,
    SILENT,
    UPGRADING,
    BadMessage,
    Prepared,
    field_line,
    plain_response,
    split_authority,
)

if TYPE_CHECKING:
    from creto_hotpath._http1_py import (
        BodyFramer,
        Fields,
        RequestHead,
        ResponseHead,
        chunk,
        now_ns,
        parse_request,
        parse_response,
        read_request,
        read_response,
        request_bytes,
        response_bytes,
    )
else:
    from creto_hotpath._select import select

    _http1 = select("http1")
    BodyFramer = _http1.BodyFramer
    Fields = _http1.Fields
    RequestHead = _http1.RequestHead
    ResponseHead = _http1.ResponseHead
    chunk = _http1.chunk
    now_ns = _http1.now_ns
    parse_request = _http1.parse_request
    parse_response = _http1.parse_response
    read_request = _http1.read_request
    read_response = _http1.read_response
    request_bytes = _http1.request_bytes
    response_bytes = _http1.response_bytes

__all__ = [
    "CHUNKED",
    "CHUNKED_FRAMING",
    "CLOSE",
    "CLOSING",
    "FIELD_LIMIT",
    "HEAD_LIMIT",
    "KEEPING",
    "LENGTH",
    "NONE",
    "NO_FRAMING",
    "SILENT",
    "UPGRADING",
    "BadMessage",
    "BodyFramer",
    "Fields",
    "Prepared",
    "RequestHead",
    "ResponseHead",
    "chunk",
    "field_line",
    "now_ns",
    "parse_request",
    "parse_response",
    "plain_response",
    "read_request",
    "read_response",
    "request_bytes",
    "response_bytes",
    "split_authority",
]
