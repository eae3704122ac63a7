"""The one place where failures become responses: problem+json that LLM SDKs print and MCP clients understand.

RFC 9457 problem details, with an ``error`` object beside them in the shape the OpenAI and Anthropic SDKs read, and as
a JSON-RPC error for MCP (2026-07-28, -32000..-32019 are implementation-defined). Never 202: SDKs parse it as success.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import msgspec

from creto_proxy.authorize import speaks_mcp
from creto_proxy.errors import CretoError, Held, Refused, Transient
from creto_proxy.model import Decision, Request

JSONRPC_DENIED = -32010
JSONRPC_PENDING = -32011

Answer = tuple[int, list[tuple[str, str]], bytes]


def render(error: CretoError, request: Request | None) -> Answer:
    """(status, header fields, body) of the refusal an agent sees."""
    document: dict[str, Any] = {
        "type": f"urn:creto:problem:{error.reason.replace('_', '-')}",
        "title": _title(error.status),
        "status": error.status,
        "detail": error.detail,
        "reason": error.reason,
    }
    headers = [("Cache-Control", "no-store")]
    if request is not None:
        document["request_id"] = request.id.hex()
    if isinstance(error, Refused):
        _describe_decision(error.decision, document, headers)
    elif isinstance(error, Held):
        document.update(error.facts)
        document["approval_id"] = error.approval_id
        # The SDKs retry any status when told to, and the retry joins the same approval.
        retry_s = document.setdefault("retry_after_s", 30)
        headers += [("Retry-After", str(retry_s)), ("X-Should-Retry", "true")]
    elif isinstance(error, Transient):
        headers.append(("Retry-After", str(max(1, math.ceil(error.retry_after_s)))))
    if request is not None and speaks_mcp(request) and (answer := _json_rpc(error, document, request)) is not None:
        return error.status, [("Content-Type", "application/json"), *headers], answer
    document["error"] = {"type": error.reason, "code": error.reason, "message": f"creto: {error.detail}"}
    return error.status, [("Content-Type", "application/problem+json"), *headers], msgspec.json.encode(document)


def _describe_decision(decision: Decision, document: dict[str, Any], headers: list[tuple[str, str]]) -> None:
    if decision.policies:
        document["policies"] = list(decision.policies)
    document.update({key: value for key, value in decision.facts.items() if key not in document})
    if decision.retry_after_s is not None:
        retry_s = max(1, math.ceil(decision.retry_after_s))
        document["retry_after_s"] = retry_s
        headers.append(("Retry-After", str(retry_s)))
    if decision.status == HTTPStatus.TOO_MANY_REQUESTS and not decision.reason.startswith("rate"):
        # A spent budget does not come back within an SDK's backoff; let it fail at once, readably.
        headers.append(("X-Should-Retry", "false"))


def _title(status: int) -> str:
    if status == 428:
        return "Approval required"
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"


def _json_rpc(error: CretoError, document: dict[str, Any], request: Request) -> bytes | None:
    try:
        call = msgspec.json.decode(request.body or b"")
    except msgspec.DecodeError:
        return None
    if not isinstance(call, dict) or call.get("jsonrpc") != "2.0":
        return None
    code = JSONRPC_PENDING if isinstance(error, Held) else JSONRPC_DENIED
    body = {"code": code, "message": f"creto: {error.detail}", "data": document}
    return msgspec.json.encode({"jsonrpc": "2.0", "id": call.get("id"), "error": body})
