"""Model calls in policy: provider, model and parameters, from host, path and body."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from creto_proxy.model import Request
from creto_proxy.protocols import llm
from creto_proxy.testing import make_request

from .protocol_lab import HTTP, PERMIT, Lab, post, rpc

OPENAI, CHAT = "api.openai.com", "/v1/chat/completions"
NO_LARGE = '@id("no-large") forbid (principal, action == Creto::Action::"llmCall", resource) when { context has model && context.model like "gpt-4*" };'
NO_MODEL = '@id("no-model") forbid (principal, action == Creto::Action::"llmCall", resource in Creto::Model::"gpt-4o");'


def chat(model: str = "gpt-4o", *, host: str = OPENAI, path: str = CHAT, **more: Any) -> Request:
    return post({"model": model, "messages": [], **more}, host=host, path=path)


def attributes(host: str, path: str, body: Any = None, **configured: str) -> Mapping[str, Any]:
    """Every attribute of a call."""
    request = post({} if body is None else body, host=host, path=path)
    endpoint = llm.Providers(configured).of(request)
    assert endpoint is not None
    return dict(llm.call(endpoint, request, request.body, llm.ATTRIBUTES).attributes)


@pytest.mark.parametrize(
    ("host", "path", "body", "expected"),
    [
        (OPENAI, CHAT, {"model": "gpt-4o", "stream": True, "max_tokens": 5, "tools": [{}, {}]}, "openai chat gpt-4o stream 5 2"),
        (OPENAI, "/v1/responses", {"model": "gpt-5", "max_output_tokens": 9}, "openai responses gpt-5 - 9 -"),
        (OPENAI, "/v1/embeddings", {"model": "e"}, "openai embedding e - - -"),
        (OPENAI, "/v1/images/generations", {"model": "i"}, "openai other i - - -"),
        ("x.openai.azure.com", "/openai/deployments/prod/chat/completions", {"model": "ignored"}, "azure chat prod - - -"),
        ("x.openai.azure.com", "/openai/v1/chat/completions", {"model": "m"}, "azure chat m - - -"),
        ("api.anthropic.com", "/v1/messages", {"model": "claude", "max_tokens": 7, "stream": False}, "anthropic messages claude once 7 -"),
        ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-pro:generateContent",
         {"generationConfig": {"maxOutputTokens": 8}, "tools": [{}]}, "google chat gemini-2.5-pro - 8 1"),
        ("generativelanguage.googleapis.com", "/v1beta/models/g:generateContent", {"generation_config": {"max_output_tokens": 8}}, "google chat g - 8 -"),
        ("aiplatform.us.rep.googleapis.com", "/v1/projects/p/locations/us/publishers/google/models/g:generateContent", {}, "google-vertex chat g - - -"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "/model/amazon.titan-embed-text-v1/invoke", {"inputText": "x"}, "bedrock embedding amazon.titan-embed-text-v1 - - -"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "/model/meta.llama3/invoke", {"prompt": "x", "max_gen_len": 5}, "bedrock chat meta.llama3 - 5 -"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "/model/amazon.titan/invoke", {"textGenerationConfig": {"maxTokenCount": 5}}, "bedrock chat amazon.titan - 5 -"),
        ("bedrock-mantle.us-east-1.api.aws", "/v1/chat/completions", {"model": "m"}, "bedrock chat m - - -"),
        ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-pro:streamGenerateContent", {}, "google chat gemini-2.5-pro stream - -"),
        ("generativelanguage.googleapis.com", "/v1beta/models/e:embedContent", {}, "google embedding e - - -"),
        ("europe-west1-aiplatform.googleapis.com", "/v1/projects/p/locations/l/publishers/google/models/gemini:generateContent", {},
         "google-vertex chat gemini - - -"),
        ("europe-west1-aiplatform.googleapis.com", "/v1/projects/p/locations/l/publishers/anthropic/models/claude:streamRawPredict",
         {"max_tokens": 3}, "google-vertex chat claude stream 3 -"),
        ("bedrock-runtime.eu-west-1.amazonaws.com", "/model/anthropic.claude-3%3A0/converse",
         {"inferenceConfig": {"maxTokens": 6}, "toolConfig": {"tools": [{}]}}, "bedrock chat anthropic.claude-3:0 - 6 1"),
        ("bedrock-runtime-fips.us-east-1.amazonaws.com", "/model/arn%3Aaws%3Abedrock%2Fx/invoke-with-response-stream", {"max_tokens": 2},
         "bedrock chat arn:aws:bedrock/x stream 2 -"),
        ("api.mistral.ai", "/v1/chat/completions", {"model": "mistral-large"}, "mistral chat mistral-large - - -"),
        ("api.mistral.ai", "/v1/fim/completions", {"model": "codestral"}, "mistral completion codestral - - -"),
        ("api.cohere.com", "/v2/chat", {"model": "command-a", "max_tokens": 1}, "cohere chat command-a - 1 -"),
        ("api.cohere.com", "/v2/rerank", {"model": "rerank"}, "cohere rerank rerank - - -"),
        ("ollama.test", "/api/chat", {"model": "llama3", "options": {"num_predict": 4}}, "ollama chat llama3 stream 4 -"),
        ("ollama.test", "/v1/chat/completions", {"model": "llama3", "stream": False}, "ollama chat llama3 once - -"),
        ("vllm.test", "/v1/completions", {"model": "q"}, "openai completion q - - -"),
    ],
)  # fmt: skip
def test_every_provider_is_understood(host: str, path: str, body: Any, expected: str) -> None:
    found = attributes(host, path, body, **{"ollama.test": "ollama", "vllm.test": "openai"})
    provider, operation, model, stream, limit, tools = expected.split()
    assert (found["provider"], found["operation"], found["model"]) == (provider, operation, model)
    assert found.get("stream") == {"stream": True, "once": False, "-": None}[stream]
    assert (found.get("max_tokens"), found.get("tools")) == tuple(None if n == "-" else int(n) for n in (limit, tools))


@pytest.mark.parametrize("rule", [NO_LARGE, NO_MODEL])
def test_a_forbidden_model_is_refused_and_named(tmp_path: Path, rule: str) -> None:
    lab = Lab(tmp_path, PERMIT, rule)
    request = chat("gpt-4o")
    assert lab.judge(request).reason == "policy_forbid" and request.resource == "model:gpt-4o"
    allowed = chat("gpt-3.5-turbo")
    assert lab.judge(allowed).allowed and allowed.resource == "model:gpt-3.5-turbo"


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/", "/v1//chat/completions", "/v1/chat%2Fcompletions", "/V1/Chat/Completions", "/v1/chat;x=1/completions"]
)
def test_no_spelling_of_the_path_hides_a_model(tmp_path: Path, path: str) -> None:
    assert Lab(tmp_path, PERMIT, NO_LARGE).judge(chat(path=path)).reason == "policy_forbid"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"gpt-3.5","model":"gpt-4o"}', b'{"model":"gpt-3.5","Model":"gpt-4o"}', b'{"mod\\u0065l":"gpt-3.5","model":"gpt-4o"}',
        b'["gpt-4o"]', b"{", b'{"model":"\\ud800"}', b"model=gpt-4o",
    ],
)  # fmt: skip
def test_a_model_that_servers_may_read_differently_is_400(tmp_path: Path, body: bytes) -> None:
    assert Lab(tmp_path, PERMIT, NO_LARGE).judge(post(body, host=OPENAI, path=CHAT)).status == 400


def test_declaring_another_protocol_does_not_hide_a_model(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_LARGE)
    both = {**rpc("ping"), "model": "gpt-4o", "messages": []}
    for fields in ({"Mcp-Session-Id": "s"}, {"A2A-Version": "1.0"}, {"Accept": "application/json, text/event-stream"}):
        assert lab.judge(post(both, host=OPENAI, path=CHAT, headers=fields)).policies == ("no-large",)


def test_only_listed_models_may_be_called(tmp_path: Path) -> None:
    only = '@id("only") permit (principal, action == Creto::Action::"llmCall", resource) when { resource in [Creto::Model::"a", Creto::Model::"b"] };'
    lab = Lab(tmp_path, HTTP, only)
    assert lab.judge(chat("a")).allowed and lab.judge(chat("b")).allowed
    assert lab.judge(chat("c")).reason == "policy_no_permit"
    assert not lab.judge(post({"messages": []}, host=OPENAI, path=CHAT)).allowed, "a call that names no model"
    assert not lab.judge(post({}, host=OPENAI, path="/v1/images/generations")).allowed
    assert lab.judge(make_request("GET", host=OPENAI, path="/v1/models")).allowed
    assert lab.judge(post({"purpose": "x"}, host=OPENAI, path="/v1/files")).allowed


def test_parameters_can_be_limited(tmp_path: Path) -> None:
    rule = '@id("few") forbid (principal, action == Creto::Action::"llmCall", resource) unless { context has max_tokens && context.max_tokens <= 100 };'
    lab = Lab(tmp_path, PERMIT, rule)
    assert lab.judge(chat(max_tokens=100)).allowed
    assert not lab.judge(chat(max_tokens=100, max_completion_tokens=101)).allowed
    assert not lab.judge(chat()).allowed
    assert not lab.judge(chat(max_tokens=10.5)).allowed


def test_policies_on_the_http_action_still_know_the_model(tmp_path: Path) -> None:
    rule = '@id("old") forbid (principal, action == Creto::Action::"httpWrite", resource in Creto::Zone::"llm") when { context has model && context.model like "*-opus-*" };'
    lab = Lab(tmp_path, PERMIT, rule, zones={"llm": ("api.anthropic.com",)})
    request = chat("claude-opus-4", host="api.anthropic.com", path="/v1/messages")
    assert lab.policy.body_limit(request) > 0
    assert lab.judge(request).policies == ("old",)
    assert lab.policy.body_limit(chat()) == 0, "another host, of which no policy speaks"


def test_a_realtime_socket_names_its_model_in_the_query(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_LARGE)
    fields = {"Upgrade": "websocket", "Connection": "Upgrade"}
    for query, verdict in (("model=gpt-4o-realtime", False), ("model=other", True), ("", True)):
        request = make_request("GET", host=OPENAI, path="/v1/realtime", query=query, headers=fields)
        assert lab.policy.body_limit(request) == 0
        assert lab.judge(request).allowed is verdict
    twice = make_request("GET", host=OPENAI, path="/v1/realtime", query="model=a&model=gpt-4o", headers=fields)
    assert lab.judge(twice).status == 400


def test_uploads_to_a_provider_are_not_kept(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_LARGE)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = post(b"--x", host=OPENAI, path="/v1/audio/transcriptions", headers=form)
    assert lab.policy.body_limit(upload) == 0
    assert lab.judge(upload).allowed and upload.resource == "llm:other"


def test_other_hosts_have_no_models(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_LARGE)
    assert lab.judge(chat(host="api.example.com")).allowed
    assert lab.policy.body_limit(chat(host="api.example.com")) == 0
    configured = Lab(tmp_path, PERMIT, NO_LARGE, llm={"*.llm.test": "openai"})
    assert not configured.judge(chat(host="eu.llm.test")).allowed
