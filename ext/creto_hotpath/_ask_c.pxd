# cython: language_level=3
# What a model request asks for, for modules that need it without an object.
from libc.stdint cimport int64_t

cdef struct ask_t:
    const unsigned char *model      # NULL: none is named
    Py_ssize_t model_size
    Py_ssize_t limit                # -1: none is set
    Py_ssize_t choices
    Py_ssize_t tools                # -1: none are named
    int stream                      # -1: it does not say
    bint includes_usage
    bint refers
    bint caches
    bint audio


cdef bint read_ask(const unsigned char *body, Py_ssize_t size, ask_t *ask) noexcept nogil

cdef bytes ask_key(const ask_t *ask)


cdef class Tariff:
    cdef readonly object window
    cdef readonly bint all_of_it
    cdef readonly int64_t tokens_out
    cdef readonly object rates
    cdef readonly int64_t cost
    cdef readonly int64_t least
    cdef readonly int64_t most
    cdef int64_t bound
    cdef int64_t rate_in
    cdef int64_t rate_out
    cdef bint priced

    cdef bint estimate(self, Py_ssize_t size, int64_t *amounts) noexcept
