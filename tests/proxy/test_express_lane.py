"""Requests that take the express lane of a whole creto are judged, charged and recorded as if they had been asked about."""

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

from creto_hotpath.express import Express
from creto_proxy import tls
from creto_proxy.audit import outcomes
from creto_proxy.model import Decision, Outcome, Request, Verdict
from creto_proxy.plugins import configure
from creto_proxy.service import Service, assemble

PERMIT = "permit (principal, action, resource);"


class Here:
    """A creto with one reverse route to an origin that answers everything, and one agent's connection to it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.answered = 0

    async def ask(self, target: str = "/up/a", *fields: str, method: str = "GET", body: bytes = b"") -> tuple[int, Any]:
        """(status, body) of one request on the connection that is kept."""
        head = [f"{method} {target} HTTP/1.1", "Host: x", *fields]
        if body:
            head.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)
        answer = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)
        size = next(int(x[15:]) for x in answer.lower().split(b"\r\n") if x.startswith(b"content-length:"))
        content = await self.reader.readexactly(size)
        self.answered += 1
        return int(answer[9:12]), json.loads(content) if content[:1] == b"{" else content

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    @property
    def taken(self) -> int:
        """Requests that were not put to the stages."""
        lanes = self.service.pipeline.lanes
        return 0 if lanes is None else lanes.taken

    def journal(self) -> list[Outcome]:
        return list(outcomes(self.service.state / "journal", "w"))


@asynccontextmanager
async def creto(tmp_path: Path, *policies: str, config: str = "") -> AsyncIterator[Here]:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
                await reader.readexactly(size)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(origin, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    directory = tmp_path / "policies"
    directory.mkdir(exist_ok=True)
    for number, policy in enumerate(policies):
        (directory / f"{number}.cedar").write_text(f'@id("p{number}")\n{policy}')
    (tmp_path / "creto.toml").write_text(f"""
{config}
[common]
state_dir = "{tmp_path / "state"}"
owner = "ana"
[policy]
dir = "{directory}"
[[reverse]]
name = "up"
upstream = "http://up.test:{port}/base"
[egress]
allow = ["up.test:{port}"]
resolve = {{ "up.test" = "127.0.0.1:{port}" }}
""")
    settings, found = configure(tmp_path / "creto.toml", environ={})
    service = assemble(settings, found, run="w", authority=tls.CertificateAuthority())
    service.attach("lab", "robot")
    sock = socket.create_server(("127.0.0.1", 0))
    async with service.running():
        await service.gateway.listen_proxy(sock, "lab", "reverse")
        here = Here(service, sock.getsockname()[1])
        await here.connect()
        yield here
        here.writer.close()
        server.close()


async def test_what_takes_the_lane_is_recorded_like_what_does_not(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT) as here:
        assert await here.ask("/up/a/b?q=1") == (200, b"ok")
        assert await here.ask("/up/c?q=2") == (200, b"ok")
        assert here.taken == 1
        asked, unasked = here.journal()
        facts = {"id", "at_unix_ns", "target", "bytes_up", "creto_ns", "upstream_ns", "total_ns"}
        for field in dataclasses.fields(Outcome):
            if field.name not in facts:
                assert getattr(unasked, field.name) == getattr(asked, field.name), field.name
        assert (asked.target, unasked.target) == ("/base/a/b", "/base/c")
        assert unasked.policies and unasked.agent == "spiffe://local/agent/robot" and unasked.decision == "allow"
        assert unasked.bytes_up == asked.bytes_up - 2


async def test_a_budget_is_exact_whichever_way_requests_go(tmp_path: Path) -> None:
    budget = '[[metering.budgets]]\nlevel = "agent"\nmetric = "requests"\nlimit = 20\nwindow = "day"\n'
    async with creto(tmp_path, PERMIT, config=budget) as here:
        statuses = [await here.ask(f"/up/{n}") for n in range(30)]
        assert [status for status, _ in statuses] == [200] * 20 + [429] * 10
        assert here.taken == 19
        problem = statuses[-1][1]
        assert problem["limit"] == 20 and problem["used"] == 20 and problem["reserved"] == 0
        assert [o.decision for o in here.journal()] == ["allow"] * 20 + ["deny"] * 10


async def test_new_policies_hold_for_the_next_request(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT) as here:
        await here.ask()
        await here.ask()
        assert here.taken == 1
        (tmp_path / "policies" / "1.cedar").write_text('@id("no") forbid (principal, action, resource);')
        here.service.platform.authz.reload()  # type: ignore[attr-defined]
        status, problem = await here.ask()
        assert (status, problem["reason"], here.taken) == (403, "policy_forbid", 1)


async def test_an_agent_whose_delegation_ends_is_refused_within_the_second(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT) as here:
        await here.ask()
        ended = dataclasses.replace(here.service.links.agent("lab"), expires_at=0.0)
        here.service.links.attach("lab", lambda: ended)
        async with asyncio.timeout(60):
            while (await here.ask())[0] == 200:
                await asyncio.sleep(0.05)
        assert here.taken >= 1
        assert here.journal()[-1].error == "unknown_agent"


@pytest.mark.parametrize(
    ("policies", "targets", "taken"),
    [
        # A policy that reads the path is asked about every path, once.
        ((PERMIT, 'forbid (principal, action, resource) when { context.path == "/base/no" };'), ("a", "b", "a", "b"), 2),
        # One that reads the clock is asked about every request.
        (('permit (principal, action, resource) when { context.now > datetime("2020-01-01") };',), ("a", "a", "a"), 0),
        # One that tells methods apart is asked once for each.
        (('permit (principal, action, resource) when { context.method == "GET" };',), ("a", "b", "c"), 2),
    ],
)
async def test_only_what_policies_do_not_read_is_skipped(
    tmp_path: Path, policies: tuple[str, ...], targets: tuple[str, ...], taken: int
) -> None:
    async with creto(tmp_path, *policies) as here:
        for target in targets:
            assert (await here.ask(f"/up/{target}"))[0] == 200
        assert here.taken == taken
        assert len(here.journal()) == len(targets)


async def test_a_forbidden_path_is_refused_however_warm_the_lane_is(tmp_path: Path) -> None:
    forbid = 'forbid (principal, action, resource) when { context.path like "/base/no*" };'
    async with creto(tmp_path, PERMIT, forbid) as here:
        for _ in range(3):
            assert (await here.ask("/up/yes"))[0] == 200
        for spelled in ("/up/no", "/up/%6eo", "/up//no", "/up/no;x", "/up/NO"):
            assert (await here.ask(spelled))[0] == 403, spelled
        assert here.taken == 2


async def test_fields_that_replace_the_method_or_the_path_are_looked_at(tmp_path: Path) -> None:
    forbid = 'forbid (principal, action == Creto::Action::"httpWrite", resource);'
    async with creto(tmp_path, PERMIT, forbid) as here:
        await here.ask()
        await here.ask()
        assert (await here.ask("/up/a", "X-HTTP-Method-Override: DELETE"))[0] == 403
        assert (await here.ask("/up/a", "X-Original-URL: /other"))[0] == 400
        assert here.taken == 1


async def test_a_stage_that_gives_no_lease_sees_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Curious:
        def body_limit(self, request: Request) -> int:
            return 0

        def authorize(self, request: Request) -> Decision:
            seen.append(request.path)
            return Decision(Verdict.ALLOW, "fine")

    from creto_egress import Egress as Plugin

    monkeypatch.setattr(Plugin, "creto_authorizer", lambda self: Curious(), raising=False)
    from creto_proxy.hookspecs import hookimpl

    hookimpl(Plugin.creto_authorizer)  # type: ignore[attr-defined]
    async with creto(tmp_path, PERMIT) as here:
        for _ in range(3):
            await here.ask()
        assert here.taken == 0 and len(seen) == 3


async def test_a_body_that_takes_more_than_a_look_keeps_a_request_off_the_lane(tmp_path: Path) -> None:
    extract = '[metering.providers]\n"up.test" = "openai"\n'
    async with creto(tmp_path, PERMIT, config=extract) as here:
        body = json.dumps({"model": "gpt-4o", "messages": [], "max_tokens": 1, "service_tier": "auto"}).encode()
        for _ in range(3):
            assert (await here.ask("/up/v1/chat/completions", method="POST", body=body))[0] == 200
        assert here.taken == 0
        # On the same host what uses no model goes by, path by path.
        for _ in range(3):
            await here.ask("/up/v1/models")
        assert here.taken == 2


async def test_stopping_breaks_what_is_under_way_in_a_lane_and_records_it(tmp_path: Path) -> None:
    async with creto(tmp_path, PERMIT, config="[limits]\ndrain_s = 0\n") as here:
        await here.ask("/up/a", method="POST", body=b"x")
        here.writer.write(b"POST /up/b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        async with asyncio.timeout(60):
            while here.taken == 0:
                await asyncio.sleep(0.01)
        state = here.service.state
    last = list(outcomes(state / "journal", "w"))[-1]
    assert (last.target, last.error) == ("/base/b", "aborted")


def test_lanes_are_the_compiled_ones_where_extensions_are_wanted() -> None:
    from creto_hotpath._select import extensions_wanted

    assert Express.__module__.endswith("_c") == extensions_wanted()
