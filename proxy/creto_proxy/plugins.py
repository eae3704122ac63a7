"""Entry points -> validated plugins -> one immutable ``Stages``.

Ours and a stranger's are found the same way, through the entry-point group ``creto``, and go through the same checks:
it imports, it speaks this version of the contract, its name is its own, its settings validate, every hook it marks
exists, and what a hook returns has the methods of its stage. Each failure is one line naming the distribution.

Hooks are asked once, here. What pluggy returns is untyped; it is checked and stops being ``Any`` in this file.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pluggy
from pydantic import BaseModel

from creto_proxy import hookspecs, layers
from creto_proxy.config import Config, validate
from creto_proxy.errors import ConfigError
from creto_proxy.hookspecs import API_VERSION, Core, Hooks, Plugin, Stages
from creto_proxy.settings import RESERVED

GROUP = "creto"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0

log = logging.getLogger("creto.plugins")

# hook -> (field of Stages, what its answer must look like)
STAGES: Mapping[str, tuple[str, type]] = {
    "creto_identifier": ("identifiers", hookspecs.Identifier),
    "creto_authorizer": ("authorizers", hookspecs.Authorizer),
    "creto_gate": ("gates", hookspecs.Gate),
    "creto_egress_guard": ("guards", hookspecs.EgressGuard),
    "creto_redirect": ("redirects", hookspecs.Redirect),
    "creto_meter": ("meters", hookspecs.Meter),
    "creto_messages": ("messages", hookspecs.Messages),
    "creto_consumer": ("consumers", hookspecs.Consumer),
    "creto_routes": ("routes", hookspecs.Routes),
}


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin class that passed every check that needs no settings. ``hooks`` are the hooks it implements."""

    name: str
    plugin: type[Plugin]
    distribution: str
    version: str
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Discovery:
    """What the entry points led to. ``names`` includes the disabled and the broken, ``problems`` says what is wrong."""

    found: tuple[Found, ...]
    names: frozenset[str]
    problems: tuple[str, ...]

    @property
    def settings(self) -> dict[str, type[BaseModel]]:
        """Plugin name -> model of its section."""
        return {each.name: each.plugin.Settings for each in self.found}


def discover(
    disabled: Iterable[str] = (), entry_points: Iterable[importlib.metadata.EntryPoint] | None = None
) -> Discovery:
    """Every installed plugin but the ``disabled``, which are not even imported."""
    points = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    skipped = frozenset(disabled)
    found: dict[str, Found] = {}
    names: set[str] = set()
    problems: list[str] = []
    for point in sorted(points, key=lambda each: (each.name, each.value)):
        origin = _origin(point)
        if point.name in names and point.name not in skipped:
            first = found.get(point.name)
            other = f" ({first.distribution} {first.version})" if first else ""
            problems.append(f"plugin {point.name} of {origin}: the name is already taken{other}; uninstall one of them")
            continue
        names.add(point.name)
        if point.name in skipped:
            continue
        try:
            found[point.name] = _checked(point)
        except _Unfit as error:
            problems.append(f"plugin {point.name} of {origin}: {error}")
    return Discovery(tuple(found.values()), frozenset(names), tuple(problems))


def configure(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[layers.KeyPath, Any] | None = None,
    system_file: Path | None = None,
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
) -> tuple[Config, tuple[Found, ...]]:
    """The configuration and the plugins it was validated with, in configured order.

    Raises ConfigError with the problems of files, environment, plugins and every section together.
    """
    draft = layers.read(file, environ=environ, overrides=overrides, system_file=system_file)
    discovery = discover(draft.disabled, entry_points)
    draft.problems.extend(discovery.problems)
    config = validate(draft, discovery.settings, known=tuple(discovery.names))
    rank = {name: index for index, name in enumerate(config.plugins.order)}
    return config, tuple(sorted(discovery.found, key=lambda each: (rank.get(each.name, len(rank)), each.name)))


def list_commands(found: Iterable[Found], taken: Container[str]) -> tuple[dict[str, click.Command], list[str]]:
    """Sub-commands of ``found`` by name, and one line for each that cannot be had. ``taken`` names are refused."""
    commands: dict[str, click.Command] = {}
    problems: list[str] = []
    for each in found:
        try:
            offered = tuple(_attempt("its commands cannot be listed", each.plugin.commands))
        except _Unfit as error:
            problems.append(f"plugin {each.name} of {each.distribution} {each.version}: {error}")
            continue
        for command in offered:
            if not isinstance(command, click.Command) or not command.name:
                problems.append(f"plugin {each.name}: offered {command!r} instead of a named click command")
            elif command.name in taken or command.name in commands:
                problems.append(f"plugin {each.name}: its command {command.name!r} is ignored: the name is taken")
            else:
                commands[command.name] = command
    return commands, problems


class Plugins:
    """The plugins of this process, constructed and composed; ``start`` before and ``stop`` after requests.

    ``stages`` holds every stage object in configured order. ``owner(stage)`` is the name of the plugin it came from,
    for ``Guard.call`` and for what is told to people.
    """

    def __init__(self, instances: Mapping[str, Plugin], stages: Stages, owners: Mapping[int, str]) -> None:
        self.stages = stages
        self._instances = dict(instances)
        self._owners = dict(owners)
        self._started: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._instances)

    def owner(self, stage: object) -> str:
        """Raises KeyError for an object that is no stage of these plugins."""
        return self._owners[id(stage)]

    async def start(self) -> None:
        """Starts all, in order. When one fails, those before it are stopped again and ConfigError names it."""
        for name, plugin in self._instances.items():
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await plugin.start()
            except (Exception, SystemExit) as error:
                log.debug("plugin %s: start failed", name, exc_info=error)
                await self.stop()
                raise ConfigError([f"plugin {name}: cannot start: {_brief(error)}"]) from error
            self._started.append(name)

    async def stop(self) -> list[tuple[str, Exception]]:
        """Stops what was started, last first. One that fails does not keep the others open; failures come back."""
        failures: list[tuple[str, Exception]] = []
        while self._started:
            name = self._started.pop()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._instances[name].stop()
            except Exception as error:
                log.error("plugin %s: stop failed", name, exc_info=error)
                failures.append((name, error))
        return failures


