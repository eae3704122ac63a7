"""The wire format: strict in what is taken, exact in what is given."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_proxy.dns.message import (
    AAAA,
    A,
    Malformed,
    Rcode,
    encode_error,
    encode_query,
    encode_reply,
    parse_answer,
    parse_query,
)

from .dns_lab import CNAME, question, read_reply, record, wire_name

ADDRESS = ipaddress.ip_address("93.184.216.34")


def answer(*records: bytes, ident: int = 9, name: str = "a.test", kind: int = A, flags: int = 0x8180) -> bytes:
    head = struct.pack(">HHHHHH", ident, flags, 1, len(records), 0, 0)
    return head + wire_name(name) + struct.pack(">HH", kind, 1) + b"".join(records)


def test_question_is_read_in_lower_case_and_echoed_as_it_came() -> None:
    query = parse_query(question("aPi.AllOwed.TeST", AAAA, ident=0xBEEF))
    assert (query.name, query.kind, query.id) == ("api.allowed.test", AAAA, 0xBEEF)
    reply = encode_reply(query, Rcode.NOERROR, [ipaddress.ip_address("2001:db8::1")], 30, limit=512)
    assert read_reply(reply).question == question("aPi.AllOwed.TeST", AAAA)[12:]
    assert read_reply(reply).ident == 0xBEEF
    assert read_reply(reply).addresses == ["2001:db8::1"]


@pytest.mark.parametrize(("offered", "size"), [(None, 512), (100, 512), (1000, 1000), (65535, 1232)])
def test_udp_size_is_what_the_client_offers_within_bounds(offered: int | None, size: int) -> None:
    assert parse_query(question("a.test", edns=offered)).size == size


def test_answer_that_does_not_fit_says_so_and_carries_nothing() -> None:
    query = parse_query(question("a.test"))
    many = [ipaddress.ip_address(0x5DB8D800 + n) for n in range(200)]
    reply = read_reply(short := encode_reply(query, Rcode.NOERROR, many, 1, limit=512))
    assert len(short) <= 512 and reply.truncated and reply.addresses == []
    assert len(read_reply(encode_reply(query, Rcode.NOERROR, many, 1, limit=65535)).addresses) == 200


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (b"", None),
        (b"\0" * 11, None),
        (question("a.test", flags=0x8180), None),
        (question("a.test", flags=0x2800), Rcode.NOTIMP),
        (b"\0\7\1\0\0\2" + question("a.test")[6:], Rcode.FORMERR),
        (b"\0\7\1\0\0\0" + question("a.test")[6:], Rcode.FORMERR),
        (b"\0\7\1\0\0\1\0\1" + question("a.test")[8:], Rcode.FORMERR),
        (question("a.test")[:-1], Rcode.FORMERR),
        (question("a.test") + b"x", Rcode.FORMERR),
        (question("a.test", edns=1232) + b"x", Rcode.FORMERR),
        (question("a.test")[:12] + b"\xc0\x0c\0\1\0\1", Rcode.FORMERR),
        (question("a.test")[:12] + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", Rcode.FORMERR),
        (question(".".join(["abcdefghi"] * 26)), Rcode.FORMERR),
    ],
)
def test_other_messages_are_refused_or_ignored(data: bytes, rcode: Rcode | None) -> None:
    with pytest.raises(Malformed) as caught:
        parse_query(data)
    assert caught.value.rcode is rcode
    if rcode is not None:
        reply = read_reply(encode_error(data, rcode))
        assert (reply.ident, reply.rcode) == (7, rcode)


def test_bytes_no_host_name_has_are_escaped() -> None:
    data = question("x")[:12] + b"\x04a.\0\\" + b"\0\0\1\0\1"
    assert parse_query(data).name == "a\\046\\000\\092"


def test_aliases_are_followed_within_the_answer() -> None:
    found = parse_answer(
        answer(
            record("c.test", A, 300, "93.184.216.34"),
            record("a.test", CNAME, 20, "b.test"),
            record("b.test", CNAME, 100, "c.test"),
            record("other.test", A, 300, "10.0.0.1"),
        ),
        9, "a.test", A,
    )  # fmt: skip
    assert (found.addresses, found.alias, found.ttl_s) == ((ADDRESS,), None, 20)


def test_alias_without_its_address_is_left_to_ask() -> None:
    found = parse_answer(answer(record("a.test", CNAME, 20, "b.test")), 9, "a.test", A)
    assert (found.addresses, found.alias) == ((), "b.test")


def test_alias_loop_is_malformed() -> None:
    loop = answer(record("a.test", CNAME, 1, "b.test"), record("b.test", CNAME, 1, "a.test"))
    with pytest.raises(Malformed, match="aliases"):
        parse_answer(loop, 9, "a.test", A)


@pytest.mark.parametrize(
    "data",
    [
        answer(record("a.test", A, 1, "10.0.0.1"), ident=8),
        answer(record("a.test", A, 1, "10.0.0.1"), name="b.test"),
        answer(record("a.test", A, 1, "10.0.0.1"), kind=AAAA),
        answer(record("a.test", A, 1, "10.0.0.1"), flags=0x0100),
        answer(record("a.test", A, 1, "10.0.0.1"))[:-1],
        answer(b"\xc0\xff" + record("a.test", A, 1, "10.0.0.1")[8:]),
        answer(b"\xc0\x18" + struct.pack(">HHIH", A, 1, 1, 4) + b"\0\0\0\0"),
        answer(record("a.test", A, 1, "::1")),
    ],
)
def test_answers_to_something_else_are_not_believed(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_answer(data, 9, "a.test", A)


@given(st.binary(max_size=200))
def test_garbage_from_clients_is_malformed_and_nothing_else(data: bytes) -> None:
    try:
        parse_query(data)
    except Malformed as error:
        if error.rcode is not None:
            assert len(encode_error(data, error.rcode)) == 12


@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=4))
def test_damaged_answers_are_malformed_and_nothing_else(tail: bytes, at: int, damage: bytes) -> None:
    whole = answer(record("a.test", CNAME, 1, "b.test"), record("b.test", A, 1, "93.184.216.34"))
    for data in (whole[:at] + damage + whole[at + len(damage) :], whole[:at] + tail, answer(tail)):
        try:
            parse_answer(data, 9, "a.test", A)
        except Malformed:
            continue


@given(st.from_regex(r"[a-z0-9]{1,20}(\.[a-z0-9]{1,20}){0,4}", fullmatch=True), st.integers(0, 65535))
def test_what_is_asked_is_what_is_parsed(name: str, ident: int) -> None:
    query = parse_query(encode_query(ident, name, A))
    assert (query.id, query.name, query.kind, query.edns) == (ident, name, A, True)


@pytest.mark.parametrize("name", ["", "a..test", "a" * 64, ".".join(["abcdefghi"] * 26)])
def test_what_has_no_wire_form_is_not_asked(name: str) -> None:
    with pytest.raises(ValueError):
        encode_query(1, name, A)
