"""The journal's readers that see and tell: access log and traces share one pass over each record.

Both are derived: a record is told at least once to the access log, and at most once more after a crash. What was in
the journal before they were first switched on is not told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from creto_hotpath.journal import segments
from creto_proxy.hookspecs import Consumer
from creto_proxy.model import Outcome
from creto_proxy.observe.observer import Gauges, Observer

# Positions are appended to their file; it is written anew at a start when there are more lines than this.
_LINES = 4096
# A segment that was applied and has not grown for this long is not looked at until it is applied again.
_QUIET_S = 60.0


class Sink(Protocol):
    """Takes records in order. May raise OSError: then the same records come again later."""

    def write(self, records: Sequence[Outcome]) -> None: ...
    def close(self) -> None: ...


class Tell:
    """The journal consumer behind the access log and traces."""

    name = "observe"

    def __init__(self, journal: Path, positions: Path, sinks: Sequence[Sink]) -> None:
        """positions: the file of what was told already. Raises OSError."""
        self._sinks = tuple(sinks)
        first = not positions.exists()
        self._file = os.open(positions, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._path = positions
        self._upto: dict[str, int] = {}
        self._read_to = 0
        present = {path.name: path.stat().st_size for path in segments(journal)}
        if first:
            self._upto = present
            self._append(present)
            self._read_to = os.fstat(self._file).st_size
        else:
            self._reload()
            self._shorten(present)

    def position(self, segment: str) -> int:
        if segment not in self._upto:
            self._reload()  # another process on this state directory may have told it
        return self._upto.get(segment, 0)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        for sink in self._sinks:
            sink.write(records)
        self._upto[segment] = upto
        self._append({segment: upto})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        os.close(self._file)

    def _append(self, positions: Mapping[str, int]) -> None:
        os.write(self._file, "".join(f"{segment} {upto}\n" for segment, upto in positions.items()).encode())

    def _reload(self) -> None:
        size = os.fstat(self._file).st_size
        if size == self._read_to:
            return
        for line in os.pread(self._file, size, 0).decode("utf-8", "replace").splitlines():
            segment, _, upto = line.rpartition(" ")
            if segment and upto.isdecimal():  # a torn line says nothing
                self._upto[segment] = max(self._upto.get(segment, 0), int(upto))
        self._read_to = size

    def _shorten(self, present: Mapping[str, int]) -> None:
        if os.pread(self._file, 1 << 24, 0).count(b"\n") <= _LINES:
            return
        self._upto = {segment: upto for segment, upto in self._upto.items() if segment in present}
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(f"{segment} {upto}\n" for segment, upto in self._upto.items()))
        fresh.replace(self._path)
        os.close(self._file)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._read_to = os.fstat(self._file).st_size


class Followed:
    """A consumer whose progress can be seen: records, failures, and how far it is behind the journal."""

    def __init__(self, consumer: Consumer, observer: Observer) -> None:
        self.name = consumer.name
        self._consumer = consumer
        self._counters = observer.counters
        self._upto: dict[str, int] = {}
        self._active: set[str] = set()
        self._records = observer.registry.cell("journal_records_total", self.name)
        self._errors = observer.registry.cell("journal_consumer_errors_total", self.name)
        observer.registry.cell("journal_lag_bytes", self.name)

    def position(self, segment: str) -> int:
        self._upto[segment] = position = self._consumer.position(segment)
        self._active.add(segment)
        return position

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        self._active.add(segment)
        try:
            self._consumer.apply(segment, records, upto)
        except BaseException:
            self._counters.add(self._errors)
            raise
        self._upto[segment] = upto
        self._counters.add(self._records, len(records))

    def lag_bytes(self, journal: Path) -> int:
        """Of the segments that this process applies: bytes of them that this consumer has not seen."""
        lag, quiet = 0, time.time() - _QUIET_S
        for segment in tuple(self._active):
            try:
                found = os.stat(journal / segment)
            except FileNotFoundError:
                self._active.discard(segment)
                continue
            behind = found.st_size - self._upto.get(segment, 0)
            if behind > 0:
                lag += behind
            elif found.st_mtime < quiet:
                self._active.discard(segment)  # of the thousands of a week only those are looked at that still grow
        return lag


def lag_gauges(journal: Path, followed: Sequence[Followed]) -> Gauges:
    """For ``Sampler``: the lag of each consumer."""
    return {("journal_lag_bytes", each.name): partial(each.lag_bytes, journal) for each in followed}
