"""DNS messages as far as a filter needs them: one question in, addresses out; one question out, addresses in.

Strict both ways. A query must be exactly one question of class IN with at most an OPT record behind it; an answer must
repeat the question that was asked. Names are compared in lower case, and the bytes of a question are echoed as they
came, so that clients which randomise letter case (draft-vixie-dnsext-dns0x20) recognise their question.

Source: RFC 1035 section 4, RFC 6891 (EDNS), RFC 2181 section 9 (truncation).
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from creto_proxy.model import Address

A, CNAME, OPT, AAAA, SVCB, HTTPS = 1, 5, 41, 28, 64, 65
_IN = 1
_HEADER = struct.Struct(">HHHHHH")
_RESPONSE, _TRUNCATED, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0200, 0x0100, 0x0080
_POINTER = 0xC0

CLASSIC_SIZE = 512
# The size all networks carry unfragmented (dnsflagday.net 2020); here it only bounds one datagram on loopback.
EDNS_SIZE = 1232
MAX_NAME = 253
# A chain of aliases longer than this is broken or hostile; common resolvers stop between 8 and 16.
MAX_ALIASES = 8

TYPE_NAMES = {A: "A", CNAME: "CNAME", AAAA: "AAAA", SVCB: "SVCB", HTTPS: "HTTPS", 2: "NS", 6: "SOA", 10: "NULL"} | {
    12: "PTR", 15: "MX", 16: "TXT", 33: "SRV", 251: "IXFR", 252: "AXFR", 255: "ANY"
}  # fmt: skip


class Rcode(enum.IntEnum):
    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class Malformed(ValueError):
    """A message that is not what it must be. ``rcode`` says what to answer; None means not to answer at all."""

    def __init__(self, text: str, rcode: Rcode | None = None) -> None:
        super().__init__(text)
        self.rcode = rcode


@dataclass(frozen=True, slots=True)
class Query:
    """One question. name: lower case without the final dot; question: its bytes as they came; size: of a UDP reply."""

    id: int
    name: str
    kind: int
    kind_class: int
    question: bytes
    recursion: bool = True
    edns: bool = False
    size: int = CLASSIC_SIZE

    @property
    def kind_name(self) -> str:
        """``A``, ``TXT``; ``TYPE1234`` for types without a name here (RFC 3597)."""
        return TYPE_NAMES.get(self.kind, f"TYPE{self.kind}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What an upstream said. addresses: of the asked kind at the end of the aliases; ``alias``: where those ended when
    there was no address. ttl_s: the smallest on the way."""

    rcode: int
    truncated: bool
    addresses: tuple[Address, ...]
    alias: str | None
    ttl_s: int


def parse_query(data: bytes) -> Query:
    """The question of a message from a client. Raises ``Malformed``; nothing else, whatever the bytes."""
    if len(data) < _HEADER.size:
        raise Malformed("shorter than a header")
    ident, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        # Answering an answer is how loops begin.
        raise Malformed("a response, not a query")
    if flags >> 11 & 0xF:
        raise Malformed("not a standard query", Rcode.NOTIMP)
    if (questions, answers, authorities) != (1, 0, 0) or additional > 1:
        raise Malformed("not exactly one question", Rcode.FORMERR)
    labels, end = _plain_name(data, _HEADER.size)
    if end + 4 > len(data):
        raise Malformed("the question is cut off", Rcode.FORMERR)
    kind, kind_class = struct.unpack_from(">HH", data, end)
    question = data[_HEADER.size : end + 4]
    size = _opt_size(data, end + 4) if additional else None
    if size is None and end + 4 != len(data):
        raise Malformed("bytes behind the question", Rcode.FORMERR)
    return Query(
        id=ident,
        name=_text(labels),
        kind=kind,
        kind_class=kind_class,
        question=question,
        recursion=bool(flags & _RECURSION_DESIRED),
        edns=size is not None,
        size=CLASSIC_SIZE if size is None else max(CLASSIC_SIZE, min(size, EDNS_SIZE)),
    )


def is_internet(query: Query) -> bool:
    return query.kind_class == _IN


def _plain_name(data: bytes, at: int) -> tuple[list[bytes], int]:
    """The labels of an uncompressed name and where it ends; a question has nothing before it to point to."""
    labels: list[bytes] = []
    total = 0
    while True:
        if at >= len(data):
            raise Malformed("the name is cut off", Rcode.FORMERR)
        length = data[at]
        at += 1
        if length == 0:
            return labels, at
        if length > 63 or at + length > len(data):
            raise Malformed("a label is too long", Rcode.FORMERR)
        total += length + 1
        if total > MAX_NAME + 1:
            raise Malformed("the name is too long", Rcode.FORMERR)
        labels.append(data[at : at + length])
        at += length


def _opt_size(data: bytes, at: int) -> int:
    """UDP size offered by the OPT record at ``at``, which must be the rest of the message."""
    if len(data) < at + 11 or data[at] != 0:
        raise Malformed("the additional record is cut off", Rcode.FORMERR)
    kind, size, _, length = struct.unpack_from(">HHIH", data, at + 1)
    if kind != OPT or at + 11 + length != len(data):
        raise Malformed("the additional record is not OPT", Rcode.FORMERR)
    return int(size)


def _text(labels: Sequence[bytes]) -> str:
    """Presentation form in lower case; bytes that no host name has are escaped (RFC 4343), so they match no rule."""
    return ".".join(
        "".join(chr(b) if 0x21 <= b <= 0x7E and b not in b".\\" else f"\\{b:03d}" for b in label.lower())
        for label in labels
    )


