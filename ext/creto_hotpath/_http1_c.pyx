# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, embedsignature=True
"""HTTP/1.1 messages, compiled: the same names and answers as ``_http1_py``, which says what they mean.

A head is scanned once; what is kept per field is 16 bytes of offsets into the bytes that were received, so a field
becomes ``str`` only for whoever asks. Cost: one pass over the head, one allocation for the offsets; memory per head:
about 200 bytes, 16 per field and a reference to the received bytes.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeLatin1
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy

from creto_hotpath._http1_py import (
    CHUNKED,
    CHUNKED_FRAMING,
    CLOSE,
    CLOSING,
    KEEPING,
    LENGTH,
    NO_FRAMING,
    NONE,
    PROTECTED,
    SILENT,
    UPGRADING,
    BadMessage,
    Prepared,
    _changes,
    _is_ipv6,
    field_line,
    plain_response,
    split_authority,
)

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *a, const char *b, size_t n)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)

cdef enum:
    HEAD_LIMIT = 65536
    FIELD_LIMIT = 128
    METHOD_LIMIT = 32
    CHUNK_OVERHEAD_LIMIT = 65536
    CHUNK_SIZE_DIGITS = 15
    # A received segment larger than its head by more than this is not kept alive for the sake of the head.
    SLACK_LIMIT = 16384
    STACK_HEAD = 8192

cdef enum:
    B_NONE = 0
    B_LENGTH = 1
    B_CHUNKED = 2
    B_CLOSE = 3

cdef enum:
    F_NONE = -1
    F_CHUNKED = -2

cdef enum:
    C_CLOSING = 1
    C_KEEPING = 2
    C_UPGRADING = 3

cdef enum:
    E_METHOD = 1
    E_METHOD_LONG
    E_TARGET
    E_TARGET_LONG
    E_VERSION
    E_VERSION_UNSUPPORTED
    E_BARE_LF
    E_HEAD_LONG
    E_FIELDS
    E_FOLD
    E_NAME
    E_VALUE
    E_HOST_TWICE
    E_HOST
    E_HOST_MISSING
    E_LENGTH
    E_LENGTH_TWICE
    E_TRANSFER
    E_TRANSFER_TWICE
    E_BOTH
    E_CHUNKED_10
    E_EXPECT
    E_IDENTITY
    E_UNDERSCORE
    E_CONNECT_BODY
    E_FORWARDS
    E_STATUS_LINE
    E_BARE_CR
    E_FORWARDS_TWICE
    E_TRACE_BODY

# What each code means: the status for a request (an upstream is always blamed with 502) and the reason.
cdef list FAULTS = [
    (0, ""),
    (400, "bad_method"),
    (501, "method_too_long"),
    (400, "bad_target"),
    (414, "target_too_long"),
    (400, "bad_version"),
    (505, "unsupported_version"),
    (400, "bare_line_feed"),
    (431, "head_too_long"),
    (431, "too_many_fields"),
    (400, "obs_fold"),
    (400, "bad_field_name"),
    (400, "bad_field_value"),
    (400, "duplicate_host"),
    (400, "bad_host"),
    (400, "missing_host"),
    (400, "bad_content_length"),
    (400, "duplicate_content_length"),
    (501, "unsupported_transfer_encoding"),
    (400, "duplicate_transfer_encoding"),
    (400, "length_and_chunked"),
    (400, "chunked_in_http10"),
    (417, "unsupported_expectation"),
    (400, "duplicate_identity"),
    (400, "underscored_framing"),
    (400, "connect_with_body"),
    (400, "bad_max_forwards"),
    (502, "bad_status_line"),
    (400, "bare_carriage_return"),
    (400, "duplicate_max_forwards"),
    (400, "trace_with_body"),
]

# Options of Connection that do not make a field of that name hop-by-hop.
cdef object KEPT = PROTECTED | {b"close", b"keep-alive", b"upgrade"}

# One bit per class of byte.
cdef enum:
    IS_TOKEN = 1
    IS_TARGET = 2
    IS_HOST = 4
    IS_BAD = 8
    IS_DIGIT = 16

cdef uint8_t CLASS[256]
cdef signed char HEX[256]


cdef void fill_classes() noexcept:
    cdef int i
    for i in range(256):
        CLASS[i] = 0
        HEX[i] = -1
        if 33 <= i < 127 and i != 35:
            CLASS[i] |= IS_TARGET
        if (i < 32 and i != 9) or i == 127:
            CLASS[i] |= IS_BAD
        if 48 <= i < 58:
            CLASS[i] |= IS_TOKEN | IS_HOST | IS_DIGIT
            HEX[i] = <signed char>(i - 48)
        elif 65 <= i < 91 or 97 <= i < 123:
            CLASS[i] |= IS_TOKEN | IS_HOST
            if (i | 32) <= 102:
                HEX[i] = <signed char>((i | 32) - 87)
    for i in b"!#$%&'*+-.^_`|~":
        CLASS[i] |= IS_TOKEN
    for i in b"-._":
        CLASS[i] |= IS_HOST


fill_classes()

cdef struct scan_t:
    uint32_t method_size
    uint32_t method_at
    uint32_t target_at
    uint32_t target_size
    uint32_t authority_at
    uint32_t authority_size
    uint32_t reason_at
    uint32_t reason_size
    uint32_t host_at
    uint32_t host_size
    uint32_t forwards_at
    uint32_t forwards_size
    uint32_t fault_at
    int64_t length
    int shape
    int minor
    int status
    int count
    bint has_authority
    bint has_host
    bint has_agent
    bint has_length
    bint has_expect
    bint has_forwards
    bint forwards_twice
    bint has_via
    bint chunked
    bint close
    bint keep
    bint upgrade
    bint nominated
    field_t fields[FIELD_LIMIT]


cdef inline bint same(const char *a, size_t an, const char *b, size_t bn) noexcept nogil:
    return an == bn and strncasecmp(a, b, bn) == 0


cdef inline bint is_blank(char c) noexcept nogil:
    return c == c" " or c == c"\t"


cdef inline bint is_class(const char *p, Py_ssize_t n, uint8_t bit) noexcept nogil:
    """Whether every byte is of that class."""
    cdef Py_ssize_t i
    for i in range(n):
        if not CLASS[<uint8_t>p[i]] & bit:
            return False
    return True


cdef inline bint has_bad(const char *p, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint8_t c, found = 0
    # Without a branch per byte the compiler turns this into vector code.
    for i in range(n):
        c = <uint8_t>p[i]
        found |= ((c < 32) & (c != 9)) | (c == 127)
    return found


cdef inline bint is_agent(const char *n) noexcept nogil:
    return (
        strncasecmp(n, b"x", 1) == 0 and (n[1] == c"-" or n[1] == c"_") and strncasecmp(n + 2, b"agent", 5) == 0
        and (n[7] == c"-" or n[7] == c"_") and strncasecmp(n + 8, b"id", 2) == 0
    )


cdef inline int classify(const char *n, uint32_t size) noexcept nogil:
    """Kind of a field name, -1 for an imitation of a framing field."""
    cdef char c = n[0] | 32
    if size == 2:
        if c == c"t" and strncasecmp(n, b"te", 2) == 0: return K_TE
    elif size == 3:
        if c == c"v" and strncasecmp(n, b"via", 3) == 0: return K_VIA
    elif size == 4:
        if c == c"h" and strncasecmp(n, b"host", 4) == 0: return K_HOST
    elif size == 6:
        if c == c"e" and strncasecmp(n, b"expect", 6) == 0: return K_EXPECT
    elif size == 7:
        if c == c"u" and strncasecmp(n, b"upgrade", 7) == 0: return K_UPGRADE
        if c == c"t" and strncasecmp(n, b"trailer", 7) == 0: return K_TRAILER
    elif size == 10:
        if c == c"c" and strncasecmp(n, b"connection", 10) == 0: return K_CONNECTION
        if c == c"k" and strncasecmp(n, b"keep-alive", 10) == 0: return K_KEEP_ALIVE
        if c == c"x" and is_agent(n): return K_AGENT
    elif size == 12:
        if c == c"m" and strncasecmp(n, b"max-forwards", 12) == 0: return K_MAX_FORWARDS
    elif size == 14:
        if c == c"c":
            if strncasecmp(n, b"content-length", 14) == 0: return K_LENGTH
            if strncasecmp(n, b"content_length", 14) == 0: return -1
    elif size == 16:
        if c == c"p" and strncasecmp(n, b"proxy-connection", 16) == 0: return K_PROXY_CONNECTION
    elif size == 17:
        if c == c"t":
            if strncasecmp(n, b"transfer-encoding", 17) == 0: return K_TRANSFER
            if strncasecmp(n, b"transfer_encoding", 17) == 0: return -1
    elif size == 19:
        if c == c"p" and strncasecmp(n, b"proxy-authorization", 19) == 0: return K_PROXY_AUTHORIZATION
    return K_OTHER


cdef inline Py_ssize_t next_option(const char *v, Py_ssize_t n, Py_ssize_t i, Py_ssize_t *begin, Py_ssize_t *size) noexcept nogil:
    """The next element of a comma list at or after ``i``; gives where to go on, ``size`` 0 at the end."""
    cdef Py_ssize_t stop
    while i < n and (is_blank(v[i]) or v[i] == c","):
        i += 1
    begin[0] = i
    while i < n and v[i] != c",":
        i += 1
    stop = i
    while stop > begin[0] and is_blank(v[stop - 1]):
        stop -= 1
    size[0] = stop - begin[0]
    return i


cdef void read_connection(scan_t *r, const char *v, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, at, size
    while True:
        i = next_option(v, n, i, &at, &size)
        if size == 0:
            return
        if same(v + at, size, b"close", 5):
            r.close = True
        elif same(v + at, size, b"keep-alive", 10):
            r.keep = True
        elif same(v + at, size, b"upgrade", 7):
            r.upgrade = True
        else:
            r.nominated = True


cdef drop_nominated(scan_t *r, const char *p):
    """Marks the ordinary fields that Connection names, except those no sender may have dropped."""
    cdef Py_ssize_t i, at, size
    cdef int j, k
    cdef field_t *f
    cdef const char *v
    for j in range(r.count):
        if r.fields[j].kind != K_CONNECTION:
            continue
        v = p + r.fields[j].value
        i = 0
        while True:
            i = next_option(v, r.fields[j].value_size, i, &at, &size)
            if size == 0:
                break
            if v[at:at + size].lower() in KEPT:
                continue
            for k in range(r.count):
                f = &r.fields[k]
                if f.kind == K_OTHER and same(v + at, size, p + f.name, f.name_size):
                    f.kind = K_DROPPED


cdef bint is_name(const char *p, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, label = 0
    if n == 0 or n > 255:
        return False
    for i in range(n):
        if p[i] == c".":
            if label == 0:
                return False
            label = 0
        else:
            label += 1
            if label > 63:
                return False
    return True


cdef int authority_port(const char *p, Py_ssize_t n) except -2:
    """The port of a host[:port], 0 without one, -1 when it is not an authority we accept."""
    cdef Py_ssize_t i = 0, digits
    cdef const char *close
    cdef int port = 0
    if n and p[0] == c"[":
        close = <const char *>memchr(p, c"]", n)
        if close == NULL or not _is_ipv6(p[1:close - p]):
            return -1
        i = close - p + 1
    else:
        while i < n and CLASS[<uint8_t>p[i]] & IS_HOST:
            i += 1
        if not is_name(p, i):
            return -1
    if i == n:
        return 0
    digits = n - i - 1
    if p[i] != c":" or digits < 1 or digits > 5 or not is_class(p + i + 1, digits, IS_DIGIT):
        return -1
    for i in range(i + 1, n):
        port = port * 10 + (p[i] - 48)
    return port if 0 < port < 65536 else -1


cdef inline int64_t read_digits(const char *p, Py_ssize_t n, Py_ssize_t most) noexcept nogil:
    cdef int64_t x = 0
    cdef Py_ssize_t i
    if n < 1 or n > most or not is_class(p, n, IS_DIGIT):
        return -1
    for i in range(n):
        x = x * 10 + (p[i] - 48)
    return x


cdef inline Py_ssize_t scheme_size(const char *p, Py_ssize_t n) noexcept nogil:
    """Bytes of a leading http:// or https://, else 0."""
    if n >= 7 and strncasecmp(p, b"http://", 7) == 0:
        return 7
    if n >= 8 and strncasecmp(p, b"https://", 8) == 0:
        return 8
    return 0


