"""More raw requests and answers than the cases file has: whatever smuggles is refused with a close, whole or byte by byte.

Each family is one kind of disagreement between two readers of HTTP/1.1; what is right stands in RFC 9110 and RFC 9112.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from .test_http_cases import Agent, Case, Proxy, Recorder, faults

HOST = "Host: up.test\r\n"
CHUNKED = f"POST /p HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n"


def post(fields: str, body: str = "0\r\n\r\n") -> str:
    return f"POST /p HTTP/1.1\r\n{HOST}{fields}\r\n{body}"


def get(line: str = "GET / HTTP/1.1", fields: str = HOST) -> str:
    return f"{line}\r\n{fields}\r\n"


REQUESTS: dict[str, list[str]] = {
    "lengths": [
        post(f"Content-Length: {value}\r\n", "hello")
        for value in ("-5", "", "5,5", "5, 6", "0x5", "5.0", "5;", '"5"', "1_0", "9" * 26, "5\x0b", "\xa05", "5\xa0")
    ]
    + [
        post("Content-Length: 5\r\ncontent-length: 6\r\n", "hello"),
        post("Content-Length : 5\r\n", "hello"),
        post("Content-Length\t: 5\r\n", "hello"),
        post("Content-Length: 5\r\n 0\r\n", "hello"),
        post("Content_Length: 5\r\n", "hello"),
    ],
    "codings": [
        post(f"Transfer-Encoding: {value}\r\n")
        for value in (
            "identity", "chunked, identity", "gzip, chunked", "chunked, chunked", "xchunked", '"chunked"', "chunked;q=1",
            "", ",chunked", "chunked,", "chun\tked", "chunked\x00", "chunked\x0c", "\xa0chunked", "chun\xe2\x84\xaaed",
        )
    ]  # fmt: skip
    + [
        post("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n"),
        post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
        post("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
        post("X: y\r\r\nTransfer-Encoding: chunked\r\n"),
        post("Content-Length: 5\nTransfer-Encoding: chunked\r\n"),
        post("Transfer-Encoding\x00: chunked\r\n"),
        post("Transfer_Encoding: chunked\r\n"),
        post(" Transfer-Encoding: chunked\r\n"),
    ],
    "lines": [
        get(line)
        for line in (
            "GET  / HTTP/1.1", "GET /  HTTP/1.1", "GET / HTTP/1.1 ", "GET /\tHTTP/1.1", "GET /", "GET HTTP/1.1", "GET /a b HTTP/1.1",
            "GET / http/1.1", "GET / HTTP/1.10", "GET / HTTP/01.1", "GET / HTTP/1.2", "GET / HTTP/0.9", "GET * HTTP/1.1", "GET /# HTTP/1.1",
            "GET /\x7f HTTP/1.1", "GET /\xe9 HTTP/1.1", "G\x00T / HTTP/1.1", " GET / HTTP/1.1", "GET / HTTP/1.1\r", "\x00GET / HTTP/1.1",
        )
    ]  # fmt: skip
    + [f"GET / HTTP/1.1\n{HOST}\r\n", f"GET / HTTP/1.1\r\n{HOST}\n", f"\nGET / HTTP/1.1\r\n{HOST}\r\n"],
    "fields": [
        get(fields=f"{HOST}{line}\r\n")
        for line in (
            "X : b", "X\t: b", "X Y: b", "X(: b", "X\xff: b", "NoColon", ":", "X: a\r\n b", "X: a\r\n\tb", " ", "X: a\rb", "X: a\x00b",
            "X: a\x1fb", "X: a\x7f", "X: a\nY: b",
        )
    ]  # fmt: skip
    + [get(fields=f" X: a\r\n{HOST}")],
    "hosts": [
        get(fields=f"Host: {value}\r\n")
        for value in ("", "up.test, evil", "a@up.test", "up.test/", "http://up.test", "up.test:", "up.test:0", "up.test:80:80", "[::1", "up..test")
    ]
    + [get(fields=""), get(fields=f"{HOST}{HOST}"), get(fields=f"{HOST}host:\r\n"), get("GET http://evil.test/ HTTP/1.1")],
}
CHUNKS = [
    CHUNKED + body
    for body in (
        "-5\r\nhello\r\n0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", " 5\r\nhello\r\n0\r\n\r\n", "\r\nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0\n\r\n", "5\r\nhello\r\n0\r\n\n", "5\r\r\nhello\r\n0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n", "6\r\nhello\r\n0\r\n\r\n", "10000000000000005\r\nhello\r\n0\r\n\r\n", "5;a\nb\r\nhello\r\n0\r\n\r\n",
        '5;a="b\r\nhello\r\n0\r\n\r\n"\r\nhello\r\n0\r\n\r\n', "5;a=\x00\r\nhello\r\n0\r\n\r\n", "5\r\nhello\r\n0\r\nX: a\r\n b\r\n\r\n",
        "5\r\nhello\r\n0\r\nX : a\r\n\r\n", "5\r\nhello\r\n0\r\nX: a\n\r\n", "5\r\nhelloX\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: up.test\r\n\r\n",
    )
]  # fmt: skip
ANSWERS = [
    f"HTTP/1.1 200 OK\r\n{field}\r\n\r\nhello<close>"
    for field in (
        "Content-Length: 5\r\nContent-Length: 5", "Content-Length: 5, 5", "Content-Length: +5", "Content-Length:", "Content-Length : 5",
        "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity", "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "X: a\r\n b", "Xab", ": a", "X: a\nY: b", "X: a\x01b", "X\xff: a",
    )
] + [
    f"{line}\r\nContent-Length: 0\r\n\r\n<close>"
    for line in ("HTTP/1.1  200 OK", "HTTP/2.0 200 OK", "HTTP/1.1 2x0 OK", "HTTP/1.1 099 X", "HTTP/1.1200 OK", "HTTP/1.1 200 O\rK", "ICY 200 OK", "")
]  # fmt: skip
REFUSED: dict[str, Any] = {"status": [400, 414, 501, 505], "upstream": 0, "close": True, "responses": 1}
# What came before the fault may have been sent on already; it is never made to look whole.
BROKEN: dict[str, Any] = {"status": [400], "upstream_complete": 0, "close": True, "responses": 1, "lacks": ["smuggled"]}


class Stage:
    """The proxy of the reverse mode, on a loop of its own."""

    def __init__(self, runner: asyncio.Runner, proxy: Proxy) -> None:
        self._runner = runner
        self._proxy = proxy

    def wrong(self, raw: str, expect: dict[str, Any], **parts: str) -> list[tuple[str, list[str]]]:
        """(how it was sent, what did not happen as expected), for the request whole and byte by byte."""
        found = []
        for way, segments in (("whole", [raw]), ("bytes", list(raw))):
            case: Case = {"mode": "reverse", "raw": raw, "segments": segments, "expect": expect, **parts}
            recorder, agent = self._played(case)
            found += [(way, complaints)] if (complaints := faults(expect, recorder, agent)) else []
        return found

    def _played(self, case: Case) -> tuple[Recorder, Agent]:
        return self._runner.run(self._proxy.play(case))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        running = Proxy("reverse", tmp_path_factory.mktemp("reverse")).running()
        yield Stage(runner, runner.run(running.__aenter__()))
        runner.run(running.__aexit__(None, None, None))


@pytest.mark.parametrize("family", REQUESTS)
def test_what_two_readers_take_for_different_requests_is_refused(stage: Stage, family: str) -> None:
    assert {raw: wrong for raw in REQUESTS[family] if (wrong := stage.wrong(raw, REFUSED))} == {}


def test_a_body_whose_chunks_are_not_sound_never_ends(stage: Stage) -> None:
    assert {raw: wrong for raw in CHUNKS if (wrong := stage.wrong(raw, BROKEN))} == {}


def test_an_answer_that_is_not_sound_is_a_bad_gateway(stage: Stage) -> None:
    expect = {"status": [502], "close": True, "responses": 1}
    assert {answer: wrong for answer in ANSWERS if (wrong := stage.wrong(get(), expect, upstream_response=answer))} == {}


def test_a_forward_proxy_takes_one_identity_and_asks_about_a_server_as_a_whole(tmp_path: Path) -> None:
    twice = "GET http://up.test/ HTTP/1.1\r\nHost: up.test\r\n" + "Proxy-Authorization: Basic YTpi\r\n" * 2 + "\r\n"
    whole = "OPTIONS http://up.test HTTP/1.1\r\nHost: up.test\r\n\r\n"
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        running = Proxy("forward", tmp_path).running()
        stage = Stage(runner, runner.run(running.__aenter__()))
        assert stage.wrong(twice, {"status": [400], "upstream": 0, "close": True}) == []
        assert stage.wrong(whole, {"status": [200], "upstream": 1, "has": [r"^OPTIONS \* HTTP/1\.1\r\nHost: up\.test\r\n"]}) == []
        runner.run(running.__aexit__(None, None, None))
