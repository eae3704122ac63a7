"""The append-only Merkle log (``port``; ``embedded``: the write path; ``verification``, ``proof``: for outsiders)."""

from __future__ import annotations

from creto_platform.audit.embedded import EmbeddedAudit
from creto_platform.audit.note import Verifier, open_checkpoint, parse_vkey, unverified_checkpoint
from creto_platform.audit.port import (
    ENTRY_LIMIT,
    Audit,
    AuditError,
    AuditUnavailable,
    Checkpoint,
    Entry,
    LogTampered,
    NoteInvalid,
    Policy,
    ProofInvalid,
    RecordInvalid,
    Report,
)
from creto_platform.audit.proof import check_proof, export_proof
from creto_platform.audit.reader import LogReader
from creto_platform.audit.record import encode
from creto_platform.audit.verification import compare, load_vkeys, verify, verify_local

__all__ = [
    "ENTRY_LIMIT",
    "Audit",
    "AuditError",
    "AuditUnavailable",
    "Checkpoint",
    "EmbeddedAudit",
    "Entry",
    "LogReader",
    "LogTampered",
    "NoteInvalid",
    "Policy",
    "ProofInvalid",
    "RecordInvalid",
    "Report",
    "Verifier",
    "check_proof",
    "compare",
    "encode",
    "export_proof",
    "load_vkeys",
    "open_checkpoint",
    "parse_vkey",
    "unverified_checkpoint",
    "verify",
    "verify_local",
]
