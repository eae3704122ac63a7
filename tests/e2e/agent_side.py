"""What the tests' agents use inside their jail: DNS and HTTP byte by byte, and attempts told by how they ended.

Only the standard library: it is copied beside the agent's script and imported there.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, TypedDict

A, NULL, PTR, TXT, AAAA, SVCB, HTTPS, AXFR, ANY = 1, 10, 12, 16, 28, 64, 65, 252, 255
NOERROR, NXDOMAIN, REFUSED = 0, 3, 5
PATIENCE_S = 5.0
_ECH = 0xFE0D


class Reply(TypedDict):
    """echoed: the question came back byte for byte, its letter case included."""

    rcode: int
    truncated: bool
    echoed: bool
    addresses: list[str]


def ask(name: str, kind: int = A, *, server: str = "127.0.0.1", tcp: bool = False) -> Reply:
    """One DNS question to that server; its letters go out as given. Raises OSError when nothing comes back."""
    wire = b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"
    asked = wire + struct.pack(">HH", kind, 1)
    query = struct.pack(">HHHHHH", secrets.randbelow(1 << 16), 0x0100, 1, 0, 0, 0) + asked
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect((server, 53))
        sock.sendall(struct.pack(">H", len(query)) + query if tcp else query)
        data = _exactly(sock, struct.unpack(">H", _exactly(sock, 2))[0]) if tcp else sock.recv(65535)
    return _read(data, query)


def lookup(name: str, kind: int = A) -> list[str]:
    """The addresses of a name, over TCP when they do not fit a datagram."""
    reply = ask(name, kind)
    return (ask(name, kind, tcp=True) if reply["truncated"] else reply)["addresses"]


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("the answer is cut off")
        data += piece
    return data


def _read(data: bytes, query: bytes) -> Reply:
    ident, flags, questions, answers, _, _ = struct.unpack_from(">HHHHHH", data)
    if ident != struct.unpack_from(">H", query)[0]:
        raise OSError("an answer to another question")
    at = len(query) if questions else 12
    echoed = data[12:at] == query[12:]
    addresses = []
    for _ in range(answers):
        length = struct.unpack_from(">H", data, at + 10)[0]
        addresses.append(str(ipaddress.ip_address(data[at + 12 : at + 12 + length])))
        at += 12 + length
    return {"rcode": flags & 15, "truncated": bool(flags & 0x0200), "echoed": echoed, "addresses": addresses}


def talk(address: str, port: int, data: bytes, *, sni: str | None = None, alpn: list[str] | None = None) -> str:
    """Everything that comes back for ``data``, as text; the name of the exception when nothing did."""
    received = b""
    try:
        with socket.create_connection((address, port), timeout=PATIENCE_S) as plain:
            with _wrapped(plain, sni, alpn) as sock:
                sock.sendall(data)
                while piece := sock.recv(65536):
                    received += piece
    except OSError as error:
        return received.decode("latin-1") or type(error).__name__
    return received.decode("latin-1") or "closed"


def _wrapped(sock: socket.socket, sni: str | None, alpn: list[str] | None) -> socket.socket:
    if sni is None:
        return sock
    context = ssl.create_default_context()
    if alpn is not None:
        context.set_alpn_protocols(alpn)
    return context.wrap_socket(sock, server_hostname=sni)


def get(host: str, path: str = "/", *fields: str) -> bytes:
    """A GET as bytes, asking to close the connection."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def ended(call: Callable[[], Any]) -> str:
    """``ok: RESULT``, or the name of the exception, with its errno where it has one."""
    try:
        return f"ok: {call()}"
    except OSError as error:
        return f"{type(error).__name__} {error.errno}"


def send_datagram(address: str, port: int, data: bytes = b"x") -> str:
    """How sending a datagram and waiting for one back ended."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.3)

        def exchange() -> bytes:
            sock.connect((address, port))
            sock.send(data)
            return sock.recv(1)

        return ended(exchange)


def client_hello(name: str, *, ech: bool) -> bytes:
    """A real ClientHello for that server name, with an encrypted_client_hello extension when asked."""
    out = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = out.read()
    return _with_extension(hello, _ECH, bytes(64)) if ech else hello


def _with_extension(record: bytes, kind: int, value: bytes) -> bytes:
    body = record[9:]
    at = 34
    at += 1 + body[at]
    at += 2 + struct.unpack_from(">H", body, at)[0]
    at += 1 + body[at]
    extensions = body[at + 2 :] + struct.pack(">HH", kind, len(value)) + value
    body = body[:at] + struct.pack(">H", len(extensions)) + extensions
    message = record[5:6] + len(body).to_bytes(3, "big") + body
    return record[:3] + struct.pack(">H", len(message)) + message