cdef inline Py_ssize_t authority_stop(const char *p, Py_ssize_t n, Py_ssize_t i) noexcept nogil:
    while i < n and p[i] != c"/" and p[i] != c"?":
        i += 1
    return i


cdef int read_target(scan_t *r, const char *p) except -1:
    cdef const char *t = p + r.target_at
    cdef Py_ssize_t n = r.target_size, i, stop
    r.has_authority = False
    if r.method_size == 7 and memcmp(p + r.method_at, b"CONNECT", 7) == 0:
        r.shape = SHAPE_AUTHORITY
        r.has_authority = True
        r.authority_at = r.target_at
        r.authority_size = r.target_size
        return 0 if authority_port(t, n) > 0 else E_TARGET
    if t[0] == c"/":
        r.shape = SHAPE_ORIGIN
        return 0
    if n == 1 and t[0] == c"*":
        r.shape = SHAPE_ASTERISK
        return 0 if r.method_size == 7 and memcmp(p + r.method_at, b"OPTIONS", 7) == 0 else E_TARGET
    r.shape = SHAPE_ABSOLUTE
    i = scheme_size(t, n)
    if i == 0:
        return E_TARGET
    stop = authority_stop(t, n, i)
    if authority_port(t + i, stop - i) < 0:
        return E_TARGET
    r.has_authority = True
    r.authority_at = <uint32_t>(r.target_at + i)
    r.authority_size = <uint32_t>(stop - i)
    return 0


