"""Cedar policy first, then whatever plugins add (quota above all); the strictest answer wins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from creto_platform.authz import Authz, Query, Watch
from creto_platform.authz.reads import ATTRIBUTES
from creto_proxy.bodies import AmbiguousBody, json_pointer
from creto_proxy.egress import literal
from creto_proxy.errors import Refused
from creto_proxy.model import Decision, Lease, Request, Verdict
from creto_proxy.paths import readings
from creto_proxy.protocols import Call, Inspector, Providers, resource_of
from creto_proxy.protocols.detect import METHOD_OVERRIDES, READS, essence
from creto_proxy.protocols.jsonrpc import BATCH
from creto_proxy.settings import Extract

# Header fields by which common frameworks take another path than the request line says.
PATH_OVERRIDES = ("x-original-url", "x-rewrite-url")
# What an answer may depend on that is the same for every request of one shape.
_SHAPE = frozenset({"method", "scheme", "way", "port", "depth", "root", "ip", "fingerprint", "path"})
# What a body that is plain says of itself, with the head that it comes with.
_ASK = ATTRIBUTES["llm"]
NO_PERMIT = "policy_no_permit"
_VERDICTS = {"allow": Verdict.ALLOW, "oversight": Verdict.ESCALATE, "deny": Verdict.DENY}


def action_of(method: str, *, upgrades: bool = False) -> str:
    """The Cedar action of an HTTP method: safe methods read, everything else writes (RFC 9110 section 9.2.1).

    upgrades: the connection is to become something else (WebSocket), over which anything can be written.
    """
    return "httpRead" if method in READS and not upgrades else "httpWrite"


def applies(rule: Extract, request: Request) -> bool:
    """True when an extract rule is for this request; ``*.x`` stands for any name below x."""
    if not _may_apply(rule, request.host):
        return False
    return any(fnmatchcase(path, rule.path) for path in readings(request.path))


def _may_apply(rule: Extract, host: str) -> bool:
    return rule.host in ("*", host) or (rule.host.startswith("*.") and host.endswith(rule.host[1:]))


class Policy:
    """The core's own authorizer: asks the authz port with exactly the context that the loaded policies read."""

    def __init__(
        self,
        authz: Authz,
        extracts: Sequence[Extract] = (),
        *,
        body_bytes: int = 1 << 20,
        inspector: Inspector | None = None,
    ) -> None:
        self._authz = authz
        self._inspector = inspector or Inspector(authz, Providers())
        self._extracts = tuple(extracts)
        self._body_bytes = body_bytes

    def body_limit(self, request: Request) -> int:
        if self._inspector.wants_body(request) or any(applies(rule, request) for rule in self._extracts):
            return self._body_bytes
        return 0

    def lease(self, request: Request) -> Lease | None:
        """That the answer to ``request``, which was ALLOW, holds for others like it; None when it may not."""
        calls = self._inspector.calls(request)
        asks = bool(calls or self.body_limit(request))
        if asks and (request.ask is None or any(call.action != "llmCall" for call in calls)):
            return None
        if asks and any(applies(rule, request) for rule in self._extracts):
            return None
        watch = self._authz.watch(request.host)
        judged: list[tuple[str, Call | None]] = [(request.action, call) for call in calls or (None,)]
        judged += [(call.action, call) for call in calls if call.action in watch.actions]
        reads: set[str] = set()
        for action, call in judged:
            found = self._authz.lasting(self._query(request, action, request.method, request.path, call))
            if found is None:
                return None
            reads |= found
        if not reads <= (_SHAPE | _ASK if asks else _SHAPE):
            return None
        by_path = asks or "path" in reads or self._inspector.looks_at_paths(request.host)
        return Lease(exact=by_path or any(_may_apply(rule, request.host) for rule in self._extracts), asks=asks)

    def authorize(self, request: Request) -> Decision:
        """ALLOW, DENY or ESCALATE with the determining policies; an error of the engine is a DENY.

        Permits are looked for under the path and method as they stand; what is forbidden is forbidden under every
        reading of the path, and a method that the server is asked to take instead must be permitted as well.

        What is said inside, in MCP, A2A or to a model, is judged besides the request itself, each message of a batch
        on its own; the strictest answer is that of the whole request. A permit for the request is enough for what is
        inside until a permit that can match this host speaks of that: then it needs one, too.

        Raises Refused for header fields that replace the path, and for bodies that parsers read differently.
        """
        calls = self._inspector.calls(request)
        if not calls:
            return self._transport(request, None)
        request.resource = resource_of(calls)
        watch = self._authz.watch(request.host)
        decision = self._inside(request, calls[0], watch)
        for call in calls[1:]:
            decision = decision.stricter(self._inside(request, call, watch))
        return decision

    def _inside(self, request: Request, call: Call, watch: Watch) -> Decision:
        decision = self._transport(request, call)
        if call.action not in watch.actions or decision.verdict is Verdict.DENY:
            return decision
        answer = self._over_paths(request, call.action, call)
        if answer.reason == NO_PERMIT and call.action not in watch.permits:
            return decision
        return decision.stricter(answer)

    def _transport(self, request: Request, call: Call | None) -> Decision:
        decision = self._over_paths(request, request.action, call)
        for method in _overriding(request):
            decision = decision.stricter(self._judge(request, action_of(method), method, request.path, call))
        return decision

    def _over_paths(self, request: Request, action: str, call: Call | None) -> Decision:
        decision = self._judge(request, action, request.method, request.path, call)
        if "path" in self._authz.reads(action):
            for path in readings(request.path)[1:]:
                other = self._judge(request, action, request.method, path, call)
                if other.verdict is not Verdict.ALLOW and other.reason != NO_PERMIT:
                    decision = decision.stricter(other)
        return decision

    def _judge(self, request: Request, action: str, method: str, path: str, call: Call | None) -> Decision:
        answer = self._authz.decide(self._query(request, action, method, path, call))
        return Decision(
            verdict=_VERDICTS[answer.verdict],
            reason=answer.reason,
            detail=answer.detail,
            policies=answer.policies,
            profiles=answer.profiles,
            obligations=answer.obligations,
        )

    def _query(self, request: Request, action: str, method: str, path: str, call: Call | None) -> Query:
        agent = request.agent
        return Query(
            principal=agent.id,
            org=agent.org,
            env=agent.env,
            owner=agent.root,
            action=action,
            host=request.host,
            context=self._context(request, action, method, path, call),
            expires_ns=int(agent.expires_at * 1e9),
        )

    def _context(self, request: Request, action: str, method: str, path: str, call: Call | None) -> dict[str, Any]:
        reads = self._authz.reads(action)
        asked = {"method": method, "path": path}
        context: dict[str, Any] = {name: value for name, value in asked.items() if name in reads}
        if call is not None:
            context.update((name, value) for name, value in call.attributes if name in reads)
        for name in reads:
            source = _CONTEXT.get(name)
            if source is not None and name not in context:
                value = source(request)
                if value is not None:
                    context[name] = value
        for rule in self._extracts:
            if rule.attribute in reads and applies(rule, request):
                if call is not None and (request.body or b"").lstrip().startswith(b"["):
                    raise _bad(BATCH, "Policy decides on a field of this message; send it alone, not in a batch.")
                value = _extracted(request, rule.field)
                if value is not None:
                    context[rule.attribute] = value
        return context


