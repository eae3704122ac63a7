"""The file behind a process' counters: its layout, how it is made, and how anybody reads it.

    header     512 words of 64 bits   magic, version, sizes, how much of both areas is in use, pid, start
    cells        8 bytes each         signed 64-bit little-endian numbers
    directory  text                   one line per allocation: first cell, number of cells, entry, tab-separated

One process writes, with plain stores, and holds the lock of the file (flock(2)) for as long as it does; any number
read. A reader uses ``read(2)``, not a mapping, so a file that is truncated or deleted under it does no harm. Each
number is read whole; numbers beside each other may be a few stores apart.

The directory describes the cells, so a reader needs nothing but the file.

A histogram is ``HISTOGRAM_CELLS`` cells: the sum of its values, then log-linear buckets, 90 to each decade from 1 us
to 1000 s, with one below and one above: the two leading digits of the value, so a quantile is known within 10 %.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from array import array
from dataclasses import dataclass
from typing import Final

MAGIC: Final = int.from_bytes(b"CRETOMT1", "little")
VERSION: Final = 1
HEADER_BYTES: Final = 4096
H_MAGIC, H_VERSION, H_CELLS, H_USED, H_ROOM, H_LENGTH, H_PID, H_STARTED = range(8)
_HEADER: Final = struct.Struct("<8q")

# 64 agents with two histograms each, 128 hosts with one, and thousands of plain counters.
CELLS: Final = 1 << 18
DIRECTORY_BYTES: Final = 1 << 19

LOWEST_NS: Final = 1_000
HIGHEST_NS: Final = 10**12
BUCKETS: Final = 9 * 90 + 2
HISTOGRAM_CELLS: Final = 1 + BUCKETS


class CountersFull(RuntimeError):
    """There is no room for another allocation."""


class CountersInvalid(ValueError):
    """The file holds no counters of this version."""


def bucket_of(value_ns: int) -> int:
    """Index of the bucket that holds a value: bucket ``i`` ends at ``bucket_end(i)``, that value included."""
    if value_ns <= LOWEST_NS:
        return 0
    if value_ns > HIGHEST_NS:
        return BUCKETS - 1
    digits = str(value_ns - 1)
    return 1 + (len(digits) - 4) * 90 + int(digits[:2]) - 10


def bucket_end(index: int) -> int:
    """Largest value of a bucket in nanoseconds; of the last one, which has no end, the largest of the one before."""
    if index == 0:
        return LOWEST_NS
    decade, lead = divmod(min(index, BUCKETS - 2) - 1, 90)
    end: int = (lead + 11) * 10 ** (decade + 2)
    return end


@dataclass(frozen=True, slots=True)
class Entry:
    """One allocation as a reader sees it: what it is called, and its cells."""

    name: str
    values: array[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file said. alive: a process has it open for writing. started_ns is unix time."""

    entries: tuple[Entry, ...]
    pid: int
    started_ns: int
    alive: bool


class CountersFile:
    """The writer's side: a fresh file, locked, mapped, and room in it given out."""

    def __init__(self, path: str, cells: int, directory_bytes: int) -> None:
        if not 1 <= cells <= 1 << 24 or not 64 <= directory_bytes <= 1 << 24:
            raise ValueError(f"cells and directory_bytes must be between 1 and {1 << 24}, got {cells}")
        self._cells = cells
        self._room = directory_bytes
        self._used = 0
        self._length = 0
        self._at = HEADER_BYTES + cells * 8
        size = self._at + directory_bytes
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            # A store into a hole on a full disk would end the process: all of it is there from the start.
            os.posix_fallocate(fd, 0, size)
            self.map = mmap.mmap(fd, size)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        fields = (0, VERSION, cells, 0, directory_bytes, 0, os.getpid(), time.time_ns())
        _HEADER.pack_into(self.map, 0, *fields)
        self._store(H_MAGIC, MAGIC)

    @property
    def used(self) -> int:
        return self._used

    def allocate(self, name: str, cells: int) -> int:
        """Index of the first of ``cells`` cells under that name. Raises CountersFull, ValueError."""
        if cells < 1 or "\n" in name or "\t" in name or not name:
            raise ValueError(f"not a name for cells: {name!r}")
        line = f"{self._used}\t{cells}\t{name}\n".encode()
        if self._used + cells > self._cells or self._length + len(line) > self._room:
            raise CountersFull(f"no room for {name}")
        at = self._at + self._length
        first = self._used
        self.map[at : at + len(line)] = line
        self._used += cells
        self._length += len(line)
        self._store(H_USED, self._used)
        self._store(H_LENGTH, self._length)  # last: a reader goes by it
        return first

    def close(self) -> None:
        """Gives the lock up. The mapping stays, so that a late count goes nowhere instead of failing."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def _store(self, word: int, value: int) -> None:
        struct.pack_into("<q", self.map, word * 8, value)


def read_counters(path: str | os.PathLike[str]) -> Reading:
    """Everything a file says now. Raises CountersInvalid for another kind of file, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            raise CountersInvalid(f"{path}: too short for counters")
        magic, version, cells, _, room, length, pid, started = _HEADER.unpack(head)
        if magic != MAGIC or version != VERSION or not 0 <= length <= room or not 1 <= cells <= 1 << 24:
            raise CountersInvalid(f"{path}: not counters of version {VERSION}")
        # The directory first: every cell it names was given out before.
        lines = os.pread(fd, length, HEADER_BYTES + cells * 8).decode().splitlines()
        entries = _entries(fd, path, cells, lines)
        return Reading(entries, pid, started, alive=_locked(fd))
    finally:
        os.close(fd)


def _entries(fd: int, path: str | os.PathLike[str], cells: int, lines: list[str]) -> tuple[Entry, ...]:
    places = []
    for line in lines:
        first, count, name = line.split("\t", 2)
        places.append((int(first), int(count), name))
    end = max((first + count for first, count, _ in places), default=0)
    if end > cells or any(first < 0 or count < 1 for first, count, _ in places):
        raise CountersInvalid(f"{path}: the directory names cells that do not exist")
    values = array("q", os.pread(fd, end * 8, HEADER_BYTES))
    if len(values) != end:
        raise CountersInvalid(f"{path}: cells are missing")
    return tuple(Entry(name, values[first : first + count]) for first, count, name in places)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
