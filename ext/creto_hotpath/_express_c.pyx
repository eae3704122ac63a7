# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""Requests like those that were judged before, answered without asking again. Compiled form of ``_express_py``."""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem, PyDict_Size
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from creto_hotpath._admit_c cimport DecisionTable
from creto_hotpath._ask_c cimport Tariff, ask_key, ask_t, read_ask
from creto_hotpath._counters_c cimport Counters, counters_add, counters_observe
from creto_hotpath._http1_c cimport (
    K_PROXY_AUTHORIZATION,
    K_UPGRADE,
    SHAPE_ABSOLUTE,
    SHAPE_ORIGIN,
    RequestHead,
    field_t,
)
from creto_hotpath._journal_c cimport Journal
from creto_hotpath._quota_c cimport QuotaPath, QuotaTable, load_amounts
from creto_hotpath._relay_c cimport Downstream, Exchange, Lane, Stack, Upstream

from creto_hotpath._http1_py import Prepared
from creto_hotpath import _journal_file as files
from creto_hotpath._quota_types import QuotaBusy, QuotaFull, QuotaTableError

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *a, const char *b, size_t n)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_REALTIME
    int clock_gettime(int clock, timespec *now)

cdef Py_ssize_t HEADER = files.HEADER_BYTES

ID = 0
AT = 1
TARGET = 2
STATUS = 3
ERROR = 4
BYTES_UP = 5
BYTES_DOWN = 6
CRETO_NS = 7
UPSTREAM_NS = 8
TOTAL_NS = 9
TRACE = 10
FACTS = 11
USAGE = 11

KEY_LIMIT = 1024
LIMIT = 4096
CLASSES = CLASSES_
CELLS = CELLS_

cdef enum:
    F_ID = 0
    F_AT
    F_TARGET
    F_STATUS
    F_ERROR
    F_BYTES_UP
    F_BYTES_DOWN
    F_CRETO_NS
    F_UPSTREAM_NS
    F_TOTAL_NS
    F_TRACE
    F_USAGE

cdef enum:
    KEY_ROOM = 1024
    PARTS = 64
    # What an abbreviated frame begins with, how much it may put in one place, and how far back it may refer
    # (``_journal_file``).
    ABBREVIATED = 0xC1
    MOST = 255
    REACH = 1 << 18
    STANDINGS = 4096
    ASKS = 256
    MAX_METERS = 16
    MAX_NAMES = 32
    CLASSES_ = 6
    CELLS_ = 7
    TRACE_SIZE = 55
    # Sizes of field names from here on share one bit, so that every name has one.
    LONG_NAME = 63

# splitmix64 (Steele, Lea, Flood 2014): ids must be unique, not secret.
cdef uint64_t noise = int.from_bytes(os.urandom(8), "big")


cdef inline uint64_t random64() noexcept nogil:
    global noise
    cdef uint64_t z
    noise += <uint64_t>0x9E3779B97F4A7C15
    z = noise
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


def reseed():
    """After a fork two processes must not make the same ids."""
    global noise
    noise = int.from_bytes(os.urandom(8), "big")


os.register_at_fork(after_in_child=reseed)


