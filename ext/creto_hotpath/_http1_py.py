"""HTTP/1.1 messages in plain Python: the specification that ``_http1_c`` is held to.

Strict on the way in (RFC 9110, RFC 9112; shapes used for request smuggling are refused, never repaired), canonical
on the way out. The answer to a message never depends on how the network cut it into segments: lines are judged in
order, each one as soon as its CRLF is there, and limits are counted from the first byte of the message.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus

# Apache allows 8 KiB per line and 100 fields, node 16 KiB and 2,000 fields; cookies and SDK heads stay below 16 KiB.
HEAD_LIMIT = 65536
FIELD_LIMIT = 128
METHOD_LIMIT = 32
# Chunk extensions and trailers are dropped, so more of them than this is an attack on our time (CVE-2023-39326).
CHUNK_OVERHEAD_LIMIT = 65536
CHUNK_SIZE_DIGITS = 15

# How a body is delimited.
NONE, LENGTH, CHUNKED, CLOSE = range(4)
# The framing argument of request_bytes and response_bytes, when it is not a Content-Length.
NO_FRAMING, CHUNKED_FRAMING = -1, -2
# The connection argument of response_bytes and plain_response.
SILENT, CLOSING, KEEPING, UPGRADING = range(4)

TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_BAD_VALUE = frozenset(range(32)) - {9} | {127}
# "#" never belongs in a request target (RFC 9112 3.2); servers disagree on what it means, so it is refused.
_TARGET = frozenset(range(33, 127)) - {0x23}
_HOST = frozenset(b"-._0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_HEX = {byte: int(chr(byte), 16) for byte in b"0123456789abcdefABCDEF"}
_BLANK = b" \t"

# Kinds of field. 2 to 9 are hop-by-hop in a request, 2 to 8 in a response: never forwarded.
(
    K_OTHER,
    K_HOST,
    K_CONNECTION,
    K_KEEP_ALIVE,
    K_PROXY_CONNECTION,
    K_TE,
    K_TRAILER,
    K_TRANSFER,
    K_UPGRADE,
    K_PROXY_AUTHORIZATION,
    K_LENGTH,
    K_EXPECT,
    K_VIA,
    K_AGENT,
    K_MAX_FORWARDS,
    K_DROPPED,
) = range(16)

_KINDS = {
    b"host": K_HOST,
    b"connection": K_CONNECTION,
    b"keep-alive": K_KEEP_ALIVE,
    b"proxy-connection": K_PROXY_CONNECTION,
    b"te": K_TE,
    b"trailer": K_TRAILER,
    b"transfer-encoding": K_TRANSFER,
    b"upgrade": K_UPGRADE,
    b"proxy-authorization": K_PROXY_AUTHORIZATION,
    b"content-length": K_LENGTH,
    b"expect": K_EXPECT,
    b"via": K_VIA,
    b"x-agent-id": K_AGENT,
    b"x_agent_id": K_AGENT,
    b"x-agent_id": K_AGENT,
    b"x_agent-id": K_AGENT,
    b"max-forwards": K_MAX_FORWARDS,
}
# CGI-style servers read these as the framing fields they imitate.
_FRAMING_TWINS = frozenset({b"content_length", b"transfer_encoding"})
# Connection: may not make a proxy drop what the next hop uses to delimit, route, identify or authorize (Davison,
# "Abusing HTTP hop-by-hop request headers", 2019). Fields with a kind of their own are never dropped this way.
PROTECTED = frozenset(
    {
        b"api-key",
        b"authorization",
        b"content-encoding",
        b"content-range",
        b"content-type",
        b"cookie",
        b"forwarded",
        b"idempotency-key",
        b"location",
        b"mcp-method",
        b"mcp-name",
        b"mcp-session-id",
        b"set-cookie",
        b"www-authenticate",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-goog-api-key",
        b"x-real-ip",
    }
)
# What edits may not touch: the relay owns framing and the connection, ``host`` has its own argument.
UNEDITABLE = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "max-forwards",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
    }
)
REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class BadMessage(ValueError):
    """A message that is refused. ``status`` is what the sender of a request is told; 502 blames an upstream.

    reason: snake_case code. offset: bytes from the start of the message to the line at fault, -1 inside a body.
    """

    def __init__(self, status: int, reason: str, offset: int = -1) -> None:
        super().__init__(reason if offset < 0 else f"{reason} at byte {offset}")
        self.status = status
        self.reason = reason
        self.offset = offset


class Fields:
    """The header fields of one head, in order. Names are matched without case; values are latin-1 text. http2: set by
    who knows that the message came by HTTP/2, which Via then says."""

    __slots__ = ("_fields", "http2")
    _fields: list[tuple[bytes, bytes, int]]

    def __init__(self) -> None:
        self.http2 = False

    @property
    def headers(self) -> Fields:
        return self

    def get(self, name: str) -> str | None:
        """The value of the first field with that name."""
        wanted = name.lower().encode("latin-1", "replace")
        for field, value, _ in self._fields:
            if field.lower() == wanted:
                return value.decode("latin-1")
        return None

    def getall(self, name: str) -> list[str]:
        wanted = name.lower().encode("latin-1", "replace")
        return [value.decode("latin-1") for field, value, _ in self._fields if field.lower() == wanted]

    def items(self) -> list[tuple[str, str]]:
        return [(field.decode("latin-1"), value.decode("latin-1")) for field, value, _ in self._fields]

    def via_names(self, pseudonym: bytes) -> bool:
        """Whether a Via field says the message has already passed ``pseudonym`` (lower-case)."""
        for _, value, kind in self._fields:
            if kind != K_VIA:
                continue
            for element in value.lower().split(b","):
                words = element.replace(b"\t", b" ").split(b" ")
                words = [word for word in words if word]
                if len(words) > 1 and words[1] == pseudonym:
                    return True
        return False

    def _upgrade(self) -> bytes:
        """The one protocol asked for or agreed to, b"" when there is none or more than one."""
        found = [value for _, value, kind in self._fields if kind == K_UPGRADE]
        if len(found) != 1 or not found[0] or any(byte not in TOKEN and byte != 0x2F for byte in found[0]):
            return b""
        return found[0]


class RequestHead(Fields):
    """A request line and its fields.

    content_length: -1 when absent. body: NONE, LENGTH or CHUNKED (a length of 0 is NONE). max_forwards: -1 when
    absent. end: offset just after the head in the parsed buffer; size: its bytes on the wire. form: "origin",
    "absolute", "authority" or "asterisk" (RFC 9112 3.2). authority: who the request is for, as ``split_authority``
    gives it: from the target when that names one, else from Host; None for an HTTP/1.0 request without Host.
    upgrade: the one protocol that Connection and Upgrade ask for, else None.
    """

    __slots__ = (
        "_authority",
        "_method",
        "_target",
        "body",
        "chunked",
        "content_length",
        "end",
        "expect_continue",
        "form",
        "is_connect",
        "is_head",
        "keep_alive",
        "max_forwards",
        "minor",
        "size",
        "upgrade",
    )
    _authority: bytes | None
    _method: bytes
    _target: bytes
    body: int
    chunked: bool
    content_length: int
    end: int
    expect_continue: bool
    form: str
    is_connect: bool
    is_head: bool
    keep_alive: bool
    max_forwards: int
    minor: int
    size: int
    upgrade: str | None

    @property
    def method(self) -> str:
        return self._method.decode("ascii")

    @property
    def target(self) -> str:
        return self._target.decode("ascii")

    @property
    def scheme(self) -> str:
        """Of an absolute-form target, lower-case; "" for the other forms."""
        return self._target[: self._target.index(b":")].decode("ascii").lower() if self.form == "absolute" else ""

    @property
    def authority(self) -> tuple[str, int | None] | None:
        return None if self._authority is None else split_authority(self._authority.decode("ascii"))

    @property
    def origin_target(self) -> str:
        """The target as an origin server wants it (RFC 9112 3.2.1, 3.2.4)."""
        return _origin_form(self).decode("ascii")

    @property
    def path(self) -> str:
        """Of the origin-form target, without the query; "" for CONNECT."""
        return "" if self.is_connect else self.origin_target.partition("?")[0]

    @property
    def query(self) -> str:
        return "" if self.is_connect else self.origin_target.partition("?")[2]


class ResponseHead(Fields):
    """A status line and its fields. body: NONE, LENGTH, CHUNKED or CLOSE; the rest as in RequestHead."""

    __slots__ = (
        "_reason",
        "body",
        "chunked",
        "content_length",
        "end",
        "keep_alive",
        "minor",
        "size",
        "status",
        "upgrade",
    )
    _reason: bytes
    body: int
    chunked: bool
    content_length: int
    end: int
    keep_alive: bool
    minor: int
    size: int
    status: int
    upgrade: str | None

    @property
    def reason(self) -> str:
        return self._reason.decode("latin-1")


def parse_request(buf: bytes, start: int = 0) -> tuple[RequestHead, int] | None:
    """The head at ``start`` and the offset after it; None when more bytes are needed.

    Raises BadMessage with 400, 414 (target), 417 (Expect), 431 (fields), 501 (coding, method) or 505 (version).
    """
    head = read_request(bytes(buf), start)
    return None if head is None else (head, head.end)


def parse_response(buf: bytes, request_method: str, start: int = 0) -> tuple[ResponseHead, int] | None:
    """As ``parse_request``, for the answer to a ``request_method`` request; every BadMessage has status 502."""
    head = read_response(bytes(buf), start, request_method == "HEAD")
    return None if head is None else (head, head.end)


def read_request(data: bytes, start: int) -> RequestHead | None:
    """``parse_request`` without the pair: the offset after the head is ``head.end``."""
    head = RequestHead()
    begin = start
    if data[begin : begin + 1] == b"\r":
        # One empty line before a request is tolerated (RFC 9112 2.2).
        if len(data) == begin + 1:
            return None
        if data[begin + 1] == 10:
            begin += 2
    if begin >= len(data):
        return None
    if data[begin] not in TOKEN:
        raise BadMessage(400, "bad_method", 0)
    newline = data.find(b"\n", begin, start + HEAD_LIMIT)
    if newline < 0:
        _unfinished(data, begin, start, 400)
        if len(data) - start >= HEAD_LIMIT:
            raise BadMessage(414, "target_too_long", 0)
        return None
    _request_line(head, data, begin, _line_end(data, begin, newline, start, 400))
    end = _read_fields(head, data, newline + 1, start, 400)
    if end < 0:
        return None
    head.end = end
    head.size = end - start
    _judge_request(head, end - start)
    return head


def read_response(data: bytes, start: int, head_only: bool) -> ResponseHead | None:
    """``parse_response`` without the pair. head_only: the request was HEAD, so no body follows whatever it says."""
    head = ResponseHead()
    newline = data.find(b"\n", start, start + HEAD_LIMIT)
    if newline < 0:
        _unfinished(data, start, start, 502)
        if len(data) - start >= HEAD_LIMIT:
            raise BadMessage(502, "head_too_long", 0)
        return None
    _status_line(head, data, start, _line_end(data, start, newline, start, 502))
    end = _read_fields(head, data, newline + 1, start, 502)
    if end < 0:
        return None
    head.end = end
    head.size = end - start
    _judge_response(head, end - start, head_only)
    return head


def _unfinished(data: bytes, begin: int, start: int, status: int) -> None:
    """Refuses a line that no end can put right. Its last byte may be the first of its end."""
    if data.find(b"\r", begin, min(len(data), start + HEAD_LIMIT) - 1) >= 0:
        raise BadMessage(status, "bare_carriage_return", begin - start)


def _line_end(data: bytes, begin: int, newline: int, start: int, status: int) -> int:
    if data.find(b"\r", begin, max(begin, newline - 1)) >= 0:
        raise BadMessage(status, "bare_carriage_return", begin - start)
    if newline == begin or data[newline - 1] != 13:
        raise BadMessage(status, "bare_line_feed", begin - start)
    return newline - 1


def _run(data: bytes, begin: int, end: int, allowed: frozenset[int]) -> int:
    while begin < end and data[begin] in allowed:
        begin += 1
    return begin


def _request_line(head: RequestHead, data: bytes, begin: int, end: int) -> None:
    stop = _run(data, begin, end, TOKEN)
    if stop >= end or data[stop] != 32:
        raise BadMessage(400, "bad_method", 0)
    if stop - begin > METHOD_LIMIT:
        raise BadMessage(501, "method_too_long", 0)
    head._method = data[begin:stop]
    begin = stop + 1
    stop = _run(data, begin, end, _TARGET)
    if stop == begin or stop >= end or data[stop] != 32:
        raise BadMessage(400, "bad_target", 0)
    head._target = data[begin:stop]
    version = data[stop + 1 : end]
    digits = version[5:6] + version[7:]
    if len(version) != 8 or version[:5] != b"HTTP/" or version[6:7] != b"." or not digits.isdigit():
        raise BadMessage(400, "bad_version", 0)
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadMessage(505, "unsupported_version", 0)
    head.minor = version[7] - 48
    head.is_head = head._method == b"HEAD"
    head.is_connect = head._method == b"CONNECT"
    _target_form(head)


def _target_form(head: RequestHead) -> None:
    target = head._target
    head._authority = None
    if head.is_connect:
        head.form = "authority"
        head._authority = target
        if _authority_port(target) <= 0:
            raise BadMessage(400, "bad_target", 0)
    elif target[:1] == b"/":
        head.form = "origin"
    elif target == b"*":
        head.form = "asterisk"
        if head._method != b"OPTIONS":
            raise BadMessage(400, "bad_target", 0)
    else:
        head.form = "absolute"
        begin, end = _authority_span(target)
        if begin == 0 or _authority_port(target[begin:end]) < 0:
            raise BadMessage(400, "bad_target", 0)
        head._authority = target[begin:end]


def _authority_span(target: bytes) -> tuple[int, int]:
    """Where the authority of an absolute-form http(s) target is; (0, 0) for anything else."""
    lower = target[:8].lower()
    begin = 7 if lower[:7] == b"http://" else 8 if lower == b"https://" else 0
    if not begin:
        return 0, 0
    end = begin
    while end < len(target) and target[end] not in b"/?":
        end += 1
    return begin, end


def _origin_form(head: RequestHead) -> bytes:
    if head.form != "absolute":
        return head._target
    rest = head._target[_authority_span(head._target)[1] :]
    if not rest:
        return b"*" if head._method == b"OPTIONS" else b"/"
    return rest if rest[0] == 0x2F else b"/" + rest


def _status_line(head: ResponseHead, data: bytes, begin: int, end: int) -> None:
    line = data[begin:end]
    if len(line) < 12 or line[:7] != b"HTTP/1." or line[7:8] not in (b"0", b"1") or line[8:9] != b" ":
        raise BadMessage(502, "bad_status_line", 0)
    if not line[9:12].isdigit() or line[9:10] == b"0" or line[12:13] not in (b"", b" "):
        raise BadMessage(502, "bad_status_line", 0)
    if any(byte in _BAD_VALUE for byte in line[13:]):
        raise BadMessage(502, "bad_status_line", 0)
    head.minor = line[7] - 48
    head.status = int(line[9:12])
    head._reason = line[13:]


def _read_fields(head: Fields, data: bytes, begin: int, start: int, status: int) -> int:
    """Offset after the empty line, or -1 when it has not come yet."""
    fields: list[tuple[bytes, bytes, int]] = []
    seen: set[int] = set()
    head._fields = fields
    while True:
        newline = data.find(b"\n", begin, start + HEAD_LIMIT)
        if newline < 0:
            _unfinished(data, begin, start, status)
            if len(data) - start >= HEAD_LIMIT:
                raise BadMessage(431 if status == 400 else 502, "head_too_long", begin - start)
            return -1
        end = _line_end(data, begin, newline, start, status)
        if end == begin:
            return newline + 1
        if len(fields) >= FIELD_LIMIT:
            raise BadMessage(431 if status == 400 else 502, "too_many_fields", begin - start)
        name, value = _field(data, begin, end, begin - start, status)
        kind = _KINDS.get(name.lower(), K_OTHER)
        if status == 400:
            _judge_request_field(name, value, kind, seen, begin - start)
        else:
            _judge_response_field(value, kind, seen, begin - start)
        seen.add(kind)
        fields.append((name, value, kind))
        begin = newline + 1


def _field(data: bytes, begin: int, end: int, offset: int, status: int) -> tuple[bytes, bytes]:
    if data[begin] in _BLANK:
        raise BadMessage(status, "obs_fold", offset)
    colon = _run(data, begin, end, TOKEN)
    if colon == begin or colon >= end or data[colon] != 0x3A:
        raise BadMessage(status, "bad_field_name", offset)
    value = data[colon + 1 : end].strip(_BLANK)
    if any(byte in _BAD_VALUE for byte in value):
        raise BadMessage(status, "bad_field_value", offset)
    return data[begin:colon], value


def _judge_request_field(name: bytes, value: bytes, kind: int, seen: set[int], offset: int) -> None:
    if kind == K_HOST:
        if kind in seen:
            raise BadMessage(400, "duplicate_host", offset)
        if _authority_port(value) < 0:
            raise BadMessage(400, "bad_host", offset)
    elif kind == K_LENGTH:
        _judge_length(value, seen, offset, 400)
    elif kind == K_TRANSFER:
        if kind in seen:
            raise BadMessage(400, "duplicate_transfer_encoding", offset)
        if value.lower() != b"chunked":
            raise BadMessage(501, "unsupported_transfer_encoding", offset)
    elif kind == K_EXPECT:
        if value.lower() != b"100-continue":
            raise BadMessage(417, "unsupported_expectation", offset)
    elif kind == K_AGENT:
        if kind in seen:
            raise BadMessage(400, "duplicate_identity", offset)
    elif kind == K_OTHER and name.lower() in _FRAMING_TWINS:
        raise BadMessage(400, "underscored_framing", offset)


def _judge_response_field(value: bytes, kind: int, seen: set[int], offset: int) -> None:
    if kind == K_LENGTH:
        _judge_length(value, seen, offset, 502)
    elif kind == K_TRANSFER:
        if kind in seen:
            raise BadMessage(502, "duplicate_transfer_encoding", offset)
        if value.lower() != b"chunked":
            raise BadMessage(502, "unsupported_transfer_encoding", offset)


def _judge_length(value: bytes, seen: set[int], offset: int, status: int) -> None:
    if K_LENGTH in seen:
        raise BadMessage(status, "duplicate_content_length", offset)
    # 18 digits always fit into an int64; nobody sends an exabyte.
    if not 0 < len(value) <= 18 or not value.isdigit():
        raise BadMessage(status, "bad_content_length", offset)


def _connection_options(head: Fields) -> set[bytes]:
    options = set()
    for _, value, kind in head._fields:
        if kind == K_CONNECTION:
            options |= {option.strip(_BLANK).lower() for option in value.split(b",")}
    return options - {b""}


def _value_of(head: Fields, kind: int) -> bytes | None:
    return next((value for _, value, k in head._fields if k == kind), None)


def _judge_head(head: RequestHead | ResponseHead, offset: int, status: int) -> set[bytes]:
    """What the two kinds of head have in common; the options of Connection."""
    length = _value_of(head, K_LENGTH)
    head.content_length = -1 if length is None else int(length)
    head.chunked = _value_of(head, K_TRANSFER) is not None
    if head.chunked and length is not None:
        raise BadMessage(status, "length_and_chunked", offset)
    if head.chunked and head.minor == 0:
        raise BadMessage(status, "chunked_in_http10", offset)
    options = _connection_options(head)
    head.keep_alive = b"close" not in options and (head.minor == 1 or b"keep-alive" in options)
    upgrade = head._upgrade() if b"upgrade" in options and head.minor == 1 else b""
    head.upgrade = upgrade.decode("ascii") if upgrade else None
    nominated = options - PROTECTED - {b"close", b"keep-alive", b"upgrade"}
    head._fields = [
        (name, value, K_DROPPED if kind == K_OTHER and name.lower() in nominated else kind)
        for name, value, kind in head._fields
    ]
    return options


def _judge_request(head: RequestHead, offset: int) -> None:
    _judge_head(head, offset, 400)
    host = _value_of(head, K_HOST)
    if host is None and head.minor == 1:
        raise BadMessage(400, "missing_host", offset)
    if head._authority is None:
        head._authority = host
    if head.is_connect and (head.chunked or head.content_length > 0):
        raise BadMessage(400, "connect_with_body", offset)
    head.body = CHUNKED if head.chunked else LENGTH if head.content_length > 0 else NONE
    # An HTTP/1.0 client cannot understand a 100, so its expectation does not count (RFC 9110 10.1.1).
    head.expect_continue = head.minor == 1 and head.body != NONE and _value_of(head, K_EXPECT) is not None
    head.max_forwards = -1
    if head._method == b"TRACE" and head.body != NONE:
        raise BadMessage(400, "trace_with_body", offset)
    forwards = _value_of(head, K_MAX_FORWARDS)
    if forwards is not None and head._method in (b"OPTIONS", b"TRACE"):
        if sum(kind == K_MAX_FORWARDS for _, _, kind in head._fields) > 1:
            raise BadMessage(400, "duplicate_max_forwards", offset)
        if not 0 < len(forwards) <= 9 or not forwards.isdigit():
            raise BadMessage(400, "bad_max_forwards", offset)
        head.max_forwards = int(forwards)


def _judge_response(head: ResponseHead, offset: int, head_only: bool) -> None:
    _judge_head(head, offset, 502)
    if head_only or head.status < 200 or head.status in (204, 304):
        head.body = NONE
    elif head.chunked:
        head.body = CHUNKED
    elif head.content_length >= 0:
        head.body = LENGTH if head.content_length else NONE
    else:
        head.body = CLOSE
        head.keep_alive = False


def _authority_port(authority: bytes) -> int:
    """The port of a host[:port], 0 when it has none, -1 when the text is not an authority we accept.

    Narrower than RFC 3986: no userinfo, no percent-encoding, no sub-delims, no empty label, no empty or zero port.
    """
    if authority[:1] == b"[":
        close = authority.find(b"]")
        if close < 0 or not _is_ipv6(authority[1:close]):
            return -1
        rest = authority[close + 1 :]
    else:
        stop = _run(authority, 0, len(authority), _HOST)
        if not _is_name(authority[:stop]):
            return -1
        rest = authority[stop:]
    if not rest:
        return 0
    digits = rest[1:]
    if rest[0] != 0x3A or not 0 < len(digits) <= 5 or not digits.isdigit() or not 0 < int(digits) < 65536:
        return -1
    return int(digits)


def _is_name(name: bytes) -> bool:
    labels = name.removesuffix(b".").split(b".")
    return len(name) <= 255 and all(0 < len(label) <= 63 for label in labels)


def _is_ipv6(text: bytes) -> bool:
    if not text or len(text) > 45 or any(byte not in _HEX and byte not in b":." for byte in text):
        return False
    try:
        ipaddress.IPv6Address(text.decode("ascii"))
    except ValueError:
        return False
    return True


def split_authority(authority: str) -> tuple[str, int | None]:
    """(host, port or None) of ``host[:port]``: lower-case, without trailing dot; an IPv6 literal without brackets.

    Only a canonical dotted quad or a bracketed literal can become an address later: ``0x7f.1``, ``2130706433`` and
    ``0177.0.0.1`` come back as the names they are. Raises BadMessage (400, "bad_authority").
    """
    try:
        raw = authority.encode("ascii")
    except UnicodeEncodeError:
        raise BadMessage(400, "bad_authority") from None
    port = _authority_port(raw)
    if port < 0:
        raise BadMessage(400, "bad_authority")
    if raw[:1] == b"[":
        host = str(ipaddress.IPv6Address(authority[1 : authority.index("]")]))
    else:
        host = authority.partition(":")[0].lower().removesuffix(".")
    return host, port or None


class BodyFramer:
    """Follows one body over the bytes that carry it and never looks past its end.

    kind: NONE, LENGTH, CHUNKED or CLOSE; length: bytes, for LENGTH; status: of the BadMessage that bad chunked
    framing raises (400 for a request, 502 for a response). done: the whole body has been seen (never for CLOSE).
    After ``feed``, ``cleaned`` is None when the bytes consumed may be forwarded as they are, else what to forward in
    their place: extensions and trailers are cut out (RFC 9112 7.1.1, 7.1.2). After ``payload``, ``end`` is the
    offset after the last byte consumed.
    """

    __slots__ = ("_digits", "_overhead", "_state", "cleaned", "done", "end", "kind", "left", "status")

    def __init__(self, kind: int, length: int = 0, status: int = 400) -> None:
        self.kind = kind
        self.status = status
        self.left = length if kind == LENGTH else 0
        self.done = kind == NONE or (kind == LENGTH and length == 0)
        self.cleaned: bytes | None = None
        self.end = 0
        self._state = _SIZE
        self._digits = 0
        self._overhead = 0

    def feed(self, data: bytes, start: int = 0) -> int:
        """Consumes from ``start``; gives the offset after the body or len(data). Raises BadMessage."""
        self.cleaned = None
        if self.kind == CHUNKED:
            kept, dropped = self._chunks(data, start, False)
            if dropped:
                self.cleaned = b"".join(kept)
            return self.end
        return self._plain(data, start)

    def payload(self, data: bytes, start: int = 0) -> bytes:
        """As ``feed``, but gives the content itself, without chunk framing."""
        if self.kind == CHUNKED:
            kept, _ = self._chunks(data, start, True)
            return b"".join(kept)
        self.end = self._plain(data, start)
        return data[start : self.end]

    def _plain(self, data: bytes, start: int) -> int:
        if self.done:
            return start
        if self.kind == CLOSE:
            return len(data)
        taken = min(self.left, len(data) - start)
        self.left -= taken
        self.done = self.left == 0
        return start + taken

    def _chunks(self, data: bytes, start: int, content: bool) -> tuple[list[bytes], bool]:
        """Runs of bytes to keep (the content, or the framing that is forwarded) and whether anything was dropped."""
        kept: list[bytes] = []
        dropped = False
        here = run = start
        end = len(data)
        while here < end and not self.done:
            if self._state == _DATA:
                taken = min(self.left, end - here)
                if content:
                    kept.append(data[here : here + taken])
                here += taken
                self.left -= taken
                if self.left == 0:
                    self._state = _DATA_CR
                continue
            before = self._state
            self._step(data[here])
            if self._state in _DROPPING or before == _T_LF:
                if not content:
                    if run < here:
                        kept.append(data[run:here])
                    run = here + 1
                    dropped = True
                self._overhead += 1
                if self._overhead > CHUNK_OVERHEAD_LIMIT:
                    raise BadMessage(self.status, "chunk_overhead")
            here += 1
        if not content and run < here:
            kept.append(data[run:here])
        self.end = here
        return kept, dropped

    def _step(self, byte: int) -> None:
        state = self._state
        if state == _SIZE:
            self._size(byte)
        elif state <= _VALUE_BLANK:
            self._state = _extension(state, byte)
            if self._state < 0:
                raise BadMessage(self.status, "bad_chunk_extension")
        elif state == _SIZE_LF:
            if byte != 10:
                raise BadMessage(self.status, "bad_chunk_size")
            self._digits = 0
            self._state = _DATA if self.left else _TRAILER
        elif state in (_DATA_CR, _DATA_LF):
            if byte != (13 if state == _DATA_CR else 10):
                raise BadMessage(self.status, "bad_chunk_end")
            self._state = _DATA_LF if state == _DATA_CR else _SIZE
        elif state == _END_LF:
            if byte != 10:
                raise BadMessage(self.status, "bad_chunk_end")
            self.done = True
        else:
            self._state = _trailer(state, byte)
            if self._state < 0:
                raise BadMessage(self.status, "bad_trailer")

    def _size(self, byte: int) -> None:
        digit = _HEX.get(byte)
        if digit is not None:
            self._digits += 1
            self.left = self.left * 16 + digit
            if self._digits > CHUNK_SIZE_DIGITS:
                raise BadMessage(self.status, "bad_chunk_size")
        elif self._digits and byte == 13:
            self._state = _SIZE_LF
        elif self._digits and byte == 0x3B:
            self._state = _NAME_START
        elif self._digits and byte in _BLANK:
            self._state = _SIZE_BLANK
        else:
            raise BadMessage(self.status, "bad_chunk_size")


# States of the chunked framing; those from _SIZE_BLANK to _VALUE_BLANK and of a trailer line produce no output.
(
    _SIZE,
    _SIZE_BLANK,
    _NAME_START,
    _NAME,
    _NAME_BLANK,
    _VALUE_START,
    _VALUE,
    _QUOTED,
    _ESCAPED,
    _QUOTE_END,
    _VALUE_BLANK,
    _SIZE_LF,
    _DATA,
    _DATA_CR,
    _DATA_LF,
    _TRAILER,
    _T_NAME,
    _T_VALUE,
    _T_LF,
    _END_LF,
) = range(20)
_DROPPING = frozenset({*range(_SIZE_BLANK, _SIZE_LF), _T_NAME, _T_VALUE, _T_LF})


def _extension(state: int, byte: int) -> int:
    """The next state inside chunk-ext (RFC 9112 7.1.1, with BWS only where the grammar has it); -1 is an error."""
    blank = byte in _BLANK
    if state == _SIZE_BLANK or state == _VALUE_BLANK:
        return state if blank else _NAME_START if byte == 0x3B else -1
    if state == _NAME_START:
        return state if blank else _NAME if byte in TOKEN else -1
    if state == _NAME and byte in TOKEN or state == _NAME_BLANK and blank:
        return state
    if state in (_NAME, _NAME_BLANK) and byte == 0x3D:
        return _VALUE_START
    if state == _VALUE_START:
        return state if blank else _QUOTED if byte == 0x22 else _VALUE if byte in TOKEN else -1
    if state == _VALUE and byte in TOKEN:
        return state
    if state == _QUOTED:
        if byte in _BAD_VALUE:
            return -1
        return _QUOTE_END if byte == 0x22 else _ESCAPED if byte == 0x5C else state
    if state == _ESCAPED:
        return -1 if byte in _BAD_VALUE else _QUOTED
    if byte == 0x3B:
        return _NAME_START
    if state == _NAME_BLANK:
        return -1
    if blank:
        return _NAME_BLANK if state == _NAME else _VALUE_BLANK
    return _SIZE_LF if byte == 13 else -1


def _trailer(state: int, byte: int) -> int:
    """The next state inside the trailer section; -1 is an error."""
    if state == _TRAILER:
        return _END_LF if byte == 13 else _T_NAME if byte in TOKEN else -1
    if state == _T_NAME:
        return state if byte in TOKEN else _T_VALUE if byte == 0x3A else -1
    if state == _T_VALUE:
        return _T_LF if byte == 13 else -1 if byte in _BAD_VALUE else state
    return _TRAILER if byte == 10 else -1


def chunk(data: bytes) -> bytes:
    """``data`` (not empty) as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def request_bytes(
    head: RequestHead,
    target: str | None,
    host: str | None,
    edits: Mapping[str, str | None] | Prepared | None,
    framing: int,
    expect: bool,
    upgrade: bool,
    via: bytes,
    data: bytes,
    start: int,
    stop: int,
) -> bytes:
    """The head to send upstream, followed by ``data[start:stop]``, as one bytes object.

    target, host: None takes the origin form of the request's own target and its own authority. framing: a
    Content-Length, NO_FRAMING or CHUNKED_FRAMING. expect, upgrade: keep those fields. edits: fields to set, None
    removes. Raises ValueError for edits of framing or connection fields, for text that cannot stand in a head, and
    when there is no host at all (HTTP/1.0 without Host).
    """
    changes = _changes(edits)
    authority = head._authority if host is None else _word(host, "host")
    if authority is None:
        raise ValueError("host is needed: the request has none")
    line = _origin_form(head) if target is None else _word(target, "target")
    out = [head._method, b" ", line, b" HTTP/1.1\r\nHost: ", authority, b"\r\n"]
    for name, value, kind in head._fields:
        if K_HOST <= kind <= K_LENGTH or kind == K_DROPPED or (kind == K_EXPECT and not expect):
            continue
        if name.lower() in changes:
            continue
        if kind == K_MAX_FORWARDS and head.max_forwards > 0:
            value = b"%d" % (head.max_forwards - 1)
        out += [name, b": ", value, b"\r\n"]
    out.append(_framing_field(framing))
    if upgrade and head.upgrade:
        out += [b"Connection: upgrade\r\nUpgrade: ", head.upgrade.encode("ascii"), b"\r\n"]
    for change in changes.values():
        if change is not None:
            out.append(change)
    version = b"2.0" if head.http2 else b"1.%d" % head.minor
    out += [b"Via: ", version, b" ", via, b"\r\n\r\n", data[start:stop]]
    return b"".join(out)


