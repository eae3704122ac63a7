"""SPIFFE ids, parsed strictly.

Source: SPIFFE-ID standard, section 2: scheme ``spiffe``, a lower-case trust domain, path segments of letters,
digits, ``.``, ``-`` and ``_``; no port, user info, percent encoding, query or fragment; no empty or dot segment; at
most 2,048 bytes, trust domain at most 255.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ID_LIMIT = 2048
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_SCHEME = "spiffe://"


class BadSpiffeId(ValueError):
    """Not a SPIFFE id; the text says which rule it breaks and never repeats hostile input whole."""


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """trust_domain and path segments; ``str`` gives the id back."""

    trust_domain: str
    segments: tuple[str, ...]

    @property
    def kind(self) -> str:
        """First path segment: "human", "agent", ..."""
        return self.segments[0]

    @property
    def name(self) -> str:
        """Everything after the kind."""
        return "/".join(self.segments[1:])

    def __str__(self) -> str:
        return _SCHEME + "/".join((self.trust_domain, *self.segments))


def parse(text: str) -> SpiffeId:
    """The parsed id; a path is required. Raises BadSpiffeId."""
    if len(text) > ID_LIMIT:
        raise BadSpiffeId(f"a SPIFFE id has at most {ID_LIMIT} bytes, this one has {len(text)}")
    if not text.startswith(_SCHEME):
        raise BadSpiffeId("a SPIFFE id starts with spiffe://")
    trust_domain, *segments = text[len(_SCHEME) :].split("/")
    check_trust_domain(trust_domain)
    if not segments:
        raise BadSpiffeId("a SPIFFE id of a workload has a path")
    for segment in segments:
        check_segment(segment)
    return SpiffeId(trust_domain, tuple(segments))


def make(trust_domain: str, kind: str, name: str) -> SpiffeId:
    """``spiffe://<trust_domain>/<kind>/<name>``. Raises BadSpiffeId."""
    return parse(f"{_SCHEME}{trust_domain}/{kind}/{name}")


def check_trust_domain(text: str) -> None:
    """Raises BadSpiffeId unless ``text`` is a trust domain name."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise BadSpiffeId("a trust domain is 1..255 of a-z 0-9 . _ -, without port or user info")


def check_segment(text: str) -> None:
    """Raises BadSpiffeId unless ``text`` is a path segment."""
    if text in (".", ".."):
        raise BadSpiffeId("a path segment is . or ..")
    if not _SEGMENT.fullmatch(text):
        raise BadSpiffeId("a path segment is one or more of A-Z a-z 0-9 . _ -")
