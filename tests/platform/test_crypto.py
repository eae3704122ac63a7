"""The crypto port: suites, the self-test that guards providers, the composite signature, keys at rest."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_platform.crypto import (
    AES_256_GCM,
    COMPOSITE,
    ED25519,
    HKDF_SHA256,
    ML_DSA_65,
    ML_KEM_768,
    SHA_256,
    X25519,
    X_WING,
    BadAead,
    BadSignature,
    CryptoError,
    CryptographyProvider,
    EmbeddedCrypto,
    Key,
    KeyInvalid,
    KeyStore,
    ProviderUnavailable,
    Suite,
    UnknownSuite,
)
from creto_platform.crypto.vectors import COMPOSITE_MESSAGE, COMPOSITE_SEED, COMPOSITE_SIGNATURE

CRYPTO = EmbeddedCrypto()
PROVIDER = CryptographyProvider()


class Lying(CryptographyProvider):
    """A provider that is wrong in one method."""

    name = "lying"

    def __init__(self, method: str, answer: Any) -> None:
        super().__init__()
        setattr(self, method, answer)


LIES = {
    "hash": ("hash", lambda algorithm, data: bytes(32)),
    "kdf": ("kdf", lambda algorithm, **parameters: bytes(parameters["length"])),
    "verify accepts everything": ("verify", lambda *a, **k: None),
    "sign signs something else": ("sign", lambda key, message, context=b"": PROVIDER.sign(key, b"other", context)),
    "sign ignores the context": (
        "sign",
        lambda key, message, context=b"": PROVIDER.sign(key, message, b"") if context else PROVIDER.sign(key, message),
    ),
    "keygen ignores the seed": ("keygen", lambda algorithm, seed=None: PROVIDER.keygen(algorithm)),
    "seal returns the plaintext": ("seal", lambda algorithm, key, nonce, plaintext, associated: plaintext + bytes(16)),
    "open does not check": ("open", lambda algorithm, key, nonce, ciphertext, associated: bytes(len(ciphertext) - 16)),
    "decaps is constant": ("decaps", lambda key, ciphertext: bytes(32)),
    "encaps is unrelated": ("encaps", lambda a, public: (bytes(32), PROVIDER.encaps(a, public)[1])),
    "agree is constant": ("agree", lambda key, public: bytes(32)),
    "hash crashes": ("hash", lambda algorithm, data: 1 // 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_provider_with_a_wrong_known_answer_is_disabled_reported_and_never_used(lie: str) -> None:
    crypto = EmbeddedCrypto([Lying(*LIES[lie])])
    (status,) = crypto.status()
    assert not status.enabled
    assert status.detail
    with pytest.raises(ProviderUnavailable, match="lying is disabled"):
        crypto.keygen(COMPOSITE)
    with pytest.raises(ProviderUnavailable):
        crypto.provider(SHA_256)


def test_a_failed_provider_leaves_the_next_one_in_charge() -> None:
    crypto = EmbeddedCrypto([Lying(*LIES["hash"]), CryptographyProvider()])
    assert [status.enabled for status in crypto.status()] == [False, True]
    assert crypto.provider(SHA_256).name == "cryptography"


def test_a_provider_that_claims_an_algorithm_without_known_answer_is_disabled() -> None:
    crypto = EmbeddedCrypto([Lying("capabilities", lambda: frozenset({"ROT-13"}))])
    assert "ROT-13" in crypto.status()[0].detail


def test_the_default_provider_passes_and_implements_the_default_suite() -> None:
    (status,) = CRYPTO.status()
    assert status.enabled and status.detail == ""
    assert set(CRYPTO.default.algorithms) <= status.algorithms
    assert CRYPTO.suite(1) is CRYPTO.default


@pytest.mark.parametrize("number", [0, 2, 0x7FFF, -1, 65536, "1", True, None, 1.0])
def test_unknown_suites_are_refused(number: Any) -> None:
    with pytest.raises(UnknownSuite):
        CRYPTO.suite(number)


def suite(**changes: Any) -> Suite:
    fields: dict[str, Any] = {
        "id": 0xFF01,
        "name": "private",
        "kem": X25519,
        "kdf": HKDF_SHA256,
        "aead": AES_256_GCM,
        "hash": SHA_256,
        "signature": ED25519,
    }
    return Suite(**(fields | changes))


def test_a_registered_suite_is_found_and_cannot_be_redefined() -> None:
    crypto = EmbeddedCrypto()
    crypto.register(suite())
    assert crypto.suite(0xFF01) == suite()
    crypto.register(suite())
    with pytest.raises(UnknownSuite, match="already"):
        crypto.register(suite(signature=COMPOSITE))
    with pytest.raises(UnknownSuite, match="already"):
        crypto.register(suite(id=1))


@pytest.mark.parametrize("number", [0, -1, 65536, True])
def test_a_suite_number_is_16_bits_and_not_zero(number: int) -> None:
    with pytest.raises(UnknownSuite):
        EmbeddedCrypto().register(suite(id=number))


def test_a_suite_nobody_implements_is_not_registered() -> None:
    crypto = EmbeddedCrypto()
    with pytest.raises(ProviderUnavailable, match="BLAKE3"):
        crypto.register(suite(hash="BLAKE3"))
    with pytest.raises(UnknownSuite):
        crypto.suite(0xFF01)


def test_the_published_composite_vector_verifies() -> None:
    key = CRYPTO.keygen(COMPOSITE, COMPOSITE_SEED)
    assert (len(key.public), len(COMPOSITE_SIGNATURE)) == (1984, 3373)
    CRYPTO.verify(COMPOSITE, key.public, COMPOSITE_MESSAGE, COMPOSITE_SIGNATURE)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3373 * 8 - 1))
def test_no_bit_of_a_composite_signature_can_be_changed(bit: int) -> None:
    key = CRYPTO.keygen(COMPOSITE, COMPOSITE_SEED)
    changed = bytearray(COMPOSITE_SIGNATURE)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadSignature):
        CRYPTO.verify(COMPOSITE, key.public, COMPOSITE_MESSAGE, bytes(changed))


def test_halves_of_two_composite_signatures_do_not_combine() -> None:
    key = CRYPTO.keygen(COMPOSITE)
    one, two = CRYPTO.sign(key, b"one", b"c"), CRYPTO.sign(key, b"two", b"c")
    for mixed in (one[:3309] + two[3309:], two[:3309] + one[3309:]):
        for message in (b"one", b"two"):
            with pytest.raises(BadSignature):
                CRYPTO.verify(COMPOSITE, key.public, message, mixed, b"c")


def test_a_composite_signature_cannot_be_stripped_to_a_component() -> None:
    key = CRYPTO.keygen(COMPOSITE)
    signature = CRYPTO.sign(key, b"m")
    with pytest.raises(BadSignature):
        CRYPTO.verify(ML_DSA_65, key.public[:1952], b"m", signature[:3309])
    with pytest.raises(BadSignature):
        CRYPTO.verify(ED25519, key.public[1952:], b"m", signature[3309:])


def test_signatures_are_bound_to_their_context() -> None:
    key = CRYPTO.keygen(COMPOSITE)
    signature = CRYPTO.sign(key, b"m", b"creto/v1/delegation")
    CRYPTO.verify(COMPOSITE, key.public, b"m", signature, b"creto/v1/delegation")
    for context in (b"", b"creto/v1/revocation", b"creto/v1/delegatio", b"creto/v1/delegationm"):
        with pytest.raises(BadSignature):
            CRYPTO.verify(COMPOSITE, key.public, b"m", signature, context)
    with pytest.raises(CryptoError, match="255"):
        CRYPTO.sign(key, b"m", bytes(256))
    with pytest.raises(CryptoError, match="no context"):
        CRYPTO.sign(CRYPTO.keygen(ED25519), b"m", b"c")


@pytest.mark.parametrize("algorithm", [ED25519, ML_DSA_65, COMPOSITE])
@pytest.mark.parametrize("change", [-1, 1])
def test_signatures_and_keys_of_the_wrong_length_are_refused(algorithm: str, change: int) -> None:
    key = CRYPTO.keygen(algorithm)
    signature = CRYPTO.sign(key, b"m")
    with pytest.raises(BadSignature, match="bytes"):
        CRYPTO.verify(algorithm, key.public, b"m", (signature + b"\0")[: len(signature) + change])
    with pytest.raises(KeyInvalid, match="bytes"):
        CRYPTO.verify(algorithm, (key.public + b"\0")[: len(key.public) + change], b"m", signature)
    with pytest.raises(KeyInvalid, match="seed"):
        CRYPTO.keygen(algorithm, bytes(len(key.seed()) + change))


@pytest.mark.parametrize("algorithm", [ML_KEM_768, X_WING])
def test_a_kem_agrees_and_refuses_bad_lengths(algorithm: str) -> None:
    key = PROVIDER.keygen(algorithm)
    shared, ciphertext = PROVIDER.encaps(algorithm, key.public)
    assert PROVIDER.decaps(key, ciphertext) == shared
    for wrong in (b"", key.public[:-1], key.public + b"\0"):
        with pytest.raises(KeyInvalid):
            PROVIDER.encaps(algorithm, wrong)
    for wrong in (b"", ciphertext[:-1], ciphertext + b"\0"):
        with pytest.raises(KeyInvalid):
            PROVIDER.decaps(key, wrong)


@pytest.mark.parametrize("algorithm", [ML_KEM_768, X_WING])
def test_an_encapsulation_key_with_a_coefficient_beyond_the_modulus_is_refused(algorithm: str) -> None:
    public = bytearray(PROVIDER.keygen(algorithm).public)
    public[0:2] = b"\xff\xff"
    with pytest.raises(KeyInvalid, match="modulus"):
        PROVIDER.encaps(algorithm, bytes(public))


def test_a_small_order_x25519_point_is_refused() -> None:
    with pytest.raises(KeyInvalid, match="small order"):
        PROVIDER.agree(PROVIDER.keygen(X25519), bytes(32))
    with pytest.raises(KeyInvalid):
        PROVIDER.agree(PROVIDER.keygen(ED25519), PROVIDER.keygen(X25519).public)


def test_x_wing_agrees_with_the_hpke_implementation_of_the_library() -> None:
    """Opens what the library's HPKE sealed, with our decapsulation and the key schedule of RFC 9180 written out."""
    key = PROVIDER.keygen(X_WING)
    expanded = hashlib.shake_256(key.seed()).digest(96)
    theirs = hpke.MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), X25519PrivateKey.from_private_bytes(expanded[64:])
    )
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    sealed = suite.encrypt(b"plaintext", theirs.public_key(), info=b"info")
    shared = PROVIDER.decaps(key, sealed[:1120])

    suite_id = b"HPKE" + bytes.fromhex("647a00010002")

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm, "sha256")

    def expand(prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info
        return hmac.digest(prk, labelled + b"\x01", "sha256")[:length]

    schedule = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", b"info")
    secret = extract(shared, b"secret", b"")
    aead, nonce = expand(secret, b"key", schedule, 32), expand(secret, b"base_nonce", schedule, 12)
    assert AESGCM(aead).decrypt(nonce, sealed[1120:], b"") == b"plaintext"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=64), st.binary(max_size=16), st.integers(0, 10_000))
