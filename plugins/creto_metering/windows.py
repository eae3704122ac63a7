"""When a budget starts again: epoch-aligned periods, and days, weeks and months of a place on earth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

SECOND_NS = 1_000_000_000
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CALENDAR = ("hour", "day", "week", "month")
_PERIOD = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_RATE = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})?([smhd])")


@dataclass(frozen=True, slots=True)
class Window:
    """name: as written ("day", "30m", "total"). kind: "fixed" windows begin at multiples of ``period_ns`` since the
    Unix epoch, "calendar" windows where the clocks of ``zone`` say, "total" never ends."""

    name: str
    kind: Literal["fixed", "calendar", "total"]
    period_ns: int = 0
    zone: str = "UTC"

    def bounds(self, unix_ns: int) -> tuple[int, int]:
        """``(start, end)`` in Unix nanoseconds of the window that contains ``unix_ns``; ``(0, 0)`` for "total".

        A local day has 23 or 25 hours where the clocks change, and a day whose midnight is skipped begins when the
        clocks have changed.
        """
        if self.kind == "total":
            return (0, 0)
        if self.kind == "fixed":
            start = unix_ns - unix_ns % self.period_ns
            return (start, start + self.period_ns)
        zone = ZoneInfo(self.zone)
        now = datetime.fromtimestamp(unix_ns // SECOND_NS, zone)
        if self.name == "hour":
            return _hour(now, unix_ns)
        start_day, end_day = _days(self.name, now)
        return (_midnight_ns(start_day, zone), _midnight_ns(end_day, zone))


def parse_window(name: str, zone: str) -> Window:
    """The window called ``name``: "total", "hour", "day", "week", "month", or a period such as "30m".

    Raises ValueError for anything else, for an unknown zone, and for a zone given to a period.
    """
    if name == "total":
        return Window(name, "total")
    if name in _CALENDAR:
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"timezone {zone!r} is not an IANA zone name such as Europe/Berlin") from None
        if zone == "UTC" and name in ("hour", "day"):
            # The same boundaries without anything to roll: UTC days are multiples of 86,400 s since the epoch.
            return Window(name, "fixed", (3600 if name == "hour" else 86400) * SECOND_NS)
        return Window(name, "calendar", zone=zone)
    match = _PERIOD.fullmatch(name)
    if match is None:
        raise ValueError(f"window {name!r} is none of total, hour, day, week, month, nor a period such as 30m")
    if zone != "UTC":
        raise ValueError(f"window {name!r} is a period since the epoch and has no timezone; use day, week or month")
    return Window(name, "fixed", int(match[1]) * _UNITS_S[match[2]] * SECOND_NS)


def parse_rate(rate: str) -> tuple[int, int]:
    """``(count, period in nanoseconds)`` of a rate such as "60/m" or "5/10s". Raises ValueError."""
    match = _RATE.fullmatch(rate)
    if match is None:
        raise ValueError(f"rate {rate!r} is not a count per period such as 60/m or 5/10s")
    return int(match[1]), int(match[2] or 1) * _UNITS_S[match[3]] * SECOND_NS


def _days(name: str, now: datetime) -> tuple[datetime, datetime]:
    day = datetime(now.year, now.month, now.day)
    if name == "day":
        return day, day + timedelta(days=1)
    if name == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    first = day.replace(day=1)
    return first, (first + timedelta(days=32)).replace(day=1)


def _midnight_ns(day: datetime, zone: ZoneInfo) -> int:
    # fold=0: of two midnights the first; of none, PEP 495 takes the offset before the gap, which is its very end.
    return int(day.replace(tzinfo=zone, fold=0).timestamp()) * SECOND_NS


def _hour(now: datetime, unix_ns: int) -> tuple[int, int]:
    offset = now.utcoffset()
    assert offset is not None  # ``now`` is aware
    local_ns = unix_ns + int(offset.total_seconds()) * SECOND_NS
    start = unix_ns - local_ns % (3600 * SECOND_NS)
    return start, start + 3600 * SECOND_NS


def iso(unix_ns: int) -> str:
    """RFC 3339 in UTC to the second, rounded up so that waiting until then is enough."""
    return datetime.fromtimestamp(-(-unix_ns // SECOND_NS), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
