"""The examples for protocols do what their comments say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from creto_platform.authz import EmbeddedAuthz, bundled_policies
from creto_proxy.authorize import Policy
from creto_proxy.model import Decision, Request, Verdict
from creto_proxy.testing import make_agent

from .protocol_lab import post, rpc, tool_call

FORGE, PARTNER = "mcp.forge.example", "agent.partner.example"


@pytest.fixture(scope="module")
def policy() -> Policy:
    zones = {"llm": ["api.openai.com", "api.anthropic.com"]}
    return Policy(EmbeddedAuthz(bundled_policies() / "examples", zones=zones))


def judge(policy: Policy, request: Request, *, env: str = "dev", depth: int = 1) -> Decision:
    agent = make_agent(org="local")
    request.agent = replace(agent, env=env, chain=(agent.chain[0], *[agent.id] * depth))
    return policy.authorize(request)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (tool_call("list_issues"), "policy_permit"),
        (rpc("tools/list"), "policy_permit"),
        (rpc("resources/read", {"uri": "repo://x/readme"}), "policy_permit"),
        (rpc("resources/read", {"uri": "repo://x/secrets/key"}), "policy_forbid"),
        (tool_call("merge_pull_request", number=7), "oversight_required"),
        (tool_call("create_issue"), "policy_no_permit"),
        (tool_call("delete_repository"), "policy_forbid"),
        ([tool_call("list_issues"), tool_call("merge_pull_request", id=2)], "oversight_required"),
    ],
)
def test_tools(policy: Policy, message: Any, expected: str) -> None:
    assert judge(policy, post(message, host=FORGE)).reason == expected


def test_agents(policy: Policy) -> None:
    send, cancel = rpc("SendMessage"), rpc("CancelTask", {"id": "t"})
    assert judge(policy, post(send, host=PARTNER)).obligations == ("rate:60/m",)
    assert judge(policy, post(cancel, host=PARTNER)).allowed
    assert judge(policy, post(cancel, host=PARTNER), depth=2).reason == "policy_no_permit"
    push = rpc("CreateTaskPushNotificationConfig")
    assert judge(policy, post(push, host=PARTNER)).reason == "policy_no_permit"
    assert judge(policy, post(send, host="agent.other.example")).verdict is Verdict.DENY


def test_models(policy: Policy) -> None:
    def chat(model: str, **more: Any) -> Request:
        return post({"model": model, "messages": [], **more}, host="api.openai.com", path="/v1/chat/completions")

    assert judge(policy, chat("gpt-4o-mini")).allowed
    assert judge(policy, chat("o3")).reason == "policy_no_permit"
    assert judge(policy, chat("claude-2.0")).reason == "policy_forbid"
    assert judge(policy, chat("gpt-4o"), env="prod").policies == ("models-bounded",)
    assert judge(policy, chat("gpt-4o", max_tokens=4096), env="prod").allowed
