# cython: language_level=3, nonecheck=True
"""Plain connections of one event loop behind one epoll set of their own, which is one reader to the loop.

What becomes readable in one turn of the loop is read in one call from it, received bytes are given on and answers sent
to the system at once: no callback, context or buffer list of the loop for each. To protocols a ``Wire`` is an asyncio
transport (flow control, half-close, what is called when and with which errors), with one difference in their favour:
what a peer said before it reset the connection is read to its end, although writing to it has failed already.

Linux only: epoll(7), accept4(2).
"""

import asyncio
import os
import socket
import weakref

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPIPE, errno
from libc.stdint cimport uint32_t


cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP, EPOLLET
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    struct sockaddr:
        pass
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ctypedef unsigned int socklen_t
    int MSG_NOSIGNAL, SHUT_WR, SOCK_NONBLOCK, SOCK_CLOEXEC
    int accept4(int fd, sockaddr *address, socklen_t *length, int flags)
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)

cdef extern from *:
    """
    static inline void errno_set(int number) { errno = number; }
    """
    void errno_set(int number)

cdef extern from "unistd.h" nogil:
    int close(int fd)

cdef extern from "string.h" nogil:
    void *memset(void *target, int value, size_t size)

# Events taken in one call; the loop's timers and callbacks get their turn between two.
cdef enum:
    _BATCH = 128
    _ACCEPTED = 64
    _RECEIVED = 131072
    _PIECES = 32
    # Reads in a row from one connection that has ended or failed.
    _LAST_READS = 16

# Told once each time it becomes so, which spares the kernel looking again after each report.
cdef uint32_t _READABLE = EPOLLIN | EPOLLRDHUP | EPOLLET
cdef uint32_t _WRITABLE = EPOLLOUT | EPOLLET
cdef uint32_t _OVER = EPOLLRDHUP | EPOLLHUP | EPOLLERR

cdef double _BREATH_S = 0.05
cdef int _HIGH = 65536
cdef int _LOW = 16384

# Of all wires: what was received is copied from here, into an object of its length, before anything else runs.
cdef char _buffer[_RECEIVED]

# Weak on both sides: protocols know their loop, and the loop, whose reader it is, keeps a poller alive.
_pollers = weakref.WeakKeyDictionary()


cdef object _os_error(int number):
    return OSError(number, os.strerror(number))


cdef Poller _poller_of(loop):
    known = _pollers.get(loop)
    poller = None if known is None else known()
    if poller is None:
        poller = Poller(loop)
        _pollers[loop] = weakref.ref(poller)
    return poller


cdef ssize_t _push(int fd, list pieces, Py_ssize_t skip) except -2:
    """Sends what the system takes of the first ``pieces``, less ``skip`` bytes of the first; -1 as sendmsg(2)."""
    cdef Py_buffer views[_PIECES]
    cdef iovec vector[_PIECES]
    cdef msghdr message
    cdef int count = 0
    cdef int at
    cdef ssize_t size
    cdef int number
    try:
        while count < _PIECES and count < len(pieces):
            PyObject_GetBuffer(pieces[count], &views[count], PyBUF_SIMPLE)
            vector[count].iov_base = views[count].buf
            vector[count].iov_len = views[count].len
            count += 1
        vector[0].iov_base = <char *> views[0].buf + skip
        vector[0].iov_len = views[0].len - skip
        memset(&message, 0, sizeof(message))
        message.msg_iov = vector
        message.msg_iovlen = count
        size = sendmsg(fd, &message, MSG_NOSIGNAL)
        number = errno
    finally:
        for at in range(count):
            PyBuffer_Release(&views[at])
    if size < 0:
        errno_set(number)
    return size


cdef object _lasting(piece):
    """``piece``, or a copy of it when whoever has it may change it."""
    if type(piece) is bytes:
        return piece
    if type(piece) is memoryview and type(piece.obj) is bytes and piece.format == "B" and piece.c_contiguous:
        return piece
    return bytes(piece)


