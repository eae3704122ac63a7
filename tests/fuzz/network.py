"""What arrives before any HTTP: DNS messages and the first bytes of TLS."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from creto_proxy.dns.message import (
    AAAA,
    MAX_NAME,
    A,
    Malformed,
    Rcode,
    encode_error,
    encode_reply,
    parse_answer,
    parse_query,
)
from creto_proxy.tls import NEED, BadHello, Hello, parse_client_hello

from .invariants import answer, cuts, forms, prefixes_agree

TLS = forms("tls")
ADDRESSES = (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1"))


def check_dns_query(data: bytes) -> None:
    """A query is one question or refused, and its reply is an answer to exactly that question."""
    try:
        query = parse_query(data)
    except Malformed as error:
        if error.rcode is not None:
            assert encode_error(data, error.rcode)[:2] == data[:2]
        return
    assert len(query.name) <= 4 * MAX_NAME and query.name == query.name.lower() and query.name.isascii()
    assert data[12 : 12 + len(query.question)] == query.question
    for address, kind in zip(ADDRESSES, (A, AAAA), strict=True):
        reply = encode_reply(query, Rcode.NOERROR, [address] * 3, 60, limit=query.size)
        assert len(reply) <= query.size and reply[12 : 12 + len(query.question)] == query.question
        if (query.kind, query.kind_class) == (kind, 1):
            found = parse_answer(reply, query.id, query.name, kind)
            assert found.truncated or (found.addresses, found.ttl_s) == ((address,), 60)


def check_dns_answer(data: bytes) -> None:
    """An answer to the question that it repeats itself gives addresses of the asked kind, or is refused."""
    name, kind = "a.test", A
    if len(data) > 12:
        # Take the question it carries, so that the records behind it are reached.
        question = data[:2] + b"\x01\0\0\x01" + bytes(6) + data[12:]
        for end in range(17, min(len(question), 300) + 1):
            try:
                query = parse_query(question[:end])
            except Malformed:
                continue
            name, kind = query.name, AAAA if query.kind == AAAA else A
            break
    ident = int.from_bytes(data[:2], "big")
    found = answer(parse_answer, data, ident, name, kind, refusals=Malformed)
    if isinstance(found, str):
        return
    assert all(address.version == (4 if kind == A else 6) for address in found.addresses)
    assert len(set(found.addresses)) == len(found.addresses) and 0 <= found.ttl_s < 1 << 31 and 0 <= found.rcode < 16
    assert not (found.addresses and found.alias)


def check_hello(data: bytes) -> None:
    """Every prefix of a ClientHello gives NEED or the answer of the whole, and OpenSSL reads the same server name."""
    prefixes_agree(lambda piece: answer(parse_client_hello, piece, refusals=BadHello), data, silence=NEED)
    hello = answer(parse_client_hello, data, refusals=BadHello)
    if not isinstance(hello, Hello):
        return
    assert hello.sni is None or (hello.sni.isascii() and hello.sni == hello.sni.lower() and len(hello.sni) <= 253)
    names = _openssl_names(data)
    # No entry: OpenSSL had given up on it before.
    for name in names:
        shown = None if name is None else name.lower().removesuffix(".")
        assert shown == hello.sni, (shown, hello)


def check_tls_records(data: bytes) -> None:
    """Records end where the lengths in their headers say, in whatever pieces they come, or are none (RFC 8446, 5.1)."""
    expected = list(_record_ends(data))
    for form in TLS:
        for pieces in cuts(data):
            assert _followed(form, pieces) == expected, (form.__name__, pieces)


def _record_ends(data: bytes) -> Iterator[tuple[int, int]]:
    """(end, length) of each record that is whole; (-1, 0) behind them for what is none."""
    at = 0
    while at < len(data):
        kind, major = data[at], data[at + 1] if len(data) > at + 1 else 3
        length = int.from_bytes(data[at + 3 : at + 5], "big") if len(data) >= at + 5 else 0
        if not 20 <= kind <= 24 or major != 3 or length > 16384 + 2048:
            yield -1, 0
            return
        at += 5 + length
        if at <= len(data):
            yield at, length


def _followed(form: ModuleType, pieces: list[bytes]) -> list[tuple[int, int]]:
    ends: list[tuple[int, int]] = []
    records, before = form.Records(), 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            start = records.follow(piece, start)
            if records.broken:
                return [*ends, (-1, 0)]
            if records.whole:
                ends.append((before + start, records.length))
        before += len(piece)
    return ends


def _openssl_names(data: bytes) -> list[str | None]:
    """What OpenSSL tells a server about the name, as often as it does."""
    names: list[str | None] = []
    incoming = ssl.MemoryBIO()
    incoming.write(data)
    server = _context().wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    server.context.sni_callback = lambda _, name, __: names.append(name)
    try:
        server.do_handshake()
    except (ssl.SSLError, UnicodeError):
        pass
    return names


@cache
def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
