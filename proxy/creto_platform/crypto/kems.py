"""ML-KEM-768, X25519 and their combination X-Wing, over the ``cryptography`` package.

X-Wing (draft-connolly-cfrg-xwing-kem, HPKE KEM 0x647a) stays secret while either half does:

    seed 32 bytes -> SHAKE-256 to 96: ML-KEM seed (d || z) 64, X25519 scalar 32
    pk = pk_M || pk_X (1216)      ct = ct_M || ct_X (1120)      ss = SHA3-256(ss_M || ss_X || ct_X || pk_X || label)
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from creto_platform.crypto.port import ML_KEM_768, PUBLIC_BYTES, X25519, X_WING, Key, KeyInvalid
from creto_platform.crypto.signatures import check_public, seed_for

_MLKEM_CIPHERTEXT = 1088
_XWING_LABEL = b"\\.//^\\"


class Kem(Protocol):
    """One key encapsulation mechanism."""

    def keygen(self, seed: bytes | None) -> Key: ...
    def encaps(self, public: bytes) -> tuple[bytes, bytes]: ...
    def decaps(self, handle: Any, ciphertext: bytes) -> bytes: ...


def x25519_keygen(seed: bytes | None) -> Key:
    """An X25519 key pair (RFC 7748)."""
    seed = seed_for(X25519, seed)
    private = X25519PrivateKey.from_private_bytes(seed)
    return Key(X25519, private.public_key().public_bytes_raw(), seed, private)


def x25519_agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The shared secret. Raises KeyInvalid, also for points of small order, which would make it all zeros."""
    check_public(X25519, public)
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise KeyInvalid("the X25519 public key has small order") from None


class MLKEM768:
    """FIPS 203. Encapsulation keys are checked when loaded (modulus check)."""

    def keygen(self, seed: bytes | None) -> Key:
        seed = seed_for(ML_KEM_768, seed)
        private = MLKEM768PrivateKey.from_seed_bytes(seed)
        return Key(ML_KEM_768, private.public_key().public_bytes_raw(), seed, private)

    def encaps(self, public: bytes) -> tuple[bytes, bytes]:
        check_public(ML_KEM_768, public)
        try:
            shared, ciphertext = MLKEM768PublicKey.from_public_bytes(public).encapsulate()
        except ValueError:
            raise KeyInvalid("the ML-KEM-768 encapsulation key fails its modulus check") from None
        return shared, ciphertext

    def decaps(self, handle: MLKEM768PrivateKey, ciphertext: bytes) -> bytes:
        if len(ciphertext) != _MLKEM_CIPHERTEXT:
            raise KeyInvalid(f"an ML-KEM-768 ciphertext has {_MLKEM_CIPHERTEXT} bytes, this one has {len(ciphertext)}")
        return handle.decapsulate(ciphertext)


class XWing:
    """The hybrid of both."""

    def __init__(self) -> None:
        self._mlkem = MLKEM768()

    def keygen(self, seed: bytes | None) -> Key:
        seed = seed_for(X_WING, seed)
        expanded = hashlib.shake_256(seed).digest(96)
        mlkem = self._mlkem.keygen(expanded[:64])
        x25519 = x25519_keygen(expanded[64:])
        return Key(X_WING, mlkem.public + x25519.public, seed, (mlkem.handle, x25519))

    def encaps(self, public: bytes) -> tuple[bytes, bytes]:
        check_public(X_WING, public)
        mlkem_public, x25519_public = public[: PUBLIC_BYTES[ML_KEM_768]], public[PUBLIC_BYTES[ML_KEM_768] :]
        mlkem_shared, mlkem_ciphertext = self._mlkem.encaps(mlkem_public)
        ephemeral = x25519_keygen(None)
        x25519_shared = _exchange(ephemeral, x25519_public)
        shared = _combine(mlkem_shared, x25519_shared, ephemeral.public, x25519_public)
        return shared, mlkem_ciphertext + ephemeral.public

    def decaps(self, handle: tuple[MLKEM768PrivateKey, Key], ciphertext: bytes) -> bytes:
        mlkem, x25519 = handle
        if len(ciphertext) != _MLKEM_CIPHERTEXT + 32:
            raise KeyInvalid(f"an X-Wing ciphertext has {_MLKEM_CIPHERTEXT + 32} bytes, this one has {len(ciphertext)}")
        ephemeral = ciphertext[_MLKEM_CIPHERTEXT:]
        mlkem_shared = self._mlkem.decaps(mlkem, ciphertext[:_MLKEM_CIPHERTEXT])
        return _combine(mlkem_shared, _exchange(x25519, ephemeral), ephemeral, x25519.public)


def _exchange(key: Key, public: bytes) -> bytes:
    private = key.handle
    if not isinstance(private, X25519PrivateKey):
        raise KeyInvalid(f"a key for {key.algorithm} cannot agree")
    return x25519_agree(private, public)


def _combine(mlkem_shared: bytes, x25519_shared: bytes, ephemeral: bytes, x25519_public: bytes) -> bytes:
    return hashlib.sha3_256(mlkem_shared + x25519_shared + ephemeral + x25519_public + _XWING_LABEL).digest()
