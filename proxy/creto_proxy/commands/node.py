"""``creto status`` and ``creto reload``: what the sidecars on a state directory say, and having them read anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from creto_proxy.cli import FAILED, MISUSED, Operator
from creto_proxy.errors import Permanent
from creto_proxy.workers.channel import BadFrame, call
from creto_proxy.workers.rundir import controls

RELOAD_S = 180.0


@click.command()
@click.pass_obj
def status(operator: Operator) -> int:
    """Show the sidecars that run here and their workers. Status 1 when one is not ready or its last reload failed."""
    nodes = [dict(answer["status"]) for answer in _asked(operator.state_dir, "status")]
    if not nodes:
        raise Permanent(f"No creto sidecar runs on {operator.state_dir}.")
    operator.emit([row for node in nodes for row in _rows(node)], nodes)
    if not operator.json:
        for node in nodes:
            for why in node["waiting"]:
                click.echo(f"creto: not ready: {why}", err=True)
            for problem in node["reload"]["problems"]:
                click.echo(f"creto: reload failed: {problem}", err=True)
    return FAILED if any(not node["ready"] or node["reload"]["failed"] for node in nodes) else 0


@click.command()
@click.pass_obj
def reload(operator: Operator) -> int:
    """Have the sidecars that run here take configuration and policies anew, all or nothing.

    Says what is wrong, with status 2, when a sidecar keeps what it has.
    """
    found = False
    problems: list[str] = []
    for control in controls(operator.state_dir):
        try:
            before = call(control, "status")["status"]["reload"]
            answer = call(control, "reload", RELOAD_S)
            problems += answer["problems"] or (_renewed(control, before) if answer["again"] else [])
            found = True
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # a leftover of one that was killed
        except (OSError, BadFrame) as error:
            raise Permanent(f"{control}: {error}") from None
    if not found:
        raise Permanent(f"No creto sidecar runs on {operator.state_dir}.")
    for problem in problems:
        click.echo(f"creto: {problem}", err=True)
    return MISUSED if problems else 0


def _renewed(control: Path, before: Mapping[str, Any]) -> list[str]:
    """The problems of a reload that goes on in another program image, once it has ended."""
    until = time.monotonic() + RELOAD_S
    while time.monotonic() < until:
        after = call(control, "status", RELOAD_S)["status"]["reload"]
        if after["count"] > before["count"]:
            return list(after["problems"])
        time.sleep(0.1)
    return [f"{control}: the new workers are not there after {RELOAD_S:g} s"]


def _asked(state: Path, what: str) -> list[Mapping[str, Any]]:
    answers = []
    for control in controls(state):
        try:
            answers.append(call(control, what))
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # a leftover of one that was killed
        except (OSError, BadFrame) as error:
            raise Permanent(f"{control}: {error}") from None
    return answers


def _rows(node: Mapping[str, Any]) -> list[dict[str, object]]:
    return [
        {
            "run": node["run"],
            "worker": worker["slot"],
            "pid": worker["pid"] or "-",
            "generation": worker["generation"],
            "state": worker["state"],
            "connections": worker["connections"],
            "requests": worker["requests"],
            "journal": "writes" if worker["journal_healthy"] else "cannot be written",
        }
        for worker in node["workers"]
    ]
