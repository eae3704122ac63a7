"""Killed at any moment, and on a full disk: ledger and audit log hold every outcome exactly once, and agree."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import Creto, wait_for
from .servers import serving_slowly

THREADS = 3
HOST = "https://api.allowed.test"

# One line per request that the agent saw the end of; it stops when it loses its sidecar.
LOOP = """
import http.client, pathlib, ssl, sys, threading
base, done = sys.argv[1], pathlib.Path(sys.argv[2])
context = ssl.create_default_context()
def loop(thread):
    with open(done, "a", buffering=1) as log:
        for n in range(100_000):
            path = f"{base}/{thread}/{n}"
            try:
                if n % 20 == 0: connection = http.client.HTTPSConnection("api.allowed.test", timeout=30, context=context)
                connection.request("GET", path)
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                return
            log.write(path + "\\n")
threads = [threading.Thread(target=loop, args=(n,)) for n in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def lines(path: Path) -> list[str]:
    """The whole lines there are."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def until(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def audit_records(creto: Creto) -> list[dict[str, Any]]:
    """Every record of the audit log, after it has been verified."""
    verified = creto.call("audit", "verify", "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    size = json.loads(verified.stdout)["size"]
    tail = creto.call("audit", "tail", "--json", "-n", str(size + 1))
    assert tail.returncode == 0, tail.stderr
    entries = [json.loads(line) for line in tail.stdout.splitlines()] if tail.stdout.startswith("{") else []
    entries = entries or json.loads(tail.stdout or "[]")
    assert len(entries) == size
    return [entry["record"] for entry in entries]


def ledger_ids(creto: Creto, state: Path | None = None) -> list[str]:
    with contextlib.closing(sqlite3.connect((state or creto.state) / "metering.db")) as ledger:
        return [row[0].hex() for row in ledger.execute("select id from request")]


def paths_in_agreement(creto: Creto, state: Path | None = None) -> Counter[str]:
    """Path -> times recorded, once ledger and audit log have been found to hold the same outcomes, each once."""
    settled = creto.run(["true"])
    assert settled.status == 0, settled.err
    assert "behind the journal" not in settled.err
    records = audit_records(creto)
    audited, charged = [record["id"] for record in records], ledger_ids(creto, state)
    assert len(set(audited)) == len(audited)
    assert sorted(audited) == sorted(charged)
    usage = json.loads(creto.call("usage", "--json").stdout)
    assert usage["total"]["requests"] == len(records)
    return Counter(urlsplit(record["res"]).path for record in records)


def test_nothing_is_lost_or_doubled_however_often_the_sidecar_is_killed(creto: Creto) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    completed: list[str] = []
    # Before and while it starts, on the first answers, and deep in the run; each with a little chance.
    for number, after in enumerate((-2, -1, 0, 1, 7, 40, 90, 160)):
        done = creto.directory / f"done{number}"
        process = creto.start_python(LOOP, f"/k{number}", str(done))
        if after < 0:
            time.sleep(moments.uniform(0.05, 0.9))
        else:
            until(lambda: len(lines(done)) >= after, f"run {number} made no requests")  # noqa: B023
            time.sleep(moments.uniform(0, 0.05))
        creto.kill(process)
        completed += lines(done)
    recorded = paths_in_agreement(creto)
    assert len(completed) >= 298, "as many as were waited for"
    missing = [path for path in completed if recorded[path] != 1]
    assert missing == [], f"seed {seed}"
    # What had left when the sidecar died is at most one request per thread of each run.
    sent = {request["path"] for request in creto.world.seen.requests}
    assert len(sent - recorded.keys()) <= THREADS * 8
    assert [path for path, times in recorded.items() if path and times > 1] == []


def test_a_crash_between_runs_that_share_the_state_leaves_the_others_alone(creto: Creto) -> None:
    """The dead one's journal is adopted by a run that starts while a third still writes its own."""
    living, dead = creto.directory / "living", creto.directory / "dead"
    survivor = creto.start_python(LOOP, "/living", str(living))
    victim = creto.start_python(LOOP, "/dead", str(dead))
    until(lambda: len(lines(living)) > 10 and len(lines(dead)) > 10, "no requests")
    creto.kill(victim)
    between = creto.run(["true"])
    assert between.status == 0, between.err
    before = len(lines(living))
    until(lambda: len(lines(living)) > before + 10, "the survivor stopped")
    survivor.terminate()
    survivor.communicate(timeout=60)
    assert survivor.returncode == 128 + 15
    recorded = paths_in_agreement(creto)
    assert [path for path in lines(living) + lines(dead) if recorded[path] != 1] == []


def test_what_a_killed_run_had_reserved_comes_back(creto: Creto) -> None:
    with serving_slowly() as slow:
        creto.config.write_text(
            creto.config.read_text().replace(
                f'"plain.allowed.test" = "127.0.0.1:{creto.world.http}"',
                f'"plain.allowed.test" = "127.0.0.1:{slow.port}"',
            )
        )
        creto.add(
            "[metering]\nreservation_ttl_s = 10\n"
            '[[metering.budgets]]\nlevel = "agent"\nmetric = "requests"\nlimit = "3"\nwindow = "total"\n'
        )
        code = """
import threading, urllib.request
# All of it is waited for: what was answered, or given up by its agent, is used and not reserved.
def ask(): urllib.request.urlopen("http://plain.allowed.test/held").read()
for _ in range(3): threading.Thread(target=ask).start()
"""
        began = time.monotonic()
        process = creto.start_python(code)
        for _ in range(3):
            assert slow.arrived.acquire(timeout=60)
        creto.kill(process)
        ask = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"{HOST}/again"]
        held = creto.run(ask)
        late = time.monotonic() - began > 10  # on a machine so slow their time may have been up
        assert held.out == "429" or late, "they are held until their time is up, because nobody knows what became of them"
        statuses: list[str] = []
        deadline = time.monotonic() + 90
        while "200" not in statuses:
            assert time.monotonic() < deadline, statuses
            statuses.append(creto.run(ask).out)
            time.sleep(1)


