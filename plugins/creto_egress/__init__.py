"""Egress: which destinations exist for an agent, and the kernel rules that leave it no other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from creto_egress.guard import Guard
from creto_egress.redirect import NetfilterRedirect
from creto_egress.settings import EgressSettings
from creto_proxy.hookspecs import API_VERSION, Core, EgressGuard, Redirect, hookimpl

if TYPE_CHECKING:
    import click


class Egress:
    """The plugin: one guard over names and addresses, one redirect."""

    name: ClassVar[str] = "egress"
    api: ClassVar[int] = API_VERSION
    Settings: ClassVar[type[EgressSettings]] = EgressSettings

    def __init__(self, settings: EgressSettings, core: Core) -> None:
        self._guard = Guard(settings)
        self._redirect = NetfilterRedirect()

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        return ()

    @hookimpl
    def creto_egress_guard(self) -> EgressGuard:
        return self._guard

    @hookimpl
    def creto_redirect(self) -> Redirect:
        return self._redirect

    async def start(self) -> None:
        """Nothing to open: the rules are installed by ``creto run``, inside the agent's namespace."""

    async def stop(self) -> None:
        """Nothing to close: the rules end with the namespace."""
