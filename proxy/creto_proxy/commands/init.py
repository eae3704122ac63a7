"""``creto init``: a configuration and policies to start from, never over what is there."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import click

from creto_platform.authz import bundled_policies
from creto_proxy.cli import Operator
from creto_proxy.errors import ConfigError, CretoError

CONFIG = """\
# What this agent may do. `creto config default` prints every setting with its meaning.
#
#   creto config check --config creto.toml       whether this file is right
#   creto run --config creto.toml -- COMMAND     an agent under it
#
# Creto reads this file only where it is named: what lies about in a directory may be an agent's work.

[common]
org = "local"
env = "dev"

[run]
name = "agent"

[policy]
dir = "policies"
"""


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default=".")
@click.pass_obj
def init(operator: Operator, directory: Path) -> None:
    """Write creto.toml and policies/ into DIRECTORY. Refuses when one of them is already there."""
    targets = [directory / "creto.toml", directory / "policies"]
    present = [f"{path}: already exists; creto init overwrites nothing" for path in targets if os.path.lexists(path)]
    if present:
        raise ConfigError(present)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Without the schema: a directory that has none uses the one of the installed creto, which grows with it.
        shutil.copytree(bundled_policies() / "default", targets[1])
        targets[0].write_text(CONFIG)
    except OSError as error:
        raise CretoError(f"{error.filename or directory}: cannot be written: {error.strerror}") from error
    written = [str(target) for target in targets]
    operator.emit([{"written": path} for path in written], {"written": written})
    if not operator.json:
        click.echo(f"\nIs it right?  creto config check --config {shlex.quote(written[0])}")
