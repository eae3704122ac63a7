"""The default provider, over the ``cryptography`` package, and the port that routes to providers that passed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from creto_platform.crypto import selftest
from creto_platform.crypto.kems import MLKEM768, Kem, XWing, x25519_agree, x25519_keygen
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
    CryptoError,
    Key,
    KeyInvalid,
    Provider,
    ProviderStatus,
    ProviderUnavailable,
    SelfTestFailed,
    Suite,
)
from creto_platform.crypto.signatures import CompositeScheme, Ed25519Scheme, MLDSA65Scheme, Scheme
from creto_platform.crypto.suites import DEFAULT, Suites

log = logging.getLogger("creto.crypto")


class CryptographyProvider:
    """Primitives of the ``cryptography`` package (OpenSSL 3.5 or newer inside its wheels)."""

    name = "cryptography"

    def __init__(self) -> None:
        self._schemes: dict[str, Scheme] = {ED25519: Ed25519Scheme()}
        self._kems: dict[str, Kem] = {}
        # A build against an older system OpenSSL lacks the post-quantum algorithms: then they are not claimed.
        if _supported(MLDSA65Scheme()):
            self._schemes |= {ML_DSA_65: MLDSA65Scheme(), COMPOSITE: CompositeScheme()}
        if _supported(MLKEM768()):
            self._kems |= {ML_KEM_768: MLKEM768(), X_WING: XWing()}

    def capabilities(self) -> frozenset[str]:
        return frozenset({X25519, AES_256_GCM, SHA_256, HKDF_SHA256, *self._schemes, *self._kems})

    def keygen(self, algorithm: str, seed: bytes | None = None) -> Key:
        if algorithm == X25519:
            return x25519_keygen(seed)
        maker = self._schemes.get(algorithm) or self._kems[algorithm]
        return maker.keygen(seed)

    def sign(self, key: Key, message: bytes, context: bytes = b"") -> bytes:
        return self._schemes[key.algorithm].sign(key.handle, message, context)

    def verify(self, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes = b"") -> None:
        self._schemes[algorithm].verify(public, message, signature, context)

    def encaps(self, algorithm: str, public: bytes) -> tuple[bytes, bytes]:
        return self._kems[algorithm].encaps(public)

    def decaps(self, key: Key, ciphertext: bytes) -> bytes:
        return self._kems[key.algorithm].decaps(key.handle, ciphertext)

    def agree(self, key: Key, public: bytes) -> bytes:
        if key.algorithm != X25519:
            raise KeyInvalid(f"a {key.algorithm} key cannot agree on a secret, an X25519 key can")
        return x25519_agree(key.handle, public)  # type: ignore[arg-type]  # Key.handle is opaque by design

    def seal(self, algorithm: str, key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
        return _gcm(algorithm, key, nonce).encrypt(nonce, plaintext, associated)

    def open(self, algorithm: str, key: bytes, nonce: bytes, ciphertext: bytes, associated: bytes) -> bytes:
        try:
            return _gcm(algorithm, key, nonce).decrypt(nonce, ciphertext, associated)
        except InvalidTag:
            raise BadAead("the ciphertext does not open with this key, nonce and associated data") from None

    def hash(self, algorithm: str, data: bytes) -> bytes:
        _only(algorithm, SHA_256)
        return hashlib.sha256(data).digest()

    def kdf(self, algorithm: str, *, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        _only(algorithm, HKDF_SHA256)
        return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret)

    def random(self, length: int) -> bytes:
        return os.urandom(length)


def _supported(maker: Scheme | Kem) -> bool:
    try:
        maker.keygen(None)
    except UnsupportedAlgorithm:
        return False
    return True


def _only(algorithm: str, implemented: str) -> None:
    if algorithm != implemented:
        raise KeyError(algorithm)


def _gcm(algorithm: str, key: bytes, nonce: bytes) -> AESGCM:
    _only(algorithm, AES_256_GCM)
    if len(key) != 32:
        raise KeyInvalid(f"an AES-256 key has 32 bytes, this one has {len(key)}")
    if len(nonce) != 12:
        raise KeyInvalid(f"a GCM nonce has 12 bytes, this one has {len(nonce)}")
    return AESGCM(key)


class EmbeddedCrypto:
    """Suites and providers. Providers are tried in the given order; one that fails its self-test is never asked."""

    def __init__(self, providers: Sequence[Provider] | None = None) -> None:
        self._suites = Suites()
        self._enabled: list[Provider] = []
        self._status: list[ProviderStatus] = []
        self._by_algorithm: dict[str, Provider] = {}
        for provider in [CryptographyProvider()] if providers is None else providers:
            self._admit(provider)

    @property
    def default(self) -> Suite:
        return DEFAULT

    def suite(self, suite_id: int) -> Suite:
        return self._suites.get(suite_id)

    def register(self, suite: Suite) -> None:
        for algorithm in suite.algorithms:
            self.provider(algorithm)
        self._suites.add(suite)

    def status(self) -> tuple[ProviderStatus, ...]:
        return tuple(self._status)

    def provider(self, algorithm: str) -> Provider:
        provider = self._by_algorithm.get(algorithm)
        if provider is None:
            failed = [f"{status.name} is disabled ({status.detail})" for status in self._status if not status.enabled]
            raise ProviderUnavailable("; ".join([f"no provider for {algorithm}", *failed]))
        return provider

    def keygen(self, algorithm: str, seed: bytes | None = None) -> Key:
        return self.provider(algorithm).keygen(algorithm, seed)

    def sign(self, key: Key, message: bytes, context: bytes = b"") -> bytes:
        return self.provider(key.algorithm).sign(key, message, context)

    def verify(self, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes = b"") -> None:
        self.provider(algorithm).verify(algorithm, public, message, signature, context)

    def _admit(self, provider: Provider) -> None:
        claimed: frozenset[str] = frozenset()
        try:
            claimed = provider.capabilities()
            selftest.check(provider)
        except (SelfTestFailed, CryptoError) as error:
            log.error("crypto provider %s failed its self-test and is disabled: %s", provider.name, error)
            self._status.append(ProviderStatus(provider.name, False, claimed, str(error)))
            return
        self._status.append(ProviderStatus(provider.name, True, claimed, ""))
        for algorithm in claimed:
            self._by_algorithm.setdefault(algorithm, provider)
