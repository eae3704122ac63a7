# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""An append-only log of records that survives a killed process. Compiled form of ``_journal_py``.

Records are encoded straight into the write buffer, so an append allocates nothing once the buffer has grown to the
size of a busy turn.
"""

import errno as errors
import os
import stat
import threading

cimport cython

from creto_hotpath import _journal_file as files

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Check, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Check, PyDict_Next, PyDict_Size
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.list cimport PyList_Check, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_Check
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_Check
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, strerror

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    unsigned long long PyLong_AsUnsignedLongLong(object) except? 0xFFFFFFFFFFFFFFFF

cdef extern from "sys/mman.h" nogil:
    enum: PROT_READ
    enum: PROT_WRITE
    enum: MAP_SHARED
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, int64_t)
    int munmap(void *, size_t)

cdef extern from "fcntl.h" nogil:
    int posix_fallocate(int, int64_t, int64_t)

cdef extern from "unistd.h" nogil:
    int ftruncate(int, int64_t)
    ssize_t write(int, const void *, size_t)
    int fdatasync(int)

cdef extern from "_native.h" nogil:
    void cr_crc_init()
    uint32_t cr_crc_soft(uint32_t, const unsigned char *, size_t)
    uint32_t cr_crc_hard(uint32_t, const unsigned char *, size_t)
    bint cr_crc_has_hard()
    int64_t cr_expanded(const uint8_t *, size_t, size_t)
    void cr_expand(const uint8_t *, const uint8_t *, size_t, uint8_t *)

cr_crc_init()

cdef bint hard = cr_crc_has_hard()
cdef int64_t LOWEST_INT32 = -(<int64_t>1 << 31)
cdef uint32_t ONES = ~<uint32_t>0
cdef Py_ssize_t HEADER_BYTES = files.HEADER_BYTES
cdef Py_ssize_t MAX_PAYLOAD = files.MAX_PAYLOAD
cdef uint8_t ABBREVIATED = files.ABBREVIATED
# How much of a segment is allocated at a time; a full disk is met there, and not as a signal in the middle of a store.
cdef int64_t STEP = 1 << 16
# msgpack-python's own limit, so that both forms refuse the same records
cdef int DEEPEST = 511


cdef inline uint32_t crc(const unsigned char *p, size_t n) noexcept nogil:
    if hard:
        return cr_crc_hard(ONES, p, n) ^ ONES
    return cr_crc_soft(ONES, p, n) ^ ONES


def crc32c(bytes data not None):
    """CRC-32C (Castagnoli) of ``data``."""
    return crc(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


def crc32c_table(bytes data not None):
    """The same by tables, as on machines without the instruction."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(data)
    return <uint32_t>(cr_crc_soft(ONES, p, PyBytes_GET_SIZE(data)) ^ ONES)


def expand(bytes base not None, bytes payload not None):
    """What ``payload`` abbreviates, None when it does not fit. See ``_journal_file.expand``."""
    cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(payload)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(payload)
    cdef int64_t size = cr_expanded(p, n, PyBytes_GET_SIZE(base))
    cdef bytes out
    if size < 0:
        return None
    out = PyBytes_FromStringAndSize(NULL, size)
    cr_expand(<const uint8_t *>PyBytes_AS_STRING(base), p, n, <uint8_t *>PyBytes_AS_STRING(out))
    return out


def payload_at(fd, offset):
    """The payload of the frame at ``offset``. See ``_journal_file.payload_at``."""
    return files.payload_at(fd, offset, crc32c)


def read_frames(path, offset=0):
    """``(payload, next offset)`` of every whole frame from ``offset`` on. See ``_journal_py.read_frames``."""
    return files.read_frames(path, offset, crc32c, expand)


def recover(path):
    """Cuts a torn tail off a segment and syncs it. See ``_journal_py.recover``."""
    return files.recover(path, crc32c)


