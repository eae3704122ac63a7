"""A hybrid logical clock on the local wall clock, with a high-water mark on disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from creto_platform.consensus.port import COUNTER_BITS, ClockDrift, ConsensusError, Timestamp

# One write per second of issued time: everything below the mark may have been issued by a process that died.
_RESERVE_MS = 1000
_FOLLOW_MS = 500
_REFUSE_MS = 60_000
_STEP_BACK_MS = 1000
_MAX_MS = (1 << 48) - 1
_MARK = re.compile(rb"[0-9]{20}\n")


class HybridClock:
    """The consensus port over ``directory`` (files ``node`` and ``high_water``, shared by all processes).

    clock gives unix seconds. stepped_back is told by how many milliseconds the wall clock went back when it was more
    than a second: worth an audit record. Raises ConsensusError naming the file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float],
        stepped_back: Callable[[int], None] | None = None,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clock = clock
        self._stepped_back = stepped_back
        self._mutex = threading.Lock()
        self._path = directory / "high_water"
        with self._mark() as fd:
            self._last = self._read_mark(fd) << COUNTER_BITS
            self._node = f"{_machine(directory / 'node')}.{os.urandom(4).hex()}"
        self._reserved_ms = 0
        self._wall_ms = 0

    @property
    def node(self) -> str:
        return self._node

    def now(self) -> Timestamp:
        with self._mutex:
            return self._issue(self._read_wall())

    def observe(self, remote: Timestamp) -> Timestamp:
        with self._mutex:
            wall_ms = self._read_wall()
            ahead_ms = remote.unix_ms - wall_ms
            if ahead_ms > _REFUSE_MS:
                raise ClockDrift(ahead_ms)
            if ahead_ms <= _FOLLOW_MS:
                self._last = max(self._last, remote.value)
            return self._issue(wall_ms)

    def _issue(self, wall_ms: int) -> Timestamp:
        # Adding one to the whole number carries a full counter into the milliseconds: still strictly increasing
        # however many events one millisecond has.
        value = max(self._last + 1, wall_ms << COUNTER_BITS)
        issued_ms = value >> COUNTER_BITS
        if issued_ms > _MAX_MS:
            raise ConsensusError("the clock is beyond 48 bits of milliseconds")
        if issued_ms >= self._reserved_ms:
            self._reserve(issued_ms)
        self._last = value
        return Timestamp(value, self._node)

    def _read_wall(self) -> int:
        wall_ms = int(self._clock() * 1000)
        back_ms = self._wall_ms - wall_ms
        self._wall_ms = wall_ms
        if back_ms > _STEP_BACK_MS and self._stepped_back is not None:
            self._stepped_back(back_ms)
        return wall_ms

    def _reserve(self, issued_ms: int) -> None:
        """Puts the mark a second ahead, durably, before anything up to it is issued."""
        with self._mark() as fd:
            mark = max(self._read_mark(fd), issued_ms + _RESERVE_MS)
            os.pwrite(fd, f"{mark:020d}\n".encode("ascii"), 0)
            os.fdatasync(fd)
        self._reserved_ms = issued_ms + _RESERVE_MS

    @contextlib.contextmanager
    def _mark(self) -> Iterator[int]:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConsensusError(f"{self._path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        except OSError as error:
            raise ConsensusError(f"{self._path}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _read_mark(self, fd: int) -> int:
        """Milliseconds; 0 when nothing was issued yet."""
        text = os.pread(fd, 64, 0)
        if not text:
            return 0
        if not _MARK.fullmatch(text) or int(text) > _MAX_MS:
            raise ConsensusError(f"{self._path}: not a high-water mark; remove it only if the clock can be trusted")
        return int(text)


def _machine(path: Path) -> str:
    """The lasting part of the node's name, made on first use; called under the lock."""
    try:
        name = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        name = ""
    if not name:
        name = os.urandom(8).hex()
        path.write_text(f"{name}\n", encoding="ascii")
    return name