def test_aead_opens_only_what_was_sealed(plaintext: bytes, associated: bytes, place: int) -> None:
    key, nonce = bytes(range(32)), bytes(12)
    sealed = PROVIDER.seal(AES_256_GCM, key, nonce, plaintext, associated)
    assert PROVIDER.open(AES_256_GCM, key, nonce, sealed, associated) == plaintext
    changed = bytearray(sealed)
    changed[place % len(sealed)] ^= 0x40
    for ciphertext, bound in ((bytes(changed), associated), (sealed, associated + b"x"), (sealed[:-1], associated)):
        with pytest.raises(BadAead):
            PROVIDER.open(AES_256_GCM, key, nonce, ciphertext, bound)


def test_aead_keys_and_nonces_have_one_length() -> None:
    for key, nonce in ((bytes(16), bytes(12)), (bytes(32), bytes(8)), (bytes(32), b"")):
        with pytest.raises(KeyInvalid):
            PROVIDER.seal(AES_256_GCM, key, nonce, b"", b"")


def test_a_key_shows_its_id_but_never_its_seed() -> None:
    key = CRYPTO.keygen(COMPOSITE)
    assert key.kid == hashlib.sha256(key.public).digest()
    shown = repr(key) + str(key) + f"{key}"
    assert key.kid.hex()[:16] in shown
    assert key.seed().hex() not in shown and repr(key.seed()) not in shown
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(key)


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys", CRYPTO)


