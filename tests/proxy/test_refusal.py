"""Refusals are problem+json that SDKs print, and JSON-RPC errors for MCP clients."""

from __future__ import annotations

import json

from creto_proxy.errors import Held, Permanent, Refused, Transient
from creto_proxy.model import Decision, Verdict
from creto_proxy.refusal import render
from creto_proxy.testing import make_request


def test_a_denial_names_reason_policies_and_request() -> None:
    request = make_request()
    denied = Refused(Decision(Verdict.DENY, "policy_forbid", "No.", policies=("no-imds",)))
    status, headers, body = render(denied, request)
    document = json.loads(body)
    assert status == 403 and dict(headers)["Content-Type"] == "application/problem+json"
    assert document["reason"] == "policy_forbid" and document["policies"] == ["no-imds"]
    assert document["request_id"] == request.id.hex()
    assert document["error"]["message"] == "creto: No."


def test_a_spent_budget_tells_sdks_not_to_retry_and_a_rate_limit_lets_them() -> None:
    def fields(reason: str) -> dict[str, str]:
        decision = Decision(Verdict.DENY, reason, "x", status=429, retry_after_s=1.2, facts={"limit": 5})
        status, headers, body = render(Refused(decision), make_request())
        assert status == 429 and json.loads(body)["limit"] == 5
        return dict(headers)

    assert fields("budget_exhausted")["X-Should-Retry"] == "false"
    assert fields("budget_exhausted")["Retry-After"] == "2", "rounded up: earlier would be refused again"
    assert "X-Should-Retry" not in fields("rate_exceeded")


def test_a_pending_approval_is_428_that_sdks_retry() -> None:
    held = Held("Wait.", approval_id="ovr_1", facts={"poll": "/v1/approvals/ovr_1", "retry_after_s": 7})
    status, headers, body = render(held, make_request())
    assert status == 428
    assert dict(headers)["X-Should-Retry"] == "true" and dict(headers)["Retry-After"] == "7"
    assert json.loads(body)["approval_id"] == "ovr_1" and json.loads(body)["poll"] == "/v1/approvals/ovr_1"


def test_mcp_callers_get_a_json_rpc_error_with_their_id() -> None:
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "shell"}}
    request = make_request(
        "POST", headers={"Accept": "application/json, text/event-stream"}, body=json.dumps(call).encode()
    )
    status, headers, body = render(Refused(Decision(Verdict.DENY, "policy_forbid", "No shell.")), request)
    document = json.loads(body)
    assert (status, document["jsonrpc"], document["id"]) == (403, "2.0", 7)
    assert document["error"]["code"] == -32010 and "No shell." in document["error"]["message"]
    assert dict(headers)["Content-Type"] == "application/json"


def test_a_body_that_only_claims_to_be_json_rpc_gets_a_problem() -> None:
    request = make_request("POST", headers={"Mcp-Method": "tools/list"}, body=b"{not json")
    _, headers, _ = render(Permanent("No."), request)
    assert dict(headers)["Content-Type"] == "application/problem+json"


def test_transient_failures_say_when_to_come_back() -> None:
    _, headers, _ = render(Transient("Full.", retry_after_s=0.2), None)
    assert dict(headers)["Retry-After"] == "1"
