"""The one place where failures become responses: problem+json that LLM SDKs print and MCP clients understand.

RFC 9457 problem details, with an ``error`` object beside them in the shape the OpenAI and Anthropic SDKs read, and as
JSON-RPC errors for whoever asked in JSON-RPC (MCP 2026-07-28: -32000..-32019 are implementation-defined; A2A 1.0 uses
-32001..-32009). Never 202: SDKs parse it as success.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import msgspec

from creto_proxy.errors import CretoError, Held, Refused, Transient
from creto_proxy.model import Decision, Request
from creto_proxy.protocols import a2a, jsonrpc

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
    if request is not None and (answer := _json_rpc(error, document, request)) is not None:
        status, body = answer
        return status, [("Content-Type", "application/json"), *headers], body
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


def _json_rpc(error: CretoError, document: dict[str, Any], request: Request) -> tuple[int, bytes] | None:
    """(status, body) for a client that speaks JSON-RPC, None when its request was none as far as it was read."""
    found = jsonrpc.said(request.body)
    if found is None:
        return None
    denied = jsonrpc.CODES.get(error.reason, JSONRPC_DENIED)
    code = JSONRPC_PENDING if isinstance(error, Held) else denied
    # A2A clients read errors out of answers that succeeded as HTTP, and look into no others; MCP clients read both.
    status = HTTPStatus.OK if a2a.speaks(found) else error.status
    return status, jsonrpc.errors(found, code, f"creto: {error.detail}", document)
