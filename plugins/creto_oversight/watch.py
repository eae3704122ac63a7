"""Noticing decisions that other processes make.

While anything is held, one worker thread asks SQLite every 100 ms whether the file has changed (one pragma, a few
microseconds) and, only if it has, which requests did. Nothing runs while nothing is held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from creto_oversight.store import Store, StoreUnavailable, Ticker

T = TypeVar("T")
POLL_S = 0.1


class Offload(Protocol):
    """Runs a blocking call where it does not block the event loop."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]: ...


class Bell(Protocol):
    """Rings when the request may have changed. ``wait`` gives True when it rang, False after ``timeout_s``."""

    async def wait(self, timeout_s: float) -> bool: ...


class Watching(Protocol):
    """Lends a bell for one request; what changes after ``attached`` is entered rings it."""

    def attached(self, request_id: str) -> AbstractContextManager[Bell]: ...


class EventBell:
    """A bell on an asyncio event; ringing between two waits is not lost."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Watch:
    """Watches the store for all held calls of this process."""

    def __init__(self, store: Store, offload: Offload) -> None:
        self._store = store
        self._ticker = Ticker(store.path)
        self._offload = offload
        self._bells: set[EventBell] = set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def attached(self, request_id: str) -> Iterator[Bell]:
        bell = EventBell(request_id)
        self._bells.add(bell)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._poll())
        try:
            yield bell
        finally:
            self._bells.discard(bell)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._ticker.close()

    async def _poll(self) -> None:
        version, seq = -1, -1
        while self._bells:
            try:
                now = await self._offload(self._ticker.version)
                if now != version:
                    seq = await self._ring_changed(seq)
                    version = now
            except StoreUnavailable:
                # Whoever is held reads the store himself, and is refused with the reason.
                version, seq = -1, -1
                self._ring(frozenset(bell.request_id for bell in self._bells))
            await asyncio.sleep(POLL_S)
        self._task = None

    async def _ring_changed(self, seq: int) -> int:
        """Rings for what changed since history line ``seq`` (-1: everybody, there is no telling) and returns the new
        last line."""
        last, changed = await self._offload(lambda: self._changes(seq))
        self._ring(frozenset(bell.request_id for bell in self._bells) if seq < 0 else changed)
        return last

    def _changes(self, seq: int) -> tuple[int, frozenset[str]]:
        with self._store.reading() as session:
            return session.last_event(), (session.changed_since(seq) if seq >= 0 else frozenset())

    def _ring(self, request_ids: frozenset[str]) -> None:
        for bell in self._bells:
            if bell.request_id in request_ids:
                bell.ring()
