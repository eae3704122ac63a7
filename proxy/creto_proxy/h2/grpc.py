"""How a gRPC client sees an answer of creto's own: HTTP 200 and a status in the head ("Trailers-Only").

gRPC libraries print ``grpc-message`` and act on ``grpc-status``; the problem document that others get would be lost.
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md and doc/statuscodes.md.
"""

from __future__ import annotations

from typing import Any

import msgspec

from creto_hotpath.http1 import ResponseHead

Pair = tuple[bytes, bytes]

(
    OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
    RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS,
    UNAUTHENTICATED,
) = range(17)  # fmt: skip

STATUS = {
    400: INTERNAL,
    401: UNAUTHENTICATED,
    403: PERMISSION_DENIED,
    404: UNIMPLEMENTED,
    407: UNAUTHENTICATED,
    408: DEADLINE_EXCEEDED,
    413: RESOURCE_EXHAUSTED,
    421: PERMISSION_DENIED,
    428: FAILED_PRECONDITION,
    429: RESOURCE_EXHAUSTED,
    431: RESOURCE_EXHAUSTED,
    500: INTERNAL,
    501: UNIMPLEMENTED,
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: UNAVAILABLE,
}
# An identity that nobody knows is no matter of permission: asking for more of it would not help.
_REASONS = {"unknown_agent": UNAUTHENTICATED}
_METADATA = (("reason", b"creto-reason"), ("request_id", b"creto-request-id"), ("approval_id", b"creto-approval-id"))
_PLAIN = frozenset(range(0x20, 0x7F)) - {0x25}


def refusal(head: ResponseHead, body: bytes) -> list[Pair]:
    """The whole gRPC answer for a response of creto's own."""
    problem = _problem(body)
    reason = str(problem.get("reason", ""))
    status = _REASONS.get(reason, STATUS.get(head.status, UNKNOWN))
    message = str(problem.get("detail") or reason or f"HTTP {head.status}")
    pairs = [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"%d" % status),
        (b"grpc-message", percent(f"creto: {message}")),
    ]
    for key, name in _METADATA:
        value = problem.get(key)
        if value:
            pairs.append((name, percent(str(value))))
    retry = head.headers.get("retry-after")
    if retry is not None:
        pairs.append((b"retry-after", retry.encode("latin-1")))
        # What gRPC's own retry policy honours; a negative number forbids another attempt.
        again = head.headers.get("x-should-retry") != "false" and retry.isdigit()
        pairs.append((b"grpc-retry-pushback-ms", b"%d" % (int(retry) * 1000 if again else -1)))
    return pairs


def _problem(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def percent(text: str) -> bytes:
    """``text`` as grpc-message has it: UTF-8, with everything but plain ASCII percent-encoded."""
    return b"".join(bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in text.encode())
