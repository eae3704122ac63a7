"""Telling people. What agents wrote is made harmless before it reaches a terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol, TextIO

from creto_oversight.requests import SECOND_NS, ApprovalRequest
from creto_oversight.states import Event


class Notifier(Protocol):
    """Told after the commit. Raises OSError when nobody could be told; that never decides anything."""

    def notify(self, request: ApprovalRequest, event: Event) -> None: ...


class SilentNotifier:
    """For commands, whose user sees what they did."""

    def notify(self, request: ApprovalRequest, event: Event) -> None:
        return None


class StreamNotifier:
    """One line per request on a text stream, standard error as a rule."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def notify(self, request: ApprovalRequest, event: Event) -> None:
        line = _line(request, event)
        if line:
            self._stream.write(f"creto: {line}\n")
            self._stream.flush()


def printable(text: str, limit: int | None = None) -> str:
    """The text with everything a terminal could act on, or the eye not see, written out as an escape.

    That is every character Unicode calls non-printing: C0 and C1 controls (ESC, CR, LF...), bidirectional overrides,
    zero-width characters, odd spaces. The backslash is doubled, so that an escape cannot be faked. limit: characters
    of ``text`` to keep.
    """
    cut = text if limit is None or len(text) <= limit else text[:limit]
    safe = "".join(ch if ch.isprintable() and ch != "\\" else _escape(ch) for ch in cut)
    return safe if cut is text else f"{safe}... ({len(text) - len(cut)} more characters)"


def where(request: ApprovalRequest) -> str:
    """The action in one line: ``POST https://api.example.com/v1/refunds?x=1``; printable."""
    shown = request.shown
    if shown.kind != "http":
        return printable(f"{shown.kind} {shown.host}:{shown.port}")
    host = f"[{shown.host}]" if ":" in shown.host else shown.host
    port = "" if shown.port == {"https": 443, "http": 80}.get(shown.scheme) else f":{shown.port}"
    query = f"?{shown.query}" if shown.query else ""
    return printable(f"{shown.method} {shown.scheme}://{host}{port}{shown.path}{query}", 300)


def utc(at_ns: int) -> str:
    """RFC 3339 with seconds, in UTC."""
    return datetime.fromtimestamp(at_ns // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(request: ApprovalRequest, event: Event) -> str:
    if event in (Event.SUBMITTED, Event.ESCALATED):
        again = " (escalated)" if event is Event.ESCALATED else ""
        who = printable(request.agent, 120)
        return (
            f"approval needed{again}: {request.id} {who} {where(request)} until {utc(request.deadline_ns)}: "
            f"creto approvals approve {request.id}"
        )
    if event is Event.EXPIRED:
        return f"approval timed out: {request.id} {where(request)}"
    if event is Event.LOST:
        return f"outcome unknown: {request.id} {where(request)}: creto approvals acknowledge {request.id}"
    return ""


def _escape(ch: str) -> str:
    code = ord(ch)
    if ch == "\\":
        return "\\\\"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
