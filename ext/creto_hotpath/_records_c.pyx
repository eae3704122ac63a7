# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""Journal records that are copied on without being taken apart. Compiled form of ``_records_py``.

A record is read once, to find where its fields begin; what is made of it is copied from there. Neighbours in a journal
are alike, so a column first looks whether its bytes are those of the record before and gives the same object then.
"""

cimport cython

from creto_hotpath import _journal_file as files

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Clear, PyDict_GetItem, PyDict_SetItem, PyDict_Size
from cpython.exc cimport PyErr_Clear
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.long cimport PyLong_FromLongLong
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "Python.h":
    object PyUnicode_DecodeUTF8(const char *, Py_ssize_t, const char *)
    PyObject *decode_utf8 "PyUnicode_DecodeUTF8"(const char *, Py_ssize_t, const char *)
    void drop "Py_DECREF"(PyObject *)
    bint PyObject_IS_GC(object)
    void PyObject_GC_UnTrack(object)

cdef extern from "_native.h" nogil:
    void cr_crc_init()
    uint32_t cr_crc_soft(uint32_t, const unsigned char *, size_t)
    uint32_t cr_crc_hard(uint32_t, const unsigned char *, size_t)
    bint cr_crc_has_hard()
    int64_t cr_expanded(const uint8_t *, size_t, size_t)
    void cr_expand(const uint8_t *, const uint8_t *, size_t, uint8_t *)

cr_crc_init()

cdef enum:
    FIELDS = 64
    MADE_OF = 16
    COLUMNS = 64
    PARTS = 128
    FIXMAP = 15
    # Places are 32 bits.
    MOST = 0x7FFFFFFF

cdef bint hard = cr_crc_has_hard()
cdef uint32_t ONES = ~<uint32_t>0
cdef Py_ssize_t HEADER_BYTES = files.HEADER_BYTES
cdef uint32_t MAX_PAYLOAD = files.MAX_PAYLOAD
cdef uint8_t ABBREVIATED = files.ABBREVIATED
# What a made column keeps: so many values, of fields not longer than this together.
cdef Py_ssize_t KEPT = 4096
cdef Py_ssize_t KEPT_BYTES = 2048


cdef inline uint32_t load32(const uint8_t *p) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, p, 4)
    return value


cdef inline uint32_t frame_crc(const uint8_t *head, size_t length) noexcept nogil:
    if hard:
        return cr_crc_hard(cr_crc_hard(ONES, head, 4), head + 8, length) ^ ONES
    return cr_crc_soft(cr_crc_soft(ONES, head, 4), head + 8, length) ^ ONES


cdef inline uint64_t big(const uint8_t *p, int width) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(width):
        value = value << 8 | p[i]
    return value


cdef inline bint is_ascii(const uint8_t *p, size_t n) noexcept nogil:
    cdef uint64_t word
    while n >= 8:
        memcpy(&word, p, 8)
        if word & 0x8080808080808080ULL:
            return False
        p += 8
        n -= 8
    while n:
        if p[0] & 0x80:
            return False
        p += 1
        n -= 1
    return True


cdef bint is_utf8(const uint8_t *p, size_t n) noexcept:
    cdef PyObject *text
    if is_ascii(p, n):
        return True
    text = decode_utf8(<const char *>p, n, NULL)
    if text == NULL:
        PyErr_Clear()
        return False
    drop(text)
    return True


cdef inline const uint8_t *head_of(const uint8_t *p, const uint8_t *end, size_t *n, bint text) noexcept nogil:
    """Where the content of a text (or bytes) begins and its length; NULL unless it is whole and shortest."""
    cdef uint8_t first
    if p >= end:
        return NULL
    first = p[0]
    if text and (first & 0xE0) == 0xA0:
        n[0] = first & 0x1F
        p += 1
    elif first == (0xD9 if text else 0xC4) and end - p >= 2:
        n[0] = p[1]
        p += 2
        if text and n[0] < 32:
            return NULL
    elif first == (0xDA if text else 0xC5) and end - p >= 3:
        n[0] = big(p + 1, 2)
        p += 3
        if n[0] < 0x100:
            return NULL
    elif first == (0xDB if text else 0xC6) and end - p >= 5:
        n[0] = big(p + 1, 4)
        p += 5
        if n[0] < 0x10000:
            return NULL
    else:
        return NULL
    return p if n[0] <= <size_t>(end - p) else NULL


cdef const uint8_t *skip_text(const uint8_t *p, const uint8_t *end) noexcept:
    cdef size_t n = 0
    p = head_of(p, end, &n, True)
    return p + n if p != NULL and is_utf8(p, n) else NULL


cdef inline const uint8_t *skip_bytes(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef size_t n = 0
    p = head_of(p, end, &n, False)
    return p + n if p != NULL else NULL


cdef const uint8_t *skip_number(const uint8_t *p, const uint8_t *end, bint signed) noexcept nogil:
    cdef uint8_t first
    cdef int width
    cdef uint64_t value
    if p >= end:
        return NULL
    first = p[0]
    if first < 0x80:
        return p + 1
    if first >= 0xE0:
        return p + 1 if signed else NULL
    if 0xCC <= first <= 0xCF:
        width = 1 << (first - 0xCC)
        if end - p <= width:
            return NULL
        value = big(p + 1, width)
        if width == 1:
            return p + 2 if value >= 0x80 else NULL
        if value >> (4 * width) == 0 or value >> 63:
            return NULL
        return p + 1 + width
    if 0xD0 <= first <= 0xD3 and signed:
        width = 1 << (first - 0xD0)
        if end - p <= width:
            return NULL
        value = big(p + 1, width)
        if not value >> (8 * width - 1):
            return NULL
        if width == 1:
            return p + 2 if <int8_t>value < -32 else NULL
        if width == 2:
            return p + 3 if <int16_t>value < -128 else NULL
        if width == 4:
            return p + 5 if <int32_t>value < -32768 else NULL
        return p + 9 if <int64_t>value < -(<int64_t>1 << 31) else NULL
    return NULL


cdef const uint8_t *skip_texts(const uint8_t *p, const uint8_t *end) noexcept:
    cdef size_t n = 0
    if p >= end:
        return NULL
    if (p[0] & 0xF0) == 0x90:
        n = p[0] & 0x0F
        p += 1
    elif p[0] == 0xDC and end - p >= 3:
        n = big(p + 1, 2)
        p += 3
        if n <= 15:
            return NULL
    else:
        return NULL
    while n and p != NULL:
        p = skip_text(p, end)
        n -= 1
    return p


cdef const uint8_t *skip_map(const uint8_t *p, const uint8_t *end) noexcept:
    cdef const uint8_t *names[FIXMAP]
    cdef size_t[FIXMAP] lengths
    cdef int n, i, k
    if p >= end or (p[0] & 0xF0) != 0x80:
        return NULL
    n = p[0] & 0x0F
    p += 1
    for i in range(n):
        names[i] = p
        p = skip_text(p, end)
        if p == NULL:
            return NULL
        lengths[i] = p - names[i]
        for k in range(i):
            if lengths[k] == lengths[i] and memcmp(names[k], names[i], lengths[i]) == 0:
                return NULL
        p = skip_number(p, end, True)
        if p == NULL:
            return NULL
    return p


cdef const uint8_t *skip(uint8_t kind, const uint8_t *p, const uint8_t *end) noexcept:
    """What is behind a field of that kind; NULL when it is no such field or not spelled shortest."""
    if kind == c"s":
        return skip_text(p, end)
    if kind == c"n" or kind == c"i":
        return skip_number(p, end, kind == c"i")
    if kind == c"k":
        return p + 18 if end - p >= 18 and p[0] == 0xC4 and p[1] == 16 else NULL
    if kind == c"b":
        return skip_bytes(p, end)
    if kind == c"a":
        return skip_texts(p, end)
    return skip_map(p, end)


cdef object number(const uint8_t *p):
    cdef uint8_t first = p[0]
    cdef uint64_t value
    if first < 0x80:
        return first
    if first >= 0xE0:
        return <int8_t>first
    if first < 0xD0:
        return PyLong_FromLongLong(<int64_t>big(p + 1, 1 << (first - 0xCC)))
    value = big(p + 1, 1 << (first - 0xD0))
    if first == 0xD0:
        return <int8_t>value
    if first == 0xD1:
        return <int16_t>value
    if first == 0xD2:
        return <int32_t>value
    return PyLong_FromLongLong(<int64_t>value)


cdef object text(const uint8_t *p, const uint8_t *end):
    cdef size_t n = 0
    p = head_of(p, end, &n, True)
    return PyUnicode_DecodeUTF8(<const char *>p, n, NULL)


cdef object decoded(uint8_t kind, const uint8_t *p, const uint8_t *end):
    """The value of a field that was found to be of its kind."""
    cdef size_t n = 0
    cdef Py_ssize_t i
    cdef const uint8_t *behind
    if kind == c"s":
        return text(p, end)
    if kind == c"n" or kind == c"i":
        return number(p)
    if kind == c"k" or kind == c"b":
        p = head_of(p, end, &n, False)
        return PyBytes_FromStringAndSize(<const char *>p, n)
    if kind == c"a":
        if p[0] == 0xDC:
            n = big(p + 1, 2)
            p += 3
        else:
            n = p[0] & 0x0F
            p += 1
        values = []
        for i in range(<Py_ssize_t>n):
            values.append(text(p, end))
            behind = head_of(p, end, &n, True)
            p = behind + n
        return tuple(values)
    numbers = {}
    for i in range(p[0] & 0x0F):
        if i == 0:
            p += 1
        name = text(p, end)
        p = head_of(p, end, &n, True) + n
        numbers[name] = number(p)
        p = skip_number(p, end, True)
    return numbers


@cython.final
cdef class Layout:
    """The fields of a usual record. See ``_records_py.Layout``."""

    cdef readonly str kinds
    cdef readonly int count
    cdef int elements
    cdef uint8_t[FIELDS] letters
    # The head of the nested array that begins with a field, 0 where none does.
    cdef uint8_t[FIELDS + 1] before

    def __init__(self, str kinds not None):
        cdef int inside = -1
        self.kinds = kinds
        self.count = self.elements = 0
        for at in range(FIELDS + 1):
            self.before[at] = 0
        for letter in kinds:
            if letter == "(" and inside < 0:
                inside = self.count
                self.elements += 1
            elif letter == ")" and inside >= 0 and 1 <= self.count - inside <= 15:
                self.before[inside] = <uint8_t>(0x90 | (self.count - inside))
                inside = -1
            elif letter in "kbsniam":
                if self.count == FIELDS:
                    raise ValueError(f"a layout has 1 to {FIELDS} fields: {kinds!r}")
                self.letters[self.count] = <uint8_t>ord(letter)
                self.count += 1
                self.elements += inside < 0
            else:
                raise ValueError(f"not a layout: {kinds!r}")
        if inside >= 0:
            raise ValueError(f"not a layout: {kinds!r}")
        if not self.count:
            raise ValueError(f"a layout has 1 to {FIELDS} fields: {kinds!r}")

    def kind(self, field):
        """The letter of a field."""
        return chr(self.letters[self.field(field)])

    cdef int field(self, object number) except -1:
        cdef int found = number
        if not 0 <= found < self.count:
            raise ValueError(f"a record has {self.count} fields, {number!r} is not among them")
        return found

    cdef bint scan(self, const uint8_t *base, const uint8_t *p, const uint8_t *end, uint32_t *starts) noexcept:
        """Where each field begins and the last one ends, in ``starts``; False for an odd record."""
        cdef int i
        if self.elements <= 15:
            if p >= end or p[0] != (0x90 | self.elements):
                return False
            p += 1
        else:
            if end - p < 3 or p[0] != 0xDC or big(p + 1, 2) != <uint64_t>self.elements:
                return False
            p += 3
        for i in range(self.count):
            if self.before[i]:
                if p >= end or p[0] != self.before[i]:
                    return False
                p += 1
            starts[i] = <uint32_t>(p - base)
            p = skip(self.letters[i], p, end)
            if p == NULL:
                return False
        starts[self.count] = <uint32_t>(p - base)
        return p == end


@cython.final
cdef class Made:
    """A value made of some fields by a function. See ``_records_py.Made``."""

    cdef readonly tuple fields
    cdef readonly object function
    cdef readonly int width
    cdef int count
    cdef int[MADE_OF] places
    cdef dict kept

    def __init__(self, fields, function, int width=0, bint keep=True):
        self.fields = tuple(fields)
        if not 1 <= len(self.fields) <= MADE_OF or width < 0:
            raise ValueError(f"a column is made of 1 to {MADE_OF} fields")
        self.count = len(self.fields)
        for at, field in enumerate(self.fields):
            self.places[<int>at] = field
        self.function = function
        self.width = width
        self.kept = {} if keep else None

    def clear(self):
        """Forgets what the function gave."""
        if self.kept is not None:
            PyDict_Clear(self.kept)


@cython.final
cdef class Counts:
    """Some numbers of a map, each a column. See ``_records_py.Counts``."""

    cdef readonly int field
    cdef readonly tuple names
    cdef readonly object missing, function, none
    cdef tuple packed
    cdef int count

    def __init__(self, int field, names, missing, function):
        self.field = field
        self.names = tuple(names)
        if len(self.names) > FIXMAP or any([len(name.encode()) > 31 for name in self.names]):
            raise ValueError("at most 15 names of at most 31 bytes are looked for")
        self.packed = tuple([bytes((0xA0 | len(name.encode()),)) + name.encode() for name in self.names])
        self.missing = missing
        self.function = function
        self.none = function({})
        self.count = len(self.names)


@cython.final
cdef class Records:
    """The records of whole and sound frames. See ``_records_py.Records``."""

    cdef readonly Layout layout
    cdef readonly Py_ssize_t end
    # The data, and behind it what its abbreviated records say, and what those before it said that they refer to.
    cdef uint8_t *base
    cdef Py_ssize_t size, filled
    cdef Py_ssize_t count, room
    cdef int stride
    # For each record: where its payload begins and ends, whether it is odd, then its fields as ``Layout.scan`` says,
    # and where its frame begins and ends.
    cdef uint32_t *places
    cdef dict known             # where those before the data are here: (begin, size)

    def __cinit__(self):
        self.places = NULL
        self.base = NULL

    def __init__(self, Layout layout not None, bytes data not None, Py_ssize_t at, Py_ssize_t limit,
                 int64_t offset=0, earlier=None):
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), begin, length
        cdef uint32_t *place
        if not 0 <= at <= size or size > <Py_ssize_t>MOST:
            raise ValueError(f"there is no byte {at} in {size}")
        if self.places != NULL or self.base != NULL:
            raise TypeError("records are read once")
        self.layout = layout
        self.known = {}
        self.stride = layout.count + 6
        self.make_room(max(size, 1))  # for no data, too: memcpy takes no NULL
        memcpy(self.base, PyBytes_AS_STRING(data), size)
        self.filled = size
        self.end = at
        while self.count < limit:
            length = self.frame(self.end, size)
            if length == 0:
                break
            begin = self.end + HEADER_BYTES
            if self.base[begin] == ABBREVIATED:
                begin = self.expand(self.end, length, size, offset, earlier)
                if begin < 0:
                    break
            place = self.next_place()
            place[0] = <uint32_t>begin
            place[1] = <uint32_t>(begin + length if begin < size else self.filled)
            place[2] = not layout.scan(self.base, self.base + place[0], self.base + place[1], place + 3)
            place[self.stride - 2] = <uint32_t>self.end
            self.end += HEADER_BYTES + length
            place[self.stride - 1] = <uint32_t>self.end
            self.count += 1

    def __dealloc__(self):
        PyMem_Free(self.places)
        PyMem_Free(self.base)

    cdef bint make_room(self, Py_ssize_t more) except -1:
        """False when it would be too much."""
        cdef Py_ssize_t wanted = self.filled + more
        cdef void *grown
        if wanted > self.size:
            if wanted > <Py_ssize_t>MOST:
                return False
            wanted = max(wanted, min(2 * self.size, <Py_ssize_t>MOST), <Py_ssize_t>64)
            grown = PyMem_Realloc(self.base, wanted)
            if grown == NULL:
                raise MemoryError()
            self.base = <uint8_t *>grown
            self.size = wanted
        return True

    cdef Py_ssize_t frame(self, Py_ssize_t at, Py_ssize_t size) noexcept:
        """Bytes of the payload of a whole and sound frame at ``at``, else 0."""
        cdef const uint8_t *head = self.base + at
        cdef uint32_t length
        if size - at < HEADER_BYTES:
            return 0
        length = load32(head)
        if not 1 <= length <= MAX_PAYLOAD or <Py_ssize_t>length > size - at - HEADER_BYTES:
            return 0
        return length if frame_crc(head, length) == load32(head + 4) else 0

    cdef Py_ssize_t expand(self, Py_ssize_t at, Py_ssize_t length, Py_ssize_t size, int64_t offset, earlier) except -2:
        """Puts what the frame at ``at`` abbreviates behind everything; where, -1 when it refers to nothing it fits."""
        cdef int64_t of
        cdef int64_t whole
        cdef Py_ssize_t begin, there
        cdef bytes payload
        if length < 5:
            return -1
        of = load32(self.base + at + HEADER_BYTES + 1)
        if not files.refers(of, offset + at):
            return -1
        if of >= offset:
            there = self.frame(of - offset, size)
            begin = of - offset + HEADER_BYTES
            if there == 0 or self.base[begin] == ABBREVIATED:
                return -1
        elif of in self.known:
            begin, there = self.known[of]
        else:
            payload = earlier(of) if earlier is not None else None
            if payload is None:
                return -1
            there = PyBytes_GET_SIZE(payload)
            if not self.make_room(there):
                return -1
            memcpy(self.base + self.filled, PyBytes_AS_STRING(payload), there)
            begin = self.filled
            self.filled += there
            self.known[of] = begin, there
        whole = cr_expanded(self.base + at + HEADER_BYTES, length, there)
        if whole < 0 or not self.make_room(whole):
            return -1
        cr_expand(self.base + begin, self.base + at + HEADER_BYTES, length, self.base + self.filled)
        self.filled += whole
        return self.filled - whole

    cdef uint32_t *next_place(self) except NULL:
        cdef void *grown
        if self.count == self.room:
            self.room = max(64, 2 * self.room)
            grown = PyMem_Realloc(self.places, self.room * self.stride * sizeof(uint32_t))
            if grown == NULL:
                raise MemoryError()
            self.places = <uint32_t *>grown
        return self.places + self.count * self.stride

    @property
    def odd(self):
        """Which records are not of the layout."""
        return tuple([i for i in range(self.count) if self.places[i * self.stride + 2]])

    def __len__(self):
        return self.count

    cdef uint32_t *place(self, Py_ssize_t number) except NULL:
        if not 0 <= number < self.count:
            raise IndexError(f"there is no record {number} in {self.count}")
        return self.places + number * self.stride

    def payload(self, Py_ssize_t number):
        """The bytes of a record. Raises IndexError."""
        cdef uint32_t *place = self.place(number)
        return PyBytes_FromStringAndSize(<const char *>self.base + place[0], place[1] - place[0])

    def end_of(self, Py_ssize_t number):
        """Where the frame of a record ends in the data. Raises IndexError."""
        return self.place(number)[self.stride - 1]

    def cut(self, Py_ssize_t count):
        """Forgets all but the first ``count`` records. See ``_records_py.Records.cut``."""
        if not 0 <= count <= self.count:
            raise IndexError(f"there are not {count} records in {self.count}")
        if count < self.count:
            self.end = self.place(count)[self.stride - 2]
        self.count = count

    cdef inline const uint8_t *span(self, const uint32_t *place, int field, size_t *n) noexcept:
        cdef uint32_t begin = place[3 + field]
        n[0] = place[4 + field] - (self.layout.before[field + 1] != 0) - begin
        return self.base + begin

    cdef object value(self, const uint32_t *place, int field):
        cdef size_t n = 0
        cdef const uint8_t *p = self.span(place, field, &n)
        return decoded(self.layout.letters[field], p, p + n)

    cdef bint same(self, const uint32_t *one, const uint32_t *other, int field) noexcept:
        cdef size_t n = 0, m = 0
        cdef const uint8_t *p = self.span(one, field, &n)
        cdef const uint8_t *q = self.span(other, field, &m)
        return n == m and memcmp(p, q, n) == 0

    cdef bint same_made(self, const uint32_t *one, const uint32_t *other, Made made) noexcept:
        cdef int i
        for i in range(made.count):
            if not self.same(one, other, made.places[i]):
                return False
        return True

    cdef object make(self, const uint32_t *place, Made made):
        """What the function gives, now or before."""
        cdef Py_ssize_t total = 0
        cdef size_t n = 0
        cdef const uint8_t *p
        cdef char *to
        cdef PyObject *found
        cdef int i
        cdef bytes key = None
        if made.kept is not None:
            for i in range(made.count):
                self.span(place, made.places[i], &n)
                total += n
        if made.kept is not None and total <= KEPT_BYTES:
            key = PyBytes_FromStringAndSize(NULL, total)
            to = PyBytes_AS_STRING(key)
            for i in range(made.count):
                p = self.span(place, made.places[i], &n)
                memcpy(to, p, n)
                to += n
            found = PyDict_GetItem(made.kept, key)
            if found != NULL:
                return <object>found
        given = made.function(*[self.value(place, made.places[i]) for i in range(made.count)])
        if made.width and not (PyTuple_CheckExact(given) and PyTuple_GET_SIZE(given) == made.width):
            raise TypeError(f"a made column of width {made.width} gave {type(given).__name__}")
        if key is not None:
            if PyDict_Size(made.kept) >= KEPT:
                PyDict_Clear(made.kept)
            PyDict_SetItem(made.kept, key, given)
        return given

    cdef object counted(self, const uint32_t *place, Counts counts):
        """The numbers of the names, then what is made of the rest."""
        cdef size_t n = 0
        cdef const uint8_t *p = self.span(place, counts.field, &n)
        cdef const uint8_t *end = p + n
        cdef const uint8_t *name
        cdef int left = p[0] & 0x0F
        cdef int i
        found = [counts.missing] * counts.count
        rest = None
        p += 1
        while left:
            left -= 1
            name = p
            p = head_of(p, end, &n, True) + n
            for i in range(counts.count):
                if PyBytes_GET_SIZE(<bytes>counts.packed[i]) == p - name and \
                        memcmp(PyBytes_AS_STRING(<bytes>counts.packed[i]), name, p - name) == 0:
                    found[i] = number(p)
                    break
            else:
                if rest is None:
                    rest = {}
                rest[text(name, p)] = number(p)
            p = skip_number(p, end, True)
        found.append(counts.none if rest is None else counts.function(rest))
        return tuple(found)

    cdef int check_made(self, Made made) except -1:
        for field in made.fields:
            self.layout.field(field)
        return 0

    def column(self, field):
        """One field of each record, None for odd ones."""
        cdef int wanted = self.layout.field(field)
        cdef Py_ssize_t r
        cdef const uint32_t *place
        cdef const uint32_t *before = NULL
        values = PyList_New(self.count)
        value = None
        for r in range(self.count):
            place = self.places + r * self.stride
            if place[2]:
                Py_INCREF(None)
                PyList_SET_ITEM(values, r, None)
                continue
            if before == NULL or not self.same(before, place, wanted):
                value = self.value(place, wanted)
            before = place
            Py_INCREF(value)
            PyList_SET_ITEM(values, r, value)
        return values

    def rows(self, columns):
        """For each record a tuple of the columns, None for odd ones. See ``_records_py.Records.rows``."""
        cdef int[COLUMNS] fields
        cdef int count = 0, width = 0, i, k, at
        cdef Py_ssize_t r
        cdef const uint32_t *place
        cdef const uint32_t *before = NULL
        cdef list makers = [], held = []
        cdef tuple row
        cdef bint plain
        cdef Made made
        cdef Counts counts
        if len(columns) > COLUMNS:
            raise ValueError(f"there are at most {COLUMNS} columns")
        for column in columns:
            if isinstance(column, Made):
                self.check_made(<Made>column)
                fields[count] = -1
                width += (<Made>column).width or 1
                makers.append(column)
            elif isinstance(column, Counts):
                if self.layout.letters[self.layout.field((<Counts>column).field)] != c"m":
                    raise ValueError("only in a map something can be counted")
                fields[count] = -2
                width += (<Counts>column).count + 1
                makers.append(column)
            else:
                fields[count] = self.layout.field(column)
                width += 1
                makers.append(None)
            held.append(None)
            count += 1
        rows = PyList_New(self.count)
        for r in range(self.count):
            place = self.places + r * self.stride
            if place[2]:
                Py_INCREF(None)
                PyList_SET_ITEM(rows, r, None)
                continue
            for i in range(count):
                if fields[i] >= 0:
                    if before == NULL or not self.same(before, place, fields[i]):
                        held[i] = self.value(place, fields[i])
                elif fields[i] == -1:
                    made = <Made>makers[i]
                    if before == NULL or not self.same_made(before, place, made):
                        held[i] = self.make(place, made)
                else:
                    counts = <Counts>makers[i]
                    if before == NULL or not self.same(before, place, counts.field):
                        held[i] = self.counted(place, counts)
            before = place
            row = PyTuple_New(width)
            at = 0
            plain = True
            for i in range(count):
                value = held[i]
                if fields[i] >= 0 or (fields[i] == -1 and (<Made>makers[i]).width == 0):
                    Py_INCREF(value)
                    PyTuple_SET_ITEM(row, at, value)
                    plain = plain and not PyObject_IS_GC(value)
                    at += 1
                    continue
                for k in range(<int>PyTuple_GET_SIZE(value)):
                    item = <object>PyTuple_GET_ITEM(value, k)
                    Py_INCREF(item)
                    PyTuple_SET_ITEM(row, at, item)
                    plain = plain and not PyObject_IS_GC(item)
                    at += 1
            if plain:
                # Many at a time: without this the collector would walk over all of them, again and again.
                PyObject_GC_UnTrack(row)
            Py_INCREF(row)
            PyList_SET_ITEM(rows, r, row)
        return rows

    def entries(self, parts):
        """For each record the joined parts, None for odd ones. See ``_records_py.Records.entries``."""
        cdef int[PARTS] fields
        cdef const uint8_t *where[PARTS]
        cdef size_t[PARTS] lengths
        cdef size_t n = 0
        cdef int count = 0, i
        cdef Py_ssize_t r, total, size
        cdef const uint32_t *place
        cdef const uint32_t *before = NULL
        cdef list makers = [], held = []
        cdef Made made
        cdef bytes entry, part
        cdef char *to
        if len(parts) > PARTS:
            raise ValueError(f"there are at most {PARTS} parts")
        for each in parts:
            made = None
            part = None
            fields[count] = -1
            if isinstance(each, bytes):
                part = each
            elif isinstance(each, Made):
                made = each
            elif isinstance(each, tuple):
                made, field = each
                fields[count] = self.layout.field(field)
                if self.layout.letters[fields[count]] != c"s":
                    raise ValueError("only to text something can be prefixed")
            else:
                fields[count] = self.layout.field(each)
            if made is not None:
                if made.width:
                    raise ValueError("a part is one value")
                self.check_made(made)
            makers.append(made)
            held.append(part)
            count += 1
        entries = PyList_New(self.count)
        for r in range(self.count):
            place = self.places + r * self.stride
            if place[2]:
                Py_INCREF(None)
                PyList_SET_ITEM(entries, r, None)
                continue
            total = 0
            for i in range(count):
                made = <Made>makers[i]
                if made is not None and (before == NULL or not self.same_made(before, place, made)):
                    given = self.make(place, made)
                    if not PyBytes_CheckExact(given):
                        raise TypeError(f"a made column of a part gives bytes, not {type(given).__name__}")
                    held[i] = given
                if fields[i] < 0:
                    part = <bytes>held[i]
                    where[i] = <const uint8_t *>PyBytes_AS_STRING(part)
                    lengths[i] = PyBytes_GET_SIZE(part)
                    total += lengths[i]
                    continue
                where[i] = self.span(place, fields[i], &n)
                lengths[i] = n
                if made is not None:
                    where[i] = head_of(where[i], where[i] + n, &lengths[i], True)
                    size = lengths[i] + PyBytes_GET_SIZE(<bytes>held[i])
                    total += size + head_size(size)
                else:
                    total += n
            before = place
            entry = PyBytes_FromStringAndSize(NULL, total)
            to = PyBytes_AS_STRING(entry)
            for i in range(count):
                if fields[i] >= 0 and <PyObject *>makers[i] != <PyObject *>None:
                    part = <bytes>held[i]
                    size = PyBytes_GET_SIZE(part)
                    to = put_head(to, size + lengths[i])
                    memcpy(to, PyBytes_AS_STRING(part), size)
                    to += size
                memcpy(to, where[i], lengths[i])
                to += lengths[i]
            Py_INCREF(entry)
            PyList_SET_ITEM(entries, r, entry)
        return entries


cdef inline Py_ssize_t head_size(Py_ssize_t n) noexcept nogil:
    return 1 if n < 32 else 2 if n < 0x100 else 3 if n < 0x10000 else 5


cdef inline char *put_head(char *to, Py_ssize_t n) noexcept nogil:
    """The head of a text."""
    cdef int width = <int>head_size(n) - 1
    cdef int i
    if width == 0:
        to[0] = <char>(0xA0 | n)
        return to + 1
    to[0] = <char>(0xD9 if width == 1 else 0xDA if width == 2 else 0xDB)
    for i in range(width):
        to[1 + i] = <char>(n >> (8 * (width - 1 - i)))
    return to + 1 + width
