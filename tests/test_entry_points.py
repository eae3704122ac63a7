"""Ours and a stranger's plugin are found the same way, and what the stranger decides is enforced."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from creto_proxy.cli import Operator
from creto_proxy.config import Config
from creto_proxy.deadline import Guard
from creto_proxy.errors import ConfigError, Refused
from creto_proxy.hookspecs import ControlRequest
from creto_proxy.model import Decision, Verdict
from creto_proxy.plugins import Discovery, Found, Plugins, compose, configure, discover
from creto_proxy.testing import allow, make_agent, make_core, make_flow, make_request
from creto_proxy.websocket import Watchers

OURS = {"egress", "metering", "oversight"}


@pytest.fixture
def stranger(stranger_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(stranger_site)
    importlib.invalidate_caches()
    yield stranger_site
    sys.modules.pop("creto_example", None)


def by_name(discovery: Discovery) -> dict[str, Found]:
    return {each.name: each for each in discovery.found}


def configured(tmp_path: Path, text: str) -> tuple[Config, tuple[Found, ...]]:
    file = tmp_path / "creto.toml"
    file.write_text(text)
    return configure(file, environ={}, system_file=tmp_path / "absent.toml")


def test_ours_are_found_by_entry_point() -> None:
    discovery = discover()
    assert discovery.problems == ()
    assert by_name(discovery).keys() >= OURS
    assert {by_name(discovery)[name].distribution for name in OURS} == {"creto-enablement"}


def test_the_stranger_is_absent_until_installed() -> None:
    assert "example" not in by_name(discover())


def test_the_stranger_is_found_beside_ours(stranger: Path) -> None:
    discovery = discover()
    found = by_name(discovery)
    assert discovery.problems == ()
    assert found.keys() >= {*OURS, "example"}
    assert (found["example"].distribution, found["example"].version) == ("creto-example", "1.2.3")
    assert found["example"].hooks == ("creto_authorizer", "creto_identifier", "creto_messages", "creto_routes")


def test_its_section_is_validated_with_ours(stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failed:
        configured(tmp_path, "[example]\ndenied = 3\nother = 1\n[limits]\nbody_bytes = 'x'\n")
    keys = sorted(problem.split(": ")[1] for problem in failed.value.problems)
    assert keys == ["example.denied", "example.other", "limits.body_bytes"]


@pytest.fixture
def loaded(stranger: Path, tmp_path: Path) -> Plugins:
    config, found = configured(
        tmp_path, '[example]\ndenied = ["bad.example.net"]\nwords = ["password"]\n[example.agents]\nuplink = "robot"\n'
    )
    return compose([each for each in found if each.name == "example"], config, make_core(tmp_path))


def walk(loaded: Plugins, host: str) -> Decision:
    """The authorize stage as requests meet it: each authorizer guarded, the strictest answer wins."""
    decision = allow()
    guard = Guard(1.0)
    for stage in loaded.stages.authorizers:
        answer = guard.decide(loaded.owner(stage), "authorize", stage.authorize, make_request(host=host))
        decision = decision.stricter(answer)
    return decision


def test_what_the_stranger_refuses_is_refused(loaded: Plugins) -> None:
    refused = walk(loaded, "bad.example.net")
    assert (refused.verdict, refused.reason) == (Verdict.DENY, "example_denied")
    assert walk(loaded, "good.example.net").allowed


def test_what_the_stranger_keeps_in_stays_in(loaded: Plugins) -> None:
    named = [(loaded.owner(stage), stage) for stage in loaded.stages.messages]
    watch = Watchers(named, Guard(1.0)).open(make_request(), "websocket")
    assert watch is not None and watch.judge("up", "text", b"hello") == b"hello"
    with pytest.raises(Refused) as refused:
        watch.judge("up", "text", b"my password is x")
    assert refused.value.decision.reason == "example_word"


def test_the_stranger_may_say_who_an_agent_is(loaded: Plugins) -> None:
    [identifier] = loaded.stages.identifiers
    known, unknown = identifier.identify(make_flow(link="uplink")), identifier.identify(make_flow(link="other"))
    assert known is not None and known.name == "robot"
    assert unknown is None


async def test_the_stranger_answers_under_its_prefix(loaded: Plugins) -> None:
    [routes] = loaded.stages.routes
    response = await routes.handle(ControlRequest(make_agent(), "GET", f"{routes.prefix}", {}, b""))
    assert (response.status, response.document) == (200, {"denied": ["bad.example.net"]})


def test_the_strangers_command_is_a_command_of_creto(stranger: Path, tmp_path: Path) -> None:
    assert "example" in Operator(environ={}).plugin_commands
