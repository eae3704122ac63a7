"""Metering knows the providers that the core knows, and what of them it cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from creto_metering import Metering
from creto_metering.providers import Endpoint, Providers
from creto_proxy.testing import compose_plugin, make_core, make_request

GEMINI, VERTEX = "generativelanguage.googleapis.com", "europe-west1-aiplatform.googleapis.com"
BEDROCK, PUBLISHERS = "bedrock-runtime.us-east-1.amazonaws.com", "/v1/projects/p/locations/l/publishers"
PROFILE = "arn%3Aaws%3Abedrock%3Aus-east-1%3A1%3Ainference-profile%2Fus.anthropic.claude-x"


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        (GEMINI, "/v1beta/models/g:generateContent", Endpoint("google", "chat", "gemini", "g")),
        (GEMINI, "/v1beta/models/g:streamGenerateContent", Endpoint("google", "chat", "gemini", "g")),
        (GEMINI, "/v1beta/models/e:batchEmbedContents", Endpoint("google", "embedding", "gemini", "e")),
        (GEMINI, "/v1beta/models/g:countTokens", None),
        (GEMINI, "/v1beta/openai/chat/completions", Endpoint("google", "chat", "openai")),
        (VERTEX, f"{PUBLISHERS}/google/models/g:generateContent", Endpoint("google-vertex", "chat", "gemini", "g")),
        (VERTEX, f"{PUBLISHERS}/anthropic/models/c@1:streamRawPredict", Endpoint("google-vertex", "chat", "anthropic", "c@1")),
        (VERTEX, f"{PUBLISHERS}/anthropic/models/count-tokens:rawPredict", None),
        ("aiplatform.eu.rep.googleapis.com", f"{PUBLISHERS}/google/models/g:generateContent", Endpoint("google-vertex", "chat", "gemini", "g")),
        (BEDROCK, "/model/a.b-v1%3A0/converse-stream", Endpoint("bedrock", "chat", "bedrock", "a.b-v1:0")),
        (BEDROCK, f"/model/{PROFILE}/invoke", Endpoint("bedrock", "chat", "bedrock", "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-x")),
        (BEDROCK, "/model/amazon.titan-embed-text-v2:0/invoke", Endpoint("bedrock", "embedding", "bedrock", "amazon.titan-embed-text-v2:0")),
        (BEDROCK, "/model/m/count-tokens", None),
        (BEDROCK, "/openai/v1/chat/completions", Endpoint("bedrock", "chat", "openai")),
        ("bedrock-mantle.us-east-1.api.aws", "/anthropic/v1/messages", Endpoint("bedrock", "messages", "anthropic")),
        ("api.cohere.com", "/v2/chat", Endpoint("cohere", "chat", "cohere")),
        ("api.cohere.com", "/v1/embed", Endpoint("cohere", "embedding", "cohere")),
        ("ollama.com", "/api/generate", Endpoint("ollama", "completion", "ollama")),
        ("ollama.com", "/api/show", None),
    ],
)
def test_endpoints_of_all_providers(host: str, path: str, expected: Endpoint | None) -> None:
    assert Providers({}).endpoint(kind="http", method="POST", host=host, path=path, upgrade=False) == expected


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("api.cohere.com", "/v2/rerank"),
        (GEMINI, "/v1beta/models/i:predict"),
        (GEMINI, "/v1beta/models/e:asyncBatchEmbedContent"),
        (VERTEX, f"{PUBLISHERS}/ai21/models/j:rawPredict"),
        (BEDROCK, "/model/m/async-invoke"),
    ],
)
def test_what_cannot_be_read_has_no_known_cost(host: str, path: str) -> None:
    found = Providers({}).endpoint(kind="http", method="POST", host=host, path=path, upgrade=False)
    assert found is not None and found == Endpoint(found.provider, None)


def test_hosts_that_the_core_was_told_of_are_metered(tmp_path: Path) -> None:
    core = replace(make_core(tmp_path), providers={"vllm.test": "openai"})
    [meter] = compose_plugin(Metering, tmp_path, core=core).stages.meters
    request = make_request("POST", host="vllm.test", path="/v1/chat/completions", body=b"{}")
    assert meter.body_limit(request) > 0
    assert meter.body_limit(make_request("POST", host="other.test", path="/v1/chat/completions")) == 0