def test_keys_are_stored_once_as_private_files(store: KeyStore, tmp_path: Path) -> None:
    key = store.load_or_create("agent-a", COMPOSITE)
    path = tmp_path / "keys" / "agent-a.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(json.loads(path.read_text())["seed"]) == 88
    again = KeyStore(tmp_path / "keys", CRYPTO).load("agent-a")
    assert again is not None and again.kid == key.kid
    assert store.names() == ["agent-a"]
    assert list(path.parent.iterdir()) == [path]


def test_threads_that_create_one_key_at_once_get_the_same(tmp_path: Path) -> None:
    stores = [KeyStore(tmp_path / "keys", CRYPTO) for _ in range(6)]
    made: list[Key] = []
    threads = [
        threading.Thread(target=lambda s: made.append(s.load_or_create("k", ED25519)), args=(s,)) for s in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len({key.kid for key in made}) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_file_others_can_touch_is_refused(store: KeyStore, tmp_path: Path, mode: int) -> None:
    store.load_or_create("k", ED25519)
    (tmp_path / "keys" / "k.key").chmod(mode)
    with pytest.raises(KeyInvalid, match=r"k\.key: others may read it"):
        KeyStore(tmp_path / "keys", CRYPTO).load("k")


def test_a_link_is_not_followed_to_a_key(store: KeyStore, tmp_path: Path) -> None:
    store.load_or_create("k", ED25519)
    (tmp_path / "keys" / "l.key").symlink_to(tmp_path / "keys" / "k.key")
    with pytest.raises(KeyInvalid, match=r"l\.key"):
        store.load("l")


@pytest.mark.parametrize("name", ["", "../k", "a/b", ".hidden", "a\0b", "ä", "k" * 129])
def test_a_key_name_cannot_leave_the_directory(store: KeyStore, name: str) -> None:
    with pytest.raises(KeyInvalid):
        store.load(name)


def test_a_key_of_another_algorithm_is_refused(store: KeyStore) -> None:
    store.load_or_create("k", ED25519)
    with pytest.raises(KeyInvalid, match="not a id-MLDSA65-Ed25519-SHA512 key"):
        store.load_or_create("k", COMPOSITE)


def damaged_documents(document: dict[str, Any]) -> list[bytes]:
    changed = [
        document | {"kid": "00" * 32},
        document | {"seed": document["seed"][:-4]},
        document | {"seed": "!" + document["seed"][1:]},
        document | {"alg": "RSA"},
        document | {"alg": [ED25519]},
        document | {"v": 2},
        document | {"extra": 1},
        {name: value for name, value in document.items() if name != "kid"},
        [],
    ]
    return [b"", b"\xff", b"{", *(json.dumps(item).encode() for item in changed)]


def test_a_damaged_key_file_is_an_error_that_does_not_quote_the_seed(store: KeyStore, tmp_path: Path) -> None:
    key = store.load_or_create("k", ED25519)
    path = tmp_path / "keys" / "k.key"
    document = json.loads(path.read_text())
    for content in damaged_documents(document):
        path.write_bytes(content)
        with pytest.raises(KeyInvalid) as caught:
            KeyStore(tmp_path / "keys", CRYPTO).load("k")
        assert str(path) in str(caught.value)
        assert document["seed"][:12] not in str(caught.value)
    assert os.listdir(path.parent) == ["k.key"]
    assert key.algorithm == ED25519
