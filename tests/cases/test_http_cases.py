"""Raw HTTP/1.x cases from a file, played against creto's own listeners with a recording upstream behind them.

``CRETO_CASES_DIR`` names another folder with an ``http.json`` of the same shape; its "about" says what the keys mean.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from creto_proxy.config import Config
from creto_proxy.model import Way
from creto_proxy.plugins import Found, configure
from creto_proxy.service import assemble
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.tls import CertificateAuthority

Case = dict[str, Any]
FOLDER = Path(os.environ.get("CRETO_CASES_DIR") or Path(__file__).resolve().parent)
# How long nothing may happen before an open connection counts as quiet, and the most a case may take.
QUIET_S, QUIET_TURNS, PATIENCE_S = 0.03, 10, 30.0


def load_cases() -> list[Any]:
    cases = json.loads((FOLDER / "http.json").read_text(encoding="utf-8"))["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def raw(text: str) -> bytes:
    text = re.sub(r"\{\{(.*?)\*(\d+)\}\}", lambda match: match[1] * int(match[2]), text, flags=re.S)
    return text.encode("latin-1")


@dataclass
class Message:
    """One message as it was found on the wire. status: None for a request."""

    head: str
    body: bytes = b""
    complete: bool = False
    status: int | None = None


class Broken(Exception):
    """What was received is no message."""


def take_chunks(data: bytes, message: Message) -> bytes:
    """Moves a chunked body from ``data`` to ``message``; gives the rest."""
    while match := re.match(rb"([0-9A-Fa-f]+)[^\r\n]*\r\n", data):
        size = int(match[1], 16)
        rest = data[match.end() :]
        if size == 0:
            end = (b"\r\n" + rest).find(b"\r\n\r\n")
            message.complete = end >= 0
            return rest[end + 2 :]
        message.body += rest[:size]
        if len(rest) < size + 2:
            return b""
        data = rest[size + 2 :]
    return data


def take_message(data: bytes, *, request: bool, bodiless: bool = False, closed: bool = False) -> tuple[Message, bytes]:
    """The first message in ``data`` and what follows it. Raises Broken when there is no whole head."""
    head, found, rest = data.partition(b"\r\n\r\n")
    first = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]$" if request else rb"HTTP/1\.[01] (\d{3})( .*)?$"
    line = re.match(first, head.split(b"\r\n", 1)[0])
    if not found or line is None:
        raise Broken(data)
    message = Message((head + b"\r\n\r\n").decode("latin-1"))
    lower = head.lower()
    length = re.search(rb"\r\ncontent-length:[ \t]*(\d+)", lower)
    if not request:
        message.status = int(line[1])
        bodiless = bodiless or message.status < 200 or message.status in (204, 304)
    if bodiless:
        message.complete = True
    elif re.search(rb"\r\ntransfer-encoding:[ \t]*chunked", lower):
        rest = take_chunks(rest, message)
    elif length:
        size = int(length[1])
        message.body, rest = rest[:size], rest[size:]
        message.complete = len(message.body) == size
    elif request:
        message.complete = True
    else:
        message.body, rest, message.complete = rest, b"", closed
    return message, rest


@dataclass
class Recorder:
    """The upstream: keeps what it is asked, gives the scripted answer once and a plain one after that."""

    script: str | None
    delivered: Callable[[str], Coroutine[Any, Any, None]]
    requests: list[Message] = field(default_factory=list)
    garbage: int = 0
    paused_for: list[bool] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        try:
            while True:
                data = await self.read_request(reader, writer, data)
                if not await self.answer(writer):
                    return
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def read_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
        current: Message | None = None
        while True:
            if b"\r\n\r\n" in data:
                try:
                    message, rest = take_message(data, request=True)
                except Broken:
                    self.garbage += 1
                    raise ConnectionError from None
                if current is None:
                    self.requests.append(message)
                    if "expect: 100-continue" in message.head.lower():
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                else:
                    self.requests[-1] = message
                current = message
                if message.complete:
                    return rest
            piece = await reader.read(65536)
            if not piece:
                raise ConnectionError
            data += piece

    async def answer(self, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        script, self.script = self.script, None
        if script is None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Up: 1\r\n\r\nok")
            return True
        sent = ""
        for part in re.split(r"(<close>|<sleep [\d.]+>)", script):
            if part == "<close>":
                return False
            if part.startswith("<sleep"):
                # Goes on as soon as the agent has what was sent: a proxy that buffers makes this wait in vain.
                await self.delivered(sent)
            else:
                writer.write(raw(part))
                sent += part
        return True


PERMIT = '@id("all") permit (principal, action in Creto::Action::"egress", resource);\n'
NO_SHELL = '@id("no-shell") forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"shell");\n'
POLICIES = {"reverse": PERMIT, "forward": PERMIT, "mcp": PERMIT + NO_SHELL}


class Proxy:
    """creto as a user runs it, with a listener for one mode of the cases; ``recorder`` is the upstream of the case."""

    recorder: Recorder | None = None

    def __init__(self, mode: str, directory: Path) -> None:
        self.mode = mode
        self.directory = directory
        self.writers: set[asyncio.StreamWriter] = set()

    async def upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.recorder is not None
        self.writers.add(writer)
        await self.recorder.serve(reader, writer)
        self.writers.discard(writer)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self.upstream, "127.0.0.1", 0)
        upstream = server.sockets[0].getsockname()[1]
        service = assemble(*self.configuration(upstream), run="cases", authority=CertificateAuthority())
        # One upstream for everything, so that targets stand in the cases as they are sent.
        service.gateway.targets = Targets([ReverseRoute("", "http", "up.test", 80, "")])
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        async with service.running():
            service.attach("cases", "tester")
            way: Way = "explicit" if self.mode == "forward" else "reverse"
            await service.gateway.listen_proxy(listener, "cases", way)
            yield self
        server.close()

    def configuration(self, upstream: int) -> tuple[Config, tuple[Found, ...]]:
        policies = self.directory / "policies"
        policies.mkdir()
        (policies / "cases.cedar").write_text(POLICIES[self.mode])
        file = self.directory / "creto.toml"
        file.write_text(
            f"""
