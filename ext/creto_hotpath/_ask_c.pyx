# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled form of ``_ask_py``: the same look, the same answers. Read the twin for the why.

Complexity: O(bytes), plus the square of at most ``MAX_MEMBERS`` outermost names. Memory: 1 KiB on the stack.
"""

from creto_hotpath._ask_types import (
    BYTES_PER_TOKEN,
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_NAME,
    MAX_TOKENS,
    TARIFF_RATE,
    TARIFF_TOKENS,
    Ask,
)

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef enum:
    MEMBER_LIMIT = 48
    DEPTH_LIMIT = 64
    NAME_LIMIT = 128
    TOKEN_LIMIT = 1000000000
    CHOICE_LIMIT = 1000000

    QUOTE = 34
    COMMA = 44
    COLON = 58
    BACKSLASH = 92
    OPEN_ARRAY = 91
    CLOSE_ARRAY = 93
    OPEN_OBJECT = 123
    CLOSE_OBJECT = 125

assert (MEMBER_LIMIT, DEPTH_LIMIT, NAME_LIMIT) == (MAX_MEMBERS, MAX_DEPTH, MAX_NAME)
assert BYTES_PER_TOKEN == 2
assert (TOKEN_LIMIT, CHOICE_LIMIT) == (MAX_TOKENS, MAX_CHOICES)

ctypedef const unsigned char *text

cdef uint64_t ONES = 0x0101010101010101ULL
cdef uint64_t HIGHS = 0x8080808080808080ULL

# A look at one body. ``failed`` once it is not plain; nothing moves on from there.
cdef struct reader_t:
    text p
    Py_ssize_t at
    Py_ssize_t size
    ask_t *ask
    bint failed

cdef struct piece_t:
    text p
    Py_ssize_t size


def plain(bytes body not None):
    """What ``body`` asks for; None when it is not so plain that every parser finds the same."""
    cdef ask_t ask
    if not read_ask(<text>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), &ask):
        return None
    return Ask(
        None if ask.model == NULL else PyUnicode_DecodeASCII(<const char *>ask.model, ask.model_size, NULL),
        None if ask.stream < 0 else ask.stream == 1,
        ask.includes_usage,
        None if ask.limit < 0 else ask.limit,
        ask.choices,
        None if ask.tools < 0 else ask.tools,
        ask.refers,
        ask.caches,
        ask.audio,
    )


cdef bint read_ask(text body, Py_ssize_t size, ask_t *ask) noexcept nogil:
    """Whether the body is plain; then ``ask`` says what it asks for, and points into it."""
    cdef reader_t r
    cdef piece_t[MEMBER_LIMIT] seen
    cdef piece_t name
    cdef int members = 0, i
    ask.model = NULL
    ask.model_size = 0
    ask.limit = ask.tools = ask.stream = -1
    ask.choices = 1
    ask.includes_usage = ask.refers = ask.caches = ask.audio = False
    r.p = body
    r.at = 0
    r.size = size
    r.ask = ask
    r.failed = False
    space(&r)
    expect(&r, OPEN_OBJECT)
    space(&r)
    if not skip(&r, CLOSE_OBJECT):
        while not r.failed:
            name = read_name(&r)
            if r.failed or members == MEMBER_LIMIT or not is_plain_name(&name):
                return False
            for i in range(members):
                if seen[i].size == name.size and memcmp(seen[i].p, name.p, name.size) == 0:
                    return False
            seen[members] = name
            members += 1
            member(&r, &name)
            space(&r)
            if skip(&r, CLOSE_OBJECT):
                break
            expect(&r, COMMA)
            space(&r)
    space(&r)
    return not r.failed and r.at == size


cdef inline bint same(const piece_t *piece, const char *word, Py_ssize_t size) noexcept nogil:
    return piece.size == size and memcmp(piece.p, word, size) == 0


cdef inline bint ends(const piece_t *piece, const char *word, Py_ssize_t size) noexcept nogil:
    return piece.size >= size and memcmp(piece.p + piece.size - size, word, size) == 0


cdef inline bint starts(const piece_t *piece, const char *word, Py_ssize_t size) noexcept nogil:
    return piece.size >= size and memcmp(piece.p, word, size) == 0


cdef bint is_plain_name(const piece_t *name) noexcept nogil:
    cdef Py_ssize_t i, n = name.size
    cdef unsigned char c
    if n == 0:
        return False
    for i in range(n):
        c = name.p[i]
        if not (c"a" <= c <= c"z" or c"0" <= c <= c"9" or c == c"_"):
            return False
    if n == 5:
        return memcmp(name.p, b"speed", 5) != 0
    if n == 6:
        return memcmp(name.p, b"prompt", 6) != 0 and memcmp(name.p, b"method", 6) != 0
    if n == 7:
        return memcmp(name.p, b"options", 7) != 0 and memcmp(name.p, b"jsonrpc", 7) != 0
    if n == 9:
        return memcmp(name.p, b"container", 9) != 0
    if n == 11:
        return memcmp(name.p, b"mcp_servers", 11) != 0 and memcmp(name.p, b"max_gen_len", 11) != 0
    if n == 12:
        return memcmp(name.p, b"service_tier", 12) != 0 and memcmp(name.p, b"conversation", 12) != 0
    if n == 17:
        return memcmp(name.p, b"generation_config", 17) != 0
    if n == 20:
        return memcmp(name.p, b"previous_response_id", 20) != 0 and memcmp(name.p, b"max_tokens_to_sample", 20) != 0
    return True


cdef int member(reader_t *r, const piece_t *name) noexcept nogil:
    cdef ask_t *ask = r.ask
    cdef piece_t word
    cdef Py_ssize_t n = name.size, number, i
    if n == 5 and memcmp(name.p, b"model", 5) == 0:
        word = string(r)
        if word.size > NAME_LIMIT:
            r.failed = True
        for i in range(word.size):
            if word.p[i] < 32 or word.p[i] > 126 or word.p[i] == BACKSLASH:
                r.failed = True
        ask.model = word.p
        ask.model_size = word.size
    elif n == 6 and memcmp(name.p, b"stream", 6) == 0:
        ask.stream = truth(r)
    elif n == 14 and memcmp(name.p, b"stream_options", 14) == 0:
        expect(r, OPEN_OBJECT)
        space(r)
        word = string(r)
        space(r)
        expect(r, COLON)
        space(r)
        ask.includes_usage = truth(r) == 1
        space(r)
        expect(r, CLOSE_OBJECT)
        if not same(&word, b"include_usage", 13):
            r.failed = True
    elif (
        same(name, b"max_tokens", 10) or same(name, b"max_completion_tokens", 21) or same(name, b"max_output_tokens", 17)
    ):
        number = whole(r, TOKEN_LIMIT)
        if number > ask.limit:
            ask.limit = number
    elif same(name, b"n", 1) or same(name, b"best_of", 7):
        number = whole(r, CHOICE_LIMIT)
        if number > ask.choices:
            ask.choices = number
    elif same(name, b"tools", 5) or same(name, b"functions", 9):
        if r.at == r.size or r.p[r.at] != OPEN_ARRAY:
            r.failed = True
        number = value(r, name)
        ask.tools = number if ask.tools < 0 else ask.tools + number
    else:
        value(r, name)
    return 0


cdef inline void space(reader_t *r) noexcept nogil:
    cdef unsigned char c
    while r.at < r.size:
        c = r.p[r.at]
        if c != 32 and c != 10 and c != 13 and c != 9:
            return
        r.at += 1


cdef inline bint skip(reader_t *r, unsigned char c) noexcept nogil:
    if r.at < r.size and r.p[r.at] == c:
        r.at += 1
        return True
    return False


cdef inline void expect(reader_t *r, unsigned char c) noexcept nogil:
    if not skip(r, c):
        r.failed = True


cdef inline bint word_here(reader_t *r, const char *word, Py_ssize_t size) noexcept nogil:
    if r.size - r.at < size or memcmp(r.p + r.at, word, size) != 0:
        return False
    r.at += size
    return True


cdef int truth(reader_t *r) noexcept nogil:
    if word_here(r, b"true", 4):
        return 1
    if not word_here(r, b"false", 5):
        r.failed = True
    return 0


cdef inline bint digit(reader_t *r) noexcept nogil:
    return r.at < r.size and c"0" <= r.p[r.at] <= c"9"


cdef Py_ssize_t whole(reader_t *r, Py_ssize_t most) noexcept nogil:
    cdef Py_ssize_t start = r.at, number = 0
    while digit(r) and r.at - start < 11:
        number = number * 10 + (r.p[r.at] - 48)
        r.at += 1
    if r.at == start or number > most or (r.p[start] == c"0" and r.at - start > 1):
        r.failed = True
    # A fraction or an exponent is not followed by what must come next, so it fails there.
    return number


cdef piece_t read_name(reader_t *r) noexcept nogil:
    """A member's name and the colon behind it."""
    cdef piece_t name = string(r)
    space(r)
    expect(r, COLON)
    space(r)
    return name


