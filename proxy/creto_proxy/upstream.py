"""Connects to what a ``Permit`` names, verifies its certificate, and lends pooled connections to the relay.

Of the addresses of one name the next is tried when one fails, or has not accepted within a quarter of a second (after
RFC 8305, "happy eyeballs"); which are passed over, and when nothing is dialled at all, ``protect.breaker`` says.
"""

from __future__ import annotations

import asyncio
import copy
import random
import ssl
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from creto_hotpath import wire
from creto_hotpath.relay import Pool, Upstream
from creto_proxy.egress import genuine
from creto_proxy.errors import CretoError, UpstreamTimeout, UpstreamUnreachable
from creto_proxy.h2.origins import ALPN, Origins
from creto_proxy.model import Permit, Request
from creto_proxy.protect.breaker import Health
from creto_proxy.protect.retries import RetryBudget
from creto_proxy.sockets import Dialled, dial_tls

P = TypeVar("P", bound=asyncio.BaseProtocol)

# How long one address may take to accept before the next is tried as well (RFC 8305 section 5).
HEAD_START_S = 0.25
# Before all addresses are tried once more; a server that is restarted listens again within that.
_RETRY_PAUSE_S = (0.05, 0.2)


# What ends a request and is not the agent's doing, and what a gateway says of the server behind it.
_FAILURES = frozenset({"upstream_closed", "upstream_timeout", "upstream_silent", "upstream_not_reading"})
_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Dialling:
    """How long connecting may take. try_s: one address. total_s: all tries together. retries: further rounds."""

    total_s: float = 10.0
    try_s: float = 5.0
    retries: int = 1


