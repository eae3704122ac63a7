"""C2SP signed notes and checkpoints: text, a blank line, one line per signature.

Two keys sign each checkpoint, each with its own line, so a public verifier that only knows Ed25519 ignores the other:

- type 0x01, Ed25519 over the text;
- type 0xff followed by ``creto.dev/mldsa65-checkpoint/v1\\n`` (the form the specification keeps for types without an
  assigned byte), ML-DSA-65 over the text with that name as context.

key id = SHA-256(name || "\\n" || type || public key)[:4].   vkey = name "+" hex(key id) "+" base64(type || public key).
Sources: c2sp.org/signed-note, c2sp.org/tlog-checkpoint; limits as in golang.org/x/mod/sumdb/note.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from creto_platform.audit.port import Checkpoint, NoteInvalid, Policy
from creto_platform.crypto import ED25519, ML_DSA_65, BadSignature, Crypto, CryptoError, Key

_MLDSA_NAME = b"creto.dev/mldsa65-checkpoint/v1"
_TYPES = {ED25519: b"\x01", ML_DSA_65: b"\xff" + _MLDSA_NAME + b"\n"}
_CONTEXTS = {ED25519: b"", ML_DSA_65: _MLDSA_NAME}
_PUBLIC_BYTES = {ED25519: 32, ML_DSA_65: 1952}
_DASH = "— "
_NOTE_LIMIT = 1 << 20
_SIGNATURES_LIMIT = 100
_NAME = re.compile(r"[^\s+\x00-\x1f\x7f]+")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_NEEDED = {"hybrid": {ED25519, ML_DSA_65}, "ed25519": {ED25519}}


@dataclass(frozen=True, slots=True)
class Verifier:
    """Who may have signed: key name, algorithm and public key."""

    name: str
    algorithm: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        typed = _TYPES[self.algorithm] + self.public
        return hashlib.sha256(self.name.encode() + b"\n" + typed).digest()[:4]

    @property
    def vkey(self) -> str:
        """One line of text to hand to verifiers."""
        typed = base64.b64encode(_TYPES[self.algorithm] + self.public).decode("ascii")
        return f"{self.name}+{self.key_id.hex()}+{typed}"

    def __str__(self) -> str:
        return f"{self.name} ({self.algorithm})"


@dataclass(frozen=True, slots=True)
class Signer:
    """A key that signs under a name."""

    name: str
    key: Key

    @property
    def verifier(self) -> Verifier:
        return Verifier(self.name, self.key.algorithm, self.key.public)

    def line(self, text: bytes, crypto: Crypto) -> str:
        signature = crypto.sign(self.key, text, _CONTEXTS[self.key.algorithm])
        return f"{_DASH}{self.name} {base64.b64encode(self.verifier.key_id + signature).decode('ascii')}\n"


def parse_vkey(text: str) -> Verifier:
    """The verifier a vkey describes. Raises NoteInvalid, also when its key id is not the one it should be."""
    name, _, rest = text.strip().partition("+")
    key_id, _, encoded = rest.partition("+")
    typed = _base64(encoded, "the key of a vkey")
    for algorithm, prefix in _TYPES.items():
        if typed.startswith(prefix) and len(typed) == len(prefix) + _PUBLIC_BYTES[algorithm]:
            verifier = Verifier(name, algorithm, typed[len(prefix) :])
            if not _NAME.fullmatch(name) or verifier.key_id.hex() != key_id:
                raise NoteInvalid("a vkey whose name or key id does not fit its key")
            return verifier
    raise NoteInvalid("a vkey of a type we do not know")


def sign(text: str, signers: Sequence[Signer], crypto: Crypto) -> bytes:
    """The note. Raises NoteInvalid when ``text`` cannot be a note."""
    data = text.encode()
    _check_text(data)
    return data + b"\n" + "".join(signer.line(data, crypto) for signer in signers).encode()


def open_note(data: bytes, verifiers: Sequence[Verifier], crypto: Crypto) -> tuple[str, list[Verifier]]:
    """The text and who of ``verifiers`` signed it. Raises NoteInvalid.

    A known key with a wrong signature refuses the whole note; unknown keys are ignored; without any known key the
    text is not to be believed, so that is refused too.
    """
    if len(data) > _NOTE_LIMIT:
        raise NoteInvalid("a note larger than 1 MiB")
    text, lines = _split(data)
    known = {(verifier.name, verifier.key_id): verifier for verifier in verifiers}
    signed: list[Verifier] = []
    for line in lines:
        name, key_id, signature = _signature_line(line)
        verifier = known.get((name, key_id))
        if verifier is None or verifier in signed:
            continue
        try:
            crypto.verify(verifier.algorithm, verifier.public, text, signature, _CONTEXTS[verifier.algorithm])
        except BadSignature:
            raise NoteInvalid(f"the signature of {verifier} does not verify") from None
        except CryptoError as error:
            raise NoteInvalid(f"the key of {verifier} cannot be used: {error}") from error
        signed.append(verifier)
    if not signed:
        raise NoteInvalid("no known key signed the note")
    return text.decode(), signed


def open_checkpoint(
    data: bytes, verifiers: Sequence[Verifier], crypto: Crypto, policy: Policy = "hybrid"
) -> tuple[Checkpoint, list[Verifier]]:
    """The checkpoint in a note that the policy's algorithms signed in the name of its origin. Raises NoteInvalid."""
    text, signed = open_note(data, verifiers, crypto)
    checkpoint = parse_checkpoint(text)
    algorithms = {verifier.algorithm for verifier in signed if verifier.name == checkpoint.origin}
    missing = _NEEDED[policy] - algorithms
    if missing:
        raise NoteInvalid(f"policy {policy} wants a signature of the log with {' and '.join(sorted(missing))}")
    return checkpoint, signed


