"""Ports of loopback that stay free until somebody listens on them."""

from __future__ import annotations

import contextlib
import os
import random
import socket

# Below what the kernel gives to whoever asks for any port, so that nothing takes one between choosing and listening.
# Test processes that run side by side (pytest-xdist: gw0, gw1, ...) each have a part of their own.
_FIRST, _PART, _PARTS = 20_000, 1_500, 8
_random = random.SystemRandom()  # hypothesis repeats the numbers of the global one


def free_port() -> int:
    """A port that nothing listens on, and that only the caller will be given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
    first = _FIRST + worker * _PART
    while True:
        port = _random.randrange(first, first + _PART)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
