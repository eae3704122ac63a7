# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""A bloom filter that answers in one cache line. Compiled form of ``_bloom_py``."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from creto_hotpath._bloom_py import blocks_for

cdef extern from "_native.h" nogil:
    bint cr_bloom_has(const uint64_t *, uint64_t, uint64_t, uint64_t)
    void cr_bloom_put(uint64_t *, uint64_t, uint64_t, uint64_t)

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **, size_t, size_t)


cdef inline int load_key(object key, uint64_t *out) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if PyBytes_GET_SIZE(key) != 16:
        raise ValueError(f"key must be 16 bytes, got {len(key)}")
    memcpy(out, PyBytes_AS_STRING(key), 16)
    return 0


cdef class Bloom:
    """Keys that may have been added; "no" is exact. See ``_bloom_py.Bloom``."""

    cdef uint64_t *words
    cdef uint64_t mask
    cdef readonly Py_ssize_t size_bytes

    def __cinit__(self, Py_ssize_t capacity, Py_ssize_t bits_per_key=16):
        cdef Py_ssize_t blocks
        if capacity < 1 or bits_per_key < 1:
            raise ValueError(f"capacity and bits_per_key must be positive, got {capacity} and {bits_per_key}")
        blocks = blocks_for(capacity, bits_per_key)
        self.mask = blocks - 1
        self.size_bytes = blocks * 64
        if posix_memalign(<void **>&self.words, 64, self.size_bytes) != 0:
            self.words = NULL
            raise MemoryError(f"no memory for a bloom filter of {self.size_bytes} bytes")
        memset(self.words, 0, self.size_bytes)

    def __dealloc__(self):
        free(self.words)

    def add(self, key):
        """Adds a 16-byte key."""
        cdef uint64_t[2] k
        load_key(key, k)
        cr_bloom_put(self.words, self.mask, k[0], k[1])

    def may_contain(self, key):
        """False: ``key`` was never added. True: it probably was."""
        cdef uint64_t[2] k
        load_key(key, k)
        return cr_bloom_has(self.words, self.mask, k[0], k[1])
