"""The memory of an installation without one: every call says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from creto_platform.errors import NotConfigured
from creto_platform.memory.port import Recollection


def _refuse() -> NoReturn:
    raise NotConfigured("memory", "set [memory] backend in the configuration to let agents remember")


class NoMemory:
    """Raises NotConfigured from every method."""

    async def store(
        self,
        agent: str,
        text: str,
        *,
        scope: str = "agent",
        ttl_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Recollection:
        _refuse()

    async def query(
        self, agent: str, text: str, *, scope: str = "agent", limit: int = 10, tags: Mapping[str, str] | None = None
    ) -> Sequence[Recollection]:
        _refuse()

    async def forget(self, agent: str, recollection_id: str) -> bool:
        _refuse()

    async def forget_all(self, agent: str) -> int:
        _refuse()
