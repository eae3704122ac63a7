# cython: language_level=3
"""For other compiled modules: counting by cell number without a Python call. The cells are not checked here."""

from libc.stdint cimport int64_t, uint64_t

cdef class Counters:
    cdef object file
    cdef object view            # keeps the mapping exported, so that it cannot be unmapped under cells
    cdef int64_t *cells
    cdef readonly int64_t used

    cdef int check(self, int64_t cell) except -1

cdef extern from *:
    """
    #include <stdint.h>
    /* Bucket of a value: its two leading digits, 90 to a decade; see _counters_file.bucket_of. */
    static const uint64_t cr_pow10[14] = {
        1ull, 10ull, 100ull, 1000ull, 10000ull, 100000ull, 1000000ull, 10000000ull, 100000000ull, 1000000000ull,
        10000000000ull, 100000000000ull, 1000000000000ull, 10000000000000ull};
    static inline int64_t cr_bucket(int64_t value) {
        uint64_t v;
        int digits;
        if (value <= 1000) return 0;
        if (value > 1000000000000ll) return 811;
        v = (uint64_t)value - 1;
        digits = ((64 - __builtin_clzll(v)) * 1233) >> 12;
        digits -= v < cr_pow10[digits];                       /* floor(log10 v) */
        switch (digits) {                                     /* by constants: the compiler multiplies */
        case 3: v /= 100ull; break;
        case 4: v /= 1000ull; break;
        case 5: v /= 10000ull; break;
        case 6: v /= 100000ull; break;
        case 7: v /= 1000000ull; break;
        case 8: v /= 10000000ull; break;
        case 9: v /= 100000000ull; break;
        case 10: v /= 1000000000ull; break;
        default: v /= 10000000000ull;
        }
        return 1 + (digits - 3) * 90 + (int64_t)v - 10;
    }
    /* Unsigned, so that a number that grows beyond 64 bits wraps instead of being undefined. */
    static inline void cr_count(int64_t *cell, int64_t amount) {
        *cell = (int64_t)((uint64_t)*cell + (uint64_t)amount);
    }
    """
    int64_t cr_bucket(int64_t) noexcept nogil
    void cr_count(int64_t *, int64_t) noexcept nogil


cdef inline void counters_add(Counters counters, int64_t cell, int64_t amount) noexcept:
    cr_count(counters.cells + cell, amount)


cdef inline void counters_set(Counters counters, int64_t cell, int64_t value) noexcept:
    counters.cells[cell] = value


cdef inline void counters_observe(Counters counters, int64_t cell, int64_t value_ns) noexcept:
    cdef int64_t value = value_ns if value_ns > 0 else 0
    cr_count(counters.cells + cell, value)
    cr_count(counters.cells + cell + 1 + cr_bucket(value), 1)
