"""What a process that sees puts together: its counters, the journal's consumers that can be watched, what they tell.

A worker has the counters alone; a controller, and a creto that is by itself, has all of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from creto_hotpath.counters import Counters
from creto_proxy import __version__
from creto_proxy.audit import Recorder
from creto_proxy.errors import ConfigError
from creto_proxy.hookspecs import Consumer
from creto_proxy.observe.access_log import AccessLog
from creto_proxy.observe.aggregate import Base, clear_dead, counters_path, metrics_directory, remove_counters
from creto_proxy.observe.consumer import Followed, Sink, Tell, lag_gauges
from creto_proxy.observe.observer import Gauges, Observer, Sampler
from creto_proxy.observe.tracecontext import Forward, forward
from creto_proxy.replay import Replay
from creto_proxy.workers.status import NodeStatus, ReloadStatus, WorkerStatus

T = TypeVar("T")

log = logging.getLogger("creto.observe")

if TYPE_CHECKING:
    from creto_proxy.config import Config
    from creto_proxy.observe.admin import Admin


def observer_of(state: Path, run: str, name: str, worker: str) -> Observer:
    """The counters of this process, in a file of their own. Raises ConfigError when that cannot be made."""
    directory = metrics_directory(state, run)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Observer(Counters(str(counters_path(directory, name))), worker)
    except OSError as error:
        raise ConfigError([f"{directory}: the counters cannot be written: {error.strerror}"]) from None


def alone(run: str, connections: int, recorder: Recorder, replay: Replay | None, started_at: float) -> NodeStatus:
    """The status of a creto that is by itself: its one process is controller and worker."""
    worker = WorkerStatus(
        slot=0,
        serial=1,
        pid=os.getpid(),
        generation=1,
        state="ready",
        started_at=started_at,
        connections=connections,
        requests=recorder.records,
        journal_healthy=recorder.healthy or recorder.probe(),
    )
    waiting = () if worker.journal_healthy else ("the journal cannot be written",)
    return NodeStatus(
        run=run,
        pid=worker.pid,
        version=__version__,
        started_at=started_at,
        generation=1,
        slots=1,
        workers=(worker,),
        ready=not waiting,
        waiting=waiting,
        stopping=False,
        consumers_healthy=replay is None or replay.healthy,
        restarts=0,
        policy="",
        reload=ReloadStatus(),
    )


def forwarding(config: Config) -> Forward | None:
    """What to do with the trace context of a request that is sent on; None: nothing at all."""
    return forward if config.observe.otlp_endpoint else None


class Seeing:
    """Everything that is done about the journal and the counters beside counting.

    name: of this process' counters file, unique in the run. observer: where its own counts go, by default a new one.
    """

    def __init__(
        self,
        config: Config,
        run: str,
        name: str,
        observer: Observer | None = None,
        *,
        inherited: bool = False,
        sock: socket.socket | None = None,
    ) -> None:
        """inherited: workers serve already, so what cannot be had is done without, and said. Otherwise raises
        ConfigError when a file, a listener or a package that the configuration asks for cannot be had. sock: of the
        admin listener, where another has opened it."""
        state = config.state_dir
        self._state = state
        self._journal = state / "journal"
        self._directory = metrics_directory(state, run)
        clear_dead(state)
        self._own = observer is None
        self.observer = observer or observer_of(state, run, f"{name}-{os.getpid()}-{time.time_ns()}", name)
        self._inherited = inherited
        self._socket = sock or self._had(_admin_socket, config)
        self._tell = self._had(self._told, config)
        self._base = Base(self._directory) if self._own else None
        self._followed: tuple[Followed, ...] = ()
        self._admin: Admin | None = None
        self._sampling: asyncio.Task[None] | None = None

    def _had(self, make: Callable[[Config], T | None], config: Config) -> T | None:
        try:
            return make(config)
        except ConfigError as error:
            if not self._inherited:
                raise
            for problem in error.problems:
                log.error("%s", problem)
            return None

    def consumers(self, consumers: Sequence[Consumer]) -> tuple[Consumer, ...]:
        """Those, watched, and the one that tells what the configuration wants told."""
        every = (*consumers, self._tell) if self._tell is not None else consumers
        self._followed = tuple(Followed(each, self.observer) for each in every)
        return self._followed

    async def start(self, status: Callable[[], NodeStatus], gauges: Gauges | None = None) -> None:
        """Samples, and answers on the admin listener when there is one."""
        sampler = Sampler(self.observer, {**(gauges or {}), **lag_gauges(self._journal, self._followed)})
        self._sampling = asyncio.get_running_loop().create_task(sampler.run())
        if self._socket is not None:
            from creto_proxy.observe.admin import Admin
            from creto_proxy.observe.scrape import Scrape

            scrape = Scrape(self._directory, self._state, self._base)
            self._admin = Admin(self._socket, scrape, status)
            await self._admin.start()

    async def stop(self, *, keep: bool = False) -> None:
        """After the last record was applied. keep: the run goes on without this process, its counts are kept."""
        if self._sampling is not None:
            self._sampling.cancel()
        if self._admin is not None:
            await self._admin.stop()
        elif self._socket is not None:
            self._socket.close()
        if self._tell is not None:
            await asyncio.to_thread(self._tell.close)
        self.observer.close()
        if self._base is not None:
            self._base.close()
        if not keep:
            remove_counters(self._directory)

    def _told(self, config: Config) -> Tell | None:
        sinks = _sinks(config, self.observer)
        if not sinks:
            return None
        try:
            self._journal.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Tell(self._journal, self._state / "observe.pos", sinks)
        except OSError as error:
            raise ConfigError([f"{self._state}/observe.pos: cannot be written: {error.strerror}"]) from None


def _sinks(config: Config, observer: Observer) -> list[Sink]:
    settings, cell, counters = config.observe, observer.registry.cell, observer.counters
    sinks: list[Sink] = []
    if settings.access_log:
        lines = cell("access_log_lines_total")
        try:
            sinks.append(
                AccessLog(
                    Path(settings.access_log),
                    max_bytes=settings.access_log_bytes,
                    keep=settings.access_log_files,
                    count=partial(counters.add, lines),
                )
            )
        except OSError as error:
            path = settings.access_log
            raise ConfigError([f"observe.access_log: {path}: cannot be written: {error.strerror}"]) from None
    if settings.otlp_endpoint is not None:
        spans = {result: cell("trace_spans_total", result) for result in ("exported", "failed", "dropped")}
        try:
            from creto_proxy.observe.otlp import Traces
        except ImportError as error:
            raise ConfigError(
                [f"observe.otlp_endpoint: needs OpenTelemetry; pip install 'creto-enablement[otel]' ({error})"]
            ) from None
        sinks.append(
            Traces(
                settings.otlp_endpoint,
                ratio=settings.trace_ratio,
                count=lambda result, number: counters.add(spans[result], number),
            )
        )
    return sinks


def _admin_socket(config: Config) -> socket.socket | None:
    if config.admin.listen is None:
        return None
    from creto_proxy.observe.admin import admin_socket

    return admin_socket(config.admin.listen)
