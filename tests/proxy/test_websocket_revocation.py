"""Connections that stay open are ended when their agent may no longer be here: WebSockets, watched or not, and tunnels."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect

from creto_proxy.deadline import Guard
from creto_proxy.model import Agent, Flow
from creto_proxy.revocation import Revocations
from creto_proxy.testing import make_agent, make_flow, make_request

from .test_pipeline import Open
from .websocket_lab import (
    CLIENT,
    REQUEST,
    Watching,
    echoing,
    lab,
    on_uvloop,
)


class Badge:
    """An agent whose identity can be taken away."""

    def __init__(self) -> None:
        self.agent = make_agent("a")

    def __call__(self) -> Agent:
        return self.agent

    def revoke(self) -> None:
        self.agent = replace(self.agent, expires_at=0.0)


def test_a_watched_connection_of_a_revoked_agent_is_closed(tmp_path: Path) -> None:
    badge = Badge()

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, Watching(), agent=badge) as here:
            async with connect(here.url, **CLIENT) as ws:
                await ws.send("x")
                assert await ws.recv() == "x"
                badge.revoke()
                with pytest.raises(websockets.ConnectionClosed):
                    await ws.recv()
                assert (ws.close_code, ws.close_reason) == (1008, "identity_ended")
            await echo.closed.wait()
            [outcome] = await here.recorded()
        assert echo.closes == [(1008, "identity_ended")]
        assert (outcome.status, outcome.error) == (101, "identity_ended")

    on_uvloop(scenario())


def test_an_unwatched_connection_of_a_revoked_agent_is_cut_off(tmp_path: Path) -> None:
    badge = Badge()

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, agent=badge) as here:
            async with connect(here.url, **CLIENT) as ws:
                badge.revoke()
                with pytest.raises(websockets.ConnectionClosed):
                    await ws.recv()
            await echo.closed.wait()
            [outcome] = await here.recorded()
        assert (outcome.status, outcome.error) == (101, "identity_ended")

    on_uvloop(scenario())


class Raw(Open):
    def raw_tcp(self, name: str | None, address: object, port: int) -> bool:
        return True


def test_a_tunnel_of_a_revoked_or_replaced_agent_is_cut_off(tmp_path: Path) -> None:
    badge = Badge()

    async def scenario() -> None:
        async with echoing() as echo, lab(tmp_path, echo.port, agent=badge, egress=Raw()) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.explicit)
            writer.write(f"CONNECT 127.0.0.1:{echo.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(REQUEST)
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            badge.agent = make_agent("b")  # somebody, but not who opened it
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            [outcome] = await here.recorded()
        assert (outcome.kind, outcome.error) == ("tcp", "identity_ended")

    on_uvloop(scenario())


async def test_nothing_is_asked_while_nothing_is_open_and_one_failure_ends_only_one() -> None:
    asked: list[str] = []
    ended: list[str] = []

    def identify(flow: Flow) -> Agent | None:
        asked.append(flow.link)
        if flow.link == "broken":
            raise RuntimeError("the directory is down")
        return make_agent("a") if flow.link == "good" else None

    standing = Revocations(identify, Guard(1.0), interval_s=0.001)
    for link in ("good", "broken", "gone"):
        request = make_request(agent=make_agent("a"), flow=make_flow(link=link))
        standing.enter(link, request, partial(ended.append, link))
    while asked.count("good") < 3:
        await asyncio.sleep(0.001)
    assert ended == ["broken", "gone"] and asked.count("broken") == asked.count("gone") == 1
    standing.leave("good")
    while standing._timer is not None:
        await asyncio.sleep(0.001)
