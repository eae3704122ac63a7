"""Everything a creto process is made of, wired once: platform, plugins, stages, listeners, journal.

``Service`` is what ``creto run`` and each worker of ``creto sidecar`` have in common; they differ in the listeners they
give it, and in who applies the journal: a service by itself does, that of a worker leaves it to the controller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from creto_hotpath.admit import DecisionTable
from creto_hotpath.journal import Journal
from creto_hotpath.relay import Limits as RelayLimits
from creto_hotpath.relay import Pool
from creto_platform import NotConfigured, Platform, PlatformError, embedded
from creto_platform.audit import Audit
from creto_platform.authz import EmbeddedAuthz, bundled_policies
from creto_platform.nhi import Identity, NhiError
from creto_proxy import tls
from creto_proxy.accept import Gateway
from creto_proxy.audit import AuditTrail, Recorder
from creto_proxy.authorize import Policy
from creto_proxy.clock import SystemClock
from creto_proxy.config import Config
from creto_proxy.control import Control
from creto_proxy.deadline import Guard
from creto_proxy.dns import Bindings, Resolver
from creto_proxy.egress import Egress
from creto_proxy.errors import ConfigError
from creto_proxy.express import Lanes
from creto_proxy.gate import Gates
from creto_proxy.h2.agents import Bounds
from creto_proxy.h2.origins import Origins
from creto_proxy.hookspecs import Core
from creto_proxy.identify import Identify, Links, agent_of
from creto_proxy.meter import Meters
from creto_proxy.model import Agent
from creto_proxy.observe.gauges import gauges_of
from creto_proxy.observe.node import Seeing, alone, forwarding, observer_of
from creto_proxy.observe.observer import Observer, Sampler
from creto_proxy.pipeline import Pipeline
from creto_proxy.plugins import Found, Plugins, compose
from creto_proxy.policies import load_authz
from creto_proxy.protect import Protection
from creto_proxy.protect.breaker import Health
from creto_proxy.protect.retries import RetryBudget
from creto_proxy.protocols import Inspector, Providers
from creto_proxy.replay import Replay
from creto_proxy.sockets import room
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.upstream import Dialling, Upstreams
from creto_proxy.websocket import Watchers
from creto_proxy.workers.status import NodeStatus

log = logging.getLogger("creto")

# A delegation is renewed when less than half of its life is left, so a long run never stands on an expired one.
DELEGATION_TTL_S = 900
# A revocation takes effect within a second, also on connections that are open: this, and ``express.LEASE_S``.
REVOCATION_CHECK_S = 0.5
SYNC_INTERVAL_S = 0.01
SYNC_REST = 4
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
    replay: Replay | None
    observer: Observer
    # What a service by itself does beside serving; that of a worker leaves it to its controller.
    seeing: Seeing | None
    # Numbers that this process reports to its controller about once a second, by name.
    facts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    started_at: float = field(default_factory=time.time)

    def reported(self) -> Mapping[str, Any]:
        """What ``facts`` say now."""
        return {name: fact() for name, fact in self.facts.items()}

    def attach(self, link: str, agent: str, *, secret: str | None = None) -> Agent:
        """Makes everything on ``link`` the agent of that name, delegated by the configured owner."""
        try:
            delegation = Delegation(self.platform, self.config, agent)
        except NhiError as error:
            raise ConfigError([f"agent {agent}: {error}"]) from None
        self.links.attach(link, delegation, secret=secret)
        return delegation()

    def status(self) -> NodeStatus:
        """Of a service by itself, which is its own only worker."""
        return alone(self.run, self.gateway.connections, self.recorder, self.replay, self.started_at)

    @contextmanager
    def _protected(self) -> Iterator[None]:
        """Measures the loop and looks at open requests for the length of the block."""
        protection = self.pipeline.protection
        protection.load.start()
        if protection.pace is not None:
            protection.pace.start(self.gateway.open)
        try:
            yield
        finally:
            protection.load.stop()
            if protection.pace is not None:
                protection.pace.stop()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves for the length of the block; at its end everything is drained, settled, applied and closed."""
        # A worker thread that holds the interpreter makes requests wait this long; the default of 5 ms is too much.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await self.plugins.start()
        if self.replay is not None:
            self.replay.start()
        sampling: asyncio.Task[None] | None = None
        if self.seeing is not None:
            await self.seeing.start(self.status, gauges_of(self))
        else:
            sampling = asyncio.get_running_loop().create_task(Sampler(self.observer, gauges_of(self)).run())
        syncer = Syncer(self.recorder)
        syncer.start()
        try:
            with self.guard, self._protected():
                yield
                await self.gateway.stop(self.config.limits.drain_s)
        finally:
            await asyncio.to_thread(syncer.stop)
            self.pipeline.upstreams.close()
            if sampling is not None:
                sampling.cancel()
            await _finish(self)


