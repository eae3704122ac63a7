"""What a path means to the servers that may get it.

A path is sent as the agent spelled it, because signatures cover its bytes. It is judged by its canonical spelling, and
by every other reading that common servers make of it: they resolve ``%2F``, merge ``//``, drop ``;parameters`` and
trailing slashes, take ``\\`` for ``/``, ignore case. What no two servers agree on (dot segments, control characters,
broken escapes) is refused: clients resolve dot segments before they send.

RFC 3986 sections 3.3, 5.2.4 and 6.2.2; the readings are those of nginx, Apache httpd, IIS, Tomcat, Express and WSGI.
"""

from __future__ import annotations

import re

# Whatever has none of these has one spelling and one reading.
_ODD = re.compile(r"[%\\;A-Z]|//|/\.|./$")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_PRINTABLE = re.compile(r"%([2-6][0-9A-Fa-f]|7[0-9A-Ea-e])")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# UTF-8 longer than need be, in which lenient decoders see "/" or "."; and control characters.
_OVERLONG = re.compile(r"%C[01]|%E0%[89]|%F0%8", re.IGNORECASE)
_CONTROL = re.compile(r"%(?:[01][0-9A-F]|7F)", re.IGNORECASE)
_PARAMETERS = re.compile(r";[^/]*")
_SLASHES = re.compile(r"/{2,}")


class AmbiguousPath(ValueError):
    """A path that servers read differently. The text says why and never quotes it."""


def canonical(path: str) -> str:
    """``path`` with unreserved characters unescaped and escapes in upper case. Raises AmbiguousPath."""
    if not _ODD.search(path):
        return path
    if "\\" in path:
        raise AmbiguousPath("it has a backslash")
    text = _ESCAPE.sub(_unescaped, path)
    for reading in readings(text):
        if _OVERLONG.search(reading):
            raise AmbiguousPath("it has overlong UTF-8")
        if _CONTROL.search(reading):
            raise AmbiguousPath("it has a control character")
        if any(segment in (".", "..") for segment in reading.split("/")):
            raise AmbiguousPath("it has a dot segment")
    return text


def readings(path: str) -> tuple[str, ...]:
    """The canonical ``path`` first, then what else servers take it for, without repetition: at most eight."""
    if not _ODD.search(path):
        return (path,)
    once = _resolved(path)
    twice = _resolved(once)  # a server behind a server resolves again
    plain, loose = _loosened(path), _loosened(twice)
    # Some drop parameters before they resolve, some after.
    late = _loosened(_resolved(plain))
    return tuple(dict.fromkeys((path, plain, once, twice, late, _loosened(once), loose, loose.lower())))


def _unescaped(match: re.Match[str]) -> str:
    if match[1] is None:
        raise AmbiguousPath("it has a percent sign that begins no escape")
    code = int(match[1], 16)
    if code < 0x20 or code == 0x7F:
        raise AmbiguousPath("it has a control character")
    return chr(code) if chr(code) in _UNRESERVED else f"%{match[1].upper()}"


def _resolved(path: str) -> str:
    return _PRINTABLE.sub(lambda match: chr(int(match[1], 16)), path)


def _loosened(path: str) -> str:
    text = _PARAMETERS.sub("", path.replace("\\", "/"))
    return _SLASHES.sub("/", text).rstrip("/") or "/"
