"""Cedar policy first, then whatever plugins add (quota above all); the strictest answer wins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from creto_platform.authz import Authz, Query
from creto_proxy.egress import literal
from creto_proxy.model import Decision, Request, Verdict
from creto_proxy.settings import Extract

READS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_VERDICTS = {"allow": Verdict.ALLOW, "oversight": Verdict.ESCALATE, "deny": Verdict.DENY}


def action_of(method: str) -> str:
    """The Cedar action of an HTTP method: safe methods read, everything else writes (RFC 9110 section 9.2.1)."""
    return "httpRead" if method in READS else "httpWrite"


def applies(rule: Extract, request: Request) -> bool:
    """True when an extract rule is for this request; ``*.x`` stands for any name below x."""
    host = rule.host
    if host != "*" and host != request.host and not (host.startswith("*.") and request.host.endswith(host[1:])):
        return False
    return fnmatchcase(request.path, rule.path)


def speaks_mcp(request: Request) -> bool:
    """True for Model Context Protocol over HTTP, whose clients understand refusals only as JSON-RPC errors."""
    if request.method != "POST":
        return False
    if request.headers.get("mcp-protocol-version") or request.headers.get("mcp-method"):
        return True
    accept = request.headers.get("accept") or ""
    return "application/json" in accept and "text/event-stream" in accept


class Policy:
    """The core's own authorizer: asks the authz port with exactly the context that the loaded policies read."""

    def __init__(self, authz: Authz, extracts: Sequence[Extract] = (), *, body_bytes: int = 1 << 20) -> None:
        self._authz = authz
        self._extracts = tuple(extracts)
        self._body_bytes = body_bytes

    def body_limit(self, request: Request) -> int:
        if speaks_mcp(request) or any(applies(rule, request) for rule in self._extracts):
            return self._body_bytes
        return 0

    def authorize(self, request: Request) -> Decision:
        """ALLOW, DENY or ESCALATE with the determining policies; an error of the engine is a DENY."""
        agent = request.agent
        answer = self._authz.decide(
            Query(
                principal=agent.id,
                org=agent.org,
                env=agent.env,
                owner=agent.root,
                action=request.action,
                host=request.host,
                context=self._context(request),
                expires_ns=int(agent.expires_at * 1e9),
            )
        )
        return Decision(
            verdict=_VERDICTS[answer.verdict],
            reason=answer.reason,
            detail=answer.detail,
            policies=answer.policies,
            profiles=answer.profiles,
            obligations=answer.obligations,
        )

    def _context(self, request: Request) -> dict[str, Any]:
        reads = self._authz.reads(request.action)
        context: dict[str, Any] = {}
        for name in reads:
            source = _CONTEXT.get(name)
            if source is not None:
                value = source(request)
                if value is not None:
                    context[name] = value
        for rule in self._extracts:
            if rule.attribute in reads and applies(rule, request):
                value = _extracted(rule, request.body)
                if value is not None:
                    context[rule.attribute] = value
        return context


def _extracted(rule: Extract, body: bytes | None) -> str | int | bool | None:
    if not body:
        return None
    try:
        value = json_pointer(msgspec.json.decode(body), rule.field)
    except msgspec.DecodeError:
        return None
    # Cedar knows whole numbers and strings; a float must not be rounded into a permission.
    if isinstance(value, (str, bool)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    return None


def json_pointer(document: Any, pointer: str) -> Any:
    """The value at an RFC 6901 pointer, None when there is none."""
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and key.isascii() and key.isdigit() and int(key) < len(document):
            document = document[int(key)]
        else:
            return None
    return document


def _literal(request: Request) -> str | None:
    address = literal(request.host)
    return None if address is None else str(address)


def _model(request: Request) -> str | None:
    if not request.body:
        return None
    try:
        document = msgspec.json.decode(request.body)
    except msgspec.DecodeError:
        return None
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) else None


def _approval(request: Request) -> dict[str, Any] | None:
    approval = request.approval
    if approval is None:
        return None
    return {
        "id": approval.id,
        "satisfied": approval.satisfied,
        "approvals": approval.approvals,
        "groups": sorted(approval.groups),
        "fingerprint": approval.fingerprint,
        "profiles": list(approval.profiles),
    }


_CONTEXT: dict[str, Any] = {
    "method": lambda r: r.method,
    "path": lambda r: r.path,
    "scheme": lambda r: r.scheme,
    "way": lambda r: r.flow.way,
    "port": lambda r: r.port,
    "depth": lambda r: r.agent.depth,
    "root": lambda r: r.agent.root,
    "fingerprint": lambda r: r.fingerprint,
    "now": lambda r: time.time_ns(),
    "ip": _literal,
    "model": _model,
    "approval": _approval,
}
