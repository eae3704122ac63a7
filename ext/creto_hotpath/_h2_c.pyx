# cython: language_level=3
"""HTTP/2 framing by libnghttp2: one ``Session`` per connection, either side. See ``_h2_py`` for what it promises.

Built only where nghttp2's headers are. nghttp2 does framing, HPACK and flow control; everything it finds becomes an event
in a list, and response and request bodies wait here until windows allow them. The fields of requests are not judged here:
nghttp2 would reset such a stream without a word, and nobody could tell why or that it had been.
"""

from collections import deque

from creto_hotpath._h2_types import SessionError, reason_of

from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.string cimport memcpy

# Distributions have it in versions of one and the same number, so it is asked for when the library is loaded. A library
# without it has no such limit, and one with it counts a frame once for each read that its head came in.
cdef extern from *:
    """
    #include <nghttp2/nghttp2.h>
    extern void nghttp2_option_set_max_continuations(nghttp2_option *option, size_t val) __attribute__((weak));
    static void creto_leave_continuations_to_the_guard(nghttp2_option *option) {
        if (nghttp2_option_set_max_continuations) nghttp2_option_set_max_continuations(option, 1024);
    }
    """
    void creto_leave_continuations_to_the_guard(nghttp2_option *)

cdef extern from "nghttp2/nghttp2.h":
    ctypedef struct nghttp2_session:
        pass
    ctypedef struct nghttp2_session_callbacks:
        pass
    ctypedef struct nghttp2_option:
        pass
    ctypedef struct nghttp2_settings_entry:
        int32_t settings_id
        uint32_t value
    ctypedef struct nghttp2_nv:
        uint8_t *name
        uint8_t *value
        size_t namelen
        size_t valuelen
        uint8_t flags
    ctypedef struct nghttp2_frame_hd:
        size_t length
        int32_t stream_id
        uint8_t type
        uint8_t flags
    ctypedef struct nghttp2_headers:
        int cat
    ctypedef struct nghttp2_rst_stream:
        uint32_t error_code
    ctypedef struct nghttp2_goaway:
        int32_t last_stream_id
        uint32_t error_code
    ctypedef union nghttp2_frame:
        nghttp2_frame_hd hd
        nghttp2_headers headers
        nghttp2_rst_stream rst_stream
        nghttp2_goaway goaway
    ctypedef union nghttp2_data_source:
        int fd
        void *ptr
    ctypedef struct nghttp2_data_provider:
        nghttp2_data_source source
        ssize_t (*read_callback)(nghttp2_session *, int32_t, uint8_t *, size_t, uint32_t *, nghttp2_data_source *,
                                 void *) noexcept

    int nghttp2_session_callbacks_new(nghttp2_session_callbacks **)
    void nghttp2_session_callbacks_del(nghttp2_session_callbacks *)
    void nghttp2_session_callbacks_set_on_begin_headers_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_header_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, const uint8_t *, size_t,
                                             const uint8_t *, size_t, uint8_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_invalid_header_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, const uint8_t *, size_t,
                                             const uint8_t *, size_t, uint8_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_frame_recv_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, uint8_t, int32_t, const uint8_t *, size_t,
                                             void *) noexcept)
    void nghttp2_session_callbacks_set_on_stream_close_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, int32_t, uint32_t, void *) noexcept)
    void nghttp2_session_callbacks_set_on_frame_send_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, void *) noexcept)
    void nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(
        nghttp2_session_callbacks *, int (*)(nghttp2_session *, const nghttp2_frame *, int, void *) noexcept)
    int nghttp2_option_new(nghttp2_option **)
    void nghttp2_option_del(nghttp2_option *)
    void nghttp2_option_set_no_auto_window_update(nghttp2_option *, int)
    void nghttp2_option_set_no_http_messaging(nghttp2_option *, int)
    void nghttp2_option_set_peer_max_concurrent_streams(nghttp2_option *, uint32_t)
    void nghttp2_option_set_max_outbound_ack(nghttp2_option *, size_t)
    int nghttp2_session_server_new2(nghttp2_session **, const nghttp2_session_callbacks *, void *, const nghttp2_option *)
    int nghttp2_session_client_new2(nghttp2_session **, const nghttp2_session_callbacks *, void *, const nghttp2_option *)
    void nghttp2_session_del(nghttp2_session *)
    ssize_t nghttp2_session_mem_recv(nghttp2_session *, const uint8_t *, size_t)
    ssize_t nghttp2_session_mem_send(nghttp2_session *, const uint8_t **)
    int nghttp2_session_want_read(nghttp2_session *)
    int nghttp2_session_want_write(nghttp2_session *)
    int nghttp2_submit_settings(nghttp2_session *, uint8_t, const nghttp2_settings_entry *, size_t)
    int nghttp2_session_set_local_window_size(nghttp2_session *, uint8_t, int32_t, int32_t)
    int nghttp2_submit_headers(nghttp2_session *, uint8_t, int32_t, const void *, const nghttp2_nv *, size_t, void *)
    int nghttp2_submit_response(nghttp2_session *, int32_t, const nghttp2_nv *, size_t, const nghttp2_data_provider *)
    int32_t nghttp2_submit_request(nghttp2_session *, const void *, const nghttp2_nv *, size_t,
                                   const nghttp2_data_provider *, void *)
    int nghttp2_submit_trailer(nghttp2_session *, int32_t, const nghttp2_nv *, size_t)
    int nghttp2_submit_rst_stream(nghttp2_session *, uint8_t, int32_t, uint32_t)
    int nghttp2_submit_goaway(nghttp2_session *, uint8_t, int32_t, uint32_t, const uint8_t *, size_t)
    int nghttp2_session_terminate_session2(nghttp2_session *, int32_t, uint32_t)
    int nghttp2_session_terminate_session(nghttp2_session *, uint32_t)
    int32_t nghttp2_session_get_last_proc_stream_id(nghttp2_session *)
    int nghttp2_session_resume_data(nghttp2_session *, int32_t)
    int nghttp2_session_consume_connection(nghttp2_session *, size_t)
    int nghttp2_session_consume_stream(nghttp2_session *, int32_t, size_t)
    uint32_t nghttp2_session_get_remote_settings(nghttp2_session *, int)

    enum:
        NGHTTP2_DATA, NGHTTP2_HEADERS, NGHTTP2_RST_STREAM, NGHTTP2_SETTINGS, NGHTTP2_GOAWAY
        NGHTTP2_FLAG_NONE, NGHTTP2_FLAG_END_STREAM, NGHTTP2_FLAG_ACK
        NGHTTP2_NV_FLAG_NONE, NGHTTP2_NV_FLAG_NO_INDEX
        NGHTTP2_DATA_FLAG_EOF, NGHTTP2_DATA_FLAG_NO_END_STREAM
        NGHTTP2_ERR_DEFERRED, NGHTTP2_ERR_CALLBACK_FAILURE, NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
        NGHTTP2_ERR_BAD_CLIENT_MAGIC, NGHTTP2_ERR_FLOODED, NGHTTP2_ERR_REFUSED_STREAM
        NGHTTP2_SETTINGS_HEADER_TABLE_SIZE, NGHTTP2_SETTINGS_ENABLE_PUSH
        NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
        NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
        NGHTTP2_PROTOCOL_ERROR, NGHTTP2_INTERNAL_ERROR, NGHTTP2_ENHANCE_YOUR_CALM

