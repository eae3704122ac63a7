"""How long and how often is measured, and which peers could be started."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from peers.programs import NotInstalled, Peer

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """rounds: measurements of each peer, of which the median counts. seconds: length of one. connections: idle ones
    that are held. quota: requests that the contended budget admits."""

    rounds: int = 5
    seconds: float = 4.0
    connections: int = 10_000
    quota: int = 1_000_000

    def rounds_of(self, say: Say) -> tuple[float, int, Say]:
        return self.seconds, self.rounds, say


def started(stack: ExitStack, missing: list[str], *peers: AbstractContextManager[Peer]) -> list[Peer]:
    """The peers that this machine has, running until ``stack`` ends; why the others are not goes to ``missing``."""
    found = []
    for peer in peers:
        try:
            found.append(stack.enter_context(peer))
        except NotInstalled as error:
            missing.append(str(error))
    return found
