"""The audit port: an append-only Merkle log that outsiders can verify with public tools.

A record is a map with text keys and a 16-byte ``id``; appending the same id again changes nothing. Fields Creto
writes: ``id who dch act res out why at ctx`` (who, chain digest, action, resource, outcome, reason, unix ns, more).
Records hold no payload and no secret; the port cannot check that, whoever writes them must.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from creto_platform.errors import PlatformError

# tlog-tiles prefixes every entry with its length as uint16.
ENTRY_LIMIT = 65_535
ID_BYTES = 16

# "hybrid": the Ed25519 and the ML-DSA-65 signature must both be there and verify.
Policy: TypeAlias = Literal["hybrid", "ed25519"]


class AuditError(PlatformError):
    """Base of the errors of the audit port."""


class RecordInvalid(AuditError):
    """The record has no 16-byte id, cannot be encoded, or is larger than an entry may be."""


class AuditUnavailable(AuditError):
    """The log cannot be written now (disk full, I/O error, limit reached); nothing was acknowledged."""


class LogTampered(AuditError):
    """The log on disk is not the one that was signed.

    reason: "rollback" (older than what was signed), "fork" (another history) or "corrupt" (unreadable or damaged).
    Signing stops; nothing is repaired silently.
    """

    def __init__(self, reason: Literal["rollback", "fork", "corrupt"], detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NoteInvalid(AuditError):
    """A signed note or verifier key is malformed, or the signatures the policy wants are missing or wrong."""


class ProofInvalid(AuditError):
    """A proof is malformed or does not lead to the root."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The head of the tree: origin (name of the log), number of entries, RFC 6962 root (32 bytes)."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its index, its exact bytes (what the leaf hash covers) and the record in them."""

    index: int
    data: bytes
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What verifying a log found. signers: "name (Ed25519)"... that verified. problems: empty when all is well.

    size, root: of the checkpoint (0 and b"" when it could not be read). tiles, entries: how many were checked.
    """

    origin: str
    size: int
    root: bytes
    signers: tuple[str, ...]
    entries: int
    tiles: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class Audit(Protocol):
    """Synchronous; ``append`` and ``apply`` return when the records are on the disk (fdatasync)."""

    def append(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Durably appends the records that are not there yet; the index of the first one, old or new.

        All or none. Raises RecordInvalid, AuditUnavailable, LogTampered.
        """
        ...

    def apply(self, source: str, upto: int, records: Sequence[Mapping[str, Any]]) -> int:
        """``append`` and, in the same durable step, ``position(source) = max(position, upto)``.

        A record larger than an entry is replaced by a short one with its SHA-256 (``cut``), because a replay must
        not stop at it.
        """
        ...

    def apply_encoded(self, source: str, upto: int, ids: Sequence[bytes], entries: Sequence[bytes]) -> int:
        """``apply`` of records that are encoded already, as ``creto_platform.audit.encode`` does, with their ids."""
        ...

    def position(self, source: str) -> int:
        """How far ``source`` was applied; 0 when never seen."""
        ...

    def publish(self) -> Checkpoint:
        """Writes tiles and a signed checkpoint over everything appended so far and returns it."""
        ...

    def checkpoint(self) -> Checkpoint:
        """The last published head."""
        ...

    @property
    def size(self) -> int:
        """Entries appended and durable, published or not yet, as far as this process has seen."""
        ...

    @property
    def vkeys(self) -> tuple[str, ...]:
        """Verifier keys (C2SP signed-note vkeys) of this log: give them to whoever verifies it."""
        ...

    def find(self, record_id: bytes) -> int | None:
        """Index of the record with that id."""
        ...

    def read(self, first: int, limit: int) -> list[Entry]:
        """Published entries from ``first`` on, at most ``limit``."""
        ...

    def tail(self, count: int) -> list[Entry]:
        """The last ``count`` published entries, oldest first."""
        ...

    def inclusion_proof(self, index: int) -> list[bytes]:
        """RFC 6962 audit path of a published entry in the published tree. Raises ProofInvalid when out of range."""
        ...

    def consistency_proof(self, old_size: int) -> list[bytes]:
        """RFC 6962 proof that the published tree extends its first ``old_size`` entries. Raises ProofInvalid."""
        ...

    def export_proof(self, index: int) -> str:
        """A ``c2sp.org/tlog-proof@v1`` file for a published entry, with the entry itself as extra data."""
        ...

    @property
    def failure(self) -> str:
        """Why publishing last failed, "" when it did not: for health and metrics."""
        ...

    def close(self) -> None:
        """Publishes what is left and releases the files."""
        ...
