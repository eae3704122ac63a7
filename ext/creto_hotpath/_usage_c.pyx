# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled form of ``_usage_py``: the same machine, the same answers. Read the twin for the why.

Complexity: O(bytes), one pass over JSON text plus a memchr for line ends. Memory: below 1.5 KiB per scanner besides
what the twin's docstring allows to be captured and held.
"""

import json
from zlib import crc32

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from creto_hotpath._usage_fields import (
    CHECKSUM,
    FRAMINGS,
    GRAMMARS,
    MAX_COUNT,
    MAX_FRAME,
    MAX_FRAME_HEADERS,
    MERGED,
    PRELUDE,
    anthropic_counts,
    counts_of,
    decoded_payload,
    is_last_word,
    usage_of,
)

cdef enum:
    COUNT_LIMIT = 1000000000
    DEPTH_LIMIT = 512
    KEY_LIMIT = 40
    NAME_LIMIT = 12
    PRELUDE_SIZE = 12
    CHECKSUM_SIZE = 4
    CAPTURE_LIMIT = 16384
    HELD_LIMIT = 262144

    START = 0
    INSIDE = 1
    END = 2
    BAD = 3

    NOTHING = 0
    USAGE = 1
    MODEL = 2
    CHOICES = 3
    WRAPPER = 4
    LOOSE = 5
    PAYLOAD = 6

    OUTSIDE = 0
    NEXT = 1
    AFTER = 2
    CLOSED = 3

    DOCUMENT = 0
    EVENTS = 1
    LINES = 2
    FRAMES = 3

    OPENAI = 0
    ANTHROPIC = 1
    OTHER = 2

    LF = 10
    CR = 13
    QUOTE = 34
    COMMA = 44
    COLON = 58
    BACKSLASH = 92
    OPEN_ARRAY = 91
    CLOSE_ARRAY = 93
    OPEN_OBJECT = 123
    CLOSE_OBJECT = 125

assert COUNT_LIMIT == MAX_COUNT
assert (PRELUDE_SIZE, CHECKSUM_SIZE) == (PRELUDE, CHECKSUM)
assert FRAMINGS == ("document", "events", "lines", "frames")
MAX_CAPTURE = CAPTURE_LIMIT
MAX_DEPTH = DEPTH_LIMIT
MAX_HELD = HELD_LIMIT

ctypedef const unsigned char* text

cdef uint64_t ONES = 0x0101010101010101ULL
cdef uint64_t HIGHS = 0x8080808080808080ULL


cdef inline bint is_space(unsigned char c) noexcept nogil:
    return c == 32 or c == LF or c == CR or c == 9


cdef inline Py_ssize_t string_run(text p, Py_ssize_t i, Py_ssize_t end) noexcept nogil:
    """Index of the next quote or backslash at or after ``i``, ``end`` when there is none."""
    cdef uint64_t word, quotes, slashes
    while i + 8 <= end:
        memcpy(&word, p + i, 8)
        quotes = word ^ (ONES * QUOTE)
        slashes = word ^ (ONES * BACKSLASH)
        # The highest bit of a byte is set where it is zero, and seldom without need.
        if (((quotes - ONES) & ~quotes) | ((slashes - ONES) & ~slashes)) & HIGHS:
            break
        i += 8
    while i < end and p[i] != QUOTE and p[i] != BACKSLASH:
        i += 1
    return i


cdef inline Py_ssize_t line_end(text p, Py_ssize_t i, Py_ssize_t end) noexcept nogil:
    """Index of the next CR or LF at or after ``i``, ``end`` when there is none."""
    cdef text lf = <text>memchr(p + i, LF, end - i)
    cdef Py_ssize_t stop = end if lf == NULL else lf - p
    cdef text cr = <text>memchr(p + i, CR, stop - i)
    return stop if cr == NULL else cr - p


cdef struct name_t:
    int slot
    int size
    bint outer  # stands outermost only
    const char *text


cdef class Table:
    """What scanners of one dialect and framing have in common."""

    cdef str dialect
    cdef int family
    cdef int framing
    cdef bint merges
    cdef bint has_loose
    cdef int count
    cdef name_t names[NAME_LIMIT]
    cdef object grammar

    def __cinit__(self, str dialect, str framing):
        self.dialect = dialect
        self.family = ANTHROPIC if dialect == "anthropic" else OPENAI if dialect.startswith("openai") else OTHER
        self.framing = FRAMINGS.index(framing)
        self.merges = dialect in MERGED
        self.grammar = grammar = GRAMMARS[dialect]
        self.has_loose = bool(grammar.loose)
        self.count = 0
        if self.framing != DOCUMENT:
            for name in grammar.wrappers:
                self._add(name, WRAPPER, True)
        for name in grammar.usage:
            self._add(name, USAGE, False)
        if grammar.model:
            self._add(grammar.model, MODEL, False)
        self._add(b"choices", CHOICES, True)
        for name in grammar.loose:
            self._add(name, LOOSE, True)
        if grammar.payload:
            self._add(grammar.payload, PAYLOAD, True)

    cdef int _add(self, bytes name, int slot, bint outer) except -1:
        cdef name_t* entry
        if self.count == NAME_LIMIT:
            raise ValueError("too many names")
        entry = &self.names[self.count]
        entry.slot = slot
        entry.size = <int>PyBytes_GET_SIZE(name)
        entry.outer = outer
        entry.text = PyBytes_AS_STRING(name)  # the grammar, which is held, has it
        self.count += 1
        return 0


cdef dict _TABLES = {(dialect, framing): Table(dialect, framing) for dialect in GRAMMARS for framing in FRAMINGS}


cdef struct document_t:
    int phase
    int depth
    int slot
    int capturing
    int level
    int usage_level
    int key_size
    int name_size
    bint in_string
    bint escaped
    bint expect_key
    bint in_key
    bint armed
    bint wrapped
    bint choices_open
    bint choices_empty
    bint cut_is_open
    Py_ssize_t key_at
    Py_ssize_t comma_at
    Py_ssize_t cut_from
    Py_ssize_t cut_to
    unsigned char key[KEY_LIMIT]
    unsigned char name[KEY_LIMIT]
    unsigned char stack[DEPTH_LIMIT]


cdef class UsageScanner:
    """Watches one answer; see the twin for arguments and promises."""

    cdef readonly bint rewrites
    cdef readonly bint final
    cdef readonly bint last
    cdef Table table
    cdef int framing
    cdef document_t d
    cdef bytearray captured
    cdef bytes usage_raw
    cdef bytes model_raw
    cdef bytes payload_raw
    cdef dict loose
    cdef dict counts
    cdef bytes named
    cdef Py_ssize_t column
    cdef bint is_data
    cdef bint after_cr
    cdef int documents
    cdef bint odd
    cdef bint is_usage_chunk
    cdef Py_ssize_t cut_from
    cdef Py_ssize_t cut_to
    cdef bytearray held
    cdef bint too_long
    cdef bint dropped
    cdef int between
    cdef bint ended
    cdef bytearray prelude
    cdef bytearray checksum
    cdef Py_ssize_t at
    cdef Py_ssize_t payload_at
    cdef Py_ssize_t checksum_at
    cdef uint64_t crc

    def __init__(self, dialect, framing, strip_usage_chunk=False):
        cdef Table table = _TABLES.get((dialect, framing))
        if table is None:
            if dialect not in GRAMMARS:
                raise ValueError(f"unknown dialect {dialect!r}")
            raise ValueError(f"unknown framing {framing!r}")
        self.rewrites = strip_usage_chunk
        self.final = False
        self.last = False
        self.table = table
        self.framing = table.framing
        self.loose = {} if table.has_loose else None
        self.captured = bytearray()
        self.counts = {}
        self.named = b""
        self.column = 0
        self.is_data = True
        self.after_cr = False
        self.documents = 0
        self.odd = False
        self.is_usage_chunk = False
        self.cut_from = self.cut_to = 0
        self.held = bytearray()
        self.too_long = False
        self.dropped = False
        self.between = NEXT if self.framing == LINES else OUTSIDE
        self.ended = False
        self.prelude = self.checksum = None
        if self.framing == FRAMES:
            self.prelude, self.checksum = bytearray(), bytearray()
        self.at = self.payload_at = self.checksum_at = 0
        self.crc = 0
        self._reset()

    @property
    def usage(self):
        """Tokens by kind, None as long as they are unknown."""
        if not self.counts:
            return None
        return dict(self.counts) if self.table.family == OPENAI else usage_of(self.table.dialect, self.counts)

    @property
    def model(self):
        """Name of the model that answered, "" when it was not named."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.named)
        if not size:
            return ""
        if is_plain(<text>PyBytes_AS_STRING(self.named) + 1, size - 2):
            return PyUnicode_DecodeASCII(PyBytes_AS_STRING(self.named) + 1, size - 2, NULL)
        try:
            name = json.loads(self.named)
        except ValueError:
            return ""
        return name if isinstance(name, str) else ""

    def feed(self, bytes data not None):
        """Watches the next bytes. Returns what to send instead when rewriting, else None."""
        if self.framing == EVENTS:
            return self._feed_stream(data)
        if self.framing == FRAMES:
            self._feed_frames(data)
        elif self.framing == LINES or self.between != OUTSIDE or self._is_array(data):
            self._feed_sequence(data)
        else:
            self._feed_document(<text>PyBytes_AS_STRING(data), 0, PyBytes_GET_SIZE(data), 0, False)
            if self.d.phase == END and not self.final:
                self._count(False)
            elif self.d.phase == BAD:
                self.counts = {}
                self.named = b""
                self.final = self.last = False
        return data if self.rewrites else None

    def finish(self):
        """The answer is complete. Returns what is still to be sent when rewriting, else None."""
        cdef bytearray out = bytearray()
        if self.framing == EVENTS:
            if self.column:
                self._end_line()
            self._end_event(b"", 0, 0, out)
        elif self.d.phase == INSIDE:
            self.last = False
        elif self.framing == FRAMES:
            self.last = self.last and not len(self.prelude)
        elif self.framing == DOCUMENT and (self.between == NEXT or self.between == AFTER):
            self.last = False
        return bytes(out) if self.rewrites else None

    cdef int _give_up(self) except -1:
        self.ended = True
        self.counts = {}
        self.named = b""
        self.final = self.last = False
        return 0

    # Several documents, one after the other.

    cdef bint _is_array(self, bytes data) except *:
        cdef Py_ssize_t i
        if self.d.phase != START or self.table.dialect != "gemini":
            return False
        i = skip_space(<text>PyBytes_AS_STRING(data), 0, PyBytes_GET_SIZE(data))
        return i < PyBytes_GET_SIZE(data) and data[i] == OPEN_ARRAY

    cdef int _feed_sequence(self, bytes data) except -1:
        cdef text p = <text>PyBytes_AS_STRING(data)
        cdef Py_ssize_t i = 0, size = PyBytes_GET_SIZE(data)
        while i < size and not self.ended:
            if self.d.phase == START:
                if is_space(p[i]):
                    i += 1
                    continue
                if self.framing != LINES and self._goes_between(p[i]):
                    i += 1
                    continue
                if self.between != NEXT:
                    return self._give_up()
            i = self._feed_document(p, i, size, 0, True)
            if self.d.phase == END:
                self._count(False)
                self._reset()
                if self.framing != LINES:
                    self.between = AFTER
                    self.documents = 1
            elif self.d.phase == BAD:
                return self._give_up()
        return 0

    cdef bint _goes_between(self, unsigned char c) except *:
        if c == OPEN_ARRAY and self.between == OUTSIDE:
            self.between = NEXT
        elif c == COMMA and self.between == AFTER:
            self.between = NEXT
        elif c == CLOSE_ARRAY and (self.between == AFTER or (self.between == NEXT and not self.documents)):
            self.between = CLOSED
        else:
            return False
        return True

    # Frames.

    cdef int _feed_frames(self, bytes data) except -1:
        cdef Py_ssize_t i = 0, size = PyBytes_GET_SIZE(data), end, stop
        while i < size and not self.ended:
            if len(self.prelude) < PRELUDE_SIZE:
                end = min(size, i + PRELUDE_SIZE - len(self.prelude))
                self.prelude += data[i:end]
                if len(self.prelude) == PRELUDE_SIZE:
                    self._begin_frame()
            elif self.at < self.checksum_at:
                stop = self.payload_at if self.at < self.payload_at else self.checksum_at
                end = min(size, i + stop - self.at)
                self.crc = crc32(data[i:end], self.crc)
                if self.at >= self.payload_at:
                    self._feed_document(<text>PyBytes_AS_STRING(data), i, end, 0, False)
                self.at += end - i
            else:
                end = min(size, i + CHECKSUM_SIZE - len(self.checksum))
                self.checksum += data[i:end]
                if len(self.checksum) == CHECKSUM_SIZE:
                    self._end_frame()
            i = end
        return 0

    cdef int _begin_frame(self) except -1:
        cdef bytes prelude = bytes(self.prelude)
        cdef text p = <text>PyBytes_AS_STRING(prelude)
        cdef uint64_t total = big_endian(p), headers = big_endian(p + 4)
        self.at = PRELUDE_SIZE
        self.payload_at = <Py_ssize_t>(PRELUDE_SIZE + headers)
        self.checksum_at = <Py_ssize_t>total - CHECKSUM_SIZE
        if crc32(prelude[:8]) != big_endian(p + 8) or headers > MAX_FRAME_HEADERS or total > MAX_FRAME:
            return self._give_up()
        if self.payload_at > self.checksum_at:
            return self._give_up()
        self.crc = crc32(prelude)
        return 0

    cdef int _end_frame(self) except -1:
        cdef bytes checksum = bytes(self.checksum), inner
        if big_endian(<text>PyBytes_AS_STRING(checksum)) != self.crc:
            return self._give_up()
        if self.d.phase == END:
            self._count(False)
            inner = decoded_payload(self.payload_raw) if self.payload_raw else b""
            if inner:
                self._reset()
                self._feed_document(<text>PyBytes_AS_STRING(inner), 0, PyBytes_GET_SIZE(inner), 0, False)
                if self.d.phase == END:
                    self._count(True)
        self._reset()
        del self.prelude[:]
        del self.checksum[:]
        return 0

    # The document.

    cdef int _reset(self) except -1:
        cdef document_t* d = &self.d
        d.phase = START
        d.depth = d.slot = d.capturing = d.level = d.usage_level = d.key_size = d.name_size = 0
        d.in_string = d.escaped = d.expect_key = d.in_key = d.armed = d.wrapped = False
        d.choices_open = d.choices_empty = d.cut_is_open = False
        d.key_at = d.cut_from = d.cut_to = 0
        d.comma_at = -1
        self.usage_raw = b""
        self.model_raw = b""
        self.payload_raw = b""
        if self.loose is not None and len(self.loose):
            self.loose = {}
        if len(self.captured):
            del self.captured[:]
        return 0

    cdef Py_ssize_t _feed_document(
        self, text p, Py_ssize_t start, Py_ssize_t end, Py_ssize_t shift, bint one
    ) except -1:
        cdef document_t* d = &self.d
        cdef Py_ssize_t mark = start, i = start
        cdef unsigned char c
        while i < end:
            c = p[i]
            if d.phase != INSIDE:
                if is_space(c):
                    i += 1
                    continue
                if d.phase != START or c != OPEN_OBJECT:
                    d.phase = BAD
                    return end
                d.phase = INSIDE
                d.stack[0] = OPEN_OBJECT
                d.depth = 1
                d.expect_key = True
                i += 1
            elif d.in_string:
                i = self._in_string(p, i, end)
                if not d.in_string and d.capturing and d.depth == d.level:
                    self._keep(p, mark, i)
                    self._captured_whole(i + shift)
            else:
                if not is_space(c):
                    if d.armed:
                        d.armed = False
                        if d.slot == USAGE or d.slot == MODEL or d.slot >= LOOSE:
                            d.capturing = d.slot
                            d.name_size = d.key_size
                            memcpy(d.name, d.key, d.key_size)
                            d.level = d.depth
                            del self.captured[:]
                            mark = i
                        elif d.slot == WRAPPER:
                            d.wrapped = c == OPEN_OBJECT
                        elif d.slot == CHOICES:
                            d.choices_empty = False
                            d.choices_open = c == OPEN_ARRAY
                    elif d.choices_open:
                        d.choices_open = False
                        d.choices_empty = c == CLOSE_ARRAY
                    if not self._structure(c, p, i, mark, shift):
                        d.phase = BAD
                        return end
                i += 1
                if one and d.phase == END:
                    return i
        if d.capturing:
            self._keep(p, mark, end)
        return end

    cdef Py_ssize_t _in_string(self, text p, Py_ssize_t i, Py_ssize_t end) noexcept:
        cdef document_t* d = &self.d
        cdef unsigned char c
        if d.escaped:
            d.escaped = False
            return i + 1
        if not d.in_key:
            i = string_run(p, i, end)
            if i == end:
                return i
        c = p[i]
        if c == QUOTE:
            d.in_string = False
            if d.in_key:
                d.in_key = False
                d.slot = self._slot_of()
        elif c == BACKSLASH:
            d.escaped = True
        if d.in_key and d.key_size < KEY_LIMIT:
            d.key[d.key_size] = c
            d.key_size += 1
        return i + 1

    cdef int _slot_of(self) noexcept:
        cdef document_t* d = &self.d
        cdef name_t* name
        cdef int i
        for i in range(self.table.count):
            name = &self.table.names[i]
            if name.size == d.key_size and (d.depth == 1 or not name.outer):
                if memcmp(d.key, name.text, d.key_size) == 0:
                    return name.slot
        return NOTHING

    cdef bint _structure(self, unsigned char c, text p, Py_ssize_t i, Py_ssize_t mark, Py_ssize_t shift) except *:
        cdef document_t* d = &self.d
        if c == QUOTE:
            d.in_string = True
            if d.expect_key and (d.depth == 1 or (d.depth == 2 and d.wrapped)):
                d.in_key = True
                d.key_size = 0
                if d.depth == 1:
                    if d.cut_is_open:
                        d.cut_to = i + shift
                        d.cut_is_open = False
                    d.key_at = i + shift
            d.expect_key = False
        elif c == COLON:
            d.armed = d.slot != NOTHING
        elif c == COMMA:
            if d.capturing and d.depth == d.level:
                self._keep(p, mark, i)
                self._captured_whole(i + shift)
            d.slot = NOTHING
            d.armed = False
            d.expect_key = d.stack[d.depth - 1] == OPEN_OBJECT
            if d.depth == 1:
                d.comma_at = i + shift
        elif c == OPEN_OBJECT or c == OPEN_ARRAY:
            if d.depth == DEPTH_LIMIT:
                return False
            d.stack[d.depth] = c
            d.depth += 1
            d.slot = NOTHING
            d.expect_key = c == OPEN_OBJECT
        elif c == CLOSE_OBJECT or c == CLOSE_ARRAY:
            if (c == CLOSE_OBJECT) != (d.stack[d.depth - 1] == OPEN_OBJECT):
                return False
            if d.capturing and d.depth == d.level:
                self._keep(p, mark, i)
                self._captured_whole(i + shift)
            d.depth -= 1
            self._closed(p, i, mark, shift)
        return True

    cdef int _closed(self, text p, Py_ssize_t i, Py_ssize_t mark, Py_ssize_t shift) except -1:
        cdef document_t* d = &self.d
        d.slot = NOTHING
        d.armed = False
        d.expect_key = False
        if d.depth == 1:
            d.wrapped = False
        if d.capturing and d.depth == d.level:
            self._keep(p, mark, i + 1)
            self._captured_whole(i + 1 + shift)
        if d.depth == 0:
            d.phase = END
            if d.cut_is_open:
                d.cut_to = i + shift
                d.cut_is_open = False
        return 0

    cdef int _keep(self, text p, Py_ssize_t start, Py_ssize_t end) except -1:
        cdef Py_ssize_t room = CAPTURE_LIMIT + 1 - len(self.captured)
        if end > start + room:
            end = start + room
        if end > start:
            self.captured += PyBytes_FromStringAndSize(<const char*>p + start, end - start)
        return 0

    cdef int _captured_whole(self, Py_ssize_t at) except -1:
        cdef document_t* d = &self.d
        cdef int slot = d.capturing
        cdef bytes raw = bytes(self.captured).strip(b" \t\r\n")
        cdef bint fits = len(self.captured) <= CAPTURE_LIMIT
        d.capturing = NOTHING
        if slot == MODEL:
            if fits and raw[:1] == b'"':
                self.model_raw = raw
            return 0
        if slot == LOOSE:
            self.loose[PyBytes_FromStringAndSize(<const char*>d.name, d.name_size)] = raw if fits else b""
            return 0
        if slot == PAYLOAD:
            self.payload_raw = raw if fits and raw[:1] == b'"' else b""
            return 0
        self.usage_raw = raw if fits and raw[:1] == b"{" else b""
        d.usage_level = d.level
        d.cut_from = d.cut_to = 0
        d.cut_is_open = False
        if raw == b"null" and d.level == 1:
            d.cut_is_open = d.comma_at < 0
            d.cut_from = d.key_at if d.cut_is_open else d.comma_at
            d.cut_to = at
        return 0

    # The event stream.

    cdef bytes _feed_stream(self, bytes data):
        cdef text p = <text>PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t i = 0, event = 0, end
        cdef bytearray out = bytearray() if self.rewrites else None
        while i < size:
            if self.after_cr:
                self.after_cr = False
                if p[i] == LF:
                    if event == i and not len(self.held):
                        if self.rewrites and not self.dropped:
                            out.append(LF)
                        event = i + 1
                    i += 1
                    continue
            end = line_end(p, i, size)
            if end > i:
                self.dropped = False
                self._feed_line(p, i, end, len(self.held) - event)
            if end == size:
                break
            i = end + 1
            self.after_cr = p[end] == CR
            if self.column:
                self._end_line()
            else:
                self._end_event(data, event, i, out)
                event = i
        if self.rewrites:
            self._hold(data, event, size, out)
            return bytes(out)
        return None

    cdef int _feed_line(self, text p, Py_ssize_t start, Py_ssize_t end, Py_ssize_t shift) except -1:
        cdef text field = b"data:"
        while self.is_data and self.column < 5 and start < end:
            self.is_data = p[start] == field[self.column]
            self.column += 1
            start += 1
        if start < end:
            self.column += 1
            if self.is_data:
                self._feed_document(p, start, end, shift, False)
        return 0

    cdef int _end_line(self) except -1:
        cdef document_t* d = &self.d
        if self.is_data and self.column >= 5:
            if d.phase == INSIDE and not d.in_string:
                if d.capturing and len(self.captured) <= CAPTURE_LIMIT:
                    self.captured.append(LF)
            elif d.phase == END:
                self._count(False)
                self.documents += 1
                self.is_usage_chunk = d.choices_empty and len(self.usage_raw) > 0
                self.cut_from = d.cut_from
                self.cut_to = d.cut_to
                self._reset()
            else:
                self.odd = True
                self._reset()
        self.column = 0
        self.is_data = True
        return 0

    cdef int _end_event(self, bytes data, Py_ssize_t start, Py_ssize_t end, bytearray out) except -1:
        self.dropped = False
        if self.rewrites:
            self._hold(data, start, end, out)
            if self.documents == 1 and not self.odd and not self.too_long:
                self.dropped = self.is_usage_chunk
                if self.cut_to > self.cut_from:
                    del self.held[self.cut_from:self.cut_to]
            if not self.dropped:
                out += self.held
            del self.held[:]
        self._reset()
        self.documents = 0
        self.odd = self.too_long = self.is_usage_chunk = False
        return 0

    cdef int _hold(self, bytes data, Py_ssize_t start, Py_ssize_t end, bytearray out) except -1:
        self.held += data[start:end]
        if self.too_long or len(self.held) > HELD_LIMIT:
            self.too_long = True
            out += self.held
            del self.held[:]
        return 0

    # What a complete document says.

    cdef int _count(self, bint inner) except -1:
        cdef dict found
        if self.model_raw:
            self.named = self.model_raw
        self.last = False
        if not self.usage_raw and (self.loose is None or not len(self.loose)):
            return 0
        fields = None if self.table.family == OTHER else plain_fields(self.usage_raw)
        if fields is None:
            found = counts_of(self.table.dialect, self.usage_raw, self.loose or {})
        else:
            found = anthropic_counts(fields) if self.table.family == ANTHROPIC else openai_plain(fields)
        if not found:
            return 0
        self.last = True
        if self.table.merges:
            for name, count in found.items():
                if count or name not in self.counts:
                    self.counts[name] = count
        else:
            self.counts = found
        if (self.framing == DOCUMENT and self.between == OUTSIDE) or is_last_word(
            self.table.dialect,
            self.loose or {},
            level=self.d.usage_level,
            choices_empty=self.d.choices_empty,
            inner=inner,
        ):
            self.final = True
        return 0


