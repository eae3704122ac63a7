"""How much of the traffic may be repetition. Without a budget, retries turn a slow upstream into a dead one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0


class RetryBudget:
    """Retries over the last ten seconds: at most ``percent`` of the requests in them, but ``per_second`` always.

    ``requests`` only ever grows; whoever sends a request adds to it. It is looked at when a retry is wanted, so a
    request costs one addition, and none where it is counted anyway: ``elsewhere`` says how many were, and may begin
    again at a smaller number. Memory: one entry per retry of the last ten seconds, and one per second with retries.
    """

    __slots__ = ("_elsewhere", "_marks", "_now", "_per_window", "_share", "_taken", "denied", "elsewhere", "requests",
                 "used")  # fmt: skip

    def __init__(
        self, percent: float = 20.0, per_second: float = 10.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests = 0
        self.elsewhere: Callable[[], int] = lambda: 0
        self._elsewhere = 0
        self.used = 0
        self.denied = 0
        self._share = percent / 100
        self._per_window = per_second * WINDOW_S
        self._now = now
        self._taken: deque[float] = deque()
        self._marks: deque[tuple[float, int]] = deque([(now(), 0)])

    def take(self) -> bool:
        """Whether one more retry is within the budget; it is then counted."""
        now = self._now()
        elsewhere = self.elsewhere()
        self.requests += max(elsewhere - self._elsewhere, 0)
        self._elsewhere = elsewhere
        while self._taken and self._taken[0] <= now - WINDOW_S:
            self._taken.popleft()
        if len(self._taken) >= max(self._per_window, self._share * self._recent(now)):
            self.denied += 1
            return False
        self._taken.append(now)
        self.used += 1
        return True

    def _recent(self, now: float) -> int:
        """Requests of the last window, as far as the marks tell; they are set when retries are wanted."""
        marks = self._marks
        if now - marks[-1][0] >= 1.0:
            marks.append((now, self.requests))
        while len(marks) > 1 and marks[1][0] <= now - WINDOW_S:
            marks.popleft()
        started, count = marks[0]
        # After a quiet spell the only mark may be hours old; its requests are spread evenly over that time.
        age = max(now - started, WINDOW_S)
        return int((self.requests - count) * WINDOW_S / age)
