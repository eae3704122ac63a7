# cython: language_level=3
# The C types of _tls_py.py, for the extension module _tls_c that is compiled from it.
cimport cython
cimport creto_hotpath._openssl_c as openssl

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
    # What every record needs stands together, within two lines of cache.
    cdef int state
    cdef int silent
    cdef bint ended
    cdef bint connected
    cdef bint closing
    cdef bint paused
    cdef bint reading
    cdef openssl.Engine engine
    cdef Records records
    cdef object _deliver
    cdef object _send
    cdef bytes held
    cdef object session
    cdef object protocol
    cdef object timeout_s
    cdef object loop
    cdef object plain
    cdef Py_ssize_t drained
    cdef object unsent
    cdef object error
    cdef object _timer
    cdef object _waiter
    cdef object __weakref__

    @cython.locals(size=Py_ssize_t, sent=Py_ssize_t)
    cpdef write(self, data)
    @cython.locals(size=Py_ssize_t, sent=Py_ssize_t)
    cpdef writelines(self, pieces)
    cpdef close(self)
    cpdef abort(self)
    cdef _tell(self)
    cdef _shake(self)
    cdef _greet(self, bytes data)
    @cython.locals(size=Py_ssize_t, start=Py_ssize_t, end=Py_ssize_t, records=Records, whole=bytes, content=bytes,
                   parts=list)
    cdef _decrypt(self, bytes data)
    @cython.locals(content=bytes)
    cdef bytes _content(self)
    cdef _aside(self)
    cdef _garbage(self)
    cdef _flow(self)
    cdef _end(self)
    cdef _flush(self)
    cdef _linger(self)
    cdef _fail(self, error)