cdef inline uint64_t big_endian(text p) noexcept nogil:
    return <uint64_t>p[0] << 24 | <uint64_t>p[1] << 16 | <uint64_t>p[2] << 8 | p[3]


cdef bint is_plain(text p, Py_ssize_t size) noexcept nogil:
    """Whether it stands for itself between two quotes."""
    cdef Py_ssize_t i
    for i in range(size):
        if p[i] < 32 or p[i] > 126 or p[i] == QUOTE or p[i] == BACKSLASH:
            return False
    return size >= 0


cdef int take(dict into, str name, object fields, str key) except -1:
    """Stores a count, unless there is one."""
    cdef PyObject *found
    cdef int64_t count
    if type(fields) is not dict or name in into:
        return 0
    found = PyDict_GetItem(fields, key)
    if found != NULL and type(<object>found) is int:
        count = <object>found
        if count <= COUNT_LIMIT:
            into[name] = <object>found
    return 0


cdef dict openai_plain(dict fields):
    """``openai_usage`` of what ``plain_fields`` gives."""
    cdef dict usage = {}
    take(usage, "input", fields, "prompt_tokens")
    take(usage, "input", fields, "input_tokens")
    take(usage, "output", fields, "completion_tokens")
    take(usage, "output", fields, "output_tokens")
    take(usage, "total", fields, "total_tokens")
    if len(fields) > len(usage):
        # Of both spellings of the details the second counts, so it is taken first.
        for parts_in, parts_out in (
            ("input_tokens_details", "output_tokens_details"), ("prompt_tokens_details", "completion_tokens_details")
        ):
            inside, outside = fields.get(parts_in), fields.get(parts_out)
            take(usage, "cache_read", inside, "cached_tokens")
            take(usage, "cache_write", inside, "cache_write_tokens")
            take(usage, "input_audio", inside, "audio_tokens")
            take(usage, "reasoning", outside, "reasoning_tokens")
            take(usage, "output_audio", outside, "audio_tokens")
    total = usage.get("total")
    if total is None:
        if "input" in usage and "output" in usage:
            usage["total"] = usage["input"] + usage["output"]
    elif "input" in usage:
        usage["output"] = max(usage.get("output", 0), total - usage["input"])
    elif "output" in usage:
        usage["input"] = max(0, total - usage["output"])
    return usage


