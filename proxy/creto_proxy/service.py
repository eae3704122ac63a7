"""Everything a creto process is made of, wired once: platform, plugins, stages, listeners, journal.

``Service`` is what ``creto run`` and ``creto sidecar`` have in common; they differ only in the listeners they give it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from creto_hotpath.journal import Journal
from creto_hotpath.relay import Limits as RelayLimits
from creto_hotpath.relay import Pool
from creto_platform import Platform, PlatformError, embedded
from creto_platform.authz import bundled_policies
from creto_platform.nhi import Identity, NhiError
from creto_proxy import tls
from creto_proxy.accept import Gateway
from creto_proxy.audit import AuditTrail, Recorder, Replay
from creto_proxy.authorize import Policy
from creto_proxy.clock import SystemClock
from creto_proxy.config import Config
from creto_proxy.control import Control
from creto_proxy.deadline import Guard
from creto_proxy.dns import Bindings, Resolver
from creto_proxy.egress import Egress
from creto_proxy.errors import ConfigError
from creto_proxy.gate import Gates
from creto_proxy.hookspecs import Core
from creto_proxy.identify import Identify, Links, agent_of
from creto_proxy.meter import Meters
from creto_proxy.model import Agent
from creto_proxy.pipeline import Pipeline
from creto_proxy.plugins import Found, Plugins, compose
from creto_proxy.policies import load_authz
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.upstream import Upstreams

log = logging.getLogger("creto")

# A delegation is renewed when less than half of its life is left, so a long run never stands on an expired one.
DELEGATION_TTL_S = 900
# A revocation takes effect within this time, also on connections that are open.
REVOCATION_CHECK_S = 1.0
SYNC_INTERVAL_S = 0.005
SWITCH_INTERVAL_S = 0.0005

S = TypeVar("S")


def new_run_id() -> str:
    """A name for this process' journal and report: sortable by time, unique on every machine."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + secrets.token_hex(4)


def private_directory(path: Path) -> Path:
    """``path``, existing, for this user only. Raises ConfigError when it cannot be made so."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid == os.getuid():
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be used as state directory: {error.strerror}"]) from None
    return path


class Delegation:
    """An agent's identity, renewed under its human's root before it runs out, and gone for good once it is revoked."""

    def __init__(self, platform: Platform, config: Config, name: str, unix_s: Callable[[], float] = time.time) -> None:
        self._platform = platform
        self._config = config
        self._name = name
        self._unix_s = unix_s
        self._check_at = 0.0
        self._identity, self._agent = self._issued()

    def __call__(self) -> Agent:
        now = self._unix_s()
        if now >= self._check_at:
            self._check(now)
        return self._agent

    def _check(self, now: float) -> None:
        self._check_at = now + REVOCATION_CHECK_S
        try:
            self._platform.nhi.recheck(self._identity, now)
            if self._identity.expires_at - now < DELEGATION_TTL_S / 2:
                self._identity, self._agent = self._issued()
        except NhiError as error:
            if self._agent.expires_at:
                log.warning("agent %s is refused from now on: %s", self._name, error)
            self._agent = replace(self._agent, expires_at=0.0)

    def _issued(self) -> tuple[Identity, Agent]:
        common = self._config.common
        identity = self._platform.nhi.agent(self._name, owner=self._config.owner, ttl_s=DELEGATION_TTL_S)
        return identity, agent_of(identity, org=common.org, env=common.env, team=common.team or "")


@dataclass(frozen=True, slots=True)
class Service:
    """A wired creto: give it listeners through ``gateway`` and agents through ``attach``, inside ``running``."""

    config: Config
    run: str
    state: Path
    platform: Platform
    plugins: Plugins
    guard: Guard
    links: Links
    gateway: Gateway
    pipeline: Pipeline
    bindings: Bindings
    resolver: Resolver
    recorder: Recorder
    replay: Replay

    def attach(self, link: str, agent: str, *, secret: str | None = None) -> Agent:
        """Makes everything on ``link`` the agent of that name, delegated by the configured owner."""
        try:
            delegation = Delegation(self.platform, self.config, agent)
        except NhiError as error:
            raise ConfigError([f"agent {agent}: {error}"]) from None
        self.links.attach(link, delegation, secret=secret)
        return delegation()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves for the length of the block; at its end everything is drained, settled, applied and closed."""
        # A worker thread that holds the interpreter makes requests wait this long; the default of 5 ms is too much.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await self.plugins.start()
        self.replay.start()
        syncer = Syncer(self.recorder)
        syncer.start()
        try:
            with self.guard:
                yield
                await self.gateway.stop(self.config.limits.drain_s)
        finally:
            await asyncio.to_thread(syncer.stop)
            self.pipeline.upstreams.close()
            await _finish(self)


