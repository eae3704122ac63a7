"""Ends what outlives the request that opened it, once its agent may no longer be here.

A request is judged when it comes. A tunnel or a WebSocket stays open for hours, so its agent is asked for again twice a
second: one that is revoked, expired or somebody else by now loses the connection. Nothing runs while nothing is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.model import Agent, Flow, Request

INTERVAL_S = 0.5


class Revocations:
    """The open tunnels and upgraded connections."""

    def __init__(
        self, identify: Callable[[Flow], Agent | None], guard: Guard, *, interval_s: float = INTERVAL_S
    ) -> None:
        self._identify = identify
        self._guard = guard
        self._interval_s = interval_s
        self._open: dict[Hashable, tuple[Request, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, key: Hashable, request: Request, end: Callable[[], None]) -> None:
        """``end`` is called, at most once, when the agent of ``request`` is no longer the one its flow belongs to."""
        self._open[key] = (request, end)
        if self._timer is None:
            self._schedule()

    def leave(self, key: Hashable) -> None:
        """It has ended by itself. Does nothing for what is not here."""
        self._open.pop(key, None)

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        try:
            for key, (request, end) in list(self._open.items()):
                if not self._stands(request):
                    self.leave(key)
                    end()
        finally:  # what goes wrong for one must not leave the others standing
            if self._open:
                self._schedule()

    def _stands(self, request: Request) -> bool:
        try:
            agent = self._guard.call("identify", "identify", self._identify, request.flow)
        except StageFailed:
            return False  # nobody can say who it is
        return agent is not None and agent.id == request.agent.id
