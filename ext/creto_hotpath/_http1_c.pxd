from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t


# What a field means to the relay.
cdef enum:
    K_OTHER = 0
    K_HOST = 1
    K_CONNECTION = 2
    K_KEEP_ALIVE = 3
    K_PROXY_CONNECTION = 4
    K_TE = 5
    K_TRAILER = 6
    K_TRANSFER = 7
    K_UPGRADE = 8
    K_PROXY_AUTHORIZATION = 9
    K_LENGTH = 10
    K_EXPECT = 11
    K_VIA = 12
    K_AGENT = 13
    K_MAX_FORWARDS = 14
    K_DROPPED = 15

# Forms of a request target (RFC 9112 section 3.2).
cdef enum:
    SHAPE_ORIGIN = 0
    SHAPE_ABSOLUTE = 1
    SHAPE_AUTHORITY = 2
    SHAPE_ASTERISK = 3


# Where one field is, in bytes from the start of its message.
cdef struct field_t:
    uint32_t name
    uint32_t value
    uint32_t value_size
    uint16_t name_size
    uint8_t kind


cdef class Fields:
    cdef bytes raw
    cdef Py_ssize_t base
    cdef field_t *fields
    cdef int count
    cdef readonly int64_t content_length
    cdef readonly int body
    cdef readonly int minor
    cdef public bint http2
    cdef readonly bint chunked
    cdef readonly bint keep_alive
    cdef readonly Py_ssize_t end
    cdef readonly Py_ssize_t size
    cdef bint has_via
    cdef bint wants_upgrade

    cpdef bint via_names(self, bytes pseudonym) except -1


cdef class RequestHead(Fields):
    cdef uint32_t method_at
    cdef uint32_t method_size
    cdef uint32_t target_at
    cdef uint32_t target_size
    cdef uint32_t authority_at
    cdef uint32_t authority_size
    cdef int shape
    cdef readonly bint expect_continue
    cdef readonly bint is_connect
    cdef readonly bint is_head
    cdef readonly int64_t max_forwards
    cdef str method_text


cdef class ResponseHead(Fields):
    cdef uint32_t reason_at
    cdef uint32_t reason_size
    cdef readonly int status


cdef class BodyFramer:
    cdef readonly int kind
    cdef readonly int status
    cdef readonly int64_t left
    cdef readonly bint done
    cdef readonly bytes cleaned
    cdef readonly Py_ssize_t end
    cdef int state
    cdef int digits
    cdef int64_t overhead

    cpdef Py_ssize_t feed(self, bytes data, Py_ssize_t start=*) except -1
    cpdef bytes payload(self, bytes data, Py_ssize_t start=*)
    cdef Py_ssize_t plain(self, Py_ssize_t size, Py_ssize_t start) noexcept
    cdef str step(self, char byte)
    cdef bytes chunks(self, bytes data, Py_ssize_t start, bint content, bint *dropped)


cpdef RequestHead read_request(bytes data, Py_ssize_t start)
cpdef ResponseHead read_response(bytes data, Py_ssize_t start, bint head_only)
cpdef bytes request_bytes(
    RequestHead head, target, host, edits, int64_t framing, bint expect, bint upgrade, bytes via, bytes data,
    Py_ssize_t start, Py_ssize_t stop)
cpdef bytes response_bytes(
    ResponseHead head, int64_t framing, int connection, bytes via, bytes data, Py_ssize_t start, Py_ssize_t stop)
cpdef bytes chunk(bytes data)
cpdef int64_t now_ns() noexcept