# RFC 8441; headers of older versions do not name it.
cdef int _ENABLE_CONNECT_PROTOCOL = 8
cdef int _HEADERS = 0, _DATA = 1, _END = 2, _CLOSED = 3, _ENDED = 4, _GOAWAY = 5, _SETTINGS = 6, _REFUSED = 7
# Values that must not enter the compression table, where a later guess could confirm them (RFC 7541 section 7.1.3).
cdef frozenset _SENSITIVE = frozenset((b"authorization", b"cookie", b"proxy-authorization", b"set-cookie", b"x-api-key",
                                       b"api-key", b"x-goog-api-key"))


cdef class _Stream:
    cdef object pieces
    cdef Py_ssize_t offset
    cdef Py_ssize_t size
    cdef bint ended
    cdef bint deferred
    cdef bint streaming
    cdef list trailers
    cdef list block
    cdef Py_ssize_t block_size

    def __cinit__(self):
        self.pieces = deque()
        self.offset = 0
        self.size = 0
        self.ended = False
        self.deferred = False
        self.streaming = False
        self.trailers = None
        self.block = None
        self.block_size = 0


cdef int _on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) noexcept:
    cdef Session self = <Session>user
    cdef _Stream stream
    if frame.hd.type != NGHTTP2_HEADERS:
        return 0
    stream = <_Stream?>self.streams.get(frame.hd.stream_id) if frame.hd.stream_id in self.streams else None
    if stream is None:
        stream = self.streams[frame.hd.stream_id] = _Stream()
    stream.block = []
    stream.block_size = 0
    return 0


