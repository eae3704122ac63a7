"""What OpenSSL does for one connection: records in and content out, and the other way. Compiled form.

Contexts, handshakes, names, verification and goodbyes are Python's ``ssl`` alone. For the records of a connection that
is through its handshake it is a long way round, though, of exceptions, memoryviews and two calls each. This form finds
the ``SSL`` that the session's own object holds, and calls libssl on it as that object would.

It does so only where that is proved to be safe, which is looked at once per process; ``choose`` says what came of it:

- the interpreter is one whose ``_ssl`` was read: CPython 3.11 to 3.14, with its lock, on OpenSSL 3;
- the functions are those of the very library that ``_ssl`` calls: found from its own handle, of the same version, and a
  context's method table has the address they know it by (another copy of the library would have its own);
- the ``SSL`` stands where it is looked for. Its neighbours in the object are known by identity before it is touched:
  the context behind it is the one the session was made with, and OpenSSL agrees that it belongs to that;
- a connection of that kind shakes hands and carries bytes both ways, and tells why it failed when it was tampered with.

Where any of this does not hold, and for a session that looks different from the others, all goes through ``ssl``. The
interpreter's lock is held throughout: a record is small, and nobody else may use a connection at the same time.

OpenSSL notes errors in a queue per thread, which the calls of ``ssl`` read too: it is empty before each call, and after.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_XDECREF
from libc.stddef cimport size_t

import _ssl
import os
import ssl

cdef extern from *:
    """
    #include <dlfcn.h>

    /* How the objects of Modules/_ssl.c begin, in every version named here. */
    typedef struct { PyObject_HEAD void *socket; void *ssl; PyObject *context; } creto_session;
    typedef struct { PyObject_HEAD void *ctx; } creto_context;

    #if defined(PYPY_VERSION) || defined(Py_GIL_DISABLED) || PY_VERSION_HEX < 0x030B0000 || PY_VERSION_HEX >= 0x030F0000
    #define CRETO_KNOWN_SSL 0
    #else
    #define CRETO_KNOWN_SSL 1
    #endif
    """
    ctypedef struct creto_session:
        void* socket
        void* ssl
        PyObject* context
    ctypedef struct creto_context:
        void* ctx
    const int CRETO_KNOWN_SSL
    void* dlopen(const char* path, int flags)
    void* dlsym(void* handle, const char* name)
    const int RTLD_LAZY, RTLD_NOLOAD
    int _PyBytes_Resize(PyObject** content, Py_ssize_t size) except -1
    PyObject* fresh_bytes "PyBytes_FromStringAndSize"(const char* content, Py_ssize_t size) except NULL

# Plaintext of one record (RFC 8446 section 5.1), and the longest record there is (RFC 5246 section 6.2.3).
cdef enum:
    _FRAGMENT = 16384
    _LONGEST = 16384 + 2048
    _INT_MAX = 0x7FFFFFFF
    # What a buffer between two records may hold on to.
    _SMALL = 4096
# openssl/ssl.h, bio.h and crypto.h
cdef enum:
    _ERROR_SSL = 1
    _WANT_READ = 2
    _ZERO_RETURN = 6
    _OPENSSL_VERSION = 0
    _CLOSE = 1
    _SET_BUF_MEM = 114
    _GET_BUF_MEM = 115

FRAGMENT = _FRAGMENT
LONGEST = _LONGEST

# openssl/buffer.h
cdef struct Buffer:
    size_t length
    char* data
    size_t max
    unsigned long flags

cdef struct Library:
    int (*SSL_read)(void*, void*, int) noexcept
    int (*SSL_write)(void*, const void*, int) noexcept
    int (*SSL_get_error)(void*, int) noexcept
    void* (*SSL_get_rbio)(void*) noexcept
    void* (*SSL_get_wbio)(void*) noexcept
    void* (*SSL_get_SSL_CTX)(void*) noexcept
    void* (*SSL_CTX_get_ssl_method)(void*) noexcept
    void* (*TLS_client_method)() noexcept
    void* (*TLS_server_method)() noexcept
    int (*BIO_read)(void*, void*, int) noexcept
    int (*BIO_write)(void*, const void*, int) noexcept
    size_t (*BIO_ctrl_pending)(void*) noexcept
    long (*BIO_ctrl)(void*, int, long, void*) noexcept
    Buffer* (*BUF_MEM_new)() noexcept
    void (*BUF_MEM_free)(Buffer*) noexcept
    unsigned long (*ERR_peek_error)() noexcept
    unsigned long (*ERR_peek_last_error)() noexcept
    void (*ERR_clear_error)() noexcept
    const char* (*ERR_lib_error_string)(unsigned long) noexcept
    const char* (*ERR_reason_error_string)(unsigned long) noexcept
    const char* (*OpenSSL_version)(int) noexcept

cdef Library lib
# Whether connections go straight to it from now on, and whether it was proved that they can; None: not looked at yet.
cdef bint _straight = False
_proved = None


def choose(str wanted):
    """The way that connections go from now on: "openssl", asking libssl itself, if wanted and possible; else "ssl"."""
    global _straight, _proved
    if wanted == "openssl" and _proved is None:
        _proved = _bound() and _works()
    _straight = wanted == "openssl" and _proved
    return "openssl" if _straight else "ssl"


@cython.no_gc_clear
cdef class Engine:
    """One connection's session, and the bytes on both sides of it; see ``_openssl_py.Engine``."""

    def __init__(self, context, server_hostname):
        self._ssl = NULL
        incoming = ssl.MemoryBIO()
        outgoing = ssl.MemoryBIO()
        self.session = context.wrap_bio(
            incoming, outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._inner = getattr(self.session, "_sslobj", self.session)
        # The handshake may have been long.
        self._swollen = True
        self._ssl = _find(self._inner, context) if _straight else NULL
        if self._ssl is not NULL:
            # The SSL owns them as much as the objects they were made by.
            self._incoming = lib.SSL_get_rbio(self._ssl)
            self._outgoing = lib.SSL_get_wbio(self._ssl)
            if self._incoming is not NULL and self._outgoing is not NULL:
                return
            self._ssl = NULL
        self._read = self._inner.read
        self._write = self._inner.write
        self._put = incoming.write
        self._out = outgoing.read

    @property
    def way(self):
        """How this connection goes; see ``choose``."""
        return "ssl" if self._ssl is NULL else "openssl"

    cpdef put(self, bytes data, Py_ssize_t start, Py_ssize_t end):
        """Takes those of the bytes that the peer sent. Raises ValueError when they are not within ``data``."""
        cdef int size
        if not 0 <= start <= end <= PyBytes_GET_SIZE(data):
            raise ValueError("there are no such bytes")
        if self._ssl is NULL:
            self._put(data if end - start == PyBytes_GET_SIZE(data) else memoryview(data)[start:end])
            return
        while start < end:
            size = <int>min(end - start, <Py_ssize_t>_LONGEST)
            if lib.BIO_write(self._incoming, PyBytes_AS_STRING(data) + start, size) != size:
                lib.ERR_clear_error()
                raise MemoryError
            start += size

    cpdef bytes content(self, Py_ssize_t length):
        """The content of the record that was put in last, at most ``length`` bytes; None: it has none for the protocol.

        b"" is the peer's close_notify. Raises ssl.SSLError.
        """
        cdef PyObject* content
        cdef int got
        if length > _SMALL:
            self._swollen = True
        # Reading nothing would look like the end.
        length = max(1, min(length, <Py_ssize_t>_LONGEST))
        if self._ssl is NULL:
            try:
                return self._read(length)
            except ssl.SSLWantReadError:
                return None
        content = fresh_bytes(NULL, length)
        _forget()
        got = lib.SSL_read(self._ssl, PyBytes_AS_STRING(<object>content), <int>length)
        if 0 < got <= length:
            # Nothing that OpenSSL did not write is left in it.
            _PyBytes_Resize(&content, got)
            read = <bytes>content
            Py_XDECREF(content)
            return read
        Py_XDECREF(content)
        return self._unread(got)

    cdef bytes _unread(self, int got):
        cdef int code = lib.SSL_get_error(self._ssl, got)
        if code == _WANT_READ:
            _forget()
            return None
        if code == _ZERO_RETURN:
            _forget()
            return b""
        raise _error(code)

    cpdef Py_ssize_t seal(self, piece, Py_ssize_t start) except -1:
        """Makes one record of ``piece`` from ``start`` on: how many bytes of it are in it. Raises ssl.SSLError.

        A record takes ``FRAGMENT`` bytes, or less if the peer asked for that (RFC 6066 section 4). Raises ValueError
        when there is nothing from ``start`` on.
        """
        cdef Py_buffer view
        if self._ssl is NULL:
            if not 0 <= start < len(piece):
                raise ValueError("there is nothing to seal")
            if start == 0 and len(piece) <= _FRAGMENT:
                return self._write(piece)
            return self._write(memoryview(piece)[start : start + _FRAGMENT])
        if PyBytes_CheckExact(piece):
            return self._seal(PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece), start)
        PyObject_GetBuffer(piece, &view, PyBUF_SIMPLE)
        try:
            return self._seal(<const char*>view.buf, view.len, start)
        finally:
            PyBuffer_Release(&view)

    cdef Py_ssize_t _seal(self, const char* octets, Py_ssize_t size, Py_ssize_t start) except -1:
        cdef int sent, wanted
        if not 0 <= start < size:
            raise ValueError("there is nothing to seal")
        wanted = <int>min(size - start, <Py_ssize_t>_FRAGMENT)
        _forget()
        sent = lib.SSL_write(self._ssl, octets + start, wanted)
        if wanted > _SMALL:
            self._swollen = True
        if 0 < sent <= wanted:
            return sent
        raise _error(lib.SSL_get_error(self._ssl, sent))

    cpdef bytes out(self):
        """What there is to send to the peer."""
        cdef size_t pending
        cdef bytes out
        if self._ssl is NULL:
            return self._out()
        pending = lib.BIO_ctrl_pending(self._outgoing)
        if pending == 0:
            return b""
        if pending > _INT_MAX:
            raise MemoryError
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>pending)
        if lib.BIO_read(self._outgoing, PyBytes_AS_STRING(out), <int>pending) != <int>pending:
            lib.ERR_clear_error()
            raise MemoryError
        return out

    cpdef rest(self):
        """Gives back the memory that only long records need; for when no more of them is at hand."""
        if self._swollen and self._ssl is not NULL:
            self._swollen = not (_shrunk(self._incoming) and _shrunk(self._outgoing))


