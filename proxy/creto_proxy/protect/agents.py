"""How much of creto one agent may use at a time, and how fast connections may come in by one link."""

from __future__ import annotations

import time
from collections.abc import Callable

from creto_hotpath.express import Share
from creto_proxy.errors import Transient

_NO_LIMIT = (1 << 31) - 1


class InFlight(Share):
    """What one agent has under way. ``count`` of ``limit`` requests, ``connections`` of ``most`` connections."""

    __slots__ = ("connections", "most")

    def __init__(self, limit: int, most: int) -> None:
        super().__init__(limit)
        self.connections = 0
        self.most = most

    def require(self) -> None:
        """As ``enter``, or raises Transient (429)."""
        if not self.enter():
            raise Transient(
                f"This agent has {self.limit} requests under way, which is its limit; wait until one has ended.",
                reason="too_many_requests",
                status=429,
            )

    def connect(self) -> None:
        """Takes a place for one connection, or raises Transient (429)."""
        if self.connections >= self.most:
            raise Transient(
                f"This agent has {self.most} connections open, which is its limit; use those it has.",
                reason="too_many_connections",
                status=429,
            )
        self.connections += 1

    def disconnect(self) -> None:
        self.connections -= 1


class Seat:
    """The place of a connection that carries requests side by side. share: whose it is, None until it is known: the
    first agent that asked for something on it. refused: that agent had too many."""

    __slots__ = ("refused", "share")

    def __init__(self) -> None:
        self.share: InFlight | None = None
        self.refused = False

    def take(self, share: InFlight) -> None:
        """Counts the connection, once. Raises Transient (429)."""
        if self.share is None:
            self.refused = True
            share.connect()
            self.refused = False
            self.share = share

    def give(self) -> None:
        if self.share is not None:
            self.share.disconnect()
            self.share = None


class Agents:
    """The ``InFlight`` of each agent. Memory: one small object per agent that was ever seen."""

    def __init__(self, requests: int, connections: int) -> None:
        """requests, connections: of one agent at a time; 0: no limit."""
        self.limited = bool(requests or connections)
        self._requests = requests or _NO_LIMIT
        self._connections = connections or _NO_LIMIT
        self._shares: dict[str, InFlight] = {}

    def of(self, agent_id: str) -> InFlight:
        share = self._shares.get(agent_id)
        if share is None:
            share = self._shares[agent_id] = InFlight(self._requests, self._connections)
        return share

    def in_use(self) -> dict[str, tuple[int, int]]:
        """(requests, connections) under way by agent id."""
        return {agent_id: (share.count, share.connections) for agent_id, share in self._shares.items()}


class Arrivals:
    """New connections per second and link: a bucket of one second's worth each, so a burst of that size passes."""

    def __init__(self, per_second: int, now: Callable[[], float] = time.monotonic) -> None:
        self._step_s = 1 / per_second
        self._now = now
        self._due: dict[str, float] = {}

    def admit(self, link: str) -> bool:
        """Whether one more connection may come in by ``link`` now (GCRA: ``due`` runs at most a second ahead)."""
        now = self._now()
        due = max(self._due.get(link, 0.0), now) + self._step_s
        if due - now > 1.0 + 1e-9:
            return False
        self._due[link] = due
        return True
