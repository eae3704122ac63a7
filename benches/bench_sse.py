"""How much later does a server-sent event arrive for having passed creto?

    pytest benches/bench_sse.py

Bar: 100 us added at the 99th percentile. One process is upstream and agent at once, so that one clock stamps both ends:
on each of N streams it writes an event of about 200 bytes every 10 ms, staggered, and takes the time again when the
event has been read on the other side. What a proxy adds is its percentile minus that of the direct connection in the
same turn; turns alternate. The real ``creto sidecar`` with its default plugins and a budget: once as a stream that is
relayed, once as the answer of a model whose usage is read from the events. nginx stands beside it with buffering off.
The cores are kept awake: between two events they would halt, and what is measured would be how they wake up.
CRETO_BENCH_SECONDS and CRETO_BENCH_ROUNDS lengthen it; a turn has CRETO_BENCH_EVENTS at least, 1,000 by default.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

SECONDS = float(os.environ.get("CRETO_BENCH_SECONDS", "2"))
ROUNDS = int(os.environ.get("CRETO_BENCH_ROUNDS", "3"))
INTERVAL_NS = 10_000_000
# Of one turn: a percentile of fewer events would be that of one or two of them.
LEAST_EVENTS = int(os.environ.get("CRETO_BENCH_EVENTS", "1000"))
BAR_US = 100.0

CONFIG = """
[common]
state_dir = "{folder}/state"
[egress]
allow = ["up.test:80", "api.openai.com:80"]
[egress.resolve]
"up.test" = "127.0.0.1:{upstream}"
"api.openai.com" = "127.0.0.1:{upstream}"
[[metering.budgets]]
level = "agent"
metric = "requests"
limit = "1000000000"
window = "day"
[listen]
explicit = ""
reverse = "127.0.0.1:{port}"
[[reverse]]
name = "up"
upstream = "http://up.test"
[[reverse]]
name = "model"
upstream = "http://api.openai.com"
"""
ASK = b'{"model":"gpt-4o-mini","stream":true,"max_tokens":100,"messages":[{"role":"user","content":"Hi"}]}'
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
POST = b"POST %%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":%019d,"model":"gpt-4o-mini",'
    b'"choices":[{"index":0,"delta":{"content":" some words of an answer"},"logprobs":null,"finish_reason":null}]}\n\n'
)
MARK = b'"created":'


@dataclass(frozen=True, slots=True)
class Route:
    """A way to the upstream: name, port, and the request that takes it."""

    name: str
    port: int
    request: bytes


@dataclass(slots=True)
class Stream:
    """One open stream: the upstream's end, the agent's end, when the next event is due, and the delays so far."""

    origin: socket.socket
    agent: socket.socket
    due_ns: int
    rest: bytes = b""
    delays: list[int] = field(default_factory=list)
    sent: int = 0

    def send(self) -> None:
        event = EVENT % time.monotonic_ns()
        self.origin.send(b"%x\r\n%s\r\n" % (len(event), event))
        self.sent += 1

    def receive(self) -> None:
        data = self.agent.recv(65536)
        now = time.monotonic_ns()
        if not data:
            raise RuntimeError("a stream ended early")
        data = self.rest + data
        at = data.find(MARK)
        while at >= 0 and at + len(MARK) + 19 <= len(data):
            self.delays.append(now - int(data[at + len(MARK) : at + len(MARK) + 19]))
            data = data[at + len(MARK) + 19 :]
            at = data.find(MARK)
        self.rest = data[at:] if at >= 0 else data[-len(MARK) :]


@contextmanager
def opened(listener: socket.socket, route: Route, count: int) -> Iterator[list[Stream]]:
    """``count`` streams by that route, each granted by the upstream and its head received."""
    streams: list[Stream] = []
    with ExitStack() as stack:
        for _ in range(count):
            agent = stack.enter_context(socket.create_connection(("127.0.0.1", route.port), 10))
            agent.sendall(route.request)
            origin = stack.enter_context(listener.accept()[0])
            origin.settimeout(10)
            _read_request(origin)
            origin.sendall(HEAD)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += agent.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            for end in (agent, origin):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            streams.append(Stream(origin, agent, 0))
        yield streams
        for each in streams:
            with contextlib.suppress(OSError):
                each.origin.sendall(b"0\r\n\r\n")


def _read_request(origin: socket.socket) -> None:
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += origin.recv(65536)
    head, _, body = asked.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length is not None and len(body) < int(length[1]):
        body += origin.recv(65536)


def delays_us(listener: socket.socket, route: Route, count: int, seconds: float) -> list[float]:
    """How long each event took, in microseconds. Raises RuntimeError when one was lost."""
    with opened(listener, route, count) as streams:
        poll = select.epoll()
        ends = {stream.agent.fileno(): stream for stream in streams}
        for number in ends:
            poll.register(number, select.EPOLLIN)
        start = time.monotonic_ns() + INTERVAL_NS
        for place, stream in enumerate(streams):
            stream.due_ns = start + place * INTERVAL_NS // count
        due = deque(streams)
        stop = start + int(seconds * 1e9)
        while due:
            wait_ns = due[0].due_ns - time.monotonic_ns()
            if wait_ns <= 0:
                stream = due.popleft()
                stream.send()
                stream.due_ns += INTERVAL_NS
                if stream.due_ns < stop:
                    due.append(stream)
                wait_ns = 0
            for number, _ in poll.poll(wait_ns / 1e9):
                ends[number].receive()
        deadline = time.monotonic() + 5
        while any(len(stream.delays) < stream.sent for stream in streams):
            if time.monotonic() > deadline:
                raise RuntimeError("events were lost")
            for number, _ in poll.poll(0.1):
                ends[number].receive()
        poll.close()
        return [delay / 1e3 for stream in streams for delay in stream.delays]


@pytest.fixture
def routes(tmp_path: Path) -> Iterator[tuple[list[Route], socket.socket]]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
        upstream = listener.getsockname()[1]
        port = harness.free_port()
        config = tmp_path / "creto.toml"
        config.write_text(CONFIG.format(folder=tmp_path, upstream=upstream, port=port))
        command = [sys.executable, "-m", "creto_proxy", "--config", str(config), "sidecar"]
        stack.enter_context(harness.running(command, port, harness.PROXY_CPU))
        ways = [
            Route("direct", upstream, GET % b"/events"),
            Route("creto, governed", port, GET % b"/up/events"),
            Route("creto, governed and metered", port, POST % (len(ASK), ASK) % b"/model/v1/chat/completions"),
        ]
        if harness.find("nginx"):
            beside = harness.free_port()
            http = harness.PROXY.format(port=beside, upstream=upstream)
            stack.enter_context(harness.nginx(tmp_path / "nginx", http, beside, harness.PROXY_CPU))
            _turn_away(listener)
            ways.append(Route("nginx, buffering off", beside, GET % b"/events"))
        stack.enter_context(harness.awake(harness.CPUS))
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {harness.CLIENT_CPU})
        try:
            yield ways, listener
        finally:
            os.sched_setaffinity(0, mine)


def _turn_away(listener: socket.socket) -> None:
    """Drops connections that a server opened to see whether its upstream is there."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
    listener.setblocking(True)
    listener.settimeout(10)


