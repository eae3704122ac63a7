"""Model requests that take the express lane are metered and recorded as those that were put to the stages."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from creto_proxy import express, tls
from creto_proxy.audit import outcomes
from creto_proxy.model import Outcome
from creto_proxy.plugins import configure
from creto_proxy.service import Service, assemble

PERMIT = "permit (principal, action, resource);"
JSON = ("Content-Type: application/json",)
USAGE = {"prompt_tokens": 40, "completion_tokens": 6, "total_tokens": 46, "prompt_tokens_details": {"cached_tokens": 8}}
BUDGETS = "".join(
    f'[[metering.budgets]]\nlevel = "agent"\nmetric = "{metric}"\nlimit = "{limit}"\nwindow = "day"\n'
    for metric, limit in (("requests", 1000), ("tokens", 100_000), ("cost_usd", "5.00"))
)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged holds for as long as a test takes, also on a machine that has much else to do."""
    monkeypatch.setattr(express, "LEASE_S", 60.0)


class Here:
    """A creto in front of a model provider, and one agent's connection to it."""

    def __init__(self, service: Service, port: int, answers: list[bytes], received: list[bytes]) -> None:
        self.service = service
        self.port = port
        self.answers = answers
        self.received = received

    async def ask(self, *fields: str, late: bool = False, path: str = "chat/completions", raw: bytes = b"", **body: Any) -> Any:
        """(status, document) of one completion on the connection that is kept. late: the body comes after its head."""
        sent = raw or json.dumps({"model": "gpt-4o", "messages": [], "max_tokens": 16, **body}).encode()
        head = [f"POST /llm/v1/{path} HTTP/1.1", "Host: x", *(fields or JSON), f"Content-Length: {len(sent)}", "", ""]
        self.writer.write("\r\n".join(head).encode() + (b"" if late else sent))
        if late:
            while not any(p.exchange is not None for _, p in self.service.gateway.open()):
                await asyncio.sleep(0)
            self.writer.write(sent)
        answer = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)
        return int(answer[9:12]), await self._content(answer.lower())

    async def _content(self, head: bytes) -> Any:
        if b"transfer-encoding: chunked" in head:
            content = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                content += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
            return content
        size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
        content = await self.reader.readexactly(size)
        return json.loads(content) if content[:1] == b"{" else content

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    @property
    def taken(self) -> int:
        lanes = self.service.pipeline.lanes
        return 0 if lanes is None else lanes.taken

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.service.state / "journal", "w"))

    def budgets(self) -> dict[str, tuple[Any, Any]]:
        """metric -> (used, reserved)."""
        meter: Any
        [meter] = [stage for plugin, stage in self.service.pipeline.authorizers if plugin == "metering"]
        path = self.journal()[-1].path
        report = meter.budgets.report(path, self.service.pipeline.clock.unix_ns())
        return {row["metric"]: (row["used"], row["reserved"]) for row in report}


def answer(status: int = 200, content_type: str = "application/json", body: bytes = b"", fields: str = "") -> bytes:
    body = body or json.dumps({"model": "gpt-4o-2024-08-06", "choices": [{"message": {"content": "hi"}}], "usage": USAGE}).encode()
    head = f"HTTP/1.1 {status} Fine\r\nContent-Type: {content_type}\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@asynccontextmanager
