"""What is read back from disk or handed over by strangers: journal, outcomes, audit log, proofs, delegation tokens."""

from __future__ import annotations

import atexit
import shutil
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from creto_hotpath._journal_file import ABBREVIATED, JournalCorrupt
from creto_platform.audit import LogTampered, NoteInvalid, ProofInvalid, Verifier, check_proof, merkle, parse_vkey
from creto_platform.audit import encode as encode_record
from creto_platform.audit.disk import Disk
from creto_platform.audit.note import checkpoint_text, open_checkpoint, unverified_checkpoint
from creto_platform.audit.tiles import decode_bundle, encode_bundle, parse_tile_path, tile_path
from creto_platform.audit.wal import Wal
from creto_platform.crypto import ED25519, ML_DSA_65, BadSignature, EmbeddedCrypto
from creto_platform.nhi import BadScope, Capability, Refused, spiffe
from creto_platform.nhi.delegation import parse
from creto_platform.wire import WireError, pack, unpack
from creto_proxy.audit import ENTRY, audit_record, decode, encode
from creto_proxy.batch import FIELD, LAYOUT, Made
from creto_proxy.model import Outcome, Usage

from .invariants import answer, forms, same, sizes

FORMS = forms("journal")
RECORDS = forms("records")
SIGNED = b"signed"


class Gullible(EmbeddedCrypto):
    """Believes one signature, so that what stands behind a verified signature is reached without keys."""

    def verify(self, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes = b"") -> None:
        if signature != SIGNED:
            raise BadSignature("not that one")


CRYPTO = Gullible()
VERIFIERS = (Verifier("log.test", ED25519, bytes(32)), Verifier("log.test", ML_DSA_65, bytes(1952)))


