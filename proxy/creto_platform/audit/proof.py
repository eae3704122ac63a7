"""Offline proofs: one text file that shows an entry is in a log, by ``c2sp.org/tlog-proof@v1``.

The entry itself rides along as extra data; the format does not authenticate that line, but the proof is checked
against the hash of exactly those bytes, so it need not be trusted.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

from creto_platform.audit import merkle, record
from creto_platform.audit.note import Verifier, open_checkpoint, unverified_checkpoint
from creto_platform.audit.port import ENTRY_LIMIT, Checkpoint, Entry, Policy, ProofInvalid
from creto_platform.audit.reader import LogReader
from creto_platform.crypto import Crypto

_HEADER = "c2sp.org/tlog-proof@v1"
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})", re.ASCII)
# 63 hashes, an entry and a note fit many times over.
_LIMIT = 1 << 20


def export_proof(reader: LogReader, index: int) -> str:
    """The proof file of a published entry. Raises ProofInvalid when there is no such entry."""
    # The note is read once: size, path and signatures must belong together while the log grows.
    note = reader.note()
    checkpoint = unverified_checkpoint(note)
    if not 0 <= index < checkpoint.size:
        raise ProofInvalid(f"entry {index} is not in the published log of {checkpoint.size}")
    tree = reader.tree(checkpoint.size)
    lines = [_HEADER, f"extra {_text(tree.entry(index))}", f"index {index}"]
    lines += [_text(digest) for digest in merkle.inclusion_proof(tree.node, index, checkpoint.size)]
    return "\n".join([*lines, "", note.decode()])


def check_proof(
    text: str, verifiers: Sequence[Verifier], crypto: Crypto, policy: Policy = "hybrid", entry: bytes | None = None
) -> tuple[Entry, Checkpoint]:
    """The entry a proof file proves, and the checkpoint it is in. Raises ProofInvalid or NoteInvalid.

    entry: the bytes to be proven, instead of those in the file.
    """
    if len(text) > _LIMIT:
        raise ProofInvalid("a proof file larger than 1 MiB")
    head, blank, note = text.partition("\n\n")
    lines = head.split("\n")
    if not blank or lines.pop(0) != _HEADER:
        raise ProofInvalid(f"not a {_HEADER} file")
    carried = _bytes(lines.pop(0).removeprefix("extra ")) if lines and lines[0].startswith("extra ") else None
    data = carried if entry is None else entry
    match = _INDEX.fullmatch(lines.pop(0)) if lines else None
    if match is None:
        raise ProofInvalid("the proof file has no index")
    if data is None or len(data) > ENTRY_LIMIT:
        raise ProofInvalid("the proof file carries no entry; give the entry as well")
    checkpoint, _ = open_checkpoint(note.encode(), verifiers, crypto, policy)
    index = int(match[1])
    path = [_bytes(line) for line in lines]
    merkle.verify_inclusion(merkle.leaf_hash(data), index, checkpoint.size, path, checkpoint.root)
    return Entry(index, data, record.decode(data)), checkpoint


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProofInvalid("a line of the proof file is not base64") from None
