"""msgpack, read strictly: one value has one encoding, so what was parsed is exactly what was signed.

Refused: anything after the value, duplicate map keys, keys that are not short strings, extension types, floating
point, non-minimal integers and lengths, text that is not UTF-8, nesting deeper than ``DEPTH``. Lengths are checked
against the bytes present before anything is allocated, so a hostile header costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import msgpack

Value: TypeAlias = "dict[str, Value] | list[Value] | str | bytes | int | bool | None"

# A delegation body nests map > list of capabilities > map > constraints > list.
DEPTH = 8


class WireError(ValueError):
    """The bytes are not the canonical msgpack encoding of a plain value; the text says why."""


def pack(value: Value) -> bytes:
    """The canonical bytes of ``value`` (maps keep their order)."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes, *, limit: int) -> Value:
    """The value whose canonical encoding is exactly ``data``, at most ``limit`` bytes. Raises WireError."""
    if len(data) > limit:
        raise WireError(f"{len(data)} bytes, the limit is {limit}")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_extension,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limit,
            max_map_len=limit,
            max_ext_len=0,
        )
        _plain(value, DEPTH)
        canonical = msgpack.packb(value, use_bin_type=True)
    except WireError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        # UnpackException is msgpack's own "ran out of bytes"; everything else it raises is a ValueError.
        raise WireError(f"not msgpack: {error or type(error).__name__}") from None
    if canonical != data:
        raise WireError("not the canonical encoding")
    checked: Value = value
    return checked


def _unique(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    result: dict[object, object] = {}
    for key, item in pairs:
        if key in result:
            raise WireError(f"duplicate key {key!r}")
        result[key] = item
    return result


def _no_extension(code: int, data: bytes) -> object:
    raise WireError(f"extension type {code}")


def _plain(value: object, depth: int) -> None:
    if depth == 0:
        raise WireError(f"nested deeper than {DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WireError("a map key is not text")
            _plain(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _plain(item, depth - 1)
    elif value is not None and not isinstance(value, (str, bytes, int, bool)):
        raise WireError(f"a value of type {type(value).__name__}")
