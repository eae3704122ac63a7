"""Turns part of the new requests away while the event loop is late, so that the rest is served in time.

Everything creto does for a request it does on one loop, so how late a timer of that loop fires is how long a request
waits before anything is done for it: no other figure (CPU, connections, requests) says that. The median over a second
is judged, because one slow stage or one stopped process is no overload.
"""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
import time
from collections import deque
from collections.abc import Callable

from creto_hotpath.express import Valve
from creto_proxy.errors import Transient

log = logging.getLogger("creto.load")

TICK_S = 0.1
WINDOW_S = 1.0
# A loop so late that a second holds fewer looks than this is judged by the last ones.
LOOKS = 5
# Some always get through, so that it is seen when the trouble is over and nobody is locked out.
MOST = 0.95
_STEP = 0.05
_EASE = 0.8


class Load:
    """``shedding``: the part of new requests that is turned away, 0.0 while there is no need to.

    Only the timer changes it; requests read it. ``lag_s``: median lateness over the last second.
    """

    def __init__(
        self,
        threshold_s: float = 0.0,
        *,
        now: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """threshold_s: median lateness from which on requests are turned away; 0: never, and nothing is measured."""
        self.shedding = 0.0
        # Shuts the express lanes, so that requests come to where they are turned away.
        self.valve = Valve()
        self.lag_s = 0.0
        self.refused = 0
        self._threshold_s = threshold_s
        self._now = now
        self._chance = chance
        self._looks: deque[tuple[float, float]] = deque()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def shed(self) -> None:
        """Raises Transient (503) for the part of the requests that is turned away now."""
        if self._chance() < self.shedding:
            self.refused += 1
            raise Transient(
                "Creto is overloaded; try again.", reason="overloaded", retry_after_s=1 + int(3 * self._chance())
            )

    def start(self) -> None:
        """Measures the running loop from now on."""
        if self._threshold_s and self._timer is None:
            self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._due = self._now() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        now = self._now()
        self.look(now, max(0.0, now - self._due))
        self._arm()

    def look(self, now: float, lag_s: float) -> None:
        """Takes one measurement into account: at ``now`` the loop was ``lag_s`` late."""
        looks = self._looks
        looks.append((now, lag_s))
        while len(looks) > LOOKS and looks[0][0] < now - WINDOW_S:
            looks.popleft()
        if len(looks) < LOOKS:
            return
        self.lag_s = statistics.median(lag for _, lag in looks)
        before = self.shedding
        if self.lag_s > self._threshold_s:
            excess = min(4.0, self.lag_s / self._threshold_s)
            self.shedding = min(MOST, before + _STEP * excess)
        elif before:
            self.shedding = before * _EASE if before > _STEP / 2 else 0.0
        self.valve.closed = bool(self.shedding)
        if bool(before) != bool(self.shedding):
            self._say()

    def _say(self) -> None:
        if self.shedding:
            log.warning("overloaded: the event loop is %.0f ms late; turning requests away", self.lag_s * 1000)
        else:
            log.warning("no longer overloaded")