class Upstreams:
    """The upstream stage: one pool of idle connections per permit key, and what is known of their health."""

    def __init__(
        self,
        context: ssl.SSLContext,
        pool: Pool,
        dialling: Dialling | float,
        *,
        health: Health | None = None,
        budget: RetryBudget | None = None,
        origins: Origins | None = None,
        negotiating: ssl.SSLContext | None = None,
    ) -> None:
        """dialling: a number is the time for all tries together, in seconds. origins: HTTP/2 for the requests that need
        it; negotiating: the context that offers it."""
        self.health = health or Health()
        self.retries = budget or RetryBudget()
        self._context = context
        self._pool = pool
        self._dialling = dialling if isinstance(dialling, Dialling) else Dialling(total_s=dialling)
        self._origins = origins
        self._negotiating = copy.copy(self)
        self._negotiating._context = negotiating or context

    def idle(self, permit: Permit, request: Request | None = None) -> Upstream | None:
        """A pooled connection for this permit, the most recently used one first; what ``request`` needs, if given."""
        _require_genuine(permit)
        origins = self._origins
        if origins is not None and request is not None and (origins.prior or request.flow.http2):
            return origins.idle(permit, request, self._pool)
        return cast(Upstream | None, self._pool.acquire(permit.key))

    def usable(self, permits: Sequence[Permit]) -> Sequence[Permit]:
        """Those that may be dialled now, best first. Raises Transient (503) when all of them are left alone."""
        return self.health.usable(permits) if self.health.bad else permits

    def again(self) -> bool:
        """Whether a request whose connection was dead already may be sent once more; it then counts as a retry."""
        return self._dialling.retries > 0 and self.retries.take()

    def judge(self, key: Hashable, status: int, error: str) -> None:
        """Takes note of how a request ended that was sent there. error: "" or why it was not completed."""
        if error in _FAILURES or (error == "" and status in _GATEWAY):
            self.health.failed(key, error or f"it answered {status}")
        elif self.health.bad and error == "":
            self.health.answered(key)

    async def connect(self, permits: Sequence[Permit], request: Request | None = None) -> Upstream:
        """A fresh connection to the first of them that accepts. Raises UpstreamUnreachable or UpstreamTimeout."""
        origins = self._origins
        if origins is not None and request is not None and (way := origins.way(permits[0], request)):
            return await origins.connect(permits, request, self._pool, self._dial_h2(permits, way))
        _, upstream = await self._dial(permits, lambda permit: Upstream(self._pool, permit.key))
        return upstream

    def _dial_h2(self, permits: Sequence[Permit], way: str) -> Callable[[], Awaitable[Dialled]]:
        async def dial() -> Dialled:
            dialler = self._negotiating if way == ALPN else self
            _, arriving = await dialler._dial(permits, Dialled)
            return arriving

        return dial

    async def open_raw(self, permits: Sequence[Permit]) -> Dialled:
        """A fresh connection for bytes both ways, held still until a tunnel takes it over."""
        _, parked = await self._dial(permits, Dialled)
        if self.health.bad:
            self.health.answered(parked.permit.key)  # of what flows inside nothing will be known
        return parked

    async def _dial(self, permits: Sequence[Permit], make: Callable[[Permit], P]) -> tuple[asyncio.Transport, P]:
        """Connects, in as many rounds as may be. Nothing was sent yet, so any request may be tried again."""
        for permit in permits:
            _require_genuine(permit)
        deadline = asyncio.get_running_loop().time() + self._dialling.total_s
        left = self._dialling.retries
        while True:
            try:
                if len(permits) == 1:
                    return await self._open(permits[0], make, deadline)
                return await self._race(permits, make, deadline)
            except (UpstreamUnreachable, UpstreamTimeout) as error:
                pause_s = random.uniform(*_RETRY_PAUSE_S)
                late = asyncio.get_running_loop().time() + pause_s >= deadline
                if left == 0 or late or error.reason == "upstream_certificate" or not self.retries.take():
                    raise
            left -= 1
            await asyncio.sleep(pause_s)

    async def _race(
        self, permits: Sequence[Permit], make: Callable[[Permit], P], deadline: float
    ) -> tuple[asyncio.Transport, P]:
        """The first that accepts, each started a moment after the one before or as soon as that has failed."""
        loop = asyncio.get_running_loop()
        waiting = list(permits)
        racing: dict[asyncio.Task[tuple[asyncio.Transport, P]], Permit] = {}
        errors: list[CretoError] = []
        try:
            while waiting or racing:
                if waiting:
                    permit = waiting.pop(0)
                    racing[loop.create_task(self._open(permit, make, deadline))] = permit
                head_start = HEAD_START_S if waiting else None
                done, _ = await asyncio.wait(racing, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    permit = racing.pop(task)
                    error = task.exception()
                    if error is None:
                        for slower in racing.values():
                            if permits.index(slower) < permits.index(permit):
                                self.health.slow(slower.key)
                        return task.result()
                    if not isinstance(error, CretoError):
                        raise error
                    errors.append(error)
        finally:
            for task in racing:
                task.add_done_callback(_close_late)
                task.cancel()
        # Of several reasons, a certificate that does not verify is the one somebody can do something about.
        raise next((error for error in errors if error.reason == "upstream_certificate"), errors[0])

    async def _open(self, permit: Permit, make: Callable[[Permit], P], deadline: float) -> tuple[asyncio.Transport, P]:
        try:
            return await self._connect(permit, make, deadline)
        except CretoError as error:
            self.health.failed(permit.key, error.detail.rstrip("."), connecting=True)
            raise

    async def _connect(
        self, permit: Permit, make: Callable[[Permit], P], deadline: float
    ) -> tuple[asyncio.Transport, P]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout_at(min(deadline, started + self._dialling.try_s)):
                if permit.tls:
                    return await dial_tls(make(permit), self._context, permit.name, str(permit.address), permit.port)
                return await wire.dial(lambda: make(permit), str(permit.address), permit.port)
        except TimeoutError as error:
            raise UpstreamTimeout(f"{permit.name} did not answer within {loop.time() - started:.3g} s.") from error
        except ssl.SSLCertVerificationError as error:
            raise UpstreamUnreachable(
                f"The certificate of {permit.name} does not verify: {error.verify_message}. "
                "If it is private, name its CA in [egress] upstream_ca.",
                reason="upstream_certificate",
            ) from error
        except OSError as error:
            raise UpstreamUnreachable(f"{permit.name} cannot be reached: {error.strerror or error}.") from error

    @property
    def kept(self) -> int:
        """Connections that nobody uses now and that are kept for later."""
        return len(self._pool)

    def close(self) -> None:
        if self._origins is not None:
            self._origins.close()
        self._pool.close()


def _require_genuine(permit: Permit) -> None:
    if not genuine(permit):
        raise UpstreamUnreachable("The permit was not made by the egress stage.", reason="forged_permit")


def _close_late(task: asyncio.Task[Any]) -> None:
    """A connection that came when another had won already."""
    if not task.cancelled() and task.exception() is None:
        task.result()[0].abort()
