"""``creto plugins``: what is installed, from where, and which hooks it implements."""

from __future__ import annotations

import click

from creto_proxy import layers
from creto_proxy.cli import Operator
from creto_proxy.errors import ConfigError


@click.command()
@click.pass_obj
def plugins(operator: Operator) -> None:
    """List the installed plugins: ours and everybody else's, in the same way."""
    from creto_proxy.plugins import discover

    disabled = layers.read(operator.config_file, environ=operator.environ).disabled
    discovery = discover(disabled)
    document = [
        {
            "name": each.name,
            "version": each.version,
            "distribution": each.distribution,
            "hooks": [hook.removeprefix("creto_") for hook in each.hooks],
            "enabled": True,
        }
        for each in discovery.found
    ]
    document += [
        {"name": name, "version": "", "distribution": "", "hooks": [], "enabled": False}
        for name in sorted(disabled & discovery.names)
    ]
    rows = [
        {
            "name": each["name"],
            "version": each["version"],
            "distribution": each["distribution"],
            "hooks": ", ".join(str(hook) for hook in each["hooks"]) if each["enabled"] else "(disabled)",  # type: ignore[attr-defined]
        }
        for each in document
    ]
    operator.emit(rows, document)
    if discovery.problems:
        raise ConfigError(list(discovery.problems))
