"""The file behind a quota table: its layout, who may have it open, how it is made and how it grows.

The file is one array of 64-bit little-endian words, mapped by every process that uses it:

    header    512 words   geometry, the lock, the free list, the undo log, the pids in the seats
    slots     16 each     open addressing by the second word of the key, linear probing
    bloom      8 each     one block per 16 slots (32 bits per key); "no" saves the probe
    records  168 each     reservations in flight

Every process keeps a kernel lock (open file description lock, fcntl(2)) on the byte of its *seat* while it has the
table open, so that others can ask the kernel whether it still lives. The compiled form and the Python twin use the
same layout but not the same mutual exclusion, hence never the same table at the same time: the first to open it
decides, others are refused with ``QuotaTableError``. A process that finds itself alone repairs what a crash left,
takes the table over for its own form, and makes it grow when it was asked for more room.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
import time
from dataclasses import dataclass
from typing import Final
from weakref import WeakSet

from creto_hotpath._bloom_py import SALT
from creto_hotpath._quota_types import MAX_PAIRS, PATIENCE_NS, REMOVED, QuotaBusy, QuotaFull, QuotaTableError

WORD: Final = 8
MAGIC: Final = int.from_bytes(b"CRETOQT1", "little")
VERSION: Final = 1
COMPILED: Final = 1
TWIN: Final = 2

H_MAGIC, H_VERSION, H_ENGINE, H_SLOTS, H_BLOCKS, H_RECORDS, H_SEED = range(7)
H_LOCK: Final = 8
H_GENERATION, H_USED_SLOTS, H_SEQUENCE, H_FREE, H_HIGH, H_UNDO_COUNT, H_LAST_NOW = range(16, 23)
H_UNDO: Final = 32
UNDO_ENTRIES: Final = 208
H_PIDS: Final = 448
SEATS: Final = 64
HEADER_WORDS: Final = 512

S_STATE, S_A, S_B, S_LIMIT, S_PERIOD, S_START, S_USED, S_RESERVED = range(8)
S_DENIED, S_BURST, S_TOLERANCE_NS, S_TOLERANCE_FRAC, S_REFUNDED, S_REFUNDED_FRAC = range(8, 14)
SLOT_WORDS: Final = 16

BLOCK_WORDS: Final = 8
SLOTS_PER_BLOCK: Final = 16

R_ID, R_EXPIRES, R_NEXT, R_COUNTS = range(4)
R_AMOUNTS: Final = 8
R_PAIRS: Final = 24
PAIR_WORDS: Final = 3
RECORD_WORDS: Final = R_PAIRS + MAX_PAIRS * PAIR_WORDS
INDEX_BITS: Final = 20

# Byte ranges that are only ever locked, far behind the end of the file.
LOCK_JOIN: Final = 1 << 40
LOCK_MUTEX: Final = LOCK_JOIN + 1
LOCK_SEATS: Final = LOCK_JOIN + 64

_FLOCK: Final = "hhqqi4x"
_MASK: Final = (1 << 64) - 1


def _flock(fd: int, command: int, kind: int, start: int, length: int = 1) -> int:
    """The lock type the kernel answers with. Raises BlockingIOError or PermissionError when another holds it."""
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    return int(struct.unpack(_FLOCK, answer)[0])


@dataclass(frozen=True, slots=True)
class Geometry:
    """How many slots (a power of two) and reservation records a table has."""

    slots: int
    records: int

    @classmethod
    def wanted(cls, slots: int, records: int) -> Geometry:
        """The smallest geometry with at least that many. Raises ValueError for numbers out of bounds."""
        if not 1 <= slots <= 1 << 26:
            raise ValueError(f"slots must be between 1 and {1 << 26}, got {slots}")
        if not 1 <= records <= 1 << INDEX_BITS:
            raise ValueError(f"reservations must be between 1 and {1 << INDEX_BITS}, got {records}")
        return cls(max(SLOTS_PER_BLOCK, 1 << (slots - 1).bit_length()), records)

    @property
    def blocks(self) -> int:
        return self.slots // SLOTS_PER_BLOCK

    @property
    def bloom_at(self) -> int:
        return HEADER_WORDS + self.slots * SLOT_WORDS

    @property
    def records_at(self) -> int:
        return self.bloom_at + self.blocks * BLOCK_WORDS

    @property
    def words(self) -> int:
        return self.records_at + self.records * RECORD_WORDS

    def covers(self, other: Geometry) -> bool:
        return self.slots >= other.slots and self.records >= other.records

    def joined(self, other: Geometry) -> Geometry:
        return Geometry(max(self.slots, other.slots), max(self.records, other.records))


def undo(words: memoryview) -> None:
    """Puts back what a process that died inside the critical section had already changed."""
    for n in range(min(words[H_UNDO_COUNT], UNDO_ENTRIES), 0, -1):
        at, old = words[H_UNDO + 2 * (n - 1)], words[H_UNDO + 2 * (n - 1) + 1]
        if 0 <= at < len(words):
            words[at] = old
        words[H_UNDO_COUNT] = n - 1
    words[H_UNDO_COUNT] = 0


def unsigned(word: int) -> int:
    """A word as the compiled form's uint64 sees it."""
    return word & _MASK


