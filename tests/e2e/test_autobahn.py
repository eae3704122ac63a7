"""Autobahn's WebSocket test suite against an echo server behind a real ``creto sidecar``, watched and unwatched.

Its fuzzing client sends what is allowed and what is not and judges the answers (RFC 6455, RFC 7692). On the watched
route every message passes a plugin; on the other one bytes are tunnelled. The slow groups, large messages (9.*) and
compression (12.*, 13.*), are sampled; CRETO_AUTOBAHN="9.*,12.*" runs those cases instead, "*" all 517, which takes an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_ways import free_port
from .websocket_echo import Echo

CHOSEN = os.environ.get("CRETO_AUTOBAHN", "")
CASES = CHOSEN.split(",") if CHOSEN else [
    "1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*",
    "9.1.1", "9.1.3", "9.2.1", "9.3.4", "9.4.4", "9.5.4", "12.1.1", "12.1.10", "13.3.1",
]  # fmt: skip
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}

PLUGIN = """
from creto_proxy.hookspecs import hookimpl
from creto_proxy.settings import Section

class Watching:
    name, api, Settings = "watching", 1, Section

    def __init__(self, settings, core): pass
    @classmethod
    def commands(cls): return ()
    async def start(self): pass
    async def stop(self): pass

    @hookimpl
    def creto_messages(self): return self

    def open(self, request): return self if request.path == "/watched" else None
    def message(self, direction, kind, data): return data
"""
CONFIG = """
[common]
state_dir = "{folder}/state"
[egress]
allow = ["up.test:80"]
[egress.resolve]
"up.test" = "127.0.0.1:{upstream}"
[websocket]
max_message_bytes = 33554432
[protect]
shed_lag_ms = 0
[listen]
explicit = ""
reverse = "127.0.0.1:{port}"
[[reverse]]
name = "up"
upstream = "http://up.test"
"""


def wstest() -> str:
    """The suite's program: the one that ``make deps`` installed, else one on the path."""
    installed = Path(sys.prefix) / "autobahn" / "wstest"
    found = str(installed) if installed.exists() else shutil.which("wstest")
    if found is None:
        pytest.skip("Autobahn's test suite is not installed: tests/e2e/install_autobahn.py says why (it is Python 2.7)")
    return found


@contextlib.contextmanager
def echoing() -> Iterator[int]:
    """Port of the echo server, which runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(Echo, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@contextlib.contextmanager
def sidecar(folder: Path, upstream: int) -> Iterator[int]:
    """Port of the reverse listener of a sidecar that has the plugin."""
    site = folder / "site"
    (site / "watching-0.dist-info").mkdir(parents=True)
    (site / "watching.py").write_text(PLUGIN)
    (site / "watching-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: watching\nVersion: 0\n")
    (site / "watching-0.dist-info" / "entry_points.txt").write_text("[creto]\nwatching = watching:Watching\n")
    port = free_port()
    config = folder / "creto.toml"
    config.write_text(CONFIG.format(folder=folder, upstream=upstream, port=port))
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "creto_proxy", "--config", str(config), "sidecar"]
    said = folder / "sidecar.log"
    with said.open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=log)
    try:
        for _ in range(3000):
            assert process.poll() is None, said.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            threading.Event().wait(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def told(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What the report has to say about a case that did not pass."""
    facts = json.loads(file.read_text())
    names = (
        "behavior",
        "behaviorClose",
        "result",
        "resultClose",
        "remoteCloseCode",
        "wasNotCleanReason",
        "httpResponse",
    )
    return {name: facts.get(name, result.get(name)) for name in names}


@pytest.mark.timeout(7200 if CHOSEN else 300)
def test_autobahn_finds_nothing_wrong_watched_or_not(tmp_path: Path) -> None:
    program = wstest()
    with echoing() as upstream, sidecar(tmp_path, upstream) as port:
        spec = {
            "options": {"failByDrop": False, "openHandshakeTimeout": 30},
            "outdir": str(tmp_path / "report"),
            "servers": [
                {"agent": name, "url": f"ws://127.0.0.1:{port}/up/{name}"} for name in ("watched", "unwatched")
            ],
            "cases": CASES,
            "exclude-cases": [],
            "exclude-agent-cases": {},
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        done = subprocess.run(
            [program, "-m", "fuzzingclient", "-s", str(tmp_path / "spec.json")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "report" / "index.json").read_text())
    for name in ("watched", "unwatched"):
        cases = report[name]
        assert len(cases) > (0 if CHOSEN else 250)
        # Compression is not offered to a server while a plugin watches: what is compressed cannot be looked into.
        without = ("12.", "13.") if name == "watched" else ()
        wrong = {
            case: told(tmp_path / "report" / result["reportfile"], result)
            for case, result in cases.items()
            if not (
                result["behavior"] in PASSED
                and result["behaviorClose"] in PASSED
                or result["behavior"] == "UNIMPLEMENTED"
                and case.startswith(without)
            )
        }
        assert wrong == {}, (name, Counter(result["behavior"] for result in cases.values()))