def compose(found: Iterable[Found], config: Config, core: Core) -> Plugins:
    """Constructs each plugin with its section and asks its hooks. Raises ConfigError with every problem."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    instances: dict[str, Plugin] = {}
    collected: dict[str, list[Any]] = {field: [] for field, _ in STAGES.values()}
    owners: dict[int, str] = {}
    problems: list[str] = []
    for each in found:
        try:
            instances[each.name] = _constructed(each, manager, config, core)
            for hook, (field, shape) in STAGES.items():
                stage = _asked(each, manager, hook, shape)
                if stage is not None:
                    collected[field].append(stage)
                    owners[id(stage)] = each.name
        except _Unfit as error:
            problems.append(f"plugin {each.name} of {each.distribution} {each.version}: {error}")
    if problems:
        raise ConfigError(problems)
    return Plugins(instances, Stages(**{field: tuple(stages) for field, stages in collected.items()}), owners)


class _Unfit(Exception):
    """Why a plugin cannot be used; the caller adds whose it is."""


def _origin(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else f"entry point {point.value}"


def _checked(point: importlib.metadata.EntryPoint) -> Found:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", point.name):
        raise _Unfit("the name should be lower-case letters, digits and underscores: it names a configuration section")
    if point.name in RESERVED:
        raise _Unfit("the name is a configuration section of the core")
    loaded = _attempt("cannot be imported", point.load)
    if not isinstance(loaded, type):
        what = "a module" if isinstance(loaded, ModuleType) else f"a {type(loaded).__name__}"
        raise _Unfit(f"the entry point {point.value} leads to {what}, not to a class (write module:Class)")
    plugin: Any = loaded
    missing = [name for name in ("name", "api", "Settings", "commands", "start", "stop") if not hasattr(plugin, name)]
    if missing:
        raise _Unfit(f"{plugin.__name__} has no {', '.join(missing)}; see creto_proxy.hookspecs.Plugin")
    if plugin.api != API_VERSION:
        raise _Unfit(f"it speaks version {plugin.api} of the plugin contract, this creto speaks {API_VERSION}")
    if plugin.name != point.name:
        raise _Unfit(f"the class is named {plugin.name!r} but its entry point {point.name!r}; they should be the same")
    if not (isinstance(plugin.Settings, type) and issubclass(plugin.Settings, BaseModel)):
        raise _Unfit(f"{plugin.__name__}.Settings is not a pydantic model")
    return Found(
        name=point.name,
        plugin=plugin,
        distribution=point.dist.name if point.dist else "unknown",
        version=point.dist.version if point.dist else "",
        hooks=implemented_hooks(plugin),
    )


def implemented_hooks(plugin: type) -> tuple[str, ...]:
    """Names of the hooks that ``plugin`` implements. A mistyped or unmarked one would silently never be asked."""
    names: list[str] = []
    for name, member in inspect.getmembers(plugin, callable):
        marked = getattr(member, f"{GROUP}_impl", None) is not None
        if marked and name not in STAGES:
            raise _Unfit(f"{name} is no hook; hooks are {', '.join(STAGES)}")
        if not marked and name.startswith("creto_"):
            raise _Unfit(f"{name} is not marked with @hookimpl, so it would never be asked")
        if marked:
            names.append(name)
    return tuple(names)


def _constructed(found: Found, manager: pluggy.PluginManager, config: Config, core: Core) -> Plugin:
    plugin = _attempt("cannot be constructed", lambda: found.plugin(config.sections[found.name], core))
    _attempt("has hooks that do not fit", lambda: manager.register(plugin, name=found.name))
    _attempt("has hooks that do not fit", manager.check_pending)
    instance: Plugin = plugin
    return instance


def _asked(found: Found, manager: pluggy.PluginManager, hook: str, shape: type) -> object | None:
    """The stage object this one plugin gives for ``hook``, None when it gives none."""
    others = [plugin for name, plugin in manager.list_name_plugin() if name != found.name]
    caller = manager.subset_hook_caller(hook, remove_plugins=others)
    answers: list[Any] = _attempt(f"{hook} failed", caller)
    if not answers:
        return None
    stage: object = answers[0]
    missing = [member for member in stage_members(shape) if not hasattr(stage, member)]
    if missing:
        raise _Unfit(f"{hook} gave a {type(stage).__name__} without {', '.join(missing)} (see {shape.__name__})")
    return stage


def stage_members(shape: type) -> list[str]:
    """What the Protocol ``shape`` asks for: its public methods and annotated attributes."""
    return [name for name in {**vars(shape), **inspect.get_annotations(shape)} if not name.startswith("_")]


def _attempt(what: str, action: Callable[[], Any]) -> Any:
    """``action()``, a plugin's code: whatever it raises becomes an explanation, with the traceback in the log."""
    try:
        return action()
    except (Exception, SystemExit) as error:  # a module that exits would end creto as if all had gone well
        log.debug("plugin: %s", what, exc_info=error)
        raise _Unfit(f"{what}: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    """One line: type and first line of the message."""
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