cdef inline int64_t unix_now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline void write_uuid7(uint8_t *o, int64_t unix_ns) noexcept nogil:
    """A UUIDv7 (RFC 9562 section 5.7)."""
    cdef uint64_t ms = <uint64_t>(unix_ns // 1000000)
    cdef uint64_t low = random64()
    cdef uint64_t high = random64()
    cdef int i
    for i in range(6):
        o[i] = <uint8_t>(ms >> (8 * (5 - i)))
    o[6] = <uint8_t>(0x70 | (high & 0x0F))
    o[7] = <uint8_t>(high >> 8)
    for i in range(8):
        o[8 + i] = <uint8_t>(low >> (8 * (7 - i)))
    o[8] = (o[8] & 0x3F) | 0x80


cdef class Valve:
    """While ``closed``, nothing takes any of the lanes that were made with it."""

    cdef public bint closed


# A piece of a record: a fact, or text that is the same in all of them.
cdef struct part_t:
    int fact            # -1: text
    const char *text
    Py_ssize_t size
    Py_ssize_t was      # of the facts from here to the next text, how many bytes they took in the frame referred to


cdef class Share:
    """How many requests one agent has under way: ``count`` of ``limit``. See ``_express_py.Share``."""

    cdef public int64_t count
    cdef public int64_t limit

    def __init__(self, int64_t limit):
        self.limit = limit

    cdef inline bint take(self) noexcept:
        if self.count >= self.limit:
            return False
        self.count += 1
        return True

    def enter(self):
        """Takes a place for one request; False when there is none."""
        return self.take()

    def leave(self):
        """Gives the place back."""
        self.count -= 1


cdef class Metered:
    """How a model request is metered. See ``_express_py.Metered``."""

    cdef readonly Tariff tariff
    cdef readonly object watch
    cdef readonly object settle
    cdef readonly object edits
    cdef readonly object rewrite

    def __init__(self, *, Tariff tariff not None, watch, settle, edits=None, rewrite=None):
        self.tariff = tariff
        self.watch = watch
        self.settle = settle
        self.edits = Prepared(edits) if edits else None
        self.rewrite = rewrite


cdef class Standing:
    """What all stages said about the requests of one shape. See ``_express_py.Standing``."""

    cdef readonly Stack stack
    cdef readonly str host
    cdef readonly str base
    cdef readonly int64_t strip
    cdef readonly DecisionTable table
    cdef readonly int64_t epoch
    cdef readonly int64_t expires_ns
    cdef readonly tuple record
    cdef readonly QuotaTable quota
    cdef readonly QuotaPath path
    cdef readonly tuple amounts
    cdef readonly int64_t ttl_ns
    cdef part_t[PARTS] parts
    cdef int count
    cdef int64_t full_at        # where the record was last written in full, -1: nowhere
    cdef int64_t generation     # in that segment
    cdef bytes authority
    cdef bytes prefix
    cdef int64_t[MAX_METERS] charged
    cdef int meters
    cdef readonly Share share
    cdef readonly object context
    cdef readonly Metered metered
    cdef int64_t[CLASSES_][CELLS_] cells
    cdef bint[CLASSES_] known

    def __init__(self, *, Stack stack not None, str host not None, DecisionTable table not None, int64_t epoch,
                 int64_t expires_ns, record, str base="", int64_t strip=0, QuotaTable quota=None, QuotaPath path=None,
                 tuple amounts=(), int64_t ttl_ns=1, Share share=None, context=None, Metered metered=None):
        cdef int facts = FACTS + (metered is not None)
        if any(not isinstance(part, bytes) and not 0 <= part < facts for part in record):
            raise ValueError("a record is made of bytes and of numbers that name a fact")
        if (quota is None) != (path is None):
            raise ValueError("a quota path goes with its table")
        if path is not None and path.table is not quota:
            raise ValueError("the path was made by another quota table")
        self.stack = stack
        self.host = host
        self.table = table
        self.epoch = epoch
        self.expires_ns = expires_ns
        self.record = tuple(record)
        self.full_at = -1
        self.cut()
        self.base = base
        self.authority = host.encode("latin-1")
        self.prefix = base.encode("latin-1")
        self.strip = strip
        self.quota = quota
        self.path = path
        self.amounts = amounts
        self.meters = load_amounts(amounts, 0, self.charged) if quota is not None else 0
        self.ttl_ns = ttl_ns
        self.share = share
        self.context = context
        self.metered = metered

    cdef int cut(self) except -1:
        if len(self.record) > PARTS:
            raise ValueError(f"a record has at most {PARTS} parts")
        for part in self.record:
            if type(part) is bytes:
                self.parts[self.count].fact = -1
                self.parts[self.count].text = PyBytes_AS_STRING(part)
                self.parts[self.count].size = PyBytes_GET_SIZE(part)
            else:
                self.parts[self.count].fact = part
            self.count += 1
        return 0

    cdef int64_t *cells_of(self, keeper, int status) except NULL:
        """Where answers of that status are counted."""
        cdef int at = min(max(status // 100, 0), <int>CLASSES_ - 1)
        cdef int i
        if not self.known[at]:
            for i, cell in enumerate(keeper.cells(self, at)):
                self.cells[at][i] = cell
            self.known[at] = True
        return self.cells[at]


cdef class Asks:
    """The standings of requests of one shape, by what their bodies ask of a model."""

    cdef dict standings

    def __cinit__(self):
        self.standings = {}

    cdef Standing find(self, Exchange exchange):
        """Which holds for a request whose body was collected, or has come with its head, all of it."""
        cdef Downstream downstream = exchange.downstream
        cdef Py_ssize_t size = body_size(exchange)
        cdef const unsigned char *body
        cdef ask_t ask
        cdef PyObject *found
        cdef bytes key
        if exchange.body is not None:
            body = <const unsigned char *>PyBytes_AS_STRING(exchange.body)
        elif size <= 0 or downstream.pending is None or PyBytes_GET_SIZE(downstream.pending) - downstream.pos < size:
            return None
        else:
            body = <const unsigned char *>PyBytes_AS_STRING(downstream.pending) + downstream.pos
        if not read_ask(body, size, &ask):
            return None
        key = ask_key(&ask)
        found = PyDict_GetItem(self.standings, key)
        return None if found == NULL else <Standing>found


cdef Py_ssize_t body_size(Exchange exchange):
    return exchange.head.content_length if exchange.body is None else PyBytes_GET_SIZE(exchange.body)


cdef struct name_t:
    const char *text
    uint32_t size
    int at              # place among the named fields, -1 when barred


# Where the parts of a request are by which a standing is found.
cdef struct shape_t:
    const char *scope
    Py_ssize_t scope_size
    const char *rest    # of the target, from the path on
    Py_ssize_t rest_size
    Py_ssize_t path_size
    const char *trace   # NULL, or what the caller's traceparent says


cdef class Express(Lane):
    """The lane of connections that came in the same way. See ``_express_py.Express``."""

    cdef readonly Journal journal
    cdef readonly tuple named
    cdef readonly frozenset barred
    cdef readonly tuple prefixes
    cdef readonly bint absolute
    cdef readonly bint sampling
    cdef readonly object keeper
    cdef readonly Counters counters
    cdef readonly int64_t reuses
    cdef readonly Valve valve
    cdef readonly object bad
    cdef readonly int64_t taken
    cdef dict general
    cdef dict exact
    cdef list texts             # keeps the names below alive
    cdef list scopes
    cdef bytes usage            # of the request whose record is being written
    cdef name_t[MAX_NAMES] names
    cdef int count
    cdef uint64_t sizes         # bit n: some name has n bytes

    def __init__(self, Journal journal not None, *, named=(), barred=(), prefixes=None, bint absolute=False,
                 bint sampling=False, keeper=None, Counters counters=None, int64_t reuses=0, Valve valve=None,
                 bad=None):
        if counters is not None and keeper is None:
            raise ValueError("counters need a keeper that knows their cells")
        self.journal = journal
        self.sampling = sampling
        self.keeper = keeper
        self.counters = counters
        if counters is not None:
            counters.check(reuses)
        self.reuses = reuses
        self.valve = Valve() if valve is None else valve
        self.bad = {} if bad is None else bad
        self.named = tuple([name.lower() for name in named])
        self.barred = frozenset([name.lower() for name in barred])
        self.prefixes = None if prefixes is None else tuple(prefixes)
        self.absolute = absolute
        self.general = {}
        self.exact = {}
        self.texts = []
        self.scopes = None if prefixes is None else [prefix.encode("latin-1") for prefix in self.prefixes]
        for at, name in enumerate(self.named):
            self.watch(name.encode("latin-1"), at)
        for name in self.barred:
            self.watch(name.encode("latin-1"), -1)

    cdef int watch(self, bytes name, int at) except -1:
        if self.count == MAX_NAMES:
            raise ValueError(f"at most {MAX_NAMES} fields can be told apart")
        self.texts.append(name)
        self.names[self.count].text = PyBytes_AS_STRING(name)
        self.names[self.count].size = <uint32_t>PyBytes_GET_SIZE(name)
        self.names[self.count].at = at
        self.sizes |= <uint64_t>1 << min(PyBytes_GET_SIZE(name), LONG_NAME)
        self.count += 1
        return 0

    def __len__(self):
        return len(self.general) + sum([len((<Asks>kept).standings) if type(kept) is Asks else 1
                                        for kept in self.exact.values()])

    def clear(self):
        """Forgets every standing."""
        self.general.clear()
        self.exact.clear()

    def learn(self, RequestHead head not None, Standing standing not None, *, bint exact, bytes body=None):
        """Keeps a standing for requests of the shape of ``head``; False when they cannot go this way.

        body: only for those whose bodies ask the same of a model, and for no other path.
        """
        cdef char[KEY_ROOM] key
        cdef shape_t shape
        cdef Py_ssize_t size = self.look(head, key, &shape)
        cdef ask_t ask
        cdef Asks asks
        if size < 0:
            return False
        if body is not None:
            if not read_ask(<const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), &ask):
                return False
            memcpy(key + size, shape.rest, shape.path_size)
            name = PyBytes_FromStringAndSize(key, size + shape.path_size)
            kept = self.exact.get(name)
            asks = <Asks>kept if type(kept) is Asks else Asks()
            if len(asks.standings) >= ASKS:
                asks.standings.clear()
            asks.standings[ask_key(&ask)] = standing
            self.keep(self.exact, name, asks)
        elif exact:
            memcpy(key + size, shape.rest, shape.path_size)
            self.keep(self.exact, PyBytes_FromStringAndSize(key, size + shape.path_size), standing)
        elif is_plain(shape.rest, shape.path_size):
            self.keep(self.general, PyBytes_FromStringAndSize(key, size), standing)
        else:
            return False
        return True

    cdef int keep(self, dict standings, bytes key, kept) except -1:
        if len(standings) >= STANDINGS and key not in standings:
            standings.clear()
        standings[key] = kept
        return 0

    cdef bint place(self, RequestHead head, shape_t *shape):
        """Finds where the request is to and the rest of its target; False when it cannot go this way."""
        cdef const char *p = PyBytes_AS_STRING(head.raw) + head.base
        cdef const char *target = p + head.target_at
        cdef Py_ssize_t size = head.target_size, n
        cdef const char *query
        cdef bytes prefix
        if self.absolute:
            if head.shape != SHAPE_ABSOLUTE:
                return False
            shape.scope = target
            shape.scope_size = head.authority_at + head.authority_size - head.target_at
        elif head.shape != SHAPE_ORIGIN:
            return False
        elif self.scopes is None:
            shape.scope = p + head.authority_at
            shape.scope_size = head.authority_size
            shape.rest = target
            shape.rest_size = size
        else:
            shape.scope = NULL
            for prefix in self.scopes:
                n = PyBytes_GET_SIZE(prefix)
                if size >= n and memcmp(target, PyBytes_AS_STRING(prefix), n) == 0 and (
                    size == n or target[n] == c"/" or target[n] == c"?"
                ):
                    shape.scope = target
                    shape.scope_size = n
                    break
            if shape.scope == NULL:
                return False
        if self.absolute or self.scopes is not None:
            shape.rest = target + shape.scope_size
            shape.rest_size = size - shape.scope_size
        if shape.rest_size == 0 or shape.rest[0] != c"/":
            return False
        query = <const char *>memchr(shape.rest, c"?", shape.rest_size)
        shape.path_size = shape.rest_size if query == NULL else query - shape.rest
        return True

    cdef Py_ssize_t look(self, RequestHead head, char *key, shape_t *shape) except -2:
        """Writes what the request is looked up by, without its path, and leaves room for that; its size, or -1."""
        cdef const char *p = PyBytes_AS_STRING(head.raw) + head.base
        cdef field_t *values[MAX_NAMES]
        cdef field_t *f
        cdef int i, j, found = len(self.named)
        cdef Py_ssize_t size
        if head.is_connect or head.minor == 0 or head.expect_continue or head.wants_upgrade:
            return -1
        if not self.place(head, shape):
            return -1
        shape.trace = NULL
        for i in range(found):
            values[i] = NULL
        for i in range(head.count):
            f = &head.fields[i]
            if f.kind == K_PROXY_AUTHORIZATION or f.kind == K_UPGRADE:
                return -1
            if f.name_size == 11 and strncasecmp(p + f.name, b"traceparent", 11) == 0:
                if shape.trace != NULL or not is_trace(p + f.value, f.value_size):
                    return -1
                if self.sampling and (p + f.value)[54] & 1:
                    return -1
                shape.trace = p + f.value
            if not (self.sizes >> min(<int>f.name_size, <int>LONG_NAME)) & 1:
                continue
            for j in range(self.count):
                if self.names[j].size != f.name_size or strncasecmp(self.names[j].text, p + f.name, f.name_size) != 0:
                    continue
                if self.names[j].at < 0 or values[self.names[j].at] != NULL:
                    return -1
                values[self.names[j].at] = f
        size = shape.scope_size + head.method_size + 2 + found
        for i in range(found):
            if values[i] != NULL:
                size += values[i].value_size + 1
        if size + shape.path_size > KEY_ROOM:
            return -1
        # No part can hold a line feed, so none can be taken for two.
        memcpy(key, shape.scope, shape.scope_size)
        size = shape.scope_size
        key[size] = c"\n"
        memcpy(key + size + 1, p + head.method_at, head.method_size)
        size += 1 + head.method_size
        key[size] = c"\n"
        size += 1
        for i in range(found):
            if values[i] != NULL:
                key[size] = c"="
                memcpy(key + size + 1, p + values[i].value, values[i].value_size)
                size += 1 + values[i].value_size
            key[size] = c"\n"
            size += 1
        return size

    cdef Standing find(self, Exchange exchange, shape_t *shape):
        cdef RequestHead head = exchange.head
        cdef char[KEY_ROOM] key
        cdef Py_ssize_t size
        cdef PyObject *found = NULL
        cdef bytes name
        if not self.general and not self.exact:
            return None
        size = self.look(head, key, shape)
        if size < 0:
            return None
        if self.general and is_plain(shape.rest, shape.path_size):
            name = PyBytes_FromStringAndSize(key, size)
            found = PyDict_GetItem(self.general, name)
        if found == NULL and self.exact:
            memcpy(key + size, shape.rest, shape.path_size)
            name = PyBytes_FromStringAndSize(key, size + shape.path_size)
            found = PyDict_GetItem(self.exact, name)
        if found == NULL:
            return None
        return (<Asks>found).find(exchange) if type(<object>found) is Asks else <Standing>found

    cpdef bint take(self, Exchange exchange) except -1:
        cdef shape_t shape
        cdef Standing standing
        cdef Upstream upstream
        cdef int64_t[3] estimated
        cdef int64_t *charged
        cdef int meters
        if self.valve.closed or PyDict_Size(self.bad) != 0:
            return False
        standing = self.find(exchange, &shape)
        if standing is None or not self.journal.healthy:
            return False
        if standing.expires_ns <= exchange.received_ns or standing.table.epoch != standing.epoch:
            return False
        if not standing.stack.idle:
            return False
        charged, meters = standing.charged, standing.meters
        if standing.metered is not None:
            charged, meters = estimated, 3
            if not standing.metered.tariff.estimate(body_size(exchange), estimated):
                return False
        # The first request of a connection is where the handler counts the connection.
        if standing.share is not None and (exchange.downstream.requests == 1 or not standing.share.take()):
            return False
        if standing.quota is not None:
            try:
                exchange.hold = standing.quota.hold_quietly(
                    standing.path, charged, meters, unix_now(), standing.ttl_ns)
            except (QuotaBusy, QuotaFull, QuotaTableError):
                exchange.hold = 0  # the handler meets the same and knows how to say so
            if exchange.hold <= 0:
                exchange.hold = 0
                if standing.share is not None:
                    standing.share.count -= 1
                return False
        upstream = standing.stack.acquire()
        self.taken += 1
        if self.counters is not None:
            counters_add(self.counters, self.reuses, 1)
        exchange.context = standing
        exchange.lane = self
        target = joined(standing.prefix, shape.rest, shape.rest_size)
        if standing.metered is None:
            exchange._forward(upstream, target, standing.authority, None, None, None)
        else:
            self.forward_read(exchange, upstream, standing, target)
        return True

    cdef int forward_read(self, Exchange exchange, Upstream upstream, Standing standing, target) except -1:
        """Forwards a model request, whose body was collected or waits behind its head."""
        cdef Downstream downstream = exchange.downstream
        cdef Metered metered = standing.metered
        cdef bytes data = downstream.pending
        cdef bytes body = exchange.body
        if body is None:
            # Kept until the end: it may have to be sent once more.
            exchange.body = body = downstream.framer.payload(data, downstream.pos)
            downstream._consumed(data, downstream.framer.end)
        exchange.on_response = metered.watch
        if metered.rewrite is not None:
            try:
                body = metered.rewrite(body)
            except BaseException:
                upstream.release()
                raise
        exchange._forward(upstream, target, standing.authority, metered.edits, body, None)
        return 0

    cpdef bint stale(self, Exchange exchange) except -1:
        cdef Standing standing = exchange.context
        if self.keeper is not None and not self.keeper.again():
            return False
        exchange.context = None
        exchange.lane = None
        if standing.share is not None:
            standing.share.count -= 1
        # What closed one idle connection has closed them all, or soon will.
        standing.stack.close()
        if standing.quota is not None:
            standing.quota.release(exchange.hold)
        return True

    cpdef done(self, Exchange exchange):
        cdef Standing standing = exchange.context
        cdef int64_t now
        if standing.share is not None:
            standing.share.count -= 1
        if self.keeper is not None and (exchange.status >= 500 or exchange.error or PyDict_Size(self.bad) != 0):
            self.keeper.ended(exchange, standing)
        now = unix_now()
        if self.counters is not None:
            self.count_answer(exchange, standing)
        if standing.metered is not None:
            self.done_read(exchange, standing, now)
            return
        try:
            if standing.quota is not None:
                if not standing.quota.settle_hold(exchange.hold, standing.charged, standing.meters, now):
                    standing.quota.charge(standing.path, standing.amounts, now)
        finally:
            # A table that fails leaves the reservation as it stands; the record is written all the same.
            self.write(exchange, standing, now, None)

    cdef int done_read(self, Exchange exchange, Standing standing, int64_t now) except -1:
        """Charges what a model request has used, and writes that down."""
        cdef int64_t[3] amounts
        cdef int64_t[MAX_METERS] charged
        cdef bytes usage
        cdef tuple actual
        standing.metered.tariff.estimate(body_size(exchange), amounts)
        held = (amounts[0], amounts[1], amounts[2])
        actual, usage = standing.metered.settle(exchange._tap, exchange.status, exchange.completed, held)
        try:
            if standing.quota is not None and actual is not None:
                if not standing.quota.settle_hold(exchange.hold, charged, load_amounts(actual, 0, charged), now):
                    standing.quota.charge(standing.path, actual, now)
        finally:
            self.write(exchange, standing, now, usage)
        return 0

    cdef int count_answer(self, Exchange exchange, Standing standing) except -1:
        cdef int64_t *cells = standing.cells_of(self.keeper, exchange.status)
        cdef Counters counters = self.counters
        cdef int64_t decided = exchange.forwarded_ns or exchange.ended_ns
        counters_add(counters, cells[0], 1)
        counters_add(counters, cells[1], 1)
        counters_add(counters, cells[2], exchange.bytes_up)
        counters_add(counters, cells[3], exchange.bytes_down)
        counters_observe(counters, cells[4], exchange.ended_ns - exchange.received_ns)
        counters_observe(counters, cells[5], decided - exchange.received_ns)
        if exchange.ended_ns > decided:
            counters_observe(counters, cells[6], exchange.ended_ns - decided)
        return 0

    cdef int write(self, Exchange exchange, Standing standing, int64_t now, bytes usage) except -1:
        """The outcome, behind which the last bytes of the answer may be sent."""
        cdef Journal journal = self.journal
        cdef Py_ssize_t before = journal.open_frame()
        cdef Py_ssize_t body = before + HEADER
        cdef int64_t at = journal.written + before
        self.usage = usage
        try:
            if standing.full_at < 0 or standing.generation != journal.generation or at - standing.full_at > REACH or (
                not self.abbreviate(exchange, standing, now)
            ):
                journal.end = journal.begin + body
                self.spell_out(exchange, standing, now)
                standing.full_at = -1
                journal.close_frame(before)
                standing.full_at = at
                standing.generation = journal.generation
            else:
                journal.close_frame(before)
        except BaseException:
            journal.end = journal.begin + before
            raise
        journal.flush()
        return 0

    cdef int spell_out(self, Exchange exchange, Standing standing, int64_t now) except -1:
        cdef Journal journal = self.journal
        cdef Py_ssize_t before
        cdef int i, first
        i = 0
        while i < standing.count:
            if standing.parts[i].fact < 0:
                journal.raw(standing.parts[i].text, standing.parts[i].size)
                i += 1
                continue
            first = i
            before = journal.end - journal.begin
            while i < standing.count and standing.parts[i].fact >= 0:
                self.fact(standing.parts[i].fact, exchange, standing, now)
                i += 1
            standing.parts[first].was = journal.end - journal.begin - before
        return 0

    cdef bint abbreviate(self, Exchange exchange, Standing standing, int64_t now) except -1:
        """The same by what is other than where it was last written in full; False when that cannot be said so."""
        cdef Journal journal = self.journal
        cdef Py_ssize_t keep = 0, before, added
        cdef uint32_t full_at = <uint32_t>standing.full_at
        cdef uint8_t *o = journal.room(5)
        cdef int i = 0, first
        o[0] = ABBREVIATED
        memcpy(o + 1, &full_at, 4)
        while i < standing.count:
            if standing.parts[i].fact < 0:
                keep += standing.parts[i].size
                i += 1
                continue
            keep = self.step_over(keep, MOST)
            first = i
            before = journal.end - journal.begin
            journal.room(3)
            while i < standing.count and standing.parts[i].fact >= 0:
                self.fact(standing.parts[i].fact, exchange, standing, now)
                i += 1
            added = journal.end - journal.begin - before - 3
            if added > MOST or standing.parts[first].was > MOST:
                return False
            o = journal.data + journal.begin + before
            o[0] = <uint8_t>keep
            o[1] = <uint8_t>standing.parts[first].was
            o[2] = <uint8_t>added
            keep = 0
        self.step_over(keep, 0)
        return True

    cdef Py_ssize_t step_over(self, Py_ssize_t keep, Py_ssize_t most) except -1:
        """Keeps bytes until no more than ``most`` are to be kept; how many that are."""
        cdef uint8_t *o
        while keep > most:
            o = self.journal.room(3)
            o[0] = <uint8_t>min(keep, <Py_ssize_t>MOST)
            o[1] = o[2] = 0
            keep -= o[0]
        return keep

    cdef int fact(self, int fact, Exchange exchange, Standing standing, int64_t now) except -1:
        cdef Journal journal = self.journal
        cdef int64_t decided = exchange.forwarded_ns or exchange.ended_ns
        cdef uint8_t *o
        if fact == F_ID:
            o = journal.room(18)
            o[0] = 0xC4
            o[1] = 16
            write_uuid7(o + 2, now)
        elif fact == F_AT:
            journal.integer(now)
        elif fact == F_TARGET:
            self.write_path(exchange.head, standing)
        elif fact == F_STATUS:
            journal.integer(exchange.status)
        elif fact == F_ERROR:
            journal.pack(exchange.error, 1)
        elif fact == F_BYTES_UP:
            journal.integer(exchange.bytes_up)
        elif fact == F_BYTES_DOWN:
            journal.integer(exchange.bytes_down)
        elif fact == F_CRETO_NS:
            journal.integer(max(<int64_t>0, decided - exchange.received_ns))
        elif fact == F_UPSTREAM_NS:
            journal.integer(max(<int64_t>0, exchange.ended_ns - decided))
        elif fact == F_TOTAL_NS:
            journal.integer(exchange.ended_ns - exchange.received_ns)
        elif fact == F_USAGE:
            journal.raw(PyBytes_AS_STRING(self.usage), PyBytes_GET_SIZE(self.usage))
        else:
            self.write_trace(exchange.head)
        return 0

    cdef int write_path(self, RequestHead head, Standing standing) except -1:
        cdef Py_ssize_t base = PyBytes_GET_SIZE(standing.prefix)
        cdef shape_t shape
        self.place(head, &shape)
        self.journal.sized(base + shape.path_size, 0xA0, 32, 0xD9, 0xDA)
        self.journal.raw(PyBytes_AS_STRING(standing.prefix), base)
        return self.journal.raw(shape.rest, shape.path_size)

    cdef int write_trace(self, RequestHead head) except -1:
        cdef const char *p = PyBytes_AS_STRING(head.raw) + head.base
        cdef int i
        for i in range(head.count):
            if head.fields[i].name_size == 11 and strncasecmp(p + head.fields[i].name, b"traceparent", 11) == 0:
                return self.journal.text(p + head.fields[i].value, head.fields[i].value_size)
        return self.journal.tag(0xA0, 0, 0)


cdef bint is_trace(const char *p, Py_ssize_t n) noexcept nogil:
    """Whether it is a traceparent as W3C Trace Context writes it today; any other is for the handler to read."""
    cdef Py_ssize_t i
    cdef char c
    cdef bint trace = False, parent = False
    if n != TRACE_SIZE or memcmp(p, b"00-", 3) != 0 or p[35] != c"-" or p[52] != c"-" or p[53] != c"0":
        return False
    for i in range(3, 52):
        c = p[i]
        if i == 35:
            continue
        if not (c"0" <= c <= c"9" or c"a" <= c <= c"f"):
            return False
        if c != c"0":
            if i < 35:
                trace = True
            else:
                parent = True
    return trace and parent and c"0" <= p[54] <= c"3"


cdef bytes joined(bytes first, const char *rest, Py_ssize_t size):
    cdef Py_ssize_t at = PyBytes_GET_SIZE(first)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, at + size)
    memcpy(PyBytes_AS_STRING(out), PyBytes_AS_STRING(first), at)
    memcpy(PyBytes_AS_STRING(out) + at, rest, size)
    return out


cdef bint is_plain(const char *p, Py_ssize_t n) noexcept nogil:
    """Whether no server reads the path otherwise than it is spelled; see ``creto_proxy.paths``."""
    cdef Py_ssize_t i
    for i in range(n):
        if p[i] == c"%" or p[i] == c"\\" or p[i] == c";":
            return False
        if p[i] == c"/" and i + 1 < n and (p[i + 1] == c"/" or p[i + 1] == c"."):
            return False
    return True
