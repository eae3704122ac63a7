"""The memory port: what agents remember between runs.

Memory helps, it never blocks: whoever asks while it is down goes on with an empty context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from creto_platform.errors import PlatformError


class RecallError(PlatformError):
    """Base of the errors of the memory port (``MemoryError`` is Python's own)."""


class MemoryUnavailable(RecallError):
    """The backend does not answer; go on with an empty context."""


class MemoryRefused(RecallError):
    """The text is too large, or the agent may not see that scope."""


@dataclass(frozen=True, slots=True)
class Recollection:
    """One remembered text. scope: whose it is (an agent, a team). score: 0..1, how well it fits the query; 1 stored.

    created_at, expires_at: unix seconds.
    """

    id: str
    agent: str
    scope: str
    text: str
    score: float
    created_at: float
    expires_at: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class Memory(Protocol):
    """Asynchronous; every method raises RecallError's kinds. agent is a SPIFFE id."""

    async def store(
        self,
        agent: str,
        text: str,
        *,
        scope: str = "agent",
        ttl_s: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Recollection:
        """Remembers a text."""
        ...

    async def query(
        self, agent: str, text: str, *, scope: str = "agent", limit: int = 10, tags: Mapping[str, str] | None = None
    ) -> Sequence[Recollection]:
        """What fits ``text``, best first; empty when nothing does."""
        ...

    async def forget(self, agent: str, recollection_id: str) -> bool:
        """Removes one; False when there is no such recollection of the agent."""
        ...

    async def forget_all(self, agent: str) -> int:
        """Removes everything of an agent; how many that were."""
        ...