Turns = dict[str, list[list[float]]]


def compare(routes: Sequence[Route], listener: socket.socket, streams: int, folder: Path) -> Turns:
    """The delays of every route in each of ROUNDS alternating turns, after a short one that warms up."""
    seconds = max(SECONDS, LEAST_EVENTS * INTERVAL_NS / 1e9 / streams)
    for route in routes:
        delays_us(listener, route, streams, 0.3)
    turns: Turns = {route.name: [] for route in routes}
    for turn in range(ROUNDS):
        for route in routes if turn % 2 == 0 else list(reversed(routes)):
            turns[route.name].append(delays_us(listener, route, streams, seconds))
    return turns


def percentile(delays: Sequence[float], percent: int) -> float:
    return statistics.quantiles(delays, n=100, method="inclusive")[percent - 1]


def added(turns: Turns, name: str, percent: int) -> list[float]:
    """What a route adds to the percentile of the direct connection, turn by turn."""
    pairs = zip(turns[name], turns["direct"], strict=True)
    return [percentile(mine, percent) - percentile(direct, percent) for mine, direct in pairs]


def table(turns: Turns, streams: int) -> str:
    """Medians over the turns, with the spread of what was added."""
    lines = [
        f"{streams} stream(s), one event of {len(EVENT % 0)} bytes every 10 ms each; bar: {BAR_US:.0f} us added at p99",
        f"{'':30}{'p50 us':>9}{'p99 us':>9}{'added p50':>11}{'added p99':>11}{'min..max':>14}",
    ]
    for name, delays in turns.items():
        p50, p99 = (statistics.median(percentile(each, percent) for each in delays) for percent in (50, 99))
        middle, tail = added(turns, name, 50), added(turns, name, 99)
        spread = f"{min(tail):.0f}..{max(tail):.0f}"
        lines.append(
            f"{name:30}{p50:9.1f}{p99:9.1f}{statistics.median(middle):11.1f}{statistics.median(tail):11.1f}{spread:>14}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("streams", [1, 20])
def bench_time_added_per_event(
    routes: tuple[list[Route], socket.socket],
    streams: int,
    tmp_path: Path,
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ways, listener = routes
    turns = benchmark.pedantic(compare, (ways, listener, streams, tmp_path), rounds=1)
    with capsys.disabled():
        print("\n" + table(turns, streams))
    for name, delays in turns.items():
        assert all(len(each) >= streams for each in delays), name
        benchmark.extra_info[name] = {
            "p50_us": statistics.median(percentile(each, 50) for each in delays),
            "p99_us": statistics.median(percentile(each, 99) for each in delays),
            "added_p50_us": added(turns, name, 50),
            "added_p99_us": added(turns, name, 99),
        }
