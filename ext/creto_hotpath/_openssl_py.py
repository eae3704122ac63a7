"""What OpenSSL does for one connection: records in and content out, and the other way. Plain-Python form.

All of it goes through the objects of Python's ``ssl``. The compiled form asks libssl itself for what each record needs,
where that is proved to be safe, and else goes this way too.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

# Plaintext of one record (RFC 8446 section 5.1), and the longest record there is (RFC 5246 section 6.2.3).
FRAGMENT: Final = 16384
LONGEST: Final = 16384 + 2048


def choose(wanted: str) -> str:
    """The way that connections go from now on: "openssl", asking libssl itself, if wanted and possible; else "ssl"."""
    return "ssl"


class Engine:
    """One connection's session, and the bytes on both sides of it.

    A client's when there is a ``server_hostname``, else a server's. Whoever asks for the content of records gives them
    one by one, each with the one question: OpenSSL's buffer, which never shrinks, then holds one, and asking for more
    than there is costs an exception. Raises ValueError for a name that no certificate could be for.
    """

    def __init__(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        incoming = ssl.MemoryBIO()
        outgoing = ssl.MemoryBIO()
        self.session: ssl.SSLObject = context.wrap_bio(
            incoming, outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        # What SSLObject wraps, where it wraps something: two calls less for each record.
        inner: Any = getattr(self.session, "_sslobj", self.session)
        self._read = inner.read
        self._write = inner.write
        self._put = incoming.write
        self._out = outgoing.read

    @property
    def way(self) -> str:
        """How this connection goes; see ``choose``."""
        return "ssl"

    def put(self, data: bytes, start: int, end: int) -> None:
        """Takes those of the bytes that the peer sent. Raises ValueError when they are not within ``data``."""
        if not 0 <= start <= end <= len(data):
            raise ValueError("there are no such bytes")
        self._put(data if end - start == len(data) else memoryview(data)[start:end])

    def content(self, length: int) -> bytes | None:
        """The content of the record that was put in last, at most ``length`` bytes; None: it has none for the protocol.

        b"" is the peer's close_notify. Raises ssl.SSLError.
        """
        try:
            # Reading nothing would look like the end.
            content: bytes = self._read(max(1, min(length, LONGEST)))
        except ssl.SSLWantReadError:
            return None
        return content

    def seal(self, piece: bytes | memoryview, start: int) -> int:
        """Makes one record of ``piece`` from ``start`` on: how many bytes of it are in it. Raises ssl.SSLError.

        A record takes ``FRAGMENT`` bytes, or less if the peer asked for that (RFC 6066 section 4). Raises ValueError
        when there is nothing from ``start`` on.
        """
        if not 0 <= start < len(piece):
            raise ValueError("there is nothing to seal")
        if start == 0 and len(piece) <= FRAGMENT:
            return int(self._write(piece))
        return int(self._write(memoryview(piece)[start : start + FRAGMENT]))

    def out(self) -> bytes:
        """What there is to send to the peer."""
        return self._out()

    def rest(self) -> None:
        """Gives back the memory that only long records need; for when no more of them is at hand.

        Python's ssl has no way to.
        """
