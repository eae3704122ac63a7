# cython: language_level=3
from libc.stdint cimport int64_t, uint64_t

from creto_hotpath._quota_c cimport QuotaTable

cdef struct entry_t:
    uint64_t a
    uint64_t b
    int64_t expires     # 0: empty
    int64_t value       # epoch << 16 | code


cdef class DecisionTable:
    cdef entry_t *table
    cdef uint64_t mask
    cdef readonly Py_ssize_t entries
    cdef public int64_t epoch

    cdef entry_t *victim(self, uint64_t a, uint64_t b, int64_t epoch) noexcept
    cdef int64_t find(self, uint64_t a, uint64_t b, int64_t epoch, int64_t now) noexcept


cdef class Admission:
    cdef DecisionTable decisions
    cdef QuotaTable quota