def signed(word: int) -> int:
    """A uint64 as it is stored in a signed word; also how the compiled form's arithmetic wraps."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def bloom_add(words: memoryview, geometry: Geometry, a: int, b: int) -> None:
    """Adds the key of unsigned words a, b to the table's filter."""
    at = geometry.bloom_at + (a & (geometry.blocks - 1)) * BLOCK_WORDS
    for word, salt in enumerate(SALT, at):
        words[word] = signed(unsigned(words[word]) | 1 << ((b * salt & _MASK) >> 58))


def _initialise(words: memoryview, geometry: Geometry, engine: int, seed: bytes) -> None:
    words[H_VERSION] = VERSION
    words[H_ENGINE] = engine
    words[H_SLOTS] = geometry.slots
    words[H_BLOCKS] = geometry.blocks
    words[H_RECORDS] = geometry.records
    words[H_SEED] = int.from_bytes(seed[:8], "little", signed=True)
    words[H_SEED + 1] = int.from_bytes(seed[8:], "little", signed=True)
    words[H_SEQUENCE] = 1
    words[H_MAGIC] = MAGIC  # last: a file without it was never finished and is started again


def _copy_slots(old: memoryview, was: Geometry, new: memoryview, now: Geometry) -> dict[int, int]:
    """Moves every living slot; gives old slot number -> new slot number."""
    moved: dict[int, int] = {}
    mask = now.slots - 1
    for number in range(was.slots):
        at = HEADER_WORDS + number * SLOT_WORDS
        state = old[at + S_STATE]
        if state == 0 or state & 0xFF == REMOVED:
            continue
        a, b = unsigned(old[at + S_A]), unsigned(old[at + S_B])
        place = b & mask
        while new[HEADER_WORDS + place * SLOT_WORDS + S_STATE]:
            place = (place + 1) & mask
        there = HEADER_WORDS + place * SLOT_WORDS
        new[there : there + SLOT_WORDS] = old[at : at + SLOT_WORDS]
        bloom_add(new, now, a, b)
        moved[number] = place
    return moved


def _copy_records(old: memoryview, was: Geometry, new: memoryview, now: Geometry, moved: dict[int, int]) -> None:
    for index in range(old[H_HIGH]):
        at = was.records_at + index * RECORD_WORDS
        there = now.records_at + index * RECORD_WORDS
        new[there : there + RECORD_WORDS] = old[at : at + RECORD_WORDS]
        if not old[at + R_ID]:
            continue
        first = there + R_PAIRS
        for pair in range(first, first + PAIR_WORDS * (old[at + R_COUNTS] >> 32), PAIR_WORDS):
            packed = unsigned(new[pair])
            # A slot that was removed has no new place; no generation is 0, so what points at nothing settles nothing.
            place = moved.get(packed & 0xFFFFFFFF)
            new[pair] = 0 if place is None else signed(packed & ~0xFFFFFFFF | place)


def grown(old: memoryview, was: Geometry, now: Geometry) -> bytearray:
    """A copy of the table ``old`` with room for ``now``: same quotas, same usage, same reservations."""
    data = bytearray(now.words * WORD)
    with memoryview(data).cast("q") as new:
        new[:32] = old[:32]
        new[H_SLOTS] = now.slots
        new[H_BLOCKS] = now.blocks
        new[H_RECORDS] = now.records
        new[H_LOCK] = 0
        new[H_GENERATION] = old[H_GENERATION] + 1
        moved = _copy_slots(old, was, new, now)
        new[H_USED_SLOTS] = len(moved)
        _copy_records(old, was, new, now, moved)
    return data


