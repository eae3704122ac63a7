"""JSON bodies and token usage in answers, and what a path means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes
from zlib import crc32

import msgspec

from creto_hotpath.usage import MAX_HELD
from creto_proxy.bodies import AmbiguousBody, json_pointer
from creto_proxy.paths import AmbiguousPath, canonical, readings

from .invariants import answer, cuts, forms, same

FORMS = forms("usage")
DIALECTS = ("openai", "openai-responses", "anthropic")
# Whose answers are not rewritten.
NATIVE = (
    ("gemini", "document"), ("gemini", "events"), ("bedrock", "document"), ("bedrock", "frames"),
    ("cohere", "lines"), ("cohere", "events"), ("ollama", "lines"), ("ollama", "document"),
)  # fmt: skip
POINTERS = ("/model", "/a/model", "/a/0", "", "/a~1b", "/")


def _scan(form: Any, dialect: str, framing: str, strip: bool, parts: list[bytes]) -> Any:
    scanner = form.UsageScanner(dialect, framing, strip)
    out = b""
    for part in parts:
        sent = scanner.feed(part)
        assert (sent is None) == (not strip)
        out += sent or b""
    sent = scanner.finish()
    assert (sent is None) == (not strip)
    return scanner.usage, scanner.model, scanner.final, scanner.last, out + (sent or b"")


def _check_usage(data: bytes, *, sse: bool) -> None:
    kind, data = data[:1], data[1:]
    choice = kind[0] if kind else 0
    dialect, strip = DIALECTS[choice % 3], choice // 3 % 2 == 1
    _check_same(data, dialect, "events" if sse else "document", strip=strip)


def check_usage_native(data: bytes) -> None:
    """Usage of the providers with formats of their own; frames of AWS get the checksums that they should have."""
    kind, data = data[:1], data[1:]
    dialect, framing = NATIVE[(kind[0] if kind else 0) % len(NATIVE)]
    if framing == "frames" and kind[:1] >= b"\x80":
        data = b"".join(_frame(part) for part in data.split(b"\0"))
    _check_same(data, dialect, framing, strip=False)


def _frame(payload: bytes) -> bytes:
    prelude = (len(payload) + 16).to_bytes(4, "big") + bytes(4)
    frame = prelude + crc32(prelude).to_bytes(4, "big") + payload
    return frame + crc32(frame).to_bytes(4, "big")


def _check_same(data: bytes, dialect: str, framing: str, *, strip: bool) -> None:
    answers = [_scan(form, dialect, framing, strip, [data]) for form in FORMS]
    answers.append(_scan(FORMS[0], dialect, framing, strip, [data[:3], data[3:]]))
    answers += [_scan(FORMS[-1], dialect, framing, strip, parts) for parts in cuts(data)]
    usage, model, _, _, out = same(answers, dialect, strip)
    assert isinstance(model, str)
    assert usage is None or all(type(count) is int and count >= 0 for count in usage.values()), usage
    if strip:
        _check_stripped(data, out, sse=framing == "events")


def _check_stripped(data: bytes, out: bytes, *, sse: bool) -> None:
    """Taking usage out may drop events and one member of an event, never add or reorder a byte."""
    if not sse:
        assert out == data
        return
    assert len(data) > MAX_HELD or len(out) <= len(data)
    rest = iter(data)
    assert all(byte in rest for byte in out), out


def check_usage_document(data: bytes) -> None:
    """Usage of one JSON answer. The first byte chooses the dialect and whether the stream is rewritten."""
    _check_usage(data, sse=False)


def check_usage_stream(data: bytes) -> None:
    """Usage of an event stream. The first byte as for a document."""
    _check_usage(data, sse=True)


def check_members(data: bytes) -> None:
    """The outermost members of a JSON object are those that Python's parser finds."""
    found = same([answer(form.object_members, data, refusals=ValueError) for form in FORMS])
    try:
        pairs = json.loads(data, object_pairs_hook=list)
    except (ValueError, RecursionError):
        pairs = None
    if pairs is None or data.lstrip(b" \t\r\n")[:1] != b"{" or data[:3] == b"\xef\xbb\xbf" or b"\0" in data[:4]:
        return
    if isinstance(found, str):
        assert "too deeply" in found, (found, data)
        return
    read = [(json.loads(b'"' + name + b'"'), json.loads(data[at:end])) for name, _, at, end in found]
    assert _plain(read) == _plain([(name, _undo(value)) for name, value in pairs])