cdef int _on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t namelen,
                    const uint8_t *value, size_t valuelen, uint8_t flags, void *user) noexcept:
    cdef Session self = <Session>user
    cdef object found = self.streams.get(frame.hd.stream_id)
    if found is None or (<_Stream>found).block is None:
        return 0
    cdef _Stream stream = <_Stream>found
    stream.block_size += namelen + valuelen + 32
    if stream.block_size > self.header_limit:
        self.failure = "header_list_too_large"
        return NGHTTP2_ERR_CALLBACK_FAILURE
    stream.block.append(((<const char *>name)[:namelen], (<const char *>value)[:valuelen]))
    return 0


cdef int _on_invalid_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t namelen,
                            const uint8_t *value, size_t valuelen, uint8_t flags, void *user) noexcept:
    # Of an answer: left to itself, nghttp2 drops such a field and lets the rest through.
    nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame.hd.stream_id, NGHTTP2_PROTOCOL_ERROR)
    return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE


cdef int _on_frame_recv(nghttp2_session *session, const nghttp2_frame *frame, void *user) noexcept:
    cdef Session self = <Session>user
    cdef int kind = frame.hd.type
    cdef object found
    if kind == NGHTTP2_HEADERS:
        found = self.streams.get(frame.hd.stream_id)
        if found is not None and (<_Stream>found).block is not None:
            self.events.append((_HEADERS, frame.hd.stream_id, (<_Stream>found).block,
                                (frame.hd.flags & NGHTTP2_FLAG_END_STREAM) != 0))
            (<_Stream>found).block = None
    if (kind == NGHTTP2_HEADERS or kind == NGHTTP2_DATA) and frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        self.events.append((_END, frame.hd.stream_id, None, 0))
    elif kind == NGHTTP2_GOAWAY:
        self.peer_leaves = True
        self.events.append((_GOAWAY, frame.goaway.last_stream_id, None, frame.goaway.error_code))
    elif kind == NGHTTP2_SETTINGS and not frame.hd.flags & NGHTTP2_FLAG_ACK:
        self.events.append((_SETTINGS, 0, None, 0))
    return 0


cdef int _on_data(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data, size_t size,
                  void *user) noexcept:
    cdef Session self = <Session>user
    # One slow stream must not stop the others: the connection's window is given back at once, the stream's is not.
    nghttp2_session_consume_connection(session, size)
    self.events.append((_DATA, stream_id, (<const char *>data)[:size], 0))
    return 0


cdef int _on_stream_close(nghttp2_session *session, int32_t stream_id, uint32_t code, void *user) noexcept:
    cdef Session self = <Session>user
    self.streams.pop(stream_id, None)
    self.events.append((_CLOSED, stream_id, None, code))
    return 0


cdef int _on_frame_send(nghttp2_session *session, const nghttp2_frame *frame, void *user) noexcept:
    cdef Session self = <Session>user
    if frame.hd.flags & NGHTTP2_FLAG_END_STREAM and frame.hd.type in (NGHTTP2_DATA, NGHTTP2_HEADERS):
        self.events.append((_ENDED, frame.hd.stream_id, None, 0))
    elif frame.hd.type == NGHTTP2_GOAWAY:
        self.leaves = True
        self.parting = frame.goaway.error_code
    return 0


cdef int _on_invalid_frame(nghttp2_session *session, const nghttp2_frame *frame, int error, void *user) noexcept:
    cdef Session self = <Session>user
    if error == NGHTTP2_ERR_REFUSED_STREAM and frame.hd.type == NGHTTP2_HEADERS:
        self.streams.pop(frame.hd.stream_id, None)
        self.events.append((_REFUSED, frame.hd.stream_id, None, 0))
    return 0


