# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Policy and quota as a compiled caller has them: the two calls of ``Admission.admit``, in a loop without Python.

Compiled by ``bench_hotpath.py`` into a temporary folder; never installed.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from creto_hotpath._admit_c cimport DecisionTable
from creto_hotpath._quota_c cimport QuotaPath, QuotaTable, load_amounts

cdef enum:
    MOST = 512
    UNCHARGED_BIT = 0x8000
    NO_HOLD = 1


cdef inline int64_t clock() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


def clock_read(int count):
    """Nanoseconds of one read of the clock that everything here is timed with, over ``count`` of them."""
    cdef int i
    cdef int64_t last = 0, begun = clock()
    for i in range(count):
        last = clock()
    return (last - begun) / <double>count


def admission(DecisionTable decisions not None, QuotaTable quota not None, QuotaPath path not None, bytes key,
              int64_t epoch, tuple amounts, int64_t now, int64_t ttl, int batch, int batches):
    """(nanoseconds of one admission, of settling one), over ``batches`` of ``batch`` that are held at once.

    The clock is read twice a batch, not twice a call. Raises RuntimeError when one is not admitted, or charges nothing.
    """
    cdef uint64_t[2] k
    cdef int64_t[16] charged
    cdef int64_t[MOST] held
    cdef int64_t begun, code = 0, admitting = 0, settling = 0
    cdef int i, turn, refused = 0, meters = load_amounts(amounts, 0, charged)
    if not 0 < batch <= MOST or len(key) != 16:
        raise ValueError(f"a batch is 1 to {MOST} admissions, a key 16 bytes")
    memcpy(k, <const char *>key, 16)
    for turn in range(batches):
        begun = clock()
        for i in range(batch):
            code = decisions.find(k[0], k[1], epoch, now)
            if code == 0 or code & UNCHARGED_BIT:
                raise RuntimeError(f"policy says {code}")
            held[i] = quota.hold(path, charged, meters, now, ttl)
            refused += held[i] <= NO_HOLD
        admitting += clock() - begun
        if refused:
            raise RuntimeError("not admitted, or nothing was charged")
        begun = clock()
        for i in range(batch):
            quota.settle_hold(held[i], charged, meters, now)
        settling += clock() - begun
    return admitting / <double>(batch * batches), settling / <double>(batch * batches)
