"""One connection to a peer, opened as its agents would: plain, by TLS, or by TLS inside a CONNECT tunnel."""

from __future__ import annotations

import re
import socket
import ssl
from functools import cache

from peers.programs import NAME, Peer

PATIENCE_S = 30.0


def open_connection(peer: Peer) -> socket.socket:
    """A connection that requests can be written to. Raises OSError."""
    sock = socket.create_connection(("127.0.0.1", peer.port), PATIENCE_S)
    if peer.connect:
        sock.sendall(f"CONNECT {peer.connect} HTTP/1.1\r\nHost: {peer.connect}\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte:
                raise ConnectionError(f"{peer.name} closed instead of answering CONNECT: {head!r}")
            head += byte
        if not head.startswith((b"HTTP/1.1 2", b"HTTP/1.0 2")):
            raise ConnectionError(f"{peer.name} refused CONNECT: {head!r}")
    return _trusting().wrap_socket(sock, server_hostname=NAME) if peer.secure else sock


@cache
def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def get(sock: socket.socket, peer: Peer, path: str = "/") -> bytes:
    """The body of the answer to a GET, whose connection stays open. Raises ConnectionError unless it is a 200."""
    sock.sendall(f"GET {peer.prefix}{path} HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
    answer = b""
    while True:
        head, end, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if end and length and len(body) >= int(length[1]):
            break
        received = sock.recv(65536)
        if not received:
            raise ConnectionError(f"{peer.name} closed the connection after {answer[:200]!r}")
        answer += received
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"{peer.name} answered {head[:200]!r}")
    return body


def negotiated(peer: Peer) -> str:
    """Protocol and cipher of both sides, "" where the peer speaks no TLS."""
    if not peer.secure:
        return ""
    sock = open_connection(peer)
    try:
        assert isinstance(sock, ssl.SSLSocket)
        cipher = sock.cipher()
        client = f"{sock.version()} {cipher[0] if cipher else ''}"
        return f"{client} / {get(sock, peer, '/tls').decode()}"
    finally:
        sock.close()
