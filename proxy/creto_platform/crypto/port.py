"""The crypto port: indivisible suites, providers that prove themselves, keys that do not show themselves.

A *suite* is a 16-bit number that fixes every algorithm at once, as in TLS 1.3, HPKE and MLS; nothing else in Creto
names an algorithm together with another one. A *provider* implements algorithms; it is used only while it gives the
known answers. A *key* is held as its seed and never appears in a log, a repr or a pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

from creto_platform.errors import PlatformError

ED25519: Final = "Ed25519"
ML_DSA_65: Final = "ML-DSA-65"
COMPOSITE: Final = "id-MLDSA65-Ed25519-SHA512"
ML_KEM_768: Final = "ML-KEM-768"
X25519: Final = "X25519"
X_WING: Final = "X-Wing"
AES_256_GCM: Final = "AES-256-GCM"
SHA_256: Final = "SHA-256"
HKDF_SHA256: Final = "HKDF-SHA256"

# What is stored of a private key, in bytes. Composite: ML-DSA seed, then Ed25519 seed.
SEED_BYTES: Final = {ED25519: 32, ML_DSA_65: 32, COMPOSITE: 64, ML_KEM_768: 64, X25519: 32, X_WING: 32}
PUBLIC_BYTES: Final = {ED25519: 32, ML_DSA_65: 1952, COMPOSITE: 1984, ML_KEM_768: 1184, X25519: 32, X_WING: 1216}
SIGNATURE_BYTES: Final = {ED25519: 64, ML_DSA_65: 3309, COMPOSITE: 3373}


class CryptoError(PlatformError):
    """Base of the errors of the crypto port."""


class UnknownSuite(CryptoError):
    """The suite number is 0, not 16 bits, or not registered."""


class KeyInvalid(CryptoError):
    """The bytes are not a key of that algorithm, or the key file cannot be trusted."""


class BadSignature(CryptoError):
    """The signature does not belong to this message, key and context."""


class BadAead(CryptoError):
    """The ciphertext was changed, or the key, nonce or associated data are not those it was made with."""


class ProviderUnavailable(CryptoError):
    """No enabled provider implements the algorithm; the text says which ones were disabled and why."""


class SelfTestFailed(CryptoError):
    """A provider did not give the known answer. ``algorithm`` says for what."""

    def __init__(self, algorithm: str, detail: str) -> None:
        super().__init__(f"{algorithm}: {detail}")
        self.algorithm = algorithm


@dataclass(frozen=True, slots=True)
class Suite:
    """One indivisible choice of algorithms. id: 1..65535; 0xFF00 and above are private use."""

    id: int
    name: str
    kem: str
    kdf: str
    aead: str
    hash: str
    signature: str

    @property
    def algorithms(self) -> tuple[str, ...]:
        return (self.kem, self.kdf, self.aead, self.hash, self.signature)


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """What became of a provider. detail: why it is disabled, "" when it is enabled."""

    name: str
    enabled: bool
    algorithms: frozenset[str]
    detail: str


class Key:
    """A private key. ``public`` and ``kid`` (SHA-256 of ``public``) may be shown, the seed only leaves by ``seed()``.

    handle: whatever the provider keeps so that it need not expand the seed again.
    """

    __slots__ = ("_seed", "algorithm", "handle", "kid", "public")

    def __init__(self, algorithm: str, public: bytes, seed: bytes, handle: object) -> None:
        self.algorithm = algorithm
        self.public = public
        self.kid = hashlib.sha256(public).digest()
        self.handle = handle
        self._seed = seed

    def seed(self) -> bytes:
        """The secret itself, for storing. Never log, record or send it."""
        return self._seed

    def __repr__(self) -> str:
        return f"<Key {self.algorithm} {self.kid.hex()[:16]}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled or copied")


class Provider(Protocol):
    """Implements some algorithms. Every method raises CryptoError's kinds only; unknown algorithms: KeyError."""

    @property
    def name(self) -> str: ...

    def capabilities(self) -> frozenset[str]:
        """Names of the algorithms this provider claims; each is held to its known answers before use."""
        ...

    def keygen(self, algorithm: str, seed: bytes | None = None) -> Key:
        """A key pair, from ``seed`` (``SEED_BYTES``) or fresh. Raises KeyInvalid."""
        ...

    def sign(self, key: Key, message: bytes, context: bytes = b"") -> bytes:
        """A signature over ``message``; ``context`` (at most 255 bytes) separates purposes."""
        ...

    def verify(self, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes = b"") -> None:
        """Returns when the signature is valid, raises BadSignature or KeyInvalid."""
        ...

    def encaps(self, algorithm: str, public: bytes) -> tuple[bytes, bytes]:
        """(shared secret, ciphertext) for a KEM public key. Raises KeyInvalid."""
        ...

    def decaps(self, key: Key, ciphertext: bytes) -> bytes:
        """The shared secret; for a forged ciphertext of the right length an unrelated one. Raises KeyInvalid."""
        ...

    def agree(self, key: Key, public: bytes) -> bytes:
        """The Diffie-Hellman secret of an X25519 key and a peer's public key. Raises KeyInvalid."""
        ...

    def seal(self, algorithm: str, key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
        """Ciphertext followed by the tag. A nonce must never be used twice with one key."""
        ...

    def open(self, algorithm: str, key: bytes, nonce: bytes, ciphertext: bytes, associated: bytes) -> bytes:
        """The plaintext. Raises BadAead."""
        ...

    def hash(self, algorithm: str, data: bytes) -> bytes: ...

    def kdf(self, algorithm: str, *, secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
        """HKDF extract and expand (RFC 5869)."""
        ...

    def random(self, length: int) -> bytes: ...


class Crypto(Protocol):
    """The port: suites by number, algorithms by whoever proved to implement them."""

    @property
    def default(self) -> Suite: ...

    def suite(self, suite_id: int) -> Suite:
        """The registered suite. Raises UnknownSuite (also for 0) before any key is touched."""
        ...

    def register(self, suite: Suite) -> None:
        """Adds a suite. Raises UnknownSuite when the number is 0, taken or too large, ProviderUnavailable when no
        enabled provider has one of its algorithms."""
        ...

    def status(self) -> Sequence[ProviderStatus]:
        """Every provider that was offered, with the reason when it is not used."""
        ...

    def provider(self, algorithm: str) -> Provider:
        """The first enabled provider that implements ``algorithm``. Raises ProviderUnavailable."""
        ...

    def keygen(self, algorithm: str, seed: bytes | None = None) -> Key: ...
    def sign(self, key: Key, message: bytes, context: bytes = b"") -> bytes: ...
    def verify(self, algorithm: str, public: bytes, message: bytes, signature: bytes, context: bytes = b"") -> None: ...