cdef bint _shrunk(void* bio) noexcept:
    """Has a memory BIO, whose buffer never shrinks, begin with a new one if it has grown. False while it is not empty."""
    cdef Buffer* grown = NULL
    cdef Buffer* fresh
    if lib.BIO_ctrl_pending(bio) != 0:
        return False
    if lib.BIO_ctrl(bio, _GET_BUF_MEM, 0, <void*>&grown) > 0 and grown is not NULL and grown.max > _SMALL:
        fresh = lib.BUF_MEM_new()
        # Taking the new one, it frees the other.
        if fresh is not NULL and lib.BIO_ctrl(bio, _SET_BUF_MEM, _CLOSE, <void*>fresh) <= 0:
            lib.BUF_MEM_free(fresh)
        _forget()
    return True


cdef inline void _forget() noexcept:
    """Empties the queue of errors. It is as good as always, and looking costs less."""
    if lib.ERR_peek_error() != 0:
        lib.ERR_clear_error()


cdef object _error(int code):
    """What Python's ssl would raise for the error at the end of the queue, which is empty then."""
    cdef unsigned long number = lib.ERR_peek_last_error()
    cdef const char* library = lib.ERR_lib_error_string(number) if number else NULL
    cdef const char* reason = lib.ERR_reason_error_string(number) if number else NULL
    lib.ERR_clear_error()
    if reason is NULL:
        return ssl.SSLError(code, "A failure in the SSL library occurred")
    text = reason.decode("utf-8", "replace")
    name = text.upper().replace(" ", "_")
    kind = "SSL" if library is NULL else library.decode("utf-8", "replace").removesuffix(" routines")
    error = ssl.SSLError(_ERROR_SSL, f"[{kind}: {name}] {text}")
    error.library = kind
    error.reason = name
    return error


