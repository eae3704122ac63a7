"""The counters of all processes of a run as one, the dead included: a counter that goes back would be a reset.

Each process counts in ``STATE/metrics/RUN/NAME.tab``. When one dies, the controller adds what it counted to the base
and removes its file; its gauges die with it. The base of a controller that was replaced is taken over just so.
"""

from __future__ import annotations

import logging
import operator
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from creto_hotpath.counters import Counters, CountersFull, CountersInvalid, Entry, Reading, read_counters
from creto_proxy.observe.registry import FAMILIES, Family

log = logging.getLogger("creto.observe")


def metrics_directory(state: Path, run: str) -> Path:
    return state / "metrics" / run


def counters_path(directory: Path, name: str) -> Path:
    """Where the process called ``name`` counts; names are unique among all processes of a run."""
    return directory / f"{name}.tab"


def counters_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tab"))


def family_of(name: str) -> Family | None:
    """The family of an entry, None for what is no metric of this version."""
    return FAMILIES.get(name.partition("{")[0].removeprefix("creto_"))


class Aggregate:
    """Sums of everything that was counted in a run, by entry name."""

    def __init__(self) -> None:
        self.values: dict[str, array[int]] = {}

    def add(self, entries: Iterable[Entry], *, gauges: bool) -> None:
        for entry in entries:
            family = family_of(entry.name)
            if family is None or (family.kind == "gauge" and not gauges):
                continue
            held = self.values.get(entry.name)
            if held is None:
                self.values[entry.name] = entry.values
            elif len(held) == len(entry.values):
                self.values[entry.name] = array("q", map(operator.add, held, entry.values))


def readable(directory: Path) -> Iterator[tuple[Path, Reading]]:
    """Every counters file that can be read; one that just appears or goes is not there."""
    for path in counters_files(directory):
        try:
            yield path, read_counters(path)
        except (OSError, CountersInvalid, ValueError):
            continue


def aggregate(*directories: Path) -> Aggregate:
    """What the processes of these runs counted together."""
    total = Aggregate()
    for directory in directories:
        for _, reading in readable(directory):
            total.add(reading.entries, gauges=reading.alive)
    return total


def alive(directory: Path) -> bool:
    """Whether some process of the run counts still."""
    return any(reading.alive for _, reading in readable(directory))


class Base:
    """What the dead have counted. Kept by the controller, in a file like any other."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError when it cannot be made."""
        self._directory = directory
        # A controller that replaces itself begins a base of its own, and folds the one before.
        self._path = counters_path(directory, f"base-{os.getpid()}-{time.time_ns()}")
        self._counters = Counters(str(self._path))
        self._cells: dict[str, int] = {}

    def fold(self) -> int:
        """Takes over what processes counted that have died since; how many there were."""
        folded = 0
        for path, reading in readable(self._directory):
            if reading.alive or path == self._path:
                continue
            # Out of sight first: counted twice would be a lie, missing for a moment is not.
            taken = path.with_suffix(".folding")
            try:
                os.rename(path, taken)
                self._take(reading)
                taken.unlink()
            except OSError as error:
                log.warning("the counters of a dead process are lost: %s", error)
                continue
            folded += 1
        return folded

    def _take(self, reading: Reading) -> None:
        for entry in reading.entries:
            family = family_of(entry.name)
            if family is None or family.kind == "gauge":
                continue
            try:
                cell = self._cell(entry)
            except CountersFull:
                continue
            for offset, value in enumerate(entry.values):
                if value:
                    self._counters.add(cell + offset, value)

    def _cell(self, entry: Entry) -> int:
        cell = self._cells.get(entry.name)
        if cell is None:
            cell = self._cells[entry.name] = self._counters.allocate(entry.name, len(entry.values))
        return cell

    def close(self) -> None:
        self._counters.close()


def clear_dead(state: Path) -> None:
    """Removes the counters of runs whose processes are all gone: nobody will ask for them any more."""
    for directory in (state / "metrics").glob("*"):
        if counters_files(directory) and not alive(directory):
            remove_counters(directory)


def remove_counters(directory: Path) -> None:
    """Removes the counters files of a run, and its directory when nothing else is in it."""
    for path in counters_files(directory):
        path.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:
        return  # something else is in it, or it is gone
