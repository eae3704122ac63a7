"""W3C Trace Context (level 2): the ``traceparent`` that comes with a request, and the one that is sent on.

A malformed one is no trace at all: it is ignored, and passed on as it came, as any other header field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_FIELD: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_SAMPLED: Final = 0x01
# Sampled and random (section 3.2.2.5); bits that this version does not know are not passed on as if it did.
_KNOWN_FLAGS: Final = 0x03

# (trace, request id, edits so far) -> edits with the field that is sent instead, when there is one
Forward = Callable[[str, bytes, "Mapping[str, str | None] | None"], "Mapping[str, str | None] | None"]


def traceparent(values: Sequence[str]) -> str:
    """The one well-formed field value as ``00-TRACE-PARENT-FLAGS``, else "" (section 3.2.2, all of it).

    A later version is read by what this version knows of it.
    """
    if len(values) != 1:
        return ""
    match = _FIELD.fullmatch(values[0])
    if match is None:
        return ""
    version, trace, parent, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return ""
    if trace == "0" * 32 or parent == "0" * 16:
        return ""
    return f"00-{trace}-{parent}-{int(flags, 16) & _KNOWN_FLAGS:02x}"


def sampled(trace: str) -> bool:
    """Whether the caller recorded it; False for no trace."""
    return bool(trace) and bool(int(trace[-2:], 16) & _SAMPLED)


def trace_id(trace: str, request: bytes) -> int:
    """Of the caller's trace; without one a request is a trace of its own, by its id (UUIDv7: 62 random bits at the
    end, where samplers look for them)."""
    return int(trace[3:35], 16) if trace else int.from_bytes(request, "big")


def parent_id(trace: str) -> int:
    """Span of the caller, 0 without one."""
    return int(trace[36:52], 16) if trace else 0


def span_id(request: bytes) -> int:
    """Span of a request: who forwards it and who exports it later need not talk to each other about it."""
    return int.from_bytes(request[8:], "big")  # never 0: UUIDs have a bit set there


def uuid_text(request: bytes) -> str:
    """The id of a request as it is written (RFC 9562 section 4)."""
    text = request.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def forward(trace: str, request: bytes, edits: Mapping[str, str | None] | None) -> Mapping[str, str | None] | None:
    """The edits with creto's own span as the parent, for a trace that is recorded; any other is left alone.

    ``tracestate`` is never touched: a participant that adds nothing to it must pass it on (section 3.3.1.2).
    """
    if not sampled(trace):
        return edits
    return {**(edits or {}), "traceparent": f"{trace[:36]}{span_id(request):016x}{trace[52:]}"}