# The consumers, killed at the n-th thing they do to a file or database, for every n there is; then started again.
# Forked from a single-threaded driver, because a fresh interpreter for each step would take minutes.
DRIVER = """
import json, os, shutil, sqlite3, sys
from contextlib import closing
from pathlib import Path
import sqlalchemy
from creto_hotpath.journal import Journal
from creto_metering.ledger import Ledger
from creto_platform import audit_directories
from creto_platform.audit import EmbeddedAudit, LogReader, verify_local
from creto_platform.audit.disk import Disk
from creto_platform.crypto import EmbeddedCrypto
from creto_proxy.audit import AuditTrail, encode
from creto_proxy.replay import Replay
from creto_proxy.testing import make_outcome, make_request

DIED = 77
crypto = EmbeddedCrypto()
left = 0

def step(*_):
    global left
    if left == 1: os._exit(DIED)
    left -= 1

class Mortal(Disk):
    def create_directory(self, path): step(); super().create_directory(path)
    def write(self, path, data): step(); super().write(path, data)
    def append(self, fd, data):
        step()
        super().append(fd, data[: len(data) // 2]); step(); super().append(fd, data[len(data) // 2 :])
    def sync_data(self, fd): step(); super().sync_data(fd)
    def truncate(self, fd, size): step(); super().truncate(fd, size)
    def rename(self, old, new): step(); super().rename(old, new)
    def remove(self, path): step(); super().remove(path)

class Between:
    def __init__(self, inner): self.inner, self.name = inner, inner.name
    def position(self, segment): return self.inner.position(segment)
    def apply(self, segment, records, upto):
        step(); self.inner.apply(segment, records, upto); step()

def written(state, worker):
    # Ids of outcomes that a worker wrote before it died.
    ids = []
    with Journal(str(state / "journal"), worker, flush="record") as journal:
        for n in range(3):
            outcome = make_outcome(make_request())
            ids.append(outcome.id.hex())
            journal.append(encode(outcome))
    return ids

def consume(state, worker):
    ledger = Ledger(state / "metering.db")
    ledger.open()
    audit = EmbeddedAudit(*audit_directories(state), crypto, publish_every_s=None, disk=Mortal())
    replay = Replay(state / "journal", worker, (Between(ledger), Between(AuditTrail(audit))))
    replay.start()
    done = replay.stop(30)
    ledger.close()
    audit.close()
    return done

def attempt(state, worker, steps):
    # Exit status of a process that lives for so many steps; 0 steps: to its end.
    global left
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            left = steps
            sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", step)
            sqlalchemy.event.listen(sqlalchemy.Engine, "commit", step)
            status = 0 if consume(state, worker) else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

base = Path(sys.argv[1])
template = base / "template"
(template / "journal").mkdir(parents=True)
before = written(template, "before")
assert attempt(template, "first", 0) == 0
wrong, deaths = [], 0
for steps in range(1, 1000):
    state = base / str(steps)
    shutil.copytree(template, state)
    expected = sorted(before + written(state, "dead"))
    status = attempt(state, "killed", steps)
    again = attempt(state, "again", 0)
    report = verify_local(*audit_directories(state), crypto=crypto)
    entries = LogReader(audit_directories(state)[0] / "log").tail(report.size)
    audited = sorted(entry.record["id"].hex() for entry in entries)
    with closing(sqlite3.connect(state / "metering.db")) as ledger:
        charged = sorted(row[0].hex() for row in ledger.execute("select id from request"))
    if again or not report.ok or audited != expected or charged != expected:
        wrong.append([steps, status, again, report.problems, len(audited), len(charged)])
    shutil.rmtree(state)
    if status != DIED: break
    deaths += 1
print(json.dumps({"wrong": wrong, "deaths": deaths, "last": status}))
"""