# -- whether it may be


cdef bint _bound() except -1:
    """Finds the functions in the library that ``_ssl`` was linked with."""
    cdef void* handle
    if not CRETO_KNOWN_SSL or not ssl.OPENSSL_VERSION.startswith("OpenSSL 3."):
        return False
    path = getattr(_ssl, "__file__", None)
    if path is None:
        handle = dlopen(NULL, RTLD_LAZY)
    else:
        encoded = os.fsencode(path)
        handle = dlopen(encoded, RTLD_LAZY | RTLD_NOLOAD)
    if handle is NULL:
        return False
    lib.SSL_read = <int (*)(void*, void*, int) noexcept>dlsym(handle, b"SSL_read")
    lib.SSL_write = <int (*)(void*, const void*, int) noexcept>dlsym(handle, b"SSL_write")
    lib.SSL_get_error = <int (*)(void*, int) noexcept>dlsym(handle, b"SSL_get_error")
    lib.SSL_get_rbio = <void* (*)(void*) noexcept>dlsym(handle, b"SSL_get_rbio")
    lib.SSL_get_wbio = <void* (*)(void*) noexcept>dlsym(handle, b"SSL_get_wbio")
    lib.SSL_get_SSL_CTX = <void* (*)(void*) noexcept>dlsym(handle, b"SSL_get_SSL_CTX")
    lib.SSL_CTX_get_ssl_method = <void* (*)(void*) noexcept>dlsym(handle, b"SSL_CTX_get_ssl_method")
    lib.TLS_client_method = <void* (*)() noexcept>dlsym(handle, b"TLS_client_method")
    lib.TLS_server_method = <void* (*)() noexcept>dlsym(handle, b"TLS_server_method")
    lib.BIO_read = <int (*)(void*, void*, int) noexcept>dlsym(handle, b"BIO_read")
    lib.BIO_write = <int (*)(void*, const void*, int) noexcept>dlsym(handle, b"BIO_write")
    lib.BIO_ctrl_pending = <size_t (*)(void*) noexcept>dlsym(handle, b"BIO_ctrl_pending")
    lib.BIO_ctrl = <long (*)(void*, int, long, void*) noexcept>dlsym(handle, b"BIO_ctrl")
    lib.BUF_MEM_new = <Buffer* (*)() noexcept>dlsym(handle, b"BUF_MEM_new")
    lib.BUF_MEM_free = <void (*)(Buffer*) noexcept>dlsym(handle, b"BUF_MEM_free")
    lib.ERR_peek_error = <unsigned long (*)() noexcept>dlsym(handle, b"ERR_peek_error")
    lib.ERR_peek_last_error = <unsigned long (*)() noexcept>dlsym(handle, b"ERR_peek_last_error")
    lib.ERR_clear_error = <void (*)() noexcept>dlsym(handle, b"ERR_clear_error")
    lib.ERR_lib_error_string = <const char* (*)(unsigned long) noexcept>dlsym(handle, b"ERR_lib_error_string")
    lib.ERR_reason_error_string = <const char* (*)(unsigned long) noexcept>dlsym(handle, b"ERR_reason_error_string")
    lib.OpenSSL_version = <const char* (*)(int) noexcept>dlsym(handle, b"OpenSSL_version")
    return _complete() and lib.OpenSSL_version(_OPENSSL_VERSION).decode() == ssl.OPENSSL_VERSION