cdef inline Py_ssize_t run(text p, Py_ssize_t i, Py_ssize_t end) noexcept nogil:
    """Index of the next quote, backslash or control character at or after ``i``, ``end`` when there is none."""
    cdef uint64_t w, q, b
    while i + 8 <= end:
        memcpy(&w, p + i, 8)
        q = w ^ (ONES * QUOTE)
        b = w ^ (ONES * BACKSLASH)
        # Bit 7 of a byte is set where it is zero, zero, or below 32; never missed, seldom set without need.
        if (((q - ONES) & ~q) | ((b - ONES) & ~b) | ((w - ONES * 32) & ~w)) & HIGHS:
            break
        i += 8
    while i < end and p[i] != QUOTE and p[i] != BACKSLASH and p[i] >= 32:
        i += 1
    return i


cdef inline int hexadecimal(text p) noexcept nogil:
    """The number that four hexadecimal digits say, -1 when they are none."""
    cdef int i, found = 0
    cdef unsigned char c
    for i in range(4):
        c = p[i]
        if c"0" <= c <= c"9":
            found = found * 16 + (c - 48)
        elif c"a" <= (c | 32) <= c"f":
            found = found * 16 + ((c | 32) - 87)
        else:
            return -1
    return found


cdef piece_t string(reader_t *r) noexcept nogil:
    """The bytes between the quotes of the string that begins here."""
    cdef piece_t found
    cdef Py_ssize_t i = r.at + 1
    cdef int code
    cdef unsigned char c
    found.p = r.p + i
    found.size = 0
    if r.failed or r.at >= r.size or r.p[r.at] != QUOTE:
        r.failed = True
        return found
    while True:
        i = run(r.p, i, r.size)
        if i + 1 >= r.size and (i == r.size or r.p[i] != QUOTE):
            r.failed = True
            return found
        c = r.p[i]
        if c == QUOTE:
            break
        if c != BACKSLASH:
            r.failed = True
            return found
        c = r.p[i + 1]
        if c == c"u":
            code = hexadecimal(r.p + i + 2) if i + 6 <= r.size else -1
            i += 6
            if 0xD800 <= code < 0xDC00:
                code = -1
                if i + 6 <= r.size and r.p[i] == BACKSLASH and r.p[i + 1] == c"u":
                    code = hexadecimal(r.p + i + 2)
                    code = -1 if code < 0xDC00 or code > 0xDFFF else 0
                i += 6
            elif 0xDC00 <= code <= 0xDFFF:
                code = -1
            if code < 0:
                r.failed = True
                return found
        elif c == QUOTE or c == BACKSLASH or c == c"/" or c == c"b" or c == c"f" or c == c"n" or c == c"r" or c == c"t":
            i += 2
        else:
            r.failed = True
            return found
    found.size = r.p + i - found.p
    r.at = i + 1
    # Names that others look for among the bytes end so; an escaped quote inside may begin one, to be safe.
    if found.size >= 5:
        c = found.p[found.size - 1]
        if c == c"l" and ends(&found, b"cache_control", 13) and (found.size == 13 or found.p[found.size - 14] == QUOTE):
            r.ask.caches = True
        elif c == c"o" and ends(&found, b"audio", 5):
            if found.size == 5 or found.p[found.size - 6] == QUOTE:
                r.ask.audio = True
            elif ends(&found, b"input_audio", 11) and (found.size == 11 or found.p[found.size - 12] == QUOTE):
                r.ask.audio = True
    return found


