"""What a protocol inside an HTTP request asks for, in the words of policy."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Value: TypeAlias = str | int | bool

# No tool or model has a name this long; the rest of one is left out of records, never of decisions.
_RECORDED = 128


class Call(NamedTuple):
    """One thing that is asked for. action: its Cedar action. resource: what stands in records, e.g. "tool:search".

    attributes: of the policy's context, beside those that every request has.
    """

    action: str
    resource: str
    attributes: tuple[tuple[str, Value], ...] = ()


def recorded(kind: str, name: str) -> str:
    """``kind:name`` as one line that fits a journal, whatever an agent put into the name."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in name[:_RECORDED])
    return f"{kind}:{text}{'…' if len(name) > _RECORDED else ''}"


def resource_of(calls: tuple[Call, ...]) -> str:
    """What the record of the whole request names: each resource once, at most eight of them."""
    names = list(dict.fromkeys(call.resource for call in calls if call.resource))
    return " ".join(names[:8]) + (f" +{len(names) - 8}" if len(names) > 8 else "")
