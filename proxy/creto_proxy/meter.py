"""Reserves before the send, watches the answer, settles after it: the meters of all plugins as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from creto_hotpath.http1 import ResponseHead
from creto_hotpath.usage import UsageScanner
from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.hookspecs import Edits, Meter, Tap
from creto_proxy.model import Request, Usage


class GuardedTap:
    """A plugin's tap, within its deadline. One that fails while it only looks has seen enough: the answer goes on
    and its usage is what the meter makes of that; one that rewrites cannot be done without, and breaks the answer."""

    __slots__ = ("_blind", "_guard", "_plugin", "rewrites", "tap")

    def __init__(self, plugin: str, tap: Tap, guard: Guard) -> None:
        self.tap = tap
        self.rewrites = bool(tap.rewrites)
        self._plugin = plugin
        self._guard = guard
        self._blind = False

    def feed(self, data: bytes) -> bytes | None:
        return self._call(self.tap.feed, data)

    def finish(self) -> bytes | None:
        return self._call(self.tap.finish)

    def _call(self, function: Callable[..., bytes | None], *args: bytes) -> bytes | None:
        if self._blind:
            return None
        try:
            return self._guard.call(self._plugin, "meter", function, *args)
        except StageFailed:
            if self.rewrites:
                raise
            self._blind = True
            return None


def guarded(plugin: str, tap: Tap, guard: Guard) -> Tap:
    """A plugin's tap as the relay may call it. What is compiled here neither fails nor hangs and is taken as it is."""
    return tap if type(tap) is UsageScanner else GuardedTap(plugin, tap, guard)


def unguarded(tap: Tap | None) -> Tap | None:
    """The tap that the plugin gave."""
    return tap.tap if isinstance(tap, GuardedTap) else tap


def readable(head: ResponseHead) -> str | None:
    """The media type of an answer that a tap can look into; None for one that nobody here can."""
    if head.status < 200:
        return None
    return _readable(head.get("content-type"), head.get("content-encoding"))


@lru_cache(256)
def _readable(content_type: str | None, encoding: str | None) -> str | None:
    if (encoding or "identity").lower() != "identity":
        return None  # compressed bodies pass unseen; usage is then unknown
    return (content_type or "").partition(";")[0].strip().lower()


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
            try:
                tap = self._guard.call(plugin, "meter", meter.tap, request, status, content_type)
            except StageFailed:
                continue  # the request has been answered and must be paid for: nobody watches, so its usage is unknown
            if tap is not None:
                return guarded(plugin, tap, self._guard)
        return None

    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage:
        """What the request used. A meter that fails leaves the usage unknown; its reservation then stands."""
        usage = Usage()
        watched = unguarded(tap)
        for plugin, meter in self._meters:
            try:
                found = self._guard.call(
                    plugin, "meter", lambda m=meter: m.settle(request, watched, status=status, completed=completed)
                )
            except StageFailed:
                found = Usage(certainty="unknown")
            if usage.certainty == "none":
                usage = found
        return usage
