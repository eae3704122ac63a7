"""What both forms of the quota table share: kinds, answers, errors, bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIXED: Final = 1
"""So much per window of ``period_ns``; windows start at multiples of the period since the epoch."""
CALENDAR: Final = 2
"""So much per window whose bounds the caller gives, in UNIX nanoseconds: days and months of some time zone."""
GCRA: Final = 3
"""``limit`` per ``period_ns`` as a steady rate, with ``burst`` more at once (generic cell rate algorithm)."""
TOTAL: Final = 4
"""So much, ever."""
CONCURRENCY: Final = 5
"""So much at the same time: held between reserve and commit or release, never used up."""

KINDS: Final = frozenset({FIXED, CALENDAR, GCRA, TOTAL, CONCURRENCY})
REMOVED: Final = 0x7F

MAX_AMOUNT: Final = (1 << 60) - 1
"""Largest limit and largest single amount. In nano-dollars: 1.15 billion dollars."""
MAX_USED: Final = 1 << 61
MAX_TIME: Final = (1 << 62) - 1
MAX_TOLERANCE_NS: Final = 1 << 61
MAX_METERS: Final = 16
MAX_PAIRS: Final = 48

NO_HOLD: Final = 1
"""The reservation id of a path without quotas: nothing is held, committing or releasing it does nothing."""

CONCURRENCY_RETRY_NS: Final = 1_000_000_000
"""Nobody knows when a holder will finish, so a full concurrency quota says: ask again in a second."""

PATIENCE_NS: Final = 200_000_000
"""How long an operation waits for the table before it gives up and refuses."""


class QuotaTableError(ValueError):
    """The file cannot be used as a quota table; the message names it and says why."""


class QuotaFull(RuntimeError):
    """There is no room for another quota or another reservation. Open the table with more to make it grow."""


class QuotaBusy(TimeoutError):
    """Another living process kept the table longer than ``PATIENCE_NS``: stopped, frozen or being debugged."""


@dataclass(frozen=True, slots=True)
class QuotaState:
    """One quota at one moment, in its own units; times are UNIX nanoseconds, 0 where there is none.

    ``limit - used - reserved`` is what is left; it is negative while a debt is being paid off. For GCRA ``limit`` is
    the number that fits at once (burst + 1), ``used`` includes what is held and ``resets_at_ns`` is when the whole
    burst is available again. ``denied`` counts refusals since the quota was defined.
    """

    limit: int
    used: int
    reserved: int
    window_start_ns: int
    resets_at_ns: int
    denied: int

    @property
    def remaining(self) -> int:
        """What may still be reserved, never below 0."""
        return max(0, self.limit - self.used - self.reserved)


@dataclass(frozen=True, slots=True)
class Definition:
    """A checked definition: the words of a slot that do not depend on its use.

    ``period`` is the window's end for CALENDAR, ``start`` its beginning; tolerance is GCRA's DVT as whole nanoseconds
    and a rest in units of 1 / limit.
    """

    kind: int
    limit: int
    period: int
    start: int
    burst: int
    tolerance_ns: int
    tolerance_frac: int


def checked_definition(kind: int, limit: int, period_ns: int, burst: int, window: tuple[int, int] | None) -> Definition:
    """The definition, or ValueError saying which argument does not suit the kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown quota kind {kind!r}")
    if not 0 <= limit <= MAX_AMOUNT:
        raise ValueError(f"limit must be between 0 and {MAX_AMOUNT}, got {limit}")
    if (window is not None) != (kind == CALENDAR):
        raise ValueError("a CALENDAR quota, and no other, is given its window")
    if burst and kind != GCRA:
        raise ValueError("burst belongs to GCRA")
    if window is not None:
        start, end = window
        if not 0 <= start < end <= MAX_TIME:
            raise ValueError(f"window must be (start_ns, end_ns) with start before end, got {window}")
        return Definition(kind, limit, end, start, 0, 0, 0)
    if kind in (TOTAL, CONCURRENCY):
        return Definition(kind, limit, 0, 0, 0, 0, 0)
    if not 0 < period_ns <= MAX_TIME // 2:
        raise ValueError(f"period_ns must be between 1 and {MAX_TIME // 2}, got {period_ns}")
    if kind == FIXED:
        return Definition(kind, limit, period_ns, 0, 0, 0, 0)
    if limit < 1 or not 0 <= burst < MAX_AMOUNT:
        raise ValueError(f"GCRA needs a limit of at least 1 and a burst of at least 0, got {limit} and {burst}")
    tolerance_ns, tolerance_frac = divmod((burst + 1) * period_ns, limit)
    if tolerance_ns >= MAX_TOLERANCE_NS:
        raise ValueError(f"a burst of {burst} takes longer than {MAX_TOLERANCE_NS} ns to refill")
    return Definition(kind, limit, period_ns, 0, burst, tolerance_ns, tolerance_frac)


def checked_window(start_ns: int, end_ns: int) -> None:
    """Raises ValueError unless the two are a window in UNIX nanoseconds."""
    if not 0 <= start_ns < end_ns <= MAX_TIME:
        raise ValueError(f"window must be (start_ns, end_ns) with start before end, got {(start_ns, end_ns)}")


@dataclass(frozen=True, slots=True)
class Reading:
    """The words of one slot, read while nobody changed them."""

    kind: int
    limit: int
    period: int
    start: int
    used: int
    reserved: int
    denied: int
    burst: int

    def state(self, now_ns: int) -> QuotaState:
        """What the slot says at ``now_ns``; a fixed window that has passed counts as empty."""
        if self.kind == GCRA:
            capacity = self.burst + 1
            tat = self.start + (self.used > 0)
            used = capacity - self._gcra_left(now_ns)
            return QuotaState(capacity, used, 0, 0, tat if tat > now_ns else 0, self.denied)
        if self.kind == FIXED:
            if self.start + self.period <= now_ns:
                start = now_ns - now_ns % self.period
                return QuotaState(self.limit, 0, 0, start, start + self.period, self.denied)
            return QuotaState(self.limit, self.used, self.reserved, self.start, self.start + self.period, self.denied)
        if self.kind == CALENDAR:
            return QuotaState(self.limit, self.used, self.reserved, self.start, self.period, self.denied)
        return QuotaState(self.limit, self.used, self.reserved, 0, 0, self.denied)

    def retry_after_ns(self, amount: int, now_ns: int) -> int:
        """Nanoseconds until ``amount`` may fit: 0 now, -1 never without a change of limit or a refund."""
        if self.kind == GCRA:
            if amount > self.burst + 1:
                return -1
            if not amount:
                return 0
            # new - DVT - now, with everything in units of 1 / limit ns so that nothing is rounded before the end
            ahead = self._gcra_ahead(now_ns) + amount * self.period - (self.burst + 1) * self.period
            return max(0, -(-ahead // self.limit))
        state = self.state(now_ns)
        if not amount or state.used + state.reserved + amount <= self.limit:
            return 0
        if amount > self.limit or self.kind == TOTAL:
            return -1
        if self.kind == CONCURRENCY:
            return CONCURRENCY_RETRY_NS
        return max(0, state.resets_at_ns - now_ns)

    def _gcra_ahead(self, now_ns: int) -> int:
        """How far the theoretical arrival time lies after now, in units of 1 / limit ns."""
        return (self.start - now_ns) * self.limit + self.used if self.start >= now_ns else 0

    def _gcra_left(self, now_ns: int) -> int:
        """floor((DVT - (tat - now)) / E): what fits now; negative under a debt."""
        return ((self.burst + 1) * self.period - self._gcra_ahead(now_ns)) // self.period