class AuditElsewhere:
    """The audit port of a worker: what it records reaches the log through its journal and the controller."""

    def close(self) -> None:
        """Nothing is open."""

    def __getattr__(self, name: str) -> Any:
        raise NotConfigured("audit", "a worker does not open the audit log; its controller does")


def platform_of(config: Config, authz: EmbeddedAuthz, *, audit: Audit | None = None) -> Platform:
    """Every port, over the state directory. Raises ConfigError."""
    state = private_directory(config.state_dir)
    try:
        return embedded(state, authz=authz, trust_domain=config.common.trust_domain, user=config.owner, audit=audit)
    except PlatformError as error:
        raise ConfigError([str(error)]) from None
    except OSError as error:
        raise ConfigError([f"{state}: cannot be used as state directory: {error.strerror}"]) from None


def assemble(
    config: Config,
    found: Sequence[Found],
    *,
    run: str,
    authority: tls.CertificateAuthority,
    journal: str | None = None,
    slot: int = 0,
) -> Service:
    """Everything wired, nothing started: no thread, no listener, no agent.

    journal: the name of a worker's journal, which its controller follows, and slot its place; by default the service
    is by itself and applies its own.

    Raises ConfigError when configuration, policies, state directory or a plugin cannot be used.
    """
    state = private_directory(config.state_dir)
    authz = load_authz(config)
    alone = journal is None
    platform = platform_of(config, authz, audit=None if alone else cast(Audit, AuditElsewhere()))
    clock = SystemClock()
    core = Core(
        platform=platform,
        clock=clock,
        state_dir=state,
        policies_dir=bundled_policies(),
        run=run,
        role="single" if alone else "worker",
        providers=config.protocols.llm,
    )
    plugins = compose(found, config, core)
    stages = plugins.stages

    def named(group: Iterable[S]) -> tuple[tuple[str, S], ...]:
        return tuple((plugins.owner(stage), stage) for stage in group)

    limits = config.limits
    guard = Guard(limits.stage_deadline_ms / 1000)
    targets = Targets([ReverseRoute.parse(route.name, route.upstream) for route in config.reverse])
    links = Links()
    bindings = Bindings()
    resolver = Resolver.from_endpoint(config.network.resolver)
    journal_directory = private_directory(state / "journal")
    observer = observer_of(state, run, journal or run, str(slot))
    seeing = Seeing(config, run, run, observer) if journal is None else None
    try:
        consumers = (*stages.consumers, AuditTrail(platform.audit))
        replay = None if seeing is None else Replay(journal_directory, run, seeing.consumers(consumers))
        recorder = Recorder(
            Journal(str(journal_directory), journal or run, flush="record"), replay.wake if replay else None
        )
    except OSError as error:
        raise ConfigError([f"{journal_directory}: the journal cannot be written: {error.strerror}"]) from None
    policy = Policy(
        authz,
        config.policy.extract,
        body_bytes=limits.body_bytes,
        inspector=Inspector(
            authz, Providers(config.protocols.llm), mcp=config.protocols.mcp, a2a=config.protocols.a2a
        ),
    )
    authorizers = (*named(stages.authorizers), *named(stages.meters))
    lanes = None
    protection = Protection.configured(limits, config.protect)
    upstreams = upstreams_of(config)
    stable = not stages.identifiers and all(getattr(each, "stable", False) for each in stages.guards)
    if stable and isinstance(authz.table, DecisionTable):
        lanes = Lanes(
            journal=recorder.journal,
            table=authz.table,
            policy=policy,
            authorizers=authorizers,
            targets=targets,
            upstreams=upstreams,
            protection=protection,
            observer=observer,
            guard=guard,
            clock=clock,
            sampling=forwarding(config) is not None,
        )
    pipeline = Pipeline(
        identify=Identify(links, stages.identifiers),
        policy=policy,
        authorizers=authorizers,
        gates=Gates(named(stages.gates), guard),
        egress=Egress(named(stages.guards), resolver, config.network.resolve, guard),
        upstreams=upstreams,
        meters=Meters(named(stages.meters), guard),
        recorder=recorder,
        control=Control(named(stages.routes), guard),
        guard=guard,
        clock=clock,
        tasks=set(),
        run=run,
        held_body_bytes=limits.body_bytes,
        lanes=lanes,
        protection=protection,
        observer=observer,
        forward_trace=forwarding(config),
        messages=Watchers(named(stages.messages), guard, config.websocket.max_message_bytes),
    )
    gateway = Gateway(
        pipeline,
        targets,
        relay_limits(config),
        authority=authority,
        names=bindings.names,
        capacity=min(room(), limits.connections) if limits.connections else None,
        http2=http2_bounds(config),
        stream_idle_s=limits.stream_idle_timeout_s,
    )
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
        observer=observer,
        seeing=seeing,
    )


