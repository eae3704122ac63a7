"""``creto run -- CMD``: an unmodified program as a governed agent, from its first packet to the report."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from creto_proxy.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from creto_proxy.cli import Operator
    from creto_proxy.jail import Jail
    from creto_proxy.service import Service
    from creto_proxy.settings import Run
    from creto_proxy.tls import CertificateAuthority

log = logging.getLogger("creto.run")

# Where the agent finds the certificates it must trust; below /run, which is empty inside its jail otherwise.
TRUST_INSIDE = Path("/run/creto")
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGWINCH)
# A jailed agent has a process group of its own, so what the terminal sends to ours has to be passed on.
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", metavar="NAME", help="Name of the agent. Default: the name of the command.")
@click.option("--policy", type=click.Path(path_type=Path), metavar="DIR", help="Cedar policies to use.")
@click.option("--allow", multiple=True, metavar="HOST[:PORT]", help="One more destination; may be given repeatedly.")
@click.option(
    "--enforce",
    type=click.Choice(["namespace", "proxy-env"]),
    help="namespace (default): no way around creto. proxy-env: proxy variables only, which the agent can ignore.",
)
@click.option("--report", type=click.Choice(["table", "json", "none"]), help="Report at the end. Default: table.")
@click.option("--report-file", type=click.Path(path_type=Path), metavar="F", help="Report into F, not standard error.")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
@click.pass_obj
def run(
    operator: Operator,
    name: str | None,
    policy: Path | None,
    allow: tuple[str, ...],
    enforce: str | None,
    report: str | None,
    report_file: Path | None,
    argv: tuple[str, ...],
) -> int:
    """Run CMD as a governed agent; the exit status is CMD's.

    Everything CMD sends passes through creto: only allowed destinations are reachable, each request is judged by
    policy and budget, what needs a person waits for one (creto approvals), and a report says what happened.

    \b
    creto run -- python my_agent.py
    creto run --allow api.example.com -- curl https://api.example.com/
    """
    if report is None and operator.json:
        report = "json"
    for key, value in (("name", name), ("enforce", enforce), ("report", report), ("report_file", report_file)):
        if value is not None:
            operator.override("run", key, str(value))
    if policy is not None:
        operator.override("policy", "dir", str(policy))
    if allow:
        operator.override("egress", "allow", [*_allowed(operator), *allow])
    return govern(operator, list(argv))


def _allowed(operator: Operator) -> list[str]:
    """What the configuration allows already, as far as it can be read before it is validated."""
    from creto_proxy import layers

    egress = layers.read(operator.config_file, environ=operator.environ).values.get("egress")
    listed = egress.get("allow") if isinstance(egress, dict) else None
    return [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []


def govern(operator: Operator, argv: Sequence[str]) -> int:
    """Runs ``argv`` to its end and reports. Raises ConfigError and Unsupported before anything is started."""
    from creto_proxy import tls
    from creto_proxy.service import assemble, new_run_id

    start_logging()
    config = operator.config
    agent = config.run.name or agent_name(argv[0])
    service = assemble(config, operator.plugins, run=new_run_id(), authority=(authority := tls.CertificateAuthority()))
    service.attach("run", agent)
    target = open_report(config.run)
    with trust_files(authority) as trust:
        if config.run.enforce == "proxy-env":
            status = _run_loop(ProxyEnv(service, argv, trust))
        else:
            status = _run_loop(Namespace(service, argv, trust))
    write_report(service, status, target)
    return status


def start_logging() -> None:
    """What the operator must know goes to standard error, one line each, beside what the agent prints."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="creto: %(message)s")


def agent_name(command: str) -> str:
    """A name that may stand in a SPIFFE id, from the command that is run."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(command).stem.lower()).strip("-._")
    return stem[:63] or "agent"


@contextmanager
def trust_files(authority: CertificateAuthority) -> Iterator[Path]:
    """A directory with ``ca.pem`` and ``ca-bundle.pem`` (system roots and ours) that any user may read."""
    from creto_proxy import trust

    directory = Path(tempfile.mkdtemp(prefix="creto-trust-"))
    try:
        directory.chmod(0o755)
        authority.write(directory)
        trust.write_bundle(authority.pem, directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def agent_environment(directory: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The agent's environment: ours without creto's own settings, and each variable that names certificates."""
    from creto_proxy import trust

    kept = {key: value for key, value in environ.items() if not key.startswith("CRETO_")}
    return {**kept, **trust.trust_environment(directory / "ca-bundle.pem", directory / "ca.pem")}


