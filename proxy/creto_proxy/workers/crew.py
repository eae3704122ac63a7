"""The worker processes of a node: one per slot that serves, and those that come before and after it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from creto_proxy.config import Config
from creto_proxy.plugins import Found
from creto_proxy.replay import Replay
from creto_proxy.workers.channel import Message
from creto_proxy.workers.handover import Inherited
from creto_proxy.workers.listeners import Listener
from creto_proxy.workers.order import Order
from creto_proxy.workers.process import Process, adopted, launch

log = logging.getLogger("creto.control")

# A generation that is not prepared by then never will be.
PREPARE_S = 60.0
# Beyond its deadline: plugins stop, the journal is closed.
END_S = 20.0
ANSWER_S = 10.0
# A worker that served this long did not fail at starting.
SETTLED_S = 1.0
BACK_OFF_S = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)


class Crew:
    """Starts workers, puts another in the place of one that ended, and replaces all of them at once.

    found, config, authority, agent: what the workers are given. changed: set whenever one of them has moved on. slots:
    in how many a worker is to serve now.
    """

    def __init__(
        self,
        config: Config,
        found: Sequence[Found],
        *,
        run: str,
        agent: str,
        authority: bytes,
        listeners: Sequence[Listener],
        replay: Replay,
        changed: asyncio.Event,
        generation: int = 0,
        serial: int = 0,
        restarts: int = 0,
    ) -> None:
        self._config = config
        self._found = tuple(found)
        self._run = run
        self._agent = agent
        self._authority = authority
        self._listeners = listeners
        self._replay = replay
        self._changed = changed
        self._slots = config.sidecar.slots  # of those that are started from now on
        self.slots = self._slots
        self.generation = generation
        self.serial = serial
        self.restarts = restarts
        self._all: list[Process] = []
        self._current: dict[int, Process] = {}
        self._failures: dict[int, int] = {}
        self._respawns: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._questions = 0

    def __iter__(self) -> Iterator[Process]:
        return iter(sorted(self._all, key=lambda each: each.serial))

    def change(self, config: Config, found: Sequence[Found]) -> None:
        """What workers are given from now on."""
        self._config = config
        self._found = tuple(found)
        self._slots = self.slots = config.sidecar.slots

    @property
    def current(self) -> dict[int, Process]:
        """Slot -> its worker, whatever its state; a slot whose worker is yet to be started again is missing."""
        return dict(self._current)

    def failing(self, slot: int) -> int:
        """How many times in a row the worker of a slot has ended before it could serve."""
        return self._failures.get(slot, 0)

    # -- starting

    async def begin(self) -> None:
        """The first generation: a worker in every slot, each serving as soon as it can."""
        self.generation += 1
        for slot in range(self.slots):
            await self._occupy(slot)

    async def adopt(self, inherited: Sequence[Inherited], slots: int) -> None:
        """Goes on with the workers of the program image before this one, which were to serve in that many slots."""
        self.slots = slots
        for each in inherited:
            self._replay.follow(each.journal, each.lock)
            process = await adopted(each, self._heard)
            process.watch(self._over)
            self._all.append(process)
            if process.state == "draining":
                self._kill_late(process)
            else:
                self._current[process.slot] = process

    def fill(self) -> None:
        """Starts a worker in every slot that has none."""
        for slot in range(self.slots):
            if slot not in self._current and slot not in self._respawns:
                self._spawn(slot)

    async def renew(self) -> bool:
        """A new generation beside the one that serves, which takes over when all of it is prepared. False when it
        could not be: nothing has changed then."""
        self.generation += 1
        fresh: list[Process] = []
        try:
            for slot in range(self._slots):
                fresh.append(await self._launched(slot))
        except OSError as error:
            log.error("workers cannot be started: %s", error)
        else:
            await self._until(lambda: all(p.prepared for p in fresh) or any(p.ended for p in fresh), PREPARE_S)
        if len(fresh) < self._slots or not all(process.prepared and not process.ended for process in fresh):
            log.error("the new workers did not come up; those that serve stay. What they said is above.")
            for process in fresh:
                process.kill()
            return False
        for process in fresh:
            process.say("serve")
        await self._until(lambda: all(p.ready_at or p.ended for p in fresh), PREPARE_S)
        for timer in self._respawns.values():
            timer.cancel()
        self._respawns.clear()
        self._failures.clear()
        self._current = {process.slot: process for process in fresh}
        self.slots = self._slots
        for process in self._all:
            if process not in fresh and process.state != "draining":
                self._retire(process)
        for process in fresh:
            if process.ended:
                self._replace(process)
        return True

    async def _occupy(self, slot: int) -> None:
        """A worker for a slot that has none; tried again later when it cannot be started."""
        try:
            self._current[slot] = await self._launched(slot)
        except OSError as error:
            log.error("worker %d cannot be started: %s", slot, error)
            self._failures[slot] = self.failing(slot) + 1
            self._respawn(slot)

    async def _launched(self, slot: int) -> Process:
        self.serial += 1
        journal = f"{self._run}.w{self.serial}"
        lock = self._replay.follow(journal)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        sockets = [(each.way, sock) for each in self._listeners for sock in each.of_slot(slot, self._slots)]
        order = Order(
            run=self._run,
            slot=slot,
            serial=self.serial,
            generation=self.generation,
            journal=journal,
            agent=self._agent,
            config=self._config,
            found=self._found,
            authority=self._authority,
            listeners=tuple((way, sock.fileno()) for way, sock in sockets),
            link=theirs.fileno(),
            lock=lock,
        )
        try:
            process = launch(order)
        except OSError:
            ours.close()
            self._replay.ended(journal)
            raise
        finally:
            theirs.close()
        # Known before anything is awaited: whatever happens meanwhile, it is told, reaped and handed over.
        self._all.append(process)
        process.watch(self._over)
        await process.connect(ours, self._heard)
        return process

    # -- what workers say and how they end

    def _heard(self, process: Process, message: Message) -> None:
        process.heard_at = time.monotonic()
        match message["say"]:
            case "prepared":
                process.prepared = True
                if self._current.get(process.slot) is process:
                    process.say("serve")
            case "ready":
                process.ready_at = time.monotonic()
                if process.state == "starting":
                    process.state = "ready"
            case "beat":
                process.reported = message
            case "draining":
                self._leaving(process)
            case what:
                process.answers[what, int(message.get("serial", 0))] = str(message.get("problem", ""))
        self._changed.set()

    def _leaving(self, process: Process) -> None:
        """It drains; when nobody told it to, a successor begins at once and serves beside it."""
        if process.state == "draining" or self._stopping:
            return
        process.state = "draining"
        self._kill_late(process)
        if self._current.get(process.slot) is process:
            del self._current[process.slot]
            self._spawn(process.slot)

    def _over(self, process: Process, status: int) -> None:
        self._all.remove(process)
        self._replay.ended(process.journal)
        draining = process.state == "draining"
        process.state = "dead"
        if not draining and not self._stopping:
            self.restarts += 1
            log.error("worker %d (pid %d) ended: %s", process.slot, process.pid, _how(status))
            if self._current.get(process.slot) is process:
                self._replace(process)
        self._changed.set()

    def _replace(self, process: Process) -> None:
        slot = process.slot
        self._current.pop(slot, None)
        lasted = process.ready_at and time.monotonic() - process.ready_at > SETTLED_S
        self._failures[slot] = 0 if lasted else self.failing(slot) + 1
        self._respawn(slot)

    def _respawn(self, slot: int) -> None:
        # The first failure may have been bad luck.
        failures = max(0, self.failing(slot) - 1)
        delay = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
        if failures >= 2:
            log.error(
                "worker %d keeps ending before it can serve; next start in %g s. What it said is above; "
                "`creto sidecar --check` tries the configuration.",
                slot,
                delay,
            )
        if delay:
            self._respawns[slot] = asyncio.get_running_loop().call_later(delay, self._spawn, slot)
        else:
            self._spawn(slot)

    def _spawn(self, slot: int) -> None:
        self._respawns.pop(slot, None)
        if self._stopping:
            return
        task = asyncio.get_running_loop().create_task(self._occupy(slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- ending

    def _retire(self, process: Process) -> None:
        """Others accept in its place."""
        grace_s = self._config.limits.drain_s
        process.state = "draining"
        process.say("drain", grace_s=grace_s, replaced=True)
        self._kill_late(process)

    def _kill_late(self, process: Process) -> None:
        """Sees to it that a draining worker ends."""
        asyncio.get_running_loop().call_later(self._config.limits.drain_s + END_S, process.kill)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drains all, within the configured time; at once when ``hurry`` is set meanwhile."""
        await self.freeze()
        grace_s = self._config.limits.drain_s
        self._drain(grace_s)
        await self._until(lambda: not self._all or hurry.is_set(), grace_s + END_S)
        if hurry.is_set():
            self._drain(0.0)
            await self._until(lambda: not self._all, 2.0)
        for process in self._all:
            log.error("worker %d (pid %d) did not end in time and is killed", process.slot, process.pid)
            process.kill()
        await self._until(lambda: not self._all, END_S)

    async def freeze(self) -> None:
        """From now on nobody is started in place of one that ends; who was just being started is there."""
        self._stopping = True
        for timer in self._respawns.values():
            timer.cancel()
        await asyncio.gather(*self._tasks)

    def _drain(self, grace_s: float) -> None:
        for process in self._all:
            process.state = "draining"
            process.say("drain", grace_s=grace_s, replaced=False)

    # -- asking all of them

    async def ask(self, what: str) -> list[str]:
        """Asks every worker for ``what``; the problems of those that had one, or did not answer."""
        self._questions += 1
        key = what, self._questions
        asked = [process for process in self._all if process.prepared]
        for process in asked:
            process.say(what, serial=self._questions)
        await self._until(lambda: all(key in p.answers or p.ended for p in asked), ANSWER_S)
        silent = "did not answer"
        return [
            f"worker {process.slot}: {problem}"
            for process in asked
            if not process.ended and (problem := process.answers.pop(key, silent))
        ]

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Returns when ``holds``, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass


def _how(status: int) -> str:
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"
