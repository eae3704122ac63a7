# cython: language_level=3
# The C types of _relay_py.py, for the extension module _relay_c that is compiled from it.
cimport creto_hotpath._http1_c as http1
from libc.stdint cimport int64_t

cdef int _HELD, _COLLECTING, _STREAMING, _DISCARDING, _COMPLETE
cdef int _PASS, _CHUNK, _BARE
cdef int _IDLE, _HEAD, _BODY
cdef int _NO_BODY, _BY_LENGTH, _BY_CHUNKS, _BY_CLOSE
cdef int _NO_FRAMING, _CHUNKED_FRAMING
cdef int _SILENT, _CLOSING, _KEEPING, _UPGRADING
cdef int _COALESCE, _INTERIM_LIMIT, _LINGER_BYTES, _SLOTS


cdef class Pace:
    cdef readonly object limits
    cdef bytes via
    cdef int64_t hold_bytes
    cdef int64_t drain_bytes
    cdef int64_t head_ticks
    cdef int64_t idle_ticks
    cdef int64_t body_ticks
    cdef int64_t stall_ticks
    cdef int64_t response_ticks
    cdef int64_t linger_ticks
    cdef object __weakref__


cdef Pace _pace_of(limits)


cdef class Timed:
    cdef readonly Wheel wheel
    # Of half a second each: there are enough for a thousand years of uptime in 36 bits, and for 34 in these.
    cdef readonly int deadline
    cdef readonly int slot

    cpdef expire(self)
    cdef _arm(self, int64_t ticks)


cdef class Wheel:
    cdef object loop
    cdef readonly int64_t now
    cdef readonly int64_t placed
    cdef bint running
    cdef list slots

    cdef place(self, Timed item)
    cdef _judge(self, Timed item)
    cdef drop(self, Timed item)


cdef class Stack:
    cdef readonly Pool pool
    cdef readonly object key
    cdef readonly list idle
    cdef object __weakref__

    cpdef Upstream acquire(self)
    cpdef close(self)
    cdef Upstream _take(self, Upstream upstream)


cdef class Pool:
    cdef int64_t idle_ticks
    cdef readonly int per_key
    cdef readonly bint closed
    cdef object stacks

    cpdef Stack stack(self, key)
    cpdef Upstream acquire(self, key)
    cdef bint _keep(self, Upstream upstream) except -1
    cdef _forget(self, Upstream upstream)


cdef class Upstream(Timed):
    cdef readonly Pool pool
    cdef readonly object key
    cdef readonly Stack stack
    cdef readonly object transport
    cdef object _send
    cdef readonly Exchange exchange
    cdef bytes pending
    cdef int state
    cdef readonly int uses
    cdef bint keep
    cdef bint heard
    cdef public bint unprocessed
    cdef public bint http2
    cdef bint paused
    cdef readonly bint closed

    cpdef expire(self)
    cpdef release(self)
    cdef _heads(self, Exchange exchange, bytes data)
    cdef _broken(self)
    cdef _discard(self)
    cdef _begin(self, Exchange exchange)
    cdef _pause(self, bint paused)
    cdef _surrender(self)


cdef class Lane:
    cpdef bint take(self, Exchange exchange) except -1
    cpdef done(self, Exchange exchange)
    cpdef bint stale(self, Exchange exchange) except -1


