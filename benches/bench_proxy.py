"""What does a governed request cost (identity, policy, quota, journal, ledger, audit log) beside nginx proxy_pass?

    pytest benches/bench_proxy.py

The real ``creto sidecar`` with its default plugins and a budget, on a reverse route; GET of 1 KiB, wrk as the client,
pooled upstream connections, alternating rounds in one run. CPU is that of the whole process, worker threads included.
CRETO_BENCH_SECONDS and CRETO_BENCH_ROUNDS lengthen it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness

SECONDS = float(os.environ.get("CRETO_BENCH_SECONDS", "2"))
ROUNDS = int(os.environ.get("CRETO_BENCH_ROUNDS", "3"))

CONFIG = """
[common]
state_dir = "{folder}/state"
[egress]
allow = ["up.test:80"]
[egress.resolve]
"up.test" = "127.0.0.1:{upstream}"
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
"""


@pytest.fixture
def contenders(tmp_path: Path) -> Iterator[tuple[list[harness.Contender], int]]:
    missing = harness.missing_tools()
    if missing:
        pytest.skip(missing)
    with ExitStack() as stack:
        upstream, upstream_pid = stack.enter_context(harness.nginx_upstream(tmp_path / "upstream"))
        nginx = stack.enter_context(harness.nginx_proxy(tmp_path / "proxy", upstream))
        port = harness.free_port()
        config = tmp_path / "creto.toml"
        config.write_text(CONFIG.format(folder=tmp_path, upstream=upstream, port=port))
        command = [sys.executable, "-m", "creto_proxy", "--config", str(config), "sidecar"]
        pid = stack.enter_context(harness.running(command, port, harness.PROXY_CPU))
        yield [nginx, harness.Contender("creto, governed", port, pid, "/up/")], upstream_pid


@pytest.mark.parametrize("connections", [1, 64])
def bench_governed_request_beside_nginx(
    contenders: tuple[list[harness.Contender], int],
    connections: int,
    tmp_path: Path,
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxies, upstream_pid = contenders
    load = harness.Load(connections, SECONDS)
    results = benchmark.pedantic(harness.compare, (proxies, load, upstream_pid, tmp_path, ROUNDS), rounds=1)
    with capsys.disabled():
        print("\n" + harness.table(f"GET 1 KiB, {connections} connections", results, "nginx proxy_pass"))
    for name, samples in results.items():
        assert all(sample.requests and not sample.errors for sample in samples), name
        benchmark.extra_info[name] = {
            "requests_per_second": harness.median(samples, lambda s: s.per_second),
            "cpu_us_per_request": harness.median(samples, lambda s: s.cpu_us),
            "p50_us": harness.median(samples, lambda s: s.p50_us),
            "p99_us": harness.median(samples, lambda s: s.p99_us),
        }
