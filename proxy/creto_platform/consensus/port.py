"""The consensus port: timestamps that order events across processes and machines.

A timestamp is a hybrid logical clock value: 48 bits of unix milliseconds, 16 bits of counter, and the node that
issued it. If one event could have caused another, its timestamp is smaller.
Source: Kulkarni et al., "Logical Physical Clocks" (2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from creto_platform.errors import PlatformError

COUNTER_BITS = 16
COUNTER_MAX = (1 << COUNTER_BITS) - 1


class ConsensusError(PlatformError):
    """The clock cannot issue timestamps; the text names the file or the limit."""


class ClockDrift(ConsensusError):
    """A peer's clock is so far ahead that its timestamp is refused."""

    def __init__(self, ahead_ms: int) -> None:
        super().__init__(f"the peer's clock is {ahead_ms} ms ahead of ours")
        self.ahead_ms = ahead_ms


@dataclass(frozen=True, slots=True, order=True)
class Timestamp:
    """value: u64, milliseconds << 16 | counter. node breaks ties.

    unconfirmed: taken from the local clock while an ordering service was configured and down.
    """

    value: int
    node: str
    unconfirmed: bool = False

    @property
    def unix_ms(self) -> int:
        return self.value >> COUNTER_BITS

    @property
    def counter(self) -> int:
        return self.value & COUNTER_MAX


class Consensus(Protocol):
    """Thread-safe."""

    @property
    def node(self) -> str:
        """Who issues: unique per process, so that two processes of one machine never issue the same timestamp."""
        ...

    def now(self) -> Timestamp:
        """A timestamp larger than every one issued or adopted here before, also before a restart."""
        ...

    def observe(self, remote: Timestamp) -> Timestamp:
        """A timestamp larger than ``remote`` when it is believable.

        A peer more than 500 ms ahead is not followed (the result may be smaller than ``remote``), one more than 60 s
        ahead raises ClockDrift.
        """
        ...
