"""Connects to what a ``Permit`` names, verifies its certificate, and lends pooled connections to the relay."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TypeVar, cast

from creto_hotpath.relay import Pool, Upstream
from creto_proxy.egress import genuine
from creto_proxy.errors import UpstreamTimeout, UpstreamUnreachable
from creto_proxy.model import Permit

P = TypeVar("P", bound=asyncio.BaseProtocol)


class Upstreams:
    """The upstream stage: one pool of idle connections per permit key."""

    def __init__(self, context: ssl.SSLContext, pool: Pool, connect_timeout_s: float) -> None:
        self._context = context
        self._pool = pool
        self._timeout_s = connect_timeout_s

    def idle(self, permit: Permit) -> Upstream | None:
        """A pooled connection for this permit, the most recently used one first."""
        _require_genuine(permit)
        return cast(Upstream | None, self._pool.acquire(permit.key))

    async def connect(self, permit: Permit) -> Upstream:
        """A fresh connection. Raises UpstreamUnreachable or UpstreamTimeout."""
        _require_genuine(permit)
        _, upstream = await self._open(permit, lambda: Upstream(self._pool, permit.key))
        return upstream

    async def open_raw(self, permit: Permit) -> Parked:
        """A fresh connection for bytes both ways, held still until a tunnel takes it over."""
        _require_genuine(permit)
        _, parked = await self._open(permit, Parked)
        return parked

    async def _open(self, permit: Permit, factory: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.create_connection(
                    factory,
                    str(permit.address),
                    permit.port,
                    ssl=self._context if permit.tls else None,
                    server_hostname=permit.name if permit.tls else None,
                )
        except TimeoutError as error:
            raise UpstreamTimeout(f"{permit.name} did not answer within {self._timeout_s:g} s.") from error
        except ssl.SSLCertVerificationError as error:
            raise UpstreamUnreachable(
                f"The certificate of {permit.name} does not verify: {error.verify_message}. "
                "If it is private, name its CA in [egress] upstream_ca.",
                reason="upstream_certificate",
            ) from error
        except OSError as error:
            raise UpstreamUnreachable(f"{permit.name} cannot be reached: {error.strerror or error}.") from error

    def close(self) -> None:
        self._pool.close()


class Parked(asyncio.Protocol):
    """Holds a new connection still, and keeps what it said before the tunnel that will own it exists.

    Event loops may start to read only after ``connection_made``, so pausing there is not enough.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.transport.pause_reading()


def _require_genuine(permit: Permit) -> None:
    if not genuine(permit):
        raise UpstreamUnreachable("The permit was not made by the egress stage.", reason="forged_permit")
