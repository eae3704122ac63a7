"""Policies over requests that carry protocols: the real engine, the real stage, requests made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from creto_platform.authz import EmbeddedAuthz
from creto_proxy.authorize import Policy
from creto_proxy.errors import Refused
from creto_proxy.model import Decision, Request
from creto_proxy.protocols import Inspector, Providers
from creto_proxy.refusal import render
from creto_proxy.testing import make_request

PERMIT = '@id("all") permit (principal, action in Creto::Action::"egress", resource);'
HTTP = '@id("http") permit (principal, action in [Creto::Action::"httpRead", Creto::Action::"httpWrite"], resource);'
APPROVED = "context has approval && context.approval.satisfied && context.approval.fingerprint == context.fingerprint"


_ENGINES: dict[tuple[str, Any], EmbeddedAuthz] = {}


def _engine(directory: Path, policies: str, zones: tuple[tuple[str, Any], ...]) -> EmbeddedAuthz:
    """Checking policies takes long, and answers hang on nothing but the question: one engine for equal policies."""
    if (policies, zones) not in _ENGINES:
        (directory / "lab.cedar").write_text(policies)
        _ENGINES[policies, zones] = EmbeddedAuthz(directory, zones=dict(zones) or None)
    return _ENGINES[policies, zones]


class Lab:
    """One policy stage; ``judge`` gives what it says of a request that has been read as far as the stage wants."""

    def __init__(self, directory: Path, *policies: str, zones: Any = None, **protocols: Any) -> None:
        self.authz = _engine(directory, "\n".join(policies), tuple((zones or {}).items()))
        providers = Providers(protocols.pop("llm", {}))
        self.policy = Policy(self.authz, inspector=Inspector(self.authz, providers, **protocols))

    def judge(self, request: Request) -> Decision:
        """Bodies the stage does not ask for are not there, as in the proxy."""
        if not self.policy.body_limit(request):
            request.body = None
        try:
            return self.policy.authorize(request)
        except Refused as error:
            return error.decision

    def refusal(self, request: Request) -> tuple[int, Any]:
        """Status and document that the agent gets."""
        decision = self.judge(request)
        assert not decision.allowed
        status, _, body = render(Refused(decision), request)
        return status, json.loads(body)


def rpc(method: str, params: Any = None, *, id: Any = 1) -> dict[str, Any]:
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if id is not None:
        message["id"] = id
    return message if params is None else {**message, "params": params}


def tool_call(name: str, *, id: Any = 1, **arguments: Any) -> dict[str, Any]:
    return rpc("tools/call", {"name": name, "arguments": arguments}, id=id)


def post(
    body: Any, *, host: str = "mcp.test", path: str = "/mcp", headers: Mapping[str, str] | None = None, method: str = "POST"
) -> Request:
    """A POST of JSON that declares nothing."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return make_request(
        method, host=host, path=path, headers={"Content-Type": "application/json", **(headers or {})}, body=raw
    )
