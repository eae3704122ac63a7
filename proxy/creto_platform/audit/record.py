"""Records to entry bytes and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgpack

from creto_platform.audit.port import ENTRY_LIMIT, ID_BYTES, LogTampered, RecordInvalid

# What survives of a record that is too large for an entry; text is cut to this many characters.
_KEPT = ("id", "who", "dch", "act", "res", "out", "why", "at", "ts")
_KEPT_TEXT = 1024


def encode(record: Mapping[str, Any]) -> bytes:
    """The entry of a record, whatever its length. Raises RecordInvalid."""
    record_id = record.get("id")
    if not isinstance(record_id, bytes) or len(record_id) != ID_BYTES:
        raise RecordInvalid(f"a record needs an id of {ID_BYTES} bytes")
    try:
        entry: bytes = msgpack.packb(dict(record), use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordInvalid(f"record {record_id.hex()}: {error}") from None
    return entry


def check_size(entry: bytes, record: Mapping[str, Any]) -> bytes:
    """The entry when it fits. Raises RecordInvalid."""
    if len(entry) > ENTRY_LIMIT:
        raise RecordInvalid(f"record {record['id'].hex()}: {len(entry)} bytes, an entry has at most {ENTRY_LIMIT}")
    return entry


def cut(entry: bytes, record: Mapping[str, Any]) -> bytes:
    """The entry when it fits, otherwise that of a short record with the SHA-256 and length of the whole one."""
    if len(entry) <= ENTRY_LIMIT:
        return entry
    short: dict[str, Any] = {}
    for name in _KEPT:
        value = record.get(name)
        if isinstance(value, str):
            short[name] = value[:_KEPT_TEXT]
        elif isinstance(value, int) or (isinstance(value, bytes) and len(value) <= 64):
            short[name] = value
    short["cut"] = {"sha256": hashlib.sha256(entry).digest(), "size": len(entry)}
    return encode(short)


def decode(entry: bytes) -> dict[str, Any]:
    """The record in an entry. Raises LogTampered("corrupt") when there is none."""
    try:
        record = msgpack.unpackb(entry, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise LogTampered("corrupt", f"an entry is not a record: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("id"), bytes):
        raise LogTampered("corrupt", "an entry is not a record")
    return record


def record_id(entry: bytes) -> bytes:
    """The id of the record in an entry. Raises LogTampered."""
    found: bytes = decode(entry)["id"]
    return found
