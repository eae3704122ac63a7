"""A strict WebSocket server that says every message back: wsproto's state machine on a socket, RFC 7692 included."""

from __future__ import annotations

import asyncio
from typing import cast

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, Message, Ping, Request
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import RemoteProtocolError


class Echo(asyncio.Protocol):
    """One connection. Fragments go back as they come, which makes one message of them again."""

    def __init__(self) -> None:
        self._connection = WSConnection(ConnectionType.SERVER)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                self._answer(event)
        except RemoteProtocolError as error:
            self._end(error.event_hint)

    def _answer(self, event: Event) -> None:
        if isinstance(event, Request):
            self._send(AcceptConnection(extensions=[PerMessageDeflate()]))
        elif isinstance(event, Ping):
            self._send(event.response())
        elif isinstance(event, CloseConnection):
            self._end(event.response())
        elif isinstance(event, Message):
            self._send(type(event)(event.data, event.frame_finished, event.message_finished))

    def _send(self, event: Event) -> None:
        self._transport.write(self._connection.send(event))

    def _end(self, last: Event | None) -> None:
        if last is not None:
            self._send(last)
        self._transport.close()

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
