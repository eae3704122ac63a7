"""A sidecar with workers, an upstream, and agents that count every answer: all real, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from creto_platform import audit_directories
from creto_platform.audit import EmbeddedAudit
from creto_platform.crypto import EmbeddedCrypto
from creto_proxy.workers.channel import BadFrame, call
from creto_proxy.workers.rundir import controls

PERMIT = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
"""
FORBID = """
@id("no-more")
forbid (principal, action, resource) when { context.path like "/forbidden*" };
"""


class Upstream(asyncio.Protocol):
    """Answers every request with a short body, on a connection that is kept."""

    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            _, _, self._received = self._received.partition(b"\r\n\r\n")
            self._transport.write(self.answer)


@dataclass
class Node:
    """A running ``creto sidecar`` and what belongs to it."""

    directory: Path
    config: Path
    policies: Path
    state: Path
    port: int
    process: asyncio.subprocess.Process
    said: list[str] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        """What it says of itself; empty while it cannot be asked."""
        for control in controls(self.state):
            with contextlib.suppress(OSError, BadFrame):
                return dict(call(control, "status")["status"])
        return {}

    async def ask(self, what: str) -> dict[str, Any]:
        (control,) = controls(self.state)
        return dict(await asyncio.to_thread(call, control, what, 100.0))

    async def until(self, holds: Callable[[dict[str, Any]], object], what: str, timeout_s: float = 90) -> dict[str, Any]:
        """Its status once that ``holds``."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = await asyncio.to_thread(self.status)
            if status and holds(status):
                return status
            assert self.process.returncode is None, self.said
            assert time.monotonic() < deadline, (what, status, self.said)
            await asyncio.sleep(0.05)

    async def ready(self) -> dict[str, Any]:
        return await self.until(lambda status: status["ready"], "it is not ready")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``creto ARGUMENTS`` with the same configuration."""
        command = [sys.executable, "-m", "creto_proxy", "--state-dir", str(self.state), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def end(self) -> int:
        """Its exit status after SIGTERM."""
        if self.process.returncode is None:
            self.signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(line.decode().rstrip())

    def recorded(self) -> Counter[str]:
        """Path -> times recorded, once ledger and audit log are found to hold the same outcomes, each once."""
        audit = EmbeddedAudit(*audit_directories(self.state), EmbeddedCrypto(), organisation="local")
        try:
            records = [entry.record for entry in audit.tail(audit.size)]
        finally:
            audit.close()
        audited = [record["id"].hex() for record in records]
        with contextlib.closing(sqlite3.connect(self.state / "metering.db")) as ledger:
            charged = [row[0].hex() for row in ledger.execute("select id from request")]
        assert len(set(audited)) == len(audited)
        assert sorted(audited) == sorted(charged)
        return Counter(urlsplit(record["res"]).path for record in records)


class Load:
    """Agents that ask without pause until told to stop. answered: path -> status of every answer read to its end.
    broken: what went wrong on a connection that had not been announced to close."""

    def __init__(
        self,
        port: int,
        *,
        kept: int,
        fresh: int,
        prefix: str = "/up",
        limit: int | None = None,
        pause_s: float = 0.02,
    ) -> None:
        """kept: agents that keep their connection; fresh: agents with a new one per request. pause_s: between the
        requests of an agent, so that the machine has time for more than asking."""
        self._pause_s = pause_s
        self._port = port
        self._prefix = prefix
        self._limit = limit
        self._begun = 0
        self._stopped = False
        self.answered: dict[str, int] = {}
        self.broken: list[str] = []
        self._tasks = [asyncio.create_task(self._agent(n, kept=n < kept)) for n in range(kept + fresh)]

    async def answers(self, more: int, timeout_s: float = 60) -> None:
        """Returns when so many more have been answered."""
        goal, deadline = len(self.answered) + more, time.monotonic() + timeout_s
        while len(self.answered) < goal:
            assert time.monotonic() < deadline, f"{goal - len(self.answered)} answers are missing: {self.broken[:3]}"
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopped = True
        await self.done()

    def stop_soon(self) -> None:
        """Agents end after the request they are at."""
        self._stopped = True

    async def done(self) -> None:
        async with asyncio.timeout(120):
            await asyncio.gather(*self._tasks)

    async def _agent(self, number: int, *, kept: bool) -> None:
        turn, connection = 0, None
        while not self._stopped and (self._limit is None or self._begun < self._limit):
            self._begun += 1
            path = f"{self._prefix}/{number}/{turn}"
            turn += 1
            try:
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer = connection
                close = "" if kept else "Connection: close\r\n"
                writer.write(f"GET {path} HTTP/1.1\r\nHost: creto\r\n{close}\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(length_of(head))
            except (OSError, EOFError, asyncio.LimitOverrunError) as error:
                self.broken.append(f"{path}: {error!r}")
                if connection is not None:
                    connection[1].close()
                connection = None
                await asyncio.sleep(0.01)
                continue
            self.answered[path] = int(head[9:12])
            if b"connection: close" in head.lower():
                writer.close()
                connection = None
            await asyncio.sleep(self._pause_s)
        if connection is not None:
            connection[1].close()


def length_of(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    assert found is not None, head
    return int(found[1])


@contextlib.asynccontextmanager
async def upstream(*, silent: bool = False) -> AsyncIterator[int]:
    """The port of an upstream. silent: it answers nothing."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol if silent else Upstream, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def node(
    directory: Path,
    upstream_port: int,
    port: int,
    more: str = "",
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Node]:
    """A node whose reverse route /up leads to the upstream, with every request budgeted and recorded."""
    policies, config, state = directory / "policies", directory / "creto.toml", directory / "state"
    policies.mkdir(exist_ok=True)
    (policies / "test.cedar").write_text(PERMIT)
    config.write_text(
        f"""
reverse = [{{ name = "up", upstream = "http://up.allowed.test" }}]
[common]
org = "acme"
state_dir = "{state}"
[egress]
allow = ["up.allowed.test:80"]
[egress.resolve]
"up.allowed.test" = "127.0.0.1:{upstream_port}"
[listen]
explicit = ""
reverse = "127.0.0.1:{port}"
[policy]
dir = "{policies}"
[protect]
shed_lag_ms = 0
[oversight.profiles.payments]
approvers = ["{getpass.getuser()}"]
quorum = 1
{more}
"""
    )
    process = await started(config, *options, environment=environment)
    running = Node(directory, config, policies, state, port, process)
    reading = asyncio.create_task(running.read())
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading, 60)  # its workers hold the other end until they have drained
        sys.stderr.write("\n".join(running.said))


async def started(
    config: Path, *options: str, environment: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "creto_proxy", "--config", str(config), "sidecar", *options,
        env={**os.environ, **(environment or {})}, stderr=asyncio.subprocess.PIPE, cwd=config.parent,
    )  # fmt: skip
