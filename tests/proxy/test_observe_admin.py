"""The admin listener: what operators and monitoring get, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from creto_hotpath.counters import Counters
from creto_proxy.errors import ConfigError
from creto_proxy.observe import admin as admin_module
from creto_proxy.observe.admin import Admin, admin_socket
from creto_proxy.observe.observer import Observer
from creto_proxy.observe.scrape import Scrape
from creto_proxy.settings import Endpoint
from creto_proxy.testing import make_config
from creto_proxy.workers.status import NodeStatus, ReloadStatus

READY = NodeStatus(
    run="r", pid=1, version="0.1.0", started_at=5.0, generation=1, slots=1, workers=(), ready=True, waiting=(),
    stopping=False, consumers_healthy=True, restarts=0, policy="p", reload=ReloadStatus(),
)  # fmt: skip


@dataclass
class Running:
    url: str
    port: int
    status: NodeStatus

    async def get(self, path: str, **headers: str) -> tuple[int, str, Any]:
        async with aiohttp.ClientSession() as session, session.get(self.url + path, headers=headers) as response:
            return response.status, await response.text(), response.headers


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    observer = Observer(Counters(str(tmp_path / "w.tab")), "0")
    sock = admin_socket(Endpoint.parse("127.0.0.1:0"))
    found = Running("", sock.getsockname()[1], READY)
    found.url = f"http://127.0.0.1:{found.port}"
    admin = Admin(sock, Scrape(tmp_path, tmp_path), lambda: found.status)
    await admin.start()
    yield found
    await admin.stop()
    observer.close()


async def test_prometheus_gets_the_form_it_asks_for(running: Running) -> None:
    status, text, headers = await running.get("/metrics")
    assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\ncreto_ready 1\n" in text and "# EOF" not in text
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    status, text, headers = await running.get("/metrics", Accept=accept)
    assert headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert text.endswith("# EOF\n")


async def test_readiness_says_why_not(running: Running) -> None:
    assert (await running.get("/readyz"))[0] == 200
    running.status = replace(READY, ready=False, waiting=("worker 0 is starting",))
    status, text, _ = await running.get("/readyz")
    assert status == 503 and "worker 0 is starting" in text
    assert (await running.get("/livez"))[0] == 200
    assert '"run": "r"' in (await running.get("/status"))[1]


async def test_it_only_answers_questions(running: Running) -> None:
    async with aiohttp.ClientSession() as session:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            async with session.request(method, running.url + "/metrics", data=b"x") as response:
                assert response.status == 405
        async with session.get(running.url + "/../etc/passwd") as response:
            assert response.status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:9464", "", "a b", "[::2]"])
async def test_a_name_that_points_here_is_not_answered(running: Running, host: str) -> None:
    assert (await raw(running, f"GET /status HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))[:3] in ("421", "400")


@pytest.mark.parametrize("host", ["localhost", "localhost:9464", "127.0.0.1", "[::1]:9464"])
async def test_loopback_names_are(running: Running, host: str) -> None:
    assert (await raw(running, f"GET /livez HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")).startswith("200")


async def raw(running: Running, request: str) -> str:
    """Status and what follows it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(request.encode())
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    await writer.wait_closed()
    return re.sub(r"^HTTP/1\.[01] ", "", answer.decode("latin-1"))


async def test_rubbish_and_slow_clients_do_not_keep_others_from_it(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "_LIFE_S", 0.2)
    silent = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(80)]
    for _, writer in silent:
        writer.write(b"GET /metrics HT")
    # Those that are too many are turned away at once, the others when their time is up.
    await asyncio.wait_for(asyncio.gather(*(gone(reader) for reader, _ in silent)), 60)
    assert (await raw(running, "\x00\x01 nonsense\r\n\r\n"))[:3] == "400"
    assert (await raw(running, "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "y" * 100_000 + "\r\n\r\n"))[:3] == "400"
    assert (await running.get("/readyz"))[0] == 200
    for _, writer in silent:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def gone(reader: asyncio.StreamReader) -> None:
    """Returns once the other side has closed."""
    with contextlib.suppress(ConnectionError):
        await reader.read()


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "192.0.2.1:9464"])
def test_only_loopback_is_listened_on(address: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        admin_socket(Endpoint.parse(address))


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = Endpoint.parse(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match=f"admin.listen: cannot listen on {endpoint}: address already in use"):
            admin_socket(endpoint)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"access_log": "relative.log"}, "absolute path"),
        ({"otlp_endpoint": "127.0.0.1:4318"}, "http:// or https://"),
        ({"otlp_endpoint": "http://user:pass@127.0.0.1:4318"}, "no user name or password"),
        ({"trace_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config({"observe": settings})


def test_nothing_is_on_by_default() -> None:
    config = make_config()
    assert config.admin.listen is None and config.observe.access_log == "" and config.observe.otlp_endpoint is None
