"""Reserves before the send, watches the answer, settles after it: the meters of all plugins as one."""

from __future__ import annotations

from collections.abc import Sequence

from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.hookspecs import Edits, Meter, Tap
from creto_proxy.model import Request, Usage


class Meters:
    """The meter stage. The first meter that wants to watch a response does; usage comes from the one that did."""

    def __init__(self, meters: Sequence[tuple[str, Meter]], guard: Guard) -> None:
        self._meters = tuple(meters)
        self._guard = guard

    def release(self, request: Request) -> None:
        """Gives every reservation back: the request is not sent after all."""
        for plugin, meter in self._meters:
            try:
                self._guard.call(plugin, "meter", meter.release, request)
            except StageFailed:
                continue  # logged by the guard; the reservation falls back by its TTL

    def edits(self, request: Request) -> Edits | None:
        for plugin, meter in self._meters:
            edits = self._guard.call(plugin, "meter", meter.edits, request)
            if edits is not None:
                return edits
        return None

    def tap(self, request: Request, status: int, content_type: str) -> Tap | None:
        for plugin, meter in self._meters:
            tap = self._guard.call(plugin, "meter", meter.tap, request, status, content_type)
            if tap is not None:
                return tap
        return None

    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage:
        """What the request used. A meter that fails leaves the usage unknown; its reservation then stands."""
        usage = Usage()
        for plugin, meter in self._meters:
            try:
                found = self._guard.call(
                    plugin, "meter", lambda m=meter: m.settle(request, tap, status=status, completed=completed)
                )
            except StageFailed:
                found = Usage(certainty="unknown")
            if usage.certainty == "none":
                usage = found
        return usage
