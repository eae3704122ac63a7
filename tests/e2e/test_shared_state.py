"""Several creto processes on one state directory, and how each of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Creto, wait_for
from .servers import SLOW_PARTS, serving_slowly
from .test_crash import paths_in_agreement
from .test_ways import running

LIMIT = 40

# Every answer's status and path, one per line.
CLIENTS = """
import ssl, sys, threading, urllib.error, urllib.request
base, count = sys.argv[1], int(sys.argv[2])
context = ssl.create_default_context()
def loop(thread):
    for n in range(count):
        path = f"{base}/{thread}/{n}"
        try:
            with urllib.request.urlopen("https://api.allowed.test" + path, timeout=60, context=context) as answer:
                answer.read(); status = answer.status
        except urllib.error.HTTPError as error: status = error.code
        print(f"{status} {path}\\n", end="", flush=True)
threads = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def agents(creto: Creto, bases: list[str], count: int) -> list[tuple[int, str]]:
    """(status, path) of what these agents were answered, each in a ``creto run`` of its own, all at once."""
    script = creto.directory / "clients.py"
    script.write_text(CLIENTS)
    started = []
    for base in bases:
        command = creto.command(
            "run", "--policy", str(creto.policies), "--name", base.strip("/"), "--report", "none",
            "--", sys.executable, str(script), base, str(count),
        )  # fmt: skip
        started.append(
            subprocess.Popen(command, env=creto.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        ended = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), ended
    answers = [line.split() for out, _ in ended for line in out.splitlines()]
    return [(int(status), path) for status, path in answers]


def authority(creto: Creto, timeout: float = 60) -> Path:
    """The certificate of the one sidecar there is."""
    deadline = time.monotonic() + timeout
    while not (found := list((creto.state / "runs").glob("*/ca.pem"))):
        assert time.monotonic() < deadline, "no certificate"
        time.sleep(0.02)
    return found[0]


def test_one_budget_is_shared_exactly_by_every_process(creto: Creto) -> None:
    """Two runs and a sidecar, begun together on a state directory that is not there yet."""
    creto.add(f'\n[[metering.budgets]]\nlevel = "org"\nmetric = "requests"\nlimit = "{LIMIT}"\nwindow = "total"\n')
    with running(creto) as sidecar:
        ca = authority(creto)
        through: list[tuple[int, str]] = []

        def outside() -> None:
            for n in range(25):
                path = f"/sidecar/{n}"
                done = subprocess.run(
                    ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-x", sidecar.proxy, "--cacert", str(ca),
                     f"https://api.allowed.test{path}"], capture_output=True, text=True, check=False,
                )  # fmt: skip
                through.append((int(done.stdout), path))

        client = threading.Thread(target=outside)
        client.start()
        answers = agents(creto, ["/one", "/two"], 8)
        client.join()
    answers += through
    statuses = Counter(status for status, _ in answers)
    assert statuses == {200: LIMIT, 429: len(answers) - LIMIT}
    creto.config.write_text(creto.config.read_text().replace(f'limit = "{LIMIT}"', 'limit = "100000"'))
    recorded = paths_in_agreement(creto)
    assert all(recorded[path] == 1 for _, path in answers)
    assert sum(recorded.values()) == len(answers)
    assert len(creto.world.seen.requests) == LIMIT


def test_processes_that_begin_together_make_one_state_directory(creto: Creto) -> None:
    answers = agents(creto, ["/a", "/b", "/c", "/d"], 2)
    assert {status for status, _ in answers} == {200}
    recorded = paths_in_agreement(creto)
    assert sorted(recorded) == sorted(path for _, path in answers)
    assert set(recorded.values()) == {1}


SIGNALLED = """
import pathlib, signal, sys, time, urllib.request
ready, how = pathlib.Path(sys.argv[1]), sys.argv[2]
if how == "handles": signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
urllib.request.urlopen("https://api.allowed.test/before").read()
try:
    ready.write_text("x")
    while True: time.sleep(0.1)
finally:
    urllib.request.urlopen("https://api.allowed.test/last").read()
"""


def begun(creto: Creto, how: str, *options: str) -> subprocess.Popen[str]:
    ready = creto.directory / "ready"
    process = creto.start_python(SIGNALLED, str(ready), how, options=options)
    wait_for(ready)
    return process