async def creto(tmp_path: Path, *policies: str, config: str = BUDGETS) -> AsyncIterator[Here]:
    answers, received = [answer()], list[bytes]()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
                received.append(head + await reader.readexactly(size))
                writer.write(answers[0])
                if b"Connection: close" in answers[0]:
                    writer.close()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(origin, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    directory = tmp_path / "policies"
    directory.mkdir()
    for number, policy in enumerate(policies or (PERMIT,)):
        (directory / f"{number}.cedar").write_text(f'@id("p{number}")\n{policy}')
    (tmp_path / "creto.toml").write_text(f"""
{config}
[protocols.llm]
"llm.test" = "openai"
[common]
state_dir = "{tmp_path / "state"}"
owner = "ana"
[policy]
dir = "{directory}"
[[reverse]]
name = "llm"
upstream = "http://llm.test:{port}"
[egress]
allow = ["llm.test:{port}"]
resolve = {{ "llm.test" = "127.0.0.1:{port}" }}
""")
    settings, found = configure(tmp_path / "creto.toml", environ={})
    service = assemble(settings, found, run="w", authority=tls.CertificateAuthority())
    service.attach("lab", "robot")
    sock = socket.create_server(("127.0.0.1", 0))
    async with service.running():
        await service.gateway.listen_proxy(sock, "lab", "reverse")
        here = Here(service, sock.getsockname()[1], answers, received)
        await here.connect()
        try:
            yield here
        finally:
            here.writer.close()
            server.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("policies", [(PERMIT,), (PERMIT, 'forbid (principal, action == Creto::Action::"llmCall", resource) when {'
                                                  'context has model && context.model == "o1" };')])  # fmt: skip
async def test_it_is_recorded_and_sent_like_one_that_was_asked_about(
    tmp_path: Path, policies: tuple[str, ...], late: bool
) -> None:
    async with creto(tmp_path, *policies) as here:
        fields = (*JSON, "Accept-Encoding: gzip")
        for text in ("same", "size"):
            assert (await here.ask(*fields, late=late, user=text))[0] == 200
        assert here.taken == 1
        asked, unasked = here.journal()
        facts = {"id", "at_unix_ns", "creto_ns", "upstream_ns", "total_ns"}
        for field in dataclasses.fields(Outcome):
            if field.name not in facts:
                assert getattr(unasked, field.name) == getattr(asked, field.name), field.name
        assert unasked.usage.certainty == "exact" and unasked.usage.model == "gpt-4o-2024-08-06"
        assert unasked.usage.tokens["cache_read"] == 8 and unasked.usage.cost_nano_usd > 0
        assert unasked.resource == ("" if len(policies) == 1 else "model:gpt-4o")
        first, second = here.received
        assert first.replace(b"same", b"size") == second and b"identity" in second and b"gzip" not in second


async def test_what_was_used_is_charged_exactly_and_nothing_stays_reserved(tmp_path: Path) -> None:
    async with creto(tmp_path) as here:
        for number in range(20):
            assert (await here.ask(late=number % 3 == 0, user="x" * number))[0] == 200
        assert here.taken == 19
        cost = sum(outcome.usage.cost_nano_usd for outcome in here.journal())
        budgets = here.budgets()
        assert budgets["requests"] == (20, 0) and budgets["tokens"] == (20 * 46, 0)
        assert budgets["cost_usd"][1] == "0.00" and int(budgets["cost_usd"][0].replace(".", "").lstrip("0")) * 10 ** (
            9 - len(budgets["cost_usd"][0].partition(".")[2])
        ) == cost


async def test_the_most_it_can_cost_is_reserved_by_its_size(tmp_path: Path) -> None:
    limit = '[[metering.budgets]]\nlevel = "agent"\nmetric = "tokens"\nlimit = 1000\nwindow = "day"\n'
    async with creto(tmp_path, config=limit) as here:
        assert (await here.ask())[0] == 200 and (await here.ask())[0] == 200
        assert here.taken == 1
        status, problem = await here.ask(user="x" * 3000)
        assert (status, problem["reason"], here.taken) == (429, "budget_exhausted", 1)
        assert (await here.ask())[0] == 200
        assert here.taken == 2 and here.budgets()["tokens"] == (3 * 46, 0)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ('context.model == "o1"', {"model": "o1"}),
        ("context has max_tokens && context.max_tokens > 100", {"max_tokens": 101}),
        ("context has tools && context.tools > 1", {"tools": [{}, {}]}),
        ("context has stream && context.stream", {"stream": True}),
    ],
)
async def test_policy_decides_on_what_each_body_asks_for(tmp_path: Path, when: str, said: dict[str, Any]) -> None:
    forbid = f"forbid (principal, action == Creto::Action::\"llmCall\", resource) when {{ {when} }};"
    async with creto(tmp_path, PERMIT, forbid.replace("{ context.model", "{ context has model && context.model")) as here:
        for _ in range(3):
            assert (await here.ask())[0] == 200
            status, problem = await here.ask(**said)
            assert (status, problem["reason"]) == (403, "policy_forbid")
        assert here.taken == 2


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"gpt-4o","messages":[],"max_tokens":16,"model":"o1"}',
        b'{"model":"gpt-4o","messages":[],"max_tokens":16,"Model":"o1","MODEL":"x"}',
        b'{"model":"gpt-4o","messages":[],"max_tokens":16',
    ],
)
async def test_a_body_that_is_not_plain_is_read_with_care(tmp_path: Path, raw: bytes) -> None:
    async with creto(tmp_path) as here:
        await here.ask()
        status, problem = await here.ask(raw=raw)
        assert (status, problem["reason"], here.taken) == (400, "bad_request_body", 0)


