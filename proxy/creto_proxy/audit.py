"""One record per outcome, durable before the agent sees the end of its answer; everything else is derived from it.

``Recorder`` appends outcomes to this process' journal. ``Replay`` feeds journal segments, its own and those orphaned
by processes that died, to the consumers (ledger, audit log) in a worker thread. A segment belongs to whoever holds
the lock of its worker, so each is applied by one process at a time; consumers keep their position in the same
transaction as what they derived, so a crash replays and neither loses nor doubles.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from creto_hotpath.journal import Journal, JournalCorrupt, read_frames, recover
from creto_platform.audit import Audit
from creto_proxy.hookspecs import Consumer
from creto_proxy.model import Outcome, Usage

log = logging.getLogger("creto.journal")

BATCH = 2000
# Ledger and audit log are synced per batch, so a little patience is worth hundreds of records in one.
GATHER_S = 0.05
# Consumers are derived state: a failing one is retried, ever more slowly, while the journal keeps everything.
RETRY_S = (0.2, 1.0, 5.0, 15.0)

_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack
_FIELDS = tuple(Outcome.__slots__)
_USAGE_AT = _FIELDS.index("usage")


def encode(outcome: Outcome) -> bytes:
    """The journal payload: a msgpack array of the fields of ``Outcome`` in order, ``usage`` as a nested array."""
    row: list[Any] = [getattr(outcome, name) for name in _FIELDS]
    usage = outcome.usage
    row[_USAGE_AT] = [usage.certainty, usage.provider, usage.model, usage.tokens, usage.cost_nano_usd]
    packed: bytes = _pack(row)
    return packed


def decode(payload: bytes) -> Outcome:
    """The inverse of ``encode``. Raises ValueError when the payload is not an outcome."""
    row = msgpack.unpackb(payload, raw=False, use_list=False)
    if not isinstance(row, tuple) or len(row) != len(_FIELDS):
        raise ValueError(f"a journal record has {len(_FIELDS)} fields, this one has {len(row)}")
    values = list(row)
    values[_USAGE_AT] = Usage(*values[_USAGE_AT])
    return Outcome(*values)


class Recorder:
    """The audit stage. While ``healthy`` is False (full disk) new flows are refused."""

    def __init__(self, journal: Journal, wake: threading.Event) -> None:
        self._journal = journal
        self._wake = wake
        self.dirty = False  # written since the last sync

    @property
    def healthy(self) -> bool:
        return bool(self._journal.healthy)

    def record(self, outcome: Outcome) -> None:
        """Appends and writes; after it returns the record survives the death of this process."""
        try:
            self._journal.append(encode(outcome))
            self._journal.flush()
        except OSError as error:
            log.error("the journal cannot be written (%s); new requests are refused until it can", error)
            return
        self.dirty = True
        if not self._wake.is_set():
            self._wake.set()

    def probe(self) -> bool:
        """Tries again to write what a full disk kept back; True when the journal is healthy again."""
        try:
            self._journal.flush()
        except OSError:
            return False
        return self.healthy

    def sync(self) -> None:
        """Forces what is written onto the disk (fdatasync): survives the death of the machine."""
        self.dirty = False
        self._journal.sync()

    def close(self) -> None:
        self._journal.close()


class AuditTrail:
    """The consumer that puts every outcome into the Merkle audit log."""

    name = "audit"

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def position(self, segment: str) -> int:
        return self._audit.position(segment)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        self._audit.apply(segment, upto, [audit_record(outcome) for outcome in records])


_OUTCOMES = {"allow": "success", "approved": "success", "deny": "denied"}


def audit_record(outcome: Outcome) -> dict[str, Any]:
    """What outsiders can verify: who, by which chain, did what to which resource, with which result, and why."""
    usage = outcome.usage
    result = _OUTCOMES.get(outcome.decision, "failure")
    if outcome.error:
        result = "timeout" if outcome.error.endswith("timeout") else "failure"
    return {
        "id": outcome.id,
        "who": outcome.agent,
        "dch": outcome.chain_digest,
        "act": outcome.action,
        "res": f"{outcome.scheme}://{outcome.host}:{outcome.port}{outcome.target}",
        "out": result,
        "why": outcome.error or outcome.reason,
        "at": outcome.at_unix_ns,
        "ctx": {
            "chain": list(outcome.chain),
            "method": outcome.method,
            "status": outcome.status,
            "decision": outcome.decision,
            "policies": list(outcome.policies),
            "approval": outcome.approval_id,
            "model": usage.model,
            "tokens": usage.tokens,
            "cost_nano_usd": usage.cost_nano_usd,
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
        },
    }


class Replay:
    """Applies journal segments to consumers, in one worker thread."""

    def __init__(self, directory: Path, worker: str, consumers: Sequence[Consumer]) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._consumers = tuple(consumers)
        self.wake = threading.Event()
        self._stop = threading.Event()
        self._worker = worker
        self._locks: dict[str, int] = {}
        self._done: set[Path] = set()  # orphaned segments nobody writes to any more, applied to the end
        self._failures = 0
        self._lock_worker(worker)
        self._thread = threading.Thread(target=self._run, name="creto-replay", daemon=True)

    def start(self) -> None:
        """Adopts the segments of dead workers, then follows the journal until ``stop``."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Applies what is left; False when consumers could not keep up or kept failing. Nothing is lost then either:
        the next process adopts the segments."""
        self._stop.set()
        self.wake.set()
        self._thread.join(timeout_s)
        done = not self._thread.is_alive() and self._failures == 0
        for fd in self._locks.values():
            os.close(fd)
        return done

    def _run(self) -> None:
        self._adopt()
        while True:
            stopping = self._stop.is_set()
            self.wake.clear()
            try:
                self._apply_all()
                self._failures = 0
            except Exception:  # a worker thread's outermost boundary: keep following, the journal holds everything
                self._failures += 1
                log.exception("a journal consumer failed; it is retried")
            if stopping:
                return
            delay = RETRY_S[min(self._failures, len(RETRY_S) - 1)] if self._failures else None
            self.wake.wait(delay)
            self._stop.wait(delay if self._failures else GATHER_S)

    def _apply_all(self) -> None:
        for path in self.segments():
            if path in self._done:
                continue
            for consumer in self._consumers:
                self._apply(consumer, path)
            if _worker_of(path) != self._worker:
                self._done.add(path)

    def _apply(self, consumer: Consumer, path: Path) -> None:
        while True:
            start = consumer.position(path.name)
            records: list[Outcome] = []
            upto = start
            for payload, end in read_frames(path, start):
                upto = end
                records.append(decode(payload))
                if len(records) == BATCH:
                    break
            if not records:
                return
            consumer.apply(path.name, records, upto)
            if len(records) < BATCH:
                return

    def segments(self) -> list[Path]:
        """Segments of the workers whose lock this process holds, oldest first."""
        return sorted(p for p in self._directory.glob("*.jnl") if _worker_of(p) in self._locks)

    def _adopt(self) -> None:
        for worker in {_worker_of(path) for path in self._directory.glob("*.jnl")}:
            if worker not in self._locks and self._lock_worker(worker):
                for path in self._directory.glob(f"{worker}-*.jnl"):
                    try:
                        recover(path)
                    except JournalCorrupt as error:
                        log.error("%s; its records after that point are not applied", error)

    def _lock_worker(self, worker: str) -> bool:
        fd = os.open(self._directory / f"{worker}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._locks[worker] = fd
        return True


def _worker_of(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def outcomes(directory: Path, run: str) -> Iterator[Outcome]:
    """Every outcome of one run, in the order they happened; what the report is made of."""
    for path in sorted(directory.glob(f"{run}-*.jnl")):
        for payload, _ in read_frames(path, 0):
            yield decode(payload)