async def _finish(service: Service) -> None:
    """Everything acknowledged is on disk and in ledger and audit log before the process ends."""
    try:
        await asyncio.to_thread(service.recorder.sync)
    except OSError as error:
        log.error("the journal could not be synced: %s", error)
    if service.replay is not None and not await asyncio.to_thread(service.replay.stop):
        log.error("ledger or audit log are behind the journal; the next creto on this state directory catches up")
    await service.plugins.stop()
    service.recorder.close()
    if service.seeing is not None:
        await service.seeing.stop()
    else:
        service.observer.close()
    await asyncio.to_thread(service.platform.close)


class Syncer:
    """Forces the journal onto the disk every few milliseconds while there is something new, in a thread of its own:
    what is written survives a killed process at once, a dead machine a moment later. It sleeps while nothing is."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._stop = threading.Event()
        self._dirty = threading.Event()
        self._thread = threading.Thread(target=self._run, name="creto-sync", daemon=True)

    def start(self) -> None:
        self._recorder.journal.dirtied = self._dirty.set
        if self._recorder.dirty:
            self._dirty.set()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._dirty.set()
        self._thread.join()

    def _run(self) -> None:
        pause = SYNC_INTERVAL_S
        while self._dirty.wait() and not self._stop.wait(pause):
            self._dirty.clear()
            if self._stop.is_set():
                return  # what was cleared may have been its call
            started = time.monotonic()
            try:
                self._recorder.sync()
            except OSError as error:
                log.error("the journal could not be synced: %s", error)
                pause = 1.0
                self._dirty.set()
                continue
            # A disk that is slow gets larger batches instead of no rest.
            pause = max(SYNC_INTERVAL_S, SYNC_REST * (time.monotonic() - started))


def relay_limits(config: Config) -> RelayLimits:
    limits = config.limits
    return RelayLimits(
        head_s=limits.head_timeout_s,
        idle_s=limits.idle_timeout_s,
        body_s=limits.body_timeout_s,
        stall_s=limits.stall_timeout_s,
        response_s=limits.response_timeout_s,
    )


def upstreams_of(config: Config) -> Upstreams:
    """The upstream stage with its pool, nothing connected yet."""
    upstream, protect = config.upstream, config.protect
    return Upstreams(
        tls.upstream_context(config.network.upstream_ca),
        Pool(),
        Dialling(config.limits.connect_timeout_s, upstream.try_timeout_s, upstream.retries),
        health=Health(
            failures=protect.breaker_failures,
            open_s=protect.breaker_open_s,
            open_max_s=protect.breaker_open_max_s,
            eject_s=protect.eject_s,
            eject_max_percent=protect.eject_max_percent,
        ),
        budget=RetryBudget(upstream.retry_percent, upstream.retry_min_per_s),
        origins=Origins([_host_port(text) for text in config.http2.prior_knowledge]) if config.http2.enabled else None,
        negotiating=tls.upstream_context(config.network.upstream_ca, http2=True) if config.http2.enabled else None,
    )


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def http2_bounds(config: Config) -> Bounds | None:
    """What agents may do with HTTP/2; None when it is off."""
    if not config.http2.enabled:
        return None
    return Bounds(config.http2.max_streams, config.limits.head_timeout_s, config.limits.idle_timeout_s)


