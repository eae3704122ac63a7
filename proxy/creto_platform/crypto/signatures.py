"""Ed25519, ML-DSA-65 and the composite of both, over the ``cryptography`` package.

The composite is ``id-MLDSA65-Ed25519-SHA512`` of draft-ietf-lamps-pq-composite-sigs, one algorithm with one key and
one signature: halves cannot be stripped or mixed, and the draft forbids using a component key alone.

    M'  = "CompositeAlgorithmSignatures2025" || Label || len(ctx) || ctx || SHA-512(M)
    sig = ML-DSA-65.Sign(M', ctx = Label) || Ed25519.Sign(M')        3309 + 64 bytes
    pk  = ML-DSA public key || Ed25519 public key                    1952 + 32 bytes
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from creto_platform.crypto.port import (
    COMPOSITE,
    ED25519,
    ML_DSA_65,
    PUBLIC_BYTES,
    SEED_BYTES,
    SIGNATURE_BYTES,
    BadSignature,
    CryptoError,
    Key,
    KeyInvalid,
)

_PREFIX = b"CompositeAlgorithmSignatures2025"
_LABEL = b"COMPSIG-MLDSA65-Ed25519-SHA512"
_CONTEXT_LIMIT = 255


class Scheme(Protocol):
    """One signature algorithm."""

    def keygen(self, seed: bytes | None) -> Key: ...
    def sign(self, handle: Any, message: bytes, context: bytes) -> bytes: ...
    def verify(self, public: bytes, message: bytes, signature: bytes, context: bytes) -> None: ...


def seed_for(algorithm: str, seed: bytes | None) -> bytes:
    """``seed`` when it has the length the algorithm wants, fresh random bytes when it is None. Raises KeyInvalid."""
    wanted = SEED_BYTES[algorithm]
    if seed is None:
        return os.urandom(wanted)
    if len(seed) != wanted:
        raise KeyInvalid(f"a {algorithm} seed has {wanted} bytes, this one has {len(seed)}")
    return bytes(seed)


def check_public(algorithm: str, public: bytes) -> None:
    """Raises KeyInvalid unless ``public`` has the length of a public key of ``algorithm``."""
    if len(public) != PUBLIC_BYTES[algorithm]:
        raise KeyInvalid(f"a {algorithm} public key has {PUBLIC_BYTES[algorithm]} bytes, this one has {len(public)}")


def _check_signature(algorithm: str, signature: bytes) -> None:
    if len(signature) != SIGNATURE_BYTES[algorithm]:
        raise BadSignature(
            f"a {algorithm} signature has {SIGNATURE_BYTES[algorithm]} bytes, this one has {len(signature)}"
        )


def _check_context(context: bytes) -> None:
    if len(context) > _CONTEXT_LIMIT:
        raise CryptoError(f"a signature context has at most {_CONTEXT_LIMIT} bytes, this one has {len(context)}")


class Ed25519Scheme:
    """RFC 8032, pure; it has no context, so asking for one is an error rather than silently ignored."""

    def keygen(self, seed: bytes | None) -> Key:
        seed = seed_for(ED25519, seed)
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return Key(ED25519, private.public_key().public_bytes_raw(), seed, private)

    def sign(self, handle: Ed25519PrivateKey, message: bytes, context: bytes) -> bytes:
        self._no_context(context)
        return handle.sign(message)

    def verify(self, public: bytes, message: bytes, signature: bytes, context: bytes) -> None:
        self._no_context(context)
        check_public(ED25519, public)
        _check_signature(ED25519, signature)
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except InvalidSignature:
            raise BadSignature("the Ed25519 signature does not verify") from None

    @staticmethod
    def _no_context(context: bytes) -> None:
        if context:
            raise CryptoError("Ed25519 signatures take no context")


class MLDSA65Scheme:
    """FIPS 204, pure, hedged."""

    def keygen(self, seed: bytes | None) -> Key:
        seed = seed_for(ML_DSA_65, seed)
        private = MLDSA65PrivateKey.from_seed_bytes(seed)
        return Key(ML_DSA_65, private.public_key().public_bytes_raw(), seed, private)

    def sign(self, handle: MLDSA65PrivateKey, message: bytes, context: bytes) -> bytes:
        _check_context(context)
        return handle.sign(message, context)

    def verify(self, public: bytes, message: bytes, signature: bytes, context: bytes) -> None:
        _check_context(context)
        check_public(ML_DSA_65, public)
        _check_signature(ML_DSA_65, signature)
        try:
            MLDSA65PublicKey.from_public_bytes(public).verify(signature, message, context)
        except InvalidSignature:
            raise BadSignature("the ML-DSA-65 signature does not verify") from None


class CompositeScheme:
    """Both halves must verify; the failure does not say which one did not."""

    def __init__(self) -> None:
        self._mldsa = MLDSA65Scheme()
        self._ed25519 = Ed25519Scheme()

    def keygen(self, seed: bytes | None) -> Key:
        seed = seed_for(COMPOSITE, seed)
        mldsa = self._mldsa.keygen(seed[:32])
        ed25519 = self._ed25519.keygen(seed[32:])
        return Key(COMPOSITE, mldsa.public + ed25519.public, seed, (mldsa.handle, ed25519.handle))

    def sign(self, handle: tuple[MLDSA65PrivateKey, Ed25519PrivateKey], message: bytes, context: bytes) -> bytes:
        bound = _bound(message, context)
        mldsa, ed25519 = handle
        return self._mldsa.sign(mldsa, bound, _LABEL) + self._ed25519.sign(ed25519, bound, b"")

    def verify(self, public: bytes, message: bytes, signature: bytes, context: bytes) -> None:
        check_public(COMPOSITE, public)
        _check_signature(COMPOSITE, signature)
        bound = _bound(message, context)
        failed = False
        halves: tuple[tuple[Scheme, bytes, bytes, bytes], ...] = (
            (self._mldsa, public[: PUBLIC_BYTES[ML_DSA_65]], signature[: SIGNATURE_BYTES[ML_DSA_65]], _LABEL),
            (self._ed25519, public[PUBLIC_BYTES[ML_DSA_65] :], signature[SIGNATURE_BYTES[ML_DSA_65] :], b""),
        )
        for scheme, half_public, half_signature, half_context in halves:
            try:
                scheme.verify(half_public, bound, half_signature, half_context)
            except BadSignature:
                failed = True
        if failed:
            raise BadSignature("the composite signature does not verify")


def _bound(message: bytes, context: bytes) -> bytes:
    _check_context(context)
    return _PREFIX + _LABEL + bytes([len(context)]) + context + hashlib.sha512(message).digest()
