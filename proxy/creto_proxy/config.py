"""Defaults < /etc/creto/enablement.toml < ``--config FILE`` < environment < command line; frozen, and checked whole.

``read`` merges the layers and remembers where each value came from; ``validate`` turns the result into a ``Config`` or
raises one ``ConfigError`` that lists *every* mistake, each on a line of its own, before anything is started:

    creto.toml: limits.stage_deadline_ms: should be a valid integer (got 'soon')

Environment: ``CRETO_<SECTION>__<KEY>`` (two underscores per level), values as text, lists and tables as JSON.
``${VAR}`` and ``${VAR:-default}`` are expanded in the strings of files; ``$${`` is a literal ``${``.

The ``[egress]`` table is read twice: ``resolver``, ``upstream_ca`` and ``resolve`` by the core (``Network``), every
other key by the egress plugin.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, SecretBytes, SecretStr, TypeAdapter, ValidationError

from creto_proxy.errors import ConfigError
from creto_proxy.layers import Draft, KeyPath, dotted, read, source_of
from creto_proxy.settings import (
    CORE,
    RESERVED,
    Admin,
    Common,
    HostPattern,
    Http2,
    Limits,
    Listen,
    Network,
    Observe,
    Plugins,
    Policy,
    Protect,
    Protocols,
    ReverseRoute,
    Run,
    Sidecar,
    Upstream,
    WebSocket,
    default_state_dir,
    login_name,
)

MASK = "********"

S = TypeVar("S", bound=BaseModel)

_SECRET_KEY = re.compile(r"(^|_)(secret|password|passphrase|token|key|credentials?|webhook_url|dsn)$")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_NETWORK_KEYS = frozenset(Network.model_fields)
_ZONES = TypeAdapter(dict[str, tuple[HostPattern, ...]])
_REVERSE = TypeAdapter(tuple[ReverseRoute, ...])


@dataclass(frozen=True, slots=True)
class Config:
    """Everything creto was told, validated. ``sections`` maps plugin names to their own settings models."""

    common: Common
    run: Run
    network: Network
    zones: Mapping[str, tuple[str, ...]]
    listen: Listen
    sidecar: Sidecar
    reverse: tuple[ReverseRoute, ...]
    policy: Policy
    protocols: Protocols
    limits: Limits
    websocket: WebSocket
    http2: Http2
    upstream: Upstream
    protect: Protect
    admin: Admin
    observe: Observe
    plugins: Plugins
    sections: Mapping[str, BaseModel]
    sources: Mapping[KeyPath, str] = field(repr=False)

    @property
    def state_dir(self) -> Path:
        """Absolute path of the state directory; it need not exist yet."""
        return self.common.state_dir.absolute() if self.common.state_dir else default_state_dir()

    @property
    def owner(self) -> str:
        """Name of the human at the root of every delegation."""
        return self.common.owner or login_name()

    def effective(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting as (dotted key, JSON-able value, where it came from); secrets are masked."""
        tables: list[tuple[str, BaseModel]] = [(name, getattr(self, name)) for name in CORE]
        tables += [("egress", self.network), *sorted(self.sections.items())]
        for name, model in tables:
            for key, value in _dump(model).items():
                yield self._shown((name, key), value)
        for zone, hosts in self.zones.items():
            yield self._shown(("zones", zone), list(hosts))
        yield self._shown(("reverse",), [_dump(route) for route in self.reverse])

    def _shown(self, path: KeyPath, value: Any) -> tuple[str, Any, str]:
        set_by = (source for known, source in self.sources.items() if known[: len(path)] == path)
        return dotted(path), _masked(path, value), next(set_by, "default")


def load(
    file: Path | None = None,
    *,
    settings: Mapping[str, type[BaseModel]] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[KeyPath, Any] | None = None,
    system_file: Path | None = None,
) -> Config:
    """The configuration with ``settings`` as the plugins' models. Raises ConfigError with every problem found."""
    return validate(read(file, environ=environ, overrides=overrides, system_file=system_file), settings or {})


