"""Journal segments to the consumers (ledger, audit log), in a worker thread.

``Replay`` applies its own process' segments, those of the processes it ``follow``s, and those orphaned by processes
that died. A segment belongs to whoever holds the lock of its worker, so each is applied by one process at a time;
consumers keep their position in the same transaction as what they derived, so a crash replays and neither loses nor
doubles.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from creto_hotpath.journal import JournalBusy, JournalCorrupt, payload_at, read_frames, recover, segments
from creto_hotpath.records import Records
from creto_proxy.audit import decode
from creto_proxy.batch import LAYOUT, Batch
from creto_proxy.hookspecs import Consumer
from creto_proxy.model import Outcome

log = logging.getLogger("creto.journal")

# Ledger and audit log are synced per batch, and what is alike in a batch is made once.
BATCH = 8000
# As much of a segment as is read at a time. Records are small; one that is larger than this is read by itself.
_WINDOW = 4 << 20
# How often other processes' journals are looked at. Ledger and audit log are synced per batch, so a little patience is
# worth hundreds of records in one.
GATHER_S = 0.2
# Niceness of the thread that derives while others serve: on a full machine requests go first.
BEHIND = 10
# How often a process that lives long looks for journals of others that have died.
ADOPT_EVERY_S = 5.0
# Consumers are derived state: a failing one is retried, ever more slowly, while the journal keeps everything.
RETRY_S = (0.2, 1.0, 5.0, 15.0)
# How long a dead worker's segments stay after everything was derived from them: a lost ledger can be made again, an
# incident can be looked into. A machine that runs agents all day must not keep every run for ever.
KEEP_S = 7 * 86_400


class Replay:
    """Applies journal segments to consumers, in one worker thread. ``now_s`` is wall clock, as file times are."""

    def __init__(
        self,
        directory: Path,
        worker: str,
        consumers: Sequence[Consumer],
        *,
        follows: bool = False,
        lock: int | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """Takes the lock of ``worker``; before its first segment is made, so that no other process adopts it.

        follows: other processes write, and may die, while this one lives; it looks for what is new every ``GATHER_S``.
        lock: its descriptor, where an earlier program image in this process has taken it. Raises OSError.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._consumers = tuple(consumers)
        self._patience_s = GATHER_S if follows else None
        self._now_s = now_s
        self.wake = threading.Event()
        self._stop = threading.Event()
        self._abandon = threading.Event()  # stopped, and it takes too long
        self._worker = worker
        self._failures = 0
        self._orphans = True  # there may be segments of dead workers that are not applied yet
        self._adopt_at = time.monotonic() + ADOPT_EVERY_S
        self._adopted: set[str] = set()
        self._damaged: set[Path] = set()
        self._finished: set[Path] = set()
        self._positions: dict[tuple[str, str], int] = {}
        self._batch: tuple[Path, int, _Read] | None = None  # what was read last, and from where
        self._locks = {worker: _lock(self._lock_file(worker)) if lock is None else lock}
        self._ended: set[str] = set()
        self._guard = threading.Lock()  # for the two above, which the loop's thread changes
        self._thread = threading.Thread(target=self._run, name="creto-replay", daemon=True)

    @property
    def healthy(self) -> bool:
        """False while a consumer fails or a journal cannot be read; it is tried again."""
        return self._failures == 0

    @property
    def lock(self) -> int:
        """The descriptor of the lock of its own worker."""
        return self._locks[self._worker]

    def follow(self, worker: str, lock: int | None = None) -> int:
        """Applies what ``worker`` writes, from now on until it has ``ended``; the descriptor of its lock.

        To be called before the process begins its journal. The process may inherit the descriptor: then the lock
        outlives this process, and nobody takes a journal for complete that is still written. lock: the descriptor,
        where another program image in this process has taken it. Raises OSError.
        """
        taken = _lock(self._lock_file(worker)) if lock is None else lock
        with self._guard:
            self._locks[worker] = taken
        return taken

    def ended(self, worker: str) -> None:
        """The process behind a followed journal is gone: the rest is applied, then the lock is let go."""
        with self._guard:
            self._ended.add(worker)
        self.wake.set()

    def start(self) -> None:
        """Adopts the segments of dead workers, then follows the journals until ``stop``."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0, *, keep: bool = False) -> bool:
        """Applies what is left; False when consumers could not keep up or kept failing. Nothing is lost then either:
        the next process adopts the segments. keep: the locks stay taken, for the next program image, which goes on
        where this one is; nobody waits for the rest."""
        self._stop.set()
        if keep:
            self._abandon.set()
        self.wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            # Between two batches: what consumers have open must not be closed under them.
            self._abandon.set()
            self._thread.join(timeout_s)
        if not keep:
            for lock in self._locks.values():
                os.close(lock)
        return not self._thread.is_alive() and self._failures == 0 and not self._abandon.is_set()

    def _run(self) -> None:
        if self._patience_s is not None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND)
        while True:
            stopping = self._stop.is_set()
            self.wake.clear()
            self._failures = 0 if self._pass() else self._failures + 1
            if stopping:
                return
            if self._failures:
                self._stop.wait(RETRY_S[min(self._failures, len(RETRY_S)) - 1])
            else:
                self.wake.wait(self._patience_s)

    def _pass(self) -> bool:
        """Everything there is, once; False when some of it has to be tried again."""
        try:
            if self._patience_s is not None and time.monotonic() >= self._adopt_at:
                self._orphans = True
                self._adopt_at = time.monotonic() + ADOPT_EVERY_S
            if self._orphans:
                self._orphans = not self._adopt()
            return self._follow_all() and not self._orphans
        except Exception:  # a worker thread's outermost boundary: keep following, the journal holds everything
            log.exception("the journal cannot be read; it is tried again")
            return False

    def _follow_all(self) -> bool:
        with self._guard:
            followed, ended = set(self._locks), set(self._ended)
        written: dict[str, list[Path]] = {worker: [] for worker in followed}
        for path in segments(self._directory):
            if (worker := _worker_of(path)) in followed:
                written[worker].append(path)
        for paths in written.values():
            # The next segment is made before the last one is full.
            while paths and paths[-1].stat().st_size == 0:
                paths.pop()
        done = True
        for worker, paths in written.items():
            if worker in ended:
                done = self._let_go(worker) and done
            elif paths:
                done = self._catch_up([path for path in paths if path not in self._finished]) and done
                # What comes before the newest segment is complete, and now it is applied.
                self._finished.update(paths[:-1] if done else ())
        return done

    def _let_go(self, worker: str) -> bool:
        if not self._adopt_worker(worker):
            return False
        with self._guard:
            os.close(self._locks.pop(worker))
            self._ended.discard(worker)
        self._adopted.add(worker)
        return True

    def _adopt(self) -> bool:
        """Applies what dead workers left, one worker at a time: a week of runs is more than there are descriptors."""
        done = True
        workers = {path.stem for path in self._directory.glob("*.lock")}
        workers.update(_worker_of(path) for path in segments(self._directory))
        with self._guard:
            workers -= self._locks.keys()
        for worker in sorted(workers - self._adopted):
            try:
                lock = _lock(self._lock_file(worker))
            except BlockingIOError:
                continue  # alive, or being adopted by another process
            except OSError as error:
                log.error("the journal of %s cannot be adopted yet: %s", worker, error)
                done = False
                continue
            try:
                adopted = self._adopt_worker(worker)
            finally:
                os.close(lock)
            if adopted:
                self._adopted.add(worker)
            done = done and adopted
        return done

    def _adopt_worker(self, worker: str) -> bool:
        paths = segments(self._directory, worker)
        try:
            for path in paths:
                self._repair(path)
            if not self._catch_up(paths):
                return False
            self._clear(worker, paths)
        except JournalBusy:
            return False  # it is just ending and about to close its journal
        except OSError as error:
            log.error("the journal of %s cannot be adopted yet: %s", worker, error)
            return False
        for path in paths:
            self._finished.discard(path)
            for consumer in self._consumers:
                self._positions.pop((consumer.name, path.name), None)
        return True

    def _repair(self, path: Path) -> None:
        if all(consumer.position(path.name) == path.stat().st_size for consumer in self._consumers):
            return  # applied to its end before, so its end is not torn
        try:
            recover(path)
        except JournalCorrupt:
            pass  # said when it is read; what comes before the damage is applied

    def _clear(self, worker: str, paths: Sequence[Path]) -> None:
        """Deletes what is old of a dead worker, all of which has been applied; its lock last, with nothing left."""
        oldest = self._now_s() - KEEP_S
        kept = [path for path in paths if path in self._damaged or path.stat().st_mtime > oldest]
        for path in paths:
            if path not in kept:
                path.unlink()
        lock = self._lock_file(worker)
        if not kept and lock.stat().st_mtime <= oldest:
            lock.unlink()

    def _catch_up(self, paths: Sequence[Path]) -> bool:
        """Lets each consumer apply what it has not yet; one that fails does not keep the others from it. They go batch
        by batch together, so that each is read once."""
        failed: set[str] = set()
        for path in paths:
            more = True
            while more:
                if self._abandon.is_set():
                    return False
                more = False
                for consumer in self._consumers:
                    if consumer.name in failed:
                        continue
                    try:
                        more = self._apply(consumer, path) or more
                    except Exception:  # a plugin's code: it is tried again, the journal holds everything
                        log.exception("the journal consumer %s failed; it is tried again", consumer.name)
                        failed.add(consumer.name)
        self._batch = None
        return not failed

    def _apply(self, consumer: Consumer, path: Path) -> bool:
        """One batch; whether there may be more."""
        key = consumer.name, path.name
        # Asked once: while its lock is held here, nobody else moves it.
        start = self._positions.pop(key, None)
        read = self._read(path, consumer.position(path.name) if start is None else start)
        if read.records:
            consumer.apply(path.name, read.records, read.upto)
        self._positions[key] = read.upto
        return read.more

    def _read(self, path: Path, start: int) -> _Read:
        """Up to ``BATCH`` outcomes from ``start`` on."""
        if self._batch is not None and self._batch[:2] == (path, start):
            return self._batch[2]
        read = _read_whole(path, start)
        if read.damage and path not in self._damaged:
            # Kept for people to look at. It must not keep everything after it out of ledger and audit log.
            self._damaged.add(path)
            log.error("%s: what follows byte %d is not applied: %s", path, read.upto, read.damage)
        self._batch = path, start, read
        return read

    def _lock_file(self, worker: str) -> Path:
        return self._directory / f"{worker}.lock"


class _Read(NamedTuple):
    """Outcomes, the offset behind them, what is wrong with what follows, and whether there may be more."""

    records: Sequence[Outcome]
    upto: int
    damage: str
    more: bool


def _read_whole(path: Path, start: int) -> _Read:
    """What begins at ``start``. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, _WINDOW, start)
        found = Records(LAYOUT, data, 0, BATCH, start, lambda offset: payload_at(fd, offset))
    finally:
        os.close(fd)
    # Before a consumer sees any of it: the whole batch has to be sound.
    batch = Batch(found, decode)
    upto = start + found.end
    if batch.damage:
        return _Read(batch, upto, batch.damage, False)
    # What is allocated and not written yet is zeros. Whatever was written meanwhile is for the next look.
    seen = start <= size == start + len(data) and not data[found.end :].strip(b"\0")
    if len(batch) or seen:
        return _Read(batch, upto, "", not seen or len(batch) == BATCH)
    return _read_next(path, start)


def _read_next(path: Path, start: int) -> _Read:
    """The one record at ``start`` that is larger than the window, or torn, or damaged; ``read_frames`` can tell."""
    try:
        for payload, end in read_frames(path, start):
            return _Read([decode(payload)], end, "", True)
    except ValueError as error:
        return _Read((), start, str(error), False)
    return _Read((), start, "", False)


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of ``path``. Raises BlockingIOError when another process does, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _worker_of(path: Path) -> str:
    return path.stem.rpartition("-")[0]