cdef bint _complete() noexcept:
    cdef void** functions = <void**>&lib
    cdef size_t at
    for at in range(sizeof(Library) // sizeof(void*)):
        if functions[at] is NULL:
            return False
    return True


cdef void* _find(inner, context) except? NULL:
    """The ``SSL`` of a session that was made with that context; NULL when it does not look as it should."""
    cdef creto_session* session
    cdef void* ctx
    if type(inner) is not _ssl._SSLSocket or not isinstance(context, _ssl._SSLContext):
        return NULL
    if (
        (<PyTypeObject*>_ssl._SSLSocket).tp_basicsize < <Py_ssize_t>sizeof(creto_session)
        or (<PyTypeObject*>_ssl._SSLContext).tp_basicsize < <Py_ssize_t>sizeof(creto_context)
    ):
        return NULL
    session = <creto_session*><PyObject*>inner
    if session.context != <PyObject*>context or session.ssl is NULL:
        return NULL
    ctx = (<creto_context*><PyObject*>context).ctx
    if ctx is NULL or lib.SSL_get_SSL_CTX(session.ssl) != ctx:
        return NULL
    return session.ssl


def finds(inner, context):
    """Whether a session's own object is taken for one that was made with that context. Asks for ``choose`` first."""
    return bool(_proved) and _find(inner, context) is not NULL


cdef bint _same_library(context, void* method) except -1:
    return lib.SSL_CTX_get_ssl_method((<creto_context*><PyObject*>context).ctx) == method


cdef bint _works() except -1:
    """Shakes hands with itself, carries bytes both ways, and hears why what was tampered with is refused."""
    global _straight
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    try:
        for context in (server_context, client_context):
            # Without certificates, of which there are none yet; these two speak to nobody else.
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("AECDH:@SECLEVEL=0")
        _straight = True
        server, client = Engine(server_context, None), Engine(client_context, "proof.invalid")
        if server.way != "openssl" or client.way != "openssl":
            return False
        if not _same_library(server_context, lib.TLS_server_method()):
            return False
        if not _same_library(client_context, lib.TLS_client_method()):
            return False
        _shake(client, server)
        return _carries(client, server) and _carries(server, client) and _refuses(client, server)
    except (AttributeError, OSError, TypeError, ValueError):
        return False
    finally:
        _straight = False


def _shake(client, server):
    """Raises ssl.SSLError when the two do not come to terms."""
    for side, other in ((client, server), (server, client), (client, server), (server, client)):
        try:
            side.session.do_handshake()
        except ssl.SSLWantReadError:
            pass
        _hand_over(side, other)


def _hand_over(sender, receiver):
    said = sender.out()
    receiver.put(said, 0, len(said))


def _carries(sender, receiver):
    said = bytes(range(256)) * 64
    if sender.seal(said, 0) != len(said):
        return False
    _hand_over(sender, receiver)
    if receiver.content(_LONGEST) != said or receiver.content(1) is not None:
        return False
    sender.rest()
    receiver.rest()
    sender.seal(b"and more", 0)
    _hand_over(sender, receiver)
    return receiver.content(_LONGEST) == b"and more"


def _refuses(sender, receiver):
    sender.seal(b"untouched", 0)
    said = bytearray(sender.out())
    said[len(said) - 1] ^= 1
    receiver.put(bytes(said), 0, len(said))
    try:
        receiver.content(_LONGEST)
    except ssl.SSLError as error:
        return "MAC" in str(error) and lib.ERR_peek_error() == 0
    return False
