# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False, nonecheck=False
"""Shared quotas: what may still be used, decided for all levels and meters at once. Compiled form of ``_quota_py``.

The twin says what every operation means. This form differs in how processes keep out of each other's way: a word in
the table instead of a file lock, taken by compare-and-swap and given back by a store, with the kernel asked about the
owner's life only when it stays away for a millisecond (``_native.h``). The section runs without Python objects, so
within one process the GIL is all that threads need.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy, memset

from creto_hotpath import _quota_file as _layout
from creto_hotpath import _quota_types as _types
from creto_hotpath._hash_c import Hasher
from creto_hotpath._quota_types import (
    CALENDAR, CONCURRENCY, FIXED, GCRA, TOTAL,
    QuotaTableError, Reading, checked_definition, checked_window,
)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    int PyLong_CheckExact(object)

cdef extern from "_native.h" nogil:
    enum: CR_LOCKED, CR_INHERITED, CR_STUCK
    bint cr_bloom_has(const uint64_t *, uint64_t, uint64_t, uint64_t)
    void cr_bloom_put(uint64_t *, uint64_t, uint64_t, uint64_t)
    int cr_lock(int64_t *, int64_t, int, int64_t, int64_t)
    void cr_unlock(int64_t *)
    int64_t cr_acquire(const int64_t *)
    void cr_set(cr_txn *, int64_t, int64_t)
    void cr_done(cr_txn *)
    void cr_undo(cr_txn *, int64_t, int64_t)
    void cr_gcra_add(int64_t *, int64_t *, int64_t, int64_t, int64_t, int64_t)

cdef extern from *:
    """
    #define cr_prefetch(p) __builtin_prefetch((p), 1)
    #define cr_wrap_add(a, b) ((int64_t)((uint64_t)(a) + (uint64_t)(b)))
    #define cr_wrap_sub(a, b) ((int64_t)((uint64_t)(a) - (uint64_t)(b)))
    """
    void cr_prefetch(const void *) nogil
    int64_t cr_wrap_add(int64_t, int64_t) nogil
    int64_t cr_wrap_sub(int64_t, int64_t) nogil

cdef enum:
    K_FIXED = 1
    K_CALENDAR = 2
    K_GCRA = 3
    K_TOTAL = 4
    K_CONCURRENCY = 5
    K_REMOVED = 0x7F

    MAX_METERS = 16
    MAX_PAIRS = 48
    UNDO_ENTRIES = 208
    INDEX_BITS = 20
    NO_HOLD = 1

    HEADER_WORDS = 512
    H_LOCK = 8
    H_GENERATION = 16
    H_USED_SLOTS = 17
    H_SEQUENCE = 18
    H_FREE = 19
    H_HIGH = 20
    H_UNDO_COUNT = 21
    H_LAST_NOW = 22
    H_UNDO = 32

    SLOT_WORDS = 16
    S_STATE = 0
    S_A = 1
    S_B = 2
    S_LIMIT = 3
    S_PERIOD = 4
    S_START = 5
    S_USED = 6
    S_RESERVED = 7
    S_DENIED = 8
    S_BURST = 9
    S_TOLERANCE_NS = 10
    S_TOLERANCE_FRAC = 11
    S_REFUNDED = 12
    S_REFUNDED_FRAC = 13

    RECORD_WORDS = 168
    PAIR_WORDS = 3
    R_ID = 0
    R_EXPIRES = 1
    R_NEXT = 2
    R_COUNTS = 3
    R_AMOUNTS = 8
    R_PAIRS = 24

    # what hold_locked and resolve answer besides reservation ids and refusals
    TOO_MANY_PAIRS = -1000001
    NO_RECORD = -1000002

cdef int64_t MAX_AMOUNT = (<int64_t>1 << 60) - 1
cdef int64_t MAX_USED = <int64_t>1 << 61
cdef int64_t MAX_TIME = (<int64_t>1 << 62) - 1
cdef int64_t PATIENCE_NS = _types.PATIENCE_NS
cdef int64_t LOCK_SEATS = _layout.LOCK_SEATS


cdef dict layout_here():
    return dict(
        MAX_METERS=MAX_METERS, MAX_PAIRS=MAX_PAIRS, UNDO_ENTRIES=UNDO_ENTRIES, INDEX_BITS=INDEX_BITS,
        NO_HOLD=NO_HOLD, HEADER_WORDS=HEADER_WORDS, H_LOCK=H_LOCK, H_GENERATION=H_GENERATION,
        H_USED_SLOTS=H_USED_SLOTS, H_SEQUENCE=H_SEQUENCE, H_FREE=H_FREE, H_HIGH=H_HIGH, H_UNDO_COUNT=H_UNDO_COUNT,
        H_LAST_NOW=H_LAST_NOW, H_UNDO=H_UNDO, SLOT_WORDS=SLOT_WORDS, S_STATE=S_STATE, S_A=S_A, S_B=S_B,
        S_LIMIT=S_LIMIT, S_PERIOD=S_PERIOD, S_START=S_START, S_USED=S_USED, S_RESERVED=S_RESERVED, S_DENIED=S_DENIED,
        S_BURST=S_BURST, S_TOLERANCE_NS=S_TOLERANCE_NS, S_TOLERANCE_FRAC=S_TOLERANCE_FRAC, S_REFUNDED=S_REFUNDED,
        S_REFUNDED_FRAC=S_REFUNDED_FRAC, RECORD_WORDS=RECORD_WORDS, PAIR_WORDS=PAIR_WORDS, R_ID=R_ID, R_EXPIRES=R_EXPIRES, R_NEXT=R_NEXT, R_COUNTS=R_COUNTS,
        R_AMOUNTS=R_AMOUNTS, R_PAIRS=R_PAIRS, MAX_AMOUNT=MAX_AMOUNT, MAX_USED=MAX_USED, MAX_TIME=MAX_TIME,
        REMOVED=K_REMOVED, FIXED=K_FIXED, CALENDAR=K_CALENDAR, GCRA=K_GCRA, TOTAL=K_TOTAL, CONCURRENCY=K_CONCURRENCY,
    )


# Compiled constants that disagree with the layout's would corrupt every table: refuse to load instead.
for _name, _value in layout_here().items():
    if getattr(_layout, _name, getattr(_types, _name, None)) != _value:
        raise ImportError(f"creto_hotpath._quota_c was built for another table layout ({_name}); build it again")


cdef inline int load_key(object key, uint64_t *out) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if PyBytes_GET_SIZE(key) != 16:
        raise ValueError(f"key must be 16 bytes, got {len(key)}")
    memcpy(out, PyBytes_AS_STRING(key), 16)
    return 0


cdef int load_amounts(object amounts, int64_t low, int64_t *out) except -1:
    """How many amounts there are, all of them in ``out``."""
    cdef Py_ssize_t n, i
    cdef int overflow = 0
    cdef int64_t amount
    if not PyTuple_Check(amounts):
        raise TypeError(f"amounts must be a tuple, not {type(amounts).__name__}")
    n = PyTuple_GET_SIZE(amounts)
    if n > MAX_METERS:
        raise ValueError(f"at most {MAX_METERS} meters, got {n} amounts")
    for i in range(n):
        amount = PyLong_AsLongLongAndOverflow(<object>PyTuple_GET_ITEM(amounts, i), &overflow)
        if overflow or not low <= amount <= MAX_AMOUNT:
            raise ValueError(f"amount of meter {i} must be between {low} and {MAX_AMOUNT}, got {amounts[i]}")
        out[i] = amount
    return <int>n


cdef int64_t load_time(object now) except -1:
    cdef int overflow = 0
    cdef int64_t value = PyLong_AsLongLongAndOverflow(now, &overflow)
    if overflow or not 0 <= value <= MAX_TIME:
        raise ValueError(f"time must be between 0 and {MAX_TIME} ns, got {now}")
    return value


cdef int64_t load_ttl(object ttl) except -1:
    cdef int overflow = 0
    cdef int64_t value = PyLong_AsLongLongAndOverflow(ttl, &overflow)
    if overflow or not 0 < value <= MAX_TIME:
        raise ValueError(f"ttl_ns must be between 1 and {MAX_TIME}, got {ttl}")
    return value


cdef inline void arrival(const int64_t *s, int64_t amount, int64_t now, int64_t *ns, int64_t *frac) noexcept nogil:
    """max(now, tat) + E * amount."""
    ns[0] = s[S_START]
    frac[0] = s[S_USED]
    if ns[0] < now:
        ns[0] = now
        frac[0] = 0
    cr_gcra_add(ns, frac, amount, s[S_PERIOD], s[S_LIMIT], MAX_TIME)


cdef inline bint fits(const int64_t *s, int64_t kind, int64_t amount, int64_t now) noexcept nogil:
    cdef int64_t ns, frac, most, taken
    if kind == K_GCRA:
        if amount > s[S_BURST] + 1:
            return False
        arrival(s, amount, now, &ns, &frac)
        most = now + s[S_TOLERANCE_NS]
        return ns < most or (ns == most and frac <= s[S_TOLERANCE_FRAC])
    taken = s[S_USED] + s[S_RESERVED]
    if kind == K_FIXED and s[S_START] + s[S_PERIOD] <= now:
        taken = 0
    return taken + amount <= s[S_LIMIT]


cdef inline void gcra_mark(const int64_t *s, int64_t *mark) noexcept nogil:
    """Where the last hold ends in arrival time, on a scale that refunds do not move."""
    cdef int64_t frac = s[S_USED] + s[S_REFUNDED_FRAC]
    cdef int64_t carry = 1 if frac >= s[S_LIMIT] else 0
    mark[0] = cr_wrap_add(s[S_START] + carry, s[S_REFUNDED])
    mark[1] = frac - carry * s[S_LIMIT]


cdef inline void advance(cr_txn *t, int64_t at, int64_t amount, int64_t now) noexcept nogil:
    """Charges a GCRA quota."""
    cdef int64_t ns, frac
    arrival(t.words + at, amount, now, &ns, &frac)
    cr_set(t, at + S_START, ns)
    cr_set(t, at + S_USED, frac)


cdef inline void charge(
    cr_txn *t, int64_t at, int64_t kind, int64_t amount, int64_t now, int64_t *mark
) noexcept nogil:
    cdef const int64_t *s = t.words + at
    if kind == K_GCRA:
        if amount:
            advance(t, at, amount, now)
        gcra_mark(s, mark)
        return
    if kind == K_FIXED and s[S_START] + s[S_PERIOD] <= now:
        cr_set(t, at + S_START, now - now % s[S_PERIOD])
        cr_set(t, at + S_USED, 0)
        cr_set(t, at + S_RESERVED, 0)
    if amount:
        cr_set(t, at + S_RESERVED, s[S_RESERVED] + amount)
    mark[0] = s[S_START]
    mark[1] = 0


cdef void refund(cr_txn *t, int64_t at, int64_t amount, const int64_t *mark, int64_t now) noexcept nogil:
    cdef const int64_t *s = t.words + at
    cdef int64_t limit = s[S_LIMIT]
    cdef int64_t undrained = cr_wrap_sub(cr_wrap_sub(mark[0], s[S_REFUNDED]), now)
    cdef int64_t undrained_frac = mark[1] - s[S_REFUNDED_FRAC]
    cdef int64_t whole = 0, rest = 0, frac, over
    if undrained_frac < 0:
        undrained_frac += limit
        undrained -= 1
    if undrained < 0:
        return
    cr_gcra_add(&whole, &rest, amount, s[S_PERIOD], limit, MAX_TIME)
    if whole > undrained or (whole == undrained and rest > undrained_frac):
        whole = undrained
        rest = undrained_frac
    frac = s[S_USED] - rest
    over = 1 if frac < 0 else 0
    cr_set(t, at + S_START, s[S_START] - whole - over)
    cr_set(t, at + S_USED, frac + over * limit)
    frac = s[S_REFUNDED_FRAC] + rest
    over = 1 if frac >= limit else 0
    cr_set(t, at + S_REFUNDED, cr_wrap_add(s[S_REFUNDED], whole + over))
    cr_set(t, at + S_REFUNDED_FRAC, frac - over * limit)


cdef inline void settle(
    cr_txn *t, int64_t at, int64_t kind, int64_t reserved, int64_t actual, const int64_t *mark, int64_t now
) noexcept nogil:
    cdef const int64_t *s = t.words + at
    if kind == K_GCRA:
        if actual > reserved:
            advance(t, at, actual - reserved, now)
        elif actual < reserved:
            refund(t, at, reserved - actual, mark, max(now, t.words[H_LAST_NOW]))
        return
    if (kind == K_FIXED or kind == K_CALENDAR) and mark[0] != s[S_START]:
        return
    cr_set(t, at + S_RESERVED, s[S_RESERVED] - reserved)
    if kind != K_CONCURRENCY:
        cr_set(t, at + S_USED, min(s[S_USED] + actual, MAX_USED))


cdef inline bint roll_slot(cr_txn *t, int64_t at, int64_t start, int64_t end) noexcept nogil:
    cdef const int64_t *s = t.words + at
    cdef bint later = start > s[S_START]
    if later:
        cr_set(t, at + S_USED, 0)
        cr_set(t, at + S_RESERVED, 0)
    if start >= s[S_START]:
        cr_set(t, at + S_START, start)
        cr_set(t, at + S_PERIOD, end)
    return later


cdef inline int64_t next_generation(int64_t state) noexcept nogil:
    return (state >> 8) % 0xFFFF + 1


cdef class QuotaPath:
    """The quotas one agent's requests are charged to, found once. See ``_quota_py.QuotaPath``."""

    def __init__(self, QuotaTable table not None, keys):
        cdef Py_ssize_t i, n
        if self.wanted != NULL:
            raise TypeError("a quota path is made once")
        self.keys = tuple([(bytes(key), meter.__index__()) for key, meter in keys])
        self.table = table
        self.generation = -1
        n = len(self.keys)
        self.wanted = <wanted_t *>PyMem_Malloc(max(n, 1) * sizeof(wanted_t))
        self.found = <found_t *>PyMem_Malloc(MAX_PAIRS * sizeof(found_t))
        if self.wanted == NULL or self.found == NULL:
            raise MemoryError()
        self.size = n
        for i, (key, meter) in enumerate(self.keys):
            load_key(key, self.wanted[i].key)
            if not 0 <= meter < MAX_METERS:
                raise ValueError(f"meter index must be between 0 and {MAX_METERS - 1}, got {meter} for {key.hex()}")
            self.wanted[i].meter = meter
            self.meters = max(self.meters, meter + 1)
        if len({key for key, _ in self.keys}) != n:
            raise ValueError("a quota appears twice in one path")

    def __dealloc__(self):
        PyMem_Free(self.wanted)
        PyMem_Free(self.found)

    def __len__(self):
        look(self.table, self)
        return self.count


cdef int look(QuotaTable table, QuotaPath path) except -1:
    cdef int answer
    table.enter()
    answer = table.resolve(path)
    table.leave()
    if answer != 0:
        too_many(path)
    return 0


cdef int too_many(QuotaPath path) except -1:
    raise ValueError(f"a path may have {MAX_PAIRS} quotas, this one has more")


cdef int own(QuotaTable table, QuotaPath path) except -1:
    if path is None or path.table is not table:
        raise ValueError("the path was made by another quota table")
    return 0


cdef class QuotaTable:
    """Quotas in a file mapped by every process that shares them. See ``_quota_py.QuotaTable``."""

    def __init__(self, path=None, slots=65536, reservations=8192):
        if self.file is not None:
            raise TypeError("a quota table is opened once")
        self.file = _layout.TableFile(path, _layout.Geometry.wanted(slots, reservations), _layout.COMPILED)
        self.attach()
        _layout.register(self)

    cdef int attach(self) except -1:
        cdef uint64_t[::1] words
        geometry = self.file.geometry
        self.view = memoryview(self.file.mem).cast("Q")
        words = self.view
        self.w = <int64_t *>&words[0]
        self.size = words.shape[0]
        self.slots_mask = geometry.slots - 1
        self.blocks_mask = geometry.blocks - 1
        self.bloom_at = geometry.bloom_at
        self.records_at = geometry.records_at
        self.records = geometry.records
        self.fd = self.file.fd
        self.me = self.file.seat + 1
        self.hasher = Hasher(self.file.seed)
        self.txn.words = self.w
        self.txn.log = H_UNDO
        self.txn.count = H_UNDO_COUNT
        self.txn.n = 0
        return 0

    @property
    def filename(self):
        """The file, None for anonymous memory."""
        return self.file.path

    @property
    def slots(self):
        """Slots in the table, of which three quarters may be taken."""
        return self.slots_mask + 1

    @property
    def reservations(self):
        """Reservations that may be in flight."""
        return self.records

    def key(self, *fields):
        """The 16-byte key for a list of fields under the table's own hash key: the same in every process and run."""
        return self.hasher(*fields)

    def close(self):
        """Unmaps the table. Quotas, usage and reservations in flight stay in the file."""
        self.w = NULL
        self.me = 0
        if self.view is not None:
            self.view.release()
            self.view = None
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _forked(self):
        if self.w != NULL and self.me:
            self.me = 0
            self.fd = -1
            self.file.leave()

    cdef int enter(self) except -1:
        """Into the critical section. Whatever raises, raises before it."""
        cdef int answer
        if self.w == NULL:
            raise QuotaTableError("the quota table is closed")
        if self.me == 0:
            self.file.rejoin()
            self.fd = self.file.fd
            self.me = self.file.seat + 1
        answer = cr_lock(self.w + H_LOCK, self.me, self.fd, LOCK_SEATS, PATIENCE_NS)
        if answer == CR_STUCK:
            raise _layout.busy(self.file.owner_pid())
        if answer == CR_INHERITED:
            cr_undo(&self.txn, UNDO_ENTRIES, self.size)
        self.txn.n = 0
        return 0

    cdef void leave(self) noexcept:
        cr_done(&self.txn)
        cr_unlock(self.w + H_LOCK)

    cdef int64_t find(self, uint64_t a, uint64_t b) noexcept nogil:
        cdef int64_t number = b & self.slots_mask
        cdef int64_t at
        if not cr_bloom_has(<const uint64_t *>(self.w + self.bloom_at), self.blocks_mask, a, b):
            return -1
        while True:
            at = HEADER_WORDS + number * SLOT_WORDS
            if self.w[at] == 0:
                return -1
            if (
                <uint64_t>self.w[at + S_A] == a
                and <uint64_t>self.w[at + S_B] == b
                and self.w[at] & 0xFF != K_REMOVED
            ):
                return at
            number = (number + 1) & self.slots_mask

    cdef int64_t vacancy(self, uint64_t b) noexcept nogil:
        cdef int64_t number = b & self.slots_mask
        cdef int64_t at
        while True:
            at = HEADER_WORDS + number * SLOT_WORDS
            if self.w[at] & 0xFF == K_REMOVED:
                return at
            if self.w[at] == 0:
                if (self.w[H_USED_SLOTS] + 1) * 4 > (self.slots_mask + 1) * 3:
                    return -1
                cr_set(&self.txn, H_USED_SLOTS, self.w[H_USED_SLOTS] + 1)
                return at
            number = (number + 1) & self.slots_mask

    def define(self, key, kind, limit, period_ns=0, burst=0, window=None):
        """Defines a quota, or changes one. See ``_quota_py.QuotaTable.define``."""
        cdef uint64_t[2] k
        cdef int64_t at
        load_key(key, k)
        new = checked_definition(kind, limit, period_ns, burst, window)
        cdef int64_t c_kind = new.kind, c_limit = new.limit, period = new.period, start = new.start
        cdef int64_t c_burst = new.burst, tolerance_ns = new.tolerance_ns, tolerance_frac = new.tolerance_frac
        self.enter()
        at = self.find(k[0], k[1])
        if at < 0:
            at = self.vacancy(k[1])
            if at < 0:
                self.leave()
                raise _layout.no_slot(self.slots_mask + 1)
            cr_set(&self.txn, at + S_A, <int64_t>k[0])
            cr_set(&self.txn, at + S_B, <int64_t>k[1])
            cr_bloom_put(<uint64_t *>(self.w + self.bloom_at), self.blocks_mask, k[0], k[1])
            write_slot(&self.txn, at, c_kind, c_limit, period, start, c_burst, tolerance_ns, tolerance_frac)
        elif self.w[at] & 0xFF != c_kind:
            write_slot(&self.txn, at, c_kind, c_limit, period, start, c_burst, tolerance_ns, tolerance_frac)
        elif c_kind == K_GCRA:
            rewrite_rate(&self.txn, at, c_limit, period, c_burst, tolerance_ns, tolerance_frac)
        else:
            rewrite_slot(&self.txn, at, c_kind, c_limit, period, start)
        self.leave()

    def remove(self, key):
        """Takes a quota out. See ``_quota_py.QuotaTable.remove``."""
        cdef uint64_t[2] k
        cdef int64_t at
        load_key(key, k)
        self.enter()
        at = self.find(k[0], k[1])
        if at >= 0:
            cr_set(&self.txn, at, (self.w[at] & ~<int64_t>0xFF) | K_REMOVED)
            cr_set(&self.txn, H_GENERATION, self.w[H_GENERATION] + 1)
        self.leave()
        return at >= 0

    def path(self, keys):
        """The path of ``(key16, meter index)`` pairs. See ``_quota_py.QuotaTable.path``."""
        path = QuotaPath(self, keys)
        look(self, path)
        return path

    cdef int resolve(self, QuotaPath path) noexcept nogil:
        cdef int64_t at
        cdef int64_t generation = self.w[H_GENERATION]
        cdef Py_ssize_t i, n = 0
        if path.generation == generation:
            return 0
        for i in range(path.size):
            at = self.find(path.wanted[i].key[0], path.wanted[i].key[1])
            if at < 0:
                continue
            if n == MAX_PAIRS:
                return TOO_MANY_PAIRS
            path.found[n].at = at
            path.found[n].state = self.w[at]
            path.found[n].meter = path.wanted[i].meter
            path.found[n].index = <int32_t>i
            n += 1
        path.count = n
        path.generation = generation
        return 0

    cdef int64_t take_record(self, int64_t now) noexcept nogil:
        cdef int64_t index
        cdef int attempt
        for attempt in range(2):
            if self.w[H_FREE]:
                index = self.w[H_FREE] - 1
                cr_set(&self.txn, H_FREE, self.w[self.records_at + index * RECORD_WORDS + R_NEXT])
                return index
            if self.w[H_HIGH] < self.records:
                index = self.w[H_HIGH]
                cr_set(&self.txn, H_HIGH, index + 1)
                return index
            if attempt or self.sweep_locked(now) == 0:
                break
        return -1

    cdef int64_t hold_locked(
        self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl
    ) noexcept nogil:
        cdef int64_t *w = self.w
        cdef cr_txn *t = &self.txn
        cdef found_t *f
        cdef int64_t kind, amount, record, base, rid
        cdef Py_ssize_t i
        if self.resolve(path) != 0:
            return TOO_MANY_PAIRS
        if path.count == 0:
            return NO_HOLD
        for i in range(path.count):
            f = path.found + i
            kind = f.state & 0xFF
            if kind == K_CALENDAR and now >= w[f.at + S_PERIOD]:
                return 0
            amount = amounts[f.meter]
            if amount and not fits(w + f.at, kind, amount, now):
                if not self.quiet:
                    w[f.at + S_DENIED] += 1
                return -(1 + f.index)
        record = self.take_record(now)
        if record < 0:
            return NO_RECORD
        if now > w[H_LAST_NOW]:
            w[H_LAST_NOW] = now
        base = self.records_at + record * RECORD_WORDS
        rid = w[H_SEQUENCE] << INDEX_BITS | record
        w[H_SEQUENCE] += 1
        w[base + R_EXPIRES] = min(now + ttl, MAX_TIME) if ttl < MAX_TIME - now else MAX_TIME
        w[base + R_COUNTS] = <int64_t>path.count << 32 | <int64_t>count
        memcpy(w + base + R_AMOUNTS, amounts, count * 8)
        base += R_PAIRS
        for i in range(path.count):
            f = path.found + i
            w[base] = (
                (f.at - HEADER_WORDS) // SLOT_WORDS | <int64_t>f.meter << 32 | <int64_t>(<uint64_t>(f.state >> 8) << 48)
            )
            charge(t, f.at, f.state & 0xFF, amounts[f.meter], now, w + base + 1)
            base += PAIR_WORDS
        cr_set(t, self.records_at + record * RECORD_WORDS + R_ID, rid)
        return rid

    cdef int64_t hold(
        self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl
    ) except? -1:
        cdef int64_t answer
        cdef Py_ssize_t i
        if count < path.meters:
            raise ValueError(f"the path charges meter {path.meters - 1}, got {count} amounts")
        if self.w == NULL:
            raise QuotaTableError("the quota table is closed")
        if path.generation == cr_acquire(self.w + H_GENERATION):
            if path.count == 0:
                return NO_HOLD
            for i in range(path.count):
                cr_prefetch(self.w + path.found[i].at)
        self.enter()
        answer = self.hold_locked(path, amounts, count, now, ttl)
        self.leave()
        if answer <= TOO_MANY_PAIRS:
            if answer == NO_RECORD:
                raise _layout.no_record(self.records)
            too_many(path)
        return answer

    cdef int64_t hold_quietly(
        self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl
    ) except? -1:
        """``hold`` by a caller that asks again: a refusal is not counted yet."""
        self.quiet = True
        try:
            return self.hold(path, amounts, count, now, ttl)
        finally:
            self.quiet = False

    def reserve(self, QuotaPath path, amounts, now_ns, ttl_ns, counted=True):
        """Holds ``amounts[meter]`` on every quota of the path, or nothing. See ``_quota_py.QuotaTable.reserve``."""
        cdef int64_t[MAX_METERS] c_amounts
        cdef int count
        own(self, path)
        count = load_amounts(amounts, 0, c_amounts)
        if counted:
            return self.hold(path, c_amounts, count, load_time(now_ns), load_ttl(ttl_ns))
        return self.hold_quietly(path, c_amounts, count, load_time(now_ns), load_ttl(ttl_ns))

    cdef int64_t live(self, int64_t rid) noexcept nogil:
        cdef int64_t index = rid & ((1 << INDEX_BITS) - 1)
        cdef int64_t base
        if rid <= NO_HOLD or index >= self.records:
            return -1
        base = self.records_at + index * RECORD_WORDS
        return base if self.w[base + R_ID] == rid else -1

    def commit(self, int64_t rid, actual, now_ns):
        """Ends a hold and charges what was really used. See ``_quota_py.QuotaTable.commit``."""
        cdef int64_t[MAX_METERS] c_actual
        cdef int count = load_amounts(actual, 0, c_actual)
        return bool(self.settle_hold(rid, c_actual, count, load_time(now_ns)))

    cdef bint settle_hold(self, int64_t rid, const int64_t *actual, Py_ssize_t count, int64_t now) except -1:
        cdef int64_t base, meters
        if rid == NO_HOLD:
            return True
        self.enter()
        base = self.live(rid)
        if base < 0:
            self.leave()
            return False
        meters = self.w[base + R_COUNTS] & 0xFFFFFFFF
        if count != meters:
            self.leave()
            raise ValueError(f"{meters} meters were reserved, {count} committed")
        if now > self.w[H_LAST_NOW]:
            self.w[H_LAST_NOW] = now
        self.settle_all(base, actual, now)
        self.leave()
        return True

    def release(self, int64_t rid):
        """Ends a hold as if nothing had been used. See ``_quota_py.QuotaTable.release``."""
        cdef int64_t[MAX_METERS] nothing
        cdef int64_t base
        if rid == NO_HOLD:
            return True
        memset(nothing, 0, sizeof(nothing))
        self.enter()
        base = self.live(rid)
        if base >= 0:
            self.settle_all(base, nothing, self.w[H_LAST_NOW])
        self.leave()
        return base >= 0

    def sweep(self, now_ns):
        """Releases every hold whose time is up; how many. See ``_quota_py.QuotaTable.sweep``."""
        cdef int64_t now = load_time(now_ns)
        cdef int64_t swept
        self.enter()
        if now > self.w[H_LAST_NOW]:
            self.w[H_LAST_NOW] = now
        swept = self.sweep_locked(now)
        self.leave()
        return swept

    cdef int64_t sweep_locked(self, int64_t now) noexcept nogil:
        cdef int64_t[MAX_METERS] nothing
        cdef int64_t index, base, swept = 0
        memset(nothing, 0, sizeof(nothing))
        for index in range(self.w[H_HIGH]):
            base = self.records_at + index * RECORD_WORDS
            if self.w[base + R_ID] and self.w[base + R_EXPIRES] <= now:
                self.settle_all(base, nothing, max(now, self.w[H_LAST_NOW]))
                cr_done(&self.txn)
                swept += 1
        return swept

    cdef void settle_all(self, int64_t base, const int64_t *actual, int64_t now) noexcept nogil:
        cdef int64_t *w = self.w
        cdef cr_txn *t = &self.txn
        cdef int64_t pairs = min(w[base + R_COUNTS] >> 32, <int64_t>MAX_PAIRS)
        cdef int64_t n, packed, meter, at, state
        cdef const int64_t *pair
        for n in range(pairs):
            pair = w + base + R_PAIRS + PAIR_WORDS * n
            packed = pair[0]
            meter = (packed >> 32) & (MAX_METERS - 1)
            at = HEADER_WORDS + (packed & self.slots_mask) * SLOT_WORDS
            state = w[at]
            if state >> 8 == <int64_t>(<uint64_t>packed >> 48) and state & 0xFF != K_REMOVED:
                settle(t, at, state & 0xFF, w[base + R_AMOUNTS + meter], actual[meter], pair + 1, now)
        cr_set(t, base + R_ID, 0)
        cr_set(t, base + R_NEXT, w[H_FREE])
        cr_set(t, H_FREE, (base - self.records_at) // RECORD_WORDS + 1)

    def charge(self, QuotaPath path, amounts, now_ns):
        """Charges without asking. See ``_quota_py.QuotaTable.charge``."""
        cdef int64_t[MAX_METERS] c_amounts
        cdef int count
        cdef int64_t now, answer
        own(self, path)
        count = load_amounts(amounts, -MAX_AMOUNT, c_amounts)
        if count < path.meters:
            raise ValueError(f"the path charges meter {path.meters - 1}, got {count} amounts")
        now = load_time(now_ns)
        self.enter()
        answer = self.resolve(path)
        if answer == 0:
            answer = charge_anyway(&self.txn, path, c_amounts, now)
        self.leave()
        if answer == TOO_MANY_PAIRS:
            too_many(path)
        return answer == 1

    def expired(self, QuotaPath path, now_ns):
        """Indices, in the path's keys, of the calendar quotas whose window has ended."""
        cdef int64_t now = load_time(now_ns)
        cdef int32_t[MAX_PAIRS] ended
        cdef Py_ssize_t i, n = 0
        cdef int answer
        own(self, path)
        self.enter()
        answer = self.resolve(path)
        for i in range(path.count):
            if path.found[i].state & 0xFF == K_CALENDAR and now >= self.w[path.found[i].at + S_PERIOD]:
                ended[n] = path.found[i].index
                n += 1
        self.leave()
        if answer != 0:
            too_many(path)
        return [ended[i] for i in range(n)]

    def roll(self, key, start_ns, end_ns):
        """Opens the next window of a calendar quota. See ``_quota_py.QuotaTable.roll``."""
        cdef uint64_t[2] k
        cdef int64_t at, start, end
        cdef bint rolled = False
        load_key(key, k)
        checked_window(start_ns, end_ns)
        start = start_ns
        end = end_ns
        self.enter()
        at = self.find(k[0], k[1])
        if at >= 0 and self.w[at] & 0xFF == K_CALENDAR:
            rolled = roll_slot(&self.txn, at, start, end)
        self.leave()
        return rolled

    cdef object read(self, key):
        cdef uint64_t[2] k
        cdef int64_t[SLOT_WORDS] s
        cdef int64_t at
        load_key(key, k)
        self.enter()
        at = self.find(k[0], k[1])
        if at >= 0:
            memcpy(s, self.w + at, SLOT_WORDS * 8)
        self.leave()
        if at < 0:
            return None
        return Reading(
            s[S_STATE] & 0xFF, s[S_LIMIT], s[S_PERIOD], s[S_START], s[S_USED], s[S_RESERVED], s[S_DENIED], s[S_BURST]
        )

    def state(self, key, now_ns):
        """What the quota says at ``now_ns``. Raises KeyError when there is none."""
        reading = self.read(key)
        if reading is None:
            raise KeyError(key.hex())
        return reading.state(load_time(now_ns))

    def retry_after_ns(self, key, amount, now_ns):
        """Nanoseconds until ``amount`` may fit: 0 now (or there is no such quota), -1 never by waiting."""
        cdef int64_t[MAX_METERS] c_amount
        reading = self.read(key)
        load_amounts((amount,), 0, c_amount)
        now = load_time(now_ns)
        return 0 if reading is None else reading.retry_after_ns(c_amount[0], now)


cdef void write_slot(
    cr_txn *t, int64_t at, int64_t kind, int64_t limit, int64_t period, int64_t start, int64_t burst,
    int64_t tolerance_ns, int64_t tolerance_frac
) noexcept nogil:
    cdef int64_t generation = next_generation(t.words[at])
    cr_set(t, at + S_LIMIT, limit)
    cr_set(t, at + S_PERIOD, period)
    cr_set(t, at + S_START, start)
    cr_set(t, at + S_USED, 0)
    cr_set(t, at + S_RESERVED, 0)
    cr_set(t, at + S_DENIED, 0)
    cr_set(t, at + S_BURST, burst)
    cr_set(t, at + S_TOLERANCE_NS, tolerance_ns)
    cr_set(t, at + S_TOLERANCE_FRAC, tolerance_frac)
    cr_set(t, at + S_REFUNDED, 0)
    cr_set(t, at + S_REFUNDED_FRAC, 0)
    cr_set(t, at, generation << 8 | kind)
    cr_set(t, H_GENERATION, t.words[H_GENERATION] + 1)


cdef void rewrite_slot(
    cr_txn *t, int64_t at, int64_t kind, int64_t limit, int64_t period, int64_t start
) noexcept nogil:
    cdef const int64_t *s = t.words + at
    if kind == K_CALENDAR:
        roll_slot(t, at, start, period)
    elif kind == K_FIXED and s[S_PERIOD] != period:
        if s[S_START] % period:
            cr_set(t, at + S_START, s[S_START] - s[S_START] % period)
            cr_set(t, at + S_USED, min(s[S_USED] + s[S_RESERVED], MAX_USED))
            cr_set(t, at + S_RESERVED, 0)
        cr_set(t, at + S_PERIOD, period)
    cr_set(t, at + S_LIMIT, limit)


cdef void rewrite_rate(
    cr_txn *t, int64_t at, int64_t limit, int64_t period, int64_t burst, int64_t tolerance_ns, int64_t tolerance_frac
) noexcept nogil:
    cdef const int64_t *s = t.words + at
    if s[S_LIMIT] == limit and s[S_PERIOD] == period and s[S_BURST] == burst:
        return
    if s[S_USED]:
        cr_set(t, at + S_START, s[S_START] + 1)
        cr_set(t, at + S_USED, 0)
    cr_set(t, at + S_REFUNDED_FRAC, 0)
    cr_set(t, at + S_LIMIT, limit)
    cr_set(t, at + S_PERIOD, period)
    cr_set(t, at + S_BURST, burst)
    cr_set(t, at + S_TOLERANCE_NS, tolerance_ns)
    cr_set(t, at + S_TOLERANCE_FRAC, tolerance_frac)
    cr_set(t, at, next_generation(s[S_STATE]) << 8 | K_GCRA)
    cr_set(t, H_GENERATION, t.words[H_GENERATION] + 1)


cdef int64_t charge_anyway(cr_txn *t, QuotaPath path, const int64_t *amounts, int64_t now) noexcept:
    cdef int64_t *w = t.words
    cdef Py_ssize_t i
    cdef int64_t at, kind, amount
    cdef int64_t[2] mark
    for i in range(path.count):
        if path.found[i].state & 0xFF == K_CALENDAR and now >= w[path.found[i].at + S_PERIOD]:
            return 0
    if now > w[H_LAST_NOW]:
        w[H_LAST_NOW] = now
    for i in range(path.count):
        at = path.found[i].at
        kind = path.found[i].state & 0xFF
        amount = amounts[path.found[i].meter]
        if kind == K_CONCURRENCY:
            continue
        if kind != K_GCRA:
            charge(t, at, kind, 0, now, mark)
            cr_set(t, at + S_USED, max(-MAX_USED, min(w[at + S_USED] + amount, MAX_USED)))
        elif amount > 0:
            advance(t, at, amount, now)
        elif amount < 0:
            gcra_mark(w + at, mark)
            refund(t, at, -amount, mark, now)
    return 1


__all__ = ["CALENDAR", "CONCURRENCY", "FIXED", "GCRA", "TOTAL", "QuotaPath", "QuotaTable"]
