"""The suite registry: the only place where algorithms are put together."""

from __future__ import annotations

from creto_platform.crypto.port import AES_256_GCM, COMPOSITE, HKDF_SHA256, SHA_256, X_WING, Suite, UnknownSuite

DEFAULT = Suite(
    id=0x0001,
    name="X-Wing, HKDF-SHA256, AES-256-GCM, SHA-256, ML-DSA-65 with Ed25519",
    kem=X_WING,
    kdf=HKDF_SHA256,
    aead=AES_256_GCM,
    hash=SHA_256,
    signature=COMPOSITE,
)


class Suites:
    """Suites by number. Zero is never a suite, so an uninitialised field cannot choose one."""

    def __init__(self) -> None:
        self._by_id = {DEFAULT.id: DEFAULT}

    def get(self, suite_id: int) -> Suite:
        """Raises UnknownSuite; anything that is not exactly an int of a registered suite is unknown."""
        if type(suite_id) is not int or suite_id not in self._by_id:
            raise UnknownSuite(f"suite {suite_id!r} is not registered")
        return self._by_id[suite_id]

    def add(self, suite: Suite) -> None:
        """Raises UnknownSuite when the number is not 1..65535 or already means something else."""
        if type(suite.id) is not int or not 0 < suite.id <= 0xFFFF:
            raise UnknownSuite(f"a suite number is 1..65535, not {suite.id!r}")
        if self._by_id.get(suite.id, suite) != suite:
            raise UnknownSuite(f"suite {suite.id:#06x} is already {self._by_id[suite.id].name!r}")
        self._by_id[suite.id] = suite
