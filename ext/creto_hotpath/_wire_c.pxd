# cython: language_level=3
from libc.stdint cimport uint32_t


cdef class Poller:
    cdef object loop
    cdef list watched
    cdef int fd
    cdef object __weakref__

    cdef object _item(self, int fd)
    cdef int again(self, Watched item) except -1
    cdef int register(self, Watched item) except -1
    cdef int watch(self, Watched item, uint32_t interest) except -1
    cdef int forget(self, Watched item) except -1


cdef class Watched:
    cdef Poller poller
    cdef int fd
    cdef uint32_t interest

    cdef int ready(self, uint32_t events) except -1


cdef class Wire(Watched):
    cdef object protocol
    cdef object sock
    cdef object fault
    cdef list queue
    cdef Py_ssize_t sent
    cdef Py_ssize_t queued
    cdef int high
    cdef int low
    cdef bint owner
    cdef unsigned char paused
    cdef unsigned char blocked
    cdef unsigned char closing
    cdef unsigned char lost
    cdef unsigned char ended
    cdef unsigned char ending

    cpdef write(self, data)
    cdef int begin(self, Poller poller, int fd, object sock, object protocol) except -1
    cdef int settle(self) except -1
    cdef int receive(self, uint32_t over) except -1
    cdef int end(self) except -1
    cdef int flush(self) except -1
    cdef int consume(self, Py_ssize_t size) except -1
    cdef int press(self) except -1
    cdef int tell(self, str what) except -1
    cdef int failed(self, int number) except -1
    cdef int lose(self, error) except -1
    cdef int crashed(self, str what, error) except -1
    cdef release(self)


cdef class Listener(Watched):
    cdef object factory
    cdef object sock

    cdef int accepted(self, int fd) except -1
    cdef int breathe(self, error) except -1