cdef class Poller:
    """The epoll set of one event loop. Whoever is registered is kept alive by it."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self, loop):
        self.watched = []
        # Not the loop itself, which keeps this alive: it would never be let go.
        self.loop = weakref.ref(loop)
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            raise _os_error(errno)
        loop.add_reader(self.fd, self._dispatch)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def _dispatch(self):
        cdef epoll_event events[_BATCH]
        cdef int count = epoll_wait(self.fd, events, _BATCH, 0)
        cdef int at = 0
        try:
            while at < count:
                item = self._item(events[at].data.fd)
                if item is not None:
                    (<Watched>item).ready(events[at].events)
                at += 1
        except BaseException:
            # What was left of the batch would not be reported again.
            for at in range(at + 1, count):
                item = self._item(events[at].data.fd)
                if item is not None:
                    self.again(<Watched>item)
            raise

    cdef object _item(self, int fd):
        """Who an event is for. Descriptors are closed between batches only, so it is still the same."""
        item = self.watched[fd] if fd < len(self.watched) else None
        return item if item is not None and (<Watched>item).interest else None

    cdef int again(self, Watched item) except -1:
        """Tells once more of what is so now."""
        cdef epoll_event event
        event.events = item.interest
        event.data.fd = item.fd
        if item.interest and epoll_ctl(self.fd, EPOLL_CTL_MOD, item.fd, &event) < 0:
            raise _os_error(errno)
        return 0

    cdef int register(self, Watched item) except -1:
        while len(self.watched) <= item.fd:
            self.watched.append(None)
        self.watched[item.fd] = item
        return 0

    cdef int watch(self, Watched item, uint32_t interest) except -1:
        """Tells of ``interest`` from now on; 0: of nothing, not even of errors."""
        cdef epoll_event event
        cdef int operation = EPOLL_CTL_MOD
        if interest == item.interest:
            return 0
        if item.interest == 0:
            operation = EPOLL_CTL_ADD
        elif interest == 0:
            operation = EPOLL_CTL_DEL
        event.events = interest
        event.data.fd = item.fd
        if epoll_ctl(self.fd, operation, item.fd, &event) < 0:
            raise _os_error(errno)
        item.interest = interest
        return 0

    cdef int forget(self, Watched item) except -1:
        if 0 <= item.fd < len(self.watched) and self.watched[item.fd] is item:
            self.watched[item.fd] = None
        return 0


cdef class Watched:
    """What has a descriptor in an epoll set."""

    def __cinit__(self):
        self.fd = -1

    cdef int ready(self, uint32_t events) except -1:
        return 0


cdef class Wire(Watched):
    """One connected socket, an ``asyncio.Transport``. Made by ``attach``, ``dial`` and ``listen``."""

    def __dealloc__(self):
        # Only where the event loop ended before the connection did.
        if self.owner and self.fd >= 0:
            close(self.fd)

    cdef int begin(self, Poller poller, int fd, object sock, object protocol) except -1:
        self.poller = poller
        self.fd = fd
        self.sock = sock
        self.owner = sock is None
        self.protocol = protocol
        self.high = _HIGH
        self.low = _LOW
        poller.register(self)
        try:
            protocol.connection_made(self)
            self.settle()
        except BaseException:
            self.lost = self.closing = True
            if self.interest:
                poller.watch(self, 0)
            self.release()
            raise
        return 0

    cdef int settle(self) except -1:
        """Watches for what something can be done about."""
        cdef uint32_t interest = 0
        if self.lost:
            return 0
        if not (self.paused or self.ended or self.closing):
            interest = _READABLE
        if self.queue is not None:
            interest |= _WRITABLE
        if interest != self.interest:
            self.poller.watch(self, interest)
        if self.fault is not None and not interest & EPOLLIN:
            self.lose(self.fault)
        return 0

    cdef int ready(self, uint32_t events) except -1:
        # That a connection has failed is reported whatever was asked for; trying tells how.
        if self.queue is not None and events != EPOLLIN:
            self.flush()
        if self.interest & EPOLLIN and events != EPOLLOUT:
            self.receive(events & _OVER)
        return 0

    # -- from the peer

    cdef int receive(self, uint32_t over) except -1:
        """over: the peer has ended or reset the connection, which is not told again, so it is read to its end."""
        cdef ssize_t size
        cdef int reads = 0
        while True:
            size = recv(self.fd, _buffer, _RECEIVED, 0)
            if size <= 0:
                if size == 0:
                    return self.end()
                if errno == EINTR:
                    continue
                if errno == EAGAIN:
                    return 0
                return self.lose(_os_error(errno))
            try:
                data = PyBytes_FromStringAndSize(_buffer, size)
                self.protocol.data_received(data)
            except BaseException as error:
                return self.crashed("data_received", error)
            if not self.interest & EPOLLIN:
                return 0
            reads += 1
            if over and reads < _LAST_READS:
                continue
            if over or size == _RECEIVED:
                # There may be more, but others get their turn.
                self.poller.again(self)
            return 0

    cdef int end(self) except -1:
        if self.fault is not None:
            self.lose(self.fault)
            return 0
        self.ended = True
        self.settle()
        keep = False
        try:
            keep = self.protocol.eof_received()
        except BaseException as error:
            self.crashed("eof_received", error)
        if not keep:
            self.close()
        return 0

    def pause_reading(self):
        """Receives nothing until ``resume_reading``."""
        if not self.paused:
            self.paused = True
            self.settle()

    def resume_reading(self):
        """Receives again; nothing changes for a connection that has ended or is closing."""
        if self.paused:
            self.paused = False
            self.settle()

    def is_reading(self):
        """Whether more may be received."""
        return not (self.paused or self.ended or self.closing)

    # -- to the peer

    cpdef write(self, data):
        """Sends ``data`` or, as far as the system does not take it now, when it does; nothing while closing.

        Raises RuntimeError after ``write_eof``.
        """
        cdef ssize_t size
        if self.queue is not None or type(data) is not bytes or self.ending or self.closing or self.fault is not None:
            self.writelines((data,))
            return
        size = send(self.fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_NOSIGNAL)
        if size == PyBytes_GET_SIZE(data):
            return
        if size < 0:
            if errno != EAGAIN and errno != EINTR:
                self.failed(errno)
                return
            size = 0
        self.queue = [data]
        self.sent = size
        self.queued = PyBytes_GET_SIZE(data) - size
        self.settle()
        self.press()

    def writelines(self, pieces):
        """Sends them one after the other, with one call to the system if it takes all."""
        cdef list fresh
        if self.closing or self.fault is not None:
            return
        if self.ending:
            raise RuntimeError("Cannot call write() after write_eof()")
        fresh = [_lasting(piece) for piece in pieces if len(piece)]
        if not fresh:
            return
        for piece in fresh:
            self.queued += len(piece)
        if self.queue is not None:
            self.queue.extend(fresh)
        else:
            self.queue = fresh
            self.sent = 0
            self.flush()
        self.press()

    cdef int flush(self) except -1:
        cdef ssize_t size
        while self.queue is not None:
            size = _push(self.fd, self.queue, self.sent)
            if size >= 0:
                self.consume(size)
            elif errno == EAGAIN:
                break
            elif errno != EINTR:
                return self.failed(errno)
        if self.queue is None:
            if self.closing:
                return self.lose(None)
            if self.ending:
                shutdown(self.fd, SHUT_WR)
        self.settle()
        if self.blocked and self.queued <= self.low:
            self.blocked = False
            self.tell("resume_writing")
        return 0

    cdef int consume(self, Py_ssize_t size) except -1:
        cdef Py_ssize_t whole = 0
        cdef Py_ssize_t length
        self.queued -= size
        size += self.sent
        for piece in self.queue:
            length = len(piece)
            if size < length:
                break
            size -= length
            whole += 1
        self.sent = size
        if whole == len(self.queue):
            self.queue = None
        elif whole:
            del self.queue[:whole]
        return 0

    cdef int press(self) except -1:
        """Asks the protocol to write no more when too much is waiting."""
        if self.queued > self.high and not self.blocked and not self.lost:
            self.blocked = True
            self.tell("pause_writing")
        return 0

    cdef int tell(self, str what) except -1:
        try:
            getattr(self.protocol, what)()
        except BaseException as error:
            self.crashed(what, error)
        return 0

    cdef int failed(self, int number) except -1:
        """Writing is over. What the peer said before may still be there to be read."""
        error = _os_error(number)
        self.queue = None
        self.queued = 0
        if self.interest & EPOLLIN and (number == EPIPE or number == ECONNRESET):
            self.fault = error
            self.settle()
            return self.poller.again(self)
        return self.lose(error)

    def can_write_eof(self):
        """True: TCP has a half-close."""
        return True

    def write_eof(self):
        """Ends this direction after what was written."""
        if self.ending or self.closing:
            return
        self.ending = True
        if self.queue is None and self.fault is None:
            shutdown(self.fd, SHUT_WR)

    def get_write_buffer_size(self):
        """Bytes that the system has not taken yet."""
        return self.queued

    def get_write_buffer_limits(self):
        """(low, high) in bytes."""
        return self.low, self.high

    def set_write_buffer_limits(self, high=None, low=None):
        """More than ``high`` bytes waiting pause the protocol, not more than ``low`` let it go on. Raises ValueError."""
        if high is None:
            high = _HIGH if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high = high
        self.low = low
        self.press()

    # -- the end

    def is_closing(self):
        """Whether it is over, or will be when what was written is sent."""
        return self.closing

    def close(self):
        """Ends the connection after what was written; nothing is received any more."""
        if self.closing:
            return
        self.closing = True
        if self.queue is None:
            self.lose(self.fault)
        else:
            self.settle()

    def abort(self):
        """Ends the connection at once."""
        self.lose(None)

    cdef int lose(self, error) except -1:
        if self.lost:
            return 0
        self.lost = self.closing = True
        self.queue = None
        self.queued = 0
        self.poller.watch(self, 0)
        loop = self.poller.loop()
        if loop is None or loop.is_closed():
            self.release()
        else:
            loop.call_soon(self._finish, error)
        return 0

    def _finish(self, error):
        protocol = self.protocol
        self.protocol = None
        self.fault = None
        try:
            protocol.connection_lost(error)
        finally:
            self.release()

    cdef int crashed(self, str what, error) except -1:
        """The protocol failed, which nobody upstairs could handle."""
        asyncio.get_running_loop().call_exception_handler({
            "message": f"Fatal error: protocol.{what}() call failed.",
            "exception": error,
            "transport": self,
            "protocol": self.protocol,
        })
        self.lose(error)
        if not isinstance(error, Exception):
            raise error
        return 0

    cdef release(self):
        cdef int fd = self.fd
        sock = self.sock
        self.poller.forget(self)
        self.fd = -1
        self.sock = None
        if sock is not None:
            sock.close()
        elif self.owner and fd >= 0:
            close(fd)
        self.owner = False

    # -- facts

    def set_protocol(self, protocol):
        """Whoever hears of the connection from now on."""
        self.protocol = protocol

    def get_protocol(self):
        """Whoever hears of the connection."""
        return self.protocol

    def get_extra_info(self, name, default=None):
        """socket, sockname, peername, while the connection is open."""
        if self.fd < 0 or name not in ("socket", "sockname", "peername"):
            return default
        if self.sock is None:
            self.sock = socket.socket(fileno=self.fd)
            self.owner = False
        try:
            return self.sock if name == "socket" else getattr(self.sock, f"get{name}")()
        except OSError:
            return default


cdef class Listener(Watched):
    """Accepts on one listening socket until it is closed."""

    def __init__(self, factory, sock):
        self.factory = factory
        self.sock = sock
        self.fd = sock.fileno()
        self.poller = _poller_of(asyncio.get_running_loop())
        self.poller.register(self)
        self.poller.watch(self, EPOLLIN)

    @property
    def sockets(self):
        """The listening socket, while it listens."""
        return () if self.sock is None else (self.sock,)

    cdef int ready(self, uint32_t events) except -1:
        cdef int fd
        cdef int at
        # Bounded, so that those who are connected get their turn.
        for at in range(_ACCEPTED):
            fd = accept4(self.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd >= 0:
                self.accepted(fd)
            elif errno == EAGAIN:
                break
            elif errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
                self.breathe(_os_error(errno))
                break
            if self.sock is None:
                break
        return 0

    cdef int accepted(self, int fd) except -1:
        cdef Wire wire = Wire()
        try:
            protocol = self.factory()
        except BaseException:
            close(fd)
            raise
        wire.begin(self.poller, fd, None, protocol)
        return 0

    cdef int breathe(self, error) except -1:
        """Out of descriptors or memory: the backlog keeps the others waiting."""
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
        self.poller.watch(self, 0)
        loop.call_later(_BREATH_S, self._again)
        return 0

    def _again(self):
        if self.sock is not None:
            self.poller.watch(self, EPOLLIN)

    def close(self):
        """Accepts no more; what was accepted goes on."""
        sock = self.sock
        if sock is None:
            return
        self.sock = None
        self.poller.watch(self, 0)
        self.poller.forget(self)
        self.fd = -1
        sock.close()


async def listen(factory, sock, backlog):
    """Connects ``factory()`` to each connection that ``sock``, bound and TCP, accepts; gives what closes it again."""
    sock.setblocking(False)
    # Inherited by what is accepted.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.listen(backlog)
    return Listener(factory, sock)


async def attach(protocol, sock):
    """Connects ``protocol`` to a connected TCP socket, which belongs to the transport that this gives back."""
    cdef Wire wire = Wire()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.begin(_poller_of(asyncio.get_running_loop()), sock.fileno(), sock, protocol)
    return wire


async def dial(factory, address, port):
    """(transport, protocol) of a TCP connection to the IP ``address``. Raises OSError when it cannot be had."""
    cdef Wire wire = Wire()
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, (address, port))
        protocol = factory()
    except BaseException:
        sock.close()
        raise
    wire.begin(_poller_of(loop), sock.detach(), None, protocol)
    return wire, protocol
