"""``creto sidecar``: listens for agents as a forward proxy and on reverse routes until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from creto_proxy.errors import ConfigError

if TYPE_CHECKING:
    from creto_proxy.cli import Operator
    from creto_proxy.config import Config
    from creto_proxy.service import Service
    from creto_proxy.tls import CertificateAuthority


@click.command()
@click.option("--name", metavar="NAME", default="sidecar", show_default=True, help="Name of the agents' identity.")
@click.pass_obj
def sidecar(operator: Operator, name: str) -> int:
    """Listen for agents: [listen] explicit is a forward proxy, [listen] reverse serves the [[reverse]] routes.

    Agents must trust the certificate in STATE/runs/RUN/ca.pem. Ends on SIGTERM or SIGINT after draining.
    """
    import uvloop

    from creto_proxy import tls
    from creto_proxy.commands.run import start_logging
    from creto_proxy.service import assemble, new_run_id

    start_logging()
    config = operator.config
    listeners = open_listeners(config)
    if not listeners:
        raise ConfigError(["listen: neither explicit nor reverse is set, so there is nothing to listen on"])
    run = new_run_id()
    authority = tls.CertificateAuthority()
    service = assemble(config, operator.plugins, run=run, authority=authority)
    service.attach("sidecar", name)
    with published(authority, service.state / "runs" / run) as ca:
        for way, sock in listeners:
            address, port = sock.getsockname()[:2]
            click.echo(f"creto: {way} proxy on {address}:{port}, CA {ca}", err=True)
        uvloop.run(serve(service, listeners))
    return 0


def open_listeners(config: Config) -> list[tuple[str, socket.socket]]:
    """(way, listening socket) for each configured listener. Raises ConfigError naming every one that cannot be had, or
    that others than this machine's programs could reach: who connects to a listener is its agent."""
    problems: list[str] = []
    listeners: list[tuple[str, socket.socket]] = []
    for way in ("explicit", "reverse"):
        endpoint = getattr(config.listen, way)
        if endpoint is None:
            continue
        if not endpoint.address.is_loopback:
            problems.append(f"listen.{way}: {endpoint} can be reached from elsewhere; use a loopback address")
            continue
        family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
        try:
            listeners.append(
                (way, socket.create_server((str(endpoint.address), endpoint.port), family=family, backlog=4096))
            )
        except OSError as error:
            problems.append(f"listen.{way}: cannot listen on {endpoint}: {os.strerror(error.errno or 0).lower()}")
    if problems:
        for _, sock in listeners:
            sock.close()
        raise ConfigError(problems)
    return listeners


@contextmanager
def published(authority: CertificateAuthority, directory: Path) -> Iterator[Path]:
    """The CA certificate as a file for as long as the sidecar runs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield authority.write(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def serve(service: Service, listeners: list[tuple[str, socket.socket]]) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with service.running():
        for way, sock in listeners:
            await service.gateway.listen_proxy(sock, "sidecar", "explicit" if way == "explicit" else "reverse")
        await stop.wait()


