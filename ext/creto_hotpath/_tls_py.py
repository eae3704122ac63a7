# cython: annotation_typing=False, nonecheck=True
"""TLS on a connection: between the event loop's transport and the protocol that speaks under it.

This one source runs as plain Python and, with the C types of ``_tls_c.pxd``, compiled. What may be spoken (versions,
ciphers, certificates, names, ALPN) is the ``ssl.SSLContext``'s alone, and OpenSSL does all of it; this layer carries
bytes between an ``Engine`` and the two sides. It follows the headers of the records, so the engine is asked once for
each whole record, and for exactly what it holds.

RFC 8446, RFC 5246 and RFC 5746: what ends the connection without a close_notify is a truncation, which the protocol
sees as a loss; there is no half-close; a peer's wish to renegotiate is refused by the context.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from creto_hotpath import _openssl_py as openssl
elif __name__.endswith("_c"):
    import creto_hotpath._openssl_c as openssl
else:
    import creto_hotpath._openssl_py as openssl

# What a connection is doing.
_SHAKING, _OPEN, _LINGERING, _OVER = range(4)

_HEADER = 5
# The types of RFC 8446 section 5.1 and heartbeat.
_FIRST_TYPE, _LAST_TYPE, _MAJOR = 20, 24, 3
_LONGEST, _FRAGMENT = openssl.LONGEST, openssl.FRAGMENT
# Tickets, new keys and empty records in a row, before somebody is only keeping us busy.
_SILENT_LIMIT = 64
# After close(): how long the peer may take to read what was written and to end its side, and what it may still send.
_LINGER_S = 30.0
_LINGER_BYTES = 1 << 20
# What the session is asked for by the names that transports use.
_FACTS = {"peercert": "getpeercert", "cipher": "cipher", "compression": "compression"}


class Records:
    """Where the records of one direction end (RFC 8446 section 5.1), whatever pieces they come in.

    length: of the content of the record that was entered last. whole: whether ``follow`` came to its end. broken: what
    was followed is no TLS; there is nothing to follow any more.
    """

    def __init__(self) -> None:
        self.length = 0
        self.whole = False
        self.broken = False
        self._seen = 0
        self._left = 0

    def follow(self, data: bytes, start: int) -> int:
        """Follows ``data`` from ``start``: where the record under way ends, or the end of ``data`` if that is first."""
        size = len(data)
        octets = data
        at = start
        self.whole = False
        while self._seen < _HEADER:
            if at >= size:
                return size
            byte = octets[at]
            at += 1
            if self._seen == 0:
                self.broken = byte < _FIRST_TYPE or byte > _LAST_TYPE
            elif self._seen == 1:
                self.broken = byte != _MAJOR
            elif self._seen == 3:
                self.length = byte << 8
            elif self._seen == 4:
                self.length += byte
                self._left = self.length
                self.broken = self.length > _LONGEST
            self._seen += 1
            if self.broken:
                return size
        if self._left > size - at:
            self._left -= size - at
            return size
        at += self._left
        self._left = 0
        self._seen = 0
        self.whole = True
        return at


class Secured:
    """One connection under TLS: the protocol of a plain transport, and the transport of ``protocol``.

    protocol: connected when the handshake is done; hears of the connection from then on only. context: a client's when
    ``server_hostname`` is given, else a server's. timeout_s: for the handshake; None when whoever waits bounds it.
    Raises ValueError for a name that no certificate could be for.
    """

    def __init__(
        self,
        protocol: Any,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.state = _SHAKING
        self.engine = openssl.Engine(context, server_hostname)
        self.session = self.engine.session
        self.records = Records()
        self.protocol = protocol
        self._deliver = protocol.data_received
        self.timeout_s = timeout_s
        self.loop: Any = None
        self.plain: Any = None
        self._send: Any = None
        self.connected = False
        self.closing = False
        self.paused = False
        self.reading = True
        self.ended = False
        self.silent = 0
        self.drained = 0
        self.unsent = 0
        self.held: bytes | None = None
        self.error: BaseException | None = None
        self._timer: Any = None
        self._waiter: Any = None

    # -- the handshake

    def secured(self) -> asyncio.Future[None]:
        """Done when the handshake is. Raises what broke it: ssl.SSLError, ssl.SSLCertVerificationError, OSError."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        if self.connected or self.state == _OVER:
            self._tell()
        return waiter

    def _tell(self) -> None:
        waiter = self._waiter
        self._waiter = None
        if waiter is None or waiter.done():
            return
        if self.connected and self.error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(self.error or ConnectionResetError("the TLS handshake was broken off"))

    def connection_made(self, transport: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.plain = transport
        self._send = transport.write
        if self.timeout_s is not None:
            self._timer = self.loop.call_later(self.timeout_s, self._late)
        self._shake()

    def _late(self) -> None:
        self._timer = None
        text = f"SSL handshake is taking longer than {self.timeout_s} seconds: aborting the connection"
        self._fail(ConnectionAbortedError(text))

    def _shake(self) -> None:
        try:
            self.session.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._fail(error)
            return
        self._flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.state = _OPEN
        self.connected = True
        self.protocol.connection_made(self)
        self._tell()

    def _greet(self, data: bytes) -> None:
        """Bytes of the handshake; what follows it waits for whoever waits for the handshake."""
        at = 0
        while at < len(data):
            end = self.records.follow(data, at)
            self.engine.put(data, at, end)
            at = end
            if self.records.whole or self.records.broken:
                self._shake()
                if self.state != _SHAKING:
                    break
                if self.records.broken:
                    self._garbage()
                    return
        if at < len(data) and self.state == _OPEN:
            self.held = data[at:]
            self._flow()
            self.loop.call_soon(self._catch_up)

    # -- from the peer

    def data_received(self, data: bytes) -> None:
        if self.state == _OPEN:
            if self.held is None:
                self._decrypt(data)
            else:
                self.held += data
        elif self.state == _SHAKING:
            self._greet(data)
        elif self.state == _LINGERING:
            self.drained += len(data)
            if self.drained > _LINGER_BYTES:
                self.plain.abort()

    def _decrypt(self, data: bytes) -> None:
        """A record, a piece of one, or several, whose contents are given on together, as they came."""
        records = self.records
        size = len(data)
        start = 0
        whole = b""
        parts: list[bytes] | None = None
        while start < size and self.state == _OPEN and not self.ended:
            end = records.follow(data, start)
            self.engine.put(data, start, end)
            start = end
            if not (records.whole or records.broken):
                break
            content = self._content()
            if records.broken:
                self._garbage()
            if parts is not None:
                parts.append(content)
            elif not whole:
                whole = content
            elif content:
                parts = [whole, content]
        self.engine.rest()
        if parts is not None:
            whole = b"".join(parts)
        if whole:
            self._deliver(whole)
        if self.ended:
            self._end()

    def _content(self) -> bytes:
        """The content of the record that was put in last; b"" when it has none for the protocol."""
        try:
            # The record is never shorter than its content: there is no compression.
            content = self.engine.content(self.records.length)
        except ssl.SSLError as error:
            self._fail(error)
            return b""
        if content is None:
            self._aside()
            return b""
        if content:
            self.silent = 0
        else:
            self.ended = True
        return content

    def _aside(self) -> None:
        """A message of TLS itself was taken note of, and may have been answered."""
        self.silent += 1
        if self.silent > _SILENT_LIMIT:
            self._fail(ConnectionAbortedError("the peer sends nothing but messages of TLS itself"))
        else:
            self._flush()

    def _garbage(self) -> None:
        """No TLS, although OpenSSL would have waited for more of it."""
        if self.state == _SHAKING or self.state == _OPEN:
            self._fail(ssl.SSLError(ssl.SSL_ERROR_SSL, "what was received is no TLS record"))

    def _catch_up(self) -> None:
        data = self.held
        if data is None or self.paused or self.state != _OPEN:
            return
        self.held = None
        try:
            self._decrypt(data)
        except BaseException:
            self.abort()  # as a transport does when its protocol fails
            raise
        self._flow()

    def _flow(self) -> None:
        wanted = self.state != _OPEN or not (self.paused or self.held is not None)
        if wanted == self.reading:
            return
        self.reading = wanted
        if wanted:
            self.plain.resume_reading()
        else:
            self.plain.pause_reading()

    def eof_received(self) -> bool:
        """The connection ended below TLS. Without a close_notify that is no end of what was said, but a loss."""
        if self.state == _SHAKING:
            self._fail(ConnectionResetError("the connection was closed during the TLS handshake"))
        elif self.state == _OPEN:
            self.closing = True
            self._linger()
        return False

    def _end(self) -> None:
        """The peer's close_notify. Its other half, ours, follows at once: to TLS 1.2 there is no half-close."""
        if self.state != _OPEN:
            return
        self.protocol.eof_received()
        self.close()

    def pause_writing(self) -> None:
        if self.state == _OPEN:
            self.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self.state == _OPEN:
            self.protocol.resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        connected = self.connected
        protocol = self.protocol
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.error = self.error or exc
        self.state = _OVER
        self.closing = True
        self.held = None
        self.protocol = None
        self._deliver = None
        self._tell()
        if connected:
            protocol.connection_lost(self.error)

    # -- from the protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends ``data``; nothing once the connection is closing."""
        size = len(data)
        if size == 0 or self.state != _OPEN:
            return
        if size > _FRAGMENT or not isinstance(data, bytes):
            self.writelines((data,))
            return
        try:
            sent = self.engine.seal(data, 0)
        except ssl.SSLError as error:
            self._fail(error)
            return
        self._send(self.engine.out())
        self.engine.rest()
        if sent < size:
            self.writelines((data[sent:],))

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Sends them one after the other, with one call to the system if it takes all."""
        if self.state != _OPEN:
            return
        out: list[bytes] = []
        try:
            for piece in pieces:
                octets = piece if isinstance(piece, bytes) else memoryview(piece).cast("B")
                size = len(octets)
                sent = 0
                while sent < size:
                    sent += self.engine.seal(octets, sent)
                    out.append(self.engine.out())
        except ssl.SSLError as error:
            self._fail(error)
            return
        self.engine.rest()
        self.plain.writelines(out)

    def _flush(self) -> None:
        """Sends what OpenSSL has to say on its own account."""
        out = self.engine.out()
        if out and not self.plain.is_closing():
            self._send(out)

    def pause_reading(self) -> None:
        self.paused = True
        if self.state == _OPEN:
            self._flow()

    def resume_reading(self) -> None:
        self.paused = False
        if self.state != _OPEN:
            return
        if self.held is None:
            self._flow()
        else:
            # Not from within this call: whoever resumes is not yet ready to receive.
            self.loop.call_soon(self._catch_up)

    def is_reading(self) -> bool:
        return not self.paused and not self.closing

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol
        self._deliver = protocol.data_received

    def get_protocol(self) -> Any:
        return self.protocol

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        """False: not every version has a half-close."""
        return False

    def write_eof(self) -> None:
        raise NotImplementedError("TLS has no half-close")

    def get_write_buffer_size(self) -> int:
        """Bytes that the system has not taken yet, as encrypted."""
        return 0 if self.state == _OVER else int(self.plain.get_write_buffer_size())

    def get_write_buffer_limits(self) -> tuple[int, int]:
        limits: tuple[int, int] = self.plain.get_write_buffer_limits()
        return limits

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self.state != _OVER:
            self.plain.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Of the session: ssl_object, sslcontext, peercert, cipher, compression; else of the plain transport."""
        if name == "ssl_object":
            return self.session
        if name == "sslcontext":
            return self.session.context
        if name in _FACTS:
            return getattr(self.session, _FACTS[name])()
        return default if self.state == _OVER else self.plain.get_extra_info(name, default)

    # -- the end

    def close(self) -> None:
        """Says goodbye after what was written, then waits a while for the peer to end its side."""
        if self.closing:
            return
        if self.state == _SHAKING:
            self.abort()
            return
        self.closing = True
        try:
            self.session.unwrap()
        except ssl.SSLError:
            pass  # the peer has not answered; what was there to say is said
        if self.plain.is_closing():
            return
        self._flush()
        self._linger()
        if self.ended:
            self.plain.close()
        else:
            # What the peer still sends is thrown away: closing over it would reset what it has not read yet.
            self.plain.write_eof()
            self._flow()

    def _linger(self) -> None:
        self.state = _LINGERING
        self.held = None
        self.unsent = self.plain.get_write_buffer_size()
        self._timer = self.loop.call_later(_LINGER_S, self._impatient)

    def _impatient(self) -> None:
        self._timer = None
        unsent = self.plain.get_write_buffer_size()
        if 0 < unsent < self.unsent:
            self.unsent = unsent
            self._timer = self.loop.call_later(_LINGER_S, self._impatient)
        else:
            self.plain.abort()

    def abort(self) -> None:
        """Ends the connection at once, and without a close_notify."""
        if self.state == _OVER:
            return
        self.closing = True
        self.state = _OVER
        self.held = None
        if self.plain is not None:
            self.plain.abort()

    def _fail(self, error: BaseException) -> None:
        """Ends the connection for a reason that the protocol is told, and the peer if TLS has an alert for it."""
        if self.state == _OVER:
            return
        self.error = error
        self._flush()
        self.abort()