def validate(draft: Draft, settings: Mapping[str, type[BaseModel]], *, known: Sequence[str] = ()) -> Config:
    """The draft as a ``Config``. ``known`` are plugins that exist but are not loaded: their sections are left alone.

    Raises ConfigError with every problem of the draft and of every section.
    """
    problems = list(draft.problems)
    _check_sections(draft, {*settings, *known}, problems)
    values = dict(draft.values)
    shared = values.get("egress", {})
    own, rest = shared, shared
    if isinstance(shared, dict):
        own = {key: value for key, value in shared.items() if key in _NETWORK_KEYS}
        rest = {key: value for key, value in shared.items() if key not in _NETWORK_KEYS}
    if "egress" in settings:
        values["egress"] = rest
    elif rest and "egress" not in known:
        own = shared  # no plugin claims the other keys: let the core's model name them
    core = {name: _model(draft, name, model, values.get(name, {}), problems) for name, model in CORE.items()}
    network = _model(draft, "egress", Network, own, problems, also=settings.get("egress"))
    sections = {
        name: _model(draft, name, model, values.get(name, {}), problems, also=Network if name == "egress" else None)
        for name, model in settings.items()
    }
    zones = _adapted(draft, "zones", _ZONES, values.get("zones", {}), problems)
    reverse = _adapted(draft, "reverse", _REVERSE, values.get("reverse", []), problems)
    _check_routes(draft, reverse or (), problems)
    _check_order(draft, {*settings, *known}, problems)
    if problems:
        raise ConfigError(problems)
    return Config(network=network, zones=zones, reverse=reverse, sections=sections, sources=draft.sources, **core)  # type: ignore[arg-type]


def _check_sections(draft: Draft, plugins: set[str], problems: list[str]) -> None:
    sections = {*RESERVED, *plugins, "egress"}
    for name, value in draft.values.items():
        source = source_of(draft.sources, (name,)) or "configuration"
        if name not in sections:
            hint = _hint(name, sections)
            problems.append(f"{source}: {dotted((name,))}: no such section and no plugin of that name{hint}")
        elif name != "reverse" and not isinstance(value, dict):
            problems.append(f"{source}: {name}: should be a table: [{name}]")


def _check_routes(draft: Draft, routes: Sequence[ReverseRoute], problems: list[str]) -> None:
    seen: set[str] = set()
    for index, route in enumerate(routes):
        if route.name in seen:
            path = ("reverse", index, "name")
            problems.append(f"{source_of(draft.sources, path)}: {dotted(path)}: {route.name!r} is already taken")
        seen.add(route.name)


def _check_order(draft: Draft, names: set[str], problems: list[str]) -> None:
    """Names that the operator wrote must exist; those of the default order need not be installed."""
    table = draft.values.get("plugins")
    names = {*names, *Plugins().order}
    for key in ("order", "disabled"):
        listed = table.get(key) if isinstance(table, dict) else None
        for index, name in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(name, str) and name not in names:
                path = ("plugins", key, index)
                where = f"{source_of(draft.sources, path)}: {dotted(path)}"
                problems.append(f"{where}: no plugin {name!r} is installed{_hint(name, names)}")


def _model(
    draft: Draft,
    name: str,
    model: type[S],
    values: Any,
    problems: list[str],
    *,
    also: type[BaseModel] | None = None,
) -> S | None:
    """``values`` as ``model``; None after adding to ``problems``. ``also`` shares the table: its keys are suggested."""
    if not isinstance(values, dict):
        return None  # already reported
    try:
        return model.model_validate(_anchored(draft, model, values, (name,)))
    except ValidationError as error:
        problems.extend(_explain(draft, name, error, model, also))
        return None


def _adapted(draft: Draft, name: str, adapter: TypeAdapter[Any], values: Any, problems: list[str]) -> Any:
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        if isinstance(values, dict | list):
            problems.extend(_explain(draft, name, error, ReverseRoute if name == "reverse" else None, None))
        elif name == "reverse":
            problems.append(f"{source_of(draft.sources, (name,))}: {name}: should be tables: [[{name}]]")
        return None


