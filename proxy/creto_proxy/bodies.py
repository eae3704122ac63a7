"""Single values out of JSON bodies, read so strictly that every parser of the server must find the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from creto_hotpath.usage import object_members


class AmbiguousBody(ValueError):
    """JSON in which parsers may find different values. The text never quotes the body."""


def json_pointer(body: bytes, pointer: str) -> Any:
    """The value at an RFC 6901 pointer, None when there is none.

    Raises AmbiguousBody when a name on the way occurs twice (the first, the last or both may count, RFC 8259 section
    4) or in another case (Go's and .NET's parsers ignore case), ValueError when the body is not JSON.
    """
    value = body.strip(b" \t\r\n")
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        found = _member(value, key) if value[:1] == b"{" else _element(value, key)
        if found is None:
            return None
        value = found
    return msgspec.json.decode(value)


def members(body: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """The values, as they stand there, of those outermost members of a JSON object that have one of ``names``.

    Raises AmbiguousBody as ``json_pointer`` does, for these names; ValueError when the body is no JSON object.
    """
    wanted = {name.casefold(): name for name in names}
    found: dict[str, bytes] = {}
    for raw, _, start, end in object_members(body):
        text = _text(raw)
        name = wanted.get(text.casefold())
        if name is None:
            continue
        if name != text:
            raise AmbiguousBody("a name that policy decides on is spelled in another case")
        if name in found:
            raise AmbiguousBody("a name that policy decides on occurs twice")
        found[name] = body[start:end]
    return found


def _member(value: bytes, key: str) -> bytes | None:
    names = [(_text(raw), start, end) for raw, _, start, end in object_members(value)]
    alike = [(name, start, end) for name, start, end in names if name.casefold() == key.casefold()]
    if not alike:
        return None
    name, start, end = alike[0]
    if len(alike) > 1:
        raise AmbiguousBody("a name that policy decides on occurs twice")
    if name != key:
        raise AmbiguousBody("a name that policy decides on is spelled in another case")
    return value[start:end]


def _element(value: bytes, key: str) -> bytes | None:
    if value[:1] != b"[":
        msgspec.json.decode(value)
        return None
    elements = msgspec.json.decode(value, type=list[msgspec.Raw])
    return bytes(elements[int(key)]) if key.isascii() and key.isdigit() and int(key) < len(elements) else None


def _text(raw: bytes) -> str:
    return str(msgspec.json.decode(b'"' + raw + b'"'))
