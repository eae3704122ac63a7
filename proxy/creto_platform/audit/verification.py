"""Verifying a whole log offline: signatures, every entry, every tile, the root; and that it extends an older head."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from creto_platform.audit import merkle
from creto_platform.audit.note import Verifier, open_checkpoint, parse_checkpoint, parse_vkey, unverified_checkpoint
from creto_platform.audit.port import AuditError, Checkpoint, LogTampered, NoteInvalid, Policy, ProofInvalid, Report
from creto_platform.audit.reader import LogReader
from creto_platform.audit.tiles import HASH_BYTES, WIDTH, RightEdge, TileStore, parse_tile_path, tile_path
from creto_platform.crypto import Crypto, EmbeddedCrypto

# Entries hashed per step; bounds memory whatever the size of the log.
_STEP = 64 * WIDTH


def verify(
    directory: Path,
    vkeys: Sequence[str],
    *,
    policy: Policy = "hybrid",
    crypto: Crypto | None = None,
    since: bytes | None = None,
) -> Report:
    """What is right and wrong with the log below ``directory`` (where ``checkpoint`` is), by its vkeys alone.

    since: an older signed checkpoint that the log must extend. Raises NoteInvalid only when ``vkeys`` themselves
    are unusable; everything about the log is a problem in the report. Time: one hash per entry; memory: a few MiB.
    """
    verifiers = [parse_vkey(text) for text in vkeys]
    crypto = EmbeddedCrypto() if crypto is None else crypto
    reader = LogReader(directory)
    try:
        head, signed = open_checkpoint(reader.note(), verifiers, crypto, policy)
    except AuditError as error:
        return Report("", 0, b"", (), 0, 0, (str(error),))
    problems: list[str] = []
    entries, tiles = _check_tree(TileStore(directory), head, problems)
    if since is not None and not problems:
        _check_since(reader, head, since, verifiers, crypto, policy, problems)
    names = tuple(str(verifier) for verifier in signed)
    return Report(head.origin, head.size, head.root, names, entries, tiles, tuple(problems))


def verify_local(
    directory: Path, signed_directory: Path, *, policy: Policy = "hybrid", crypto: Crypto | None = None
) -> Report:
    """``verify`` for the embedded log of this machine, by its own vkeys, and against what was signed last.

    directory, signed_directory: as given to ``EmbeddedAudit``. Raises NoteInvalid when there is no log.
    """
    vkeys = load_vkeys(directory / "vkeys")
    reader = LogReader(directory / "log")
    with (directory / "lock").open("rb") as lock:
        # A writer remembers what it signed before it shows it; between the two the files differ for a moment.
        fcntl.flock(lock, fcntl.LOCK_SH)
        note = reader.note()
        try:
            signed = parse_checkpoint((signed_directory / "last_signed").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, NoteInvalid) as error:
            raise NoteInvalid(f"{signed_directory / 'last_signed'}: {error}") from None
    report = verify(directory / "log", vkeys, policy=policy, crypto=crypto, since=note)
    shown = unverified_checkpoint(note)
    if shown != signed:
        problem = f"the checkpoint shows {shown.size} entries, {signed.size} were signed last"
        return replace(report, problems=(*report.problems, problem))
    return report


def load_vkeys(path: Path) -> list[str]:
    """vkeys from a file, one per line; empty lines and lines that start with # are skipped. Raises NoteInvalid."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NoteInvalid(f"{path}: {error}") from None
    return [line for line in lines if line and not line.startswith("#")]


def compare(first: bytes, second: bytes, reader: LogReader, verifiers: Sequence[Verifier], crypto: Crypto) -> None:
    """Raises LogTampered("fork") unless one of two signed checkpoints extends the other, by the tiles of ``reader``.

    Both notes are then the evidence: the log signed two histories.
    """
    heads = sorted((open_checkpoint(note, verifiers, crypto)[0] for note in (first, second)), key=lambda h: h.size)
    _check_extends(reader, *heads)


def _check_since(
    reader: LogReader,
    head: Checkpoint,
    since: bytes,
    verifiers: Sequence[Verifier],
    crypto: Crypto,
    policy: Policy,
    problems: list[str],
) -> None:
    try:
        _check_extends(reader, open_checkpoint(since, verifiers, crypto, policy)[0], head)
    except AuditError as error:
        problems.append(f"older checkpoint: {error}")


def _check_extends(reader: LogReader, old: Checkpoint, new: Checkpoint) -> None:
    if old.origin != new.origin:
        raise LogTampered("fork", f"the checkpoints are of different logs, {old.origin} and {new.origin}")
    if old.size > new.size:
        raise LogTampered("rollback", f"the log had {old.size} entries, now it has {new.size}")
    if old.size == 0:
        return
    proof = reader.consistency_proof(old.size, new.size)
    try:
        merkle.verify_consistency(old.size, new.size, proof, old.root, new.root)
    except ProofInvalid:
        raise LogTampered("fork", f"the tree of {new.size} does not extend the one signed at {old.size}") from None


def _check_tree(store: TileStore, head: Checkpoint, problems: list[str]) -> tuple[int, int]:
    """Builds the tree again from the entries and compares it with the tiles; (entries, files) that were checked."""
    edge = RightEdge()
    files = 0
    try:
        for first in range(0, head.size, _STEP):
            last = min(first + _STEP, head.size)
            batch: list[bytes] = []
            for number in range(first // WIDTH, (last + WIDTH - 1) // WIDTH):
                batch += store.entries(number, min(WIDTH, head.size - number * WIDTH))
                files += 1
            for name, data in edge.extend(batch).items():
                # Full tiles only: partial ones of a step in the middle are not part of the log.
                if ".p/" not in name and not name.startswith("tile/entries/"):
                    files += 1
                    level, number = parse_tile_path(name)
                    _check_tile(store, level, number, data, problems)
        for level, data in edge.partial_tiles().items():
            files += 1
            _check_tile(store, level, head.size >> (8 * (level + 1)), data, problems)
    except LogTampered as error:
        problems.append(str(error))
        return edge.size, files
    if edge.root() != head.root:
        problems.append(f"the entries lead to another root than the one signed at size {head.size}")
    return edge.size, files


def _check_tile(store: TileStore, level: int, number: int, expected: bytes, problems: list[str]) -> None:
    width = len(expected) // HASH_BYTES
    if b"".join(store.hashes(level, number, width)) != expected:
        problems.append(f"{tile_path(level, number, width)} does not hold the hashes of the entries")