cdef int read_request_line(scan_t *r, const char *p, const char *q, const char *le) except -1:
    cdef const char *c = q
    cdef int fault
    while c < le and CLASS[<uint8_t>c[0]] & IS_TOKEN:
        c += 1
    if c >= le or c[0] != c" ":
        return E_METHOD
    if c - q > METHOD_LIMIT:
        return E_METHOD_LONG
    r.method_at = <uint32_t>(q - p)
    r.method_size = <uint32_t>(c - q)
    c += 1
    r.target_at = <uint32_t>(c - p)
    while c < le and CLASS[<uint8_t>c[0]] & IS_TARGET:
        c += 1
    r.target_size = <uint32_t>(c - p) - r.target_at
    if r.target_size == 0 or c >= le or c[0] != c" ":
        return E_TARGET
    c += 1
    if le - c != 8 or memcmp(c, b"HTTP/", 5) != 0 or c[6] != c".":
        return E_VERSION
    if not CLASS[<uint8_t>c[5]] & IS_DIGIT or not CLASS[<uint8_t>c[7]] & IS_DIGIT:
        return E_VERSION
    if c[5] != c"1" or (c[7] != c"0" and c[7] != c"1"):
        return E_VERSION_UNSUPPORTED
    r.minor = c[7] - 48
    fault = read_target(r, p)
    return fault


cdef int read_status_line(scan_t *r, const char *p, const char *le) noexcept nogil:
    if le - p < 12 or memcmp(p, b"HTTP/1.", 7) != 0 or (p[7] != c"0" and p[7] != c"1") or p[8] != c" ":
        return E_STATUS_LINE
    if not is_class(p + 9, 3, IS_DIGIT) or p[9] == c"0" or (le - p > 12 and p[12] != c" "):
        return E_STATUS_LINE
    r.minor = p[7] - 48
    r.status = (p[9] - 48) * 100 + (p[10] - 48) * 10 + (p[11] - 48)
    r.reason_at = 13 if le - p > 13 else 0
    r.reason_size = <uint32_t>(le - p - 13) if le - p > 13 else 0
    return E_STATUS_LINE if has_bad(p + r.reason_at, r.reason_size) else 0


cdef inline int take_length(scan_t *r, const char *v, Py_ssize_t n) noexcept nogil:
    if r.has_length:
        return E_LENGTH_TWICE
    r.has_length = True
    r.length = read_digits(v, n, 18)
    return E_LENGTH if r.length < 0 else 0


cdef inline int take_transfer(scan_t *r, const char *v, Py_ssize_t n) noexcept nogil:
    if r.chunked:
        return E_TRANSFER_TWICE
    if not same(v, n, b"chunked", 7):
        return E_TRANSFER
    r.chunked = True
    return 0


cdef int take_field(scan_t *r, field_t *f, const char *p, bint response) except -1:
    """Judges one field that has a meaning of its own; 0 or the fault."""
    cdef const char *v = p + f.value
    cdef Py_ssize_t n = f.value_size
    if f.kind == K_CONNECTION:
        read_connection(r, v, n)
    elif f.kind == K_LENGTH:
        return take_length(r, v, n)
    elif f.kind == K_TRANSFER:
        return take_transfer(r, v, n)
    elif f.kind == K_VIA:
        r.has_via = True
    elif response:
        return 0
    elif f.kind == K_HOST:
        if r.has_host:
            return E_HOST_TWICE
        r.has_host = True
        r.host_at = f.value
        r.host_size = f.value_size
        if authority_port(v, n) < 0:
            return E_HOST
    elif f.kind == K_EXPECT:
        if not same(v, n, b"100-continue", 12):
            return E_EXPECT
        r.has_expect = True
    elif f.kind == K_AGENT:
        if r.has_agent:
            return E_IDENTITY
        r.has_agent = True
    elif f.kind == K_MAX_FORWARDS:
        r.forwards_twice = r.has_forwards
        r.has_forwards = True
        r.forwards_at = f.value
        r.forwards_size = f.value_size
    return 0


