"""``creto sidecar``: listens for agents as a forward proxy and on reverse routes until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
from typing import TYPE_CHECKING

import click

from creto_proxy.errors import ConfigError

if TYPE_CHECKING:
    from creto_proxy.cli import Operator
    from creto_proxy.config import Config
    from creto_proxy.workers.handover import Handover

log = logging.getLogger("creto.control")


@click.command()
@click.option("--name", metavar="NAME", default="sidecar", show_default=True, help="Name of the agents' identity.")
@click.option("--workers", metavar="N", help='Processes that carry requests, or "auto": one per processor.')
@click.option("--check", is_flag=True, help="Try configuration, policies and plugins, and end.")
@click.pass_obj
def sidecar(operator: Operator, name: str, workers: str | None, check: bool) -> int:
    """Listen for agents: [listen] explicit is a forward proxy, [listen] reverse serves the [[reverse]] routes.

    Agents must trust the certificate in STATE/runs/RUN/ca.pem. SIGHUP reloads configuration and policies, SIGUSR2
    restarts in place; both without refusing a connection. SIGTERM and SIGINT drain and end.
    """
    import uvloop

    from creto_proxy.commands.run import start_logging
    from creto_proxy.workers import handover

    start_logging()
    known = handover.known_form(os.environ)
    inherited = handover.accept(os.environ)
    if workers is not None:
        operator.override("sidecar", "workers", workers if workers == "auto" else _number(workers))
    if check:
        return _check(operator.config, operator, name, known=known)
    while True:
        again = uvloop.run(_serve(operator, name, inherited))
        if again is None:
            return 0
        try:
            handover.give(again)
        except OSError as error:
            log.error("the program cannot be started again (%s); it goes on as it is", error)
            inherited = again


async def _serve(operator: Operator, name: str, inherited: Handover | None) -> Handover | None:
    from creto_proxy.workers.controller import Controller

    try:
        config = _usable(operator.config)
        controller = Controller(config, operator.plugins, agent=name, reread=operator.reread, inherited=inherited)
        await controller.begin()
    except ConfigError as error:
        # It could be used a moment ago, when it was rehearsed: what was in force until now still can.
        if inherited is None:
            raise
        config, found = pickle.loads(inherited.previous)
        controller = Controller(
            config, found, agent=name, reread=operator.reread, inherited=inherited, failed=error.problems
        )
        await controller.begin()
    if inherited is None:
        for way, address in controller.addresses:
            click.echo(f"creto: {way} proxy on {address}, CA {controller.certificate}", err=True)
    return await controller.run()


def _check(config: Config, operator: Operator, name: str, *, known: bool) -> int:
    from creto_proxy.service import new_run_id
    from creto_proxy.workers.backstage import rehearse

    if not known:
        raise ConfigError(["the creto that runs cannot hand over to this version: stop it and start this one"])
    asyncio.run(rehearse(_usable(config), operator.plugins, run=new_run_id(), agent=name))
    click.echo("creto: configuration, policies and plugins can be used", err=True)
    return 0


def _usable(config: Config) -> Config:
    if config.listen.explicit is None and config.listen.reverse is None:
        raise ConfigError(["listen: neither explicit nor reverse is set, so there is nothing to listen on"])
    return config


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
