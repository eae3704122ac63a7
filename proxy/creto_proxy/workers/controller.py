"""The controller of a node: owns what must outlive its workers, and does what must happen once.

Signals: SIGTERM and SIGINT drain and end, a second one at once. SIGHUP takes a new configuration and new policies, all
or nothing. SIGUSR2 goes on as a new program image in the same process, with new code where there is some.

When only policies have changed, the workers take them in place. For everything else there is one way, the same for
a reload and for a restart: rehearse in a process apart, exec with the listening sockets and the workers handed over,
start a new generation of workers on the same sockets, and drain the old one once all of the new one is prepared.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from creto_proxy import __version__, tls
from creto_proxy.config import Config
from creto_proxy.errors import ConfigError
from creto_proxy.observe.node import Seeing
from creto_proxy.plugins import Found
from creto_proxy.policies import load_authz
from creto_proxy.service import new_run_id, private_directory
from creto_proxy.workers import channel, handover, listeners
from creto_proxy.workers.backstage import arrange
from creto_proxy.workers.channel import Channel, Message
from creto_proxy.workers.crew import Crew
from creto_proxy.workers.handover import FORM, Handover
from creto_proxy.workers.notify import notify, reloading
from creto_proxy.workers.order import HELD
from creto_proxy.workers.reload import Footing
from creto_proxy.workers.rundir import RunDirectory, remove_leftovers
from creto_proxy.workers.status import NodeStatus, ReloadStatus, WorkerStatus

log = logging.getLogger("creto.control")

# A worker reports every second; one that has said nothing for this long does not serve.
SILENT_S = 15.0
CHECK_S = 90.0

Command: TypeAlias = Literal["reload", "restart"]
Reread: TypeAlias = Callable[[], tuple[Config, tuple[Found, ...]]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A command and who waits for its answer, if anybody does."""

    what: Command
    by: Channel | None = None