def encode_reply(query: Query, rcode: Rcode, addresses: Sequence[Address] = (), ttl_s: int = 0, *, limit: int) -> bytes:
    """The answer to ``query``; truncated to no records, with TC set, when it would exceed ``limit`` bytes."""
    kind = {4: A, 6: AAAA}
    records = b"".join(
        b"\xc0\x0c" + struct.pack(">HHIH", kind[a.version], _IN, ttl_s, len(a.packed)) + a.packed for a in addresses
    )
    extension = b"\0" + struct.pack(">HHIH", OPT, EDNS_SIZE, 0, 0) if query.edns else b""
    count, truncated = len(addresses), 0
    if _HEADER.size + len(query.question) + len(records) + len(extension) > limit:
        records, count, truncated = b"", 0, _TRUNCATED
    flags = _RESPONSE | _RECURSION_AVAILABLE | truncated | rcode | (_RECURSION_DESIRED if query.recursion else 0)
    header = _HEADER.pack(query.id, flags, 1, count, 0, 1 if extension else 0)
    return header + query.question + records + extension


def encode_error(data: bytes, rcode: Rcode) -> bytes:
    """An answer to a message that could not be parsed: its id and the rcode, nothing else of it."""
    opcode = data[2] & 0x78
    return data[:2] + bytes((0x80 | opcode, rcode)) + bytes(8)


def encode_query(ident: int, name: str, kind: int) -> bytes:
    """A question for an upstream, with EDNS. Raises ValueError for names that have no wire form."""
    labels = [label.encode("ascii") for label in name.split(".")]
    if len(name) > MAX_NAME or not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"{name!r} is not a host name")
    wire = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    header = _HEADER.pack(ident, _RECURSION_DESIRED, 1, 0, 0, 1)
    extension = b"\0" + struct.pack(">HHIH", OPT, EDNS_SIZE, 0, 0)
    return header + wire + struct.pack(">HH", kind, _IN) + extension


def parse_answer(data: bytes, ident: int, name: str, kind: int) -> Answer:
    """What an upstream answered to ``encode_query(ident, name, kind)``.

    Only records that follow from the question count: addresses of the name itself, or of where its aliases lead.
    Raises ``Malformed`` for anything that is not an answer to exactly this question.
    """
    if len(data) < _HEADER.size:
        raise Malformed("shorter than a header")
    got, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if got != ident or not flags & _RESPONSE or flags >> 11 & 0xF or questions != 1:
        raise Malformed("not an answer to this question")
    asked, at = _plain_name(data, _HEADER.size)
    if data[at : at + 4] != struct.pack(">HH", kind, _IN) or _text(asked) != name:
        raise Malformed("an answer to another question")
    rcode, truncated = flags & 0xF, bool(flags & _TRUNCATED)
    aliases: dict[str, tuple[str, int]] = {}
    found: dict[str, list[tuple[Address, int]]] = {}
    if not truncated:
        for owner, record_kind, ttl_s, value in _records(data, at + 4, answers):
            if record_kind == CNAME:
                aliases.setdefault(owner, (_text(_name(data, value.start)[0]), ttl_s))
            elif record_kind == kind:
                packed = data[value.start : value.stop]
                if len(packed) != (4 if kind == A else 16):
                    raise Malformed("an address of the wrong length")
                found.setdefault(owner, []).append((ipaddress.ip_address(packed), ttl_s))
    return _follow(rcode, truncated, name, aliases, found)


def _follow(
    rcode: int,
    truncated: bool,
    name: str,
    aliases: dict[str, tuple[str, int]],
    found: dict[str, list[tuple[Address, int]]],
) -> Answer:
    ttls: list[int] = []
    at = name
    for _ in range(MAX_ALIASES + 1):
        if at in found:
            ttls += [ttl for _, ttl in found[at]]
            addresses = tuple(dict.fromkeys(address for address, _ in found[at]))
            return Answer(rcode, truncated, addresses, None, min(ttls))
        if at not in aliases:
            return Answer(rcode, truncated, (), at if at != name else None, min(ttls, default=0))
        at, ttl = aliases[at]
        ttls.append(ttl)
    raise Malformed("too many aliases")


def _records(data: bytes, at: int, count: int) -> Iterator[tuple[str, int, int, range]]:
    """(owner, type, TTL in seconds, place of the value) of ``count`` records of class IN."""
    for _ in range(count):
        labels, at = _name(data, at)
        if at + 10 > len(data):
            raise Malformed("a record is cut off")
        kind, kind_class, ttl_s, length = struct.unpack_from(">HHIH", data, at)
        at += 10
        if at + length > len(data):
            raise Malformed("a record is cut off")
        if kind_class == _IN:
            # RFC 2181 section 8: a TTL with the top bit set is zero.
            yield _text(labels), kind, ttl_s if ttl_s < 1 << 31 else 0, range(at, at + length)
        at += length


def _name(data: bytes, at: int) -> tuple[list[bytes], int]:
    """The labels of a possibly compressed name and where it ends. Pointers must lead backwards, so there is an end."""
    labels: list[bytes] = []
    total = 0
    end: int | None = None
    earliest = at
    while True:
        if at >= len(data):
            raise Malformed("a name is cut off")
        length = data[at]
        if length >= _POINTER:
            if at + 2 > len(data):
                raise Malformed("a pointer is cut off")
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= earliest:
                raise Malformed("a pointer does not lead backwards")
            end = at + 2 if end is None else end
            earliest = at = target
            continue
        at += 1
        if length == 0:
            return labels, at if end is None else end
        if length > 63 or at + length > len(data):
            raise Malformed("a label is too long")
        total += length + 1
        if total > MAX_NAME + 1:
            raise Malformed("a name is too long")
        labels.append(data[at : at + length])
        at += length