cdef int refers(reader_t *r, const piece_t *name, const piece_t *word) noexcept nogil:
    """A string as the value of a member: does it name input that is not here?"""
    if ends(name, b"url", 3):
        if starts(word, b"http:", 5) or starts(word, b"https:", 6) or starts(word, b"s3:", 3) or starts(word, b"gs:", 3):
            r.ask.refers = True
    elif ends(name, b"file_id", 7):
        if name.size == 7 or name.p[name.size - 8] == QUOTE:
            r.ask.refers = True
    elif ends(name, b"type", 4) and (name.size == 4 or name.p[name.size - 5] == QUOTE):
        if (
            starts(word, b"item_reference", 14) or starts(word, b"web_search", 10) or starts(word, b"web_fetch", 9)
            or starts(word, b"file_search", 11) or starts(word, b"code_", 5) or starts(word, b"mcp", 3)
            or starts(word, b"computer", 8)
        ):
            r.ask.refers = True
    return 0


cdef int number(reader_t *r) noexcept nogil:
    cdef Py_ssize_t start
    skip(r, c"-")
    if not skip(r, c"0"):
        start = r.at
        while digit(r):
            r.at += 1
        if r.at == start:
            r.failed = True
            return 0
    if skip(r, c"."):
        start = r.at
        while digit(r):
            r.at += 1
        if r.at == start:
            r.failed = True
            return 0
    if r.at < r.size and (r.p[r.at] | 32) == c"e":
        r.at += 1
        if not skip(r, c"+"):
            skip(r, c"-")
        start = r.at
        while digit(r):
            r.at += 1
        if r.at == start:
            r.failed = True
    return 0


