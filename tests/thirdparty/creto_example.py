"""Somebody else's plugin, in a distribution of its own: refuses hosts on a list, keeps words out of WebSocket messages,
and names agents by their link.

    [example]
    denied = ["paste.example.net"]
    words = ["password"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
from pydantic import BaseModel, ConfigDict, Field

from creto_proxy.cli import Operator
from creto_proxy.hookspecs import (
    Authorizer,
    ControlRequest,
    ControlResponse,
    Core,
    Direction,
    Identifier,
    MessageKind,
    Messages,
    Routes,
    hookimpl,
)
from creto_proxy.model import Agent, Decision, Flow, Request, Verdict


class ExampleSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    denied: tuple[str, ...] = Field((), description="Hosts that no agent may reach.")
    words: tuple[str, ...] = Field((), description="Words that no agent may send over a WebSocket.")
    agents: Mapping[str, str] = Field(default_factory=dict, description="Link name -> agent name.")


class Denylist:
    """An ``Authorizer`` that decides on the head alone."""

    def __init__(self, denied: Sequence[str]) -> None:
        self._denied = frozenset(denied)

    def body_limit(self, request: Request) -> int:
        return 0

    def authorize(self, request: Request) -> Decision:
        if request.host in self._denied:
            return Decision(Verdict.DENY, "example_denied", f"{request.host} is on the denylist of [example]")
        return Decision(Verdict.ALLOW, "example_not_denied")


class Wordlist:
    """A ``Messages`` stage that is also the watch of every connection, because it remembers nothing."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word.encode() for word in words]

    def open(self, request: Request) -> Wordlist | None:
        return self if self._words else None

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision:
        if direction == "up" and any(word in data for word in self._words):
            return Decision(Verdict.DENY, "example_word", "The message has a word that [example] does not let out.")
        return data


class Links:
    """An ``Identifier`` that knows agents by the name of the link they arrive on."""

    def __init__(self, agents: Mapping[str, str]) -> None:
        self._agents = {link: _agent(name) for link, name in agents.items()}

    def identify(self, flow: Flow) -> Agent | None:
        return self._agents.get(flow.link)


def _agent(name: str) -> Agent:
    spiffe = f"spiffe://example/agent/{name}"
    chain = ("spiffe://example/human/root", spiffe)
    return Agent(spiffe, name, chain, bytes(32), ("platform", f"agent:{name}"), expires_at=4_102_444_800.0)


class Listing:
    """``GET http://creto.internal/v1/example``: the denylist."""

    prefix = "/v1/example"

    def __init__(self, denied: Sequence[str]) -> None:
        self._denied = sorted(denied)

    async def handle(self, request: ControlRequest) -> ControlResponse:
        return ControlResponse(200, {"denied": self._denied})


@click.command("example")
@click.pass_obj
def example(operator: Operator) -> None:
    """Show the denylist."""
    settings = operator.config.sections["example"]
    assert isinstance(settings, ExampleSettings)
    operator.emit([{"denied": host} for host in settings.denied], {"denied": list(settings.denied)})


class Example:
    name = "example"
    api = 1
    Settings = ExampleSettings

    def __init__(self, settings: ExampleSettings, core: Core) -> None:
        self._settings = settings

    @classmethod
    def commands(cls) -> Sequence[click.Command]:
        return (example,)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    @hookimpl
    def creto_identifier(self) -> Identifier:
        return Links(self._settings.agents)

    @hookimpl
    def creto_authorizer(self) -> Authorizer:
        return Denylist(self._settings.denied)

    @hookimpl
    def creto_messages(self) -> Messages:
        return Wordlist(self._settings.words)

    @hookimpl
    def creto_routes(self) -> Routes:
        return Listing(self._settings.denied)
