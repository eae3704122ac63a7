"""The vault port: secrets that agents use without holding them.

A secret has versions; an agent gets at one through a *lease* (renewable, bounded, revocable) or a *delegation*
(handed to one sandbox, counted, at most a day). A cached value never outlives its lease, also when the vault is down.
Semantics: OpenBao KV version 2, leases and response wrapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from creto_platform.errors import PlatformError

MAX_DELEGATION_S = 86_400


class VaultError(PlatformError):
    """Base of the errors of the vault port. Texts name paths and versions, never values."""


class SecretNotFound(VaultError):
    """No secret at that path, or not that version."""


class VersionConflict(VaultError):
    """The secret was changed meanwhile: ``cas`` is not its current version."""


class LeaseExpired(VaultError):
    """The lease or delegation ended: expired, used up, revoked or bound to another sandbox."""


class VaultUnavailable(VaultError):
    """The backend does not answer; what is cached may be used until its lease ends, nothing longer."""


@dataclass(frozen=True, slots=True)
class Secret:
    """One version of a secret. The value never shows in a repr."""

    path: str
    version: int
    value: bytes = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a secret until ``expires_at`` (unix seconds). The secret is read with ``use``."""

    id: str
    path: str
    version: int
    agent: str
    expires_at: float
    renewable: bool


@dataclass(frozen=True, slots=True)
class Delegation:
    """A secret for one sandbox: at most ``max_uses`` reads until ``expires_at``.

    memory_only: it must not be written to the sandbox' disk.
    """

    id: str
    path: str
    agent: str
    sandbox: str
    expires_at: float
    max_uses: int
    memory_only: bool = True


class Vault(Protocol):
    """Asynchronous, since backends are remote. Every method raises VaultError's kinds."""

    async def put(
        self, path: str, value: bytes, *, cas: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> int:
        """Stores a new version and returns its number. cas: the version it must follow, 0 for "must not exist"."""
        ...

    async def get(self, path: str, *, version: int | None = None) -> Secret:
        """The current or a given version, for operators; agents use leases."""
        ...

    async def versions(self, path: str) -> Sequence[int]:
        """Numbers of the versions that can still be read, oldest first."""
        ...

    async def delete(self, path: str) -> None:
        """Removes all versions and revokes every lease and delegation on them."""
        ...

    async def rotate(self, path: str, value: bytes, *, overlap_s: float) -> int:
        """A new version; the old one stays readable for live leases during ``overlap_s``."""
        ...

    async def lease(self, path: str, agent: str, *, ttl_s: float) -> Lease: ...

    async def renew(self, lease_id: str, *, ttl_s: float) -> Lease:
        """The lease with its end counted from now. Raises LeaseExpired."""
        ...

    async def use(self, lease_id: str) -> Secret:
        """The secret behind a lease or delegation; counts as one use. Raises LeaseExpired."""
        ...

    async def revoke(self, lease_id: str) -> None:
        """Ends a lease or delegation at once, also in caches."""
        ...

    async def delegate(
        self, path: str, agent: str, *, sandbox: str, ttl_s: float, max_uses: int = 1, memory_only: bool = True
    ) -> Delegation:
        """Hands a secret to one sandbox for at most ``MAX_DELEGATION_S``."""
        ...

    async def wrap(self, delegation_id: str, *, ttl_s: float) -> str:
        """A single-use token that stands for a delegation until it is unwrapped."""
        ...

    async def unwrap(self, token: str) -> Delegation:
        """The delegation behind a token. A second unwrap raises LeaseExpired and is an incident."""
        ...
