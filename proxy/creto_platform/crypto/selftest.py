"""Known answers and tamper checks that a provider must pass before it is used.

The platform asks the questions; a provider cannot vouch for itself. Deterministic operations are compared with
published answers, randomised ones (signing, encapsulation) are closed by the deterministic inverse, and every
"refuse" is tried as well as every "accept": an algorithm that says yes to everything fails.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from creto_platform.crypto import vectors
from creto_platform.crypto.port import (
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
    Provider,
    SelfTestFailed,
)

_MESSAGE = b"creto self-test"


def check(provider: Provider) -> None:
    """Returns when the provider gives every known answer for what it claims. Raises SelfTestFailed."""
    for algorithm in sorted(provider.capabilities()):
        test = _TESTS.get(algorithm)
        if test is None:
            raise SelfTestFailed(algorithm, "there is no known answer to hold it to")
        try:
            test(provider)
        except SelfTestFailed:
            raise
        except (CryptoError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise SelfTestFailed(algorithm, f"{type(error).__name__}: {error}") from error


def _expect(algorithm: str, what: str, actual: bytes, expected: str) -> None:
    if not hmac.compare_digest(actual, bytes.fromhex(expected)):
        raise SelfTestFailed(algorithm, f"{what}: not the known answer")


def _sha256(provider: Provider) -> None:
    # FIPS 180-4 example "abc".
    digest = provider.hash(SHA_256, b"abc")
    _expect(SHA_256, "digest", digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def _hkdf(provider: Provider) -> None:
    # RFC 5869 A.1.
    okm = provider.kdf(
        HKDF_SHA256,
        secret=b"\x0b" * 22,
        salt=bytes(range(13)),
        info=bytes(range(0xF0, 0xFA)),
        length=42,
    )
    _expect(
        HKDF_SHA256,
        "output",
        okm,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    )


def _gcm(provider: Provider) -> None:
    # McGrew and Viega, test cases 14 and 13: AES-256, zero key and nonce.
    key, nonce = bytes(32), bytes(12)
    sealed = provider.seal(AES_256_GCM, key, nonce, bytes(16), b"")
    _expect(AES_256_GCM, "ciphertext", sealed, "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919")
    _expect(AES_256_GCM, "empty", provider.seal(AES_256_GCM, key, nonce, b"", b""), "530f8afbc74536b9a963b4f1c4cb738b")
    _expect(AES_256_GCM, "plaintext", provider.open(AES_256_GCM, key, nonce, sealed, b""), bytes(16).hex())
    for ciphertext, associated in ((_flipped(sealed, 0), b""), (_flipped(sealed, -1), b""), (sealed, b"x")):
        try:
            provider.open(AES_256_GCM, key, nonce, ciphertext, associated)
        except BadAead:
            continue
        raise SelfTestFailed(AES_256_GCM, "a changed ciphertext was opened")


def _ed25519(provider: Provider) -> None:
    # RFC 8032 7.1 TEST 1.
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = provider.keygen(ED25519, seed)
    _expect(ED25519, "key", key.public, "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    _expect(
        ED25519,
        "signature",
        provider.sign(key, b""),
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    )
    _sign_and_tamper(provider, ED25519, contexts=(b"",))


def _mldsa65(provider: Provider) -> None:
    # The ML-DSA half of the composite vector: same seed, same key, and its signature verifies under the label.
    key = provider.keygen(ML_DSA_65, vectors.COMPOSITE_SEED[:32])
    digest = provider.keygen(COMPOSITE, vectors.COMPOSITE_SEED).public[: len(key.public)]
    _expect(ML_DSA_65, "key", key.public, digest.hex())
    _sign_and_tamper(provider, ML_DSA_65, contexts=(b"", b"a"))


def _composite(provider: Provider) -> None:
    key = provider.keygen(COMPOSITE, vectors.COMPOSITE_SEED)
    message, signature = vectors.COMPOSITE_MESSAGE, vectors.COMPOSITE_SIGNATURE
    provider.verify(COMPOSITE, key.public, message, signature)
    # One flipped bit in each half: neither half may be decoration.
    for place in (100, -1):
        _refuses(provider, COMPOSITE, key.public, message, _flipped(signature, place), b"")
    _sign_and_tamper(provider, COMPOSITE, contexts=(b"", b"creto/v1/delegation"))


def _mlkem768(provider: Provider) -> None:
    # Seed d || z = 01..40; answers agree with Go's crypto/mlkem. The second one is the implicit rejection of a
    # ciphertext nobody made (FIPS 203 algorithm 18, J(z || c)).
    key = provider.keygen(ML_KEM_768, bytes(range(1, 65)))
    _expect(ML_KEM_768, "key", provider.hash(SHA_256, key.public), _MLKEM_KEY)
    _expect(ML_KEM_768, "rejection", provider.decaps(key, bytes(range(256)) * 4 + bytes(64)), _MLKEM_REJECTION)
    _round_trip(provider, ML_KEM_768)


_MLKEM_KEY = "db4782927013b79c13111f87949d9c9d39ca8c25dd52155d98d6e7f2bad55087"
_MLKEM_REJECTION = "4e5a21e2fcb9392eebf54ce42c6496a05b84ba204ce29d94d4e81bf82f14a74b"
_XWING_KEY = "2e816deebcd76c5c80d0cd2d174478871658e8e2ff42bc9d4a6e486372e856bb"


def _x25519(provider: Provider) -> None:
    # RFC 7748 6.1.
    secret = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    alice = provider.keygen(X25519, secret)
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    _expect(X25519, "key", alice.public, "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    shared = provider.agree(alice, bob)
    _expect(X25519, "secret", shared, "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")


def _xwing(provider: Provider) -> None:
    # Seed of the first test vector of draft-connolly-cfrg-xwing-kem.
    seed = bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26")
    key = provider.keygen(X_WING, seed)
    _expect(X_WING, "key", provider.hash(SHA_256, key.public), _XWING_KEY)
    _round_trip(provider, X_WING)


def _sign_and_tamper(provider: Provider, algorithm: str, *, contexts: tuple[bytes, ...]) -> None:
    key, other = provider.keygen(algorithm), provider.keygen(algorithm)
    for context in contexts:
        signature = provider.sign(key, _MESSAGE, context)
        provider.verify(algorithm, key.public, _MESSAGE, signature, context)
        _refuses(provider, algorithm, key.public, _MESSAGE + b".", signature, context)
        _refuses(provider, algorithm, key.public, _MESSAGE, _flipped(signature, 0), context)
        _refuses(provider, algorithm, other.public, _MESSAGE, signature, context)
        if len(contexts) > 1:
            _refuses(provider, algorithm, key.public, _MESSAGE, signature, context + b"other")


def _refuses(
    provider: Provider, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes
) -> None:
    try:
        provider.verify(algorithm, public, message, signature, context)
    except BadSignature:
        return
    raise SelfTestFailed(algorithm, "a wrong signature was accepted")


def _round_trip(provider: Provider, algorithm: str) -> None:
    key = provider.keygen(algorithm)
    shared, ciphertext = provider.encaps(algorithm, key.public)
    if not hmac.compare_digest(provider.decaps(key, ciphertext), shared):
        raise SelfTestFailed(algorithm, "the two sides derive different secrets")
    if hmac.compare_digest(provider.decaps(key, _flipped(ciphertext, 0)), shared):
        raise SelfTestFailed(algorithm, "a changed ciphertext gives the same secret")


def _flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


_TESTS: dict[str, Callable[[Provider], None]] = {
    SHA_256: _sha256,
    HKDF_SHA256: _hkdf,
    AES_256_GCM: _gcm,
    ED25519: _ed25519,
    ML_DSA_65: _mldsa65,
    COMPOSITE: _composite,
    ML_KEM_768: _mlkem768,
    X25519: _x25519,
    X_WING: _xwing,
}
