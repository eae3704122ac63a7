"""Metering: what agents use, what it costs, and what they may still spend.

Usage is read from the answers of model providers, priced exactly in nano-dollars, limited by budgets that are reserved
before a request is sent and settled after it, and kept in a ledger that the journal feeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from creto_metering.settings import Settings as MeteringSettings
from creto_proxy.hookspecs import API_VERSION, Consumer, Core, Meter, Routes, hookimpl

if TYPE_CHECKING:
    import click
    from pydantic import BaseModel


class Metering:
    """The plugin: a meter, a consumer of the journal, and the agent's view of its own usage."""

    name: ClassVar[str] = "metering"
    api: ClassVar[int] = API_VERSION
    Settings: ClassVar[type[BaseModel]] = MeteringSettings

    def __init__(self, settings: MeteringSettings, core: Core) -> None:
        # Here, so that commands that only read the settings do not wait for a database library.
        from creto_metering.ledger import Ledger
        from creto_metering.meter import RequestMeter
        from creto_metering.routes import UsageRoutes
        from creto_metering.service import Service

        self._meter = RequestMeter(settings, core.clock, core.providers)
        self._ledger = Ledger(core.state_dir / "metering.db")
        self._routes = UsageRoutes(self._ledger, self._meter, core.clock)
        self._service = Service(settings, core, self._meter, self._ledger)

    @hookimpl
    def creto_meter(self) -> Meter:
        return self._meter

    @hookimpl
    def creto_consumer(self) -> Consumer:
        return self._ledger

    @hookimpl
    def creto_routes(self) -> Routes:
        return self._routes

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        from creto_metering.commands import quota, usage

        return (usage, quota)

    async def start(self) -> None:
        await asyncio.to_thread(self._service.open)
        self._service.keep_sweeping()

    async def stop(self) -> None:
        await self._service.stop()
