"""What HTTP/2 framing costs: both framings in one process, the same exchanges, alternating.

One exchange: a client session opens a stream with ten fields and 1 KiB, a server session answers with ten fields and
1 KiB; bytes are handed over in memory, so this is framing, HPACK, flow control and events, without sockets.
"""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import pytest

from creto_hotpath.h2 import END, HEADERS

EXCHANGES, ROUNDS = 200, 7
FIELDS = [(b"x-field-%d" % n, b"some value of ordinary length %d" % n) for n in range(10)]
TARGET = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"api.example.com"), (b":path", b"/v1/x")]
REQUEST = [*TARGET, *FIELDS]
RESPONSE = [(b":status", b"200"), *FIELDS]


def exchanges(session: Any) -> float:
    """Microseconds of CPU per exchange, both sides together."""
    client, server = session(True), session(False)
    server.receive(client.to_send())
    client.receive(server.to_send())
    body = b"x" * 1024
    started = time.process_time()
    for _ in range(EXCHANGES):
        stream = client.open(REQUEST, False)
        client.write(stream, body)
        client.end(stream)
        for kind, number, _, _ in server.receive(client.to_send()):
            if kind == HEADERS:
                server.headers(number, RESPONSE, False)
            elif kind == END:
                server.consume(number, len(body))
                server.write(number, body)
                server.end(number)
        events = client.receive(server.to_send())
        assert (END, stream, None, 0) in events
        client.consume(stream, len(body))
        server.take_events()
    return (time.process_time() - started) / EXCHANGES * 1e6


def bench_framing() -> None:
    if find_spec("creto_hotpath._h2_c") is None:
        pytest.skip("creto was built without nghttp2, so there is nothing to compare")
    modules = (("nghttp2", "c"), ("h2", "py"))
    framings = {name: import_module(f"creto_hotpath._h2_{kind}").Session for name, kind in modules}
    taken: dict[str, list[float]] = {name: [] for name in framings}
    for _ in range(ROUNDS):
        for name, session in framings.items():
            taken[name].append(exchanges(session))
    for name, values in taken.items():
        spread = f"(min {min(values):.1f}, max {max(values):.1f})"
        print(f"{name:8} {median(values):7.1f} us CPU per exchange, both sides {spread}")
    ratio = median(taken["h2"]) / median(taken["nghttp2"])
    print(f"h2 takes {ratio:.0f} times as long as nghttp2")
    assert ratio > 3