def _anchored(draft: Draft, model: type[BaseModel], values: dict[str, Any], at: KeyPath) -> dict[str, Any]:
    """Relative paths are relative to the file they were written in, or to the working directory elsewhere."""
    anchored = dict(values)
    for key, value in values.items():
        info = model.model_fields.get(key)
        if info is None or not _holds(info.annotation, Path):
            continue
        source = source_of(draft.sources, (*at, key)) or ""
        base = Path.cwd() if source.startswith(("environment", "command")) else Path(source).parent.absolute()
        if isinstance(value, str):
            anchored[key] = _anchor(base, value)
        elif isinstance(value, list):
            anchored[key] = [_anchor(base, item) if isinstance(item, str) else item for item in value]
    return anchored


def _anchor(base: Path, text: str) -> str:
    return text if not text else str(base / os.path.expanduser(text))


def _holds(annotation: Any, *types: type) -> bool:
    return annotation in types or any(_holds(inner, *types) for inner in get_args(annotation))


def _explain(
    draft: Draft, name: str, error: ValidationError, model: type[BaseModel] | None, also: type[BaseModel] | None
) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        path: KeyPath = (name, *detail["loc"])
        source = source_of(draft.sources, path) or "configuration"
        if detail["type"] == "extra_forbidden":
            fields = set(_fields_at(model, detail["loc"][:-1]))
            if len(detail["loc"]) == 1 and also is not None:
                fields |= set(also.model_fields)
            yield f"{source}: {dotted(path)}: no such setting{_hint(str(path[-1]), fields)}"
        elif detail["type"] == "missing":
            yield f"{source}: {dotted(path)}: is required"
        else:
            secret = _is_secret(path) or _declared_secret(model, detail["loc"]) or _was_expanded(draft, path)
            yield f"{source}: {dotted(path)}: {_reason(detail['msg'], detail['input'], secret)}"


def _reason(message: str, got: Any, secret: bool) -> str:
    reason = re.sub(r"^(Input|Value error,|Assertion failed,) ", "", message)
    reason = reason[:1].lower() + reason[1:] if not reason[:2].isupper() else reason
    if secret:
        return f"{reason.replace(str(got), MASK) if str(got) else reason} (value not shown)"
    if isinstance(got, str | int | float | bool):
        return f"{reason} (got {_USERINFO.sub(MASK, repr(got))[:120]})"
    return reason


def _was_expanded(draft: Draft, path: KeyPath) -> bool:
    """Whether the value at ``path``, or anything above or below it, was made from an environment variable."""
    return any(path[: len(known)] == known or known[: len(path)] == path for known in draft.opaque)


def _declared_secret(model: type[BaseModel] | None, loc: Sequence[str | int]) -> bool:
    for depth, key in enumerate(loc):
        info = _fields_at(model, loc[:depth]).get(str(key))
        if info is not None and _holds(info.annotation, SecretStr, SecretBytes):
            return True
    return False


def _fields_at(model: type[BaseModel] | None, loc: Sequence[str | int]) -> Mapping[str, Any]:
    """Fields of the model that ``loc`` leads to, through lists, tables and optional values."""
    fields: Mapping[str, Any] = model.model_fields if model else {}
    for key in loc:
        if isinstance(key, str) and key in fields:
            inner = _inner_model(fields[key].annotation)
            fields = inner.model_fields if inner else {}
    return fields


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _inner_model(arg))), None)


def _hint(name: str, candidates: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(candidates), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_secret(path: KeyPath) -> bool:
    return any(isinstance(key, str) and _SECRET_KEY.search(key) for key in path[1:])


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json")


def _masked(path: KeyPath, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked((*path, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked((*path, index), item) for index, item in enumerate(value)]
    if value and _is_secret(path):
        return MASK
    return _USERINFO.sub(MASK, value) if isinstance(value, str) else value


def section_models(settings: Mapping[str, type[BaseModel]]) -> dict[str, list[type[BaseModel]]]:
    """Every table of the file with the models that read it, in the order a reader wants them."""
    tables: dict[str, list[type[BaseModel]]] = {name: [model] for name, model in CORE.items()}
    tables["egress"] = [Network]
    for name, model in sorted(settings.items()):
        tables.setdefault(name, []).append(model)
    return tables


