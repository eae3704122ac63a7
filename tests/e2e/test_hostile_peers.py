"""Agents and upstreams at their worst: each ends in bounded time with one status or a close, leaves an outcome in the
journal, and is not noticed on a connection that is in use meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from creto_proxy.audit import outcomes
from creto_proxy.model import Outcome

from ..ports import free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BOMB = gzip.compress(bytes(64 << 20))
GARBAGE = random.Random(7).randbytes(5000)
# Everything here is bounded by seconds in the configuration; this only catches what is not bounded at all.
PATIENCE_S = 60.0

CONFIG = """
[common]
org = "acme"
state_dir = "{state}"
[listen]
explicit = "127.0.0.1:{port}"
[policy]
dir = "{policies}"
[limits]
head_timeout_s = 1
body_timeout_s = 1
body_min_rate = 1000
body_bytes = 20000
response_timeout_s = 1.5
stall_timeout_s = 1.5
stream_idle_timeout_s = 1
connect_timeout_s = 3
drain_s = 1
[protect]
breaker_failures = 0
[egress]
allow = ["*.hostile.test"]
[egress.resolve]
{pins}
"""

POLICY = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
@id("small-orders-only")
forbid (principal, action, resource == Creto::Host::"reads.hostile.test")
when { context has amount && context.amount > 100 };
"""

EXTRACT = """
[[policy.extract]]
host = "reads.hostile.test"
path = "/*"
field = "/amount"
attribute = "amount"
"""

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


# -- upstreams


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def says(*pieces: bytes, then: str = "wait", every_s: float = 0.0) -> Behaviour:
    """Answers a request with ``pieces``, then waits for the other side, closes or resets."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if every_s:
                await asyncio.sleep(every_s)
        if then == "wait":
            await reader.read()
        elif then == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    return behave


def says_for_ever(first: bytes, piece: bytes, every_s: float = 0.0) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(first)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(every_s)

    return behave


async def good(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await read_head(reader)
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        await reader.readexactly(length)
        writer.write(OK)


def turns(behave: Behaviour) -> Behaviour:
    """Three good answers on one connection first: by then creto has stopped asking every stage about each request."""

    async def turning(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            await read_head(reader)
            writer.write(OK)
        await behave(reader, writer)

    return turning


SWALLOWING = threading.Event()


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        SWALLOWING.set()


async def at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speaks before it was asked anything, whatever comes."""
    writer.write(GARBAGE)
    await reader.read(1)


async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The second answer in one segment with the first: kept, it would be taken for that of the next request."""
    while True:
        await read_head(reader)
        writer.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")


LARGE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 30)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UPSTREAMS: dict[str, Behaviour] = {
    "good": good,
    "reads": good,
    "swallows": swallow,
    "early": says(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\n\r\nearly"),
    "never": says(),
    "twice": twice,
    "garbage": says(GARBAGE),
    "unasked": at_once,
    "half-silent": says(CHUNKED + b"ff\r\nhalf"),
    "half-closed": says(CHUNKED + b"ff\r\nhalf", then="close"),
    "bad-chunk": says(CHUNKED + b"4\r\nfull\r\n", b"zz\r\n", every_s=0.2),
    "headers": says(b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(10_000)) + b"\r\n"),
    "endless-head": says_for_ever(b"HTTP/1.1 200 OK\r\n", b"x: " + b"y" * 4000 + b"\r\n"),
    "slow-head": says_for_ever(b"HTTP/1.1 200 OK\r\nx: ", b"y", 0.2),
    "interim": says_for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "bomb": says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB),
    "reset": says(LARGE + b"some", every_s=0.2, then="reset"),
    "reset-at-once": says(then="reset"),
    "large": says_for_ever(LARGE, bytes(65536)),
    "tls": at_once,
    "turns-garbage": turns(says(GARBAGE)),
    "turns-never": turns(says()),
    "turns-silent": turns(says(CHUNKED + b"ff\r\nhalf")),
    "turns-closed": turns(says(CHUNKED + b"ff\r\nhalf", then="close")),
    "turns-interim": turns(says_for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n")),
}


@contextlib.contextmanager
def upstreams() -> Iterator[dict[str, int]]:
    """Port by name, served by a loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    ports: dict[str, int] = {}
    ready, ending = threading.Event(), asyncio.Event()

    def guarded(behave: Behaviour) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
                await behave(reader, writer)
            writer.close()

        return serve

    async def run() -> None:
        servers = []
        for name, behave in UPSTREAMS.items():
            server = await asyncio.start_server(guarded(behave), "127.0.0.1", 0, limit=1 << 20)
            ports[name] = server.sockets[0].getsockname()[1]
            servers.append(server)
        ready.set()
        await ending.wait()
        for server in servers:
            server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield ports
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(60)
        loop.close()


