"""The log on local disk: durable first, then provable.

Write path, in this order: append to the write-ahead log -> fdatasync (one for all callers that wait together) ->
the callers return -> tiles and bundles -> fsync -> sign -> remember (size, root) in a second directory -> rename the
checkpoint -> side index. Whatever the moment of a crash, a start finds every acknowledged record exactly once and
never signs a tree that contradicts one it signed before.

    <directory>/log/        checkpoint and tile/: plain static files, may be served as they are
    <directory>/wal/        acknowledged records that may not be in tiles yet
    <directory>/keys/       seeds of the two checkpoint keys, 0600
    <directory>/index.db    record ids and source positions (derived)
    <directory>/origin, vkeys, lock
    <signed_directory>/last_signed

Several processes may hold the log open: whoever appends or publishes takes ``lock`` and first catches up.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from creto_platform.audit import merkle, proof, record
from creto_platform.audit.disk import Disk
from creto_platform.audit.index import Index
from creto_platform.audit.note import Signer, checkpoint_text, open_checkpoint, parse_checkpoint, sign
from creto_platform.audit.port import (
    ENTRY_LIMIT,
    AuditError,
    AuditUnavailable,
    Checkpoint,
    Entry,
    LogTampered,
    NoteInvalid,
)
from creto_platform.audit.reader import LogReader
from creto_platform.audit.ticket import Ticket
from creto_platform.audit.tiles import WIDTH, RightEdge, TileStore
from creto_platform.audit.wal import Frame, Wal
from creto_platform.crypto import ED25519, ML_DSA_65, Crypto, KeyStore

log = logging.getLogger("creto.audit")

_ORIGIN = re.compile(r"[a-z0-9][a-z0-9._/-]{0,254}", re.ASCII)
# Waits between attempts to publish after a failure.
_RETRY_S = (0.2, 1.0, 5.0, 15.0)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class EmbeddedAudit:
    """The audit port over two directories (0700). See the module for what is in them.

    organisation: first part of the log's name, used when the log is made. publish_every_s: how long an acknowledged
    record may stay out of the tree; None leaves publishing to ``publish``. publish_records: publish earlier when
    that many wait. pending_limit: refuse to append beyond that many unpublished records. disk: for fault injection.

    Raises LogTampered when the log is not the one that was signed last.
    """

    def __init__(
        self,
        directory: Path,
        signed_directory: Path,
        crypto: Crypto,
        *,
        organisation: str = "local",
        publish_every_s: float | None = 1.0,
        publish_records: int = 10_000,
        pending_limit: int = 200_000,
        wal_bytes: int = 8 << 20,
        disk: Disk | None = None,
    ) -> None:
        self._crypto = crypto
        self._disk = Disk() if disk is None else disk
        self._publish_every_s = publish_every_s
        self._publish_records = publish_records
        self._pending_limit = pending_limit
        self._wal_bytes = wal_bytes
        self._directory = directory
        self._log = directory / "log"
        self._signed = signed_directory / "last_signed"
        for path in (self._log, directory / "wal", signed_directory):
            self._disk.make_directory(path)

        self._store = TileStore(self._log)
        self._reader = LogReader(self._log)
        self._wal = Wal(directory / "wal", self._disk)
        self._index: Index | None = None
        # What this process knows; valid while not stale and last_signed has the same stamp.
        self._stale = True
        self._stamp: tuple[int, int, int] | None = None
        self._head: Checkpoint | None = None
        self._edge = RightEdge()
        self._pending: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._positions: dict[str, int] = {}
        self._moved: dict[str, int] = {}

        self._mutex = threading.Lock()
        self._queue_lock = threading.Lock()
        self._queue: list[Ticket] = []
        self._publisher: threading.Thread | None = None
        self._work, self._hurry, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._failure = ""
        self._lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._locked():
                self._signers = self._load_signers(organisation)
                self._load()
                if self._head is None:
                    self._publish()
        except BaseException:
            self._release()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> int:
        entries = [record.check_size(record.encode(item), item) for item in records]
        return self._submit(Ticket("", 0, entries, [item["id"] for item in records]))

    def apply(self, source: str, upto: int, records: Sequence[Mapping[str, Any]]) -> int:
        if not source:
            raise ValueError("a source has a name")
        entries = [record.cut(record.encode(item), item) for item in records]
        return self._submit(Ticket(source, upto, entries, [item["id"] for item in records]))

    def apply_encoded(self, source: str, upto: int, ids: Sequence[bytes], entries: Sequence[bytes]) -> int:
        if not source:
            raise ValueError("a source has a name")
        if len(ids) != len(entries):
            raise ValueError(f"{len(entries)} entries have {len(ids)} ids")
        fitting = [entry if len(entry) <= ENTRY_LIMIT else record.cut(entry, record.decode(entry)) for entry in entries]
        return self._submit(Ticket(source, upto, fitting, list(ids)))

    def position(self, source: str) -> int:
        with self._locked():
            self._refresh()
            return self._positions.get(source, 0)

    def publish(self) -> Checkpoint:
        with self._locked():
            self._refresh()
            try:
                if self._pending:
                    self._publish()
            except (OSError, sqlite3.Error) as error:
                raise AuditUnavailable(f"the audit log cannot be published: {error}") from error
            if self._head is None:
                raise LogTampered("rollback", "the head of the log disappeared")
            self._failure = ""
            return self._head

    def checkpoint(self) -> Checkpoint:
        return self._reader.checkpoint()

    @property
    def size(self) -> int:
        return self._edge.size + len(self._pending)

    @property
    def vkeys(self) -> tuple[str, ...]:
        return tuple(signer.verifier.vkey for signer in self._signers)

    @property
    def failure(self) -> str:
        return self._failure

    def find(self, record_id: bytes) -> int | None:
        with self._locked():
            self._refresh()
            return self._known([record_id]).get(record_id)

    def read(self, first: int, limit: int) -> list[Entry]:
        return self._reader.read(first, limit)

    def tail(self, count: int) -> list[Entry]:
        return self._reader.tail(count)

    def inclusion_proof(self, index: int) -> list[bytes]:
        return self._reader.inclusion_proof(index)

    def consistency_proof(self, old_size: int) -> list[bytes]:
        return self._reader.consistency_proof(old_size)

    def export_proof(self, index: int) -> str:
        return proof.export_proof(self._reader, index)

    def close(self) -> None:
        if self._lock_fd < 0:
            return
        self._stop.set()
        self._work.set()
        self._hurry.set()
        if self._publisher is not None:
            self._publisher.join()
        try:
            self.publish()
        except AuditError as error:
            # What was acknowledged is in the write-ahead log; the next start publishes it.
            log.error("the audit log was closed without publishing: %s", error)
        finally:
            self._release()

    def _submit(self, ticket: Ticket) -> int:
        with self._queue_lock:
            self._queue.append(ticket)
        with self._mutex:
            # Whoever held the mutex before us may have written our records with its own.
            if not ticket.done:
                self._commit_queue()
            waiting = len(self._pending)
        if ticket.error is not None:
            raise ticket.error
        self._schedule(waiting)
        return ticket.first

    def _commit_queue(self) -> None:
        """Group commit: one write and one fdatasync for every ticket that waits."""
        with self._queue_lock:
            batch, self._queue = self._queue, []
        # Whatever leaves this block unexpectedly must not look like success to those who wait.
        error: AuditError | None = AuditUnavailable("writing the audit log was interrupted")
        try:
            with self._file_lock():
                self._refresh()
                self._commit(batch)
            error = None
        except AuditError as raised:
            error = raised
        except (OSError, sqlite3.Error) as raised:
            self._stale = True
            error = AuditUnavailable(f"the audit log cannot be written: {raised}")
            error.__cause__ = raised
        finally:
            for ticket in batch:
                ticket.error, ticket.done = error, True

    def _commit(self, batch: Sequence[Ticket]) -> None:
        known = self._known([record_id for ticket in batch for record_id in ticket.ids])
        following = self.size
        frames: list[Frame] = []
        for ticket in batch:
            first = following
            fresh = ticket.fresh(known)
            following += len(fresh)
            known.update(zip(fresh, range(first, following), strict=True))
            ticket.first = known[ticket.ids[0]] if ticket.ids else first
            if fresh or ticket.upto > self._positions.get(ticket.source, 0):
                frames.append(Frame(first, ticket.source, ticket.upto, list(fresh.values()), tuple(fresh)))
        if following - self._edge.size > self._pending_limit:
            raise AuditUnavailable(f"{self._pending_limit} records wait to be published: {self._failure or 'too fast'}")
        if frames:
            self._wal.append(frames)
            self._admit(frames)

    def _known(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Indices of the ids that are in the log, published or pending."""
        if self._index is None:
            raise AuditUnavailable("the audit log is closed")
        found = {record_id: self._ids[record_id] for record_id in ids if record_id in self._ids}
        return found | self._index.find([record_id for record_id in ids if record_id not in found])

    def _admit(self, frames: Sequence[Frame]) -> None:
        """Takes durable frames into what is pending. Raises LogTampered when they do not continue the log."""
        for frame in frames:
            if frame.source:
                self._positions[frame.source] = max(frame.upto, self._positions.get(frame.source, 0))
                self._moved[frame.source] = self._positions[frame.source]
            if frame.first > self.size:
                raise LogTampered("corrupt", f"the write-ahead log jumps from {self.size} to {frame.first}")
            skip = self.size - frame.first
            ids = frame.ids or tuple(map(record.record_id, frame.entries))
            self._ids.update(zip(ids[skip:], range(self.size, self.size + len(ids)), strict=False))
            self._pending += frame.entries[skip:]

    def _schedule(self, waiting: int) -> None:
        if self._publish_every_s is None or not waiting:
            return
        if self._publisher is None:
            with self._queue_lock:
                # Made on first use, so that merely opening a log starts no thread.
                if self._publisher is None and not self._stop.is_set():
                    self._publisher = threading.Thread(target=self._run, name="creto-audit", daemon=True)
                    self._publisher.start()
        if waiting >= self._publish_records:
            self._hurry.set()
        self._work.set()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            self._work.wait()
            self._hurry.wait(self._publish_every_s)
            self._work.clear()
            self._hurry.clear()
            try:
                self.publish()
                failures = 0
            except Exception as error:  # the thread's outermost boundary: nothing may end publishing for good
                self._failure = str(error)
                log.error("publishing the audit log failed, it is tried again: %s", error)
                self._work.set()
                self._stop.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1

    def _publish(self) -> None:
        """Tiles, signature, last_signed, checkpoint, index, in that order. Raises OSError, sqlite3.Error."""
        self._stale = True
        edge = self._edge.copy()
        files = edge.extend(self._pending)
        self._write_tiles(files)
        head = Checkpoint(self._signers[0].name, edge.size, edge.root())
        text = checkpoint_text(head)
        note = sign(text, self._signers, self._crypto)
        # Before anyone sees the signature: once this is on disk no start will sign anything that contradicts it.
        self._disk.replace(self._signed, text.encode())
        self._disk.replace(self._log / "checkpoint", note)
        if self._index is not None:
            self._index.commit(self._ids, self._moved, edge.size)
        self._head, self._edge = head, edge
        self._pending, self._ids, self._moved = [], {}, {}
        self._stamp = _stamp(self._signed)
        self._prune(files)
        if self._wal.size_bytes > self._wal_bytes:
            self._wal.rotate()
        self._stale = False

    def _write_tiles(self, files: Mapping[str, bytes]) -> None:
        paths = [self._log / name for name in files]
        directories = list(dict.fromkeys(path.parent for path in paths))
        for directory in directories:
            self._disk.make_directory(directory)
        for path, data in zip(paths, files.values(), strict=True):
            self._disk.write(path, data)
        self._disk.sync(paths)
        self._disk.sync(directories)

    def _prune(self, files: Mapping[str, bytes]) -> None:
        """Removes partial tiles that a full one now stands in for, as tlog-tiles allows."""
        for name in files:
            partial = self._log / f"{name}.p"
            if ".p/" not in name and partial.is_dir():
                with contextlib.suppress(OSError):
                    for path in partial.iterdir():
                        self._disk.remove(path)
                    partial.rmdir()

    def _refresh(self) -> None:
        """Brings what we know up to date; the lock is held. Raises LogTampered."""
        if self._stale or _stamp(self._signed) != self._stamp:
            self._load()
        else:
            self._admit(self._wal.poll())

    def _load(self) -> None:
        """Reads everything from disk and refuses what is not the log that was signed."""
        self._stale = True
        stamp = _stamp(self._signed)
        signed, published = self._last_signed(), self._published()
        _compare(signed, published, self._signed)
        size = 0 if signed is None else signed.size
        edge = RightEdge.load(self._store, size)
        if signed is not None and edge.root() != signed.root:
            raise LogTampered("fork", f"the tiles do not lead to the root that was signed at size {size}")
        if published is not None and published.size < size:
            tree = self._reader.tree(size)
            if merkle.root(tree.node, published.size) != published.root:
                raise LogTampered("fork", f"the tree does not extend the published one of size {published.size}")
        self._open_index(size)
        self._edge, self._head, self._stamp = edge, signed, stamp
        self._pending, self._ids, self._moved = [], {}, {}
        self._admit(self._wal.open())
        if signed is not None and signed != published:
            # The crash came between remembering what is signed and showing it.
            note = sign(checkpoint_text(signed), self._signers, self._crypto)
            self._disk.replace(self._log / "checkpoint", note)
        self._stale = False

    def _open_index(self, size: int) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
        path = self._directory / "index.db"
        try:
            index = Index(path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in _DAMAGED:
                raise
            log.warning("%s is damaged and is made again from the log", path)
            for name in ("index.db", "index.db-wal", "index.db-shm"):
                self._disk.remove(self._directory / name)
            index = Index(path)
        self._index = index
        indexed = index.size
        if indexed > size:
            raise LogTampered("rollback", f"{indexed} entries were published once, {size} are signed now")
        while indexed < size:
            # Only after a crash, or when the index was lost.
            number, place = divmod(indexed, WIDTH)
            entries = self._store.entries(number, min(WIDTH, size - number * WIDTH))[place:]
            ids = {record.record_id(entry): indexed + at for at, entry in enumerate(entries)}
            indexed += len(entries)
            index.commit(ids, {}, indexed)
        self._positions = index.positions()

    def _last_signed(self) -> Checkpoint | None:
        try:
            return parse_checkpoint(self._signed.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (NoteInvalid, UnicodeDecodeError) as error:
            raise LogTampered("corrupt", f"{self._signed}: {error}") from None

    def _published(self) -> Checkpoint | None:
        data = self._store.checkpoint()
        if data is None:
            return None
        try:
            verifiers = [signer.verifier for signer in self._signers]
            return open_checkpoint(data, verifiers, self._crypto)[0]
        except NoteInvalid as error:
            raise LogTampered("corrupt", f"{self._log / 'checkpoint'}: {error}") from None

    def _load_signers(self, organisation: str) -> list[Signer]:
        keys = KeyStore(self._directory / "keys", self._crypto)
        ed25519 = keys.load_or_create("checkpoint-ed25519", ED25519)
        mldsa = keys.load_or_create("checkpoint-mldsa65", ML_DSA_65)
        path = self._directory / "origin"
        if not path.exists():
            self._disk.replace(path, f"{organisation}/{ed25519.kid.hex()[:12]}\n".encode())
        origin = path.read_text(encoding="ascii").strip()
        if not _ORIGIN.fullmatch(origin):
            raise LogTampered("corrupt", f"{path}: not the name of a log")
        signers = [Signer(origin, ed25519), Signer(origin, mldsa)]
        vkeys = "".join(f"{signer.verifier.vkey}\n" for signer in signers).encode()
        if not (self._directory / "vkeys").exists():
            self._disk.replace(self._directory / "vkeys", vkeys)
        return signers

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex, self._file_lock():
            yield

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        if self._lock_fd < 0:
            raise AuditUnavailable("the audit log is closed")
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _release(self) -> None:
        with self._mutex:
            self._wal.close()
            if self._index is not None:
                self._index.close()
                self._index = None
            os.close(self._lock_fd)
            self._lock_fd = -1


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _compare(signed: Checkpoint | None, published: Checkpoint | None, path: Path) -> None:
    """Raises LogTampered unless what is shown is what was signed last, or an earlier state of it."""
    if published is None:
        return
    if signed is None:
        raise LogTampered("rollback", f"{path} is missing though a checkpoint of size {published.size} was signed")
    if published.origin != signed.origin:
        raise LogTampered("fork", f"{path} is of log {signed.origin}, the checkpoint of {published.origin}")
    if published.size > signed.size:
        raise LogTampered("rollback", f"{path} knows {signed.size} entries, the checkpoint {published.size}")
    if published.size == signed.size and published.root != signed.root:
        raise LogTampered("fork", f"two roots were signed for size {signed.size}")
