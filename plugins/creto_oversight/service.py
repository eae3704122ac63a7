"""Oversight at work: the parts of the plugin, made together, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from creto_oversight.desk import Caps, Desk
from creto_oversight.engine import CommandRefused
from creto_oversight.gate import OversightGate
from creto_oversight.notify import StreamNotifier
from creto_oversight.owners import OWNERS, Owner
from creto_oversight.routes import ApprovalRoutes
from creto_oversight.settings import OversightSettings
from creto_oversight.store import DATABASE, Store, StoreUnavailable
from creto_oversight.watch import Watch
from creto_proxy.hookspecs import Core

T = TypeVar("T")
SWEEP_S = 1.0

log = logging.getLogger("creto.oversight")


class Service:
    """One gate and one route on one durable record, which nothing touches before ``start``."""

    def __init__(self, settings: OversightSettings, core: Core) -> None:
        self._sweeps = core.role != "worker"  # once per node is enough, and nobody is told twice
        self._store = Store(core.state_dir / DATABASE)
        self._owner = Owner(core.state_dir / OWNERS)
        self._workers: ThreadPoolExecutor | None = None
        self._sweeper: asyncio.Task[None] | None = None
        caps = Caps(
            settings.open_max_per_agent,
            settings.open_max_per_root,
            settings.new_per_minute_per_agent,
            settings.new_per_minute_per_root,
        )
        self._desk = Desk(self._store, self._owner, caps, core.clock, StreamNotifier(sys.stderr))
        self._watch = Watch(self._store, self._offload)
        self.gate = OversightGate(self._desk, self._watch, self._offload, settings, core.clock, core.run)
        self.routes = ApprovalRoutes(self._desk, self._watch, self._offload, core.clock)

    async def start(self) -> None:
        """Opens the record, settles what earlier processes left behind, and keeps doing so."""
        self._store.open()
        self._owner.take()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="creto-oversight")
        if not self._sweeps:
            return
        await self._offload(self._desk.sweep)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        await self._watch.stop()
        if self._workers is not None:
            self._workers.shutdown(wait=True)
            self._workers = None
        self._owner.release()
        self._store.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._offload(self._desk.sweep)
            except (StoreUnavailable, CommandRefused) as error:
                log.error("deadlines could not be applied: %s", error)

    async def _offload(self, call: Callable[[], T]) -> T:
        if self._workers is None:
            raise StoreUnavailable("oversight is not running")
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)