cdef ssize_t _read(nghttp2_session *session, int32_t stream_id, uint8_t *out, size_t room, uint32_t *flags,
                   nghttp2_data_source *source, void *user) noexcept:
    cdef Session self = <Session>user
    cdef object found = self.streams.get(stream_id)
    if found is None:
        flags[0] |= NGHTTP2_DATA_FLAG_EOF
        return 0
    cdef _Stream stream = <_Stream>found
    cdef Py_ssize_t left = <Py_ssize_t>room, taken
    cdef bytes piece
    while left and stream.pieces:
        piece = stream.pieces[0]
        taken = min(left, len(piece) - stream.offset)
        memcpy(out, <const char *>piece + stream.offset, taken)
        out += taken
        left -= taken
        stream.offset += taken
        if stream.offset == len(piece):
            stream.pieces.popleft()
            stream.offset = 0
    cdef Py_ssize_t copied = <Py_ssize_t>room - left
    stream.size -= copied
    if stream.size == 0:
        if stream.ended:
            flags[0] |= NGHTTP2_DATA_FLAG_EOF
            if stream.trailers is not None:
                flags[0] |= NGHTTP2_DATA_FLAG_NO_END_STREAM
                self._trailer(stream_id, stream.trailers)
        elif copied == 0:
            stream.deferred = True
            return NGHTTP2_ERR_DEFERRED
    return copied


cdef class _Fields:
    """Header pairs as nghttp2 wants them, alive as long as this object."""
    cdef list pairs
    cdef nghttp2_nv nv[512]
    cdef size_t count

    def __cinit__(self, list pairs):
        cdef bytes name, value
        self.pairs = pairs
        self.count = 0
        if len(pairs) > 512:
            raise SessionError("too_many_fields")
        for name, value in pairs:
            self.nv[self.count].name = <uint8_t *><char *>name
            self.nv[self.count].value = <uint8_t *><char *>value
            self.nv[self.count].namelen = len(name)
            self.nv[self.count].valuelen = len(value)
            self.nv[self.count].flags = NGHTTP2_NV_FLAG_NO_INDEX if name in _SENSITIVE else NGHTTP2_NV_FLAG_NONE
            self.count += 1