class Controller:
    """One node. ``begin`` it, then ``run`` serves until it is told to stop, or until another program image is to go on.

    config, found: as validated. agent: name of the identity of those who connect. reread: the configuration as the
    files say it now; raises ConfigError. inherited: what the program image before this one has handed over. failed:
    why this is not the configuration that it was to go on with.

    Raises ConfigError when configuration, policies, state directory, listeners or a plugin cannot be used.
    """

    def __init__(
        self,
        config: Config,
        found: Sequence[Found],
        *,
        agent: str,
        reread: Reread,
        inherited: Handover | None = None,
        failed: Sequence[str] = (),
    ) -> None:
        self._footing: Footing | None = Footing.of(config, found)
        self._reread = reread
        self._inherited = inherited
        self._failed = tuple(failed)
        self._agent = agent
        self._found = tuple(found)
        self.config = config
        self.started_at = inherited.started_at if inherited else time.time()
        self.id = inherited.run if inherited else new_run_id()
        self._listeners = listeners.open_listeners(config, inherited.listeners if inherited else None)
        try:
            self._arrange()
        except ConfigError:
            listeners.close(self._listeners)
            raise
        self._reload = ReloadStatus(count=inherited.reloads if inherited else 0)
        self._commands: asyncio.Queue[_Asked] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._changed = asyncio.Event()
        self._told = False

    def _arrange(self) -> None:
        inherited = self._inherited
        self.state = private_directory(self.config.state_dir)
        self._directory = RunDirectory(self.state, self.id, inherited.directory_lock if inherited else None)
        self._authority = tls.CertificateAuthority(exported=inherited.authority if inherited else None)
        self._backstage = arrange(self.config, self._found, run=self.id, agent=self._agent)
        self._admin = self._admin_socket()
        sock = self._admin.dup() if self._admin is not None else None
        self._seeing = Seeing(self.config, self.id, "controller", inherited=inherited is not None, sock=sock)
        lock = inherited.run_lock if inherited else None
        self._replay = self._backstage.replay(self.id, lock, self._seeing.consumers)
        self.certificate = self._authority.write(self._directory.path)

    def _admin_socket(self) -> socket.socket | None:
        endpoint = self.config.admin.listen
        if endpoint is None:
            return None
        from creto_proxy.observe.admin import admin_socket

        inherited = self._inherited.sockets.get(f"admin {endpoint}") if self._inherited else None
        return admin_socket(endpoint) if inherited is None else socket.socket(fileno=os.dup(inherited))

    async def begin(self) -> None:
        """Starts everything but workers. Raises ConfigError, and then nothing of what was inherited is used up."""
        inherited = self._inherited
        try:
            await self._backstage.start()
            self._in_force = await asyncio.to_thread(self._directory.keep_policies, self.config)
        except ConfigError:
            await self._seeing.stop(keep=True)
            await self._backstage.stop()
            raise
        if inherited is not None:
            inherited.close_sockets()
        self._crew = Crew(
            self._in_force,
            self._found,
            run=self.id,
            agent=self._agent,
            authority=self._authority.export(),
            listeners=self._listeners,
            replay=self._replay,
            changed=self._changed,
            generation=inherited.generation if inherited else 0,
            serial=inherited.serial if inherited else 0,
            restarts=inherited.restarts if inherited else 0,
        )

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """(way, address and port) of each listener."""
        return [(each.way, each.address) for each in self._listeners]

    def status(self) -> NodeStatus:
        """The node as it is now; cheap."""
        crew, waiting = self._crew, self._waiting()
        dead = (WorkerStatus.dead(slot, crew.generation) for slot in range(crew.slots) if slot not in crew.current)
        workers = (*(process.status() for process in crew), *dead)
        return NodeStatus(
            run=self.id,
            pid=os.getpid(),
            version=__version__,
            started_at=self.started_at,
            generation=self._crew.generation,
            slots=self._crew.slots,
            workers=workers,
            ready=not waiting,
            waiting=waiting,
            stopping=self._stop.is_set(),
            consumers_healthy=self._replay.healthy,
            restarts=self._crew.restarts,
            policy=self._backstage.authz.policy_epoch,
            reload=self._reload,
        )

    def _waiting(self) -> tuple[str, ...]:
        """Why the node is not ready."""
        reasons = ["creto was told to stop"] if self._stop.is_set() else []
        current = self._crew.current
        for slot in range(self._crew.slots):
            process = current.get(slot)
            if process is None or process.state != "ready":
                failures = self._crew.failing(slot)
                reasons.append(f"worker {slot} " + (f"has failed {failures} times" if failures else "is starting"))
                continue
            status = process.status()
            if status.heard_s > SILENT_S:
                reasons.append(f"worker {slot} has said nothing for {status.heard_s:.0f} s")
            elif not status.journal_healthy:
                reasons.append(f"worker {slot} cannot write its journal")
        return tuple(reasons)

    # -- life

    async def run(self) -> Handover | None:
        """Serves; None when it has ended for good, else what the next program image has to be given."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped)
        loop.add_signal_handler(signal.SIGHUP, self._commands.put_nowait, _Asked("reload"))
        loop.add_signal_handler(signal.SIGUSR2, self._commands.put_nowait, _Asked("restart"))
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        if self._inherited is not None:
            await self._crew.adopt(self._inherited.workers, self._inherited.slots)
        self._replay.start()
        await self._seeing.start(self.status)
        control = self._control()
        # The loop closes the socket it serves; this one stays for the next image.
        server = await loop.create_unix_server(partial(_Operator, self._asked, _forget), sock=control.dup())
        work = loop.create_task(self._work())
        ready = loop.create_task(self._announce())
        stop = loop.create_task(self._stop.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not self._stop.is_set():
                return await self._hand_over(work.result(), control)
            work.cancel()
            notify("STOPPING=1")
            listeners.close(self._listeners)  # so that new connections are refused, not kept waiting for nobody
            await self._crew.stop(self._hurry)
            control.close()
            await self._finish()
            return None
        finally:
            for task in (work, ready, stop):
                task.cancel()
            server.close()

    async def _work(self) -> Command:
        """Starts the workers, then follows commands one after the other, until one needs another program image."""
        inherited = self._inherited
        if inherited is None:
            remove_leftovers(self.state)
            await self._crew.begin()
        else:
            problems = self._failed
            if not problems and not await self._crew.renew():
                problems = ("the new workers did not come up; the old ones serve on",)
                self._fall_back(inherited)
            if problems:
                self._crew.fill()
            self._reloaded(problems)
        while True:
            asked = await self._commands.get()
            reloading()
            found = await self._prepare(asked.what)
            if found is not None:
                self._reloaded(found)
            if asked.by is not None:
                asked.by.say("done", problems=list(found or ()), again=found is None)
            if found is None:
                return asked.what

    def _fall_back(self, inherited: Handover) -> None:
        """Workers that have to be started again are to be like those that serve, not like those that could not."""
        config, found = pickle.loads(inherited.previous)
        self._directory.revert_policies()
        self._crew.change(config, found)
        self._in_force, self._found, self._footing = config, found, None

    async def _announce(self) -> None:
        """Tells the service manager, once, when the node is ready."""
        while not self._told:
            if not self._waiting():
                self._told = True
                notify("READY=1", f"STATUS={self._crew.slots} workers serve")
                return
            await asyncio.sleep(0.05)

    def _stopped(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
            self._changed.set()
        self._stop.set()

    async def _finish(self) -> None:
        if not await asyncio.to_thread(self._replay.stop):
            log.error("ledger or audit log are behind the journal; the next creto on this state directory catches up")
        await self._seeing.stop()
        await self._backstage.stop()
        self._directory.remove()

    # -- reload and restart

    async def _prepare(self, what: Command) -> tuple[str, ...] | None:
        """What is wrong, empty when all is done; None when another program image has to do it."""
        if what == "reload":
            try:
                config, found = await asyncio.to_thread(self._reread)
                authz = await asyncio.to_thread(load_authz, config)
                footing = Footing.of(config, found)
                if footing == self._footing and authz.policy_epoch != self._backstage.authz.policy_epoch:
                    return await self._take_policies(config)
            except ConfigError as error:
                return tuple(error.problems)
        return await self._rehearsed() or None

    async def _take_policies(self, config: Config) -> tuple[str, ...] | None:
        await asyncio.to_thread(self._directory.keep_policies, config)
        await asyncio.to_thread(self._backstage.authz.reload)
        problems = await self._crew.ask("policies")
        for problem in problems:
            log.error("%s: the policies were not taken; all workers are replaced", problem)
        return None if problems else ()

    async def _rehearsed(self) -> tuple[str, ...]:
        """Tries, in a process apart, whether a new image of this program could start; its problems."""
        command = [*sys.orig_argv[1:], "--check"]
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                env={**os.environ, handover.CHECKED: str(FORM)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(CHECK_S):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return (f"creto sidecar --check did not end within {CHECK_S:g} s",)
        except OSError as error:
            return (f"{sys.executable} cannot be started: {error.strerror}",)
        if process.returncode == 0:
            return ()
        lines = [line.removeprefix("creto: ") for line in said.decode(errors="replace").splitlines() if line.strip()]
        return tuple(lines[-50:]) or (f"creto sidecar --check ended with status {process.returncode}",)

    def _reloaded(self, problems: Sequence[str]) -> None:
        for problem in problems:
            log.error("%s", problem)
        if problems:
            log.error("nothing was changed: creto goes on with the configuration and the policies it has")
        else:
            log.warning("reloaded: generation %d, policies %s", self._crew.generation, self.status().policy[:12])
        self._reload = ReloadStatus(self._reload.count + 1, len(problems), tuple(problems), time.time())
        notify("READY=1", f"STATUS={'reload failed' if problems else 'reloaded'}")

    async def _hand_over(self, why: Command, control: socket.socket) -> Handover:
        """Lets go of everything in such a way that the next image can take it up. The workers serve on."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        await self._crew.freeze()
        await asyncio.to_thread(self._replay.stop, keep=True)
        await self._seeing.stop(keep=True)
        await self._backstage.stop()
        return Handover(
            why=why,
            run=self.id,
            started_at=self.started_at,
            slots=self._crew.slots,
            generation=self._crew.generation,
            serial=self._crew.serial,
            restarts=self._crew.restarts,
            reloads=self._reload.count,
            run_lock=self._replay.lock,
            directory_lock=self._directory.lock,
            control=control.detach(),
            authority=self._authority.export(),
            previous=pickle.dumps((self._in_force, self._found)),
            sockets={f"admin {self.config.admin.listen}": self._admin.detach()} if self._admin is not None else {},
            listeners={each.key: [sock.detach() for sock in each.sockets] for each in self._listeners},
            workers=[process.handed_over() for process in self._crew if not process.ended],
        )

    # -- operators

    def _control(self) -> socket.socket:
        if self._inherited is not None:
            return socket.socket(fileno=self._inherited.control)
        try:
            return channel.bind(self._directory.control)
        except OSError as error:
            raise ConfigError([f"{self._directory.control}: cannot listen: {error.strerror}"]) from None

    def _asked(self, operator: Channel, message: Message) -> None:
        match message["say"]:
            case "status":
                operator.say("status", status=self.status().document())
            case "reload":
                self._commands.put_nowait(_Asked("reload", operator))
            case "restart":
                self._commands.put_nowait(_Asked("restart", operator))
            case unknown:
                operator.say("unknown", asked=unknown)


class _Operator(Channel):
    """A connection to the control socket, ended at once when it is another user's."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
            if not channel.same_user(sock):
                self.close()


def _forget(operator: Channel) -> None:
    """An operator who has gone is told nothing more."""
