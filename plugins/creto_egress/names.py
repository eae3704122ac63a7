"""Host names and the patterns that allow or deny them.

Names are compared as A-labels in lower case, label by label from the right. A pattern is a name, or ``*.`` and a
name, which stands for exactly one more label: ``*.wild.test`` matches ``a.wild.test``, and neither ``wild.test`` nor
``a.b.wild.test`` nor ``evilwild.test``.

Source: RFC 1123 section 2.1, RFC 5890 section 2.3.2.1 (A-labels), WHATWG URL "ends in a number checker".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_NAME = 253
ANY_LABEL = "*"


class BadName(ValueError):
    """Text that is not a host name; the message says why."""


def normalise(text: str) -> str:
    """The one spelling of a host name: lower case, without the final dot.

    Raises BadName for what could mean something else to another program: Unicode (write it as ``xn--``), labels that
    look like A-labels and are none, and names ending in a number, which many programs read as an IPv4 address
    (``2852039166``, ``0xa9fea9fe``, ``0251.0376.0251.0376``).
    """
    name = text.removesuffix(".").lower() if text.isascii() else text
    if not name.isascii():
        raise BadName(f"{text!r} is not ASCII; write its labels in their xn-- form")
    if not name or len(name) > _MAX_NAME:
        raise BadName(f"{text[:80]!r} is empty or longer than {_MAX_NAME} characters")
    labels = name.split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise BadName(f"{text[:80]!r} has a label that no host name has: {label[:64]!r}")
        if label.startswith("xn--") and not _is_a_label(label):
            raise BadName(f"{text[:80]!r} has a label that only looks internationalised: {label!r}")
    if _NUMBER.fullmatch(labels[-1]):
        raise BadName(f"{text[:80]!r} ends in a number, so some programs take it for an address")
    return name


def _is_a_label(label: str) -> bool:
    """True when the label decodes to letters and digits, in lower case and NFC, and only so encodes to itself."""
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
        settled = unicodedata.normalize("NFC", decoded.lower()) == decoded
        spoken = all(unicodedata.category(char)[0] in "LMN" or char in "-\u00b7" for char in decoded)
        again = decoded.encode("punycode").decode("ascii") == label[4:]
        return settled and spoken and again and not decoded.isascii()
    except (UnicodeError, ValueError, OverflowError):
        return False


def pattern_labels(text: str) -> tuple[str, ...]:
    """A pattern's labels from the right, the last ``*`` for a wildcard. Raises BadName."""
    if text.startswith("*."):
        return (*reversed(normalise(text[2:]).split(".")), ANY_LABEL)
    if "*" in text:
        raise BadName(f"{text!r}: a wildcard is written '*.' and a name, and stands for one label")
    return tuple(reversed(normalise(text).split(".")))


@dataclass(slots=True)
class _Node(Generic[T]):
    children: dict[str, _Node[T]] = field(default_factory=dict)
    values: list[T] = field(default_factory=list)


class NameTable(Generic[T]):
    """Values by pattern. Looking up is O(labels of the name), however many patterns there are."""

    def __init__(self, entries: Iterable[tuple[str, T]] | Mapping[str, T] = ()) -> None:
        self._root: _Node[T] = _Node()
        for pattern, value in entries.items() if isinstance(entries, Mapping) else entries:
            node = self._root
            for label in pattern_labels(pattern):
                node = node.children.setdefault(label, _Node())
            node.values.append(value)

    def matching(self, name: str) -> Iterator[T]:
        """Values of every pattern that matches a normalised name, exact ones first."""
        *path, last = reversed(name.split("."))
        node = self._root
        for label in path:
            child = node.children.get(label)
            if child is None:
                return
            node = child
        for label in (last, ANY_LABEL):
            child = node.children.get(label)
            if child is not None:
                yield from child.values

    def covering(self, name: str) -> Iterator[T]:
        """As ``matching``, but a wildcard covers any number of labels: what a denial means."""
        node = self._root
        *path, last = reversed(name.split("."))
        for label in path:
            child = node.children.get(label)
            if child is None:
                return
            node = child
            if ANY_LABEL in node.children:
                yield from node.children[ANY_LABEL].values
        child = node.children.get(last)
        if child is not None:
            yield from child.values
