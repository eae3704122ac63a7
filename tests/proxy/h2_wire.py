"""HTTP/2 by hand: a blocking client that can send what no library would."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hpack import Decoder, Encoder

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 1, 3, 7, 8, 11


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of a RST_STREAM or GOAWAY."""
        return int.from_bytes(self.payload[4:8] if self.kind == GOAWAY else self.payload[:4], "big")


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


@dataclass
class Answer:
    """What came on one stream: its head, content and trailers, and the code it was reset with (-1: it was not)."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    interim: list[bytes] = field(default_factory=list)
    reset: int = -1

    @property
    def status(self) -> int:
        return int(self.headers.get(b":status", b"0"))


class Wire:
    """One connection. window: what the peer may send on each stream; greet: send preface and SETTINGS."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None, window: int | None = None, greet: bool = True) -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.sock: socket.socket = sock if tls is None else tls.wrap_socket(sock, server_hostname="localhost")
        self.encoder = Encoder()
        self.decoder = Decoder()
        self._data = b""
        self.acknowledges = True
        if greet:
            settings = b"" if window is None else b"\0\4" + window.to_bytes(4, "big")
            self.send(PREFACE + frame(SETTINGS, payload=settings))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Sends what the peer takes: one that has refused the connection may stop reading."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            return

    def block(self, *fields: tuple[bytes, bytes], method: bytes = b"GET", path: bytes = b"/good/", authority: bytes = b"h.test") -> bytes:
        return self.encoder.encode(
            [(b":method", method), (b":scheme", b"http"), (b":authority", authority), (b":path", path), *fields], huffman=False
        )

    def request(self, stream: int, *fields: tuple[bytes, bytes], end: bool = True, method: bytes = b"GET", path: bytes = b"/good/") -> None:
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.send(frame(HEADERS, flags, stream, self.block(*fields, method=method, path=path)))

    def frames(self) -> Iterator[Frame]:
        """What comes, until the peer closes or resets."""
        while True:
            while len(self._data) < 9 or len(self._data) < 9 + int.from_bytes(self._data[:3], "big"):
                try:
                    more = self.sock.recv(65536)
                except (ConnectionResetError, ssl.SSLError):
                    return
                if not more:
                    return
                self._data += more
            size = 9 + int.from_bytes(self._data[:3], "big")
            raw, self._data = self._data[:size], self._data[size:]
            got = Frame(raw[3], raw[4], int.from_bytes(raw[5:9], "big"), raw[9:])
            if self.acknowledges and got.kind == SETTINGS and not got.flags & ACK:
                self.send(frame(SETTINGS, ACK))
            yield got

    def answer(self, stream: int = 1) -> Answer:
        """The whole answer on one stream; flow control is left to the caller. Raises ConnectionError on GOAWAY or close."""
        answer = Answer()
        for got in self.frames():
            if got.kind == HEADERS:
                fields = self.decoder.decode(got.payload, raw=True)
                if got.stream != stream:
                    continue
                headers: dict[bytes, bytes] = {bytes(each[0]): bytes(each[1]) for each in fields}
                if answer.headers:
                    answer.trailers = headers
                elif headers[b":status"][:1] == b"1":
                    answer.interim.append(headers[b":status"])
                else:
                    answer.headers = headers
            elif got.kind == DATA and got.stream == stream:
                answer.body += got.payload
            elif got.kind == RST and got.stream == stream:
                answer.reset = got.code
                return answer
            elif got.kind == GOAWAY:
                raise ConnectionError(f"GOAWAY {got.code}")
            if got.kind in (HEADERS, DATA) and got.stream == stream and got.flags & END_STREAM:
                return answer
        raise ConnectionError("closed")

    def fate(self) -> list[int]:
        """Codes of the GOAWAY frames that come until the peer has closed."""
        return [got.code for got in self.frames() if got.kind == GOAWAY]
