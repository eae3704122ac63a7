"""What the processes of a node hold over time, by role, and whether it grows.

Resident memory without the pages of the journal segment that is mapped for writing: those come and go with the segment,
64 MiB at most, and belong to the page cache. Read from ``/proc/PID/smaps``.

Processes that were there at different times are compared at the same age: a sample counts when every slot has one
worker, none drains, and all of them and their controller are older than a warm-up. What a role then holds is fitted by
a line (Theil-Sen: the median slope of all pairs, which single samples do not move).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.load import tree

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Held:
    """One process. role: "controller", "worker N" with its slot, or "other". age_s: since it was begun. Bytes."""

    role: str
    age_s: float
    resident: int
    journal: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All processes at ``at`` seconds, by process id."""

    at: float
    held: dict[int, Held]

    def by_role(self) -> dict[str, int]:
        """Bytes per role; several of one role together."""
        found: dict[str, int] = {}
        for each in self.held.values():
            found[each.role] = found.get(each.role, 0) + each.resident
        return found

    def settled(self, workers: int, renewed_at: float, warm_s: float) -> bool:
        """Whether nothing was under way that ends by itself. renewed_at: when the controller last became another
        program image, in the seconds of ``at``."""
        roles = sorted(each.role for each in self.held.values())
        wanted = sorted(["controller", *(f"worker {slot}" for slot in range(workers))])
        young = any(each.age_s < warm_s for each in self.held.values())
        return roles == wanted and not young and self.at - renewed_at >= warm_s


@dataclass(frozen=True, slots=True)
class Trend:
    """A fitted line over ``samples`` from ``begin`` to ``end`` (seconds), in bytes at both ends."""

    begin: float
    end: float
    first: float
    last: float
    samples: int

    @property
    def growth(self) -> float:
        return self.last / self.first - 1

    def document(self) -> dict[str, float]:
        return {
            "begin": self.begin,
            "end": self.end,
            "first": self.first,
            "last": self.last,
            "samples": self.samples,
            "growth": self.growth,
        }


def sample(controller: int, at: float) -> Sample:
    """The tree of the controller as it is now."""
    held = {}
    for process in tree(controller):
        with contextlib.suppress(OSError, IndexError):
            resident, journal = _resident(process)
            if resident:  # one that has ended and waits to be reaped holds nothing
                held[process] = Held(_role(process, controller), _age_s(process), resident, journal)
    return Sample(at, held)


def trends(samples: Sequence[Sample]) -> dict[str, Trend]:
    """A line for each role that all of the samples have, and for all of them together; empty for too few."""
    if len(samples) < 5:
        return {}
    found = {}
    roles = set.intersection(*(set(each.by_role()) for each in samples))
    for role in sorted(roles):
        found[role] = _fitted([(each.at, float(each.by_role()[role])) for each in samples])
    found["all processes"] = _fitted([(each.at, float(sum(each.by_role().values()))) for each in samples])
    return found


def _fitted(points: Sequence[tuple[float, float]]) -> Trend:
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x2 > x1]
    slope = statistics.median(slopes)
    start = statistics.median(y - slope * x for x, y in points)
    begin, end = points[0][0], points[-1][0]
    return Trend(begin, end, start + slope * begin, start + slope * end, len(points))


def _resident(process: int) -> tuple[int, int]:
    """(bytes resident but for the journal, bytes of the journal)."""
    total = journal = 0
    for path, kib in _mappings(process):
        if path.endswith(".jnl"):
            journal += kib
        else:
            total += kib
    return total * 1024, journal * 1024


def _mappings(process: int) -> Iterator[tuple[str, int]]:
    path = ""
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name == "Rss:":
            yield path, int(rest.split()[0])
        elif "-" in name and not name.endswith(":"):
            fields = line.split(maxsplit=5)
            path = fields[5] if len(fields) > 5 else ""


def _role(process: int, controller: int) -> str:
    if process == controller:
        return "controller"
    arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    slot = next((each for each in arguments if each.startswith(b"slot=")), b"")
    return f"worker {int(slot[5:])}" if slot else "other"


def _age_s(process: int) -> float:
    begun = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
