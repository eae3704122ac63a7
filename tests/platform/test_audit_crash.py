"""The audit log dies at every step of its write path, by kill and by power cut, and loses or doubles nothing.

The child process writes with a disk that ends the process at the n-th operation, for every n until the work gets
done; the parent then opens what is left, as the next start would.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from creto_platform.audit import EmbeddedAudit, verify, verify_local
from creto_platform.audit.disk import Disk
from creto_platform.crypto import EmbeddedCrypto

CRYPTO = EmbeddedCrypto()
DIED = 9
# Grows a log of 250 over the edge of a tile (256), so that full tiles, pruning and rotation take part.
BEFORE = 250
BATCHES = ((250, 257), (257, 259))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: what is synced is simulated here, and a hundred starts sync a lot."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def record(number: int) -> dict[str, Any]:
    return {"id": number.to_bytes(16, "big"), "act": "httpRead", "n": number}


def open_log(path: Path, disk: Disk | None = None) -> EmbeddedAudit:
    # wal_bytes=1: every publication also starts a new write-ahead log.
    return EmbeddedAudit(path / "audit", path / "signed", CRYPTO, publish_every_s=None, wal_bytes=1, disk=disk)


class Dying(Disk):
    """Ends the process before the n-th operation."""

    torn = False

    def __init__(self, at: int) -> None:
        self._left = at

    def _step(self, half: Callable[[], object] | None = None) -> None:
        self._left -= 1
        if self._left == 0:
            if self.torn and half is not None:
                half()
            self._die()

    def _die(self) -> None:
        os._exit(DIED)

    def create_directory(self, path: Path) -> None:
        self._step()
        super().create_directory(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(lambda: Disk.write(self, path, data[: len(data) // 2]))
        super().write(path, data)

    def append(self, fd: int, data: bytes) -> None:
        self._step(lambda: Disk.append(self, fd, data[: len(data) // 2]))
        super().append(fd, data)

    def sync_data(self, fd: int) -> None:
        self._step()
        super().sync_data(fd)

    def sync(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._step()
            super().sync([path])

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)


class Torn(Dying):
    """Ends the process within the n-th operation, half of what it writes being written."""

    torn = True


class PowerCut(Dying):
    """Dies and takes with it whatever was not synced: file contents, new names, renames, removals."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        # key -> how to undo it. A key is (what must be synced to keep it, name).
        self._volatile: dict[tuple[str, str], Callable[[], object]] = {}

    def _die(self) -> None:
        for undo in reversed(list(self._volatile.values())):
            with contextlib.suppress(OSError):
                undo()
        os._exit(DIED)

    def _remember(self, until: Path | str, name: str, undo: Callable[[], object]) -> None:
        # The first undo restores the oldest state, which is what is on the platter.
        self._volatile.setdefault((str(until), name), undo)

    def _kept(self, what: Path | str) -> None:
        self._volatile = {key: undo for key, undo in self._volatile.items() if key[0] != str(what)}

    def create_directory(self, path: Path) -> None:
        super().create_directory(path)
        self._remember(path.parent, f"entry {path}", lambda: shutil.rmtree(path))

    def write(self, path: Path, data: bytes) -> None:
        old = path.read_bytes() if path.exists() else None
        super().write(path, data)
        if old is None:
            self._remember(path.parent, f"entry {path}", path.unlink)
        self._remember(path, "data", lambda: path.write_bytes(old or b""))

    def append(self, fd: int, data: bytes) -> None:
        size = os.fstat(fd).st_size
        super().append(fd, data)
        # A torn page: part of it reached the disk.
        self._remember(f"fd {fd}", "data", lambda: os.ftruncate(fd, size + len(data) // 3))

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        self._kept(f"fd {fd}")

    def sync(self, paths: Iterable[Path]) -> None:
        for path in paths:
            super().sync([path])
            self._kept(path)

    def rename(self, old: Path, new: Path) -> None:
        replaced = new.read_bytes() if new.exists() else None
        super().rename(old, new)

        def undo() -> None:
            os.rename(new, old)
            if replaced is not None:
                new.write_bytes(replaced)

        self._remember(new.parent, f"rename {new}", undo)

    def remove(self, path: Path) -> None:
        old = path.read_bytes() if path.exists() else None
        super().remove(path)
        if old is not None:
            self._remember(path.parent, f"removal {path}", lambda: path.write_bytes(old))


def work(path: Path, disk: Disk, acknowledge: Callable[[int], object]) -> None:
    log = open_log(path, disk)
    for first, last in BATCHES:
        log.apply("journal", last, [record(number) for number in range(first, last)])
        acknowledge(last)
        log.publish()
    log.close()


def run_child(path: Path, disk: Disk, job: Callable[[Path, Disk, Callable[[int], object]], None]) -> tuple[int, int]:
    """Forks, works, and returns (exit status, what was acknowledged last)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            job(path, disk, lambda last: os.write(write_end, b"%d\n" % last))
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        acknowledged = [int(line) for line in pipe]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), max(acknowledged, default=0)


def check_after_crash(path: Path, acknowledged: int, where: str) -> None:
    """What the next start must find, and that a replay from any position makes it whole."""
    checkpoint = path / "audit" / "log" / "checkpoint"
    shown = checkpoint.read_bytes() if checkpoint.exists() else None
    log = open_log(path)
    assert log.size >= acknowledged, where
    assert log.position("journal") >= acknowledged, where
    position = log.position("journal")
    assert log.size >= position, where
    # The consumer's replay: everything after the position, and once more everything from the start.
    log.apply("journal", BATCHES[-1][1], [record(number) for number in range(position, BATCHES[-1][1])])
    log.apply("journal", BATCHES[-1][1], [record(number) for number in range(BATCHES[-1][1])])
    log.publish()
    assert [entry.record["n"] for entry in log.read(0, 1000)] == list(range(BATCHES[-1][1])), where
    report = verify(path / "audit" / "log", log.vkeys, since=shown)
    assert report.ok, (where, report.problems)
    log.close()
    assert verify_local(path / "audit", path / "signed").ok, where


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    log = open_log(path)
    log.apply("journal", BEFORE, [record(number) for number in range(BEFORE)])
    log.close()
    return path


def every_crash(prepared: Path, scratch: Path, make: Callable[[int], Disk]) -> int:
    for at in range(1, 1000):
        path = scratch / str(at)
        shutil.copytree(prepared, path)
        status, acknowledged = run_child(path, make(at), work)
        assert status in (0, DIED)
        check_after_crash(path, max(acknowledged, BEFORE), f"operation {at}")
        shutil.rmtree(path)
        if status == 0:
            return at - 1
    raise AssertionError("the work never got done")


def test_killed_within_every_operation_nothing_is_lost_or_doubled(prepared: Path, scratch: Path) -> None:
    assert every_crash(prepared, scratch, Torn) > 50


def test_after_a_power_cut_at_every_operation_nothing_is_lost_or_doubled(prepared: Path, scratch: Path) -> None:
    assert every_crash(prepared, scratch, PowerCut) > 50


def first_start(path: Path, disk: Disk, acknowledge: Callable[[int], object]) -> None:
    log = open_log(path, disk)
    log.apply("journal", 1, [record(0)])
    acknowledge(1)
    log.close()


def test_killed_while_the_log_is_made_the_next_start_makes_it(scratch: Path) -> None:
    for at in range(1, 1000):
        path = scratch / str(at)
        path.mkdir()
        status, acknowledged = run_child(path, Torn(at), first_start)
        assert status in (0, DIED)
        check_after_crash(path, acknowledged, f"operation {at}")
        shutil.rmtree(path)
        if status == 0:
            return
    raise AssertionError("the work never got done")


WRITER = """
import sys
from pathlib import Path
from creto_platform.audit import EmbeddedAudit
from creto_platform.crypto import EmbeddedCrypto

path = Path(sys.argv[1])
log = EmbeddedAudit(path / "audit", path / "signed", EmbeddedCrypto(), publish_every_s=0.001, publish_records=5)
number = int(sys.argv[2])
while True:
    batch = [{"id": n.to_bytes(16, "big"), "n": n} for n in range(number, number + 7)]
    number += 7
    log.apply("journal", number, batch)
    print(number, flush=True)
"""


def test_a_real_kill_loses_no_acknowledged_record(tmp_path: Path) -> None:
    first = 0
    for round_ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        with writer:
            assert writer.stdout is not None
            acknowledged = 0
            for line in writer.stdout:
                acknowledged = int(line)
                if acknowledged >= first + 7 * 40:
                    break
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.endswith(b"\n"))])
        log = open_log(tmp_path)
        assert log.position("journal") >= acknowledged > first
        log.publish()
        numbers = [entry.record["n"] for entry in log.read(0, 100_000)]
        assert numbers == list(range(log.position("journal")))
        first = log.position("journal")
        log.close()
        assert verify_local(tmp_path / "audit", tmp_path / "signed").ok, round_


def test_a_torn_tail_is_cut_wherever_it_tore(scratch: Path) -> None:
    log = open_log(scratch)
    log.apply("journal", 2, [record(0), record(1)])
    (wal,) = (scratch / "audit" / "wal").glob("*.wal")
    whole = wal.stat().st_size
    log.apply("journal", 4, [record(2), record(3)])
    saved = scratch / "saved"
    shutil.copytree(scratch / "audit", saved / "audit")
    shutil.copytree(scratch / "signed", saved / "signed")
    log.close()
    for size in range(whole, (saved / "audit" / "wal" / wal.name).stat().st_size):
        path = scratch / str(size)
        shutil.copytree(saved, path)
        os.truncate(path / "audit" / "wal" / wal.name, size)
        log = open_log(path)
        assert (log.size, log.position("journal")) == (2, 2), size
        assert log.append([record(9)]) == 2
        log.close()
        shutil.rmtree(path)


def test_what_is_signed_was_durable_before(tmp_path: Path, prepared: Path) -> None:
    """Order of the write path: tiles are synced before the head is remembered, that before the checkpoint shows."""
    steps: list[tuple[str, str]] = []

    class Recording(Disk):
        def write(self, path: Path, data: bytes) -> None:
            steps.append(("write", path.name))
            super().write(path, data)

        def sync(self, paths: Iterable[Path]) -> None:
            for path in paths:
                steps.append(("sync", path.name))
                super().sync([path])

        def rename(self, old: Path, new: Path) -> None:
            steps.append(("rename", new.name))
            super().rename(old, new)

        def sync_data(self, fd: int) -> None:
            steps.append(("sync", "wal"))
            super().sync_data(fd)

    shutil.copytree(prepared, tmp_path / "log")
    log = open_log(tmp_path / "log", Recording())
    steps.clear()
    log.append([record(250)])
    assert steps == [("sync", "wal")]
    steps.clear()
    log.publish()
    at = {step: place for place, step in enumerate(steps)}
    remembered, shown = at["rename", "last_signed"], at["rename", "checkpoint"]
    assert remembered < at["sync", "signed"] < shown
    assert at["write", "251"] < at["sync", "251"] < at["sync", "000.p"] < remembered
    assert at["sync", "last_signed.new"] < remembered
    log.close()