cdef dict plain_fields(bytes raw):
    """What ``usage_fields`` gives for an object of plain names with whole numbers, null and such objects; else None."""
    cdef Py_ssize_t at = 0
    cdef dict fields = plain_object(<text>PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw), &at, 2)
    return fields if at == PyBytes_GET_SIZE(raw) else None


cdef dict plain_object(text p, Py_ssize_t size, Py_ssize_t *at, int depth):
    cdef dict fields = {}
    cdef Py_ssize_t i = at[0], start
    cdef int64_t number
    if i == size or p[i] != OPEN_OBJECT:
        return None
    i = skip_space(p, i + 1, size)
    if i < size and p[i] == CLOSE_OBJECT:
        at[0] = i + 1
        return fields
    while i < size and p[i] == QUOTE:
        start = i + 1
        i = start
        while i < size and p[i] != QUOTE:
            i += 1
        if i == size or not is_plain(p + start, i - start):
            return None
        name = PyUnicode_DecodeASCII(<const char *>p + start, i - start, NULL)
        i = skip_space(p, i + 1, size)
        if i == size or p[i] != COLON:
            return None
        i = skip_space(p, i + 1, size)
        if i < size and p[i] == OPEN_OBJECT and depth:
            at[0] = i
            value = plain_object(p, size, at, depth - 1)
            if value is None:
                return None
            i = at[0]
        elif size - i >= 4 and memcmp(p + i, b"null", 4) == 0:
            value = None
            i += 4
        else:
            start = i
            number = 0
            while i < size and 48 <= p[i] <= 57 and i - start < 16:
                number = number * 10 + (p[i] - 48)
                i += 1
            if i == start or (p[start] == 48 and i - start > 1):
                return None
            value = number
        fields[name] = value
        i = skip_space(p, i, size)
        if i == size:
            return None
        if p[i] == CLOSE_OBJECT:
            at[0] = i + 1
            return fields
        if p[i] != COMMA:
            return None
        i = skip_space(p, i + 1, size)
    return None


