"""A2A in policy: what one agent asks of another, over JSON-RPC and REST, in every version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from creto_proxy.testing import make_request

from .protocol_lab import HTTP, PERMIT, Lab, post, rpc

AGENT = "agent.test"


def forbid(action: str) -> str:
    return f'@id("f") forbid (principal, action == Creto::Action::"{action}", resource);'


@pytest.mark.parametrize(
    ("method", "action"),
    [
        ("message/send", "a2aSend"),
        ("message/stream", "a2aSend"),
        ("SendMessage", "a2aSend"),
        ("SendStreamingMessage", "a2aSend"),
        ("tasks/get", "a2aRead"),
        ("tasks/resubscribe", "a2aRead"),
        ("GetTask", "a2aRead"),
        ("ListTasks", "a2aRead"),
        ("GetExtendedAgentCard", "a2aRead"),
        ("tasks/cancel", "a2aWrite"),
        ("CancelTask", "a2aWrite"),
        ("tasks/pushNotificationConfig/set", "a2aWrite"),
        ("tasks/pushNotificationConfig/get", "a2aRead"),
        ("DeleteTaskPushNotificationConfig", "a2aWrite"),
    ],
)
def test_methods_have_actions(tmp_path: Path, method: str, action: str) -> None:
    request = post(rpc(method, {"id": "t"}), host=AGENT, path="/")
    assert Lab(tmp_path, PERMIT, forbid(action)).judge(request).policies == ("f",)
    for other in {"a2aSend", "a2aRead", "a2aWrite"} - {action}:
        assert Lab(tmp_path, PERMIT, forbid(other)).judge(post(rpc(method), host=AGENT)).allowed


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", "/message:send", "a2aSend"),
        ("POST", "/tenant/message:stream", "a2aSend"),
        ("POST", "/v1/message:send", "a2aSend"),
        ("POST", "/tasks/7:cancel", "a2aWrite"),
        ("GET", "/tasks/7:subscribe", "a2aRead"),
        ("POST", "/tasks/7:subscribe", "a2aRead"),
        ("GET", "/tasks/7/pushNotificationConfigs", "a2aRead"),
        ("POST", "/tasks/7/pushNotificationConfigs", "a2aWrite"),
        ("DELETE", "/tasks/7/pushNotificationConfigs/1", "a2aWrite"),
        ("GET", "/.well-known/agent-card.json", "a2aRead"),
        ("GET", "/.well-known/agent.json", "a2aRead"),
    ],
)
def test_rest_paths_have_actions_whatever_is_declared(tmp_path: Path, method: str, path: str, action: str) -> None:
    lab = Lab(tmp_path, PERMIT, forbid(action))
    for spelling in (path, path.replace(":", "%3A"), path + "/" if path.endswith("l") else path):
        body = b"{}" if method == "POST" else None
        request = make_request(method, host=AGENT, path=spelling, body=body)
        assert lab.judge(request).policies == ("f",), spelling
        assert request.resource.startswith("a2a:")


def test_common_paths_are_a2a_only_when_they_say_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, forbid("a2aRead"), a2a=["known.test"])
    for path in ("/tasks", "/tasks/7", "/extendedAgentCard"):
        assert lab.judge(make_request("GET", host=AGENT, path=path)).allowed
        assert not lab.judge(make_request("GET", host=AGENT, path=path, headers={"A2A-Version": "1.0"})).allowed
        assert not lab.judge(make_request("GET", host="known.test", path=path)).allowed
    assert not lab.judge(make_request("GET", host="known.test", path="/anything")).allowed
    assert lab.judge(post(b"not json-rpc", host="known.test")).status == 400


def test_permits_speak_for_their_protocol_alone(tmp_path: Path) -> None:
    ask = '@id("ask") permit (principal, action == Creto::Action::"a2aSend", resource == Creto::Host::"agent.test");'
    lab = Lab(tmp_path, HTTP, ask)
    assert lab.judge(post(rpc("SendMessage"), host=AGENT)).allowed
    assert lab.judge(post(rpc("tools/call", {"name": "x"}), host=AGENT)).allowed
    narrowed = Lab(tmp_path, HTTP, ask.replace(";", " when { context.depth > 5 };"))
    assert narrowed.judge(post(rpc("SendMessage"), host=AGENT)).reason == "policy_no_permit"


def test_a_name_of_both_protocols_is_judged_under_both(tmp_path: Path) -> None:
    for action in ("mcpRead", "a2aRead"):
        assert Lab(tmp_path, PERMIT, forbid(action)).judge(post(rpc("tasks/get", {"id": "1"}))).policies == ("f",)


@pytest.mark.parametrize("id", [1, "a", None])
def test_refusals_are_json_rpc_errors(tmp_path: Path, id: Any) -> None:
    message = rpc("SendMessage", {"message": {}}, id=id)
    status, document = Lab(tmp_path, PERMIT, forbid("a2aSend")).refusal(post(message, host=AGENT))
    assert status == 200, "A2A clients look into no other answer"
    assert document["jsonrpc"] == "2.0" and document["id"] == id
    assert document["error"]["code"] == -32010 and document["error"]["data"]["policies"] == ["f"]