def unverified_checkpoint(data: bytes) -> Checkpoint:
    """What a note says without asking who signed it. Raises NoteInvalid when it says no checkpoint."""
    text, _ = _split(data)
    return parse_checkpoint(text.decode())


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """The three lines that are signed."""
    root = base64.b64encode(checkpoint.root).decode("ascii")
    return f"{checkpoint.origin}\n{checkpoint.size}\n{root}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """Origin, size, root; no extension lines, our logs have none. Raises NoteInvalid."""
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not _NAME.fullmatch(lines[0]) or not _SIZE.fullmatch(lines[1]):
        raise NoteInvalid("not a checkpoint: origin, size and root on three lines")
    root = _base64(lines[2], "the root of a checkpoint")
    if len(root) != 32:
        raise NoteInvalid("the root of a checkpoint has 32 bytes")
    return Checkpoint(lines[0], int(lines[1]), root)


def _split(data: bytes) -> tuple[bytes, list[str]]:
    """(signed text with its final newline, signature lines)."""
    text, blank, signatures = data.rpartition(b"\n\n")
    if not blank or not signatures.endswith(b"\n"):
        raise NoteInvalid("not a signed note")
    _check_text(text + b"\n")
    try:
        lines = signatures.decode().split("\n")[:-1]
    except UnicodeDecodeError:
        raise NoteInvalid("a note that is not UTF-8") from None
    if not 0 < len(lines) <= _SIGNATURES_LIMIT:
        raise NoteInvalid(f"a note has 1 to {_SIGNATURES_LIMIT} signatures")
    return text + b"\n", lines


def _check_text(text: bytes) -> None:
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise NoteInvalid("a note that is not UTF-8") from None
    if not decoded.endswith("\n") or any(char < " " and char != "\n" for char in decoded):
        raise NoteInvalid("the text of a note ends in a newline and has no control characters")


def _signature_line(line: str) -> tuple[str, bytes, bytes]:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space or not _NAME.fullmatch(name):
        raise NoteInvalid("a malformed signature line")
    blob = _base64(encoded, "a signature")
    if len(blob) < 5:
        raise NoteInvalid("a malformed signature line")
    return name, blob[:4], blob[4:]


def _base64(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NoteInvalid(f"{what} is not base64") from None
    if base64.b64encode(data).decode("ascii") != text:
        raise NoteInvalid(f"{what} is not canonical base64")
    return data