async def test_an_encoded_body_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    async with creto(tmp_path) as here:
        await here.ask()
        assert (await here.ask(*JSON, "Content-Encoding: gzip"))[0] == 400
        assert here.taken == 0


async def test_a_stream_gets_its_usage_asked_for_and_hidden(tmp_path: Path) -> None:
    chunk = b'data: {"choices":[{"delta":{"content":"hi"}}],"usage":null}\n\n'
    usage = b'data: {"model":"gpt-4o","choices":[],"usage":' + json.dumps(USAGE).encode() + b"}\n\n"
    async with creto(tmp_path) as here:
        here.answers[0] = answer(content_type="text/event-stream", body=chunk + usage + b"data: [DONE]\n\n")
        shown = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\ndata: [DONE]\n\n'
        for late in (False, False, True):
            assert await here.ask(stream=True, late=late) == (200, shown)
            assert json.loads(here.received[-1].partition(b"\r\n\r\n")[2])["stream_options"] == {"include_usage": True}
        assert here.taken == 2 and here.budgets()["tokens"] == (3 * 46, 0)
        assert [outcome.usage.certainty for outcome in here.journal()] == ["exact"] * 3
        status, whole = await here.ask(stream=True, stream_options={"include_usage": True})
        assert whole.startswith(chunk + usage)
        assert await here.ask(stream=True, stream_options={"include_usage": True}) == (status, whole)
        assert here.taken == 3


@pytest.mark.parametrize(
    ("given", "certainty", "tokens"),
    [
        (answer(500, body=b'{"error":{}}'), "none", 0),
        (answer(body=b"not json"), "unknown", None),
        (answer(fields="Content-Encoding: gzip\r\n"), "unknown", None),
        (answer(content_type="text/plain"), "unknown", None),
        (b"HTTP/1.1 204 No\r\n\r\n", "unknown", None),
        (b"HTTP/1.1 200 Fine\r\nContent-Type: application/json\r\nContent-Length: 900\r\nConnection: close\r\n\r\n{", "unknown", None),
    ],
)  # fmt: skip
async def test_usage_that_is_not_known_keeps_the_reservation(
    tmp_path: Path, given: bytes, certainty: str, tokens: int | None
) -> None:
    """The first of the two is put to the stages, the second is not: both are charged the same."""
    used = []
    async with creto(tmp_path) as here:
        await here.ask(max_tokens=500)
        taken = []
        for path in ("chat/completions", "completions"):
            if path == "completions":
                here.answers[0] = answer()
                await here.ask(path=path, max_tokens=500)
            before = here.budgets()["tokens"][0]
            here.answers[0] = given
            if path == "completions":
                here.service.pipeline.lanes.close()  # type: ignore[union-attr]
            try:
                await here.ask(path=path, max_tokens=500)
            except asyncio.IncompleteReadError:
                here.writer.close()
                await here.connect()
            taken.append(here.taken)
            used.append(here.budgets()["tokens"][0] - before)
            assert here.journal()[-1].usage.certainty == certainty
            assert here.budgets()["tokens"][1] == 0
        assert taken[0] == 1 and used[0] == used[1] and (tokens is None or used[0] == tokens)
        assert used[0] > 500 or tokens == 0