def assemble(config: Config, found: Sequence[Found], *, run: str, authority: tls.CertificateAuthority) -> Service:
    """Everything wired, nothing started: no thread, no listener, no agent.

    Raises ConfigError when configuration, policies, state directory or a plugin cannot be used.
    """
    state = private_directory(config.state_dir)
    authz = load_authz(config)
    try:
        platform = embedded(state, authz=authz, trust_domain=config.common.trust_domain, user=config.owner)
    except PlatformError as error:
        raise ConfigError([str(error)]) from None
    except OSError as error:
        raise ConfigError([f"{state}: cannot be used as state directory: {error.strerror}"]) from None
    clock = SystemClock()
    core = Core(platform=platform, clock=clock, state_dir=state, policies_dir=bundled_policies(), run=run)
    plugins = compose(found, config, core)
    stages = plugins.stages

    def named(group: Iterable[S]) -> tuple[tuple[str, S], ...]:
        return tuple((plugins.owner(stage), stage) for stage in group)

    limits = config.limits
    guard = Guard(limits.stage_deadline_ms / 1000)
    links = Links()
    bindings = Bindings()
    resolver = Resolver.from_endpoint(config.network.resolver)
    journal_directory = private_directory(state / "journal")
    try:
        replay = Replay(journal_directory, run, (*stages.consumers, AuditTrail(platform.audit)))
        recorder = Recorder(Journal(str(journal_directory), run, flush="record"), replay.wake)
    except OSError as error:
        raise ConfigError([f"{journal_directory}: the journal cannot be written: {error.strerror}"]) from None
    pipeline = Pipeline(
        identify=Identify(links, stages.identifiers),
        policy=Policy(authz, config.policy.extract, body_bytes=limits.body_bytes),
        authorizers=(*named(stages.authorizers), *named(stages.meters)),
        gates=Gates(named(stages.gates), guard),
        egress=Egress(named(stages.guards), resolver, config.network.resolve, guard),
        upstreams=Upstreams(tls.upstream_context(config.network.upstream_ca), Pool(), limits.connect_timeout_s),
        meters=Meters(named(stages.meters), guard),
        recorder=recorder,
        control=Control(named(stages.routes), guard),
        guard=guard,
        clock=clock,
        tasks=set(),
        run=run,
        held_body_bytes=limits.body_bytes,
    )
    targets = Targets([ReverseRoute.parse(route.name, route.upstream) for route in config.reverse])
    gateway = Gateway(pipeline, targets, relay_limits(config), authority=authority, names=bindings.names)
    return Service(
        config=config,
        run=run,
        state=state,
        platform=platform,
        plugins=plugins,
        guard=guard,
        links=links,
        gateway=gateway,
        pipeline=pipeline,
        bindings=bindings,
        resolver=resolver,
        recorder=recorder,
        replay=replay,
    )


async def _finish(service: Service) -> None:
    """Everything acknowledged is on disk and in ledger and audit log before the process ends."""
    try:
        await asyncio.to_thread(service.recorder.sync)
    except OSError as error:
        log.error("the journal could not be synced: %s", error)
    if not await asyncio.to_thread(service.replay.stop):
        log.error("ledger or audit log are behind the journal; the next creto on this state directory catches up")
    await service.plugins.stop()
    service.recorder.close()
    await asyncio.to_thread(service.platform.close)


class Syncer:
    """Forces the journal onto the disk every few milliseconds while there is something new, in a thread of its own:
    what is written survives a killed process at once, a dead machine a moment later."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="creto-sync", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SYNC_INTERVAL_S):
            if self._recorder.dirty:
                try:
                    self._recorder.sync()
                except OSError as error:
                    log.error("the journal could not be synced: %s", error)
                    self._stop.wait(1.0)


def relay_limits(config: Config) -> RelayLimits:
    limits = config.limits
    return RelayLimits(
        head_s=limits.head_timeout_s, idle_s=limits.idle_timeout_s, response_s=limits.response_timeout_s
    )


