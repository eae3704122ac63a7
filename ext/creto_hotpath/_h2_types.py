"""What both HTTP/2 framings share: the kinds of events and the one error."""

from __future__ import annotations

HEADERS, DATA, END, CLOSED, ENDED, GOAWAY, SETTINGS, REFUSED = range(8)

# Error codes of RFC 9113 section 7, as reasons.
_NAMES = (
    "no_error",
    "protocol_error",
    "internal_error",
    "flow_control_error",
    "settings_timeout",
    "stream_closed",
    "frame_size_error",
    "refused_stream",
    "cancel",
    "compression_error",
    "connect_error",
    "enhance_your_calm",
    "inadequate_security",
    "http_1_1_required",
)


def reason_of(code: int) -> str:
    """The name of an error code, in snake_case; an unknown one counts as INTERNAL_ERROR (section 7)."""
    return _NAMES[code] if 0 <= code < len(_NAMES) else "internal_error"


class SessionError(Exception):
    """The connection cannot go on; what is left to send ends in GOAWAY. reason: snake_case; code: of RFC 9113."""

    def __init__(self, reason: str, code: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
