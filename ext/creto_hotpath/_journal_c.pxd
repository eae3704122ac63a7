# cython: language_level=3
from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef class Journal:
    cdef uint8_t *data
    cdef Py_ssize_t size        # allocated
    cdef Py_ssize_t end         # appended
    cdef Py_ssize_t begin       # written
    cdef Py_ssize_t max_pending
    cdef int64_t written        # bytes of the segment that the kernel has
    cdef int64_t segment_bytes
    cdef uint8_t *map           # the segment, NULL where it is written instead
    cdef int64_t map_size
    cdef int64_t allocated      # bytes of the segment that the disk has room for
    cdef int fd
    cdef bint each
    cdef bint turning           # the next segment is being begun
    cdef readonly bint healthy
    cdef readonly bint unsynced
    cdef public object dirtied
    cdef readonly int64_t records
    cdef int64_t generation     # of segments
    cdef readonly str path
    cdef str directory
    cdef str worker
    cdef object opener
    cdef list retired           # full segments that no sync has seen
    cdef tuple spare
    cdef object syncing

    cdef int check_open(self) except -1
    cdef uint8_t *room(self, Py_ssize_t n) except NULL
    cdef int grow(self, Py_ssize_t n) except -1
    cdef int tag(self, uint8_t first, uint64_t value, int width) except -1
    cdef int sized(self, Py_ssize_t n, int fix, Py_ssize_t fix_below, int w8, int w16) except -1
    cdef int raw(self, const char *p, Py_ssize_t n) except -1
    cdef int number(self, object value) except -1
    cdef int integer(self, int64_t v) except -1
    cdef int text(self, const char *p, Py_ssize_t n) except -1
    cdef int pack(self, object value, int depth) except -1
    cdef Py_ssize_t open_frame(self) except -1
    cdef int close_frame(self, Py_ssize_t before) except -1
    cpdef flush(self)
    cdef int open_map(self) except -1
    cdef int close_map(self) noexcept
    cdef bint allocate(self, int64_t needed) except -1
    cdef int rotate(self) except -1
    cdef int next_segment(self) except -1
    cdef int abandon(self) except -1
    cdef int force(self) except -1
    cdef int prepare(self) except -1
