"""A worker: the whole path of a request, in a process that may be killed at any moment.

It prepares, says so, and accepts when it is told to; it drains when it is told to, when it gets SIGTERM, and when its
controller is gone. Of what happens once per node (ledger, audit log, sweeps) it does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import cast

import click

from creto_platform.authz import EmbeddedAuthz, PolicyError
from creto_proxy import tls
from creto_proxy.errors import ConfigError
from creto_proxy.service import Service, assemble
from creto_proxy.workers.channel import Channel, Message
from creto_proxy.workers.order import HELD, Order, received

log = logging.getLogger("creto.worker")

BEAT_S = 1.0
LINK = "sidecar"


class Worker:
    """One worker process, from its order to its end."""

    def __init__(self, order: Order, service: Service) -> None:
        self._order = order
        self._service = service
        self._channel = Channel(self._heard, self._lost)
        self._serve = asyncio.Event()
        self._ended = False
        # (seconds to drain, whether others accept from the same sockets meanwhile)
        self._drains: asyncio.Queue[tuple[float, bool]] = asyncio.Queue()

    async def run(self) -> None:
        """Serves until it is told to drain, and until that is done."""
        loop = asyncio.get_running_loop()
        for number in HELD:
            loop.add_signal_handler(number, self._signalled, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        link = socket.socket(fileno=self._order.link)
        await loop.create_unix_connection(lambda: self._channel, sock=link)
        async with self._service.running():
            beats = loop.create_task(self._beat())
            try:
                self._channel.say("prepared")
                drain = await self._served()
                self._channel.say("draining")
                await self._drain(*drain)
            finally:
                beats.cancel()
        self._ended = True
        self._channel.close()

    async def _served(self) -> tuple[float, bool]:
        """Accepts when told to, until told to drain; how."""
        drain = asyncio.ensure_future(self._drains.get())
        serve = asyncio.ensure_future(self._serve.wait())
        await asyncio.wait((drain, serve), return_when=asyncio.FIRST_COMPLETED)
        serve.cancel()
        if not drain.done():
            for way, fd in self._order.listeners:
                sock = socket.socket(fileno=fd)
                sock.setblocking(False)
                await self._service.gateway.listen_proxy(sock, LINK, "explicit" if way == "explicit" else "reverse")
            self._channel.say("ready")
        return await drain

    async def _drain(self, grace_s: float, replaced: bool) -> None:
        """Ends what is under way; told so again while it waits, it hurries."""
        again = asyncio.ensure_future(self._drains.get())
        while True:
            stop = asyncio.ensure_future(self._service.gateway.stop(grace_s, replaced=replaced))
            await asyncio.wait((stop, again), return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                again.cancel()
                stop.result()
                return
            stop.cancel()
            await asyncio.gather(stop, return_exceptions=True)
            grace_s, replaced = again.result()
            again = asyncio.ensure_future(self._drains.get())

    async def _beat(self) -> None:
        service = self._service
        while True:
            self._channel.say(
                "beat",
                connections=service.gateway.connections,
                requests=service.recorder.records,
                journal_healthy=service.recorder.healthy or service.recorder.probe(),
                facts=dict(service.reported()),
            )
            await asyncio.sleep(BEAT_S)

    def _heard(self, channel: Channel, message: Message) -> None:
        match message["say"]:
            case "serve":
                self._serve.set()
            case "drain":
                self._drains.put_nowait((float(message["grace_s"]), bool(message["replaced"])))
            case "policies":
                channel.say("policies", serial=message.get("serial", 0), problem=self._reload_policies())

    def _reload_policies(self) -> str:
        """Empty when done, else why everything is as it was."""
        try:
            cast(EmbeddedAuthz, self._service.platform.authz).reload()
        except PolicyError as error:
            return "; ".join(str(problem) for problem in error.problems)
        return ""

    def _lost(self, channel: Channel) -> None:
        if self._ended:
            return
        log.error("the controller is gone; worker %d drains and ends", self._order.slot)
        self._drains.put_nowait((self._service.config.limits.drain_s, False))

    def _signalled(self, number: int) -> None:
        """SIGTERM to this process alone: its controller puts another in its place. The rest is the controller's."""
        if number == signal.SIGTERM:
            self._drains.put_nowait((self._service.config.limits.drain_s, True))


def main(arguments: Sequence[str]) -> int:
    """The body of ``python -m creto_proxy.workers DESCRIPTOR``: exit status 0 once drained, 2 when it cannot start."""
    import uvloop

    if not arguments or not arguments[0].isdecimal() or not os.path.exists(f"/proc/self/fd/{arguments[0]}"):
        click.echo("creto: workers are started by creto sidecar, not by hand", err=True)
        return 2
    order = received(int(arguments[0]))
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"creto[{order.slot}]: %(message)s")
    try:
        authority = tls.CertificateAuthority(exported=order.authority)
        service = assemble(
            order.config, order.found, run=order.run, authority=authority, journal=order.journal, slot=order.slot
        )
        service.attach(LINK, order.agent)
        uvloop.run(Worker(order, service).run())
    except ConfigError as error:
        for problem in error.problems:
            log.error("%s", problem)
        return 2
    return 0
