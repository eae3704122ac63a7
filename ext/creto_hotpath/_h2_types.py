"""What both HTTP/2 framings share: the kinds of events and the one error."""

from __future__ import annotations

HEADERS, DATA, END, CLOSED, ENDED, GOAWAY, SETTINGS = range(7)


class SessionError(Exception):
    """The connection cannot go on; what is left to send ends in GOAWAY. reason: snake_case; code: of RFC 9113."""

    def __init__(self, reason: str, code: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
