# cython: language_level=3
# The C types of _tls_py.py, for the extension module _tls_c that is compiled from it.
cimport cython

ctypedef const unsigned char* octets_t

cdef int _SHAKING, _OPEN, _LINGERING, _OVER
cdef int _HEADER, _FIRST_TYPE, _LAST_TYPE, _MAJOR, _LONGEST, _FRAGMENT, _SILENT_LIMIT, _LINGER_BYTES


cdef class Records:
    cdef readonly Py_ssize_t length
    cdef readonly bint whole
    cdef readonly bint broken
    cdef int _seen
    cdef Py_ssize_t _left

    @cython.locals(octets=octets_t, at=Py_ssize_t, size=Py_ssize_t, byte=int)
    cpdef Py_ssize_t follow(self, bytes data, Py_ssize_t start) except -1


cdef class Secured:
    cdef int state
    cdef object session
    cdef object _decrypted
    cdef object _encrypt
    cdef object _put
    cdef object _out
    cdef Records records
    cdef object protocol
    cdef object _deliver
    cdef object timeout_s
    cdef object loop
    cdef object plain
    cdef object _send
    cdef bint connected
    cdef bint closing
    cdef bint paused
    cdef bint reading
    cdef bint ended
    cdef int silent
    cdef Py_ssize_t drained
    cdef object unsent
    cdef bytes held
    cdef object error
    cdef object _timer
    cdef object _waiter
    cdef object __weakref__

    cpdef close(self)
    cpdef abort(self)
    cdef _tell(self)
    cdef _shake(self)
    cdef _greet(self, bytes data)
    @cython.locals(size=Py_ssize_t, end=Py_ssize_t, records=Records)
    cdef _decrypt(self, bytes data)
    cdef _decrypt_many(self, bytes data, Py_ssize_t end)
    cdef bytes _content(self)
    cdef _aside(self)
    cdef _garbage(self)
    cdef _flow(self)
    cdef _end(self)
    cdef _flush(self)
    cdef _linger(self)
    cdef _fail(self, error)