# -- creto


@dataclass
class Sidecar:
    port: int
    journal: Path

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def outcomes(self, host: str) -> list[Outcome]:
        return [each for each in outcomes(self.journal, "*") if each.host == f"{host}.hostile.test"]

    def others(self) -> list[Outcome]:
        """All but those of the bystander."""
        return [each for each in outcomes(self.journal, "*") if each.host != "good.hostile.test"]

    def outcome(self, host: str, seen: int = 0) -> Outcome:
        """The outcome after those ``seen``; it is there before the last byte of an answer, or soon after a close."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.outcomes(host)) <= seen:
            assert time.monotonic() < deadline, f"no outcome for {host}"
            time.sleep(0.02)
        assert len(found) == seen + 1
        return found[-1]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "policies").mkdir()
    (directory / "policies" / "test.cedar").write_text(POLICY)
    port = free_port()
    with upstreams() as ports:
        pins = "\n".join(f'"{name}.hostile.test" = "127.0.0.1:{at}"' for name, at in ports.items())
        text = CONFIG.format(state=directory / "state", port=port, policies=directory / "policies", pins=pins)
        (directory / "creto.toml").write_text(text + EXTRACT)
        process = subprocess.Popen(
            [sys.executable, "-m", "creto_proxy", "--config", str(directory / "creto.toml"), "sidecar"],
            env={**os.environ, "NO_COLOR": "1"}, cwd=directory, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            here = Sidecar(port, directory / "state" / "journal")
            _await_answer(process, here)
            yield here
            assert process.poll() is None, "it lived through all of it"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                _, said = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
        assert "Traceback" not in said, said


def _await_answer(process: subprocess.Popen[str], sidecar: Sidecar) -> None:
    """Who listens may not serve yet."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        with contextlib.suppress(OSError):
            if ask(sidecar, request("good"))[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the sidecar did not answer")


@pytest.fixture(autouse=True)
def bystander(sidecar: Sidecar) -> Iterator[None]:
    """One connection that is in use for as long as the test lasts: every answer on it is right."""
    ending, answered, broken = threading.Event(), 0, []
    request = b"GET http://good.hostile.test/ HTTP/1.1\r\nHost: good.hostile.test\r\n\r\n"

    def use() -> None:
        nonlocal answered
        with sidecar.connect() as sock, sock.makefile("rb") as reader:
            while not ending.is_set() or not answered:
                sock.sendall(request)
                status, _, body = answer_of(reader)
                if (status, body) != (200, b"ok"):
                    broken.append((status, body))
                    return
                answered += 1
                time.sleep(0.005)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    yield
    ending.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and broken == [] and answered > 0


# -- agents


def answer_of(reader: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """(status, fields, body) of the next final answer; status 0 when the connection ended without a whole one."""
    try:
        status, fields = _head(reader)
        while 0 < status < 200:
            status, fields = _head(reader)
        if "transfer-encoding" not in fields:
            length = int(fields.get("content-length", 0))
            body = reader.read(length)
            return (status, fields, body) if len(body) == length else (0, fields, body)
        body = b""
        while size := int(reader.readline(), 16):
            body += reader.read(size + 2)[:-2]
        reader.readline()
        return status, fields, body
    except (ConnectionError, ValueError):
        return 0, {}, b""


def _head(reader: BinaryIO) -> tuple[int, dict[str, str]]:
    start = reader.readline()
    fields = {}
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        fields[name.lower()] = value.strip()
    return (int(start.split()[1]) if start else 0), fields


def request(host: str, method: str = "GET", framing: str = "") -> bytes:
    name = f"{host}.hostile.test"
    head = f"{method} http://{name}/x HTTP/1.1\r\nHost: {name}\r\n"
    return f"{head}{framing}\r\n\r\n".encode() if framing else f"{head}\r\n".encode()


def ask(sidecar: Sidecar, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        sock.sendall(raw)
        return answer_of(reader)


def trickle(sock: socket.socket, piece: bytes, every_s: float) -> None:
    """``piece`` again and again, until the other side has something to say to it."""
    deadline = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ConnectionError):
        while not select.select([sock], [], [], every_s)[0]:
            assert time.monotonic() < deadline, "this goes on for ever"
            sock.sendall(piece)


# -- what an upstream may do

REFUSED = {
    "never": (504, "upstream_timeout"),
    "slow-head": (504, "upstream_timeout"),
    "garbage": (502, None),
    "headers": (502, None),
    "endless-head": (502, None),
    "interim": (502, "too_many_interim_responses"),
    "reset-at-once": (502, "upstream_closed"),
    "unasked": (502, None),
}


@pytest.mark.parametrize("host", REFUSED)
def test_an_upstream_without_a_proper_answer_is_one_clear_refusal(sidecar: Sidecar, host: str) -> None:
    status, reason = REFUSED[host]
    answered, fields, body = ask(sidecar, request(host))
    assert answered == status, body
    assert fields["content-type"] == "application/problem+json"
    outcome = sidecar.outcome(host)
    assert outcome.status == status and outcome.error
    assert reason is None or outcome.error == reason


CUT = {
    "half-silent": "upstream_silent",
    "half-closed": "upstream_closed",
    "bad-chunk": None,
    "reset": "upstream_closed",
}


@pytest.mark.parametrize("host", CUT)
def test_an_answer_that_breaks_off_is_seen_to_be_incomplete(sidecar: Sidecar, host: str) -> None:
    status, _, _ = ask(sidecar, request(host))
    assert status == 0, "a whole answer was made of half a one"
    outcome = sidecar.outcome(host)
    assert outcome.status == 200 and outcome.error
    assert CUT[host] is None or outcome.error == CUT[host]


TURNED = {"turns-garbage": 502, "turns-never": 504, "turns-silent": 0, "turns-closed": 0, "turns-interim": 502}


@pytest.mark.parametrize("host", TURNED)
def test_an_upstream_that_was_good_for_a_while_is_trusted_no_more_than_any(sidecar: Sidecar, host: str) -> None:
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        for number in range(3):
            sock.sendall(request(host))
            assert answer_of(reader)[::2] == (200, b"ok")
            assert sidecar.outcome(host, number).status == 200
        sock.sendall(request(host))
        assert answer_of(reader)[0] == TURNED[host]
    outcome = sidecar.outcome(host, 3)
    assert outcome.status == (TURNED[host] or 200) and outcome.error


def test_an_upstream_that_answers_before_the_request_ends(sidecar: Sidecar) -> None:
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        sock.sendall(request("early", "POST", "Content-Length: 1000000") + bytes(1000))
        status, _, body = answer_of(reader)
        assert (status, body) == (413, b"early")
    assert sidecar.outcome("early").status == 413


def test_an_upstream_that_answers_twice_answers_once(sidecar: Sidecar) -> None:
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        for number in range(3):
            sock.sendall(request("twice"))
            assert answer_of(reader)[::2] == (200, b"ok")
            assert sidecar.outcome("twice", number).status == 200


def test_a_compressed_bomb_passes_as_it_is(sidecar: Sidecar) -> None:
    status, fields, body = ask(sidecar, request("bomb"))
    assert status == 200 and fields["content-encoding"] == "gzip" and body == BOMB
    assert len(BOMB) < sidecar.outcome("bomb").bytes_down < len(BOMB) + 1000


def test_an_upstream_that_speaks_no_tls(sidecar: Sidecar) -> None:
    status, _, body = ask(sidecar, b"GET https://tls.hostile.test/ HTTP/1.1\r\nHost: tls.hostile.test\r\n\r\n")
    assert status == 502 and b"upstream_unreachable" in body
    assert sidecar.outcome("tls").error == "upstream_unreachable"


# -- what an agent may do

TOO_LARGE = {
    "head": (request("large", framing="x: " + "y" * 70_000), {400, 431}),
    "fields": (request("large", framing="\r\n".join(f"x-{n}: y" for n in range(10_000))), {400, 431}),
    "target": (request("large").replace(b"/x", b"/" + b"x" * 70_000), {400, 414, 431}),
    "length": (request("large", "POST", "Content-Length: 99999999999999999999"), {400, 413}),
    "chunk": (request("large", "POST", "Transfer-Encoding: chunked") + b"fffffffffffffffff\r\n", {400, 413}),
    "garbage": (GARBAGE, {400}),
    "inspected body": (request("reads", "POST", "Content-Type: application/json\r\nContent-Length: 30000"), {413}),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_no_limit_allows_or_nobody_can_read_is_refused(sidecar: Sidecar, what: str) -> None:
    raw, statuses = TOO_LARGE[what]
    before = sidecar.others()
    status, _, body = ask(sidecar, raw)
    assert status in statuses and b"reason" in body
    assert [outcome.status for outcome in sidecar.others()[len(before) :]] == [status]


@pytest.mark.parametrize("part", ["head", "streamed body", "chunked body", "inspected body"])
def test_a_byte_at_a_time_ends(sidecar: Sidecar, part: str) -> None:
    """The body's deadline starts anew with each byte, so this is what the rate is for."""
    before = sidecar.others()
    raw, piece = {
        "head": (b"GET http://swallows.hostile.test/ HTTP/1.1\r\nx-", b"y"),
        "streamed body": (request("swallows", "POST", f"Content-Length: {1 << 30}"), b"x"),
        "chunked body": (request("swallows", "POST", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
        "inspected body": (request("reads", "POST", "Content-Type: application/json\r\nContent-Length: 500"), b" "),
    }[part]
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        sock.sendall(raw)
        trickle(sock, piece, 0.1)
        status, _, body = answer_of(reader)
        assert status == 408, body
        assert reader.read() == b"", "and the connection is closed"
    assert [outcome.status for outcome in sidecar.others()[len(before) :]] == [408]


def test_an_agent_that_does_not_read_is_cut_off(sidecar: Sidecar) -> None:
    with sidecar.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(request("large"))
        assert sidecar.outcome("large", _refused_before(sidecar)).error == "agent_stalled"


def _refused_before(sidecar: Sidecar) -> int:
    return sum(each.error != "agent_stalled" for each in sidecar.outcomes("large"))


def test_an_agent_that_resets_in_the_middle_of_its_body(sidecar: Sidecar) -> None:
    before = len(sidecar.outcomes("swallows"))
    SWALLOWING.clear()
    with sidecar.connect() as sock:
        sock.sendall(request("swallows", "POST", "Content-Length: 100000") + bytes(5000))
        assert SWALLOWING.wait(PATIENCE_S), "it is under way"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    outcome = sidecar.outcome("swallows", before)
    assert (outcome.status, outcome.error) == (0, "client_gone")


@pytest.mark.parametrize("kind", ["no hello", "half a hello", "broken handshake"])
def test_tls_garbage_from_an_agent_is_a_close(sidecar: Sidecar, kind: str) -> None:
    hello = _client_hello()
    garbage = {
        "no hello": b"\x16\x03\x01\x02\x00" + GARBAGE[:600],
        "half a hello": hello[: len(hello) // 2],
        "broken handshake": hello + GARBAGE,
    }[kind]
    before = len(sidecar.outcomes("tls"))
    with sidecar.connect() as sock, sock.makefile("rb") as reader:
        sock.sendall(b"CONNECT tls.hostile.test:443 HTTP/1.1\r\nHost: tls.hostile.test:443\r\n\r\n")
        assert answer_of(reader)[0] == 200
        sock.sendall(garbage)
        with contextlib.suppress(ConnectionError):
            reader.read()
    assert sidecar.outcome("tls", before).error


def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="tls.hostile.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()
