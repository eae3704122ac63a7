"""The JSON-RPC scanner: what it finds, what it refuses, and that both forms and ``json`` agree on any bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import FORMS, Form

CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{"q":[1,{"a":2}]}}}'


@pytest.fixture
def scan(form: Callable[[str], ModuleType]) -> Callable[[bytes], Any]:
    found: Callable[[bytes], Any] = form("jsonrpc").scan
    return found


def test_a_call_gives_its_members_as_written(scan: Callable[[bytes], Any]) -> None:
    found = scan(b" " + CALL.replace(b"search", b"s\\u0065arch") + b"\r\n")
    assert (found.batch, found.flaw) == (False, "")
    [message] = found.messages
    assert (message.jsonrpc, message.id, message.method) == (b'"2.0"', b"1", b'"tools/call"')
    assert (message.params, message.name, message.uri, message.result) == (b"{", b'"s\\u0065arch"', None, None)


def test_names_count_where_they_belong_only(scan: Callable[[bytes], Any]) -> None:
    body = b'{"name":"top","params":{"x":{"name":"deep"},"_meta":{"name":"m","io.modelcontextprotocol/protocolVersion":"2026-07-28"}},"method":"m"}'
    [message] = scan(body).messages
    assert message.name is None and message.meta == b"{" and message.revision == b'"2026-07-28"'


def test_a_batch_is_every_message_in_order(scan: Callable[[bytes], Any]) -> None:
    found = scan(b"[" + CALL + b',{"jsonrpc":"2.0","method":"notifications/cancelled"},{"id":"x","result":{}}]')
    assert found.batch and [m.method for m in found.messages] == [b'"tools/call"', b'"notifications/cancelled"', None]
    assert [m.id for m in found.messages] == [b"1", None, b'"x"'] and found.messages[2].result == b"{"


@pytest.mark.parametrize(
    ("body", "flaw"),
    [
        (b'{"method":"a","method":"b"}', "duplicate_member"),
        (b'{"method":"a","m\\u0065thod":"b"}', "duplicate_member"),
        (b'{"params":{"name":"a","name":"b"}}', "duplicate_member"),
        (b'{"params":{"arguments":{"x":[{"y":1,"y":2}]}}}', "duplicate_member"),
        (b'{"params":{"a":1},"params":{"name":"x"}}', "duplicate_member"),
        ('{"\U0001f600":1,"\\ud83d\\ude00":2}'.encode(), "duplicate_member"),
        (b'{"Method":"tools/call"}', "other_case"),
        ('{"param\u017f":{}}'.encode(), "other_case"),
        (b'{"params":{"NAME":"x"}}', "other_case"),
        (b"[]", "empty_batch"),
        (b"[[" + CALL + b"]]", "not_an_object"),
        (b"[" + CALL + b",1]", "not_an_object"),
        (b'"tools/call"', "not_an_object"),
        (b"[" + b",".join([b"{}"] * 101) + b"]", "too_many_messages"),
    ],
)
def test_what_parsers_may_read_differently_is_a_flaw(scan: Callable[[bytes], Any], body: bytes, flaw: str) -> None:
    assert scan(body).flaw == flaw


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"{}x", b"{}{}", b"{'a':1}", b'{"a":1,}', b"[1,]", b'{"a" 1}', b'{"a":}', b"[NaN]", b"[-Infinity]", b"[01]",
        b"[1.]", b"[+1]", b"[.5]", b"[1e]", b"tru", b'["\x01"]', b'["\\x"]', b'["\\u12g4"]', b'"', b'["a]', b"\xef\xbb\xbf{}",
        b'["\xff"]', b'["\xc0\xaf"]', b'["\xed\xa0\x80"]', b'["\xf4\x90\x80\x80"]', b'["\xe2\x82"]', b"{\x00}", b"// c\n{}", b"]", b"}",
        b"{]", b"[}", b"[" * 129 + b"]" * 129, CALL.decode().encode("utf-16"), b'{"a":1]', b'\x0b{}', b'\xc2\xa0{}',
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused(form: Callable[[str], ModuleType], body: bytes) -> None:
    from creto_hotpath.jsonrpc import NotJson

    with pytest.raises(NotJson):
        form("jsonrpc").scan(body)


def test_nesting_is_read_to_its_limit(scan: Callable[[bytes], Any]) -> None:
    assert scan(b'{"a":' + b"[" * 127 + b"]" * 127 + b"}").flaw == ""


TEXTS = st.sampled_from(["method", "params", "name", "_meta", "id", "Method", "uri", "x", "é\u017f", "\ud800", "\U0001f600", ""])
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)
BYTES = st.lists(
    st.sampled_from([*b'{}[]:,"\\ \n0123-+.eE/', *b"untrfalsm\x00\xc3\xa9\xed\xa0\xf0\x9f"]).map(lambda c: bytes([c]))
    | st.sampled_from([b'"method"', b'"params"', b'"\\u006dethod"', b'"name"', b"true", b"null", b"NaN", b'{"', b'":', b"\\u00", b"\\ud83d", b"\\ude00"]),
    max_size=40,
).map(b"".join)


def strict(body: bytes) -> tuple[bool, bool]:
    """(is JSON, some object has a name twice) as the standard library has it, as strict as it can be made."""
    twice = False

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len(dict(pairs)) != len(pairs)
        return dict(pairs)

    def never(word: str) -> Any:
        raise ValueError(word)

    try:
        json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=never)
    except ValueError:
        return False, False
    return True, twice


def found_by(form: Form, body: bytes) -> Any:
    from creto_hotpath.jsonrpc import NotJson

    try:
        return form("jsonrpc").scan(body)
    except NotJson:
        return NotJson


def mutilated(draw: Any) -> bytes:
    body = bytearray(json.dumps(draw(DOCUMENTS), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 2))] = draw(BYTES)[:4]
    return bytes(body)


@settings(max_examples=400, deadline=None)
@given(body=BYTES | st.composite(mutilated)())
def test_every_form_and_the_standard_library_agree_on_any_bytes(body: bytes) -> None:
    from creto_hotpath.jsonrpc import NotJson

    compiled, *others = (found_by(form, body) for form in FORMS)
    assert others in ([], [compiled])
    is_json, twice = strict(body)
    assert (compiled is not NotJson) == is_json
    if is_json and twice:
        assert compiled.flaw != ""
    if is_json and not twice and compiled.flaw == "":
        value = json.loads(body)
        messages = value if isinstance(value, list) else [value]
        for message, document in zip(compiled.messages, messages, strict=True):
            for name in ("jsonrpc", "id", "method"):
                raw = getattr(message, name)
                assert (raw is None) == (name not in document)
                if raw not in (None, b"{", b"["):
                    assert json.loads(raw) == document[name]


@settings(max_examples=100, deadline=None)
@given(tools=st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_every_message_of_a_batch_is_found(tools: list[str]) -> None:
    calls = [{"jsonrpc": "2.0", "id": n, "method": "tools/call", "params": {"name": t}} for n, t in enumerate(tools)]
    for form in FORMS:
        found = form("jsonrpc").scan(json.dumps(calls).encode())
        assert [json.loads(message.name) for message in found.messages] == tools and found.flaw == ""
