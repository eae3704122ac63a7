"""``creto config``: is it right, what is in force, and what could be set."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from creto_proxy.cli import Operator
from creto_proxy.config import section_models

WIDTH = 118

HEAD = """\
# Creto: every setting at its default. Only what differs needs to stand in your own file.
# Read in this order, later ones win: /etc/creto/enablement.toml, --config FILE, environment, command line.
# Environment: CRETO_LIMITS__STAGE_DEADLINE_MS=500. Strings may hold ${VAR} and ${VAR:-default}.
"""
ZONES = """\
# Names for groups of hosts, which policies use as Creto::Zone::"NAME": crm = ["crm.example.com", "*.crm.example.com"].
[zones]
"""
REVERSE = """\
# Routes of the reverse listener, one [[reverse]] table each: name = "openai", upstream = "https://api.openai.com".
reverse = []
"""


@click.group()
def config() -> None:
    """Check and show the configuration."""


@config.command()
@click.pass_obj
def check(operator: Operator) -> None:
    """Validate files, environment and plugins. Every mistake is one line; exit status 2 when there is one."""
    sources = sorted({source for _, _, source in operator.config.effective()} - {"default"})
    operator.emit(
        [{"configuration": "valid", "sources": ", ".join(sources) or "defaults only"}],
        {"valid": True, "sources": sources},
    )


@config.command()
@click.option("--changed", is_flag=True, help="Only what differs from the defaults.")
@click.pass_obj
def show(operator: Operator, changed: bool) -> None:
    """Show every value in force and where it came from. Secrets are masked."""
    settings = [each for each in operator.config.effective() if not changed or each[2] != "default"]
    operator.emit(
        [{"setting": key, "value": toml_value(value), "source": source} for key, value, source in settings],
        {key: {"value": value, "source": source} for key, value, source in settings},
    )


@config.command()
@click.pass_obj
def default(operator: Operator) -> None:
    """Print a file with every setting, of the installed plugins too, at its default and with its meaning."""
    click.echo(render({each.name: each.plugin.Settings for each in operator.plugins}), nl=False)


def render(settings: Mapping[str, type[BaseModel]]) -> str:
    """A configuration file (TOML) in which every setting of the core and of ``settings`` stands at its default.

    A setting that has no default, or whose default TOML cannot say, stands there as a comment.
    """
    parts = [HEAD, REVERSE]
    for name, models in section_models(settings).items():
        parts.append("\n".join([f"[{name}]", *_lines((name,), models)]) + "\n")
        if name == "listen":
            parts.append(ZONES)
    return "\n".join(parts)


def _lines(table: tuple[str, ...], models: Sequence[type[BaseModel]]) -> Iterator[str]:
    """Scalars first, as TOML wants them, then each nested table under its own header."""
    nested: list[tuple[str, FieldInfo, BaseModel | dict[str, Any]]] = []
    for model in models:
        for key, info in model.model_fields.items():
            value = info.get_default(call_default_factory=True, validated_data={})
            if isinstance(value, BaseModel | dict):
                nested.append((key, info, value))
                continue
            yield from _comment(info)
            absent = info.is_required() or (value is None and not _empty_means_unset(model, key))
            yield f"# {key} =" if absent else f"{key} = {toml_value(_plain(value))}"
    for key, info, value in nested:
        yield ""
        yield from _comment(info)
        yield f"[{'.'.join((*table, key))}]"
        if isinstance(value, BaseModel):
            yield from _lines((*table, key), [type(value)])
        else:
            yield from (f"{json.dumps(name)} = {toml_value(_plain(item))}" for name, item in value.items())


def _empty_means_unset(model: type[BaseModel], key: str) -> bool:
    try:
        return getattr(model.model_validate({key: ""}), key) is None
    except ValidationError:
        return False


def _comment(info: FieldInfo) -> Iterator[str]:
    for line in textwrap.wrap(info.description or "", WIDTH):
        yield f"# {line}"


def _plain(value: Any) -> Any:
    """A default as what TOML can hold."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def toml_value(value: Any) -> str:
    """``value`` as TOML writes it; None, which TOML lacks, as the empty string."""
    if value is None:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value) if not isinstance(value, Path) else value.as_posix(), ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )
