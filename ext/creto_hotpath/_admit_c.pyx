# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False, nonecheck=False
"""Policy and quota in one call: a cached decision, then the charge. Compiled form of ``_admit_py``."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from creto_hotpath._quota_c cimport QuotaPath, QuotaTable, load_amounts, load_time, load_ttl

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **, size_t, size_t)

cdef enum:
    WAYS_ = 4
    MAX_METERS = 16
    UNCHARGED_BIT = 0x8000

WAYS = 4
MAX_CODE = 0xFFFF
MAX_EPOCH = (1 << 47) - 1
UNCHARGED = 0x8000
MISS = (0, 0)

cdef tuple miss = MISS
cdef int64_t max_epoch = MAX_EPOCH
cdef int64_t max_time = (<int64_t>1 << 62) - 1

cdef inline int load_key(object key, uint64_t *out) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if PyBytes_GET_SIZE(key) != 16:
        raise ValueError(f"key must be 16 bytes, got {len(key)}")
    memcpy(out, PyBytes_AS_STRING(key), 16)
    return 0


cdef inline int64_t bounded(str name, object value, int64_t low, int64_t high) except -1:
    cdef int overflow = 0
    cdef int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return number


cdef class DecisionTable:
    """Answers of the policy engine, kept until they expire or the policies change. See ``_admit_py.DecisionTable``."""

    def __cinit__(self, Py_ssize_t entries=65536):
        cdef Py_ssize_t sets
        if not 1 <= entries <= 1 << 26:
            raise ValueError(f"entries must be between 1 and {1 << 26}, got {entries}")
        sets = 1
        while sets * WAYS_ < entries:
            sets *= 2
        self.mask = sets - 1
        self.entries = sets * WAYS_
        if posix_memalign(<void **>&self.table, 128, self.entries * sizeof(entry_t)) != 0:
            self.table = NULL
            raise MemoryError(f"no memory for {self.entries} decisions")
        self.clear()

    def __dealloc__(self):
        free(self.table)

    def put(self, key, epoch, code, expires_ns):
        """Keeps ``code`` for ``key`` while the epoch is ``epoch`` and the time before ``expires_ns``."""
        cdef uint64_t[2] k
        cdef int64_t c_epoch, value
        cdef entry_t *entry
        load_key(key, k)
        c_epoch = bounded("epoch", epoch, 0, max_epoch)
        value = c_epoch << 16 | bounded("code", code, 1, 0xFFFF)
        expires = bounded("expires_ns", expires_ns, 1, max_time)
        entry = self.victim(k[0], k[1], c_epoch)
        entry.a = k[0]
        entry.b = k[1]
        entry.expires = expires
        entry.value = value

    cdef entry_t *victim(self, uint64_t a, uint64_t b, int64_t epoch) noexcept:
        cdef entry_t *ways = self.table + (b & self.mask) * WAYS_
        cdef int i, soonest = 0
        for i in range(WAYS_):
            if ways[i].expires and ways[i].a == a and ways[i].b == b:
                return ways + i
        for i in range(WAYS_):
            if not ways[i].expires:
                return ways + i
        for i in range(WAYS_):
            if ways[i].value >> 16 != epoch:
                return ways + i
            if ways[i].expires < ways[soonest].expires:
                soonest = i
        return ways + soonest

    cdef int64_t find(self, uint64_t a, uint64_t b, int64_t epoch, int64_t now) noexcept:
        cdef entry_t *ways = self.table + (b & self.mask) * WAYS_
        cdef int i
        for i in range(WAYS_):
            if ways[i].b == b and ways[i].a == a and ways[i].expires:
                return ways[i].value & 0xFFFF if ways[i].value >> 16 == epoch and ways[i].expires > now else 0
        return 0

    def get(self, key, epoch, now_ns):
        """The code kept for ``key``; 0 when there is none of this epoch that has not expired."""
        cdef uint64_t[2] k
        load_key(key, k)
        return self.find(k[0], k[1], bounded("epoch", epoch, 0, max_epoch), load_time(now_ns))

    @property
    def used(self):
        """Places that are taken, by answers that may have expired too. Looks at all of them."""
        cdef Py_ssize_t i, n = 0
        for i in range(self.entries):
            n += self.table[i].expires != 0
        return n

    def clear(self):
        """Forgets every answer."""
        memset(self.table, 0, self.entries * sizeof(entry_t))


cdef class Admission:
    """A decision table and a quota table behind one call."""

    def __init__(self, DecisionTable decisions not None, QuotaTable quota not None):
        self.decisions = decisions
        self.quota = quota

    def admit(self, key, epoch, QuotaPath path, amounts, now_ns, ttl_ns):
        """``(code, reservation)``: what policy said and what the quotas made of it. See ``_admit_py.Admission.admit``.
        """
        cdef uint64_t[2] k
        cdef int64_t[MAX_METERS] c_amounts
        cdef int64_t code, now
        cdef int count
        load_key(key, k)
        code = bounded("epoch", epoch, 0, max_epoch)
        now = load_time(now_ns)
        code = self.decisions.find(k[0], k[1], code, now)
        if code == 0:
            return miss
        if code & UNCHARGED_BIT:
            return code, 0
        if path is None:
            return code, 1
        if path.table is not self.quota:
            raise ValueError("the path was made by another quota table")
        count = load_amounts(amounts, 0, c_amounts)
        return code, self.quota.hold(path, c_amounts, count, now, load_ttl(ttl_ns))