def response_bytes(
    head: ResponseHead, framing: int, connection: int, via: bytes, data: bytes, start: int, stop: int
) -> bytes:
    """The head to send to the agent, followed by ``data[start:stop]``, as one bytes object.

    framing as in ``request_bytes``; connection: SILENT, CLOSING, KEEPING or UPGRADING.
    """
    out = [b"HTTP/1.1 %d " % head.status, head._reason, b"\r\n"]
    for name, value, kind in head._fields:
        if K_CONNECTION <= kind <= K_UPGRADE or kind in (K_LENGTH, K_DROPPED):
            continue
        out += [name, b": ", value, b"\r\n"]
    out.append(_framing_field(framing))
    if connection == UPGRADING and head.upgrade:
        out += [b"Connection: upgrade\r\nUpgrade: ", head.upgrade.encode("ascii"), b"\r\n"]
    else:
        out.append(_CONNECTION[connection])
    version = b"2.0" if head.http2 else b"1.%d" % head.minor
    out += [b"Via: ", version, b" ", via, b"\r\n\r\n", data[start:stop]]
    return b"".join(out)


_CONNECTION = (b"", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"")


def _framing_field(framing: int) -> bytes:
    if framing >= 0:
        return b"Content-Length: %d\r\n" % framing
    return b"Transfer-Encoding: chunked\r\n" if framing == CHUNKED_FRAMING else b""


