"""HTTP/2 fields to HTTP/1.1 heads and back, strictly: what could mean two things on two sides is refused, not repaired.

RFC 9113 section 8. Everything a downgrade could smuggle is looked at here although the framing and the relay's own
parser look again: CR, LF and NUL anywhere, lengths, connection fields, names that are not tokens, two hosts.
"""

from __future__ import annotations

import base64
import os

from creto_hotpath.http1 import FIELD_LIMIT, HEAD_LIMIT, RequestHead, ResponseHead

Pair = tuple[bytes, bytes]

_LOWER_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_METHOD = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_BAD_VALUE = frozenset(range(32)) - {9} | {127}
# Without "#", which servers read differently; and without what ends a request target.
_TARGET = frozenset(range(33, 127)) - {0x23}
_AUTHORITY = frozenset(b"-._:[]0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
CONNECTION_FIELDS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
# What a trailer section must not say (RFC 9110 section 6.5.1).
_NOT_IN_TRAILERS = CONNECTION_FIELDS | {
    b"content-length", b"content-encoding", b"content-type", b"content-range", b"host", b"te", b"trailer",
    b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"expect", b"max-forwards",
}  # fmt: skip
_REQUEST_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})
_HOP_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"te"})


class Malformed(ValueError):
    """A message that HTTP/2 calls malformed: the stream ends with PROTOCOL_ERROR. ``reason`` is snake_case."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLarge(ValueError):
    """A field section beyond the limits that HTTP/1.1 heads have (431)."""


class NotServed(ValueError):
    """A request that is well-formed and that nobody here can serve (501). ``reason`` is snake_case."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RequestFields:
    """A request as HTTP/2 carries it, validated. head(): the same as an HTTP/1.1 head.

    length: the Content-Length, -1 for none. grpc: its content is gRPC. trailers: the agent takes trailer fields.
    websocket: an extended CONNECT for one (RFC 8441), which the head asks for as RFC 6455 does, by GET and an upgrade.
    """

    __slots__ = ("authority", "fields", "grpc", "length", "method", "path", "scheme", "trailers", "websocket")

    def __init__(self, pairs: list[Pair]) -> None:
        """Raises Malformed, TooLarge or NotServed."""
        pseudo, fields = split(pairs, _REQUEST_PSEUDO)
        self.method = pseudo.get(b":method", b"")
        protocol = pseudo.get(b":protocol")
        self.websocket = protocol == b"websocket"
        if protocol is not None:
            if self.method != b"CONNECT":
                raise Malformed("bad_connect")
            if not self.websocket:
                raise NotServed("extended_connect")
            self.method = b"GET"
        self.scheme = pseudo.get(b":scheme", b"")
        self.path = pseudo.get(b":path", b"")
        self.length = content_length(fields)
        if self.websocket and self.length >= 0:
            raise Malformed("bad_connect")
        self.trailers = False
        self.grpc = False
        host: bytes | None = None
        cookies: list[bytes] = []
        kept: list[Pair] = []
        for name, value in fields:
            if name == b"host":
                if host is not None:
                    raise Malformed("duplicate_host")
                host = value
                continue
            if name == b"cookie":
                cookies.append(value)
                continue
            if name == b"te":
                if value.lower() != b"trailers":
                    raise Malformed("bad_te")
                self.trailers = True
                continue
            if name == b"sec-websocket-key" and self.websocket:
                continue  # means nothing here (section 5); the upstream gets one of ours
            if name == b"content-type":
                self.grpc = is_grpc(value) and not self.websocket
            kept.append((name, value))
        if cookies:  # sent in crumbs for the compression (RFC 9113 section 8.2.3)
            kept.append((b"cookie", b"; ".join(cookies)))
        self.fields = kept
        self.authority = self._authority(pseudo.get(b":authority"), host)
        self._judge()

    def _authority(self, authority: bytes | None, host: bytes | None) -> bytes:
        if authority is not None and host is not None and authority.lower() != host.lower():
            raise Malformed("host_mismatch")
        name = host if authority is None else authority
        if not name or not _AUTHORITY.issuperset(name):
            raise Malformed("bad_authority")
        return name

    def _judge(self) -> None:
        if not self.method or len(self.method) > 32 or not _METHOD.issuperset(self.method):
            raise Malformed("bad_method")
        if self.method == b"CONNECT":
            if self.scheme or self.path:
                raise Malformed("bad_connect")
            return
        if self.scheme not in (b"http", b"https"):
            raise Malformed("bad_scheme")
        if self.path[:1] != b"/" and not (self.path == b"*" and self.method == b"OPTIONS"):
            raise Malformed("bad_path")
        if not _TARGET.issuperset(self.path):
            raise Malformed("bad_path")

    def head(self, *, absolute: bool, ended: bool) -> bytes:
        """The head as HTTP/1.1, with the framing its body will have. absolute: the target names scheme and host."""
        target = self.authority if self.method == b"CONNECT" else self.path
        if absolute and self.method != b"CONNECT":
            rest = b"" if self.path == b"*" else self.path
            target = b"%b://%b%b" % (self.scheme, self.authority, rest)
        out = [self.method, b" ", target, b" HTTP/1.1\r\nHost: ", self.authority, b"\r\n"]
        for name, value in self.fields:
            out += (name, b": ", value, b"\r\n")
        if self.websocket:
            key = base64.b64encode(os.urandom(16))
            out += (b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: ", key, b"\r\n")
        elif not ended and self.length < 0:
            out.append(b"Transfer-Encoding: chunked\r\n")
        out.append(b"\r\n")
        return b"".join(out)


def is_grpc(content_type: bytes) -> bool:
    """Whether a body of that type is gRPC over HTTP/2 (grpc-web and the like are not)."""
    value = content_type.lower()
    return value[:16] == b"application/grpc" and value[16:17] in (b"", b"+", b";", b" ")


def split(pairs: list[Pair], known: frozenset[bytes]) -> tuple[dict[bytes, bytes], list[Pair]]:
    """(pseudo-fields, fields), every name and value judged. Raises Malformed or TooLarge."""
    pseudo: dict[bytes, bytes] = {}
    size = 0
    for index, (name, value) in enumerate(pairs):
        size += len(name) + len(value) + 32
        if size > HEAD_LIMIT or index >= FIELD_LIMIT + len(pseudo):
            raise TooLarge("the field section is too large")
        if not _BAD_VALUE.isdisjoint(value) or value[:1] in (b" ", b"\t") or value[-1:] in (b" ", b"\t"):
            raise Malformed("bad_field_value")
        if name[:1] == b":":
            if name not in known or name in pseudo or len(pseudo) != index:
                raise Malformed("bad_pseudo_field")
            pseudo[name] = value
        elif not name or not _LOWER_TOKEN.issuperset(name):
            raise Malformed("bad_field_name")
        elif name in CONNECTION_FIELDS:
            raise Malformed("connection_field")
    return pseudo, pairs[len(pseudo) :]


def content_length(fields: list[Pair]) -> int:
    """The one Content-Length, -1 for none. Raises Malformed."""
    found = [value for name, value in fields if name == b"content-length"]
    if not found:
        return -1
    if len(found) > 1 or not found[0].isdigit() or len(found[0]) > 18:
        raise Malformed("bad_content_length")
    return int(found[0])


def trailer_fields(pairs: list[Pair]) -> list[Pair]:
    """A trailer section, without what has no business in one. Raises Malformed or TooLarge."""
    _, fields = split(pairs, frozenset())
    return [(name, value) for name, value in fields if name not in _NOT_IN_TRAILERS]


def response_pairs(head: ResponseHead) -> list[Pair]:
    """The head of an HTTP/1.1 response as HTTP/2 carries it."""
    pairs = [(b":status", b"%d" % head.status)]
    for name, value in head.headers.items():
        key = name.lower().encode("latin-1")
        if key not in _HOP_FIELDS:
            pairs.append((key, value.encode("latin-1")))
    return pairs


def request_pairs(head: RequestHead, scheme: bytes, *, trailers: bool) -> list[Pair]:
    """The head of an HTTP/1.1 request, in origin form, as HTTP/2 carries it. trailers: say that they are welcome."""
    pairs = [(b":method", head.method.encode("ascii")), (b":scheme", scheme), (b":authority", b"")]
    pairs.append((b":path", head.target.encode("ascii")))
    for name, value in head.headers.items():
        key = name.lower().encode("latin-1")
        if key == b"host":
            pairs[2] = (b":authority", value.encode("latin-1"))
        elif key not in _HOP_FIELDS:
            pairs.append((key, value.encode("latin-1")))
    if trailers:
        pairs.append((b"te", b"trailers"))
    return pairs


def response_head(pairs: list[Pair], *, ended: bool, bodiless: bool) -> tuple[int, bytes, int]:
    """(status, HTTP/1.1 head, Content-Length or -1) of an answer from HTTP/2. bodiless: it answers HEAD.

    Without a length the body follows in chunks. Raises Malformed or TooLarge.
    """
    pseudo, fields = split(pairs, frozenset({b":status"}))
    digits = pseudo.get(b":status", b"")
    if len(digits) != 3 or not digits.isdigit() or digits[:1] == b"0" or digits == b"101":
        raise Malformed("bad_status")
    status = int(digits)
    length = content_length(fields)
    out = [b"HTTP/1.1 ", digits, b" \r\n"]
    for name, value in fields:
        out += (name, b": ", value, b"\r\n")
    if status >= 200 and length < 0 and status not in (204, 304) and not bodiless:
        out.append(b"Content-Length: 0\r\n" if ended else b"Transfer-Encoding: chunked\r\n")
    out.append(b"\r\n")
    return status, b"".join(out), length
