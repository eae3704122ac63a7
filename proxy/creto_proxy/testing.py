"""For plugin authors: requests, a clock and a core that need no sidecar.

    from creto_proxy.testing import compose_plugin, make_request

    def test_refuses_the_listed_host(tmp_path):
        stages = compose_plugin(Example, tmp_path, {"denied": ["bad.example.com"]}).stages
        decision = stages.authorizers[0].authorize(make_request(host="bad.example.com"))
        assert decision.reason == "example_denied"
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from creto_proxy.config import Config, validate
from creto_proxy.hookspecs import Core, Plugin
from creto_proxy.layers import Draft
from creto_proxy.model import Agent, Decision, Flow, Kind, Outcome, Request, Usage, Verdict, Way
from creto_proxy.plugins import Found, Plugins, compose, implemented_hooks

EPOCH_NS = 1_767_225_600 * 10**9  # 2026-01-01T00:00:00Z


class FakeClock:
    """A ``Clock`` that only moves when told to. Both readings advance together."""

    def __init__(self, unix_ns: int = EPOCH_NS) -> None:
        self._unix_ns = unix_ns
        self._elapsed_ns = 0

    def now_ns(self) -> int:
        return self._elapsed_ns

    def unix_ns(self) -> int:
        return self._unix_ns + self._elapsed_ns

    def advance(self, seconds: float) -> None:
        """Raises ValueError for negative ``seconds``: time does not go back."""
        if seconds < 0:
            raise ValueError("a clock cannot go back")
        self._elapsed_ns += round(seconds * 1e9)


class FakeHeaders:
    """``Headers`` from pairs or a mapping, in order, names matched without case."""

    def __init__(self, fields: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        self._fields = list(fields.items() if isinstance(fields, Mapping) else fields)

    def get(self, name: str) -> str | None:
        return next(iter(self.getall(name)), None)

    def getall(self, name: str) -> list[str]:
        return [value for key, value in self._fields if key.lower() == name.lower()]

    def items(self) -> list[tuple[str, str]]:
        return list(self._fields)


class FakeClient:
    """The agent's side of a held call; ``interims`` are the 1xx statuses sent, ``gone`` may be set by the test."""

    def __init__(self) -> None:
        self.interims: list[int] = []
        self.gone = False

    def interim(self, status: int) -> None:
        if not self.gone:
            self.interims.append(status)


def make_agent(name: str = "tester", *, org: str = "acme", owner: str = "alice", expires_at: float = 4e9) -> Agent:
    """An agent delegated to by one human."""
    agent = f"spiffe://local/agent/{name}"
    return Agent(
        id=agent,
        name=name,
        chain=(f"spiffe://local/human/{owner}", agent),
        chain_digest=bytes(32),
        path=("platform", f"org:{org}", f"agent:{name}"),
        expires_at=expires_at,
        org=org,
    )


def make_flow(*, link: str = "test", way: Way = "explicit", peer: str = "test", sni: str | None = None) -> Flow:
    return Flow(id=1, link=link, way=way, peer=peer, sni=sni, tls=sni is not None)


def make_request(
    method: str = "GET",
    *,
    host: str = "api.example.com",
    path: str = "/",
    query: str = "",
    scheme: str = "https",
    port: int = 443,
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    body: bytes | None = None,
    agent: Agent | None = None,
    flow: Flow | None = None,
    kind: Kind = "http",
    received_ns: int = 0,
) -> Request:
    """A normalised request with a fresh id; ``action`` follows from kind and method as in the core."""
    reads = method in ("GET", "HEAD", "OPTIONS", "TRACE")
    return Request(
        id=uuid.uuid4().bytes,
        flow=flow or make_flow(sni=host if scheme == "https" else None),
        agent=agent or make_agent(),
        kind=kind,
        action=("httpRead" if reads else "httpWrite") if kind == "http" else kind,
        method=method,
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        query=query,
        headers=FakeHeaders(headers),
        received_ns=received_ns,
        body=body,
        sent_path=path,
    )


def make_outcome(
    request: Request, *, decision: str = "allow", status: int = 200, usage: Usage | None = None
) -> Outcome:
    """The journal record of ``request``, one millisecond long."""
    agent = request.agent
    return Outcome(
        id=request.id,
        at_unix_ns=EPOCH_NS,
        agent=agent.id,
        chain=agent.chain,
        chain_digest=agent.chain_digest,
        path=agent.path,
        link=request.flow.link,
        way=request.flow.way,
        kind=request.kind,
        action=request.action,
        method=request.method,
        scheme=request.scheme,
        host=request.host,
        port=request.port,
        target=request.path,
        decision=decision,
        reason="test",
        policies=(),
        approval_id=request.approval.id if request.approval else "",
        status=status,
        error="",
        usage=usage or Usage(),
        bytes_up=len(request.body or b""),
        bytes_down=0,
        creto_ns=1_000,
        held_ns=0,
        upstream_ns=999_000,
        total_ns=1_000_000,
    )


def allow(reason: str = "policy_permit") -> Decision:
    return Decision(Verdict.ALLOW, reason)


def escalate(*profiles: str, reason: str = "oversight_required") -> Decision:
    return Decision(Verdict.ESCALATE, reason, profiles=profiles or ("default",))


def make_core(state_dir: Path, *, clock: FakeClock | None = None, platform: object = None) -> Core:
    """A ``Core`` for a plugin under test. ``platform`` is None unless given: most plugins need none of it."""
    return Core(
        platform=cast(Any, platform),
        clock=clock or FakeClock(),
        state_dir=state_dir,
        policies_dir=state_dir / "policies",
        run="test",
    )


def make_config(sections: Mapping[str, Any] | None = None, *, plugins: Sequence[type[Plugin]] = ()) -> Config:
    """The defaults, with ``sections`` as a configuration file would have them. Raises ConfigError like the real one."""
    return validate(Draft(values=dict(sections or {})), {plugin.name: plugin.Settings for plugin in plugins})


def compose_plugin(
    plugin: type[Plugin], state_dir: Path, settings: Mapping[str, Any] | None = None, *, core: Core | None = None
) -> Plugins:
    """The plugin alone, validated, constructed and composed as the sidecar does it, but not started."""
    config = make_config({plugin.name: dict(settings or {})}, plugins=[plugin])
    found = Found(plugin.name, plugin, "test", "0", implemented_hooks(plugin))
    return compose([found], config, core or make_core(state_dir))
