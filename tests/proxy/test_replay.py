"""From journal to consumers: each outcome once, one consumer's failure is not another's, and old segments go."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from creto_hotpath.journal import Journal
from creto_proxy.audit import decode, encode
from creto_proxy.model import Outcome
from creto_proxy.replay import KEEP_S, Replay
from creto_proxy.testing import make_outcome, make_request


class Keeping:
    """A consumer that keeps what it is given, unless it is told to fail."""

    def __init__(self, name: str = "keeping", failures: int = 0) -> None:
        self.name = name
        self.failures = failures
        self.ids: list[bytes] = []
        self._positions: dict[str, int] = {}

    def position(self, segment: str) -> int:
        return self._positions.get(segment, 0)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the disk is elsewhere")
        self.ids += [record.id for record in records]
        self._positions[segment] = upto


def write(directory: Path, worker: str, count: int = 3) -> list[bytes]:
    """Ids of the outcomes in one segment of a worker that has ended without having applied anything."""
    directory.mkdir(exist_ok=True)
    (directory / f"{worker}.lock").touch()
    outcomes = [make_outcome(make_request()) for _ in range(count)]
    with Journal(str(directory), worker, flush="record") as journal:
        for outcome in outcomes:
            journal.append(encode(outcome))
    return [outcome.id for outcome in outcomes]


def replay(directory: Path, *consumers: Keeping, now_s: float | None = None) -> bool:
    """Whether one life of a process applied everything."""
    now = time.time() if now_s is None else now_s
    running = Replay(directory, "own", consumers, now_s=lambda: now)
    running.start()
    return running.stop()


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith("own")}


def test_what_a_dead_worker_left_is_applied_once(tmp_path: Path) -> None:
    ids = write(tmp_path, "dead") + write(tmp_path, "dead") + write(tmp_path, "other")
    consumer = Keeping()
    assert replay(tmp_path, consumer) and replay(tmp_path, consumer)
    assert sorted(consumer.ids) == sorted(ids)


def test_more_dead_workers_than_descriptors_are_adopted(tmp_path: Path) -> None:
    ids = [found for number in range(40) for found in write(tmp_path, f"dead{number}", 1)]
    consumer = Keeping()
    before = len(os.listdir("/proc/self/fd"))
    running = Replay(tmp_path, "own", [consumer])
    running.start()
    while len(consumer.ids) < len(ids):
        time.sleep(0.01)
    held = len(os.listdir("/proc/self/fd"))
    assert running.stop()
    assert held - before < 20
    assert sorted(consumer.ids) == sorted(ids)


def test_the_segments_of_a_living_worker_are_its_own(tmp_path: Path) -> None:
    write(tmp_path, "alive")
    consumer = Keeping()
    with (tmp_path / "alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert replay(tmp_path, consumer, now_s=time.time() + 10 * KEEP_S)
    assert consumer.ids == []
    assert files(tmp_path) == {"alive-00000001.jnl", "alive.lock"}


def test_a_consumer_that_fails_does_not_keep_the_others_behind(tmp_path: Path) -> None:
    ids = write(tmp_path, "dead")
    broken, whole = Keeping("broken", failures=99), Keeping("whole")
    assert not replay(tmp_path, broken, whole)
    assert sorted(whole.ids) == sorted(ids) and broken.ids == []


def test_a_consumer_that_failed_is_asked_again(tmp_path: Path) -> None:
    ids = write(tmp_path, "dead")
    consumer = Keeping(failures=1)
    running = Replay(tmp_path, "own", [consumer])
    running.start()
    while not consumer.ids:
        time.sleep(0.01)
    assert running.stop()
    assert sorted(consumer.ids) == sorted(ids)


@pytest.mark.parametrize("damage", ["frame", "record"])
def test_a_damaged_segment_is_kept_and_the_rest_is_applied(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = write(tmp_path, "damaged")
    segment = tmp_path / "damaged-00000001.jnl"
    if damage == "frame":
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 0xFF  # in the second of three
        segment.write_bytes(data)
        expected = ids[:1]
    else:
        with Journal(str(tmp_path), "damaged", flush="record") as journal:
            journal.append(("of", "another", "version"))
        expected = ids
    later = write(tmp_path, "later")
    consumer = Keeping()
    assert replay(tmp_path, consumer, now_s=time.time() + 10 * KEEP_S)
    assert sorted(consumer.ids) == sorted(expected + later)
    assert any(name.startswith("damaged-") for name in files(tmp_path)), "people will want to look at it"
    assert caplog.text.count("is not applied") == 1


def test_segments_of_dead_workers_stay_a_week_after_they_were_applied(tmp_path: Path) -> None:
    write(tmp_path, "dead")
    written = max(path.stat().st_mtime for path in tmp_path.iterdir())
    consumer = Keeping()
    assert replay(tmp_path, consumer, now_s=written + KEEP_S - 60)
    assert files(tmp_path) == {"dead-00000001.jnl", "dead.lock"}
    assert replay(tmp_path, consumer, now_s=written + KEEP_S + 60)
    assert files(tmp_path) == set()
    assert len(consumer.ids) == 3


def test_what_a_consumer_has_not_got_is_kept_however_old(tmp_path: Path) -> None:
    write(tmp_path, "dead")
    later = time.time() + 10 * KEEP_S
    broken = Keeping("broken", failures=99)
    assert not replay(tmp_path, Keeping("whole"), broken, now_s=later)
    assert files(tmp_path) == {"dead-00000001.jnl", "dead.lock"}
    broken.failures = 0
    assert replay(tmp_path, Keeping("whole"), broken, now_s=later)
    assert files(tmp_path) == set() and len(broken.ids) == 3


def test_a_lock_without_segments_goes_too_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "gone.lock").touch()
    assert replay(tmp_path, Keeping())
    assert files(tmp_path) == {"gone.lock"}, "its process may be about to take it"
    assert replay(tmp_path, Keeping(), now_s=time.time() + 2 * KEEP_S)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("payload", [b"\xc1", b"\x01", b"\x91\x01"])
def test_a_payload_that_is_no_outcome_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="journal record"):
        decode(payload)


def test_an_outcome_survives_the_journal() -> None:
    outcome = make_outcome(make_request())
    assert decode(encode(outcome)) == outcome


def test_a_segment_made_ahead_does_not_end_the_one_being_written(tmp_path: Path) -> None:
    """The writer makes its next segment before the last one is full; until something is in it nothing is finished."""
    applied: list[bytes] = []

    class Ledger:
        name = "ledger"

        def position(self, segment: str) -> int:
            return 0

        def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
            applied.extend(record.id for record in records)

    replay = Replay(tmp_path, "w", [Ledger()])
    with Journal(str(tmp_path), "w", flush="record", segment_bytes=2000) as journal:
        sent = []
        for _ in range(12):
            outcome = make_outcome(make_request())
            sent.append(outcome.id)
            journal.append(encode(outcome))
            journal.sync()
            assert replay._pass()
            assert applied == sent
        assert len(list(tmp_path.glob("*.jnl"))) > 2
    assert replay._follow_all()
    os.close(replay.lock)