def _overriding(request: Request) -> set[str]:
    """Methods that the server is asked to take instead of the one in the request line. Raises Refused when it is
    asked to take another path."""
    headers = request.headers
    for name in PATH_OVERRIDES:
        if headers.get(name) is not None:
            raise _bad("path_override", f"{name} asks the server to take another path than the one judged.")
    methods = {value.strip().upper() for name in METHOD_OVERRIDES for value in headers.getall(name)}
    return methods - {request.method}


def _extracted(request: Request, pointer: str) -> str | int | bool | None:
    """The value at ``pointer`` in a JSON body, None when there is none or it is neither text nor a whole number.

    Raises Refused when the server might find another value there.
    """
    if not request.body:
        return None
    declared = essence(request.headers.get("content-type"))
    says_json = declared in ("", "application/json", "text/json") or declared.endswith("+json")
    if (request.headers.get("content-encoding") or "identity").strip().lower() != "identity":
        raise _bad("unreadable_body", "Policy decides on the body of this request; send it unencoded.")
    try:
        value = json_pointer(request.body, pointer)
    except AmbiguousBody as error:
        raise _bad("ambiguous_body", f"Parsers would read the body differently: {error}.") from None
    except ValueError:
        if says_json:
            raise _bad("unreadable_body", "Policy decides on the body, which is not UTF-8 JSON.") from None
        return None
    # Cedar knows whole numbers and strings; a float must not be rounded into a permission.
    if isinstance(value, (str, bool)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    return None


def _bad(reason: str, detail: str) -> Refused:
    return Refused(Decision(Verdict.DENY, reason, detail, status=400))


def _literal(request: Request) -> str | None:
    address = literal(request.host)
    return None if address is None else str(address)


def _model(request: Request) -> str | None:
    model = _extracted(request, "/model")
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