class Namespace:
    """The agent in its jail; creto serves the sockets inside it."""

    def __init__(self, service: Service, argv: Sequence[str], trust: Path) -> None:
        from creto_proxy.jail import JailSpec, launch

        redirects = service.plugins.stages.redirects
        if not redirects:
            raise Unsupported(
                "No plugin installs the redirect (egress does; is it disabled?), so nothing would be enforced. "
                "Enable it, or say --enforce=proxy-env."
            )
        self._service = service
        inside = {trust / name: TRUST_INSIDE / name for name in ("ca.pem", "ca-bundle.pem")}
        spec = JailSpec(
            argv=tuple(argv),
            env=agent_environment(TRUST_INSIDE, os.environ),
            cwd=Path.cwd(),
            hidden=(service.state,),
            readable=inside,
            ca_bundle=trust / "ca-bundle.pem",
        )
        self._jail: Jail = launch(spec, redirects[0])

    async def __call__(self) -> int:
        from creto_proxy.dns import DnsServer

        service, jail = self._service, self._jail
        pipeline = service.pipeline
        loop = asyncio.get_running_loop()
        try:
            async with service.running():
                dns = DnsServer(
                    link="run",
                    agent=lambda: service.links.agent("run"),
                    decide=pipeline.egress.name_decision,
                    address_allowed=pipeline.egress.address_decision,
                    resolver=service.resolver,
                    pins=service.config.network.resolve,
                    bindings=service.bindings,
                    refused=service.gateway.name_refused,
                )
                for sock in jail.listeners.tcp:
                    service.gateway.listen_transparent(sock, "run")
                await dns.serve(jail.listeners.dns_udp, jail.listeners.dns_tcp)
                for number in (*FORWARDED, *FROM_TERMINAL):
                    loop.add_signal_handler(number, jail.signal, number)
                jail.start()
                status = await jail.wait()
                dns.close()
            return status
        finally:
            jail.close()


class ProxyEnv:
    """The agent with proxy variables; it may ignore them, and is told so plainly."""

    def __init__(self, service: Service, argv: Sequence[str], trust: Path) -> None:
        self._service = service
        self._argv = argv
        self._trust = trust

    async def __call__(self) -> int:
        click.echo(
            "creto: --enforce=proxy-env: the agent can bypass creto by ignoring the proxy variables; "
            "nothing stops it. Use this only where namespaces are not available.",
            err=True,
        )
        service = self._service
        secret = secrets.token_urlsafe(24)
        service.attach("run", service.links.agent("run").name, secret=secret)
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        proxy = f"http://agent:{secret}@127.0.0.1:{sock.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        environment = {
            **agent_environment(self._trust, os.environ),
            **dict.fromkeys(names, proxy),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1"),
            "NODE_USE_ENV_PROXY": "1",
        }
        async with service.running():
            await service.gateway.listen_proxy(sock, "run", "explicit")
            return await self._child(environment)

    async def _child(self, environment: Mapping[str, str]) -> int:
        try:
            child = await asyncio.create_subprocess_exec(*self._argv, env=environment)
        except FileNotFoundError:
            click.echo(f"creto: {self._argv[0]}: command not found", err=True)
            return 127
        except PermissionError:
            click.echo(f"creto: {self._argv[0]}: permission denied", err=True)
            return 126
        loop = asyncio.get_running_loop()
        for number in FORWARDED:
            loop.add_signal_handler(number, child.send_signal, number)
        status = await child.wait()
        return status if status >= 0 else 128 - status


def _run_loop(session: Namespace | ProxyEnv) -> int:
    import uvloop

    # Ctrl-C is for the agent; creto stays to settle and to report what it did.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return uvloop.run(session())
    finally:
        signal.signal(signal.SIGINT, previous)


def open_report(run: Run) -> TextIO:
    """Where the report goes. Opened before the agent runs: afterwards the name could be a link to what is hidden from
    the agent, and creto would write there for it. Raises ConfigError."""
    try:
        return open(run.report_file, "w") if run.report_file else os.fdopen(os.dup(2), "w")
    except OSError as error:
        raise ConfigError([f"run.report_file: {run.report_file}: cannot be written: {error.strerror}"]) from None


def write_report(service: Service, status: int, target: TextIO) -> None:
    """The report in the chosen form. One that cannot be written is said, and does not change the exit status."""
    import json

    from rich.console import Console

    from creto_proxy import report
    from creto_proxy.audit import outcomes

    run = service.config.run
    if run.report == "none":
        return
    document = report.build(
        outcomes(service.state / "journal", service.run),
        run=service.run,
        exit_status=status,
        audit=report.audit_state(service.state / "audit" / "log", service.platform.audit.vkeys),
    )
    try:
        with target:
            if run.report == "json":
                json.dump(document.document(), target, indent=2)
                target.write("\n")
            else:
                width = None if target.isatty() else 160
                report.render(document, Console(file=target, width=width, highlight=False, emoji=False, markup=False))
    except OSError as error:
        click.echo(f"creto: the report cannot be written: {error.strerror}", err=True)