cdef class Exchange:
    cdef readonly Downstream downstream
    cdef readonly http1.RequestHead head
    cdef readonly Upstream upstream
    cdef public object on_response
    cdef public bint allow_upgrade
    cdef public object context
    cdef public Lane lane
    cdef public int64_t hold
    cdef readonly bytes body
    cdef readonly int status
    cdef readonly int64_t bytes_up
    cdef readonly int64_t bytes_down
    cdef readonly int64_t received_ns
    cdef readonly int64_t forwarded_ns
    cdef readonly int64_t first_byte_ns
    cdef readonly int64_t ended_ns
    cdef readonly bint completed
    cdef readonly str error
    cdef readonly bint gone
    cdef bint _over
    cdef bint _sent
    cdef bint _continued
    cdef bint _retried
    cdef bint _switching
    cdef int _interims
    cdef int64_t _limit
    cdef int64_t _size
    cdef list _parts
    cdef http1.BodyFramer _framer
    cdef int64_t _framing
    cdef Py_ssize_t _at
    cdef object _tap
    cdef int _shape

    cdef _collected(self, bytes piece)
    cdef _deliver(self, body)
    cdef _forward(self, Upstream upstream, target, host, edits, bytes body, tap)
    cdef _retry(self, bint unprocessed)
    cdef _relay_interim(self, http1.ResponseHead head)
    cdef _response(self, Upstream upstream, http1.ResponseHead head, bytes data)
    cdef _shape_body(self, http1.ResponseHead head, Py_ssize_t received)
    cdef bytes _pass_on(self, http1.ResponseHead head, bytes data)
    cdef _body(self, Upstream upstream, bytes data)
    cdef bytes _through(self, bytes payload)
    cdef bytes _tail(self)
    cdef _end_of_stream(self, Upstream upstream)
    cdef _finish(self, Upstream upstream, bint reusable, bytes last)
    cdef _fail(self, int status, str reason)
    cdef _leave(self)
    cdef _drop_upstream(self)
    cdef _end(self)
    cdef _switch(self, Upstream upstream, http1.ResponseHead head, bytes data)
    cdef _pump(self, transport)


cdef class Downstream(Timed):
    cdef readonly object handler
    cdef readonly Lane lane
    cdef readonly str scheme
    cdef readonly bint http2
    cdef readonly Pace pace
    cdef readonly object transport
    cdef readonly Exchange exchange
    cdef http1.BodyFramer framer
    cdef bytes pending
    cdef Py_ssize_t pos
    cdef int64_t drained
    cdef readonly int64_t requests
    cdef unsigned char intake
    cdef unsigned char keep
    cdef unsigned char reading
    cdef unsigned char full
    cdef unsigned char stalled
    cdef unsigned char blocked
    cdef unsigned char parsing
    cdef unsigned char heading
    cdef unsigned char shut
    cdef unsigned char surrendered
    cdef readonly bint draining
    cdef readonly bint closed

    cdef _report(self, str what, error)
    cpdef expire(self)
    cdef _more_head(self, bytes data)
    cdef _pile(self, bytes data)
    cdef _measure(self)
    cdef _flow(self)
    cdef _stall(self, bint stalled)
    cdef _parse(self, bytes data, Py_ssize_t start)
    cdef _partial(self, bytes data, Py_ssize_t start)
    cdef _idle(self)
    cdef _begin(self, http1.RequestHead head, bytes data)
    cdef _last_hop(self, http1.RequestHead head)
    cdef _handler_failed(self, Exchange exchange, error)
    cdef tuple _body_at_hand(self)
    cdef _consumed(self, bytes data, Py_ssize_t end)
    cdef _resume_body(self)
    cdef _take(self, bytes data, Py_ssize_t start)
    cdef _sent_up(self)
    cdef _throw_away(self, bytes data, Py_ssize_t start)
    cdef _settle_keep(self)
    cdef int _connection(self) except -1
    cdef _write(self, bytes data)
    cdef _after(self)
    cdef _next(self)
    cdef bytes _refusal(self, error)
    cdef _refuse(self, error)
    cdef _shut(self, bint linger)
    cdef _cut_off(self, bint hard)
    cdef bytes _surrender(self)
    cdef _closed(self)


cdef class Side:
    cdef Tunnel tunnel
    cdef readonly object transport
    cdef Side peer
    cdef int64_t received
    cdef bint ended
    cdef bint closed


cdef class Tunnel(Timed):
    cdef public object on_close
    cdef readonly str error
    cdef int64_t stall_ticks
    cdef object loop
    cdef Side left
    cdef Side right

    cpdef expire(self)
    cpdef abort(self)
    cdef _attach(self, Side side)
    cdef _follow(self, Side side)
    cdef bint _half_closed(self, Side side) except -1
    cdef _lost(self, Side side, exc)
    cdef _done(self)