cdef inline int read_field(scan_t *r, const char *p, const char *q, const char *le, bint response) except -1:
    cdef const char *c = q
    cdef const char *v
    cdef field_t *f = &r.fields[r.count]
    cdef int kind
    if is_blank(q[0]):
        return E_FOLD
    while CLASS[<uint8_t>c[0]] & IS_TOKEN:  # the CR of the line stops this at the latest
        c += 1
    if c == q or c[0] != c":":
        return E_NAME
    v = c + 1
    while v < le and is_blank(v[0]):
        v += 1
    while le > v and is_blank((le - 1)[0]):
        le -= 1
    if has_bad(v, le - v):
        return E_VALUE
    kind = classify(q, <uint32_t>(c - q))
    if kind < 0:
        if not response:
            return E_UNDERSCORE
        kind = K_OTHER
    f.name = <uint32_t>(q - p)
    f.name_size = <uint16_t>(c - q)
    f.value = <uint32_t>(v - p)
    f.value_size = <uint32_t>(le - v)
    f.kind = <uint8_t>kind
    if kind != K_OTHER:
        kind = take_field(r, f, p, response)
        if kind:
            return kind
    r.count += 1
    return 0


cdef int judge_head(scan_t *r, const char *p, bint response) except -1:
    cdef bint trace
    if r.chunked and r.has_length:
        return E_BOTH
    if r.chunked and r.minor == 0:
        return E_CHUNKED_10
    if r.nominated:
        drop_nominated(r, p)
    if response:
        return 0
    if r.minor == 1 and not r.has_host:
        return E_HOST_MISSING
    if r.shape == SHAPE_AUTHORITY and (r.chunked or (r.has_length and r.length > 0)):
        return E_CONNECT_BODY
    trace = r.method_size == 5 and memcmp(p + r.method_at, b"TRACE", 5) == 0
    if trace and (r.chunked or r.length > 0):
        return E_TRACE_BODY
    if r.has_forwards:
        if not trace and (r.method_size != 7 or memcmp(p + r.method_at, b"OPTIONS", 7) != 0):
            r.has_forwards = False
        elif r.forwards_twice:
            return E_FORWARDS_TWICE
        elif read_digits(p + r.forwards_at, r.forwards_size, 9) < 0:
            return E_FORWARDS
    return 0


cdef inline Py_ssize_t faulty(scan_t *r, int fault, const char *p, const char *q, const char *end) noexcept nogil:
    """Why the line from ``q`` to ``end`` is refused: a CR in it was there before whatever else is wrong."""
    if end > q and memchr(q, c"\r", end - q) != NULL:
        r.fault_at = <uint32_t>(q - p)
        fault = E_BARE_CR
    return -fault


cdef Py_ssize_t scan(const char *p, Py_ssize_t n, scan_t *r, bint response) except? -1000:
    """Bytes of the head at ``p``, 0 when more are needed, minus the fault otherwise."""
    cdef const char *q = p
    cdef const char *newline
    cdef Py_ssize_t most = n if n < HEAD_LIMIT else HEAD_LIMIT
    cdef int fault
    r.count = 0
    r.length = -1
    r.fault_at = 0
    r.has_host = r.has_agent = r.has_length = r.has_expect = r.has_forwards = r.has_via = r.forwards_twice = False
    r.chunked = r.close = r.keep = r.upgrade = r.nominated = False
    if not response:
        if n and p[0] == c"\r":
            if n == 1:
                return 0
            if p[1] == c"\n":
                q += 2
        if q - p >= n:
            return 0
        if not CLASS[<uint8_t>q[0]] & IS_TOKEN:
            return -E_METHOD
    newline = <const char *>memchr(q, c"\n", p + most - q) if p + most > q else NULL
    if newline == NULL:
        # The last byte may be the first of a line end.
        return faulty(r, 0 if n < HEAD_LIMIT else E_HEAD_LONG if response else E_TARGET_LONG, p, q, p + most - 1)
    if newline == q or (newline - 1)[0] != c"\r":
        r.fault_at = <uint32_t>(q - p)
        return faulty(r, E_BARE_LF, p, q, newline - 1)
    fault = read_status_line(r, p, newline - 1) if response else read_request_line(r, p, q, newline - 1)
    if fault:
        return faulty(r, fault, p, q, newline - 1)
    while True:
        q = newline + 1
        r.fault_at = <uint32_t>(q - p)
        newline = <const char *>memchr(q, c"\n", p + most - q) if p + most > q else NULL
        if newline == NULL:
            return faulty(r, 0 if n < HEAD_LIMIT else E_HEAD_LONG, p, q, p + most - 1)
        if newline == q or (newline - 1)[0] != c"\r":
            return faulty(r, E_BARE_LF, p, q, newline - 1)
        if newline - 1 == q:
            break
        if r.count >= FIELD_LIMIT:
            return faulty(r, E_FIELDS, p, q, newline - 1)
        fault = read_field(r, p, q, newline - 1, response)
        if fault:
            return faulty(r, fault, p, q, newline - 1)
    r.fault_at = <uint32_t>(newline + 1 - p)
    fault = judge_head(r, p, response)
    return -fault if fault else newline + 1 - p


cdef refuse(scan_t *r, Py_ssize_t fault, bint response):
    status, reason = FAULTS[fault]
    raise BadMessage(502 if response else status, reason, r.fault_at)


cdef inline const char *text(Fields head) noexcept:
    return PyBytes_AS_STRING(head.raw) + head.base


cdef int keep(Fields head, scan_t *r, bytes data, Py_ssize_t start, Py_ssize_t size) except -1:
    """Takes over what the scan found; the received bytes are shared unless most of them are body."""
    head.size = size
    head.end = start + size
    if PyBytes_GET_SIZE(data) - size > SLACK_LIMIT:
        head.raw = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + start, size)
        head.base = 0
    else:
        head.raw = data
        head.base = start
    head.count = r.count
    if r.count:
        head.fields = <field_t *>malloc(r.count * sizeof(field_t))
        if head.fields == NULL:
            raise MemoryError()
        memcpy(head.fields, r.fields, r.count * sizeof(field_t))
    head.minor = r.minor
    head.content_length = r.length
    head.chunked = r.chunked
    head.has_via = r.has_via
    head.wants_upgrade = r.upgrade and r.minor == 1
    head.keep_alive = not r.close and (r.minor == 1 or r.keep)
    return 0


