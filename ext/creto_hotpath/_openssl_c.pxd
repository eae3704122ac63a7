# cython: language_level=3
# What the modules that carry bytes under TLS call of the extension module _openssl_c.


cdef class Engine:
    # NULL: this connection goes through the objects of Python's ssl, the last four.
    cdef void* _ssl
    cdef void* _incoming
    cdef void* _outgoing
    cdef bint _swollen
    # The session's own object keeps the three alive.
    cdef object _inner
    cdef readonly object session
    cdef object _read
    cdef object _write
    cdef object _put
    cdef object _out

    cpdef put(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cpdef bytes content(self, Py_ssize_t length)
    cpdef Py_ssize_t seal(self, piece, Py_ssize_t start) except -1
    cpdef bytes out(self)
    cpdef rest(self)
    cdef bytes _unread(self, int got)
    cdef Py_ssize_t _seal(self, const char* octets, Py_ssize_t size, Py_ssize_t start) except -1
