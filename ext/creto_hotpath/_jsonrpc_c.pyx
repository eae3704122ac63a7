# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled form of ``_jsonrpc_py``: the same machine, the same answers. Read the twin for the why.

Complexity: O(bytes), plus n log n in the n names of each object. Memory: 8 bytes per name of the objects that are open
at one time, and the kept slices. Names are compared by a 64-bit hash: whoever makes two of them collide is refused.
"""

from creto_hotpath._jsonrpc_types import MAX_DEPTH as _MAX_DEPTH, MAX_MESSAGES as _MAX_MESSAGES, Message, NotJson, Scan

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memcmp

cdef enum:
    DEPTH_LIMIT = 128
    MESSAGE_LIMIT = 100
    KEY_ROOM = 64
    SLOTS = 11
    NO_SLOT = -1

    ELSEWHERE = -2
    BATCH = -1
    MESSAGE = 0
    PARAMS = 1
    META = 2

    VALUE = 0
    VALUE_OR_END = 1
    KEY = 2
    KEY_OR_END = 3
    NEXT = 4
    DONE = 5

    QUOTE = 34
    COMMA = 44
    COLON = 58
    BACKSLASH = 92
    OPEN_ARRAY = 91
    CLOSE_ARRAY = 93
    OPEN_OBJECT = 123
    CLOSE_OBJECT = 125

assert DEPTH_LIMIT == _MAX_DEPTH and MESSAGE_LIMIT == _MAX_MESSAGES

ctypedef const unsigned char* text

cdef uint64_t FNV_START = 0xCBF29CE484222325ULL
cdef uint64_t FNV_PRIME = 0x100000001B3ULL

# The names that matter: object they stand in, text, length; the index is the slot.
cdef struct name_t:
    int level
    const char* text
    int size

cdef name_t[SLOTS] NAMES
NAMES[0] = name_t(MESSAGE, b"jsonrpc", 7)
NAMES[1] = name_t(MESSAGE, b"id", 2)
NAMES[2] = name_t(MESSAGE, b"method", 6)
NAMES[3] = name_t(MESSAGE, b"params", 6)
NAMES[4] = name_t(MESSAGE, b"result", 6)
NAMES[5] = name_t(MESSAGE, b"error", 5)
NAMES[6] = name_t(PARAMS, b"name", 4)
NAMES[7] = name_t(PARAMS, b"uri", 3)
NAMES[8] = name_t(PARAMS, b"taskId", 6)
NAMES[9] = name_t(PARAMS, b"_meta", 5)
NAMES[10] = name_t(META, b"io.modelcontextprotocol/protocolVersion", 39)


cdef struct key_t:
    uint64_t digest
    int size            # decoded bytes; more than KEY_ROOM: only the hash is whole
    unsigned char[KEY_ROOM] head


cdef struct frame_t:
    int role
    bint is_object
    Py_ssize_t names    # how many names were on the pile when it opened


cdef struct pile_t:
    uint64_t* items
    Py_ssize_t used
    Py_ssize_t room


cdef int by_value(const void* a, const void* b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t*>a)[0]
    cdef uint64_t y = (<const uint64_t*>b)[0]
    return (x > y) - (x < y)


cdef inline bint push(pile_t* pile, uint64_t item) noexcept nogil:
    cdef Py_ssize_t room
    cdef uint64_t* larger
    if pile.used == pile.room:
        room = pile.room * 2 if pile.room else 64
        larger = <uint64_t*>realloc(pile.items, room * sizeof(uint64_t))
        if larger == NULL:
            return False
        pile.items = larger
        pile.room = room
    pile.items[pile.used] = item
    pile.used += 1
    return True


cdef inline bint has_twins(pile_t* pile, Py_ssize_t start) noexcept nogil:
    """Whether two of the names from ``start`` on are equal; takes them off the pile."""
    cdef Py_ssize_t count = pile.used - start
    cdef Py_ssize_t i
    cdef bint found = False
    if count > 1:
        qsort(pile.items + start, count, sizeof(uint64_t), by_value)
        for i in range(start + 1, pile.used):
            if pile.items[i] == pile.items[i - 1]:
                found = True
                break
    pile.used = start
    return found


cdef inline void add_byte(key_t* key, unsigned char c) noexcept nogil:
    key.digest = (key.digest ^ c) * FNV_PRIME
    if key.size < KEY_ROOM:
        key.head[key.size] = c
    if key.size <= KEY_ROOM:
        key.size += 1


cdef void add_code(key_t* key, uint32_t code) noexcept nogil:
    """UTF-8, of lone surrogates as if they were characters."""
    if code < 0x80:
        add_byte(key, <unsigned char>code)
    elif code < 0x800:
        add_byte(key, <unsigned char>(0xC0 | code >> 6))
        add_byte(key, <unsigned char>(0x80 | code & 0x3F))
    elif code < 0x10000:
        add_byte(key, <unsigned char>(0xE0 | code >> 12))
        add_byte(key, <unsigned char>(0x80 | code >> 6 & 0x3F))
        add_byte(key, <unsigned char>(0x80 | code & 0x3F))
    else:
        add_byte(key, <unsigned char>(0xF0 | code >> 18))
        add_byte(key, <unsigned char>(0x80 | code >> 12 & 0x3F))
        add_byte(key, <unsigned char>(0x80 | code >> 6 & 0x3F))
        add_byte(key, <unsigned char>(0x80 | code & 0x3F))


cdef inline int hex_of(unsigned char c) noexcept nogil:
    if 48 <= c <= 57:
        return c - 48
    if 65 <= c <= 70:
        return c - 55
    if 97 <= c <= 102:
        return c - 87
    return -1


cdef inline int four_hex(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    """The number written at ``i``, -1 when it is none."""
    cdef int value = 0
    cdef int digit
    cdef int k
    if i + 4 > size:
        return -1
    for k in range(4):
        digit = hex_of(p[i + k])
        if digit < 0:
            return -1
        value = value << 4 | digit
    return value


cdef inline int sequence(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    """Length of the UTF-8 sequence at ``i`` (not ASCII), 0 when it is none (Unicode table 3-7)."""
    cdef unsigned char c = p[i]
    cdef unsigned char second
    if c < 0xC2 or c > 0xF4:
        return 0
    if i + 1 >= size:
        return 0
    second = p[i + 1]
    if second & 0xC0 != 0x80:
        return 0
    if c < 0xE0:
        return 2
    if i + 2 >= size or p[i + 2] & 0xC0 != 0x80:
        return 0
    if c < 0xF0:
        return 0 if (c == 0xE0 and second < 0xA0) or (c == 0xED and second > 0x9F) else 3
    if i + 3 >= size or p[i + 3] & 0xC0 != 0x80:
        return 0
    return 0 if (c == 0xF0 and second < 0x90) or (c == 0xF4 and second > 0x8F) else 4


cdef Py_ssize_t string_end(text p, Py_ssize_t i, Py_ssize_t size, key_t* key) noexcept nogil:
    """Index after the string whose quote is at ``i``, -1 when it is none; its text goes to ``key`` unless NULL."""
    cdef unsigned char c
    cdef int code
    cdef int low
    cdef int width
    cdef int k
    i += 1
    while i < size:
        c = p[i]
        if c == QUOTE:
            return i + 1
        if c == BACKSLASH:
            if i + 1 >= size:
                return -1
            c = p[i + 1]
            if c == 117:
                code = four_hex(p, i + 2, size)
                if code < 0:
                    return -1
                i += 6
                if 0xD800 <= code < 0xDC00 and i + 1 < size and p[i] == BACKSLASH and p[i + 1] == 117:
                    low = four_hex(p, i + 2, size)
                    if 0xDC00 <= low < 0xE000:
                        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                        i += 6
                if key != NULL:
                    add_code(key, code)
                continue
            if c == 98:
                c = 8
            elif c == 102:
                c = 12
            elif c == 110:
                c = 10
            elif c == 114:
                c = 13
            elif c == 116:
                c = 9
            elif c != QUOTE and c != BACKSLASH and c != 47:
                return -1
            if key != NULL:
                add_byte(key, c)
            i += 2
        elif c < 0x20:
            return -1
        elif c < 0x80:
            if key != NULL:
                add_byte(key, c)
            i += 1
        else:
            width = sequence(p, i, size)
            if width == 0:
                return -1
            if key != NULL:
                for k in range(width):
                    add_byte(key, p[i + k])
            i += width
    return -1


cdef inline bint is_digit(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    return i < size and 48 <= p[i] <= 57


cdef Py_ssize_t number_end(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    """Index after the number at ``i``, -1 when it is none (RFC 8259 section 6)."""
    cdef Py_ssize_t j
    if i < size and p[i] == 45:
        i += 1
    if not is_digit(p, i, size):
        return -1
    if p[i] == 48:
        i += 1
    else:
        while is_digit(p, i, size):
            i += 1
    if i < size and p[i] == 46 and is_digit(p, i + 1, size):
        i += 1
        while is_digit(p, i, size):
            i += 1
    if i < size and (p[i] == 101 or p[i] == 69):
        j = i + 1
        if j < size and (p[j] == 43 or p[j] == 45):
            j += 1
        if is_digit(p, j, size):
            while is_digit(p, j, size):
                j += 1
            i = j
    return i


cdef Py_ssize_t scalar_end(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    if i >= size:
        return -1
    if p[i] == QUOTE:
        return string_end(p, i, size, NULL)
    if size - i >= 4 and (memcmp(p + i, b"true", 4) == 0 or memcmp(p + i, b"null", 4) == 0):
        return i + 4
    if size - i >= 5 and memcmp(p + i, b"false", 5) == 0:
        return i + 5
    return number_end(p, i, size)


cdef inline Py_ssize_t skip_space(text p, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    while i < size and (p[i] == 32 or p[i] == 10 or p[i] == 13 or p[i] == 9):
        i += 1
    return i


cdef int slot_of(key_t* key, int level, bint* other_case) noexcept nogil:
    """The slot of a name of that object, NO_SLOT for others; tells whether it differs in case."""
    cdef unsigned char[KEY_ROOM] folded
    cdef int size = 0
    cdef int i = 0
    cdef int k
    cdef int slot
    cdef unsigned char a
    if level < MESSAGE or key.size > KEY_ROOM:
        return NO_SLOT
    for slot in range(SLOTS):
        if NAMES[slot].level == level and NAMES[slot].size == key.size:
            if memcmp(NAMES[slot].text, key.head, key.size) == 0:
                return slot
    while i < key.size:
        a = key.head[i]
        if 65 <= a <= 90:
            a += 32
        elif a == 0xC5 and i + 1 < key.size and key.head[i + 1] == 0xBF:
            a = 115
            i += 1
        elif a == 0xE2 and i + 2 < key.size and key.head[i + 1] == 0x84 and key.head[i + 2] == 0xAA:
            a = 107
            i += 2
        folded[size] = a
        size += 1
        i += 1
    for slot in range(SLOTS):
        if NAMES[slot].level == level and NAMES[slot].size == size:
            for k in range(size):
                a = NAMES[slot].text[k]
                if 65 <= a <= 90:
                    a += 32
                if a != folded[k]:
                    break
            else:
                other_case[0] = True
                return slot
    return NO_SLOT


def scan(bytes body not None):
    """The messages in ``body``. Raises NotJson."""
    cdef text p = <text>PyBytes_AS_STRING(body)
    cdef pile_t pile
    pile.items = NULL
    pile.used = 0
    pile.room = 0
    try:
        return _scan(p, PyBytes_GET_SIZE(body), &pile)
    finally:
        free(pile.items)


cdef object _scan(text p, Py_ssize_t size, pile_t* pile):
    cdef frame_t[DEPTH_LIMIT] frames
    cdef key_t key
    cdef int depth = 0
    cdef int state = VALUE
    cdef int slot = NO_SLOT
    cdef int role
    cdef int parent
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t end
    cdef unsigned char c
    cdef unsigned char closer
    cdef bint other_case
    cdef bint batch = False
    cdef list messages = []
    cdef list kept = None
    cdef str flaw = ""
    while True:
        i = skip_space(p, i, size)
        if state == DONE:
            break
        c = p[i] if i < size else 0
        closer = 0
        if depth:
            closer = CLOSE_OBJECT if frames[depth - 1].is_object else CLOSE_ARRAY
        if depth and c == closer and state != VALUE and state != KEY:
            depth -= 1
            if has_twins(pile, frames[depth].names) and not flaw:
                flaw = "duplicate_member"
            if frames[depth].role == MESSAGE:
                if len(messages) < MESSAGE_LIMIT:
                    messages.append(Message(*kept))
                elif not flaw:
                    flaw = "too_many_messages"
            i += 1
            state = NEXT if depth else DONE
        elif state == KEY or state == KEY_OR_END:
            if c != QUOTE:
                raise _broken(i)
            key.digest = FNV_START
            key.size = 0
            end = string_end(p, i, size, &key)
            if end < 0:
                raise _broken(i)
            if not push(pile, key.digest):
                raise MemoryError
            other_case = False
            slot = slot_of(&key, frames[depth - 1].role, &other_case)
            if other_case and not flaw:
                flaw = "other_case"
            i = skip_space(p, end, size)
            if i >= size or p[i] != COLON:
                raise _broken(i)
            i += 1
            state = VALUE
        elif state == NEXT:
            if c != COMMA:
                raise _broken(i)
            i += 1
            state = KEY if closer == CLOSE_OBJECT else VALUE
        elif c == OPEN_OBJECT or c == OPEN_ARRAY:
            if depth == DEPTH_LIMIT:
                raise NotJson(f"nested too deeply at byte {i}")
            if slot != NO_SLOT and kept[slot] is None:
                kept[slot] = b"{" if c == OPEN_OBJECT else b"["
            parent = frames[depth - 1].role if depth else BATCH
            role = ELSEWHERE
            if depth == 0 and c == OPEN_ARRAY:
                role = BATCH
                batch = True
            elif parent == BATCH:
                if c == OPEN_OBJECT:
                    role = MESSAGE
                    kept = [None] * SLOTS
                elif not flaw:
                    flaw = "not_an_object"
            elif c == OPEN_OBJECT:
                if slot == 3:
                    role = PARAMS
                elif slot == 9:
                    role = META
            frames[depth].role = role
            frames[depth].is_object = c == OPEN_OBJECT
            frames[depth].names = pile.used
            depth += 1
            slot = NO_SLOT
            i += 1
            state = KEY_OR_END if c == OPEN_OBJECT else VALUE_OR_END
        else:
            end = scalar_end(p, i, size)
            if end < 0:
                raise _broken(i)
            if slot != NO_SLOT and kept[slot] is None:
                kept[slot] = PyBytes_FromStringAndSize(<const char*>p + i, end - i)
            slot = NO_SLOT
            if (depth == 0 or frames[depth - 1].role == BATCH) and not flaw:
                flaw = "not_an_object"
            i = end
            state = NEXT if depth else DONE
    if i != size:
        raise _broken(i)
    if batch and not messages and not flaw:
        flaw = "empty_batch"
    return Scan(batch, tuple(messages), flaw)


cdef object _broken(Py_ssize_t i):
    return NotJson(f"not JSON at byte {i}")
