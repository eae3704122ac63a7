"""Ends what goes on too slowly to be honest, in either direction, however regularly a byte comes.

The relay's own deadlines start anew with each byte. So every few seconds all open requests are looked at from outside:
what moved since? A request costs nothing for this.

- A body the agent sends must come, after a grace period, at an average rate.
- An answer the upstream has begun must not fall silent while the agent is reading.
- An upstream that takes no more of a body, while there is more for it, is given the same time.

Each of these ends the request with an outcome; upgraded connections and tunnels may be silent as long as they like.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from creto_hotpath.relay import Downstream, Exchange

EVERY_S = 5.0
_SWITCHING = 101


class Paced(Protocol):
    """The handler of a connection, as it is seen from here."""

    @property
    def expected(self) -> int:
        """Bytes of a body that is being collected, at most; 0 when none is."""

    def overdue(self, status: int, reason: str, detail: str) -> None:
        """Ends the request under way: with ``status`` while nothing of an answer was sent, else by cutting it off."""


Connections = Callable[[], Iterable[tuple[Paced, Downstream]]]


@dataclass(slots=True)
class _Seen:
    """How far a request was when it was last looked at. began: tells it from the next on the same connection.
    moved_s: when a byte last went either way."""

    began: int
    since_s: float
    moved_s: float
    up: int = 0
    down: int = 0


class Pace:
    """Looks at every open request, from ``start`` to ``stop``. Memory: one small object per request seen twice."""

    def __init__(
        self, *, body_rate: float, grace_s: float, silence_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """body_rate: bytes per second a request body must come at after grace_s; 0: any. silence_s: of an answer."""
        self.ended = 0
        self._rate = body_rate
        self._grace_s = grace_s
        self._silence_s = silence_s
        self._now = now
        self._every_s = min(EVERY_S, max(0.25, min(grace_s, silence_s) / 4))
        self._seen: dict[Paced, _Seen] = {}
        self._connections: Connections = tuple
        self._timer: asyncio.TimerHandle | None = None

    def start(self, connections: Connections) -> None:
        self._connections = connections
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._look)

    def _look(self) -> None:
        self._arm()
        now = self._now()
        before, self._seen = self._seen, {}
        for paced, downstream in list(self._connections()):
            exchange = downstream.exchange
            if exchange is None or exchange.status == _SWITCHING:
                continue
            seen = before.get(paced)
            if seen is None or seen.began != exchange.received_ns:
                seen = _Seen(exchange.received_ns, now, now)
            verdict = self._judge(paced, exchange, seen, now)
            if verdict is None:
                self._seen[paced] = seen
            else:
                self.ended += 1
                if exchange.lane is None:
                    paced.overdue(*verdict)
                else:
                    exchange.abort(verdict[1])  # the handler was not asked about it and does not know it

    def _judge(self, paced: Paced, exchange: Exchange, seen: _Seen, now: float) -> tuple[int, str, str] | None:
        up, down = exchange.bytes_up, exchange.bytes_down
        went_up, went_down = up != seen.up, down != seen.down
        seen.up, seen.down = up, down
        if went_up or went_down:
            seen.moved_s = now
        expected = paced.expected
        if expected and self._rate and now - seen.since_s > self._grace_s + expected / self._rate:
            return _TOO_SLOW
        due = self._rate * (now - seen.since_s - self._grace_s)
        if went_up and exchange.receiving and up < due and not _waiting(exchange.upstream):
            return _TOO_SLOW
        if now - seen.moved_s > self._silence_s:
            if exchange.first_byte_ns and not _waiting(exchange.downstream):
                return _SILENT
            if not exchange.first_byte_ns and _waiting(exchange.upstream):
                return _NOT_READING
        return None


_TOO_SLOW = (408, "body_too_slow", "The request body came too slowly.")
_SILENT = (504, "upstream_silent", "The upstream stopped in the middle of its answer.")
_NOT_READING = (504, "upstream_not_reading", "The upstream stopped reading the request.")


def _waiting(side: Any) -> bool:
    """Whether there are bytes that the peer on that side has not taken yet."""
    return side is not None and not side.closed and side.transport.get_write_buffer_size() > 0