class Prepared:
    """Edits that many requests get, checked and written out once. Raises ValueError as ``request_bytes`` does."""

    __slots__ = ("changes",)

    def __init__(self, edits: Mapping[str, str | None]) -> None:
        self.changes = _changes(edits)


def _changes(edits: Mapping[str, str | None] | Prepared | None) -> dict[bytes, bytes | None]:
    """Lower-case names of edited fields -> the line to write, None to leave the field out."""
    if isinstance(edits, Prepared):
        return edits.changes
    changes: dict[bytes, bytes | None] = {}
    for name, value in (edits or {}).items():
        if name.lower() in UNEDITABLE:
            raise ValueError(f"edits may not set {name}")
        changes[name.lower().encode("latin-1", "replace")] = None if value is None else field_line(name, value)
    return changes


def _word(text: str | bytes, what: str) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("latin-1", "replace")
    if not raw or any(not 32 < byte < 127 for byte in raw):
        raise ValueError(f"{what} cannot stand in a request head")
    return raw


def field_line(name: str, value: str) -> bytes:
    """``name: value`` with its CRLF. Raises ValueError for what cannot stand in a head; never shows the value."""
    raw = name.encode("latin-1", "replace")
    if not raw or any(byte not in TOKEN for byte in raw):
        raise ValueError("a field name is not a token")
    try:
        content = value.strip(" \t").encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"the value of {name} is not latin-1") from None
    if any(byte in _BAD_VALUE for byte in content):
        raise ValueError(f"the value of {name} has a control character")
    return b"%b: %b\r\n" % (raw, content)


def plain_response(
    status: int, headers: Sequence[tuple[str, str]], body: bytes, connection: int = SILENT, head_only: bool = False
) -> bytes:
    """A whole response of our own: status line, Date, ``headers``, Content-Length and the body.

    head_only: the answer to HEAD, with the length but without the body. 204 and 304 carry neither.
    """
    out = [b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b"Unknown")), _date()]
    out += [field_line(name, value) for name, value in headers]
    bodiless = status < 200 or status in (204, 304)
    if not bodiless:
        out.append(_framing_field(len(body)))
    out += [_CONNECTION[connection], b"\r\n"]
    if not bodiless and not head_only:
        out.append(body)
    return b"".join(out)


_last_date = (0, b"")


def _date() -> bytes:
    global _last_date
    now = int(time.time())
    if _last_date[0] != now:
        _last_date = (now, b"Date: %b\r\n" % formatdate(now, usegmt=True).encode())
    return _last_date[1]


def now_ns() -> int:
    """Monotonic nanoseconds, the clock of every fact on an exchange."""
    return time.monotonic_ns()