cdef inline str decode(Fields head, Py_ssize_t at, Py_ssize_t size):
    return PyUnicode_DecodeLatin1(text(head) + at, size, NULL)


cdef field_t *upgrade_field(Fields head) noexcept:
    """The only Upgrade field, when it names one protocol and Connection asks for it."""
    cdef const char *p = text(head)
    cdef field_t *found = NULL
    cdef int i
    cdef uint32_t j
    if not head.wants_upgrade:
        return NULL
    for i in range(head.count):
        if head.fields[i].kind == K_UPGRADE:
            if found != NULL:
                return NULL
            found = &head.fields[i]
    if found == NULL or found.value_size == 0:
        return NULL
    for j in range(found.value_size):
        if not CLASS[<uint8_t>p[found.value + j]] & IS_TOKEN and p[found.value + j] != c"/":
            return NULL
    return found


cdef inline bint is_method(RequestHead head, const char *name, size_t size) noexcept:
    return head.method_size == size and memcmp(text(head) + head.method_at, name, size) == 0


cdef inline Py_ssize_t origin(RequestHead head, char *first) noexcept:
    """Where in the target its origin form starts, and the "/" or "*" to put before it (0 for nothing)."""
    cdef Py_ssize_t at
    first[0] = 0
    if head.shape != SHAPE_ABSOLUTE:
        return 0
    at = head.authority_at + head.authority_size - head.target_at
    if at == head.target_size:
        first[0] = c"*" if is_method(head, b"OPTIONS", 7) else c"/"
    elif (text(head) + head.target_at)[at] != c"/":
        first[0] = c"/"
    return at


cdef class Fields:
    def __dealloc__(self):
        free(self.fields)

    @property
    def headers(self):
        return self

    def get(self, str name):
        cdef bytes wanted = name.encode("latin-1", "replace")
        cdef const char *p = text(self)
        cdef field_t *f
        cdef int i
        for i in range(self.count):
            f = &self.fields[i]
            if same(p + f.name, f.name_size, PyBytes_AS_STRING(wanted), PyBytes_GET_SIZE(wanted)):
                return decode(self, f.value, f.value_size)
        return None

    def getall(self, str name):
        cdef bytes wanted = name.encode("latin-1", "replace")
        cdef const char *p = text(self)
        cdef field_t *f
        cdef int i
        cdef list found = []
        for i in range(self.count):
            f = &self.fields[i]
            if same(p + f.name, f.name_size, PyBytes_AS_STRING(wanted), PyBytes_GET_SIZE(wanted)):
                found.append(decode(self, f.value, f.value_size))
        return found

    def items(self):
        cdef const char *p = text(self)
        cdef list pairs = []
        cdef int i
        for i in range(self.count):
            pairs.append((
                PyUnicode_DecodeLatin1(p + self.fields[i].name, self.fields[i].name_size, NULL),
                decode(self, self.fields[i].value, self.fields[i].value_size),
            ))
        return pairs

    cpdef bint via_names(self, bytes pseudonym) except -1:
        cdef const char *p = text(self)
        cdef field_t *f
        cdef int i
        if not self.has_via:
            return False
        for i in range(self.count):
            f = &self.fields[i]
            if f.kind != K_VIA:
                continue
            for element in p[f.value:f.value + f.value_size].lower().split(b","):
                words = [word for word in element.replace(b"\t", b" ").split(b" ") if word]
                if len(words) > 1 and words[1] == pseudonym:
                    return True
        return False

    @property
    def upgrade(self):
        cdef field_t *f = upgrade_field(self)
        return None if f == NULL else decode(self, f.value, f.value_size)


@cython.final
cdef class RequestHead(Fields):
    @property
    def method(self):
        if self.method_text is None:
            self.method_text = decode(self, self.method_at, self.method_size)
        return self.method_text

    @property
    def target(self):
        return decode(self, self.target_at, self.target_size)

    @property
    def form(self):
        return ("origin", "absolute", "authority", "asterisk")[self.shape]

    @property
    def scheme(self):
        if self.shape != SHAPE_ABSOLUTE:
            return ""
        return "https" if (text(self) + self.target_at)[4] | 32 == c"s" else "http"

    @property
    def authority(self):
        if self.authority_size == 0:
            return None
        return split_authority(decode(self, self.authority_at, self.authority_size))

    @property
    def origin_target(self):
        cdef char first
        cdef Py_ssize_t at = origin(self, &first)
        cdef str rest = decode(self, self.target_at + at, self.target_size - at)
        return chr(first) + rest if first else rest

    @property
    def path(self):
        return "" if self.is_connect else self.origin_target.partition("?")[0]

    @property
    def query(self):
        return "" if self.is_connect else self.origin_target.partition("?")[2]


@cython.final
cdef class ResponseHead(Fields):
    @property
    def reason(self):
        return PyUnicode_DecodeLatin1(text(self) + self.reason_at, self.reason_size, NULL)


def parse_request(buf, Py_ssize_t start=0):
    cdef RequestHead head = read_request(bytes(buf), start)
    return None if head is None else (head, head.end)


def parse_response(buf, str request_method, Py_ssize_t start=0):
    cdef ResponseHead head = read_response(bytes(buf), start, request_method == "HEAD")
    return None if head is None else (head, head.end)


cpdef RequestHead read_request(bytes data, Py_ssize_t start):
    cdef scan_t r
    cdef RequestHead head
    cdef const char *p = PyBytes_AS_STRING(data) + start
    cdef Py_ssize_t size = scan(p, PyBytes_GET_SIZE(data) - start, &r, False)
    if size == 0:
        return None
    if size < 0:
        refuse(&r, -size, False)
    head = RequestHead.__new__(RequestHead)
    keep(head, &r, data, start, size)
    head.method_at = r.method_at
    head.method_size = r.method_size
    head.target_at = r.target_at
    head.target_size = r.target_size
    head.shape = r.shape
    head.authority_at = r.authority_at if r.has_authority else r.host_at
    head.authority_size = r.authority_size if r.has_authority else r.host_size if r.has_host else 0
    head.is_connect = r.shape == SHAPE_AUTHORITY
    head.is_head = is_method(head, b"HEAD", 4)
    head.body = B_CHUNKED if r.chunked else B_LENGTH if r.length > 0 else B_NONE
    head.expect_continue = r.has_expect and r.minor == 1 and head.body != B_NONE
    head.max_forwards = -1
    if r.has_forwards:
        head.max_forwards = read_digits(p + r.forwards_at, r.forwards_size, 9)
    return head