[common]
state_dir = "{self.directory / "state"}"
owner = "alice"
[policy]
dir = "{policies}"
[limits]
drain_s = 0
[http2]
enabled = false
[egress]
allow = ["up.test:80", "up.test:443"]
[egress.resolve]
"up.test" = "127.0.0.1:{upstream}"
"""
        )
        return configure(file, environ={})

    async def play(self, case: Case) -> tuple[Recorder, Agent]:
        agent = Agent(case)

        async def delivered(sent: str) -> None:
            wanted = case["expect"].get("first_data", "")
            try:
                await asyncio.wait_for(agent.has(wanted.encode()), PATIENCE_S / 3)
            except TimeoutError:
                pass
            recorder.paused_for.append(wanted.encode() in agent.received)

        self.recorder = recorder = Recorder(case.get("upstream_response"), delivered)
        try:
            await agent.connect(self.port)
            await agent.play()
        finally:
            agent.listener.cancel()
            agent.writer.transport.abort()
            await asyncio.gather(agent.writer.wait_closed(), agent.listener, return_exceptions=True)
            for writer in self.writers:
                writer.transport.abort()  # the next case begins without kept connections
            await asyncio.sleep(QUIET_S)
        return recorder, agent


class Agent:
    """The client side of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.received = b""
        self.closed = False
        self._news = asyncio.Event()

    async def connect(self, port: int) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        self.listener = asyncio.get_running_loop().create_task(self.listen())

    async def listen(self) -> None:
        try:
            while piece := await self.reader.read(65536):
                self.received += piece
                self._news.set()
        except ConnectionError:
            pass
        self.closed = True
        self._news.set()

    async def news(self, timeout: float) -> bool:
        """Whether anything arrived in that time."""
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def quiet(self) -> bool:
        """Whether nothing arrives for a moment, in many short waits: everything here shares one event loop, and one long
        wait could be over before the others have had a turn."""
        for _ in range(QUIET_TURNS):
            if await self.news(QUIET_S / QUIET_TURNS):
                return False
        return True

    def responses(self) -> list[Message]:
        found: list[Message] = []
        rest = self.received
        while rest:
            try:
                bodiless = self.case["raw"].startswith("HEAD") and not any(r.status and r.status >= 200 for r in found)
                message, rest = take_message(rest, request=False, bodiless=bodiless, closed=self.closed)
            except Broken:
                found.append(Message(rest.decode("latin-1")))
                break
            found.append(message)
            if not message.complete:
                break
        return found

    def settled(self) -> bool:
        """Whether everything that was asked has its final answer, so that only silence or a close can follow."""
        found = self.responses()
        return bool(found) and found[-1].complete and (found[-1].status or 0) >= 200

    async def settle(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE_S
        while not self.closed and loop.time() < end:
            if self.settled() and await self.quiet():
                return
            await self.news(QUIET_S)

    async def has(self, data: bytes) -> None:
        while data not in self.received and not self.closed:
            await self.news(PATIENCE_S)

    async def play(self) -> None:
        for segment in self.case.get("segments") or [self.case["raw"]]:
            if segment == "<wait-1xx>":
                await self.has(b"\r\n\r\n")
                continue
            self.writer.write(raw(segment))
            await asyncio.sleep(0)
        await self.settle()
        if "follow" in self.case and not self.closed:
            self.writer.write(raw(self.case["follow"]))
            await self.settle()


def faults(expect: dict[str, Any], recorder: Recorder, agent: Agent) -> list[str]:
    """What of ``expect`` did not happen."""
    responses = agent.responses()
    heads = "".join(request.head for request in recorder.requests)
    answer = responses[0].head if responses else ""
    finals = [response for response in responses if response.status and response.status >= 200]
    seen = len(recorder.requests)
    completed = sum(request.complete for request in recorder.requests)
    status = responses[0].status if responses else None
    last = responses[-1].status if responses else None
    checks: dict[str, Callable[[Any], bool]] = {
        "status": lambda allowed: status in allowed,
        "last_status": lambda allowed: last in allowed,
        "upstream": lambda count: seen == count,
        "upstream_max": lambda most: seen <= most,
        "upstream_complete": lambda most: completed <= most,
        "close": lambda wanted: agent.closed or not wanted,
        "responses": lambda count: len(finals) == count,
        "has": lambda patterns: all(re.search(pattern, heads) for pattern in patterns),
        "lacks": lambda patterns: not any(re.search(pattern, heads) for pattern in patterns),
        "header_lacks": lambda patterns: not any(re.search(pattern, heads) for pattern in patterns),
        "count": lambda counts: all(len(re.findall(pattern, heads)) == n for pattern, n in counts.items()),
        "body": lambda body: seen > 0 and recorder.requests[0].body == raw(body),
        "resp_body": lambda body: bool(finals) and finals[0].body == raw(body),
        "resp_has": lambda patterns: all(re.search(pattern, answer) for pattern in patterns),
        "resp_lacks": lambda patterns: not any(re.search(pattern, answer) for pattern in patterns),
        "resp_head_lacks": lambda patterns: not any(re.search(pattern, answer) for pattern in patterns),
        "resp_lacks_all": lambda texts: not any(text.encode() in agent.received for text in texts),
        "resp_count": lambda counts: all(len(re.findall(pattern, answer)) == n for pattern, n in counts.items()),
        "incomplete": lambda wanted: not (wanted and status == 200 and responses[-1].complete),
        "first_byte_within": lambda _: recorder.paused_for == [True],
        "first_data": lambda data: data.encode() in agent.received,
    }
    found = [f"{key}: wanted {wanted!r}" for key, wanted in expect.items() if not checks[key](wanted)]
    return found + (["garbage reached the upstream"] if recorder.garbage else [])


Play = Callable[[Case], tuple[Recorder, Agent]]


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Plays a case, once, against the proxy of its mode; a proxy is started by the first case that needs it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        started: dict[str, Proxy] = {}
        played: dict[str, tuple[Recorder, Agent]] = {}

        async def play(case: Case) -> tuple[Recorder, Agent]:
            mode = case["mode"]
            if mode not in started:
                started[mode] = await stack.enter_async_context(Proxy(mode, tmp_path_factory.mktemp(mode)).running())
            return await started[mode].play(case)

        def play_once(case: Case) -> tuple[Recorder, Agent]:
            if case["id"] not in played:
                played[case["id"]] = runner.run(play(case))
            return played[case["id"]]

        yield play_once
        runner.run(stack.aclose())


@pytest.mark.parametrize("case", load_cases())
def test_case(proxies: Play, case: Case) -> None:
    recorder, agent = proxies(case)
    found = faults(case["expect"], recorder, agent)
    allowed = [faults(other, recorder, agent) for other in case.get("also_ok", [])]
    assert not found or [] in allowed, (case["title"], found, [(r.status, r.head, r.body) for r in agent.responses()])


def test_the_policy_itself_is_met_by_all_must_cases(proxies: Play) -> None:
    """What the RFC merely allows as well is for others: our own answer is the strict one."""
    cases = [param.values[0] for param in load_cases() if param.values[0]["prio"] == "must"]
    assert [case["id"] for case in cases if faults(case["expect"], *proxies(case))] == []
