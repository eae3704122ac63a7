"""Which requests are model requests, and what their bodies allow the answer to cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath.ask import plain
from creto_metering.ask import BadBody, parse_ask, plain_ask, with_usage_included
from creto_metering.prices import Price, Rates
from creto_metering.providers import Endpoint, Providers
from creto_proxy.protocols import llm

CHAT = Endpoint("openai", "chat", "openai")
PRICE = Price("openai", "m", Rates.compiled({"input": 10**9, "output": 10**9}), (), 100_000, 5_000)


def endpoint(host: str, path: str, method: str = "POST", kind: str = "http", upgrade: bool = False) -> Endpoint | None:
    providers = Providers({"llm.corp.test": "openai", "*.claude.corp.test": "anthropic"})
    return providers.endpoint(kind=kind, method=method, host=host, path=path, upgrade=upgrade)


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        ("api.openai.com", "/v1/chat/completions", Endpoint("openai", "chat", "openai")),
        ("api.openai.com", "/v1/completions", Endpoint("openai", "completion", "openai")),
        ("api.openai.com", "/v1/embeddings", Endpoint("openai", "embedding", "openai")),
        ("api.openai.com", "/v1/responses", Endpoint("openai", "responses", "openai-responses")),
        ("api.anthropic.com", "/v1/messages", Endpoint("anthropic", "messages", "anthropic")),
        ("api.groq.com", "/openai/v1/chat/completions", Endpoint("groq", "chat", "openai")),
        (
            "mine.openai.azure.com", "/openai/deployments/gpt-4o/chat/completions",
            Endpoint("azure", "chat", "openai", "gpt-4o"),
        ),
        ("llm.corp.test", "/any/v1/chat/completions", Endpoint("openai", "chat", "openai")),
        ("eu.claude.corp.test", "/v1/messages", Endpoint("anthropic", "messages", "anthropic")),
        ("claude.corp.test", "/v1/messages", None),
        ("api.example.com", "/v1/chat/completions", None),
        ("api.anthropic.com", "/v1/messages/count_tokens", None),
        ("api.openai.com", "/v1/files", None),
        ("api.openai.com", "/v1/images/generations", Endpoint("openai", None)),
        ("api.openai.com", "/v1/chat/completions/", Endpoint("openai", None)),
        ("api.openai.com", "/v1/chat%2Fcompletions", Endpoint("openai", None)),
        ("api.openai.com", "/v1/threads/t/messages", Endpoint("openai", None)),
        ("api.anthropic.com", "/v1/messages/batches", Endpoint("anthropic", None)),
    ],
)  # fmt: skip
def test_endpoints_are_told_by_host_and_path(host: str, path: str, expected: Endpoint | None) -> None:
    assert endpoint(host, path) == expected


def test_reads_are_free_and_what_cannot_be_seen_is_not_metered() -> None:
    assert endpoint("api.openai.com", "/v1/models", "GET") is None
    assert endpoint("api.openai.com", "/v1/realtime", "GET", upgrade=True) == Endpoint("openai", None)
    assert endpoint("api.openai.com", "", "CONNECT", kind="tunnel") == Endpoint("openai", None)
    assert endpoint("api.openai.com", "/v1/chat/completions", "PUT") == Endpoint("openai", None)


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({}, 5_000),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, 9),
        ({"max_tokens": None, "max_completion_tokens": 9}, 9),
        ({"max_tokens": -1}, 5_000),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"max_tokens": 7, "n": None}, 7),
    ],
)
def test_output_is_bounded_by_what_is_asked_for_and_else_by_the_model(fields: dict[str, Any], output: int) -> None:
    ask = parse_ask(CHAT, json.dumps({"model": "m", "messages": [], **fields}).encode())
    assert ask.output_ceiling(PRICE, 16_384) == output


def test_without_a_price_row_output_is_bounded_by_the_default() -> None:
    assert parse_ask(CHAT, b'{"model":"m","n":2}').output_ceiling(None, 100) == 200


def test_legacy_completion_answers_every_prompt_it_is_given() -> None:
    completion = Endpoint("openai", "completion", "openai")
    for prompt, choices in (("a", 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1], [2]], 2), ([], 1)):
        body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 10, "best_of": 2}).encode()
        assert parse_ask(completion, body).output_ceiling(None, 1) == 20 * choices


def test_embeddings_have_no_output() -> None:
    ask = parse_ask(Endpoint("openai", "embedding", "openai"), b'{"model":"m","input":"text"}')
    assert ask.output_ceiling(PRICE, 16_384) == 0


@pytest.mark.parametrize(
    ("body", "refers"),
    [
        ({"messages": [{"role": "user", "content": "url file_id https://example.com"}]}, False),
        ({"messages": [{"content": '"file_id": "x"'}]}, False),
        ({"tools": [{"function": {"parameters": {"properties": {"url": {"type": "string"}}}}}]}, False),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]}, True),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]}, False),
        ({"input": [{"type": "input_file", "file_id": "f"}]}, True),
        ({"previous_response_id": "r"}, True),
        ({"previous_response_id": None}, False),
        ({"tools": [{"type": "web_search_preview"}]}, True),
    ],
)
def test_input_that_is_not_in_the_body_is_bounded_by_the_context_window(body: dict[str, Any], refers: bool) -> None:
    ask = parse_ask(CHAT, json.dumps({"model": "m", **body}).encode())
    assert ask.refers is refers
    assert ask.input_ceiling(PRICE) == (100_000 if refers else ask.size // 2)


def test_input_is_never_more_than_the_model_can_read() -> None:
    ask = parse_ask(CHAT, json.dumps({"model": "m", "messages": "x" * 500_000}).encode())
    assert ask.input_ceiling(PRICE) == 100_000
    assert ask.input_ceiling(None) == ask.size // 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"[]",
        b'{"model":"m"}{}',
        b'{"model":1}',
        b'{"model":"m","max_tokens":"9"}',
        b'{"model":"m","max_tokens":1.5}',
        b'{"model":"m","max_tokens":99999999999}',
        b'{"model":"m","n":99999999}',
        b'{"model":"m","stream":"yes"}',
        b'{"model":"m","stream_options":true}',
        b'{"max_tokens":1,"model":"m","max_tokens":100000}',
        b'{"max_tokens":1,"model":"m","Max_Tokens":100000}',
        b'{"max_tokens":1,"model":"m","max_tok\\u0065ns":100000}',
        b'{"model":"m","stream_options":{"include_usage":true,"include_usage":false}}',
        b'{"model":"m","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model":"m","x":tru}',
        b'{"model":"\xff"}',
    ],
    ids=range(18),
)
def test_body_that_two_parsers_could_read_in_two_ways_is_refused(body: bytes) -> None:
    with pytest.raises(BadBody):
        parse_ask(CHAT, body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"SECRET":1,"SECRET":2}',
        b'{"model":"SECRET","max_tokens":"SECRET"}',
        b'{"model":"SECRET',
        b'{"SECRET\xff":1}',
        b'{"SECRET\x00":1,"model":"\xffSECRET"}',
    ],
)
def test_complaint_about_a_body_does_not_quote_it(body: bytes) -> None:
    with pytest.raises(BadBody) as error:
        parse_ask(CHAT, body)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', b'{"model":"m","stream_options":{"include_usage":true}}'),
        (b'{ "model" : "m" }\n', b'{ "model" : "m","stream_options":{"include_usage":true} }\n'),
        (b'{"stream_options":null,"n":1}', b'{"stream_options":{"include_usage":true},"n":1}'),
        (b'{"stream_options":{},"n":1}', b'{"stream_options":{"include_usage":true},"n":1}'),
        (b'{"stream_options":{ "a":[1] }}', b'{"stream_options":{ "a":[1],"include_usage":true }}'),
        (b'{"stream_options":{"include_usage": false ,"a":1}}', b'{"stream_options":{"include_usage": true ,"a":1}}'),
        (b"{}", b'{"stream_options":{"include_usage":true}}'),
    ],
)
def test_usage_is_asked_for_with_every_other_byte_kept(body: bytes, expected: bytes) -> None:
    assert with_usage_included(body) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=5) | st.lists(st.none(), max_size=2)),
    st.none() | st.dictionaries(st.sampled_from(["include_usage", "a", "b"]), st.booleans() | st.none()),
)
def test_usage_is_asked_for_and_nothing_else_changes(document: dict[str, Any], options: Any) -> None:
    document["stream_options"] = options
    edited = json.loads(with_usage_included(json.dumps({k.lower(): v for k, v in document.items()}).encode()))
    assert edited.pop("stream_options") == {**(options or {}), "include_usage": True}
    assert edited == {k.lower(): v for k, v in document.items() if k.lower() != "stream_options"}


_words = st.sampled_from(
    ["model", "stream", "max_tokens", "max_completion_tokens", "n", "best_of", "tools", "functions", "url", "file_id", "type",
     "cache_control", "audio", "input_audio", "http://x", "mcp", '"audio', '"file_id', 'x"type', "Model", "speed", "a"]
)  # fmt: skip
_values = st.recursive(
    st.booleans() | st.integers(0, 2000) | st.floats(allow_nan=False) | st.none() | _words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=10,
)
_numbers, _flags = st.integers(0, 10**7), st.booleans()
_said = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["", "gpt-4o"]), "stream": _flags, "stream_options": st.fixed_dictionaries({"include_usage": _flags}),
        "max_tokens": _numbers, "max_output_tokens": _numbers, "n": _numbers, "best_of": _numbers, "tools": st.lists(_values, max_size=3),
    },
)  # fmt: skip
_bodies = st.builds(
    lambda said, more, indent: json.dumps({**more, **said}, indent=indent).encode(),
    _said,
    st.dictionaries(_words, _values, max_size=5),
    st.sampled_from([None, 1]),
)


@pytest.mark.parametrize("operation", ["chat", "completion", "embedding", "responses"])
@settings(deadline=None)
@given(body=_bodies | st.builds(lambda b, i, x: b[:i] + x + b[i + 1 :], _bodies, st.integers(0, 60), st.binary(max_size=2)))
def test_one_look_finds_what_reading_with_care_finds(operation: str, body: bytes) -> None:
    found = plain(body)
    endpoint = Endpoint("openai", operation, "anthropic" if len(body) % 2 else "openai", "d")
    if found is not None:
        assert plain_ask(endpoint, len(body), found) == parse_ask(endpoint, body)
        core = llm.Endpoint("ollama" if len(body) % 3 else "openai", operation)
        assert llm._asked(found, core) == llm._parameters(body, core)