@cython.final
cdef class Journal:
    """Appends records to segments ``<worker>-<n>.jnl``. See ``_journal_py.Journal``."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, directory, worker, segment_bytes=files.SEGMENT_BYTES, flush="turn", opener=None,
                 max_pending=files.MAX_PENDING):
        if self.fd >= 0:
            raise TypeError("a journal is opened once")
        if flush not in ("turn", "record"):
            raise ValueError(f"flush must be 'turn' or 'record', got {flush!r}")
        if segment_bytes < 1 or max_pending < 1:
            raise ValueError("segment_bytes and max_pending must be positive")
        self.directory = os.fspath(directory)
        self.worker = files.checked_worker(worker)
        self.segment_bytes = segment_bytes
        self.each = flush == "record"
        self.opener = opener
        self.max_pending = max_pending
        self.healthy = True
        self.retired = []
        self.syncing = threading.Lock()
        self.fd, self.path = files.begin_segment(self.directory, self.worker, opener)
        self.open_map()

    def __dealloc__(self):
        PyMem_Free(self.data)
        self.close_map()
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def segment(self):
        """File name of the segment that is being written."""
        return os.path.basename(self.path)

    @property
    def pending(self):
        """Bytes appended and not yet written."""
        return self.end - self.begin

    @property
    def offset(self):
        """Where the next frame of this segment will begin."""
        return self.written + (self.end - self.begin)

    cdef int check_open(self) except -1:
        if self.fd < 0:
            raise ValueError("the journal is closed")
        return 0

    cdef uint8_t *room(self, Py_ssize_t n) except NULL:
        """Where the next n bytes go; they count as appended."""
        if self.end + n > self.size:
            self.grow(n)
        self.end += n
        return self.data + self.end - n

    cdef int grow(self, Py_ssize_t n) except -1:
        cdef Py_ssize_t wanted
        cdef void *data
        if self.begin:
            memmove(self.data, self.data + self.begin, self.end - self.begin)
            self.end -= self.begin
            self.begin = 0
        if self.end + n > self.size:
            wanted = max(2 * self.size, max(self.end + n, <Py_ssize_t>65536))
            data = PyMem_Realloc(self.data, wanted)
            if data == NULL:
                raise MemoryError()
            self.data = <uint8_t *>data
            self.size = wanted
        return 0

    cdef int tag(self, uint8_t first, uint64_t value, int width) except -1:
        """A type byte and a big-endian number."""
        cdef uint8_t *p = self.room(1 + width)
        cdef int i
        p[0] = first
        for i in range(width):
            p[1 + i] = <uint8_t>(value >> (8 * (width - 1 - i)))
        return 0

    cdef int sized(self, Py_ssize_t n, int fix, Py_ssize_t fix_below, int w8, int w16) except -1:
        """The head of a string, bytes, array or map; fix or w8 is 0 where the type has no such form."""
        if n < fix_below:
            return self.tag(<uint8_t>(fix | n), 0, 0)
        if w8 and n <= 0xFF:
            return self.tag(<uint8_t>w8, n, 1)
        if n <= 0xFFFF:
            return self.tag(<uint8_t>w16, n, 2)
        return self.tag(<uint8_t>(w16 + 1), n, 4)

    cdef int raw(self, const char *p, Py_ssize_t n) except -1:
        if n > MAX_PAYLOAD:
            raise files.frame_error(n)
        memcpy(self.room(n), p, n)
        return 0

    cdef int number(self, object value) except -1:
        cdef int overflow = 0
        cdef int64_t v = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow > 0:
            try:
                return self.tag(0xCF, PyLong_AsUnsignedLongLong(value), 8)
            except OverflowError:
                overflow = -1
        if overflow < 0:
            raise OverflowError("Integer value out of range")
        return self.integer(v)

    cdef int integer(self, int64_t v) except -1:
        if v >= 0:
            if v < 0x80:
                return self.tag(<uint8_t>v, 0, 0)
            if v <= 0xFF:
                return self.tag(0xCC, v, 1)
            if v <= 0xFFFF:
                return self.tag(0xCD, v, 2)
            if v <= <int64_t>ONES:
                return self.tag(0xCE, v, 4)
            return self.tag(0xCF, v, 8)
        if v >= -0x20:
            return self.tag(<uint8_t>v, 0, 0)
        if v >= -0x80:
            return self.tag(0xD0, <uint64_t>v, 1)
        if v >= -0x8000:
            return self.tag(0xD1, <uint64_t>v, 2)
        if v >= LOWEST_INT32:
            return self.tag(0xD2, <uint64_t>v, 4)
        return self.tag(0xD3, <uint64_t>v, 8)

    cdef int text(self, const char *p, Py_ssize_t n) except -1:
        """ASCII or UTF-8 as a msgpack string."""
        self.sized(n, 0xA0, 32, 0xD9, 0xDA)
        return self.raw(p, n)

    cdef int pack(self, object value, int depth) except -1:
        cdef const char *p
        cdef Py_ssize_t n, i
        cdef double number
        cdef uint64_t bits
        cdef PyObject *k
        cdef PyObject *v
        if depth < 0:
            raise ValueError("recursion limit exceeded")
        if value is None:
            return self.tag(0xC0, 0, 0)
        if value is True:
            return self.tag(0xC3, 0, 0)
        if value is False:
            return self.tag(0xC2, 0, 0)
        if PyUnicode_Check(value):
            p = PyUnicode_AsUTF8AndSize(value, &n)
            self.sized(n, 0xA0, 32, 0xD9, 0xDA)
            return self.raw(p, n)
        if PyLong_Check(value):
            return self.number(value)
        if PyBytes_Check(value):
            n = PyBytes_GET_SIZE(value)
            self.sized(n, 0, 0, 0xC4, 0xC5)
            return self.raw(PyBytes_AS_STRING(value), n)
        if PyTuple_Check(value):
            n = PyTuple_GET_SIZE(value)
            self.sized(n, 0x90, 16, 0, 0xDC)
            for i in range(n):
                self.pack(<object>PyTuple_GET_ITEM(value, i), depth - 1)
            return 0
        if PyFloat_Check(value):
            number = PyFloat_AS_DOUBLE(value)
            memcpy(&bits, &number, 8)
            return self.tag(0xCB, bits, 8)
        if PyList_Check(value):
            n = PyList_GET_SIZE(value)
            self.sized(n, 0x90, 16, 0, 0xDC)
            for i in range(n):
                self.pack(<object>PyList_GET_ITEM(value, i), depth - 1)
            return 0
        if PyDict_Check(value):
            self.sized(PyDict_Size(value), 0x80, 16, 0, 0xDE)
            i = 0
            while PyDict_Next(value, &i, &k, &v):
                self.pack(<object>k, depth - 1)
                self.pack(<object>v, depth - 1)
            return 0
        if PyByteArray_Check(value):
            n = PyByteArray_GET_SIZE(value)
            self.sized(n, 0, 0, 0xC4, 0xC5)
            return self.raw(PyByteArray_AS_STRING(value), n)
        raise TypeError(f"can not serialize '{type(value).__name__}' object")

    def append(self, record):
        """Adds one record; the offset at which its frame begins. See ``_journal_py.Journal.append``."""
        cdef Py_ssize_t before = self.open_frame()
        cdef int64_t offset = self.written + before
        try:
            if PyBytes_Check(record):
                if PyBytes_GET_SIZE(record) and <uint8_t>PyBytes_AS_STRING(record)[0] == ABBREVIATED:
                    raise files.not_msgpack()
                self.raw(PyBytes_AS_STRING(record), PyBytes_GET_SIZE(record))
            elif PyTuple_Check(record) or PyList_Check(record):
                self.pack(record, DEEPEST)
            else:
                raise TypeError(f"a record is bytes, a tuple or a list, not {type(record).__name__}")
            self.close_frame(before)
        except BaseException:
            self.end = self.begin + before
            raise
        if self.each:
            self.flush()
        return offset

    cdef Py_ssize_t open_frame(self) except -1:
        """Makes room for the head of a frame; where it begins among what is pending.

        Whoever fails before ``close_frame`` sets ``end`` back to ``begin`` plus that.
        """
        cdef Py_ssize_t before
        self.check_open()
        before = self.end - self.begin
        self.room(HEADER_BYTES)
        return before

    cdef int close_frame(self, Py_ssize_t before) except -1:
        """Completes the frame opened at ``before`` with what was put behind its head."""
        cdef Py_ssize_t length = self.end - self.begin - before - HEADER_BYTES
        cdef uint8_t *head
        if not 1 <= length <= MAX_PAYLOAD:
            raise files.frame_error(length)
        if before + HEADER_BYTES + length > self.max_pending:
            raise files.full_error(self.path, before)
        head = self.data + self.begin + before
        store32(head, <uint32_t>length)
        # The sum covers the length and the payload; the four bytes between them are where it goes.
        store32(head + 4, frame_crc(head, length))
        self.records += 1
        return 0

    cdef int open_map(self) except -1:
        """Maps the segment, so that a record is handed to the kernel by storing it; what cannot be mapped is written."""
        cdef void *map
        self.allocated = 0
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            return 0
        # Whatever is pending when a segment is full still goes into it.
        self.map_size = self.segment_bytes + self.max_pending
        map = mmap(NULL, self.map_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if map != MAP_FAILED:
            self.map = <uint8_t *>map
        return 0

    cdef int close_map(self) noexcept:
        """Cuts off what was allocated and not used."""
        if self.map == NULL:
            return 0
        munmap(self.map, self.map_size)
        self.map = NULL
        if self.fd >= 0 and self.allocated > self.written:
            ftruncate(self.fd, self.written)
        return 0

    cdef bint allocate(self, int64_t needed) except -1:
        """Makes room on the disk; False where the file system cannot, and the segment is written instead."""
        cdef int64_t size = min((needed // STEP + 1) * STEP, self.map_size)
        cdef int code = posix_fallocate(self.fd, self.allocated, size - self.allocated)
        if code == 0:
            self.allocated = size
            return True
        if self.allocated == 0 and (code == errors.EOPNOTSUPP or code == errors.EINVAL):
            self.close_map()
            return False
        self.healthy = False
        raise OSError(code, strerror(code).decode(), self.path)

    cpdef flush(self):
        """Hands everything appended to the kernel. See ``_journal_py.Journal.flush``."""
        cdef ssize_t n
        cdef int code
        cdef bint wrote = False
        self.check_open()
        if self.map != NULL and self.begin < self.end:
            n = self.end - self.begin
            if self.written + n <= self.allocated or self.allocate(self.written + n):
                memcpy(self.map + self.written, self.data + self.begin, n)
                self.written += n
                self.begin = self.end
                wrote = True
        while self.begin < self.end:
            n = write(self.fd, self.data + self.begin, self.end - self.begin)
            if n < 0:
                code = errno
                if code == EINTR:
                    PyErr_CheckSignals()
                    continue
                self.healthy = False
                raise OSError(code, strerror(code).decode(), self.path)
            self.begin += n
            self.written += n
            wrote = True
        self.begin = self.end = 0
        if wrote:
            self.healthy = True
            if not self.unsynced:
                self.unsynced = True
                if self.dirtied is not None:
                    self.dirtied()
        if self.written >= self.segment_bytes and not self.turning:
            self.rotate()

    cdef int rotate(self) except -1:
        """Begins the next segment without waiting for a disk, if ``sync`` has made one ready."""
        cdef int old = self.fd
        # Opening a file lets other threads in, which go on in this segment meanwhile.
        self.turning = True
        try:
            self.next_segment()
        except OSError:
            self.healthy = False
            raise
        finally:
            self.turning = False
        self.retired.append(old)
        return 0

    cdef int next_segment(self) except -1:
        fd, path = self.spare or files.begin_segment(self.directory, self.worker, self.opener)
        self.spare = None
        self.close_map()
        self.fd = fd
        self.path = path
        self.written = 0
        self.generation += 1
        self.open_map()
        return 0

    def sync(self):
        """Flushes, then waits until the disk has it. See ``_journal_py.Journal.sync``."""
        with self.syncing:
            self.force()

    cdef int force(self) except -1:
        cdef int fd, code = 0
        self.flush()
        self.unsynced = False
        path = self.path
        # Every call below lets other threads in, which may begin the next segment.
        fds, self.retired = self.retired, []
        fds.append(os.dup(self.fd))
        for each in fds:
            fd = each
            with nogil:
                if fdatasync(fd) != 0:
                    code = errno
            os.close(fd)
        if code:
            self.abandon()
            raise OSError(code, strerror(code).decode(), path)
        return self.prepare()

    cdef int prepare(self) except -1:
        """Makes the next segment while nobody waits for it."""
        if self.spare is not None or 2 * self.written < self.segment_bytes:
            return 0
        try:
            made = files.begin_segment(self.directory, self.worker, self.opener)
        except OSError:
            return 0  # said when it is needed
        # Opening let other threads in. Segments are read in the order of their names: one that others have overtaken is
        # of no use.
        if self.fd >= 0 and self.spare is None and made[1] > self.path:
            self.spare = made
        else:
            files.drop_segment(*made)
        return 0

    cdef int abandon(self) except -1:
        cdef int old = self.fd
        self.healthy = False
        if old < 0 or self.begin < self.end or self.turning:
            return 0
        self.turning = True
        try:
            self.next_segment()
        except OSError:
            return 0  # still unhealthy; the failed sync is what the caller hears of
        finally:
            self.turning = False
        os.close(old)
        return 0

    def close(self):
        """Flushes and closes. Raises OSError when the flush failed; the journal is closed all the same."""
        if self.fd < 0:
            return
        try:
            self.flush()
        finally:
            self.close_map()
            for fd in (*self.retired, self.fd):
                os.close(fd)
            self.retired.clear()
            self.fd = -1
            if self.spare is not None:
                files.drop_segment(*self.spare)
                self.spare = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


cdef inline void store32(uint8_t *p, uint32_t value) noexcept nogil:
    memcpy(p, &value, 4)


cdef inline uint32_t frame_crc(const uint8_t *head, Py_ssize_t length) noexcept nogil:
    if hard:
        return cr_crc_hard(cr_crc_hard(ONES, head, 4), head + 8, length) ^ ONES
    return cr_crc_soft(cr_crc_soft(ONES, head, 4), head + 8, length) ^ ONES
