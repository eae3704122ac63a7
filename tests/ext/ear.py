"""A protocol that remembers, for tests of transports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Ear(asyncio.Protocol):
    """Notes what it is told. answer: writes back what it receives; keep: stays open for writing after the peer's end."""

    def __init__(self, *, answer: bool = False, keep: bool = False) -> None:
        self.answer = answer
        self.keep = keep
        self.told: list[str] = []
        self.received = bytearray()
        self.lost: BaseException | None = None
        self.transport: Any = None
        self.changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.tell("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes and data
        self.received += data
        self.tell("data")
        if self.answer:
            self.transport.write(data)

    def eof_received(self) -> bool:
        self.tell("eof")
        return self.keep

    def pause_writing(self) -> None:
        self.tell("pause")

    def resume_writing(self) -> None:
        self.tell("resume")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = exc
        self.tell("lost")

    def tell(self, what: str) -> None:
        if not self.told or self.told[-1] != what:
            self.told.append(what)
        self.changed.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            self.changed.clear()
            await self.changed.wait()

    def is_lost(self) -> bool:
        return self.told[-1:] == ["lost"]

    async def heard(self, what: str) -> None:
        await self.until(lambda: what in self.told)

    async def got(self, data: bytes) -> None:
        await self.until(lambda: len(self.received) >= len(data))
        assert self.received == data