cpdef ResponseHead read_response(bytes data, Py_ssize_t start, bint head_only):
    cdef scan_t r
    cdef ResponseHead head
    cdef Py_ssize_t size = scan(PyBytes_AS_STRING(data) + start, PyBytes_GET_SIZE(data) - start, &r, True)
    if size == 0:
        return None
    if size < 0:
        refuse(&r, -size, True)
    head = ResponseHead.__new__(ResponseHead)
    keep(head, &r, data, start, size)
    head.status = r.status
    head.reason_at = r.reason_at
    head.reason_size = r.reason_size
    if head_only or r.status < 200 or r.status == 204 or r.status == 304:
        head.body = B_NONE
    elif r.chunked:
        head.body = B_CHUNKED
    elif r.length >= 0:
        head.body = B_LENGTH if r.length else B_NONE
    else:
        head.body = B_CLOSE
        head.keep_alive = False
    return head


cdef enum:
    S_SIZE = 0
    S_SIZE_BLANK
    S_NAME_START
    S_NAME
    S_NAME_BLANK
    S_VALUE_START
    S_VALUE
    S_QUOTED
    S_ESCAPED
    S_QUOTE_END
    S_VALUE_BLANK
    S_SIZE_LF
    S_DATA
    S_DATA_CR
    S_DATA_LF
    S_TRAILER
    S_T_NAME
    S_T_VALUE
    S_T_LF
    S_END_LF


cdef inline int extension(int state, char byte) noexcept nogil:
    """The next state inside chunk-ext; -1 is an error."""
    cdef bint blank = is_blank(byte)
    cdef uint8_t kind = CLASS[<uint8_t>byte]
    if state == S_SIZE_BLANK or state == S_VALUE_BLANK:
        return state if blank else S_NAME_START if byte == c";" else -1
    if state == S_NAME_START:
        return state if blank else S_NAME if kind & IS_TOKEN else -1
    if (state == S_NAME and kind & IS_TOKEN) or (state == S_NAME_BLANK and blank):
        return state
    if (state == S_NAME or state == S_NAME_BLANK) and byte == c"=":
        return S_VALUE_START
    if state == S_VALUE_START:
        return state if blank else S_QUOTED if byte == c'"' else S_VALUE if kind & IS_TOKEN else -1
    if state == S_VALUE and kind & IS_TOKEN:
        return state
    if state == S_QUOTED:
        if kind & IS_BAD:
            return -1
        return S_QUOTE_END if byte == c'"' else S_ESCAPED if byte == c"\\" else state
    if state == S_ESCAPED:
        return -1 if kind & IS_BAD else S_QUOTED
    if byte == c";":
        return S_NAME_START
    if state == S_NAME_BLANK:
        return -1
    if blank:
        return S_NAME_BLANK if state == S_NAME else S_VALUE_BLANK
    return S_SIZE_LF if byte == c"\r" else -1


cdef inline int trailer(int state, char byte) noexcept nogil:
    """The next state inside the trailer section; -1 is an error."""
    cdef uint8_t kind = CLASS[<uint8_t>byte]
    if state == S_TRAILER:
        return S_END_LF if byte == c"\r" else S_T_NAME if kind & IS_TOKEN else -1
    if state == S_T_NAME:
        return state if kind & IS_TOKEN else S_T_VALUE if byte == c":" else -1
    if state == S_T_VALUE:
        return S_T_LF if byte == c"\r" else -1 if kind & IS_BAD else state
    return S_TRAILER if byte == c"\n" else -1


# Runs of bytes to keep. The copy is made only when a second run is not the continuation of the first.
cdef struct runs_t:
    const char *p
    Py_ssize_t first
    Py_ssize_t stop
    Py_ssize_t room
    char *copy
    Py_ssize_t size


cdef int add_run(runs_t *runs, Py_ssize_t begin, Py_ssize_t stop) except -1:
    if begin == stop:
        return 0
    if runs.copy == NULL:
        if runs.first == runs.stop:
            runs.first = begin
            runs.stop = stop
            return 0
        if runs.stop == begin:
            runs.stop = stop
            return 0
        runs.copy = <char *>malloc(runs.room)
        if runs.copy == NULL:
            raise MemoryError()
        runs.size = runs.stop - runs.first
        memcpy(runs.copy, runs.p + runs.first, runs.size)
    memcpy(runs.copy + runs.size, runs.p + begin, stop - begin)
    runs.size += stop - begin
    return 0