cdef Py_ssize_t value(reader_t *r, const piece_t *outer) noexcept nogil:
    """Passes the value of the outermost member ``outer``; how many elements it has when it is an array."""
    cdef bint[DEPTH_LIMIT + 1] arrays
    cdef piece_t name = outer[0], word
    cdef int depth = 1
    cdef Py_ssize_t elements = 0
    cdef unsigned char c
    while not r.failed and r.at < r.size:
        c = r.p[r.at]
        if c == QUOTE:
            word = string(r)
            refers(r, &name, &word)
        elif c == OPEN_OBJECT or c == OPEN_ARRAY:
            depth += 1
            if depth > DEPTH_LIMIT:
                break
            arrays[depth] = c == OPEN_ARRAY
            r.at += 1
            space(r)
            if not skip(r, CLOSE_ARRAY if arrays[depth] else CLOSE_OBJECT):
                if arrays[depth]:
                    name.size = 0
                    if depth == 2:
                        elements = 1
                else:
                    name = read_name(r)
                continue
            depth -= 1
        elif not (word_here(r, b"true", 4) or word_here(r, b"false", 5) or word_here(r, b"null", 4)):
            number(r)
        # A value has ended: whatever it stands in goes on or ends, too.
        while depth > 1 and not r.failed:
            space(r)
            if skip(r, COMMA):
                space(r)
                if arrays[depth]:
                    name.size = 0
                    if depth == 2:
                        elements += 1
                else:
                    name = read_name(r)
                break
            expect(r, CLOSE_ARRAY if arrays[depth] else CLOSE_OBJECT)
            depth -= 1
        if depth == 1:
            return elements
    r.failed = True
    return 0



cdef bytes ask_key(const ask_t *ask):
    """Equal for bodies that ask for the same."""
    cdef int64_t[4] said = [
        ask.limit,
        ask.tools,
        ask.choices,
        (ask.stream + 1) | ask.includes_usage << 2 | ask.refers << 3 | ask.caches << 4 | ask.audio << 5
        | (ask.model != NULL) << 6,
    ]
    cdef bytes key = PyBytes_FromStringAndSize(NULL, sizeof(said) + ask.model_size)
    memcpy(PyBytes_AS_STRING(key), said, sizeof(said))
    if ask.model_size:
        memcpy(PyBytes_AS_STRING(key) + sizeof(said), ask.model, ask.model_size)
    return key


cdef class Tariff:
    """The most that requests can use which ask for the same and differ in size only. See ``_ask_py.Tariff``."""

    def __init__(self, *, window=None, bint all_of_it=False, tokens_out=0, rates=None, cost=0, least=0,
                 most=TARIFF_TOKENS):
        if all_of_it and window is None:
            raise ValueError("what is not known cannot be filled")
        if not all([0 <= count <= TARIFF_TOKENS for count in (window or 0, tokens_out, least, most)]) or not all(
            [0 <= rate <= TARIFF_RATE for rate in rates or ()]
        ):
            raise ValueError("more than a tariff counts with")
        if not 0 <= cost < 2**60:
            raise ValueError("cost is out of range")
        self.window = window
        self.bound = -1 if window is None else window
        self.all_of_it = all_of_it
        self.tokens_out = tokens_out
        self.rates = rates
        self.priced = rates is not None
        if self.priced:
            self.rate_in, self.rate_out = rates
        self.cost = cost
        self.least = least
        self.most = most

    cdef bint estimate(self, Py_ssize_t size, int64_t *amounts) noexcept:
        cdef int64_t tokens = size // 2
        if self.bound >= 0 and (self.all_of_it or tokens > self.bound):
            tokens = self.bound
        if tokens < self.least or tokens > self.most:
            return False
        amounts[0] = 1
        amounts[1] = tokens + self.tokens_out
        amounts[2] = self.cost
        if self.priced:
            amounts[2] = (tokens * self.rate_in + self.tokens_out * self.rate_out + 500000) // 1000000
        return True

    def amounts(self, Py_ssize_t size):
        """Requests, tokens and nano-dollars of a request of that many bytes; None when other rates hold for it."""
        cdef int64_t[3] found
        if not self.estimate(size, found):
            return None
        return (found[0], found[1], found[2])
