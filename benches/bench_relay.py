"""How much CPU does the relay itself take per request, ungoverned, beside nginx proxy_pass?

    pytest benches/bench_relay.py -s

Target: a governed request at most 1.15 times nginx, so the bare relay has to stay below it. GET of 1 KiB over 64
keep-alive connections, and a chat completion (POST of 1.9 KiB with an SDK's fields) over 16; pooled upstream
connections, wrk as the client, alternating rounds in one run. CRETO_BENCH_SECONDS and CRETO_BENCH_ROUNDS lengthen it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

from creto_hotpath.http1 import CLOSING, BadMessage, plain_response
from creto_hotpath.relay import Downstream, Exchange, Pool, Upstream

SECONDS = float(os.environ.get("CRETO_BENCH_SECONDS", "2"))
ROUNDS = int(os.environ.get("CRETO_BENCH_ROUNDS", "3"))

SDK_FIELDS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python 2.8.0",
    "X-Stainless-Lang": "python",
    "X-Stainless-Package-Version": "2.8.0",
    "X-Stainless-OS": "Linux",
    "X-Stainless-Arch": "x64",
    "X-Stainless-Runtime": "CPython",
    "X-Stainless-Runtime-Version": "3.11.7",
    "X-Stainless-Async": "false",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Read-Timeout": "600",
    "Authorization": "Bearer sk-bench-0000000000000000000000000000000000000000",
}
CHAT = "\n".join(
    [
        'wrk.method = "POST"',
        f'wrk.body = string.rep("x", {1900})',
        *(f'wrk.headers["{name}"] = "{value}"' for name, value in SDK_FIELDS.items()),
    ]
)


class Forwarding:
    """The cheapest handler there can be: everything goes to one upstream."""

    def __init__(self, pool: Pool, upstream: int) -> None:
        self.pool = pool
        self.upstream = upstream

    def on_request(self, exchange: Exchange) -> None:
        upstream = self.pool.acquire(self.upstream)
        if upstream is not None:
            exchange.forward(upstream)
        else:
            exchange.context = asyncio.get_running_loop().create_task(self.connect(exchange))

    async def connect(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        make = lambda: Upstream(self.pool, self.upstream)  # noqa: E731
        _, upstream = await loop.create_connection(make, "127.0.0.1", self.upstream)
        exchange.forward(upstream)

    def on_body(self, exchange: Exchange, body: bytes | None) -> None:
        raise AssertionError("nothing was collected")

    def on_stale(self, exchange: Exchange) -> None:
        self.on_request(exchange)

    def on_bad_request(self, error: BadMessage) -> bytes:
        return plain_response(error.status, [], b"", CLOSING)

    def on_end(self, exchange: Exchange) -> None:
        exchange.context = None

    def on_close(self) -> None:
        pass


async def serve(port: int, upstream: int) -> None:
    pool = Pool(per_key=256)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Downstream(Forwarding(pool, upstream)), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


@pytest.fixture
def contenders(tmp_path: Path) -> Iterator[tuple[list[harness.Contender], int]]:
    missing = harness.missing_tools()
    if missing:
        pytest.skip(missing)
    with ExitStack() as stack:
        upstream, upstream_pid = stack.enter_context(harness.nginx_upstream(tmp_path / "upstream"))
        nginx = stack.enter_context(harness.nginx_proxy(tmp_path / "proxy", upstream))
        proxies = [harness.Contender("direct", upstream, None), nginx]
        for name, choice in (("creto relay, compiled", "0"), ("creto relay, Python twin", "1")):
            port = harness.free_port()
            command = [sys.executable, __file__, str(port), str(upstream)]
            env = {"CRETO_NO_EXTENSIONS": choice, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            pid = stack.enter_context(harness.running(command, port, harness.PROXY_CPU, env))
            proxies.append(harness.Contender(name, port, pid))
        yield proxies, upstream_pid


@pytest.mark.parametrize(
    ("title", "load"),
    [
        ("GET 1 KiB, 64 connections", harness.Load(64, SECONDS)),
        ("POST 1.9 KiB with SDK fields, 16 connections", harness.Load(16, SECONDS, CHAT)),
        ("GET 1 KiB, 1 connection", harness.Load(1, SECONDS)),
    ],
    ids=["get", "chat", "sequential"],
)
def test_relay_beside_nginx(
    contenders: tuple[list[harness.Contender], int],
    title: str,
    load: harness.Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxies, upstream_pid = contenders
    results = harness.compare(proxies, load, upstream_pid, tmp_path, ROUNDS)
    with capsys.disabled():
        print("\n" + harness.table(title, results, "nginx proxy_pass"))
    for name, samples in results.items():
        assert all(sample.requests and not sample.errors for sample in samples), name


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), int(sys.argv[2])))
