"""The storage of an installation without one: every call says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NoReturn

from creto_platform.errors import NotConfigured
from creto_platform.storage.port import ObjectInfo


def _refuse() -> NoReturn:
    raise NotConfigured("storage", "set [storage] backend in the configuration to keep objects here")


class NoStorage:
    """Raises NotConfigured from every method."""

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
        _refuse()

    async def get(self, owner: str, bucket: str, key: str, *, version: int | None = None) -> bytes:
        _refuse()

    def stream(
        self, owner: str, bucket: str, key: str, *, version: int | None = None, offset: int = 0
    ) -> AsyncIterator[bytes]:
        _refuse()

    async def info(self, owner: str, bucket: str, key: str, *, version: int | None = None) -> ObjectInfo:
        _refuse()

    async def list(self, owner: str, bucket: str, *, prefix: str = "", limit: int = 1000) -> Sequence[ObjectInfo]:
        _refuse()

    async def delete(self, owner: str, bucket: str, key: str) -> None:
        _refuse()

    async def presign(self, owner: str, bucket: str, key: str, *, ttl_s: float) -> str:
        _refuse()