class TableFile:
    """An open, locked, mapped quota table.

    ``words`` is the mapping as signed 64-bit words, ``seat`` this process' number (0..63), ``fd`` carries the kernel
    locks and nothing else: the mapping has a descriptor of its own, because a lock lives as long as any duplicate of
    the descriptor it was taken with, and ``mmap`` keeps one.

    Raises QuotaTableError for a file that is not a table, is not ours alone (0600 and our own), belongs to the other
    form, or has no free seat; OSError when it cannot be opened or the disk is full.
    """

    fd = -1
    seat = -1
    _map_fd = -1

    def __init__(self, path: str | None, geometry: Geometry, engine: int) -> None:
        self.path = path
        self.engine = engine
        while not self._open(geometry):
            pass

    def _open(self, wanted: Geometry) -> bool:
        """True once the table is open; False when its file was replaced meanwhile and must be opened again."""
        if self.path is None:
            self._map_fd = os.memfd_create("creto-quota", os.MFD_CLOEXEC)
        else:
            self._map_fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self.fd = self._another_fd()
            _flock(self.fd, fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, LOCK_JOIN)
            if not self._still_there():
                self._drop()
                return False
            if not self._map(wanted):
                self._drop()
                return False
            _flock(self.fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, LOCK_JOIN)
        except BaseException:
            self._drop()
            raise
        return True

    def _another_fd(self) -> int:
        return os.open(f"/proc/self/fd/{self._map_fd}", os.O_RDWR | os.O_CLOEXEC)

    def _still_there(self) -> bool:
        if self.path is None:
            return True
        mine = os.fstat(self._map_fd)
        if not stat.S_ISREG(mine.st_mode) or mine.st_uid != os.geteuid() or stat.S_IMODE(mine.st_mode) & 0o077:
            raise QuotaTableError(
                f"{self.path}: must be a regular file of the user running creto and private to it (mode 0600)"
            )
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _map(self, wanted: Geometry) -> bool:
        alone = not self._others()
        size = os.fstat(self._map_fd).st_size
        if size == 0 or (alone and self._unfinished(size)):
            self._create(wanted)
        self._validate()
        was = self.geometry
        if alone:
            undo(self.words)
            self.words[H_LOCK] = 0
            self.words[H_ENGINE] = self.engine
            if not was.covers(wanted):
                return self._grow(was, was.joined(wanted))
        elif self.words[H_ENGINE] != self.engine:
            raise QuotaTableError(
                f"{self.path or 'anonymous table'}: in use by processes that run the "
                f"{'compiled' if self.engine == TWIN else 'pure Python'} form of creto; "
                "start all of them with or all of them without CRETO_NO_EXTENSIONS=1"
            )
        self._sit_down()
        return True

    def _others(self) -> bool:
        return _flock(self.fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, LOCK_SEATS, SEATS) != fcntl.F_UNLCK

    def _unfinished(self, size: int) -> bool:
        return size < HEADER_WORDS * WORD or os.pread(self._map_fd, WORD, 0) == bytes(WORD)

    def _create(self, geometry: Geometry) -> None:
        os.ftruncate(self._map_fd, 0)
        size = geometry.words * WORD
        if self.path is None:
            os.ftruncate(self._map_fd, size)
        else:
            # Real blocks, not a sparse file: a full disk must be an error here and not a SIGBUS in a request.
            os.posix_fallocate(self._map_fd, 0, size)
        self._attach(size)
        _initialise(self.words, geometry, self.engine, os.urandom(16))

    def _attach(self, size: int) -> None:
        self.mem = mmap.mmap(self._map_fd, size)
        self.words = memoryview(self.mem).cast("q")

    def _validate(self) -> None:
        name = self.path or "anonymous table"
        size = os.fstat(self._map_fd).st_size
        if size < HEADER_WORDS * WORD or size % WORD:
            raise QuotaTableError(f"{name}: not a quota table ({size} bytes)")
        if not hasattr(self, "words"):
            self._attach(size)
        words = self.words
        if words[H_MAGIC] != MAGIC:
            raise QuotaTableError(f"{name}: not a quota table (no signature at its start)")
        if words[H_VERSION] != VERSION:
            raise QuotaTableError(f"{name}: layout version {words[H_VERSION]}, this creto reads version {VERSION}")
        slots, records = words[H_SLOTS], words[H_RECORDS]
        sound = (
            SLOTS_PER_BLOCK <= slots <= 1 << 26
            and slots & (slots - 1) == 0
            and 1 <= records <= 1 << INDEX_BITS
            and words[H_BLOCKS] == slots // SLOTS_PER_BLOCK
            and Geometry(slots, records).words * WORD == size
            and 0 <= words[H_HIGH] <= records
            and 0 <= words[H_FREE] <= records
            and 0 <= words[H_UNDO_COUNT] <= UNDO_ENTRIES
        )
        if not sound:
            raise QuotaTableError(f"{name}: damaged header ({slots} slots, {records} records, {size} bytes)")

    def _grow(self, was: Geometry, now: Geometry) -> bool:
        """Replaces the file by a larger one; False, because it is then opened anew."""
        data = grown(self.words, was, now)
        assert self.path is not None, "an anonymous table is made in the wanted size"
        fresh = f"{self.path}.{os.urandom(8).hex()}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(fresh, self.path)
        except BaseException:
            os.unlink(fresh)
            raise
        return False

    def _sit_down(self) -> None:
        """Takes a free seat. Never the one in the lock word: its owner died inside and someone will inherit from it."""
        for seat in range(SEATS):
            if self.words[H_LOCK] == seat + 1:
                continue
            try:
                _flock(self.fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, LOCK_SEATS + seat)
            except (BlockingIOError, PermissionError):
                continue
            self.seat = seat
            self.words[H_PIDS + seat] = os.getpid()
            return
        raise QuotaTableError(f"{self.path or 'anonymous table'}: {SEATS} processes have it open already")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.words[H_SLOTS], self.words[H_RECORDS])

    @property
    def seed(self) -> bytes:
        return b"".join(self.words[H_SEED + i].to_bytes(8, "little", signed=True) for i in (0, 1))

    def owner_pid(self) -> int:
        """Process id of whoever is in the compiled form's critical section, as that process knows itself; 0 nobody."""
        owner = self.words[H_LOCK]
        return int(self.words[H_PIDS + owner - 1]) if 0 < owner <= SEATS else 0

    def lock(self) -> None:
        """Takes the twin's mutex, which the kernel frees when its holder dies, and undoes what that one left.

        Raises QuotaBusy when it is not to be had for PATIENCE_NS. fcntl(2) waits for ever or not at all, so this polls.
        """
        deadline = 0
        while True:
            try:
                _flock(self.fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, LOCK_MUTEX)
                break
            except (BlockingIOError, PermissionError):
                now = time.monotonic_ns()
                deadline = deadline or now + PATIENCE_NS
                if now > deadline:
                    raise busy(self.owner_pid()) from None
                os.sched_yield()
        if self.words[H_UNDO_COUNT]:
            undo(self.words)

    def unlock(self) -> None:
        _flock(self.fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, LOCK_MUTEX)

    def leave(self) -> None:
        """In a forked child: lets go of the descriptor whose locks say that the parent lives."""
        os.close(self.fd)
        self.fd = -1
        self.seat = -1

    def rejoin(self) -> None:
        """Takes a seat of its own for a forked child, on its first use of the table."""
        self.fd = self._another_fd()
        _flock(self.fd, fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, LOCK_JOIN)
        try:
            self._sit_down()
        finally:
            _flock(self.fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, LOCK_JOIN)

    def close(self) -> None:
        """Gives the seat back and unmaps the file. Reservations in flight stay in it."""
        self._drop()

    def __del__(self) -> None:
        # The mapping goes with its last view; the descriptors, and with them the seat, have to be given back here.
        for fd in (self.fd, self._map_fd):
            if fd >= 0:
                os.close(fd)

    def _drop(self) -> None:
        if hasattr(self, "words"):
            self.words.release()
            del self.words
            self.mem.close()
            del self.mem
        for fd in (self.fd, self._map_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._map_fd = self.seat = -1


class Forkable:
    """A table that is told, in a forked child, to forget the parent's seat."""

    def _forked(self) -> None:
        raise NotImplementedError


_open_tables: WeakSet[Forkable] = WeakSet()


def register(table: Forkable) -> None:
    """Has ``table._forked()`` called in every child this process forks."""
    _open_tables.add(table)


def _after_fork() -> None:
    for table in list(_open_tables):
        table._forked()


os.register_at_fork(after_in_child=_after_fork)


def busy(pid: int) -> QuotaBusy:
    who = f"process {pid}" if pid else "another process"
    return QuotaBusy(f"{who} has kept the quota table for {PATIENCE_NS // 1_000_000} ms; is it stopped?")


def no_slot(slots: int) -> QuotaFull:
    return QuotaFull(f"the quota table has no room for another quota (3/4 of {slots} slots are taken)")


def no_record(records: int) -> QuotaFull:
    return QuotaFull(f"all {records} reservations of the quota table are in flight")
