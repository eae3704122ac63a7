"""Oversight: a person decides, the proxy enforces, and exactly what was approved happens once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from creto_oversight.settings import OversightSettings
from creto_proxy.hookspecs import API_VERSION, Core, Gate, Routes, hookimpl

if TYPE_CHECKING:
    import click
    from pydantic import BaseModel


class Oversight:
    """The plugin: one gate, one route, one command group, all on one durable record."""

    name: ClassVar[str] = "oversight"
    api: ClassVar[int] = API_VERSION
    Settings: ClassVar[type[BaseModel]] = OversightSettings

    def __init__(self, settings: OversightSettings, core: Core) -> None:
        # Here, so that commands that only read the settings do not wait for a database library.
        from creto_oversight.service import Service

        self._service = Service(settings, core)

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        from creto_oversight.commands import approvals

        return (approvals,)

    @hookimpl
    def creto_gate(self) -> Gate:
        return self._service.gate

    @hookimpl
    def creto_routes(self) -> Routes:
        return self._service.routes

    async def start(self) -> None:
        await self._service.start()

    async def stop(self) -> None:
        await self._service.stop()
