"""Algorithms by suite number, keys that hide themselves, providers that prove themselves (see ``port``)."""

from __future__ import annotations

from creto_platform.crypto.embedded import CryptographyProvider, EmbeddedCrypto
from creto_platform.crypto.keystore import KeyStore
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
    Crypto,
    CryptoError,
    Key,
    KeyInvalid,
    Provider,
    ProviderStatus,
    ProviderUnavailable,
    SelfTestFailed,
    Suite,
    UnknownSuite,
)

__all__ = [
    "AES_256_GCM",
    "COMPOSITE",
    "ED25519",
    "HKDF_SHA256",
    "ML_DSA_65",
    "ML_KEM_768",
    "SHA_256",
    "X25519",
    "X_WING",
    "BadAead",
    "BadSignature",
    "Crypto",
    "CryptoError",
    "CryptographyProvider",
    "EmbeddedCrypto",
    "Key",
    "KeyInvalid",
    "KeyStore",
    "Provider",
    "ProviderStatus",
    "ProviderUnavailable",
    "SelfTestFailed",
    "Suite",
    "UnknownSuite",
]
