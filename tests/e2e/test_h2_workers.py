"""HTTP/2 over several workers: one budget, a worker that is killed, a reload; every answer recorded once."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from ..proxy.h2_wire import DATA, END_STREAM, GOAWAY, HEADERS, RST, Wire
from .nodes import node, upstream
from .test_ways import free_port
from .test_workers import serving


class Agent(threading.Thread):
    """Asks over HTTP/2, ``side`` requests side by side, until told to stop or ``limit`` have been answered; a connection
    that is told to go away is finished and replaced. answered: path -> status of every answer read to its end. cut: how
    many connections ended without having been told."""

    def __init__(self, port: int, name: str, *, side: int = 4, limit: int = 1 << 30) -> None:
        super().__init__(daemon=True)
        self._port, self._side, self._limit = port, side, limit
        self._paths = (f"/up/{name}/{number}" for number in itertools.count())
        self.stopped = threading.Event()
        self.answered: dict[str, int] = {}
        self.cut = 0

    def run(self) -> None:
        again: list[str] = []
        while not self._done():
            try:
                with Wire(self._port) as wire:
                    again = self._talk(wire, again)
            except ConnectionError:
                self.cut += 1

    def _done(self) -> bool:
        return self.stopped.is_set() or len(self.answered) >= self._limit

    def _talk(self, wire: Wire, again: list[str]) -> list[str]:
        """One connection to its end; what it was asked and has not looked at. Raises ConnectionError."""
        waiting: dict[int, str] = {}
        statuses: dict[int, int] = {}
        streams = itertools.count(1, 2)
        told, asked = False, len(self.answered)

        def ask() -> None:
            nonlocal asked
            if told or self._done() or asked >= self._limit:
                return
            asked += 1
            path, stream = again.pop() if again else next(self._paths), next(streams)
            waiting[stream] = path
            wire.request(stream, path=path.encode())

        for _ in range(self._side):
            ask()
        for got in wire.frames():
            if got.kind == HEADERS:
                statuses[got.stream] = int(dict(wire.decoder.decode(got.payload, raw=True))[b":status"])
            elif got.kind == GOAWAY and got.code == 0:
                told = True
                last = int.from_bytes(got.payload[:4], "big")
                again += [waiting.pop(stream) for stream in list(waiting) if stream > last]
            elif got.kind in (GOAWAY, RST):
                raise ConnectionError(f"{got.kind}: {got.code}")
            if got.kind in (HEADERS, DATA) and got.flags & END_STREAM:
                self.answered[waiting.pop(got.stream)] = statuses[got.stream]
                self.stopped.wait(0.02)  # the machine has other things to do than asking
                ask()
            if not waiting:
                return again
        raise ConnectionError("cut off")


async def asking(agents: list[Agent], more: int) -> None:
    """Returns when so many more have been answered."""
    goal = sum(len(agent.answered) for agent in agents) + more
    async with asyncio.timeout(60):
        while sum(len(agent.answered) for agent in agents) < goal:
            await asyncio.sleep(0.01)


async def ended(agents: list[Agent]) -> dict[str, int]:
    """Every answer."""
    for agent in agents:
        agent.stopped.set()
        await asyncio.to_thread(agent.join, 60)
        assert not agent.is_alive()
    return {path: status for agent in agents for path, status in agent.answered.items()}


async def test_streams_on_all_workers_share_one_budget_exactly(tmp_path: Path) -> None:
    budget = '[[metering.budgets]]\nlevel = "org"\nmetric = "requests"\nlimit = "400"\nwindow = "total"\n'
    async with upstream() as up, node(tmp_path, up, free_port(), budget, "--workers", "2") as creto:
        await creto.ready()
        agents = [Agent(creto.port, f"a{number}", limit=45) for number in range(10)]
        for agent in agents:
            agent.start()
        await asking(agents, 450)
        answered = await ended(agents)
        status = await creto.until(lambda s: sum(w["requests"] for w in s["workers"]) == 450, "not counted")
        assert await creto.end() == 0
    assert [agent.cut for agent in agents] == [0] * 10
    assert Counter(answered.values()) == {200: 400, 429: 50}
    assert all(worker["requests"] > 0 for worker in status["workers"]), "each carried some"
    assert creto.recorded() == Counter(path.removeprefix("/up") for path in answered)


async def test_a_reload_and_a_killed_worker_lose_no_answer(tmp_path: Path) -> None:
    """A reload replaces the workers and cuts nothing; a kill cuts what that worker had."""
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        await creto.ready()
        agents = [Agent(creto.port, f"a{number}") for number in range(6)]
        for agent in agents:
            agent.start()
        await asking(agents, 80)
        creto.config.write_text(creto.config.read_text() + "\n[limits]\nbody_bytes = 4096\n")
        creto.signal(signal.SIGHUP)
        status = await creto.until(lambda s: s["reload"]["count"] == 1 and len(s["workers"]) == 2, "it did not reload")
        assert status["reload"]["failed"] == 0
        await asking(agents, 80)
        assert [agent.cut for agent in agents] == [0] * 6
        os.kill(serving(status)[0], signal.SIGKILL)
        await asking(agents, 80)
        answered = await ended(agents)
        assert await creto.end() == 0
    assert sum(agent.cut for agent in agents) <= 6 and set(answered.values()) == {200}
    recorded = creto.recorded()
    assert {path: recorded[path.removeprefix("/up")] for path in answered if recorded[path.removeprefix("/up")] != 1} == {}
