"""A request that asks for its connection to become something else, from who watches it to how that ended."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from http import HTTPStatus

from wsproto.frame_protocol import CloseReason

from creto_hotpath.http1 import ResponseHead
from creto_hotpath.relay import Exchange, Upstream
from creto_proxy.errors import Permanent
from creto_proxy.model import Request
from creto_proxy.revocation import Revocations
from creto_proxy.websocket.transport import WatchedTransport
from creto_proxy.websocket.watch import Watchers

_EXTENSIONS = "Sec-WebSocket-Extensions"
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Upgrade:
    """``attach`` before the request is sent, ``answered`` with the final head, ``end`` once, when all is over.

    Raises StageFailed when a plugin cannot say whether it watches.
    """

    __slots__ = ("_error", "_exchange", "_request", "_revocations", "_watch", "_watched")

    def __init__(
        self, exchange: Exchange, request: Request, watchers: Watchers | None, revocations: Revocations
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._revocations = revocations
        upgrade = exchange.head.upgrade
        self._watch = watchers.open(request, upgrade) if watchers is not None and upgrade is not None else None
        self._watched: WatchedTransport | None = None
        self._error = ""

    def attach(self, upstream: Upstream, fields: Mapping[str, str | None] | None) -> Mapping[str, str | None] | None:
        """The changes to the head that is sent, ``fields`` among them. A watched connection is seen from here on."""
        if self._watch is None:
            return fields
        agent = self._exchange.downstream.transport
        self._watched = WatchedTransport(upstream, agent, self._watch, self._broken)
        # What is compressed cannot be looked into: the extensions are not offered (RFC 6455 section 9.1).
        return {**(fields or {}), _EXTENSIONS: None}

    def answered(self, head: ResponseHead) -> None:
        """Raises Permanent when the upgrade is granted in a way that was not asked for."""
        if self._request.flow.http2:
            self._require_opened(head)
        if head.status != HTTPStatus.SWITCHING_PROTOCOLS:
            if self._watched is not None:
                self._watched.stand_down()
            return
        if self._watched is not None and head.headers.get(_EXTENSIONS) is not None:
            raise Permanent("The server chose an extension that was not offered.", reason="unasked_extension")
        # What it becomes may last longer than its agent stands.
        self._revocations.enter(self, self._request, self._revoked)

    def _require_opened(self, head: ResponseHead) -> None:
        """An agent that speaks HTTP/2 sees neither the key nor what answers it (RFC 8441 section 5), and to it any 2xx
        would mean that its WebSocket is open."""
        if head.status == HTTPStatus.SWITCHING_PROTOCOLS:
            key = self._exchange.head.headers.get("sec-websocket-key") or ""
            if head.headers.get("sec-websocket-accept") != _accept_of(key):
                raise Permanent("The server did not answer the key of the upgrade.", reason="bad_websocket_accept")
        elif HTTPStatus.OK <= head.status < HTTPStatus.MULTIPLE_CHOICES:
            raise Permanent("The server did not open a WebSocket.", reason="upgrade_ignored")

    def end(self) -> str:
        """Why creto ended it, snake_case; "" when it did not."""
        self._revocations.leave(self)
        return self._error

    def _revoked(self) -> None:
        self._broken("identity_ended")
        if self._watched is not None:
            self._watched.refuse(CloseReason.POLICY_VIOLATION, self._error)
        else:
            self._exchange.downstream.transport.abort()

    def _broken(self, reason: str) -> None:
        self._error = self._error or reason


def _accept_of(key: str) -> str:
    """What a server proves with that it has understood (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(f"{key}{_GUID}".encode(), usedforsecurity=False).digest()).decode()