def reported(creto: Creto) -> list[str]:
    report = json.loads((creto.directory / "report.json").read_text())
    return [row["path"] for row in report["requests"]]


@pytest.mark.parametrize("enforce", ["namespace", "proxy-env"])
@pytest.mark.parametrize(("how", "status", "paths"), [("handles", 7, ["/before", "/last"]), ("not", 143, ["/before"])])
def test_sigterm_reaches_the_agent_whose_status_it_is(
    creto: Creto, how: str, status: int, paths: list[str], enforce: str
) -> None:
    process = begun(creto, how, "--enforce", enforce)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert reported(creto) == paths
    assert "Traceback" not in err


@pytest.mark.parametrize("enforce", ["namespace", "proxy-env"])
def test_sigint_to_the_process_group_ends_the_agent_and_is_reported(creto: Creto, enforce: str) -> None:
    process = begun(creto, "not", "--enforce", enforce)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert reported(creto) == ["/before", "/last"], "an agent's last words are governed too"


@pytest.mark.parametrize("enforce", ["namespace", "proxy-env"])
def test_control_c_on_the_terminal_ends_the_agent_and_is_reported(creto: Creto, enforce: str) -> None:
    script, ready = creto.directory / "agent.py", creto.directory / "ready"
    script.write_text(SIGNALLED)
    command = creto.run_command([sys.executable, str(script), str(ready), "not"], "--enforce", enforce)
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(creto.directory)
            os.execve(command[0], command, creto.environment)
        finally:
            os._exit(99)
    said = b""

    def listen() -> None:
        nonlocal said
        with contextlib.suppress(OSError):  # EIO: the other end was closed
            while data := os.read(terminal, 4096):
                said += data

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        wait_for(ready)
        os.write(terminal, b"\x03")
        assert ended(pid) == 130, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        listener.join(60)
        os.close(terminal)
    assert reported(creto) == ["/before", "/last"]


def ended(pid: int, timeout: float = 60) -> int:
    """Exit status of a child, within the timeout."""
    deadline = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, "it did not end"
        time.sleep(0.02)


@contextlib.contextmanager
def slow_answer(creto: Creto, drain_s: float) -> Iterator[tuple[subprocess.Popen[str], Path, threading.Event, int]]:
    """A sidecar with one answer half way through it: its process, where curl writes, what lets the answer end, port."""
    with serving_slowly() as slow:
        creto.config.write_text(
            creto.config.read_text().replace(
                f'"plain.allowed.test" = "127.0.0.1:{creto.world.http}"',
                f'"plain.allowed.test" = "127.0.0.1:{slow.port}"',
            )
        )
        creto.add(f"\n[limits]\ndrain_s = {drain_s}\n")
        with running(creto) as sidecar:
            got = creto.directory / "got"
            with got.open("wb") as file:
                client = subprocess.Popen(
                    ["curl", "-sS", "-N", "-x", sidecar.proxy, "http://plain.allowed.test/long"], stdout=file,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip
                assert slow.arrived.acquire(timeout=60)
                while got.stat().st_size < len(b"part"):
                    time.sleep(0.01)
                sidecar.process.terminate()
                yield sidecar.process, got, slow.go, sidecar.port
                client.wait(timeout=60)


def test_an_answer_under_way_is_completed_before_the_sidecar_ends(creto: Creto) -> None:
    with slow_answer(creto, 30) as (sidecar, got, go, port):
        deadline = time.monotonic() + 60
        while accepts(port):
            assert time.monotonic() < deadline, "it still accepts"
            time.sleep(0.02)
        assert sidecar.poll() is None
        go.set()
        assert sidecar.wait(timeout=60) == 0
    assert got.read_bytes() == b"part" * SLOW_PARTS
    assert paths_in_agreement(creto)["/long"] == 1


def test_an_answer_that_outlasts_the_drain_is_cut_and_recorded(creto: Creto) -> None:
    with slow_answer(creto, 0.3) as (sidecar, got, _, _):
        assert sidecar.wait(timeout=60) == 0
    assert got.read_bytes() == b"part"
    assert paths_in_agreement(creto)["/long"] == 1


def accepts(port: int) -> bool:
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
