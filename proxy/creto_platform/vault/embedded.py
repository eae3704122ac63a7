"""The vault of an installation without one: every call says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from creto_platform.errors import NotConfigured
from creto_platform.vault.port import Delegation, Lease, Secret


def _refuse() -> NoReturn:
    raise NotConfigured("vault", "set [vault] backend in the configuration to keep secrets here")


class NoVault:
    """Raises NotConfigured from every method."""

    async def put(
        self, path: str, value: bytes, *, cas: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> int:
        _refuse()

    async def get(self, path: str, *, version: int | None = None) -> Secret:
        _refuse()

    async def versions(self, path: str) -> Sequence[int]:
        _refuse()

    async def delete(self, path: str) -> None:
        _refuse()

    async def rotate(self, path: str, value: bytes, *, overlap_s: float) -> int:
        _refuse()

    async def lease(self, path: str, agent: str, *, ttl_s: float) -> Lease:
        _refuse()

    async def renew(self, lease_id: str, *, ttl_s: float) -> Lease:
        _refuse()

    async def use(self, lease_id: str) -> Secret:
        _refuse()

    async def revoke(self, lease_id: str) -> None:
        _refuse()

    async def delegate(
        self, path: str, agent: str, *, sandbox: str, ttl_s: float, max_uses: int = 1, memory_only: bool = True
    ) -> Delegation:
        _refuse()

    async def wrap(self, delegation_id: str, *, ttl_s: float) -> str:
        _refuse()

    async def unwrap(self, token: str) -> Delegation:
        _refuse()
