"""Metering knows the providers that the core knows, and which of them it cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from creto_metering import Metering
from creto_metering.providers import HOSTS, UNREAD, Endpoint, Providers
from creto_proxy.protocols import llm
from creto_proxy.testing import compose_plugin, make_core, make_request


def test_every_public_host_is_read_or_known_not_to_be() -> None:
    assert set(llm.HOSTS.values()) == set(HOSTS.values()) | (UNREAD - {"bedrock"})


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-pro:generateContent"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "/model/m/converse"),
        ("api.cohere.com", "/v2/chat"),
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
