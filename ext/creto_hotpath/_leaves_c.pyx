# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""The leaves of a Merkle log, many at a time. Compiled form of ``_leaves_py``.

Hashes here where the processor has instructions for it, and by ``hashlib`` where it has not: a call of that takes
longer than the hash.
"""

from creto_hotpath import _leaves_py as plain

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.string cimport memcpy

cdef extern from "_sha256.h" nogil:
    bint cr_sha_has()
    void cr_sha_prefixed(unsigned char, const unsigned char *, size_t, unsigned char *)

HASH_BYTES = plain.HASH_BYTES

cdef bint hard = cr_sha_has()


cdef list checked(entries):
    cdef list found = entries if type(entries) is list else list(entries)
    for entry in found:
        if not PyBytes_CheckExact(entry):
            raise TypeError(f"an entry is bytes, not {type(entry).__name__}")
    return found


def leaf_hashes(entries):
    """SHA-256(0x00 || entry) of each."""
    cdef list found = checked(entries)
    cdef bytes digest
    if not hard:
        return plain.leaf_hashes(found)
    hashes = []
    for entry in found:
        digest = PyBytes_FromStringAndSize(NULL, 32)
        cr_sha_prefixed(0, <const unsigned char *>PyBytes_AS_STRING(entry), PyBytes_GET_SIZE(entry),
                        <unsigned char *>PyBytes_AS_STRING(digest))
        hashes.append(digest)
    return hashes


def perfect_root(hashes):
    """Root over 2**k hashes of 32 bytes. See ``_leaves_py.perfect_root``."""
    cdef list found = checked(hashes)
    cdef Py_ssize_t count = len(found), i
    cdef unsigned char *level
    if not hard:
        return plain.perfect_root(found)
    if count == 0 or count & (count - 1) or any([PyBytes_GET_SIZE(each) != 32 for each in found]):
        raise ValueError("a perfect tree has 1, 2, 4, 8... hashes of 32 bytes")
    level = <unsigned char *>PyMem_Malloc(32 * count)
    if level == NULL:
        raise MemoryError()
    for i in range(count):
        memcpy(level + 32 * i, PyBytes_AS_STRING(found[i]), 32)
    while count > 1:
        count //= 2
        for i in range(count):
            # Over hashes whose parents were made before.
            cr_sha_prefixed(1, level + 64 * i, 64, level + 32 * i)
    root = PyBytes_FromStringAndSize(<char *>level, 32)
    PyMem_Free(level)
    return root


def bundle(entries):
    """The entries, each after its length as big-endian uint16. Raises ValueError for one that is longer."""
    cdef list found = checked(entries)
    cdef Py_ssize_t total = 0, n
    cdef bytes joined
    cdef char *to
    for entry in found:
        n = PyBytes_GET_SIZE(entry)
        if n > 0xFFFF:
            raise ValueError("an entry has at most 65535 bytes")
        total += 2 + n
    joined = PyBytes_FromStringAndSize(NULL, total)
    to = PyBytes_AS_STRING(joined)
    for entry in found:
        n = PyBytes_GET_SIZE(entry)
        to[0] = <char>(n >> 8)
        to[1] = <char>n
        memcpy(to + 2, PyBytes_AS_STRING(entry), n)
        to += 2 + n
    return joined


def bins(entries):
    """The entries, each as a msgpack bin."""
    cdef list found = checked(entries)
    cdef Py_ssize_t total = 0, n
    cdef int width, i
    cdef bytes joined
    cdef char *to
    for entry in found:
        n = PyBytes_GET_SIZE(entry)
        if n > <Py_ssize_t>0xFFFFFFFF:
            raise OverflowError("int too big to convert")
        total += n + (2 if n < 0x100 else 3 if n < 0x10000 else 5)
    joined = PyBytes_FromStringAndSize(NULL, total)
    to = PyBytes_AS_STRING(joined)
    for entry in found:
        n = PyBytes_GET_SIZE(entry)
        width = 1 if n < 0x100 else 2 if n < 0x10000 else 4
        to[0] = <char>(0xC4 + (width >> 1))
        for i in range(width):
            to[1 + i] = <char>(n >> (8 * (width - 1 - i)))
        memcpy(to + 1 + width, PyBytes_AS_STRING(entry), n)
        to += 1 + width + n
    return joined
