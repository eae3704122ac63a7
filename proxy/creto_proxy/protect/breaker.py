"""Which upstream addresses are in trouble, and for how long they are left alone.

Two rules over the same facts, both per permit key (name, address, port, TLS):

- *Ejection.* An address that cannot be connected to is passed over while others of its name work; longer each time in
  a row. At most a part of a name's addresses is: when more fail, the trouble is not with the addresses.
- *Breaker.* After so many failures in a row (no connection, 502 to 504, no answer in time, broken off) nothing is sent
  there at all. After a pause one request may try (half-open): it closes the breaker, or doubles the pause.

Only what is in trouble is remembered; the first answer, or ten minutes without a failure, make it forgotten. Memory: at
most ``MOST`` entries.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from creto_proxy.errors import Transient
from creto_proxy.model import Permit

log = logging.getLogger("creto.upstream")

MOST = 4096
FORGET_S = 600.0


class Trouble:
    """What went wrong with one address. failed_at: the last time. trips: openings in a row, 0 while the breaker is
    closed. until: when the next request may try. trying: one is. ejected_until: until when others of its name go first.
    """

    __slots__ = ("ejected_until", "ejections", "failed_at", "failures", "trips", "trying", "until", "why")

    def __init__(self) -> None:
        self.failures = 0
        self.failed_at = 0.0
        self.trips = 0
        self.until = 0.0
        self.trying = False
        self.ejections = 0
        self.ejected_until = 0.0
        self.why = ""


class Health:
    """The addresses in trouble. ``bad`` is empty while there are none, and then nothing needs to be asked."""

    def __init__(
        self,
        *,
        failures: int = 5,
        open_s: float = 1.0,
        open_max_s: float = 60.0,
        eject_s: float = 10.0,
        eject_max_percent: int = 50,
        now: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """failures: in a row until the breaker opens, 0: never. open_s: first pause, doubled up to open_max_s."""
        self.bad: OrderedDict[Hashable, Trouble] = OrderedDict()
        self.opened = 0
        self.ejected = 0
        self.refused = 0
        self._failures = failures
        self._open_s = open_s
        self._open_max_s = open_max_s
        self._eject_s = eject_s
        self._eject_share = eject_max_percent / 100
        self._now = now
        self._chance = chance

    # -- before a connection is used

    def allows(self, key: Hashable) -> bool:
        """Whether a request may be sent there now. The one that may try an open breaker is told so once per pause."""
        trouble = self.bad.get(key)
        if trouble is None or not trouble.trips:
            return True
        if self._now() < trouble.until:
            return False
        self._try(trouble)
        return True

    def usable(self, permits: Sequence[Permit]) -> tuple[Permit, ...]:
        """Those of one name that may be dialled now, best first. Raises Transient (503) when none may."""
        now = self._now()
        ready: list[Permit] = []
        ejected: list[Permit] = []
        trying: list[Permit] = []
        soonest = float("inf")
        for permit in permits:
            trouble = self.bad.get(permit.key)
            if trouble is None or (not trouble.trips and now >= trouble.ejected_until):
                ready.append(permit)
            elif not trouble.trips:
                ejected.append(permit)
            elif now < trouble.until:
                soonest = min(soonest, trouble.until)
            elif not trying:
                self._try(trouble)
                trying.append(permit)
        while len(ejected) > int(len(permits) * self._eject_share):
            ready.append(ejected.pop(0))
        usable = (*trying, *ready, *ejected)
        if not usable:
            self._refuse(permits, soonest - now)
        return usable

    def _try(self, trouble: Trouble) -> None:
        # Should it never report, because its agent left, the next may try after another pause.
        trouble.trying = True
        trouble.until = self._now() + self._pause(trouble)

    def _refuse(self, permits: Sequence[Permit], wait_s: float) -> None:
        self.refused += 1
        permit = permits[0]
        why = self.bad[permit.key].why
        raise Transient(
            f"{permit.name} failed repeatedly and is left alone for a moment; the last time: {why}.",
            reason="upstream_unavailable",
            retry_after_s=wait_s,
        )

    # -- after it was

    def answered(self, key: Hashable) -> None:
        """It works: whatever was wrong is forgotten."""
        trouble = self.bad.pop(key, None)
        if trouble is not None and trouble.trips:
            log.warning("%s answers again", _shown(key))

    def failed(self, key: Hashable, why: str, *, connecting: bool = False) -> None:
        """It failed once more. connecting: already when it was dialled, so that others of its name go first."""
        trouble = self._trouble(key)
        trouble.failures += 1
        trouble.why = why
        if connecting:
            self._eject(trouble)
        if trouble.trips:
            if trouble.trying:
                self._open(key, trouble)  # others that fail now were sent before it opened
        elif self._failures and trouble.failures >= self._failures:
            self._open(key, trouble)

    def slow(self, key: Hashable) -> None:
        """It took so long to accept that another of its name was there first; no failure, but others go first."""
        self._eject(self._trouble(key))

    def _trouble(self, key: Hashable) -> Trouble:
        now = self._now()
        while self.bad and (len(self.bad) >= MOST or next(iter(self.bad.values())).failed_at < now - FORGET_S):
            self.bad.popitem(last=False)
        trouble = self.bad.get(key)
        if trouble is None:
            trouble = self.bad[key] = Trouble()
        trouble.failed_at = now
        self.bad.move_to_end(key)
        return trouble

    def _eject(self, trouble: Trouble) -> None:
        trouble.ejections += 1
        trouble.ejected_until = self._now() + min(self._eject_s * trouble.ejections, self._open_max_s)
        self.ejected += 1

    def _open(self, key: Hashable, trouble: Trouble) -> None:
        trouble.trips += 1
        trouble.trying = False
        trouble.until = self._now() + self._pause(trouble)
        if trouble.trips == 1:
            self.opened += 1
            log.warning("%s failed %d times in a row (%s); left alone", _shown(key), trouble.failures, trouble.why)

    def _pause(self, trouble: Trouble) -> float:
        """Doubled each time, and never the same twice, so that many creto do not try together."""
        pause: float = min(self._open_s * 2.0 ** min(trouble.trips - 1, 30), self._open_max_s)
        return pause * (0.75 + 0.5 * self._chance())


def _shown(key: Hashable) -> str:
    if not isinstance(key, tuple):
        return str(key)
    name, address, port, _ = key
    return f"{name} ({address}, port {port})"
