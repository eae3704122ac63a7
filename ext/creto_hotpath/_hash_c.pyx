# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""Keyed 128-bit hashes of field lists. Compiled form of ``_hash_py``."""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_Check
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL

cdef extern from "_native.h" nogil:
    uint64_t cr_load64(const void *)
    void cr_sip_init(uint64_t *, uint64_t, uint64_t)
    void cr_sip_word(uint64_t *, uint64_t)
    void cr_sip_words(uint64_t *, const char *, size_t)
    void cr_sip_finish(uint64_t *, uint64_t, uint64_t, uint64_t *)
    void cr_tune_malloc()

KEY_BYTES = 16

# Here because every user of the package hashes something: this module is the first compiled one to be loaded.
cr_tune_malloc()


cdef int load_key(object key, uint64_t *out) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"hash key must be bytes, not {type(key).__name__}")
    if PyBytes_GET_SIZE(key) != 16:
        raise ValueError(f"hash key must be 16 bytes, got {len(key)}")
    memcpy(out, PyBytes_AS_STRING(key), 16)
    return 0


def siphash128(key, bytes data not None):
    """SipHash-2-4-128 of ``data`` under a 16-byte ``key``: 16 bytes. Raises ValueError for another key length."""
    cdef uint64_t[2] k
    cdef uint64_t[4] v
    cdef uint64_t[2] out
    cdef uint64_t last = 0
    cdef const char *p = PyBytes_AS_STRING(data)
    cdef size_t n = PyBytes_GET_SIZE(data)
    cdef size_t whole = n & ~<size_t>7
    load_key(key, k)
    cr_sip_init(v, k[0], k[1])
    cr_sip_words(v, p, whole)
    memcpy(&last, p + whole, n - whole)
    cr_sip_finish(v, last, n, out)
    return PyBytes_FromStringAndSize(<const char *>out, 16)


cdef object hash_fields(const uint64_t *k, tuple fields):
    cdef uint64_t[4] v
    cdef uint64_t[2] out
    cdef uint64_t total = 0
    cdef const char *p
    cdef Py_ssize_t n
    cr_sip_init(v, k[0], k[1])
    for field in fields:
        if PyUnicode_Check(field):
            p = PyUnicode_AsUTF8AndSize(field, &n)
        elif PyBytes_Check(field):
            p = PyBytes_AS_STRING(field)
            n = PyBytes_GET_SIZE(field)
        else:
            raise TypeError(f"a hashed field must be bytes or str, not {type(field).__name__}")
        cr_sip_word(v, <uint64_t>n)
        cr_sip_words(v, p, n)
        total += 8 + ((<uint64_t>n + 7) & ~<uint64_t>7)
    cr_sip_finish(v, 0, total, out)
    return PyBytes_FromStringAndSize(<const char *>out, 16)


cdef class Hasher:
    """``hasher(*fields)`` gives 16 bytes that name the list of fields. See ``_hash_py.Hasher``."""

    cdef uint64_t[2] _key

    def __init__(self, key):
        load_key(key, self._key)

    def __call__(self, *fields):
        return hash_fields(self._key, fields)

    def __repr__(self):
        return "Hasher(<key hidden>)"


cdef uint64_t[2] process_key


def seed_hash(key):
    """Sets the process-wide key of ``hash128``; until then it is random, so its names do not outlive the process."""
    load_key(key, process_key)


def hash128(*fields):
    """16 bytes naming the list of fields under the process-wide key. See ``Hasher`` and ``seed_hash``."""
    return hash_fields(process_key, fields)


seed_hash(os.urandom(KEY_BYTES))
