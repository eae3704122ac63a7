"""The worker processes as their controller knows them, whichever program image of it has started them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from creto_proxy.workers.channel import Channel, Message
from creto_proxy.workers.handover import Inherited
from creto_proxy.workers.order import Order, started
from creto_proxy.workers.status import State, WorkerStatus

_STATES: Mapping[str, State] = {"ready": "ready", "draining": "draining"}


@dataclass(slots=True, eq=False)
class Process:
    """One worker. prepared: it could serve and waits to be told. ready_at, heard_at: monotonic seconds, 0.0 for not
    yet. reported: its last beat. answers: to what it was asked, by message name and serial."""

    slot: int
    serial: int
    pid: int
    generation: int
    journal: str
    lock: int
    state: State = "starting"
    started_at: float = field(default_factory=time.time)
    prepared: bool = False
    ready_at: float = 0.0
    heard_at: float = field(default_factory=time.monotonic)
    reported: Mapping[str, Any] = field(default_factory=dict)
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    channel: Channel = field(init=False)
    ended: bool = False

    def say(self, what: str, **facts: Any) -> None:
        self.channel.say(what, **facts)

    async def connect(
        self, sock: socket.socket, heard: Callable[[Process, Message], None], received: bytes = b""
    ) -> None:
        """Begins to listen to it."""
        self.channel = Channel(lambda _, message: heard(self, message), lambda _: None, received)
        await asyncio.get_running_loop().create_unix_connection(lambda: self.channel, sock=sock)

    def watch(self, over: Callable[[Process, int], None]) -> None:
        """``over(process, exit status)`` once it has ended; negative for a signal."""
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self.pid)

        def reap() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            _, status = os.waitpid(self.pid, 0)
            self.ended = True
            self.channel.close()
            over(self, os.waitstatus_to_exitcode(status))

        loop.add_reader(pidfd, reap)

    def kill(self) -> None:
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own

    def handed_over(self) -> Inherited:
        """For the next image, which has to reap it too should it be ending. Nothing is heard from it here any more."""
        try:
            link, received = self.channel.detach()
        except BrokenPipeError:
            link, received = _silent(), b""
        return Inherited(
            slot=self.slot,
            serial=self.serial,
            pid=self.pid,
            generation=self.generation,
            state=self.state,
            started_at=self.started_at,
            journal=self.journal,
            link=link,
            lock=self.lock,
            received=received,
        )

    def status(self) -> WorkerStatus:
        said = self.reported
        return WorkerStatus(
            slot=self.slot,
            serial=self.serial,
            pid=self.pid,
            generation=self.generation,
            state=self.state,
            started_at=self.started_at,
            connections=int(said.get("connections", 0)),
            requests=int(said.get("requests", 0)),
            journal_healthy=bool(said.get("journal_healthy", True)),
            heard_s=time.monotonic() - self.heard_at,
            facts=dict(said.get("facts", {})),
        )


def launch(order: Order) -> Process:
    """Starts the worker of ``order``, which is yet to be connected. Raises OSError."""
    return Process(order.slot, order.serial, started(order), order.generation, order.journal, order.lock)


def _silent() -> int:
    """A descriptor that reads as the link of a worker that has closed its end."""
    ours, theirs = socket.socketpair()
    theirs.close()
    ours.setblocking(False)
    return ours.detach()


async def adopted(inherited: Inherited, heard: Callable[[Process, Message], None]) -> Process:
    """A worker that was there before this image."""
    process = Process(
        slot=inherited.slot,
        serial=inherited.serial,
        pid=inherited.pid,
        generation=inherited.generation,
        journal=inherited.journal,
        lock=inherited.lock,
        state=_STATES.get(inherited.state, "starting"),
        started_at=inherited.started_at,
        prepared=inherited.state != "starting",
        ready_at=time.monotonic() if inherited.state == "ready" else 0.0,
    )
    sock = socket.socket(fileno=inherited.link)
    await process.connect(sock, heard, inherited.received)
    return process
