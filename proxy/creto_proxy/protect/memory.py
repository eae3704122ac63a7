"""The bodies that are held whole, for a decision or for a person, and the most they may take all together."""

from __future__ import annotations

from creto_proxy.errors import Transient


class Memory:
    """Bytes of request bodies in hand. ``used`` never exceeds ``limit``; 0 means that there is none."""

    __slots__ = ("limit", "peak", "refused", "used")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.refused = 0

    def take(self, size: int, *, last: bool = False) -> None:
        """Sets ``size`` bytes aside. Raises Transient (503) when there are not so many: what is held already stays.

        last: an eighth is kept for these, so that questions to creto itself are answered when nothing else is.
        """
        used = self.used + size
        if self.limit and used > (self.limit if last else self.limit - self.limit // 8):
            self.refused += 1
            raise Transient("Creto holds as many request bodies as it may; try again.", reason="memory_pressure")
        self.used = used
        if used > self.peak:
            self.peak = used

    def give(self, size: int) -> None:
        self.used -= size