def _undo(value: Any) -> Any:
    """Lists of pairs back to dicts: ``json.loads`` of a part gave those."""
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):
            return {name: _undo(item) for name, item in value}
        return [_undo(item) for item in value]
    return value


def _plain(value: Any) -> str:
    # An empty object and an empty array look the same as pairs.
    return json.dumps(value).replace("{}", "[]")


def check_pointer(data: bytes) -> None:
    """A value found is the one, and the only one, that Python's parser finds there. The first byte is the pointer."""
    pointer = POINTERS[(data[0] if data else 0) % len(POINTERS)]
    body = data[1:]
    value = answer(lambda: [json_pointer(body, pointer)], refusals=(AmbiguousBody, ValueError))
    if isinstance(value, str):
        return
    try:
        document = json.loads(body, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return
    other = list(_walk(document, [t.replace("~1", "/").replace("~0", "~") for t in pointer.split("/")[1:]]))
    assert len(other) <= 1, (body, other)
    expected = _settle(other[0]) if other else None
    assert _equal(value[0], expected), (value, expected, body)


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, repeated names included."""


def _walk(value: Any, tokens: list[str]) -> Iterator[Any]:
    """Every value that some parser may take for the one at ``tokens``."""
    if not tokens:
        yield value
    elif isinstance(value, _Pairs):
        for name, item in value:
            if name.casefold() == tokens[0].casefold():
                yield from _walk(item, tokens[1:])
    elif isinstance(value, list) and tokens[0].isascii() and tokens[0].isdigit() and int(tokens[0]) < len(value):
        yield from _walk(value[int(tokens[0])], tokens[1:])


def _settle(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _settle(item) for name, item in value}
    return [_settle(item) for item in value] if isinstance(value, list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return float(one) == float(other)
    return bool(one == other) or msgspec.json.encode(one) == msgspec.json.encode(other)


def check_path(data: bytes) -> None:
    """A path that is accepted has no dot segment for any server, and every server's reading of it is judged."""
    path = "/" + data.decode("latin-1")
    if any(not 0x20 < ord(char) < 0x7F or char in "?#" for char in path):
        return  # not a path of a request target
    text = _canonical(path)
    if text is None:
        return
    assert canonical(text) == text
    assert unquote_to_bytes(text) == unquote_to_bytes(path)
    read = readings(text)
    assert read[0] == text and 1 <= len(read) <= 8 and len(set(read)) == len(read)
    assert not any(_NEVER.search(reading) for reading in read), read
    judged = {_shown(reading.encode()) for reading in read}
    for server, seen in servers(path.encode()):
        assert not {b".", b".."} & set(seen.replace(b"\\", b"/").split(b"/")), (server, path, seen)
        assert _shown(seen) in judged, (server, path, seen, read)


def _canonical(path: str) -> str | None:
    try:
        return canonical(path)
    except AmbiguousPath:
        return None


# Control characters and overlong UTF-8, for whoever resolves escapes once more.
_NEVER = re.compile(r"%([01]|7F|C[01]|E0%[89]|F0%8)", re.I)
# Letters, digits, "-", ".", "_" and "~": escaping these changes nothing (RFC 3986 section 2.3).
_UNRESERVED = re.compile(rb"%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")


def _once(path: bytes) -> bytes:
    return unquote_to_bytes(path)


def _merged(path: bytes) -> bytes:
    return re.sub(rb"/+", b"/", path)


def servers(path: bytes) -> Iterator[tuple[str, bytes]]:
    """What servers take the path for that resolve escapes, merge slashes, drop parameters and ignore case."""
    bare = re.sub(rb";[^/]*", b"", path)
    yield "express", path.lower()
    yield "tomcat", _merged(_once(bare))
    yield "WSGI", _once(path)
    yield "nginx", _merged(_once(path))
    yield "nginx before WSGI", _once(_merged(_once(path)))
    yield "IIS", _merged(_once(path).replace(b"\\", b"/")).lower()
    yield "httpd before IIS", _merged(_once(_once(path)).replace(b"\\", b"/")).lower()


def _shown(path: bytes) -> bytes:
    """A reading as policy compares it: escaped only where it must be, without case, backslashes or idle slashes."""
    plain = _UNRESERVED.sub(lambda match: bytes((int(match[1], 16),)), path)
    slashed = plain.replace(b"\\", b"/")
    escaped = b"".join(b"%%%02X" % byte if byte >= 0x7F else bytes((byte,)) for byte in slashed)
    return _merged(escaped.lower()).rstrip(b"/") or b"/"
