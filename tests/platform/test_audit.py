"""The audit log: RFC 6962 trees and proofs, tiles, notes, appending, verifying, refusing what was tampered with."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_platform.audit import (
    AuditError,
    AuditUnavailable,
    Checkpoint,
    EmbeddedAudit,
    LogReader,
    LogTampered,
    NoteInvalid,
    ProofInvalid,
    RecordInvalid,
    Verifier,
    check_proof,
    compare,
    load_vkeys,
    merkle,
    parse_vkey,
    unverified_checkpoint,
    verify,
    verify_local,
)
from creto_platform.audit.disk import Disk
from creto_platform.audit.note import Signer, checkpoint_text, open_checkpoint, open_note, parse_checkpoint, sign
from creto_platform.audit.tiles import RightEdge, decode_bundle, encode_bundle, parse_tile_path, tile_path
from creto_platform.crypto import ED25519, ML_DSA_65, EmbeddedCrypto

CRYPTO = EmbeddedCrypto()

# The eight leaves of the Certificate Transparency reference tests (RFC 6962 implementations) and the roots over the
# first n of them. ``naive_root`` below computes them again from the definition.
CT_LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def naive_root(entries: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, as it is written there."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    split = 1
    while split * 2 < len(entries):
        split *= 2
    return hashlib.sha256(b"\1" + naive_root(entries[:split]) + naive_root(entries[split:])).digest()


def naive_path(index: int, entries: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962 section 2.1.1."""
    if len(entries) == 1:
        return []
    split = 1
    while split * 2 < len(entries):
        split *= 2
    if index < split:
        return [*naive_path(index, entries[:split]), naive_root(entries[split:])]
    return [*naive_path(index - split, entries[split:]), naive_root(entries[:split])]


