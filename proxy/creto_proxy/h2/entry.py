"""HTTP/1.1 or HTTP/2: decided once per connection, by ALPN or by the first bytes, then out of the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from creto_hotpath.relay import Downstream
from creto_proxy.h2.guard import PREFACE

ALPN = "h2"


class Adopts(Protocol):
    """A protocol that can take over a connection of which something was read."""

    def adopt(self, transport: asyncio.Transport, data: bytes, /) -> None: ...


class Entry(asyncio.Protocol):
    """The protocol of a new connection until it is known what it speaks. idle_s: how long it may say nothing.

    RFC 9113 section 3.3: a client with prior knowledge begins with a preface that no HTTP/1.1 request begins with.
    """

    def __init__(
        self,
        http1: Callable[[], Downstream],
        http2: Callable[[], Adopts],
        done: Callable[[Entry], None],
        idle_s: float,
    ) -> None:
        self._http1 = http1
        self._http2 = http2
        self._done = done
        self._idle_s = idle_s
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        session = transport.get_extra_info("ssl_object")
        if session is None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.drain)
        else:
            self._hand_over(session.selected_alpn_protocol() == ALPN)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data
        if len(received) >= len(PREFACE) or not PREFACE.startswith(received):
            self._hand_over(received.startswith(PREFACE))

    def _hand_over(self, http2: bool) -> None:
        transport, received = self._transport, self._received
        assert transport is not None
        self._leave()
        if http2:
            self._http2().adopt(transport, received)
        else:
            self._http1().adopt(transport, received)

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._done(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._transport is not None:
            self._leave()

    @property
    def busy(self) -> bool:
        return False

    def drain(self) -> None:
        """Closes: nothing was asked yet."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