def object_members(bytes body not None):
    """``(name, start, value start, value end)`` of the outermost members of a JSON object; see the twin."""
    cdef list members = []
    cdef text p = <text>PyBytes_AS_STRING(body)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    cdef Py_ssize_t i = skip_space(p, 0, size), start, value, stop, name_end
    cdef bint closed
    if i == size or p[i] != OPEN_OBJECT:
        raise ValueError(f"not a JSON object at byte {i}")
    i = skip_space(p, i + 1, size)
    closed = i < size and p[i] == CLOSE_OBJECT
    while not closed:
        if i == size or p[i] != QUOTE:
            raise ValueError(f"a member name is missing at byte {i}")
        start = i
        name_end = skip_string(p, i, size)
        i = skip_space(p, name_end, size)
        if i == size or p[i] != COLON:
            raise ValueError(f"a colon is missing at byte {i}")
        value = skip_space(p, i + 1, size)
        stop = skip_value(p, value, size)
        members.append((body[start + 1:name_end - 1], start, value, stop))
        i = skip_space(p, stop, size)
        if i < size and p[i] == COMMA:
            i = skip_space(p, i + 1, size)
        elif i < size and p[i] == CLOSE_OBJECT:
            closed = True
        else:
            raise ValueError(f"a comma or closing brace is missing at byte {i}")
    i = skip_space(p, i + 1, size)
    if i != size:
        raise ValueError(f"something follows the JSON object at byte {i}")
    return members


