"""Shared quotas: what may still be used, decided for all levels and meters at once. Plain-Python form.

This is the specification of ``_quota_c``: same file layout, same answers. It is for reading, for checking the
compiled form against, and for machines without a compiler; it takes tens of microseconds where the other takes a
fraction of one.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from creto_hotpath import _quota_file as q
from creto_hotpath._bloom_py import key_bits, key_words
from creto_hotpath._hash_py import Hasher
from creto_hotpath._quota_types import (
    CALENDAR,
    CONCURRENCY,
    FIXED,
    GCRA,
    MAX_AMOUNT,
    MAX_METERS,
    MAX_PAIRS,
    MAX_TIME,
    MAX_USED,
    NO_HOLD,
    REMOVED,
    TOTAL,
    Definition,
    QuotaState,
    QuotaTableError,
    Reading,
    checked_definition,
    checked_window,
)

_INDEX_MASK: Final = (1 << q.INDEX_BITS) - 1


def _amounts(amounts: tuple[int, ...], low: int = 0) -> tuple[int, ...]:
    """The amounts as plain ints. Raises TypeError or ValueError naming the meter."""
    if not isinstance(amounts, tuple):
        raise TypeError(f"amounts must be a tuple, not {type(amounts).__name__}")
    if len(amounts) > MAX_METERS:
        raise ValueError(f"at most {MAX_METERS} meters, got {len(amounts)} amounts")
    checked = tuple(operator.index(amount) for amount in amounts)
    for meter, amount in enumerate(checked):
        if not low <= amount <= MAX_AMOUNT:
            raise ValueError(f"amount of meter {meter} must be between {low} and {MAX_AMOUNT}, got {amount}")
    return checked


def _time(now_ns: int) -> int:
    now_ns = operator.index(now_ns)
    if not 0 <= now_ns <= MAX_TIME:
        raise ValueError(f"time must be between 0 and {MAX_TIME} ns, got {now_ns}")
    return now_ns


class QuotaPath:
    """The quotas one agent's requests are charged to, found once: ``(key16, meter)`` from the widest level down.

    ``keys`` is what it was made from. ``len()`` is how many of them are defined right now; it is looked up again by
    itself when a quota is defined or removed.
    """

    __slots__ = ("_found", "_generation", "_meters", "_table", "_words", "keys")

    def __init__(self, table: QuotaTable, keys: Sequence[tuple[bytes, int]]) -> None:
        self.keys = tuple((bytes(key), operator.index(meter)) for key, meter in keys)
        self._table = table
        self._words = tuple(key_words(key) for key, _ in self.keys)
        self._meters = 0
        for key, meter in self.keys:
            if not 0 <= meter < MAX_METERS:
                raise ValueError(f"meter index must be between 0 and {MAX_METERS - 1}, got {meter} for {key.hex()}")
            self._meters = max(self._meters, meter + 1)
        if len({key for key, _ in self.keys}) != len(self.keys):
            raise ValueError("a quota appears twice in one path")
        self._generation = -1
        # (word index of the slot, generation << 8 | kind, meter, index in keys)
        self._found: tuple[tuple[int, int, int, int], ...] = ()

    def __len__(self) -> int:
        self._table._look(self)
        return len(self._found)


class QuotaTable(q.Forkable):
    """Quotas in a file mapped by every process that shares them, or in anonymous memory.

    path: file to create or join, private to the user (0600); None for memory shared with forked children only.
    slots: quotas it is sized for, three quarters of the next power of two; 128 bytes each and 4 more of bloom filter.
    reservations: how many may be in flight, 1344 bytes each. A larger table is made of a smaller one by whoever opens
    it first; it never shrinks.

    A reservation is all or nothing over every quota of a path, in every process: amounts are checked against all of
    them inside one short critical section and only then written, so nobody ever sees a charge that is taken back.
    A process killed at any instruction leaves nothing locked and nothing half charged: its successor in the critical
    section undoes what was half done, and what it had reserved is given back when the reservation's time is up.

    Times are UNIX nanoseconds given by the caller; a clock that steps back never reopens a window. Amounts and limits
    are integers up to 2**60 - 1; meters are numbered 0..15; a path has at most 48 defined quotas.

    Raises QuotaTableError when the file cannot be used, QuotaFull when there is no room, QuotaBusy when another
    process keeps the table.
    """

    _engine: Final = q.TWIN

    def __init__(self, path: str | None = None, slots: int = 65536, reservations: int = 8192) -> None:
        self._file = q.TableFile(path, q.Geometry.wanted(slots, reservations), self._engine)
        self._mutex = threading.Lock()
        self._attach()
        q.register(self)

    def _attach(self) -> None:
        self._words = self._file.words
        geometry = self._file.geometry
        self._mask = geometry.slots - 1
        self._geometry = geometry
        self._hasher = Hasher(self._file.seed)

    @property
    def filename(self) -> str | None:
        """The file, None for anonymous memory."""
        return self._file.path

    @property
    def slots(self) -> int:
        """Slots in the table, of which three quarters may be taken."""
        return self._geometry.slots

    @property
    def reservations(self) -> int:
        """Reservations that may be in flight."""
        return self._geometry.records

    def key(self, *fields: bytes | str) -> bytes:
        """The 16-byte key for a list of fields under the table's own hash key: the same in every process and run."""
        return self._hasher(*fields)

    def close(self) -> None:
        """Unmaps the table. Quotas, usage and reservations in flight stay in the file."""
        with self._mutex:
            self._file.close()

    def __enter__(self) -> QuotaTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forked(self) -> None:
        self._mutex = threading.Lock()
        if self._file.seat >= 0:
            self._file.leave()

    @contextmanager
    def _section(self) -> Iterator[None]:
        with self._mutex:
            if not hasattr(self._file, "words"):
                raise QuotaTableError("the quota table is closed")
            if self._file.seat < 0:
                self._file.rejoin()
            self._file.lock()
            try:
                yield
                self._words[q.H_UNDO_COUNT] = 0
            except BaseException:
                q.undo(self._words)
                raise
            finally:
                self._file.unlock()

    def _set(self, at: int, value: int) -> None:
        """Changes a word so that it can be put back by whoever comes after a crash."""
        words = self._words
        n = words[q.H_UNDO_COUNT]
        words[q.H_UNDO + 2 * n] = at
        words[q.H_UNDO + 2 * n + 1] = words[at]
        words[q.H_UNDO_COUNT] = n + 1
        words[at] = value

    def _may_have(self, a: int, b: int) -> bool:
        at = self._geometry.bloom_at + (a & (self._geometry.blocks - 1)) * q.BLOCK_WORDS
        return all(q.unsigned(self._words[word]) & bit for word, bit in enumerate(key_bits(b), at))

    def _slot(self, number: int) -> int:
        return q.HEADER_WORDS + number * q.SLOT_WORDS

    def _find(self, a: int, b: int) -> int:
        """Word index of the slot of the key, -1 when it has none."""
        if not self._may_have(a, b):
            return -1
        words = self._words
        number = b & self._mask
        while words[self._slot(number)]:
            at = self._slot(number)
            mine = q.unsigned(words[at + q.S_A]) == a and q.unsigned(words[at + q.S_B]) == b
            if mine and words[at] & 0xFF != REMOVED:
                return at
            number = (number + 1) & self._mask
        return -1

    def _vacancy(self, b: int) -> int:
        """Word index of the slot where a new key goes: the first removed one on its way, or the first empty one."""
        words = self._words
        number = b & self._mask
        while True:
            at = self._slot(number)
            state = words[at]
            if state & 0xFF == REMOVED:
                return at
            if not state:
                if (words[q.H_USED_SLOTS] + 1) * 4 > self._geometry.slots * 3:
                    raise q.no_slot(self._geometry.slots)
                self._set(q.H_USED_SLOTS, words[q.H_USED_SLOTS] + 1)
                return at
            number = (number + 1) & self._mask

    def _generation_passed(self) -> None:
        self._set(q.H_GENERATION, self._words[q.H_GENERATION] + 1)

    def define(
        self,
        key: bytes,
        kind: int,
        limit: int,
        period_ns: int = 0,
        burst: int = 0,
        window: tuple[int, int] | None = None,
    ) -> None:
        """Defines a quota, or changes one.

        Changing keeps what was used, so what remains moves by new limit - old limit and not below 0. A later
        ``window`` of a CALENDAR quota rolls it, an earlier one is ignored. Another period of a FIXED quota counts
        what is held as used. Another kind starts afresh; so do the holds (not the usage) of a GCRA quota whose rate
        or burst changed: they stay charged. Raises ValueError for arguments that do not suit the kind, QuotaFull.
        """
        a, b = key_words(key)
        definition = checked_definition(kind, limit, period_ns, burst, window)
        with self._section():
            at = self._find(a, b)
            if at < 0:
                at = self._vacancy(b)
                self._set(at + q.S_A, q.signed(a))
                self._set(at + q.S_B, q.signed(b))
                q.bloom_add(self._words, self._geometry, a, b)
                self._write(at, definition)
            elif self._words[at] & 0xFF != kind:
                self._write(at, definition)
            else:
                self._rewrite(at, definition)

    def _write(self, at: int, new: Definition) -> None:
        """A slot from scratch, under the slot's next generation."""
        generation = (self._words[at] >> 8) % 0xFFFF + 1
        fields = (
            (q.S_LIMIT, new.limit),
            (q.S_PERIOD, new.period),
            (q.S_START, new.start),
            (q.S_USED, 0),
            (q.S_RESERVED, 0),
            (q.S_DENIED, 0),
            (q.S_BURST, new.burst),
            (q.S_TOLERANCE_NS, new.tolerance_ns),
            (q.S_TOLERANCE_FRAC, new.tolerance_frac),
            (q.S_REFUNDED, 0),
            (q.S_REFUNDED_FRAC, 0),
            (q.S_STATE, generation << 8 | new.kind),
        )
        for field, value in fields:
            self._set(at + field, value)
        self._generation_passed()

    def _rewrite(self, at: int, new: Definition) -> None:
        words = self._words
        if new.kind == GCRA:
            self._rewrite_rate(at, new)
            return
        if new.kind == CALENDAR:
            self._roll(at, new.start, new.period)
        elif new.kind == FIXED and words[at + q.S_PERIOD] != new.period:
            start = words[at + q.S_START]
            if start % new.period:
                # Holds carry the start of their window; moved, they could not be told from those of a past one.
                self._set(at + q.S_START, start - start % new.period)
                self._set(at + q.S_USED, min(words[at + q.S_USED] + words[at + q.S_RESERVED], MAX_USED))
                self._set(at + q.S_RESERVED, 0)
            self._set(at + q.S_PERIOD, new.period)
        self._set(at + q.S_LIMIT, new.limit)

    def _rewrite_rate(self, at: int, new: Definition) -> None:
        words = self._words
        old = (words[at + q.S_LIMIT], words[at + q.S_PERIOD], words[at + q.S_BURST])
        if old == (new.limit, new.period, new.burst):
            return
        if words[at + q.S_USED]:  # a rest in units of 1 / old limit; rounded up to a nanosecond it needs no unit
            self._set(at + q.S_START, words[at + q.S_START] + 1)
            self._set(at + q.S_USED, 0)
        self._set(at + q.S_REFUNDED_FRAC, 0)  # only ever compared within one generation
        self._set(at + q.S_LIMIT, new.limit)
        self._set(at + q.S_PERIOD, new.period)
        self._set(at + q.S_BURST, new.burst)
        self._set(at + q.S_TOLERANCE_NS, new.tolerance_ns)
        self._set(at + q.S_TOLERANCE_FRAC, new.tolerance_frac)
        generation = (words[at] >> 8) % 0xFFFF + 1
        self._set(at, generation << 8 | GCRA)
        self._generation_passed()

    def remove(self, key: bytes) -> bool:
        """Takes a quota out: its usage is forgotten, its holds end, paths pass it by. False when there was none."""
        a, b = key_words(key)
        with self._section():
            at = self._find(a, b)
            if at < 0:
                return False
            self._set(at, self._words[at] & ~0xFF | REMOVED)
            self._generation_passed()
            return True

    def path(self, keys: Sequence[tuple[bytes, int]]) -> QuotaPath:
        """The path of ``(key16, meter index)`` pairs. Keys without a quota cost nothing and may get one later.

        Raises ValueError when a key appears twice, a meter index is out of bounds, or more than 48 are defined.
        """
        path = QuotaPath(self, keys)
        self._look(path)
        return path

    def _look(self, path: QuotaPath) -> None:
        with self._section():
            self._resolve(path)

    def _resolve(self, path: QuotaPath) -> None:
        if path._table is not self:
            raise ValueError("the path was made by another quota table")
        generation = self._words[q.H_GENERATION]
        if path._generation == generation:
            return
        found = []
        for index, ((a, b), (_, meter)) in enumerate(zip(path._words, path.keys, strict=True)):
            at = self._find(a, b)
            if at >= 0:
                found.append((at, self._words[at], meter, index))
        if len(found) > MAX_PAIRS:
            raise ValueError(f"a path may have {MAX_PAIRS} quotas, this one has {len(found)}")
        path._found = tuple(found)
        path._generation = generation

    def _seen(self, now_ns: int) -> None:
        if now_ns > self._words[q.H_LAST_NOW]:
            self._words[q.H_LAST_NOW] = now_ns

    def reserve(
        self, path: QuotaPath, amounts: tuple[int, ...], now_ns: int, ttl_ns: int, counted: bool = True
    ) -> int:
        """Holds ``amounts[meter]`` on every quota of the path, or nothing on any.

        Returns a reservation id > 0 (``NO_HOLD`` when the path has no quota); -(1 + index) of the first refusing
        pair, counted in the keys the path was made of; or 0 when a calendar window has ended: ``roll`` what
        ``expired`` names and ask again. An amount of 0 is never refused. An amount that does not fit leaves the rest
        to others. The hold ends at ``now_ns + ttl_ns`` if it is neither committed nor released (``sweep``).
        counted: False when the caller asks again after a refusal, which then must not count twice in ``denied``.

        Raises ValueError for amounts or times out of bounds, QuotaFull when no reservation is free even after a sweep.
        """
        if path._table is not self:
            raise ValueError("the path was made by another quota table")
        amounts = _amounts(amounts)
        if len(amounts) < path._meters:
            raise ValueError(f"the path charges meter {path._meters - 1}, got {len(amounts)} amounts")
        now_ns = _time(now_ns)
        if not 0 < operator.index(ttl_ns) <= MAX_TIME:
            raise ValueError(f"ttl_ns must be between 1 and {MAX_TIME}, got {ttl_ns}")
        with self._section():
            self._resolve(path)
            if not path._found:
                return NO_HOLD
            for at, state, meter, index in path._found:
                kind = state & 0xFF
                if kind == CALENDAR and now_ns >= self._words[at + q.S_PERIOD]:
                    return 0
                if amounts[meter] and not self._fits(at, kind, amounts[meter], now_ns):
                    self._words[at + q.S_DENIED] += counted
                    return -(1 + index)
            record = self._take_record(now_ns)
            self._seen(now_ns)
            return self._hold(record, path, amounts, now_ns, ttl_ns)

    def _hold(self, record: int, path: QuotaPath, amounts: tuple[int, ...], now_ns: int, ttl_ns: int) -> int:
        words = self._words
        base = self._record(record)
        rid = int(words[q.H_SEQUENCE]) << q.INDEX_BITS | record
        words[q.H_SEQUENCE] += 1
        words[base + q.R_EXPIRES] = min(now_ns + ttl_ns, MAX_TIME)
        words[base + q.R_COUNTS] = len(path._found) << 32 | len(amounts)
        for meter, amount in enumerate(amounts):
            words[base + q.R_AMOUNTS + meter] = amount
        for n, (at, state, meter, _) in enumerate(path._found):
            number = (at - q.HEADER_WORDS) // q.SLOT_WORDS
            pair = base + q.R_PAIRS + q.PAIR_WORDS * n
            words[pair] = q.signed(number | meter << 32 | (state >> 8) << 48)
            words[pair + 1], words[pair + 2] = self._charge(at, state & 0xFF, amounts[meter], now_ns)
        self._set(base + q.R_ID, rid)
        return rid

    def _fits(self, at: int, kind: int, amount: int, now_ns: int) -> bool:
        words = self._words
        if kind == GCRA:
            if amount > words[at + q.S_BURST] + 1:
                return False
            ns, frac = self._arrival(at, amount, now_ns)
            return (ns, frac) <= (now_ns + words[at + q.S_TOLERANCE_NS], words[at + q.S_TOLERANCE_FRAC])
        taken = words[at + q.S_USED] + words[at + q.S_RESERVED]
        if kind == FIXED and words[at + q.S_START] + words[at + q.S_PERIOD] <= now_ns:
            taken = 0
        return bool(taken + amount <= words[at + q.S_LIMIT])

    def _arrival(self, at: int, amount: int, now_ns: int) -> tuple[int, int]:
        """max(now, tat) + E * amount: whole nanoseconds and a rest in units of 1 / limit."""
        words = self._words
        ns, frac = words[at + q.S_START], words[at + q.S_USED]
        if ns < now_ns:
            ns, frac = now_ns, 0
        whole, rest = divmod(amount * words[at + q.S_PERIOD] + frac, words[at + q.S_LIMIT])
        return (ns + whole, rest) if ns + whole <= MAX_TIME else (MAX_TIME, 0)

    def _gcra_mark(self, at: int) -> tuple[int, int]:
        """Where the last hold ends in arrival time, on a scale that refunds do not move: nanoseconds and the rest."""
        words = self._words
        frac = words[at + q.S_USED] + words[at + q.S_REFUNDED_FRAC]
        carry = 1 if frac >= words[at + q.S_LIMIT] else 0
        return (
            q.signed(words[at + q.S_START] + words[at + q.S_REFUNDED] + carry),
            frac - carry * words[at + q.S_LIMIT],
        )

    def _charge(self, at: int, kind: int, amount: int, now_ns: int) -> tuple[int, int]:
        """Charges a hold that fits; gives the mark by which ``_settle`` knows what became of it since."""
        words = self._words
        if kind == GCRA:
            if amount:
                ns, frac = self._arrival(at, amount, now_ns)
                self._set(at + q.S_START, ns)
                self._set(at + q.S_USED, frac)
            return self._gcra_mark(at)
        if kind == FIXED and words[at + q.S_START] + words[at + q.S_PERIOD] <= now_ns:
            self._set(at + q.S_START, now_ns - now_ns % words[at + q.S_PERIOD])
            self._set(at + q.S_USED, 0)
            self._set(at + q.S_RESERVED, 0)
        if amount:
            self._set(at + q.S_RESERVED, words[at + q.S_RESERVED] + amount)
        return words[at + q.S_START], 0

    def _record(self, index: int) -> int:
        return self._geometry.records_at + index * q.RECORD_WORDS

    def _take_record(self, now_ns: int) -> int:
        """Index of a free record, taken off the free list or from what was never used."""
        words = self._words
        for attempt in range(2):
            if words[q.H_FREE]:
                index = int(words[q.H_FREE]) - 1
                self._set(q.H_FREE, words[self._record(index) + q.R_NEXT])
                return index
            if words[q.H_HIGH] < self._geometry.records:
                index = int(words[q.H_HIGH])
                self._set(q.H_HIGH, index + 1)
                return index
            if attempt or not self._sweep(now_ns):
                break
        raise q.no_record(self._geometry.records)

    def _live(self, rid: int) -> int:
        """Word index of the record of a reservation in flight, -1 for any other number."""
        index = rid & _INDEX_MASK
        if rid <= NO_HOLD or index >= self._geometry.records:
            return -1
        base = self._record(index)
        return base if self._words[base + q.R_ID] == rid else -1

    def commit(self, rid: int, actual: tuple[int, ...], now_ns: int) -> bool:
        """Ends a hold and charges what was really used, ``actual[meter]``.

        Less than reserved is refunded, more is charged as a debt that may pass the limit. A window that ended since
        is left alone: neither refunded nor charged. What time has already given back to a GCRA quota is not refunded
        again. CONCURRENCY only gives its hold back. False, and nothing done, when the reservation is unknown, swept
        or settled already. Raises ValueError when ``actual`` has not as many meters as were reserved.
        """
        actual = _amounts(actual)
        now_ns = _time(now_ns)
        if rid == NO_HOLD:
            return True
        with self._section():
            base = self._live(rid)
            if base < 0:
                return False
            meters = self._words[base + q.R_COUNTS] & 0xFFFFFFFF
            if len(actual) != meters:
                raise ValueError(f"{meters} meters were reserved, {len(actual)} committed")
            self._seen(now_ns)
            self._settle_all(base, actual, now_ns)
            return True

    def release(self, rid: int) -> bool:
        """Ends a hold as if nothing had been used. False when the reservation is unknown, swept or settled already."""
        if rid == NO_HOLD:
            return True
        with self._section():
            base = self._live(rid)
            if base < 0:
                return False
            # The latest time anybody showed: whatever was charged after it cannot be refunded by mistake.
            self._settle_all(base, (0,) * MAX_METERS, self._words[q.H_LAST_NOW])
            return True

    def sweep(self, now_ns: int) -> int:
        """Releases every hold whose time is up; how many. Commit what may have been used before you sweep."""
        now_ns = _time(now_ns)
        with self._section():
            self._seen(now_ns)
            return self._sweep(now_ns)

    def _sweep(self, now_ns: int) -> int:
        words = self._words
        swept = 0
        for index in range(words[q.H_HIGH]):
            base = self._record(index)
            if words[base + q.R_ID] and words[base + q.R_EXPIRES] <= now_ns:
                self._settle_all(base, (0,) * MAX_METERS, max(now_ns, words[q.H_LAST_NOW]))
                words[q.H_UNDO_COUNT] = 0
                swept += 1
        return swept

    def _settle_all(self, base: int, actual: tuple[int, ...], now_ns: int) -> None:
        words = self._words
        for n in range(words[base + q.R_COUNTS] >> 32):
            pair = base + q.R_PAIRS + q.PAIR_WORDS * n
            packed = q.unsigned(words[pair])
            meter = packed >> 32 & 0xFFFF
            at = self._slot(packed & self._mask)
            state = words[at]
            if state >> 8 == packed >> 48 and state & 0xFF != REMOVED:
                reserved = words[base + q.R_AMOUNTS + meter]
                mark = words[pair + 1], words[pair + 2]
                self._settle(at, state & 0xFF, reserved, actual[meter], mark, now_ns)
        self._set(base + q.R_ID, 0)
        self._set(base + q.R_NEXT, words[q.H_FREE])
        self._set(q.H_FREE, (base - self._geometry.records_at) // q.RECORD_WORDS + 1)

    def _settle(self, at: int, kind: int, reserved: int, actual: int, mark: tuple[int, int], now_ns: int) -> None:
        words = self._words
        if kind == GCRA:
            if actual > reserved:
                ns, frac = self._arrival(at, actual - reserved, now_ns)
                self._set(at + q.S_START, ns)
                self._set(at + q.S_USED, frac)
            elif actual < reserved:
                self._refund(at, reserved - actual, mark, max(now_ns, words[q.H_LAST_NOW]))
            return
        if kind in (FIXED, CALENDAR) and mark[0] != words[at + q.S_START]:
            return
        self._set(at + q.S_RESERVED, words[at + q.S_RESERVED] - reserved)
        if kind != CONCURRENCY:
            self._set(at + q.S_USED, min(words[at + q.S_USED] + actual, MAX_USED))

    def _refund(self, at: int, amount: int, mark: tuple[int, int], now_ns: int) -> None:
        """Takes units out of a GCRA quota again, but only as far as time has not drained them.

        A hold occupies the stretch of arrival time that ends at ``mark`` minus what was refunded since. What of it
        lies before now has drained: taking that out would erase what others charged after it. All of it is exact,
        in nanoseconds and a rest in units of 1 / limit.
        """
        words = self._words
        limit = words[at + q.S_LIMIT]
        undrained_frac = mark[1] - words[at + q.S_REFUNDED_FRAC]
        borrow = 1 if undrained_frac < 0 else 0
        undrained = q.signed(mark[0] - words[at + q.S_REFUNDED] - now_ns) - borrow
        if undrained < 0:
            return
        whole, rest = min(divmod(amount * words[at + q.S_PERIOD], limit), (undrained, undrained_frac + borrow * limit))
        frac = words[at + q.S_USED] - rest
        borrow = 1 if frac < 0 else 0
        self._set(at + q.S_START, words[at + q.S_START] - whole - borrow)
        self._set(at + q.S_USED, frac + borrow * limit)
        frac = words[at + q.S_REFUNDED_FRAC] + rest
        carry = 1 if frac >= limit else 0
        self._set(at + q.S_REFUNDED, q.signed(words[at + q.S_REFUNDED] + whole + carry))
        self._set(at + q.S_REFUNDED_FRAC, frac - carry * limit)

    def charge(self, path: QuotaPath, amounts: tuple[int, ...], now_ns: int) -> bool:
        """Charges without asking: usage that happened all the same, or, negative, a credit that may pass the limit.

        For usage learnt after its reservation was swept, for rebuilding a table from a ledger, for corrections.
        CONCURRENCY is not touched. False, and nothing done, when a calendar window has ended.
        """
        amounts = _amounts(amounts, -MAX_AMOUNT)
        if len(amounts) < path._meters:
            raise ValueError(f"the path charges meter {path._meters - 1}, got {len(amounts)} amounts")
        now_ns = _time(now_ns)
        with self._section():
            self._resolve(path)
            words = self._words
            if any(s & 0xFF == CALENDAR and now_ns >= words[at + q.S_PERIOD] for at, s, _, _ in path._found):
                return False
            self._seen(now_ns)
            for at, state, meter, _ in path._found:
                self._charge_anyway(at, state & 0xFF, amounts[meter], now_ns)
            return True

    def _charge_anyway(self, at: int, kind: int, amount: int, now_ns: int) -> None:
        words = self._words
        if kind == CONCURRENCY:
            return
        if kind != GCRA:
            self._charge(at, kind, 0, now_ns)
            self._set(at + q.S_USED, max(-MAX_USED, min(words[at + q.S_USED] + amount, MAX_USED)))
        elif amount > 0:
            ns, frac = self._arrival(at, amount, now_ns)
            self._set(at + q.S_START, ns)
            self._set(at + q.S_USED, frac)
        elif amount < 0:
            self._refund(at, -amount, self._gcra_mark(at), now_ns)

    def expired(self, path: QuotaPath, now_ns: int) -> list[int]:
        """Indices, in the path's keys, of the calendar quotas whose window has ended."""
        now_ns = _time(now_ns)
        with self._section():
            self._resolve(path)
            words = self._words
            return [i for at, s, _, i in path._found if s & 0xFF == CALENDAR and now_ns >= words[at + q.S_PERIOD]]

    def roll(self, key: bytes, start_ns: int, end_ns: int) -> bool:
        """Opens the next window of a calendar quota. False when it is not a later one: somebody rolled it already."""
        a, b = key_words(key)
        checked_window(start_ns, end_ns)
        with self._section():
            at = self._find(a, b)
            if at < 0 or self._words[at] & 0xFF != CALENDAR:
                return False
            return self._roll(at, start_ns, end_ns)

    def _roll(self, at: int, start_ns: int, end_ns: int) -> bool:
        words = self._words
        later = bool(start_ns > words[at + q.S_START])
        if later:
            self._set(at + q.S_USED, 0)
            self._set(at + q.S_RESERVED, 0)
        if start_ns >= words[at + q.S_START]:
            self._set(at + q.S_START, start_ns)
            self._set(at + q.S_PERIOD, end_ns)
        return later

    def _read(self, key: bytes) -> Reading | None:
        a, b = key_words(key)
        with self._section():
            at = self._find(a, b)
            if at < 0:
                return None
            w = self._words
            return Reading(w[at] & 0xFF, *w[at + q.S_LIMIT : at + q.S_BURST + 1])

    def state(self, key: bytes, now_ns: int) -> QuotaState:
        """What the quota says at ``now_ns``. Raises KeyError when there is none."""
        reading = self._read(key)
        if reading is None:
            raise KeyError(key.hex())
        return reading.state(_time(now_ns))

    def retry_after_ns(self, key: bytes, amount: int, now_ns: int) -> int:
        """Nanoseconds until ``amount`` may fit: 0 now (or there is no such quota), -1 never by waiting."""
        reading = self._read(key)
        (amount,) = _amounts((amount,))
        return 0 if reading is None else reading.retry_after_ns(amount, _time(now_ns))


__all__ = ["CALENDAR", "CONCURRENCY", "FIXED", "GCRA", "TOTAL", "QuotaPath", "QuotaTable"]
