# cython: language_level=3
from libc.stdint cimport int32_t, int64_t, uint64_t

cdef extern from "_native.h" nogil:
    ctypedef struct cr_txn:
        int64_t *words
        int64_t log
        int64_t count
        int64_t n

ctypedef struct wanted_t:
    uint64_t[2] key
    int32_t meter

ctypedef struct found_t:
    int64_t at          # word index of the slot
    int64_t state       # generation << 8 | kind, as it was when the path was resolved
    int32_t meter
    int32_t index       # in the keys of the path

cdef class QuotaTable

cdef class QuotaPath:
    cdef readonly tuple keys
    cdef QuotaTable table
    cdef wanted_t *wanted
    cdef Py_ssize_t size
    cdef found_t *found
    cdef Py_ssize_t count
    cdef Py_ssize_t meters
    cdef int64_t generation

cdef class QuotaTable:
    cdef object file
    cdef object hasher
    cdef object view            # keeps the mapping exported, so that it cannot be unmapped under w
    cdef int64_t *w
    cdef cr_txn txn
    cdef int64_t slots_mask
    cdef int64_t blocks_mask
    cdef int64_t bloom_at
    cdef int64_t records_at
    cdef int64_t records
    cdef int64_t size
    cdef bint quiet             # refusals are not counted
    cdef int64_t me             # seat + 1, 0 until this process has one
    cdef int fd
    cdef object __weakref__

    cdef int attach(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int64_t find(self, uint64_t a, uint64_t b) noexcept nogil
    cdef int64_t vacancy(self, uint64_t b) noexcept nogil
    cdef int resolve(self, QuotaPath path) noexcept nogil
    cdef int64_t take_record(self, int64_t now) noexcept nogil
    cdef int64_t live(self, int64_t rid) noexcept nogil
    cdef int64_t sweep_locked(self, int64_t now) noexcept nogil
    cdef void settle_all(self, int64_t base, const int64_t *actual, int64_t now) noexcept nogil
    cdef int64_t hold_locked(self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl) noexcept nogil
    cdef int64_t hold(self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl) except? -1
    cdef int64_t hold_quietly(self, QuotaPath path, const int64_t *amounts, Py_ssize_t count, int64_t now, int64_t ttl) except? -1
    cdef bint settle_hold(self, int64_t rid, const int64_t *actual, Py_ssize_t count, int64_t now) except -1
    cdef object read(self, key)

cdef int load_amounts(object amounts, int64_t low, int64_t *out) except -1
cdef int64_t load_time(object now) except -1
cdef int64_t load_ttl(object ttl) except -1