@cython.freelist(64)
@cython.final
cdef class BodyFramer:
    def __init__(self, int kind, int64_t length=0, int status=400):
        self.kind = kind
        self.status = status
        self.left = length if kind == B_LENGTH else 0
        self.done = kind == B_NONE or (kind == B_LENGTH and length == 0)
        self.cleaned = None
        self.end = 0
        self.state = S_SIZE
        self.digits = 0
        self.overhead = 0

    cdef Py_ssize_t plain(self, Py_ssize_t size, Py_ssize_t start) noexcept:
        cdef int64_t taken
        if self.done:
            return start
        if self.kind == B_CLOSE:
            return size
        taken = size - start
        if taken > self.left:
            taken = self.left
        self.left -= taken
        self.done = self.left == 0
        return start + taken

    cpdef Py_ssize_t feed(self, bytes data, Py_ssize_t start=0) except -1:
        cdef bint dropped = False
        cdef bytes kept
        self.cleaned = None
        if self.kind != B_CHUNKED:
            self.end = self.plain(PyBytes_GET_SIZE(data), start)
            return self.end
        kept = self.chunks(data, start, False, &dropped)
        if dropped:
            self.cleaned = kept
        return self.end

    cpdef bytes payload(self, bytes data, Py_ssize_t start=0):
        cdef bint dropped
        if self.kind == B_CHUNKED:
            return self.chunks(data, start, True, &dropped)
        self.end = self.plain(PyBytes_GET_SIZE(data), start)
        if start == 0 and self.end == PyBytes_GET_SIZE(data):
            return data
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + start, self.end - start)

    cdef bytes chunks(self, bytes data, Py_ssize_t start, bint content, bint *dropped):
        """What to keep of the bytes consumed; None when that is all of them and nobody needs a copy."""
        cdef runs_t runs
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef Py_ssize_t here = start, run = start, size = PyBytes_GET_SIZE(data), taken
        cdef int before
        cdef str fault = None
        dropped[0] = False
        runs.p = p
        runs.first = runs.stop = start
        runs.room = size - start
        runs.copy = NULL
        runs.size = 0
        try:
            while here < size and not self.done:
                if self.state == S_DATA:
                    taken = size - here
                    if taken > self.left:
                        taken = self.left
                    if content:
                        add_run(&runs, here, here + taken)
                    here += taken
                    self.left -= taken
                    if self.left == 0:
                        self.state = S_DATA_CR
                    continue
                before = self.state
                fault = self.step(p[here])
                if fault is not None:
                    raise BadMessage(self.status, fault)
                if S_SIZE_BLANK <= self.state <= S_VALUE_BLANK or S_T_NAME <= self.state <= S_T_LF or before == S_T_LF:
                    if not content:
                        add_run(&runs, run, here)
                        run = here + 1
                        dropped[0] = True
                    self.overhead += 1
                    if self.overhead > CHUNK_OVERHEAD_LIMIT:
                        raise BadMessage(self.status, "chunk_overhead")
                here += 1
            self.end = here
            if content or dropped[0]:
                if not content:
                    add_run(&runs, run, here)
                if runs.copy != NULL:
                    return PyBytes_FromStringAndSize(runs.copy, runs.size)
                return PyBytes_FromStringAndSize(p + runs.first, runs.stop - runs.first)
            return None
        finally:
            free(runs.copy)

    cdef str step(self, char byte):
        """One byte of framing; the reason when it is wrong, else None."""
        cdef int state = self.state, digit
        if state == S_SIZE:
            digit = HEX[<uint8_t>byte]
            if digit >= 0:
                self.digits += 1
                self.left = self.left * 16 + digit
                return None if self.digits <= CHUNK_SIZE_DIGITS else "bad_chunk_size"
            if self.digits == 0:
                return "bad_chunk_size"
            if byte == c"\r":
                self.state = S_SIZE_LF
            elif byte == c";":
                self.state = S_NAME_START
            elif is_blank(byte):
                self.state = S_SIZE_BLANK
            else:
                return "bad_chunk_size"
        elif state <= S_VALUE_BLANK:
            self.state = extension(state, byte)
            if self.state < 0:
                return "bad_chunk_extension"
        elif state == S_SIZE_LF:
            if byte != c"\n":
                return "bad_chunk_size"
            self.digits = 0
            self.state = S_DATA if self.left else S_TRAILER
        elif state == S_DATA_CR:
            if byte != c"\r":
                return "bad_chunk_end"
            self.state = S_DATA_LF
        elif state == S_DATA_LF:
            if byte != c"\n":
                return "bad_chunk_end"
            self.state = S_SIZE
        elif state == S_END_LF:
            if byte != c"\n":
                return "bad_chunk_end"
            self.done = True
        else:
            self.state = trailer(state, byte)
            if self.state < 0:
                return "bad_trailer"
        return None


cpdef bytes chunk(bytes data):
    cdef char size[24]
    cdef Py_ssize_t n = PyBytes_GET_SIZE(data), at = 22, left = n
    cdef bytes out
    cdef char *o
    size[22] = c"\r"
    size[23] = c"\n"
    while left:
        at -= 1
        size[at] = b"0123456789abcdef"[left & 15]
        left >>= 4
    out = PyBytes_FromStringAndSize(NULL, 24 - at + n + 2)
    o = PyBytes_AS_STRING(out)
    memcpy(o, size + at, 24 - at)
    memcpy(o + 24 - at, PyBytes_AS_STRING(data), n)
    memcpy(o + 24 - at + n, b"\r\n", 2)
    return out


cdef inline char *put(char *o, const char *s, size_t n) noexcept nogil:
    memcpy(o, s, n)
    return o + n


cdef inline char *put_bytes(char *o, bytes s) noexcept:
    return put(o, PyBytes_AS_STRING(s), PyBytes_GET_SIZE(s))


cdef inline char *put_number(char *o, int64_t x) noexcept nogil:
    cdef char digits[24]
    cdef int at = 24
    while True:
        at -= 1
        digits[at] = <char>(48 + x % 10)
        x //= 10
        if x == 0:
            return put(o, digits + at, 24 - at)


cdef inline char *put_field(char *o, const char *p, field_t *f) noexcept nogil:
    # "Name: value" is copied as one run when the sender wrote it that way.
    if f.value == f.name + f.name_size + 2 and p[f.value - 1] == c" ":
        o = put(o, p + f.name, f.name_size + 2 + f.value_size)
    else:
        o = put(o, p + f.name, f.name_size)
        o = put(o, b": ", 2)
        o = put(o, p + f.value, f.value_size)
    return put(o, b"\r\n", 2)


cdef inline char *put_framing(char *o, int64_t framing) noexcept nogil:
    if framing >= 0:
        o = put(o, b"Content-Length: ", 16)
        o = put_number(o, framing)
        return put(o, b"\r\n", 2)
    if framing == F_CHUNKED:
        return put(o, b"Transfer-Encoding: chunked\r\n", 28)
    return o


cdef inline char *put_upgrade(char *o, const char *p, field_t *f) noexcept nogil:
    o = put(o, b"Connection: upgrade\r\nUpgrade: ", 30)
    o = put(o, p + f.value, f.value_size)
    return put(o, b"\r\n", 2)