cdef class Session:
    cdef nghttp2_session *session
    cdef dict streams
    cdef list events
    cdef Py_ssize_t header_limit
    cdef object failure
    cdef uint32_t parting
    cdef bint leaves, peer_leaves

    def __cinit__(self, bint client, *, uint32_t max_streams=100, uint32_t stream_window=65535,
                  int32_t connection_window=1048576, uint32_t header_list=65536):
        cdef nghttp2_session_callbacks *callbacks = NULL
        cdef nghttp2_option *option = NULL
        cdef nghttp2_settings_entry entries[4]
        cdef size_t count = 3
        cdef int status
        self.session = NULL
        self.streams = {}
        self.events = []
        self.header_limit = 4 * <Py_ssize_t>header_list
        self.failure = None
        self.parting = NGHTTP2_PROTOCOL_ERROR
        self.leaves = self.peer_leaves = False
        if nghttp2_session_callbacks_new(&callbacks) or nghttp2_option_new(&option):
            raise MemoryError
        nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, _on_begin_headers)
        nghttp2_session_callbacks_set_on_header_callback(callbacks, _on_header)
        nghttp2_session_callbacks_set_on_invalid_header_callback(callbacks, _on_invalid_header)
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, _on_frame_recv)
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, _on_data)
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, _on_stream_close)
        nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, _on_frame_send)
        nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(callbacks, _on_invalid_frame)
        nghttp2_option_set_no_auto_window_update(option, 1)
        nghttp2_option_set_max_outbound_ack(option, 1000)
        creto_leave_continuations_to_the_guard(option)
        if client:
            status = nghttp2_session_client_new2(&self.session, callbacks, <void *>self, option)
        else:
            nghttp2_option_set_no_http_messaging(option, 1)
            status = nghttp2_session_server_new2(&self.session, callbacks, <void *>self, option)
        nghttp2_session_callbacks_del(callbacks)
        nghttp2_option_del(option)
        if status:
            raise MemoryError
        entries[0].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
        entries[0].value = max_streams
        entries[1].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
        entries[1].value = stream_window
        entries[2].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
        entries[2].value = header_list
        if client:
            entries[0].settings_id = NGHTTP2_SETTINGS_ENABLE_PUSH
            entries[0].value = 0
        else:
            entries[3].settings_id = _ENABLE_CONNECT_PROTOCOL
            entries[3].value = 1
            count = 4
        nghttp2_submit_settings(self.session, NGHTTP2_FLAG_NONE, entries, count)
        nghttp2_session_set_local_window_size(self.session, NGHTTP2_FLAG_NONE, 0, connection_window)

    def __dealloc__(self):
        if self.session != NULL:
            nghttp2_session_del(self.session)

    def receive(self, bytes data):
        cdef const uint8_t *start = <const uint8_t *><char *>data
        cdef ssize_t taken = nghttp2_session_mem_recv(self.session, start, len(data))
        if taken < 0:
            if self.failure is not None:
                nghttp2_session_terminate_session(self.session, NGHTTP2_ENHANCE_YOUR_CALM)
                raise SessionError(self.failure, 11)
            if taken == NGHTTP2_ERR_FLOODED:
                raise SessionError("control_frame_flood", 11)
            if taken == NGHTTP2_ERR_BAD_CLIENT_MAGIC:
                raise SessionError("bad_preface", 1)
            raise SessionError("internal_error", 2)
        return self.take_events()

    def take_events(self):
        cdef list events = self.events
        self.events = []
        return events

    @property
    def over(self):
        return not nghttp2_session_want_read(self.session) and not nghttp2_session_want_write(self.session)

    @property
    def failed(self):
        """Why the connection is ending by an error found while framing, once that was sent; empty when it is not."""
        if nghttp2_session_want_read(self.session) or (self.peer_leaves and not self.leaves):
            return ""  # a peer that leaves when nothing is open makes no mistake
        return reason_of(self.parting)

    def to_send(self, Py_ssize_t limit=65536):
        cdef const uint8_t *out = NULL
        cdef ssize_t size
        cdef list parts = []
        cdef Py_ssize_t total = 0
        while total < limit:
            size = nghttp2_session_mem_send(self.session, &out)
            if size <= 0:
                break
            parts.append((<const char *>out)[:size])
            total += size
        return b"".join(parts)

    def open(self, list pairs, bint end):
        cdef _Fields fields = _Fields(pairs)
        cdef nghttp2_data_provider provider
        provider.read_callback = _read
        provider.source.ptr = NULL
        cdef _Stream stream = _Stream()
        cdef int32_t stream_id = nghttp2_submit_request(
            self.session, NULL, fields.nv, fields.count, NULL if end else &provider, NULL)
        if stream_id < 0:
            raise SessionError("no_more_streams")
        stream.streaming = not end
        self.streams[stream_id] = stream
        return stream_id

    def headers(self, int32_t stream_id, list pairs, bint end, bint interim=False):
        cdef object found = self.streams.get(stream_id)
        if found is None:
            return
        cdef _Fields fields = _Fields(pairs)
        cdef nghttp2_data_provider provider
        if interim:
            nghttp2_submit_headers(self.session, NGHTTP2_FLAG_NONE, stream_id, NULL, fields.nv, fields.count, NULL)
            return
        provider.read_callback = _read
        provider.source.ptr = NULL
        (<_Stream>found).streaming = not end
        nghttp2_submit_response(self.session, stream_id, fields.nv, fields.count, NULL if end else &provider)

    def write(self, int32_t stream_id, bytes data):
        cdef object found = self.streams.get(stream_id)
        if found is None or not data:
            return
        cdef _Stream stream = <_Stream>found
        stream.pieces.append(data)
        stream.size += len(data)
        self._wake(stream_id, stream)

    def end(self, int32_t stream_id, list trailers=None):
        cdef object found = self.streams.get(stream_id)
        if found is None:
            return
        cdef _Stream stream = <_Stream>found
        stream.ended = True
        stream.trailers = trailers or None
        self._wake(stream_id, stream)

    cdef _wake(self, int32_t stream_id, _Stream stream):
        if stream.deferred:
            stream.deferred = False
            nghttp2_session_resume_data(self.session, stream_id)

    cdef _trailer(self, int32_t stream_id, list trailers):
        cdef _Fields fields = _Fields(trailers)
        nghttp2_submit_trailer(self.session, stream_id, fields.nv, fields.count)

    def queued(self, int32_t stream_id):
        cdef object found = self.streams.get(stream_id)
        return 0 if found is None else (<_Stream>found).size

    def consume(self, int32_t stream_id, size_t size):
        if stream_id in self.streams:
            nghttp2_session_consume_stream(self.session, stream_id, size)

    def reset(self, int32_t stream_id, uint32_t code):
        nghttp2_submit_rst_stream(self.session, NGHTTP2_FLAG_NONE, stream_id, code)

    def goaway(self, uint32_t code, bint terminate=True):
        if terminate:
            nghttp2_session_terminate_session(self.session, code)
        else:
            nghttp2_submit_goaway(self.session, NGHTTP2_FLAG_NONE,
                                  nghttp2_session_get_last_proc_stream_id(self.session), code, NULL, 0)

    @property
    def peer_max_streams(self):
        return nghttp2_session_get_remote_settings(self.session, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS)