def test_consumers_that_die_at_any_step_catch_up_exactly_once(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path / "states")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["last"] == 0 and found["deaths"] > 25, "it died at every step there is"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, a little larger than a state directory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def fill(place: Path) -> Path:
    """Takes every free block."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return filler


def onto(creto: Creto, place: Path) -> Path:
    state = place / "state"
    creto.config.write_text(creto.config.read_text().replace(str(creto.state), str(state)))
    return state


FILLED = """
import json, pathlib, sys, time, urllib.error, urllib.request
here = pathlib.Path(sys.argv[1])
def get(path):
    try:
        with urllib.request.urlopen("https://api.allowed.test" + path, timeout=30) as answer: answer.read(); return 200, ""
    except urllib.error.HTTPError as error: return error.code, json.load(error)["reason"]
    except OSError as error: return 0, str(error)
def note(path, result): print(json.dumps([path, *result]), flush=True)
for n in range(5): note(f"/before/{n}", get(f"/before/{n}"))
(here / "filled-please").write_text("x")
while not (here / "filled").exists(): time.sleep(0.02)
refused = 0
for n in range(400):
    path = f"/full/{n}/" + "x" * 2000  # what the journal has set aside is soon full of these
    result = get(path)
    note(path, result)
    refused += result[0] != 200
    if refused == 3: break
(here / "free-please").write_text("x")
while not (here / "free").exists(): time.sleep(0.02)
for n in range(50):
    result = get(f"/after/{n}")
    note(f"/after/{n}", result)
    if result[0] == 200 and n >= 5: break
    time.sleep(0.1)
"""


def test_a_full_disk_refuses_new_requests_and_loses_no_answered_one(
    creto: Creto, small_disk: Path
) -> None:
    state = onto(creto, small_disk)
    process = creto.start_python(FILLED, str(creto.directory))
    wait_for(creto.directory / "filled-please")
    filler = fill(small_disk)
    (creto.directory / "filled").write_text("x")
    wait_for(creto.directory / "free-please")
    filler.unlink()
    (creto.directory / "free").write_text("x")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    results = [json.loads(line) for line in out.splitlines()]
    refused = {path: (status, reason) for path, status, reason in results if status != 200}
    assert list(refused.values()) == [(503, "journal_unavailable")] * 3, results
    assert "the journal cannot be written" in err and "No space left" in err
    assert results[-1][:2] == [results[-1][0], 200] and results[-1][0].startswith("/after/")
    sent = Counter(request["path"] for request in creto.world.seen.requests)
    assert not refused.keys() & sent.keys(), "what was refused has not left"
    recorded = paths_in_agreement(creto, state)
    answered = [path for path, status, _ in results if status == 200]
    assert [path for path in answered if recorded[path] != 1] == []


@pytest.mark.parametrize("used", [False, True], ids=["new state directory", "used state directory"])
def test_starting_on_a_full_disk_is_one_clear_line(creto: Creto, small_disk: Path, used: bool) -> None:
    state = onto(creto, small_disk)
    if used:
        assert creto.run(["true"]).status == 0
    filler = fill(small_disk)
    refused = creto.run(["touch", str(creto.directory / "started")])
    assert refused.status == 2, refused.err
    assert "Traceback" not in refused.err
    assert str(state) in refused.err and len(refused.err.strip().splitlines()) == 1, refused.err
    assert not (creto.directory / "started").exists()
    filler.unlink()
    again = creto.run(["true"])
    assert again.status == 0, again.err
