"""The storage port: objects that are encrypted before a backend sees them.

Objects belong to an owner; reading one needs its owner, bucket, key and version to be what they were when it was
written. Backends hold ciphertext only, so equal objects do not look equal.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from creto_platform.errors import PlatformError


class StorageError(PlatformError):
    """Base of the errors of the storage port."""


class ObjectNotFound(StorageError):
    """No object of that owner under that bucket and key, or not that version."""


class ObjectDamaged(StorageError):
    """The stored bytes are not those that were written, in this place; nothing from the damage on was released."""


class RetentionHeld(StorageError):
    """The object may not be deleted before its retention ends."""


class StorageUnavailable(StorageError):
    """The backend does not answer."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of a stored object without reading it. Times are unix seconds; size_bytes of the plaintext."""

    owner: str
    bucket: str
    key: str
    version: int
    size_bytes: int
    content_type: str
    created_at: float
    retain_until: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class Storage(Protocol):
    """Asynchronous. owner is a SPIFFE id; every method raises StorageError's kinds."""

    async def put(
        self,
        owner: str,
        bucket: str,
        key: str,
        data: bytes | AsyncIterator[bytes],
        *,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
        retain_until: float | None = None,
    ) -> ObjectInfo:
        """Stores a new version."""
        ...

    async def get(self, owner: str, bucket: str, key: str, *, version: int | None = None) -> bytes:
        """The whole object."""
        ...

    def stream(
        self, owner: str, bucket: str, key: str, *, version: int | None = None, offset: int = 0
    ) -> AsyncIterator[bytes]:
        """The object in authenticated pieces from ``offset`` on. Raises when the first piece is asked for."""
        ...

    async def info(self, owner: str, bucket: str, key: str, *, version: int | None = None) -> ObjectInfo: ...

    async def list(self, owner: str, bucket: str, *, prefix: str = "", limit: int = 1000) -> Sequence[ObjectInfo]:
        """Current versions in order of their keys."""
        ...

    async def delete(self, owner: str, bucket: str, key: str) -> None:
        """Removes all versions by forgetting their keys. Raises RetentionHeld."""
        ...

    async def presign(self, owner: str, bucket: str, key: str, *, ttl_s: float) -> str:
        """A URL that serves the ciphertext of one object for a while."""
        ...
