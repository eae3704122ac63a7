"""A stranger's plugin that raises, hangs or spins in the stage it is told to, for the hosts it is told to.

[unruly]
stage = "authorize"
hosts = { "bad.example.com" = "raise" }
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from creto_proxy.hookspecs import (
    Authorizer,
    Client,
    Consumer,
    ControlRequest,
    ControlResponse,
    Core,
    Edits,
    EgressGuard,
    Gate,
    Meter,
    Routes,
    Tap,
    hookimpl,
)
from creto_proxy.model import Address, Agent, Approval, Decision, Outcome, Request, Usage, Verdict

SECRET = "sk-planted-0123456789SECRET"
ALLOW = Decision(Verdict.ALLOW, "unruly_does_not_mind")

How = Literal["raise", "hang", "spin"]


class UnrulySettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = ""
    hosts: Mapping[str, How] = {}

    def oversight_profiles(self) -> Mapping[str, tuple[int, frozenset[str] | None]]:
        return {"unruly": (1, None)}


def misbehave(how: How) -> NoReturn:
    password = SECRET  # a traceback with local variables would show it, and so does the message
    if how == "raise":
        raise RuntimeError(f"cannot log in with {password}")
    while True:
        if how == "hang":
            time.sleep(3600)


class Temper:
    """What every stage object shares."""

    def __init__(self, settings: UnrulySettings) -> None:
        self._settings = settings

    def _at(self, stage: str, host: str | None) -> None:
        how = self._settings.hosts.get(host or "")
        if stage == self._settings.stage and how is not None:
            misbehave(how)


class Judge(Temper):
    def body_limit(self, request: Request) -> int:
        self._at("body_limit", request.host)
        return 0

    def authorize(self, request: Request) -> Decision:
        self._at("authorize", request.host)
        return ALLOW


class Counter(Temper):
    def body_limit(self, request: Request) -> int:
        return 0

    def authorize(self, request: Request) -> Decision:
        self._at("reserve", request.host)
        return ALLOW

    def release(self, request: Request) -> None:
        self._at("release", request.host)

    def edits(self, request: Request) -> Edits | None:
        self._at("edits", request.host)
        return None

    def tap(self, request: Request, status: int, content_type: str) -> Tap | None:
        self._at("tap", request.host)
        return Ear(self._settings, request.host) if self._settings.stage in ("feed", "finish", "rewrite") else None

    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage:
        self._at("settle", request.host)
        return Usage()


class Ear(Temper):
    def __init__(self, settings: UnrulySettings, host: str) -> None:
        super().__init__(settings)
        self._host = host
        self.rewrites = settings.stage == "rewrite"

    def feed(self, data: bytes) -> bytes | None:
        self._at("feed", self._host)
        self._at("rewrite", self._host)
        return data

    def finish(self) -> bytes | None:
        self._at("finish", self._host)
        return None


class Person(Temper):
    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        self._at("hold", request.host)
        request.fingerprint = "same"
        request.approval = Approval("1", True, 1, frozenset(), "same", ("p",), ("unruly",))
        return ALLOW

    def spend(self, request: Request) -> bool:
        self._at("spend", request.host)
        return True

    def settled(self, request: Request, outcome: Outcome) -> None:
        self._at("settled", request.host)


class Warden(Temper):
    def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
        self._at("name" if port is None else "name_and_port", name)
        return ALLOW

    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        return ALLOW

    def tls_mode(self, name: str, port: int) -> str | None:
        self._at("tls_mode", name)
        return None

    def raw_tcp(self, name: str | None, address: Address, port: int) -> bool:
        self._at("raw_tcp", name)
        return False


class Desk(Temper):
    prefix = "/v1/unruly"

    async def handle(self, request: ControlRequest) -> ControlResponse:
        self._at("handle", request.path.rpartition("/")[2])
        return ControlResponse(200, {"fine": True})


class Reader(Temper):
    name = "unruly"

    def position(self, segment: str) -> int:
        return 0

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        for record in records:
            self._at("apply", record.host)


class Unruly:
    name: ClassVar[str] = "unruly"
    api: ClassVar[int] = 1
    Settings: ClassVar[type[BaseModel]] = UnrulySettings

    def __init__(self, settings: UnrulySettings, core: Core) -> None:
        self._settings = settings
        if settings.stage == "constructor":
            misbehave("raise")

    @classmethod
    def commands(cls) -> Sequence[Any]:
        return ()

    async def start(self) -> None:
        if self._settings.stage == "start":
            misbehave("raise")

    async def stop(self) -> None:
        if self._settings.stage == "stop":
            misbehave("raise")

    @hookimpl
    def creto_authorizer(self) -> Authorizer:
        if self._settings.stage == "hook":
            misbehave("raise")
        return Judge(self._settings)

    @hookimpl
    def creto_meter(self) -> Meter:
        return Counter(self._settings)

    @hookimpl
    def creto_gate(self) -> Gate:
        return Person(self._settings)

    @hookimpl
    def creto_egress_guard(self) -> EgressGuard:
        return Warden(self._settings)

    @hookimpl
    def creto_routes(self) -> Routes:
        return Desk(self._settings)

    @hookimpl
    def creto_consumer(self) -> Consumer | None:
        return Reader(self._settings) if self._settings.stage == "apply" else None