cdef inline char *put_via(char *o, Fields head, bytes via) noexcept:
    o = put(o, b"Via: 2.0 " if head.http2 else b"Via: 1.1 " if head.minor else b"Via: 1.0 ", 9)
    o = put_bytes(o, via)
    return put(o, b"\r\n\r\n", 4)


cdef inline bytes joined(const char *head, Py_ssize_t size, bytes data, Py_ssize_t start, Py_ssize_t stop):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size + stop - start)
    memcpy(PyBytes_AS_STRING(out), head, size)
    if stop > start:
        memcpy(PyBytes_AS_STRING(out) + size, PyBytes_AS_STRING(data) + start, stop - start)
    return out


cdef inline bint is_edited(list names, const char *name, size_t size):
    cdef bytes other
    for other in names:
        if same(name, size, PyBytes_AS_STRING(other), PyBytes_GET_SIZE(other)):
            return True
    return False


cdef bytes word(object value, str what):
    """A target or host as it may stand in a head, from ``str`` or ``bytes``."""
    cdef bytes raw = value if type(value) is bytes else (<str?>value).encode("latin-1", "replace")
    cdef const char *p = PyBytes_AS_STRING(raw)
    cdef Py_ssize_t i
    cdef uint8_t bad = PyBytes_GET_SIZE(raw) == 0
    for i in range(PyBytes_GET_SIZE(raw)):
        bad |= (<uint8_t>p[i] <= 32) | (<uint8_t>p[i] >= 127)
    if bad:
        raise ValueError(f"{what} cannot stand in a request head")
    return raw


cpdef bytes request_bytes(
    RequestHead head, target, host, edits, int64_t framing, bint expect, bint upgrade, bytes via, bytes data,
    Py_ssize_t start, Py_ssize_t stop):
    cdef char stack[STACK_HEAD]
    cdef char *out = stack
    cdef char *o
    cdef const char *p = text(head)
    cdef Py_ssize_t room, at
    cdef char first
    cdef field_t *f
    cdef int i
    cdef list names = None
    cdef bytes line = None, authority = None, extra = b""
    if edits:
        changes = edits.changes if type(edits) is Prepared else _changes(edits)
        names = list(changes)
        extra = b"".join([value for value in changes.values() if value is not None])
    if host is not None:
        authority = word(host, "host")
    elif head.authority_size == 0:
        raise ValueError("host is needed: the request has none")
    if target is not None:
        line = word(target, "target")
    # Each field grows by at most one blank; the rest is bounded by the fixed lines.
    room = head.size + head.count + PyBytes_GET_SIZE(extra) + PyBytes_GET_SIZE(via) + 256
    room += PyBytes_GET_SIZE(authority) if authority is not None else head.authority_size
    room += PyBytes_GET_SIZE(line) if line is not None else 0
    if room > STACK_HEAD:
        out = <char *>malloc(room)
        if out == NULL:
            raise MemoryError()
    try:
        o = put(out, p + head.method_at, head.method_size)
        o[0] = c" "
        o += 1
        if line is not None:
            o = put_bytes(o, line)
        else:
            at = origin(head, &first)
            if first:
                o[0] = first
                o += 1
            o = put(o, p + head.target_at + at, head.target_size - at)
        o = put(o, b" HTTP/1.1\r\nHost: ", 17)
        if authority is not None:
            o = put_bytes(o, authority)
        else:
            o = put(o, p + head.authority_at, head.authority_size)
        o = put(o, b"\r\n", 2)
        for i in range(head.count):
            f = &head.fields[i]
            if f.kind != K_OTHER:
                if K_HOST <= f.kind <= K_LENGTH or f.kind == K_DROPPED or (f.kind == K_EXPECT and not expect):
                    continue
            if names is not None and is_edited(names, p + f.name, f.name_size):
                continue
            if f.kind == K_MAX_FORWARDS and head.max_forwards > 0:
                o = put(o, p + f.name, f.name_size)
                o = put(o, b": ", 2)
                o = put_number(o, head.max_forwards - 1)
                o = put(o, b"\r\n", 2)
            else:
                o = put_field(o, p, f)
        o = put_framing(o, framing)
        if upgrade:
            f = upgrade_field(head)
            if f != NULL:
                o = put_upgrade(o, p, f)
        o = put_bytes(o, extra)
        o = put_via(o, head, via)
        return joined(out, o - out, data, start, stop)
    finally:
        if out != stack:
            free(out)


cpdef bytes response_bytes(
    ResponseHead head, int64_t framing, int connection, bytes via, bytes data, Py_ssize_t start, Py_ssize_t stop):
    cdef char stack[STACK_HEAD]
    cdef char *out = stack
    cdef char *o
    cdef const char *p = text(head)
    cdef field_t *f
    cdef int i
    cdef Py_ssize_t room = head.size + head.count + PyBytes_GET_SIZE(via) + 256
    if room > STACK_HEAD:
        out = <char *>malloc(room)
        if out == NULL:
            raise MemoryError()
    try:
        o = put(out, b"HTTP/1.1 ", 9)
        o = put_number(o, head.status)
        o[0] = c" "
        o = put(o + 1, p + head.reason_at, head.reason_size)
        o = put(o, b"\r\n", 2)
        for i in range(head.count):
            f = &head.fields[i]
            if f.kind != K_OTHER:
                if K_CONNECTION <= f.kind <= K_UPGRADE or f.kind == K_LENGTH or f.kind == K_DROPPED:
                    continue
            o = put_field(o, p, f)
        o = put_framing(o, framing)
        f = upgrade_field(head) if connection == C_UPGRADING else NULL
        if f != NULL:
            o = put_upgrade(o, p, f)
        elif connection == C_CLOSING:
            o = put(o, b"Connection: close\r\n", 19)
        elif connection == C_KEEPING:
            o = put(o, b"Connection: keep-alive\r\n", 24)
        o = put_via(o, head, via)
        return joined(out, o - out, data, start, stop)
    finally:
        if out != stack:
            free(out)


cpdef int64_t now_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