def naive_subproof(old: int, entries: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 6962 section 2.1.2."""
    if old == len(entries):
        return [] if whole else [naive_root(entries)]
    split = 1
    while split * 2 < len(entries):
        split *= 2
    if old <= split:
        return [*naive_subproof(old, entries[:split], whole), naive_root(entries[split:])]
    return [*naive_subproof(old - split, entries[split:], False), naive_root(entries[:split])]


def node_of(entries: Sequence[bytes]) -> merkle.Node:
    return lambda level, index: naive_root(entries[index << level : (index + 1) << level])


def leaves(count: int) -> list[bytes]:
    return [b"entry %d" % number for number in range(count)]


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number.to_bytes(16, "big"), "who": "spiffe://local/agent/a", "act": "httpRead", "n": number, **fields}


def records(first: int, last: int) -> list[dict[str, Any]]:
    return [record(number) for number in range(first, last)]


def open_log(path: Path, **options: Any) -> EmbeddedAudit:
    return EmbeddedAudit(path / "audit", path / "signed", CRYPTO, **({"publish_every_s": None} | options))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedAudit]:
    opened = open_log(tmp_path)
    yield opened
    opened.close()


def verifiers(audit: EmbeddedAudit) -> list[Verifier]:
    return [parse_vkey(vkey) for vkey in audit.vkeys]


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_the_certificate_transparency_vectors(size: int) -> None:
    entries = CT_LEAVES[:size]
    assert naive_root(entries).hex() == CT_ROOTS[size]
    edge = RightEdge()
    edge.extend(entries)
    assert edge.root().hex() == CT_ROOTS[size]
    assert merkle.root(node_of(entries), size).hex() == CT_ROOTS[size]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 11])
def test_proofs_are_those_of_the_rfc_and_verify(size: int) -> None:
    entries = leaves(size)
    node, root = node_of(entries), naive_root(entries)
    for index in range(size):
        proof = merkle.inclusion_proof(node, index, size)
        assert proof == naive_path(index, entries)
        merkle.verify_inclusion(merkle.leaf_hash(entries[index]), index, size, proof, root)
    for old in range(1, size + 1):
        proof = merkle.consistency_proof(node, old, size)
        assert proof == naive_subproof(old, entries, True)
        merkle.verify_consistency(old, size, proof, naive_root(entries[:old]), root)


@given(st.integers(1, 70), st.data())
def test_no_wrong_inclusion_proof_verifies(size: int, data: st.DataObject) -> None:
    entries = leaves(size)
    index = data.draw(st.integers(0, size - 1))
    proof, root, leaf = naive_path(index, entries), naive_root(entries), merkle.leaf_hash(entries[index])
    merkle.verify_inclusion(leaf, index, size, proof, root)
    wrong: list[tuple[bytes, int, int, list[bytes], bytes]] = [
        (merkle.leaf_hash(b"other"), index, size, proof, root),
        (leaf, index, size, proof, naive_root([*entries, b"x"])),
        (leaf, index, size, [*proof, bytes(32)], root),
        (leaf, index, size, [bytes(32), *proof], root),
        (leaf, -1, size, proof, root),
        (leaf, size, size, proof, root),
        (leaf, index, size, [item[:31] for item in proof] or [b""], root),
    ]
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        wrong += [
            (leaf, index, size, proof[:-1], root),
            (leaf, index, size, proof[1:], root),
            (leaf, index, size, [*proof[:place], hashlib.sha256(proof[place]).digest(), *proof[place + 1 :]], root),
            (leaf, index ^ 1, size, proof, root),
            # An inner node presented as a leaf hashes differently.
            (merkle.leaf_hash(leaf + proof[0]), index >> 1, (size + 1) // 2, proof[1:], root),
        ]
    for case in wrong:
        with pytest.raises(ProofInvalid):
            merkle.verify_inclusion(*case)


@given(st.integers(1, 70), st.data())
def test_no_wrong_consistency_proof_verifies(size: int, data: st.DataObject) -> None:
    entries = leaves(size)
    old = data.draw(st.integers(1, size))
    proof = naive_subproof(old, entries, True)
    old_root, root = naive_root(entries[:old]), naive_root(entries)
    merkle.verify_consistency(old, size, proof, old_root, root)
    forked = naive_root([b"changed", *entries[1:old]])
    wrong: list[tuple[int, int, list[bytes], bytes, bytes]] = [
        (old, size, proof, forked, root),
        (old, size, proof, old_root, naive_root([b"changed", *entries[1:]])),
        (old, size, [*proof, bytes(32)], old_root, root),
        (0, size, proof, old_root, root),
        (size + 1, size, proof, old_root, root),
        (old, size, proof, old_root[:31], root),
    ]
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        wrong += [
            (old, size, proof[:-1], old_root, root),
            (old, size, proof[1:], old_root, root),
            (old, size, [*proof[:place], bytes(32), *proof[place + 1 :]], old_root, root),
        ]
    for case in wrong:
        with pytest.raises(ProofInvalid):
            merkle.verify_consistency(*case)


@pytest.mark.parametrize(("index", "size"), [(-1, 1), (0, 0), (5, 5)])
def test_there_is_no_inclusion_proof_outside_the_tree(index: int, size: int) -> None:
    with pytest.raises(ProofInvalid):
        merkle.inclusion_proof(node_of(leaves(5)), index, size)


@pytest.mark.parametrize(("old", "size"), [(0, 5), (6, 5), (-1, 5)])
def test_there_is_no_consistency_proof_from_nothing_or_the_future(old: int, size: int) -> None:
    with pytest.raises(ProofInvalid):
        merkle.consistency_proof(node_of(leaves(5)), old, size)


@pytest.mark.parametrize(
    ("level", "number", "width", "path"),
    [
        (0, 0, 256, "tile/0/000"),
        (0, 273, 112, "tile/0/273.p/112"),
        (2, 0, 1, "tile/2/000.p/1"),
        (0, 1_234_067, 256, "tile/0/x001/x234/067"),
        ("entries", 999_999, 255, "tile/entries/x999/999.p/255"),
        ("entries", 1000, 256, "tile/entries/x001/000"),
    ],
)
def test_tile_paths_are_those_of_tlog_tiles(level: int | str, number: int, width: int, path: str) -> None:
    assert tile_path(level, number, width) == path


def test_a_tree_of_70_000_has_the_tiles_of_the_specification() -> None:
    edge = RightEdge()
    files: dict[str, bytes] = {}
    entries = leaves(70_000)
    for first in range(0, 70_000, 30_000):
        files |= edge.extend(entries[first : first + 30_000])
    names = [name for name in files if not name.startswith("tile/entries/")]
    assert sum(name.startswith("tile/0/") and ".p/" not in name for name in names) == 273
    assert sum(name.startswith("tile/1/") and ".p/" not in name for name in names) == 1
    for path, width in (("tile/0/273.p/112", 112), ("tile/1/001.p/17", 17), ("tile/2/000.p/1", 1)):
        assert len(files[path]) == 32 * width
    assert edge.root() == naive_root(entries)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 400), max_size=4), st.integers(0, 300))
def test_the_edge_is_the_same_however_it_was_reached(steps: list[int], last: int) -> None:
    once, stepwise = RightEdge(), RightEdge()
    entries = leaves(sum(steps) + last)
    files = once.extend(entries)
    at = 0
    for step in [*steps, last]:
        final = stepwise.extend(entries[at : at + step])
        at += step
        assert stepwise.root() == naive_root(entries[:at])
    assert (once.size, once.hashes, once.bundle) == (stepwise.size, stepwise.hashes, stepwise.bundle)
    assert all(files[name] == data for name, data in final.items())


@given(st.lists(st.binary(max_size=20), max_size=20), st.binary(max_size=30))
def test_bundles_read_back_and_nothing_else_does(entries: list[bytes], garbage: bytes) -> None:
    data = encode_bundle(entries)
    assert decode_bundle(data, len(entries)) == entries
    for wrong, width in ((data + b"\0", len(entries)), (data, len(entries) + 1), (data[:-1], max(1, len(entries)))):
        with pytest.raises(LogTampered):
            decode_bundle(wrong, width)
    try:
        assert encode_bundle(decode_bundle(garbage, 3)) == garbage
    except LogTampered as error:
        assert error.reason == "corrupt"


ED = Signer("example.com/log", CRYPTO.keygen(ED25519))
PQ = Signer("example.com/log", CRYPTO.keygen(ML_DSA_65))
BOTH = [ED.verifier, PQ.verifier]
HEAD = Checkpoint("example.com/log", 5, bytes(range(32)))
NOTE = sign(checkpoint_text(HEAD), [ED, PQ], CRYPTO)


def test_a_checkpoint_opens_with_both_or_only_the_classical_key() -> None:
    assert open_checkpoint(NOTE, BOTH, CRYPTO) == (HEAD, BOTH)
    assert open_checkpoint(NOTE, [ED.verifier], CRYPTO, "ed25519")[0] == HEAD
    text, signed = open_note(NOTE, [PQ.verifier], CRYPTO)
    assert (text, signed) == (checkpoint_text(HEAD), [PQ.verifier])


@pytest.mark.parametrize("known", [[ED.verifier], [PQ.verifier], []])
def test_the_hybrid_policy_wants_both_signatures(known: list[Verifier]) -> None:
    with pytest.raises(NoteInvalid):
        open_checkpoint(NOTE, known, CRYPTO)
    only = sign(checkpoint_text(HEAD), [ED], CRYPTO)
    with pytest.raises(NoteInvalid, match="ML-DSA-65"):
        open_checkpoint(only, BOTH, CRYPTO)


def test_a_signature_in_another_name_does_not_count_for_the_log() -> None:
    witness = Signer("witness.example", ED.key)
    note = sign(checkpoint_text(HEAD), [witness, PQ], CRYPTO)
    with pytest.raises(NoteInvalid, match="Ed25519"):
        open_checkpoint(note, [witness.verifier, PQ.verifier], CRYPTO)


def test_no_byte_of_the_signed_text_can_be_changed() -> None:
    text = checkpoint_text(HEAD).encode()
    for place in range(len(text)):
        changed = bytearray(NOTE)
        changed[place] ^= 1
        with pytest.raises(NoteInvalid):
            open_checkpoint(bytes(changed), [ED.verifier], CRYPTO, "ed25519")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(NOTE) - 1), st.integers(1, 255))
def test_a_mutated_note_never_says_anything_else(place: int, change: int) -> None:
    changed = bytearray(NOTE)
    changed[place] ^= change
    try:
        assert open_checkpoint(bytes(changed), BOTH, CRYPTO)[0] == HEAD
    except NoteInvalid:
        pass
    else:
        pytest.fail("a changed byte went unnoticed")


@given(st.binary(max_size=200))
def test_garbage_is_no_note(garbage: bytes) -> None:
    for data in (garbage, garbage + b"\n\n" + garbage + b"\n"):
        with pytest.raises(NoteInvalid):
            open_note(data, BOTH, CRYPTO)


def test_unknown_signatures_are_ignored_and_a_wrong_known_one_refuses() -> None:
    stranger = Signer("stranger.example", CRYPTO.keygen(ED25519))
    extended = NOTE + stranger.line(b"anything", CRYPTO).encode()
    assert open_checkpoint(extended, BOTH, CRYPTO)[0] == HEAD
    with pytest.raises(NoteInvalid, match="does not verify"):
        open_checkpoint(extended, [*BOTH, stranger.verifier], CRYPTO)
    with pytest.raises(NoteInvalid, match="1 to 100"):
        open_note(NOTE + b"".join([stranger.line(b"x", CRYPTO).encode()] * 99), BOTH, CRYPTO)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\n",
        "a\n1\n",
        "a\n01\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "a\n-1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "a\n1\n" + base64.b64encode(bytes(31)).decode() + "\n",
        "a\n1\nnot base64\n",
        "\n1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "a b\n1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "a\n1\n" + base64.b64encode(bytes(32)).decode() + "\nextension\n",
        "a\n1\n" + base64.b64encode(bytes(32)).decode(),
        "a\n" + "9" * 20 + "\n" + base64.b64encode(bytes(32)).decode() + "\n",
    ],
)
def test_what_is_not_a_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteInvalid):
        parse_checkpoint(text)


def test_vkeys_read_back_and_wrong_ones_are_refused() -> None:
    for verifier in BOTH:
        assert parse_vkey(verifier.vkey) == verifier
        name, key_id, encoded = verifier.vkey.split("+", 2)
        for wrong in (
            "",
            name,
            f"{name}+{key_id}",
            f"other+{key_id}+{encoded}",
            f"{name}+00000000+{encoded}",
            f"{name}+{key_id}+{encoded[:-4]}",
            f"{name}+{key_id}+!{encoded}",
            f"na me+{key_id}+{encoded}",
        ):
            with pytest.raises(NoteInvalid):
                parse_vkey(wrong)


def test_records_are_appended_once_in_order(log: EmbeddedAudit) -> None:
    assert log.append(records(0, 3)) == 0
    assert log.append(records(3, 5)) == 3
    assert log.append(records(2, 6)) == 2
    assert log.append([]) == log.size == 6
    assert log.append([record(9), record(9)]) == 6
    assert log.size == 7
    assert log.publish().size == 7
    assert log.append(records(0, 6)) == 0
    assert log.size == 7
    assert [entry.record["n"] for entry in log.read(0, 100)] == [0, 1, 2, 3, 4, 5, 9]


def test_position_moves_with_the_records_and_never_back(log: EmbeddedAudit, tmp_path: Path) -> None:
    assert log.position("run-1.jnl") == 0
    assert log.apply("run-1.jnl", 100, records(0, 2)) == 0
    assert log.position("run-1.jnl") == 100
    log.apply("run-1.jnl", 50, records(0, 2))
    log.apply("run-2.jnl", 7, [])
    assert (log.position("run-1.jnl"), log.position("run-2.jnl"), log.size) == (100, 7, 2)
    log.close()
    again = open_log(tmp_path)
    assert (again.position("run-1.jnl"), again.position("run-2.jnl"), again.size) == (100, 7, 2)
    again.close()


def test_an_entry_has_at_most_65535_bytes(log: EmbeddedAudit) -> None:
    envelope = len(encode(record(1, pad=b"")))
    # bin16 needs two more length bytes than bin8.
    largest = record(1, pad=bytes(65_535 - envelope - 1))
    assert len(encode(largest)) == 65_535
    log.append([largest])
    with pytest.raises(RecordInvalid, match="65536 bytes"):
        log.append([record(2, pad=bytes(65_535 - envelope))])
    assert log.publish().size == 1
    assert log.read(0, 1)[0].record == largest


def encode(item: dict[str, Any]) -> bytes:
    from creto_platform.audit import record as codec

    return codec.encode(item)


def test_a_replay_keeps_a_digest_of_what_is_too_large(log: EmbeddedAudit) -> None:
    large = record(1, res="r" * 70_000, out="success", ctx={"k": bytes(10)})
    log.apply("s", 1, [large, record(2)])
    log.publish()
    kept, following = (entry.record for entry in log.read(0, 2))
    assert kept["cut"] == {"sha256": hashlib.sha256(encode(large)).digest(), "size": len(encode(large))}
    assert (kept["id"], kept["out"], kept["res"], following["n"]) == (large["id"], "success", "r" * 1024, 2)
    assert log.apply("s", 2, [large]) == 0 and log.size == 2


@pytest.mark.parametrize(
    "bad",
    [{}, {"id": "text"}, {"id": bytes(15)}, {"id": bytes(17)}, record(1, x=object()), record(1, x=1 << 64)],
)
def test_one_bad_record_refuses_the_whole_batch(log: EmbeddedAudit, bad: dict[str, Any]) -> None:
    with pytest.raises(RecordInvalid):
        log.append([record(5), bad])
    assert log.size == 0


def test_entries_are_read_in_pages_and_from_the_end(log: EmbeddedAudit) -> None:
    log.append(records(0, 600))
    assert log.read(0, 10) == []
    log.publish()
    assert [entry.index for entry in log.read(250, 20)] == list(range(250, 270))
    assert [entry.record["n"] for entry in log.tail(3)] == [597, 598, 599]
    assert log.read(600, 5) == [] and log.tail(0) == []
    assert len(log.tail(10_000)) == 600
    assert log.find(record(300)["id"]) == 300
    assert log.find(bytes(15) + b"\xff") == 255
    assert log.find(b"\xff" * 16) is None
    reader = LogReader(Path(log._log))
    assert reader.find(record(300)["id"]) == 300 and reader.find(b"\xff" * 16) is None


def test_published_proofs_match_the_naive_tree(log: EmbeddedAudit) -> None:
    entries = [encode(item) for item in records(0, 700)]
    for first, last in ((0, 1), (1, 255), (255, 256), (256, 300), (300, 700)):
        log.append(records(first, last))
        head = log.publish()
        assert (head.size, head.root) == (last, naive_root(entries[:last]))
    for index in (0, 254, 255, 256, 512, 699):
        assert log.inclusion_proof(index) == naive_path(index, entries)
    for old in (1, 2, 255, 256, 257, 512, 699, 700):
        assert log.consistency_proof(old) == naive_subproof(old, entries, True)
    for call in (lambda: log.inclusion_proof(700), lambda: log.consistency_proof(701), lambda: log.export_proof(-1)):
        with pytest.raises(ProofInvalid):
            call()


def test_a_proof_file_is_checked_without_the_log(log: EmbeddedAudit) -> None:
    log.append(records(0, 300))
    log.publish()
    text = log.export_proof(299)
    assert text.startswith("c2sp.org/tlog-proof@v1\nextra ")
    entry, checkpoint = check_proof(text, verifiers(log), CRYPTO)
    assert (entry.index, entry.record["n"], checkpoint.size) == (299, 299, 300)
    head, _, note = text.partition("\n\n")
    lines = head.split("\n")
    bare = "\n".join([lines[0], *lines[2:], "", note])
    assert check_proof(bare, verifiers(log), CRYPTO, entry=entry.data)[0] == entry
    other = base64.b64encode(encode(record(1))).decode()
    for wrong in (
        "",
        bare,
        text.replace("@v1", "@v2", 1),
        text.replace("index 299", "index 298"),
        text.replace("index 299", "index 0299"),
        text.replace("index 299\n", ""),
        "\n".join([lines[0], f"extra {other}", *lines[2:], "", note]),
        "\n".join([*lines[:-1], "", note]),
        "\n".join([*lines[:4], *lines[3:], "", note]),
        text.replace("\n\n", "\n", 1),
        text.replace(lines[3], lines[3][:-4] + "!!!="),
    ):
        with pytest.raises((ProofInvalid, NoteInvalid)):
            check_proof(wrong, verifiers(log), CRYPTO)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=100))
def test_garbage_is_no_proof_file(garbage: str) -> None:
    for text in (garbage, f"c2sp.org/tlog-proof@v1\n{garbage}", f"c2sp.org/tlog-proof@v1\nindex 0\n\n{garbage}"):
        with pytest.raises((ProofInvalid, NoteInvalid)):
            check_proof(text, BOTH, CRYPTO)


def test_a_fresh_log_has_a_signed_empty_checkpoint(log: EmbeddedAudit, tmp_path: Path) -> None:
    report = verify(tmp_path / "audit" / "log", log.vkeys)
    assert (report.ok, report.size, report.root.hex()) == (True, 0, CT_ROOTS[0])
    assert load_vkeys(tmp_path / "audit" / "vkeys") == list(log.vkeys)


def test_a_whole_log_verifies_offline(log: EmbeddedAudit, tmp_path: Path) -> None:
    log.append(records(0, 1000))
    old = log.publish()
    note = (tmp_path / "audit" / "log" / "checkpoint").read_bytes()
    log.append(records(1000, 1500))
    log.publish()
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "audit" / "log", copied)
    report = verify(copied, log.vkeys, since=note)
    assert report.ok, report.problems
    assert (report.size, report.entries, old.size) == (1500, 1500, 1000)
    assert [signer.rpartition(" ")[2] for signer in report.signers] == ["(Ed25519)", "(ML-DSA-65)"]
    assert verify(copied, log.vkeys[:1], policy="ed25519").ok
    assert "policy hybrid" in verify(copied, log.vkeys[:1]).problems[0]
    local = verify_local(tmp_path / "audit", tmp_path / "signed")
    assert local.ok and local.size == 1500


def test_verification_finds_damage_in_every_file(log: EmbeddedAudit, tmp_path: Path) -> None:
    log.append(records(0, 600))
    log.publish()
    directory = tmp_path / "audit" / "log"
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 + 3 + 1
    for path in files:
        original = path.read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            changed = bytearray(original)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert not verify(directory, log.vkeys).ok, (path, place)
        path.write_bytes(original[:-1])
        assert not verify(directory, log.vkeys).ok, path
        path.unlink()
        assert not verify(directory, log.vkeys).ok, path
        path.write_bytes(original)
    assert verify(directory, log.vkeys).ok


def test_verification_in_steps_checks_the_tiles_of_every_level(
    log: EmbeddedAudit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("creto_platform.audit.verification._STEP", 256)
    log.append(records(0, 1000))
    log.publish()
    directory = tmp_path / "audit" / "log"
    report = verify(directory, log.vkeys)
    # 4 bundles, 4 tiles of leaves, 1 above.
    assert (report.ok, report.tiles) == (True, 9)
    upper = directory / "tile" / "1" / "000.p" / "3"
    upper.write_bytes(bytes(32) + upper.read_bytes()[32:])
    assert "tile/1/000.p/3" in verify(directory, log.vkeys).problems[0]


@given(st.integers(0, 62), st.integers(0, 10**9))
def test_tile_paths_read_back(level: int, number: int) -> None:
    assert parse_tile_path(tile_path(level, number)) == (level, number)


def test_verification_with_somebody_elses_keys_fails(log: EmbeddedAudit, tmp_path: Path) -> None:
    assert not verify(tmp_path / "audit" / "log", [verifier.vkey for verifier in BOTH]).ok
    with pytest.raises(NoteInvalid):
        verify(tmp_path / "audit" / "log", ["nonsense"])


def test_a_log_rewritten_with_the_real_keys_is_a_fork(tmp_path: Path) -> None:
    honest = open_log(tmp_path / "one")
    honest.append(records(0, 10))
    honest.publish()
    evidence = (tmp_path / "one" / "audit" / "log" / "checkpoint").read_bytes()
    honest.close()
    forged = tmp_path / "two"
    for name in ("keys", "origin", "vkeys"):
        source, target = tmp_path / "one" / "audit" / name, forged / "audit" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    liar = open_log(forged)
    liar.append(records(5, 40))
    liar.publish()
    report = verify(forged / "audit" / "log", liar.vkeys, since=evidence)
    assert "fork" in report.problems[0]
    note = (forged / "audit" / "log" / "checkpoint").read_bytes()
    with pytest.raises(LogTampered) as caught:
        compare(evidence, note, LogReader(forged / "audit" / "log"), verifiers(liar), CRYPTO)
    assert caught.value.reason == "fork"
    liar.append(records(100, 101))
    liar.publish()
    compare(note, liar._reader.note(), liar._reader, verifiers(liar), CRYPTO)
    liar.close()


def snapshot(path: Path, name: str) -> Path:
    target = path / f"snapshot-{name}"
    shutil.copytree(path / name, target)
    return target


def restore(path: Path, name: str, saved: Path) -> None:
    shutil.rmtree(path / name)
    shutil.copytree(saved, path / name)


def two_states(path: Path) -> dict[str, Path]:
    """A log of 10 entries saved, then grown to 300 with its partial tiles pruned."""
    log = open_log(path)
    log.append(records(0, 10))
    log.close()
    saved = {name: snapshot(path, name) for name in ("audit", "signed")}
    log = open_log(path)
    log.append(records(10, 300))
    log.close()
    return saved


def tampered(path: Path) -> str:
    with pytest.raises(LogTampered) as caught:
        open_log(path)
    return caught.value.reason


def test_a_log_restored_from_a_backup_is_refused(tmp_path: Path) -> None:
    saved = two_states(tmp_path)
    restore(tmp_path, "audit", saved["audit"])
    assert tampered(tmp_path) == "rollback"


def test_a_log_whose_second_place_was_restored_is_refused(tmp_path: Path) -> None:
    saved = two_states(tmp_path)
    restore(tmp_path, "signed", saved["signed"])
    assert tampered(tmp_path) == "rollback"


def test_a_log_whose_second_place_was_lost_is_refused(tmp_path: Path) -> None:
    two_states(tmp_path)
    (tmp_path / "signed" / "last_signed").unlink()
    assert tampered(tmp_path) == "rollback"
    (tmp_path / "audit" / "log" / "checkpoint").unlink()
    assert tampered(tmp_path) == "rollback"


def test_missing_or_changed_tiles_are_refused_at_start(tmp_path: Path) -> None:
    two_states(tmp_path)
    tile = tmp_path / "audit" / "log" / "tile" / "0" / "001.p" / "44"
    original = tile.read_bytes()
    tile.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    assert tampered(tmp_path) in ("corrupt", "fork")
    tile.unlink()
    assert tampered(tmp_path) == "rollback"
    tile.write_bytes(original)
    bundle = tmp_path / "audit" / "log" / "tile" / "entries" / "001.p" / "44"
    bundle.write_bytes(bundle.read_bytes().replace(b"httpRead", b"httpREAD", 1))
    assert tampered(tmp_path) == "corrupt"


def test_two_roots_for_one_size_are_refused(tmp_path: Path) -> None:
    two_states(tmp_path)
    last_signed = tmp_path / "signed" / "last_signed"
    origin, size, _ = last_signed.read_text().splitlines()
    last_signed.write_text(checkpoint_text(Checkpoint(origin, int(size), bytes(32))))
    assert tampered(tmp_path) == "fork"
    last_signed.write_text("nonsense")
    assert tampered(tmp_path) == "corrupt"


def test_a_lost_checkpoint_is_signed_again_as_it_was(tmp_path: Path) -> None:
    two_states(tmp_path)
    checkpoint = tmp_path / "audit" / "log" / "checkpoint"
    before = unverified_checkpoint(checkpoint.read_bytes())
    checkpoint.unlink()
    log = open_log(tmp_path)
    assert log.checkpoint() == before
    assert verify(tmp_path / "audit" / "log", log.vkeys).ok
    log.close()


def test_a_writer_stops_when_the_log_is_changed_under_it(tmp_path: Path) -> None:
    saved = two_states(tmp_path)
    log = open_log(tmp_path)
    restore(tmp_path, "signed", saved["signed"])
    with pytest.raises(LogTampered):
        log.append(records(300, 301))
    with pytest.raises(LogTampered):
        log.publish()
    log.close()


@pytest.mark.parametrize("damage", [b"", b"not a database", None])
def test_a_lost_index_is_made_again_and_still_knows_every_record(tmp_path: Path, damage: bytes | None) -> None:
    log = open_log(tmp_path)
    log.append(records(0, 600))
    log.close()
    for path in (tmp_path / "audit").glob("index.db*"):
        path.unlink()
    if damage is not None:
        (tmp_path / "audit" / "index.db").write_bytes(damage)
    log = open_log(tmp_path)
    assert log.append(records(0, 601)) == 0
    assert log.size == 601 and log.find(record(599)["id"]) == 599
    log.close()


def test_processes_that_share_a_log_append_in_turn(tmp_path: Path) -> None:
    """Two handles behave as two processes: each has its own lock description, cache and index connection."""
    one, two = open_log(tmp_path), open_log(tmp_path)
    assert one.append(records(0, 2)) == 0
    assert two.append(records(2, 4)) == 2
    assert two.append(records(0, 1)) == 0
    assert one.publish().size == 4
    assert two.append(records(3, 6)) == 3
    assert two.publish().size == 6
    assert one.append(records(4, 7)) == 4
    two.apply("s", 9, records(0, 1))
    assert one.position("s") == 9
    one.close()
    assert two.checkpoint().size == 7
    assert [entry.record["n"] for entry in two.read(0, 10)] == list(range(7))
    two.close()
    assert verify_local(tmp_path / "audit", tmp_path / "signed").ok


def test_threads_share_one_write_and_each_record_is_there_once(tmp_path: Path) -> None:
    log = open_log(tmp_path, publish_every_s=0.01, publish_records=50)
    firsts: dict[int, int] = {}

    def work(worker: int) -> None:
        for step in range(20):
            first = worker * 1000 + step * 5
            firsts[first] = log.append(records(first, first + 5))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    log = open_log(tmp_path)
    numbers = [entry.record["n"] for entry in log.read(0, 1000)]
    assert sorted(numbers) == sorted(n for first in firsts for n in range(first, first + 5))
    assert all(numbers[at] == first for first, at in firsts.items())
    log.close()


def test_the_publisher_brings_records_into_the_tree_by_itself(tmp_path: Path) -> None:
    published = threading.Event()

    class Watching(Disk):
        def replace(self, path: Path, data: bytes) -> None:
            super().replace(path, data)
            if path.name == "checkpoint" and b"\n3\n" in data:
                published.set()

    log = open_log(tmp_path, publish_every_s=0.01, disk=Watching())
    log.append(records(0, 3))
    assert published.wait(60)
    log.close()


class Full(Disk):
    """A disk that is full for some files."""

    def __init__(self) -> None:
        self.full: set[str] = set()

    def _check(self, what: str) -> None:
        if what in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def append(self, fd: int, data: bytes) -> None:
        if "wal" in self.full:
            super().append(fd, data[: len(data) // 2])
        self._check("wal")
        super().append(fd, data)

    def sync_data(self, fd: int) -> None:
        self._check("sync")
        super().sync_data(fd)

    def write(self, path: Path, data: bytes) -> None:
        self._check(path.name)
        super().write(path, data)


@pytest.mark.parametrize("where", ["wal", "sync"])
def test_a_full_disk_acknowledges_nothing_and_recovers(tmp_path: Path, where: str) -> None:
    disk = Full()
    log = open_log(tmp_path, disk=disk)
    log.append(records(0, 2))
    disk.full = {where}
    with pytest.raises(AuditUnavailable, match="No space left"):
        log.append(records(2, 4))
    assert log.size == 2
    disk.full = set()
    assert log.append(records(3, 5)) == 2
    log.close()
    log = open_log(tmp_path)
    assert [entry.record["n"] for entry in log.read(0, 10)] == [0, 1, 3, 4]
    log.close()


def test_publishing_on_a_full_disk_fails_and_is_retried_without_loss(tmp_path: Path) -> None:
    disk = Full()
    log = open_log(tmp_path, disk=disk)
    log.append(records(0, 5))
    for name in ("5", "last_signed.new", "checkpoint.new"):
        disk.full = {name}
        with pytest.raises(AuditUnavailable, match="No space left"):
            log.publish()
        disk.full = set()
        if name != "checkpoint.new":
            assert log.append(records(4, 5)) == 4
    assert log.publish().size == 5
    assert verify_local(tmp_path / "audit", tmp_path / "signed").ok
    log.close()


def test_too_many_unpublished_records_are_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path, pending_limit=10)
    log.append(records(0, 10))
    with pytest.raises(AuditUnavailable, match="10 records wait"):
        log.append(records(10, 11))
    log.publish()
    assert log.append(records(10, 11)) == 10
    log.close()


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    log.close()
    for call in (
        lambda: log.append(records(0, 1)),
        lambda: log.position("s"),
        log.publish,
        lambda: log.find(bytes(16)),
    ):
        with pytest.raises(AuditUnavailable, match="closed"):
            call()


def test_the_write_ahead_log_is_dropped_once_published(tmp_path: Path) -> None:
    log = open_log(tmp_path, wal_bytes=1000)
    for first in range(0, 100, 10):
        log.apply("s", first + 10, records(first, first + 10))
        log.publish()
    files = list((tmp_path / "audit" / "wal").iterdir())
    assert len(files) == 1 and files[0].stat().st_size <= 1500
    log.close()
    log = open_log(tmp_path)
    assert (log.size, log.position("s")) == (100, 100)
    log.close()


def test_partial_tiles_go_when_the_full_one_is_there(log: EmbeddedAudit, tmp_path: Path) -> None:
    for last in (10, 200, 256):
        log.append(records(0, last))
        log.publish()
    tiles = tmp_path / "audit" / "log" / "tile"
    assert sorted(path.name for path in (tiles / "0").iterdir()) == ["000"]
    assert sorted(path.name for path in (tiles / "entries").iterdir()) == ["000"]
    assert verify(tmp_path / "audit" / "log", log.vkeys).ok


def test_the_state_is_private(log: EmbeddedAudit, tmp_path: Path) -> None:
    log.append(records(0, 5))
    log.publish()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0 or path.name.startswith("index.db-"), path


@pytest.fixture(scope="session")
def go_verify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program beside this file, built with the unmodified golang.org/x/mod of its go.sum."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go toolchain")
    binary = tmp_path_factory.mktemp("go") / "go_verify"
    built = subprocess.run(
        [go, "build", "-o", str(binary), "."],
        cwd=Path(__file__).parent / "go_verify",
        env={**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false", "GOTOOLCHAIN": "local"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if built.returncode:
        pytest.skip(f"golang.org/x/mod cannot be had: {built.stderr.strip().splitlines()[-1]}")
    return binary


def test_unmodified_go_tools_verify_checkpoint_inclusion_and_consistency(
    log: EmbeddedAudit, tmp_path: Path, go_verify: Path
) -> None:
    roots = {}
    for last in (1, 2, 255, 256, 257, 600, 1000, 1030):
        log.append(records(0, last))
        roots[last] = log.publish().root
    job: dict[str, Any] = {
        "dir": str(tmp_path / "audit" / "log"),
        "note": log._reader.note(),
        "vkey": log.vkeys[0],
        "records": [
            {"index": index, "entry": log.read(index, 1)[0].data, "proof": log.inclusion_proof(index)}
            for index in (0, 1, 254, 255, 256, 511, 768, 1029)
        ],
        "trees": [{"size": size, "root": root, "proof": log.consistency_proof(size)} for size, root in roots.items()],
    }

    def run(changed: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        document = json.dumps(job | changed, default=lambda data: base64.b64encode(data).decode())
        return subprocess.run([go_verify], input=document, capture_output=True, text=True, timeout=60, check=False)

    accepted = run({})
    assert (accepted.stdout, accepted.returncode) == ("verified\n", 0), accepted.stderr
    refused: list[dict[str, Any]] = [
        {"note": log._reader.note().replace(b"\n1030\n", b"\n1031\n")},
        {"vkey": ED.verifier.vkey},
        {"records": [job["records"][0] | {"entry": b"other"}]},
        {"trees": [job["trees"][3] | {"root": bytes(32)}]},
    ]
    assert [run(changed).returncode for changed in refused] == [1, 1, 1, 1]


def test_audit_errors_are_platform_errors() -> None:
    from creto_platform import PlatformError

    for error in (AuditUnavailable, LogTampered, NoteInvalid, ProofInvalid, RecordInvalid):
        assert issubclass(error, AuditError) and issubclass(error, PlatformError)