@cache
def _folder() -> Path:
    """A directory in memory where there is one: these targets write files thousands of times a second."""
    folder = Path(tempfile.mkdtemp(prefix="creto-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _frames(form: Any, path: Path) -> tuple[list[tuple[bytes, int]], str]:
    """What is read from a segment, and why reading stopped."""
    found: list[tuple[bytes, int]] = []
    try:
        for frame in form.read_frames(path):
            found.append(frame)
    except JournalCorrupt as error:
        return found, str(error)
    return found, ""


def check_journal(data: bytes) -> None:
    """A segment gives the same frames in both forms; a torn tail is cut off once, damage is refused untouched."""
    path = _folder() / "w-00000001.jnl"
    path.write_bytes(data)
    found, damage = same([_frames(form, path) for form in FORMS])
    assert b"".join(struct.pack("<I", len(payload)) for payload, _ in found) is not None
    for form in RECORDS:
        taken = form.Records(form.Layout("s"), data, 0, len(data))
        assert [(taken.payload(n), taken.end_of(n)) for n in range(len(taken))] == found
    for index, (payload, end) in enumerate(found):
        begin = found[index - 1][1] if index else 0
        assert payload and (data[begin + 8 : end] == payload or data[begin + 8] == ABBREVIATED)
    cut = [answer(form.recover, _again(path, data), refusals=JournalCorrupt) for form in FORMS]
    if damage:
        assert same(cut) == f"JournalCorrupt: {damage}" and path.read_bytes() == data
        return
    end = found[-1][1] if found else 0
    assert same(cut) == len(data) - end and path.read_bytes() == data[:end]
    assert _frames(FORMS[-1], path) == (found, "") and FORMS[-1].recover(path) == 0
    for size in list(sizes(data))[::8]:
        path.write_bytes(data[:size])
        early, _ = _frames(FORMS[-1], path)
        assert early == found[: len(early)], size
    for _, behind in found[:4]:
        path.write_bytes(data)
        assert list(FORMS[-1].read_frames(path, behind)) == [frame for frame in found if frame[1] > behind]


def _again(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def check_outcome(data: bytes) -> None:
    """A journal record is an outcome that is written again as it was read, or refused; consumers that take it as it
    stands get what they would get of the outcome."""
    usual = same([_derived(form, data) for form in RECORDS])
    try:
        outcome = decode(data)
    except ValueError:
        assert usual is None, "a record that cannot be read"
        return
    once = encode(outcome)
    assert encode(decode(once)) == once
    if usual is not None:
        values, entry = usual
        assert values == tuple(_values(outcome))
        assert entry == encode_record(audit_record(outcome))


def _derived(form: Any, payload: bytes) -> tuple[tuple[Any, ...], bytes] | None:
    """Every field of a record and its entry in the audit log; None for one that is left to ``decode``."""
    if not payload:
        return None
    head = struct.pack("<I", len(payload))
    frame = head + struct.pack("<I", FORMS[0].crc32c(head + payload)) + payload
    found = form.Records(form.Layout(LAYOUT.kinds), frame, 0, 2)
    assert (len(found), found.end, found.payload(0)) == (1, len(frame), payload)
    parts = tuple(_part(form, part) for part in ENTRY)
    rows, entries = found.rows(range(len(FIELD))), found.entries(parts)
    assert (found.odd == (0,)) == (rows == [None]) == (entries == [None])
    return None if found.odd else (rows[0], entries[0])


def _part(form: Any, part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(_part(form, each) for each in part)
    return form.Made(part.fields, part.function) if isinstance(part, Made) else part


def _values(outcome: Outcome) -> Iterator[Any]:
    for value in outcome:
        if isinstance(value, Usage):
            yield from (value.certainty, value.provider, value.model, value.tokens, value.cost_nano_usd)
        else:
            yield value


def check_wal(data: bytes) -> None:
    """The write-ahead log gives whole frames that are written as they were read; every prefix gives their beginning."""
    folder = _folder() / "wal"
    folder.mkdir(exist_ok=True)

    def read(content: bytes) -> Any:
        (folder / "00000001.wal").write_bytes(content)
        wal = Wal(folder, Disk())
        try:
            return wal.open()
        finally:
            wal.close()

    frames = answer(read, data, refusals=LogTampered)
    if isinstance(frames, str):
        return
    kept = (folder / "00000001.wal").read_bytes()
    assert data.startswith(kept) and read(kept) == frames
    for size in list(sizes(data))[::16]:
        early = read(data[:size])
        assert early == frames[: len(early)]
    for frame in frames:
        assert type(frame.first) is int and type(frame.upto) is int and isinstance(frame.source, str), frame
        assert all(isinstance(entry, bytes) for entry in frame.entries), frame


def check_tiles(data: bytes) -> None:
    """A bundle is exactly the entries it is made of. The first byte is how many are wanted."""
    width, bundle = data[0] if data else 0, data[1:]
    entries = answer(decode_bundle, bundle, width, refusals=LogTampered)
    assert isinstance(entries, str) or (len(entries) == width and encode_bundle(entries) == bundle)
    level, number = width % 64, int.from_bytes(bundle[:7], "big")
    assert parse_tile_path(tile_path(level, number)) == (level, number)


def check_note(data: bytes) -> None:
    """A note that is believed says exactly what was signed; a verifier key has one spelling."""
    found = answer(open_checkpoint, data, VERIFIERS, CRYPTO, "ed25519", refusals=NoteInvalid)
    shown = answer(unverified_checkpoint, data, refusals=NoteInvalid)
    if not isinstance(found, str):
        checkpoint, signers = found
        assert shown == checkpoint and signers and data.startswith(checkpoint_text(checkpoint).encode() + b"\n")
    if not isinstance(shown, str):
        assert data.startswith(checkpoint_text(shown).encode() + b"\n")
    text = data.decode("utf-8", "replace")
    verifier = answer(parse_vkey, text, refusals=NoteInvalid)
    assert isinstance(verifier, str) or verifier.vkey == text.strip()


def _naive_root(leaf: bytes, index: int, size: int, path: list[bytes]) -> bytes:
    """RFC 6962 section 2.1.1, read backwards. IndexError when the path is too short."""
    if size == 1:
        return leaf
    split = 1 << (size - 1).bit_length() - 1
    sibling = path.pop()
    if index < split:
        return merkle.node_hash(_naive_root(leaf, index, split, path), sibling)
    return merkle.node_hash(sibling, _naive_root(leaf, index - split, size - split, path))


def check_proof_file(data: bytes) -> None:
    """A proof that is accepted leads from its entry to the root that was signed, by the definition of the tree."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return  # the command refuses it
    found = answer(check_proof, text, VERIFIERS, CRYPTO, "ed25519", refusals=(ProofInvalid, NoteInvalid, LogTampered))
    if isinstance(found, str):
        return
    entry, checkpoint = found
    import base64

    lines = text.partition("\n\n")[0].split("\n")[3:]
    path = [base64.b64decode(line) for line in lines]
    root = _naive_root(merkle.leaf_hash(entry.data), entry.index, checkpoint.size, path)
    assert (root, path) == (checkpoint.root, [])


@cache
def _tree(size: int) -> tuple[bytes, ...]:
    return tuple(merkle.leaf_hash(bytes((n,))) for n in range(size))


def _node(level: int, index: int) -> bytes:
    return merkle.perfect_root(_tree(64)[index << level : index + 1 << level])


def check_merkle(data: bytes) -> None:
    """Only the true proof is accepted: size, place, which proof, then pairs (position, what is done there)."""
    if len(data) < 3:
        return
    size, place, kind = data[0] % 48 + 1, data[1] % 48, data[2] % 2
    if place >= size:
        return
    old = place + 1
    true = merkle.consistency_proof(_node, old, size) if kind else merkle.inclusion_proof(_node, place, size)
    proof = list(true)
    for at, what in zip(data[3::2], data[4::2], strict=False):
        spot = at % (len(proof) + 1)
        if what % 3 == 0:
            proof.insert(spot, _tree(64)[what % 64] if what & 4 else _node(what % 4, 0))
        elif spot < len(proof):
            if what % 3 == 1:
                del proof[spot]
            else:
                proof[spot] = _node(what % 5, 0)
    root, root_old = merkle.root(_node, size), merkle.root(_node, old)
    args: tuple[Any, ...] = (old, size, proof, root_old, root) if kind else (_tree(64)[place], place, size, proof, root)
    verify = merkle.verify_consistency if kind else merkle.verify_inclusion
    accepted = not isinstance(answer(verify, *args, refusals=ProofInvalid), str)
    assert accepted == (proof == true), (size, place, kind, proof, true)


def check_wire(data: bytes) -> None:
    """A value that is read is written as exactly the same bytes."""
    try:
        value = unpack(data, limit=4096)
    except WireError:
        return
    assert pack(value) == data and len(data) <= 4096


def check_token(data: bytes) -> None:
    """A delegation token that is read says exactly what was signed."""
    token = answer(parse, data, refusals=Refused)
    if isinstance(token, str):
        return
    body = token.body
    assert token.data == data
    rebuilt, signed = unpack(body.encode(), limit=1 << 16), unpack(token.signed, limit=1 << 16)
    assert isinstance(signed, dict)
    # Keys that begin with x- are for others and are kept in the signed bytes only.
    assert rebuilt == {key: value for key, value in signed.items() if not key.startswith("x-")}


def check_scope(data: bytes) -> None:
    """Ids, actions and resources have one spelling; a capability is within itself and never within a narrower one."""
    text, _, resource = data.decode("utf-8", "replace").partition("\n")
    name = answer(spiffe.parse, text, refusals=spiffe.BadSpiffeId)
    assert isinstance(name, str) or str(name) == text
    found = answer(Capability, text, resource, refusals=BadScope)
    if isinstance(found, str):
        return
    assert found.within(found)
    covered = answer(found.covers, text.removesuffix(".*"), resource, refusals=BadScope)
    assert isinstance(covered, (bool, str))
    if covered is True:
        assert Capability(text.removesuffix(".*"), resource).within(found)
