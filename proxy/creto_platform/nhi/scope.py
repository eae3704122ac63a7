"""Capabilities: which action on which resource under which constraints, and when one is within another.

Actions are dotted names; ``ns.*`` stands for everything below ``ns``. Resources are ``kind:segment/segment``; ``*``
stands for exactly one segment and a final ``**`` for one or more. What is compared is what is enforced: there is one
spelling per resource (ASCII, no percent encoding, no dot segments, no trailing dots, hosts in lower case), every
other spelling is refused instead of normalised.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from creto_platform.wire import Value

_ACTION = re.compile(r"[a-z][A-Za-z0-9_-]*(\.[a-z][A-Za-z0-9_-]*)*", re.ASCII)
_KIND = re.compile(r"[a-z][a-z0-9-]*", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._~@+=-]+", re.ASCII)
_HOST_LABELS = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)
_ACTION_LIMIT = 128
_RESOURCE_LIMIT = 1024
_SEGMENTS_LIMIT = 32

ConstraintValue: TypeAlias = Value


class BadScope(ValueError):
    """Not an action, a resource or a constraint; the text says which rule is broken."""


@dataclass(frozen=True, slots=True)
class Capability:
    """action and resource patterns; constraints by name (see ``CONSTRAINTS``), unknown ones are refused.

    Raises BadScope when constructed from anything that is not in its one spelling.
    """

    action: str
    resource: str
    constraints: Mapping[str, ConstraintValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_action(self.action, pattern=True)
        _parse_resource(self.resource, pattern=True)
        for name, value in self.constraints.items():
            _constraint(name).check(name, value)

    def covers(self, action: str, resource: str) -> bool:
        """Whether a concrete action on a concrete resource is within. Raises BadScope when they are not in form."""
        _check_action(action, pattern=False)
        return _action_within(action, self.action) and _resource_within(
            _parse_resource(resource, pattern=False), _parse_resource(self.resource, pattern=True)
        )

    def within(self, parent: Capability) -> bool:
        """Whether everything this allows, ``parent`` allows: same or narrower action, resource and constraints."""
        return (
            _action_within(self.action, parent.action)
            and _resource_within(
                _parse_resource(self.resource, pattern=True), _parse_resource(parent.resource, pattern=True)
            )
            and all(
                name in self.constraints and _constraint(name).tighter(self.constraints[name], value)
                for name, value in parent.constraints.items()
            )
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """How one kind of constraint is read: is this a value of it, and is the child's as tight as the parent's."""

    valid: Callable[[ConstraintValue], bool]
    tighter: Callable[[ConstraintValue, ConstraintValue], bool]

    def check(self, name: str, value: ConstraintValue) -> None:
        if not self.valid(value):
            raise BadScope(f"constraint {name}: not a value of its kind")


def _is_count(value: ConstraintValue) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _at_most(child: ConstraintValue, parent: ConstraintValue) -> bool:
    return type(child) is int and type(parent) is int and child <= parent


def _set_of(kind: type) -> Callable[[ConstraintValue], bool]:
    def valid(value: ConstraintValue) -> bool:
        return isinstance(value, list) and 0 < len(value) <= 64 and all(type(item) is kind for item in value)

    return valid


def _subset(child: ConstraintValue, parent: ConstraintValue) -> bool:
    return isinstance(child, list) and isinstance(parent, list) and all(item in parent for item in child)


# A constraint that is not here is unknown, and unknown means deny: an old verifier must not widen a new token.
CONSTRAINTS: Mapping[str, Constraint] = {
    "max_cost_nano_usd": Constraint(_is_count, _at_most),
    "max_requests": Constraint(_is_count, _at_most),
    "methods": Constraint(_set_of(str), _subset),
    "ports": Constraint(_set_of(int), _subset),
}


def _constraint(name: str) -> Constraint:
    if name not in CONSTRAINTS:
        raise BadScope("unknown constraint")
    return CONSTRAINTS[name]


def _check_action(action: str, *, pattern: bool) -> None:
    name = action.removesuffix(".*") if pattern else action
    if len(action) > _ACTION_LIMIT or not _ACTION.fullmatch(name):
        raise BadScope("an action is a dotted name, ns.* for everything below ns")


def _action_within(child: str, parent: str) -> bool:
    return child == parent or (parent.endswith(".*") and child.startswith(parent[:-1]))


def _parse_resource(text: str, *, pattern: bool) -> tuple[str, ...]:
    """Kind and segments. Raises BadScope."""
    kind, colon, rest = text.partition(":")
    segments = rest.split("/")
    if len(text) > _RESOURCE_LIMIT or not colon or not _KIND.fullmatch(kind) or len(segments) > _SEGMENTS_LIMIT:
        raise BadScope("a resource is kind:segment/segment")
    for place, segment in enumerate(segments):
        if pattern and (segment == "*" or (segment == "**" and place == len(segments) - 1)):
            continue
        _check_segment(kind, segment)
    return (kind, *segments)


def _check_segment(kind: str, segment: str) -> None:
    if kind == "host":
        if not _HOST_LABELS.fullmatch(segment) and not _is_address(segment):
            raise BadScope("a host is written as lower-case labels without trailing dot, or as a canonical address")
    elif not _SEGMENT.fullmatch(segment) or segment.endswith("."):
        raise BadScope("a resource segment is one or more of A-Z a-z 0-9 . _ ~ @ + = -, not ending in a dot")


def _is_address(text: str) -> bool:
    try:
        return str(ipaddress.ip_address(text)) == text
    except ValueError:
        return False


def _resource_within(child: tuple[str, ...], parent: tuple[str, ...]) -> bool:
    for place, wanted in enumerate(parent):
        if wanted == "**":
            return len(child) > place
        if place >= len(child) or child[place] == "**":
            return False
        if wanted != "*" and wanted != child[place]:
            return False
    return len(child) == len(parent)