cdef inline Py_ssize_t skip_space(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    while i < size and is_space(p[i]):
        i += 1
    return i


cdef Py_ssize_t skip_string(text p, Py_ssize_t i, Py_ssize_t size) except -1:
    cdef Py_ssize_t start = i
    i += 1
    while True:
        i = string_run(p, i, size)
        if i >= size:
            raise ValueError(f"a string is not closed, opened at byte {start}")
        if p[i] == QUOTE:
            return i + 1
        i += 2


cdef Py_ssize_t skip_value(text p, Py_ssize_t i, Py_ssize_t size) except -1:
    cdef unsigned char stack[DEPTH_LIMIT]
    cdef unsigned char c
    cdef Py_ssize_t start = i
    cdef int depth = 0
    while i < size:
        c = p[i]
        if c == QUOTE:
            i = skip_string(p, i, size)
            if not depth:
                return i
        elif c == OPEN_OBJECT or c == OPEN_ARRAY:
            if depth == DEPTH_LIMIT:
                raise ValueError(f"nested too deeply at byte {i}")
            stack[depth] = c
            depth += 1
            i += 1
        elif c == CLOSE_OBJECT or c == CLOSE_ARRAY:
            if not depth:
                break
            depth -= 1
            if (c == CLOSE_OBJECT) != (stack[depth] == OPEN_OBJECT):
                raise ValueError(f"brackets do not match at byte {i}")
            i += 1
            if not depth:
                return i
        elif not depth and (c == COMMA or c == COLON or is_space(c)):
            break
        else:
            i += 1
    if depth:
        raise ValueError(f"brackets are not closed, opened at byte {start}")
    if i == start:
        raise ValueError(f"a value is missing at byte {i}")
    return i
