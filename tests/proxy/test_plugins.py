"""Discovery, checks, composition and life cycle: a plugin that does not fit is named, never half loaded."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from pydantic import BaseModel

from creto_proxy import plugins
from creto_proxy.errors import ConfigError
from creto_proxy.hookspecs import hookimpl
from creto_proxy.model import Decision, Request
from creto_proxy.plugins import STAGES, Plugins, compose, configure, discover, list_commands
from creto_proxy.settings import Section
from creto_proxy.testing import allow, make_config, make_core, make_request


class Authorize:
    def __init__(self, name: str) -> None:
        self.name = name

    def body_limit(self, request: Request) -> int:
        return 0

    def authorize(self, request: Request) -> Decision:
        return allow(self.name)


class Base:
    """A plugin that fits and does nothing."""

    name = "base"
    api = 1

    class Settings(Section):
        word: str = "x"

    def __init__(self, settings: Any, core: Any) -> None:
        self.settings = settings

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        return ()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Fine(Base):
    name = "fine"

    @hookimpl
    def creto_authorizer(self) -> Authorize:
        return Authorize(self.name)


class Other(Fine):
    name = "other"


EntryPoints = Callable[..., list[importlib.metadata.EntryPoint]]


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> Iterator[EntryPoints]:
    """Entry points for plugin classes (or anything else), found in a module made for the test."""
    module = ModuleType("plugins_under_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(*things: Any, **named: Any) -> list[importlib.metadata.EntryPoint]:
        points = []
        for name, thing in [*((each.name, each) for each in things), *named.items()]:
            attribute = f"a{len(vars(module))}"
            setattr(module, attribute, thing)
            points.append(importlib.metadata.EntryPoint(name, f"{module.__name__}:{attribute}", plugins.GROUP))
        return points

    yield make


def test_a_plugin_that_fits_is_found_with_its_hooks(entry_points: EntryPoints) -> None:
    discovery = discover(entry_points=entry_points(Fine))
    assert discovery.problems == ()
    [found] = discovery.found
    assert (found.name, found.hooks) == ("fine", ("creto_authorizer",))
    assert issubclass(found.plugin, Fine)


def test_a_disabled_plugin_is_not_imported() -> None:
    point = importlib.metadata.EntryPoint("broken", "no_such_module:X", plugins.GROUP)
    discovery = discover({"broken"}, [point])
    assert discovery == plugins.Discovery((), frozenset({"broken"}), ())


class WrongApi(Base):
    api = 2


class Unmarked(Base):
    def creto_authorizer(self) -> Authorize:
        return Authorize("never asked")


class Mistyped(Base):
    @hookimpl
    def creto_authorise(self) -> Authorize:
        return Authorize("never asked")


class NoModel(Base):
    Settings = dict  # type: ignore[assignment]


class NoStart:
    name, api, Settings = "base", 1, Base.Settings

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        return ()


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        (WrongApi, "speaks version 2 of the plugin contract, this creto speaks 1"),
        (Unmarked, "creto_authorizer is not marked with @hookimpl"),
        (Mistyped, "creto_authorise is no hook"),
        (NoModel, "Settings is not a pydantic model"),
        (NoStart, "has no start, stop"),
        (Fine, "the class is named 'fine' but its entry point 'base'"),
        (sys, "leads to a module, not to a class"),
        (Base(None, None), "leads to a Base, not to a class"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(entry_points: EntryPoints, thing: Any, reason: str) -> None:
    discovery = discover(entry_points=entry_points(base=thing))
    [problem] = discovery.problems
    assert discovery.found == ()
    assert problem.startswith("plugin base of ") and reason in problem


@pytest.mark.parametrize("name", ["limits", "zones", "Upper", "with-dash", "9"])
def test_a_name_that_cannot_be_a_section_is_refused(entry_points: EntryPoints, name: str) -> None:
    discovery = discover(entry_points=entry_points(**{name: Base}))
    assert discovery.found == () and len(discovery.problems) == 1


def test_a_broken_import_names_the_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_plugin.py").write_text("raise RuntimeError('no licence found\\nsecond line')\n")
    info = tmp_path / "bad_dist-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-dist\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[creto]\nbad = bad_plugin:Bad\n")
    monkeypatch.syspath_prepend(tmp_path)
    [problem] = [each for each in discover().problems if "bad" in each]
    assert problem == "plugin bad of bad-dist 3.1: cannot be imported: RuntimeError: no licence found"


def test_two_of_one_name_are_an_error(entry_points: EntryPoints) -> None:
    [problem] = discover(entry_points=[*entry_points(Fine), *entry_points(Fine)]).problems
    assert "the name is already taken" in problem


def test_plugin_problems_and_setting_problems_come_together(entry_points: EntryPoints, tmp_path: Path) -> None:
    file = tmp_path / "creto.toml"
    file.write_text("[fine]\nword = 3\n[limits]\nbody_bytes = 'x'\n")
    with pytest.raises(ConfigError) as failed:
        configure(file, environ={}, system_file=tmp_path / "none", entry_points=entry_points(Fine, base=WrongApi))
    text = "\n".join(failed.value.problems)
    assert len(failed.value.problems) == 3
    assert "plugin base of" in text and "fine.word" in text and "limits.body_bytes" in text


def test_plugins_come_in_configured_order_the_rest_by_name(entry_points: EntryPoints, tmp_path: Path) -> None:
    points = entry_points(Base, Fine, Other)

    def order(text: str) -> list[str]:
        file = tmp_path / "creto.toml"
        file.write_text(text)
        _, found = configure(file, environ={}, system_file=tmp_path / "none", entry_points=points)
        return [each.name for each in found]

    assert order("") == ["base", "fine", "other"]
    assert order('[plugins]\norder = ["other", "base"]') == ["other", "base", "fine"]
    assert order('[plugins]\ndisabled = ["fine"]\n[fine]\nunknown = 1') == ["base", "other"]


def composed(
    entry_points: EntryPoints, tmp_path: Path, *classes: Any, sections: dict[str, Any] | None = None
) -> Plugins:
    found = discover(entry_points=entry_points(*classes)).found
    return compose(found, make_config(sections, plugins=[each.plugin for each in found]), make_core(tmp_path))


def test_stage_objects_stand_in_order_and_know_their_plugin(entry_points: EntryPoints, tmp_path: Path) -> None:
    loaded = composed(entry_points, tmp_path, Other, Fine)
    assert [stage.authorize(make_request()).reason for stage in loaded.stages.authorizers] == ["fine", "other"]
    assert [loaded.owner(stage) for stage in loaded.stages.authorizers] == ["fine", "other"]
    assert loaded.stages.gates == ()


def test_a_plugin_gets_its_own_section(entry_points: EntryPoints, tmp_path: Path) -> None:
    seen = []

    class Curious(Base):
        name = "curious"

        def __init__(self, settings: BaseModel, core: Any) -> None:
            seen.append(settings)

    composed(entry_points, tmp_path, Curious, sections={"curious": {"word": "mine"}})
    assert seen == [Curious.Settings(word="mine")]


class RaisesInInit(Base):
    name = "one"

    def __init__(self, settings: Any, core: Any) -> None:
        raise OSError("no socket")


class RaisesInHook(Base):
    name = "two"

    @hookimpl
    def creto_gate(self) -> object:
        raise ValueError("no channel")


class HalfAStage(Base):
    name = "three"

    @hookimpl
    def creto_gate(self) -> object:
        return Authorize("not a gate")


class WrongArguments(Base):
    name = "four"

    @hookimpl
    def creto_gate(self, extra: int) -> None:
        return None


def test_every_plugin_that_cannot_be_composed_is_named(entry_points: EntryPoints, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failed:
        composed(entry_points, tmp_path, RaisesInInit, RaisesInHook, HalfAStage, WrongArguments, Fine)
    problems = {problem.split()[1]: problem for problem in failed.value.problems}
    assert problems.keys() == {"one", "two", "three", "four"}
    assert "cannot be constructed: OSError: no socket" in problems["one"]
    assert "creto_gate failed: ValueError: no channel" in problems["two"]
    assert "creto_gate gave a Authorize without hold, spend, settled (see Gate)" in problems["three"]
    assert "has hooks that do not fit" in problems["four"]


def test_a_hook_that_gives_nothing_is_no_stage(entry_points: EntryPoints, tmp_path: Path) -> None:
    class Shy(Base):
        name = "shy"

        @hookimpl
        def creto_gate(self) -> None:
            return None

    assert composed(entry_points, tmp_path, Shy).stages.gates == ()


def recorder(name: str, events: list[str], *, fails_at: str = "") -> type[Base]:
    class Recorder(Base):
        async def start(self) -> None:
            await self._event("start")

        async def stop(self) -> None:
            await self._event("stop")

        async def _event(self, what: str) -> None:
            if what == fails_at:
                raise OSError(f"{name} cannot {what}")
            events.append(f"{what} {name}")

    Recorder.name = name
    return Recorder


async def test_start_in_order_stop_in_reverse(entry_points: EntryPoints, tmp_path: Path) -> None:
    events: list[str] = []
    loaded = composed(entry_points, tmp_path, recorder("a", events), recorder("b", events))
    await loaded.start()
    assert await loaded.stop() == []
    assert events == ["start a", "start b", "stop b", "stop a"]
    assert await loaded.stop() == []


async def test_a_failed_start_stops_what_was_started_and_names_the_plugin(
    entry_points: EntryPoints, tmp_path: Path
) -> None:
    events: list[str] = []
    classes = [recorder("a", events), recorder("b", events, fails_at="start"), recorder("c", events)]
    loaded = composed(entry_points, tmp_path, *classes)
    with pytest.raises(ConfigError, match="plugin b: cannot start: OSError: b cannot start"):
        await loaded.start()
    assert events == ["start a", "stop a"]


async def test_a_failed_stop_does_not_keep_the_others_open(entry_points: EntryPoints, tmp_path: Path) -> None:
    events: list[str] = []
    loaded = composed(entry_points, tmp_path, recorder("a", events), recorder("b", events, fails_at="stop"))
    await loaded.start()
    assert [(name, str(error)) for name, error in await loaded.stop()] == [("b", "b cannot stop")]
    assert events[-1] == "stop a"


def test_commands_come_from_plugins_and_cannot_take_a_name(entry_points: EntryPoints) -> None:
    def offering(name: str, *commands: object) -> type[Base]:
        return type(name.title(), (Base,), {"name": name, "commands": classmethod(lambda cls: commands)})

    found = discover(
        entry_points=entry_points(
            offering("a", click.Command("usage")),
            offering("b", click.Command("usage"), click.Command("run")),
            offering("c", "not a command"),
        )
    ).found
    commands, problems = list_commands(found, taken={"run"})
    assert list(commands) == ["usage"]
    assert [problem.split(":")[0] for problem in problems] == ["plugin b", "plugin b", "plugin c"]


def test_every_hook_has_a_place_in_stages() -> None:
    from dataclasses import fields

    from creto_proxy.hookspecs import Hooks, Stages

    hooks = {name for name in vars(Hooks) if name.startswith("creto_")}
    assert hooks == set(STAGES)
    assert {field for field, _ in STAGES.values()} == {field.name for field in fields(Stages)}
