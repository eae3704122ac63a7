"""What happens once per node, behind the workers: consumers of the journals, plugins' timers, the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from creto_platform import Platform
from creto_platform.authz import EmbeddedAuthz, bundled_policies
from creto_platform.nhi import NhiError
from creto_proxy.audit import AuditTrail
from creto_proxy.clock import SystemClock
from creto_proxy.config import Config
from creto_proxy.errors import ConfigError
from creto_proxy.hookspecs import Consumer, Core
from creto_proxy.plugins import Found, Plugins, compose
from creto_proxy.policies import load_authz
from creto_proxy.replay import Replay
from creto_proxy.service import Delegation, platform_of, private_directory

Watched: TypeAlias = Callable[[Sequence[Consumer]], tuple[Consumer, ...]]


class Backstage:
    """Plugins in the role of "controller" and the replay of the journals; no request comes here.

    authz: the policies that are in force, for what is told about them.
    """

    def __init__(self, config: Config, authz: EmbeddedAuthz, platform: Platform, plugins: Plugins) -> None:
        self.config = config
        self.authz = authz
        self._platform = platform
        self._plugins = plugins

    async def start(self) -> None:
        """Raises ConfigError naming the plugin that cannot start."""
        await self._plugins.start()

    def replay(self, run: str, lock: int | None = None, watched: Watched = tuple) -> Replay:
        """What applies the journals of this node, not started. lock: as for ``Replay``. watched: gives the consumers
        that really get the records, for those it is given. Raises ConfigError."""
        directory = private_directory(self.config.state_dir / "journal")
        consumers = (*self._plugins.stages.consumers, AuditTrail(self._platform.audit))
        try:
            return Replay(directory, run, watched(consumers), follows=True, lock=lock)
        except OSError as error:
            raise ConfigError([f"{directory}: the journal cannot be used: {error.strerror}"]) from None

    async def stop(self) -> None:
        """Closes what ``start`` opened; the replay has to have ended."""
        await self._plugins.stop()
        await asyncio.to_thread(self._platform.close)


def arrange(config: Config, found: Sequence[Found], *, run: str, agent: str) -> Backstage:
    """Everything wired, nothing started. agent: the name of an identity that must be possible.

    Raises ConfigError when configuration, policies, state directory or a plugin cannot be used.
    """
    authz = load_authz(config)
    platform = platform_of(config, authz)
    try:
        core = Core(platform, SystemClock(), config.state_dir, bundled_policies(), run, role="controller")
        plugins = compose(found, config, core)
        try:
            Delegation(platform, config, agent)
        except NhiError as error:
            raise ConfigError([f"agent {agent}: {error}"]) from None
        return Backstage(config, authz, platform, plugins)
    except ConfigError:
        platform.close()
        raise


async def rehearse(config: Config, found: Sequence[Found], *, run: str, agent: str) -> None:
    """Starts and stops what ``arrange`` gives, beside the controller that may be running. Raises ConfigError."""
    backstage = arrange(config, found, run=run, agent=agent)
    try:
        await backstage.start()
    finally:
        await backstage.stop()
