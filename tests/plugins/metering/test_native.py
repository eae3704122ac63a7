"""Gemini, Bedrock, Cohere and Ollama: what their requests may cost, what their answers did cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

from creto_hotpath.http1 import parse_response
from creto_metering.ask import Ask, BadBody, parse_ask
from creto_metering.importer import import_prices
from creto_metering.native import counted_in_head, signed_fields
from creto_metering.prices import Price, PriceBook, Rates, bundled_prices, price_directories, price_row
from creto_metering.providers import Endpoint
from creto_proxy.model import Request
from creto_proxy.testing import FakeClock

from .test_meter import DAY, Sidecar, sidecar

GEMINI = Endpoint("google", "chat", "gemini", "g")
BEDROCK = Endpoint("bedrock", "chat", "bedrock", "b")
COHERE = Endpoint("cohere", "chat", "cohere")
OLLAMA = Endpoint("ollama", "chat", "ollama")
PRICE = Price("p", "m", Rates.compiled({"input": 10**9, "output": 10**9}), (), 100_000, 5_000)


def ask(endpoint: Endpoint, body: Any) -> Ask:
    return parse_ask(endpoint, body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(
    ("endpoint", "body", "output"),
    [
        (GEMINI, {"contents": []}, 5_000),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 7}}, 7),
        (GEMINI, {"generation_config": {"max_output_tokens": 7}}, 7),
        (GEMINI, {"generation_config": {"maxOutputTokens": 9}, "generationConfig": {"max_output_tokens": 7}}, 9),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 7, "candidateCount": 3}}, 21),
        (GEMINI, {"generationConfig": {"maxOutputTokens": "7"}}, 5_000),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 0}}, 5_000),
        (GEMINI, {"generationConfig": None, "max_tokens": 1}, 5_000),
        (BEDROCK, {"messages": [], "inferenceConfig": {"maxTokens": 7}}, 7),
        (BEDROCK, {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 7}, 7),
        (BEDROCK, {"prompt": "x", "max_gen_len": 7}, 7),
        (BEDROCK, {"inputText": "x", "textGenerationConfig": {"maxTokenCount": 7}}, 7),
        (BEDROCK, {"inferenceConfig": {"max_new_tokens": 7}}, 7),
        (BEDROCK, {"inferenceConfig": {"maxTokens": 7}, "max_tokens": 9}, 9),
        (BEDROCK, {"messages": []}, 5_000),
        (COHERE, {"model": "m", "max_tokens": 7}, 7),
        (COHERE, {"model": "m", "message": "x"}, 5_000),
        (OLLAMA, {"model": "m", "options": {"num_predict": 7}}, 7),
        (OLLAMA, {"model": "m", "options": {"num_predict": -1}}, 5_000),
        (OLLAMA, {"model": "m", "max_tokens": 7}, 5_000),
        (Endpoint("google", "embedding", "gemini", "g"), {"content": {}}, 0),
    ],
)
def test_output_is_bounded_by_each_providers_own_words(endpoint: Endpoint, body: Any, output: int) -> None:
    assert ask(endpoint, body).output_ceiling(PRICE, 16_384) == output


@pytest.mark.parametrize(
    ("endpoint", "body", "refers"),
    [
        (GEMINI, {"contents": [{"parts": [{"text": '"fileUri":'}]}]}, False),
        (GEMINI, {"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": "AA"}}]}]}, False),
        (GEMINI, {"contents": [{"parts": [{"fileData": {"fileUri": "gs://x"}}]}]}, True),
        (GEMINI, {"contents": [{"parts": [{"file_data": {"file_uri": "gs://x"}}]}]}, True),
        (GEMINI, {"cachedContent": "cachedContents/x"}, True),
        (GEMINI, {"tools": [{"googleSearch": {}}]}, True),
        (GEMINI, {"tools": [{"url_context": {}}]}, True),
        (GEMINI, {"tools": [{"functionDeclarations": [{"name": "f"}]}]}, False),
        (BEDROCK, {"messages": [{"content": [{"document": {"source": {"s3Location": {"uri": "s3://x"}}}}]}]}, True),
        (BEDROCK, {"messages": [{"content": [{"text": "x"}]}]}, False),
        (COHERE, {"connectors": [{"id": "web-search"}]}, True),
        (COHERE, {"message": "x", "documents": [{"text": "y"}]}, False),
        (OLLAMA, {"messages": [{"images": ["AA"]}]}, False),
    ],
)
def test_input_from_elsewhere_is_bounded_by_the_context_window(endpoint: Endpoint, body: Any, refers: bool) -> None:
    found = ask(endpoint, body)
    assert found.refers is refers
    assert found.input_ceiling(PRICE) == (100_000 if refers else found.size // 2)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (GEMINI, b""),
        (GEMINI, b"[]"),
        (GEMINI, b'{"generationConfig":{"maxOutputTokens":1,"maxOutputTokens":9}}'),
        (GEMINI, b'{"generationConfig":{"maxOutputTokens":1},"generationConfig":{}}'),
        (GEMINI, b'{"generationConfig":{"maxOutputTokens":1},"GenerationConfig":{}}'),
        (GEMINI, b'{"generationConfig":{"candidateCount":"8"}}'),
        (GEMINI, b'{"generationConfig":{"candidateCount":99999999}}'),
        (GEMINI, b'{"generationConfig":{"maxOutputTokens":99999999999}}'),
        (BEDROCK, b'{"inferenceConfig":{"maxTokens":1,"max\\u0054okens":9}}'),
        (OLLAMA, b'{"model":7}'),
        (OLLAMA, b'{"model":"m","options":{"num_predict":1}'),
        (COHERE, b'{"model":"m","stream":"yes"}'),
    ],
)
def test_body_that_servers_may_read_differently_is_refused(endpoint: Endpoint, body: bytes) -> None:
    with pytest.raises(BadBody):
        ask(endpoint, body)


def test_the_path_says_which_model_it_is() -> None:
    assert ask(GEMINI, {"model": "models/cheap"}).model == "g"
    assert ask(BEDROCK, {"model": "cheap"}).model == "b"
    assert ask(Endpoint("google-vertex", "chat", "anthropic", "claude"), {"model": "cheap"}).model == "claude"
    assert ask(OLLAMA, {"model": "m"}).model == "m"


def test_what_raises_the_price_is_seen() -> None:
    assert ask(GEMINI, {"serviceTier": "priority"}).when == {"service_tier": "priority"}
    assert ask(BEDROCK, {"serviceTier": {"type": "priority"}}).when == {}
    assert ask(GEMINI, {"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav"}}]}]}).audio
    assert ask(GEMINI, {"generationConfig": {"responseModalities": ["AUDIO"]}}).audio
    assert not ask(GEMINI, {"contents": []}).audio
    assert ask(BEDROCK, {"system": [{"cachePoint": {"type": "default"}}]}).caches
    assert not ask(BEDROCK, {"messages": []}).caches


def head(fields: dict[str, str]) -> Callable[[str], str | None]:
    return lambda name: fields.get(name)


def test_counts_in_the_head_of_an_answer() -> None:
    prefix = "x-amzn-bedrock-"
    fields = {f"{prefix}input-token-count": "10", f"{prefix}output-token-count": "20", f"{prefix}cache-read-input-token-count": "5"}
    assert counted_in_head(head(fields)) == {"input": 15, "output": 20, "cache_read": 5, "total": 35}
    assert counted_in_head(head({})) == {}
    for bad in ("-1", "1.0", "", "9" * 10, "٣", "1, 1"):
        assert counted_in_head(head({f"{prefix}input-token-count": bad})) == {}


def test_what_a_signature_covers() -> None:
    signature = "AWS4-HMAC-SHA256 Credential=K/2026/us/bedrock/aws4_request, SignedHeaders=accept-encoding;host;x-amz-date, Signature=ab"
    assert signed_fields(signature) == frozenset({"accept-encoding", "host", "x-amz-date"})
    assert signed_fields("Bearer x") is None and signed_fields(None) is None


# Over a whole request.
CONFIGURED = {"gemini.test": "google", "bedrock.test": "bedrock", "cohere.test": "cohere", "ollama.test": "ollama"}
ROWS = [
    {"provider": provider, "model": "m", "input": "1", "output": "10", "cache_read": "0.1", "context_window": 1000, "max_output": 100}
    for provider in ("google", "bedrock", "cohere")
]
TOKENS = [{**DAY, "metric": "tokens", "limit": 100_000}]


def opened(tmp_path: Path, **more: Any) -> Any:
    return sidecar(tmp_path, FakeClock(), providers=CONFIGURED, price=ROWS, **more)


def send(creto: Sidecar, host: str, path: str, body: Any, **more: Any) -> Request:
    request, decision = creto.ask(body, host=host, path=path, **more)
    assert decision.allowed, decision.detail
    return request


async def test_gemini_is_charged_for_thoughts_and_less_for_what_was_cached(tmp_path: Path) -> None:
    metadata = {"promptTokenCount": 100, "cachedContentTokenCount": 60, "candidatesTokenCount": 5, "thoughtsTokenCount": 20, "totalTokenCount": 125}
    async with opened(tmp_path, budgets=TOKENS) as creto:
        request = send(creto, "gemini.test", "/v1beta/models/m:generateContent", {"contents": []})
        edits = creto.meter.edits(request)
        assert edits is not None and edits.body is None
        usage = creto.answer(request, {"candidates": [], "modelVersion": "m", "usageMetadata": metadata})
        assert (usage.certainty, usage.provider, usage.model) == ("exact", "google", "m")
        assert usage.tokens == {"input": 100, "output": 25, "total": 125, "cache_read": 60, "reasoning": 20}
        assert usage.cost_nano_usd == 40 * 1000 + 60 * 100 + 25 * 10_000
        assert creto.left(FakeClock()) == [(125, 0)]


async def test_gemini_stream_that_ends_early_keeps_its_reservation(tmp_path: Path) -> None:
    chunk = b'[{"usageMetadata":{"promptTokenCount":2,"candidatesTokenCount":1,"totalTokenCount":3}}\n'
    async with opened(tmp_path) as creto:
        for end, completed, certainty in ((b"]", True, "exact"), (b"", False, "unknown"), (b"", True, "unknown"), (b"}", True, "unknown")):
            request = send(creto, "gemini.test", "/v1beta/models/m:streamGenerateContent", {"contents": []})
            assert creto.answer(request, chunk + end, completed=completed).certainty == certainty


async def test_bedrock_says_in_the_head_what_its_models_do_not_say(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Amzn-Bedrock-Input-Token-Count: 10\r\nX-Amzn-Bedrock-Output-Token-Count: 20\r\nContent-Length: 0\r\n\r\n"
    parsed = parse_response(head, "POST")
    assert parsed is not None
    async with opened(tmp_path) as creto:
        request = send(creto, "bedrock.test", "/model/m/invoke", {"prompt": "x"})
        request.answer = parsed[0]
        usage = creto.answer(request, {"outputs": [{"text": "x"}]})
        assert (usage.certainty, usage.tokens) == ("exact", {"input": 10, "output": 20, "total": 30})
        assert usage.cost_nano_usd == 10 * 1000 + 20 * 10_000
        request = send(creto, "bedrock.test", "/model/m/invoke", {"prompt": "x"})
        request.answer = parsed[0]
        detailed = {"usage": {"input_tokens": 4, "output_tokens": 20, "cache_read_input_tokens": 6}}
        assert creto.answer(request, detailed).tokens == {"input": 10, "output": 20, "cache_read": 6, "total": 30}
        request = send(creto, "bedrock.test", "/model/m/invoke", {"prompt": "x"})
        request.answer = parsed[0]
        assert creto.answer(request, b'{"outputs":', completed=False).certainty == "unknown"


async def test_broken_frames_leave_usage_unknown_and_the_answer_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as creto:
        request = send(creto, "bedrock.test", "/model/m/converse-stream", {"messages": []})
        tap = creto.meter.tap(request, 200, "application/vnd.amazon.eventstream")
        assert tap is not None and not tap.rewrites
        assert tap.feed(b"\x00\x00\x00\x10" * 10) is None and tap.finish() is None
        usage = creto.meter.settle(request, tap, status=200, completed=True)
        assert usage.certainty == "unknown" and usage.cost_nano_usd > 0


async def test_what_is_signed_is_sent_as_it_is(tmp_path: Path) -> None:
    def signed(fields: str) -> dict[str, str]:
        return {"Authorization": f"AWS4-HMAC-SHA256 Credential=K, SignedHeaders={fields}, Signature=ab"}

    body = b'{"model":"m","stream":true}'
    async with opened(tmp_path) as creto:
        for path in ("/model/m/converse", "/openai/v1/chat/completions"):
            edits = creto.meter.edits(send(creto, "bedrock.test", path, body, headers=signed("host")))
            assert edits is not None and edits.body is None and edits.headers == {"accept-encoding": "identity"}
            assert creto.meter.edits(send(creto, "bedrock.test", path, body, headers=signed("accept-encoding;host"))) is None
        edits = creto.meter.edits(send(creto, "bedrock.test", "/openai/v1/chat/completions", body))
        assert edits is not None and edits.body is not None


async def test_cohere_and_ollama(tmp_path: Path) -> None:
    billed = {"billed_units": {"input_tokens": 3, "output_tokens": 4}, "tokens": {"input_tokens": 60, "output_tokens": 4}}
    async with opened(tmp_path, default_cost_usd="0") as creto:
        request = send(creto, "cohere.test", "/v2/chat", {"model": "m", "stream": True, "messages": []})
        edits = creto.meter.edits(request)
        assert edits is not None and edits.body is None, "stream_options is no word of Cohere's"
        end = {"type": "message-end", "delta": {"usage": billed}}
        usage = creto.answer(request, b"data: " + json.dumps(end).encode() + b"\n\n", media="text/event-stream")
        assert (usage.certainty, usage.model, usage.cost_nano_usd) == ("exact", "m", 3 * 1000 + 4 * 10_000)
        request = send(creto, "cohere.test", "/v1/chat", {"model": "m", "stream": True, "message": "x"})
        line = {"event_type": "stream-end", "response": {"meta": billed}}
        assert creto.answer(request, json.dumps(line).encode(), media="application/stream+json").cost_nano_usd == 43_000
        request = send(creto, "ollama.test", "/api/chat", {"model": "llama", "messages": []})
        edits = creto.meter.edits(request)
        assert edits is not None and edits.body is None
        lines = b'{"model":"llama","done":false}\n{"model":"llama","done":true,"prompt_eval_count":5,"eval_count":6}\n'
        usage = creto.answer(request, lines, media="application/x-ndjson")
        assert (usage.certainty, usage.cost_nano_usd) == ("estimated", 0), "nobody says what it costs"
        assert usage.tokens == {"input": 5, "output": 6, "total": 11}


async def test_what_has_a_name_of_its_own_takes_no_lease(tmp_path: Path) -> None:
    async with opened(tmp_path) as creto:
        for host, path in (("gemini.test", "/v1beta/models/m:generateContent"), ("cohere.test", "/v2/chat"), ("bedrock.test", "/openai/v1/chat/completions")):
            request = send(creto, host, path, b'{"model":"m"}')
            assert request.ask is not None
            assert creto.meter.lease(request) is None


async def test_one_price_for_whatever_a_provider_runs(tmp_path: Path) -> None:
    rows = [
        {"provider": "ollama", "model": "*", "input": "0", "output": "0"},
        {"provider": "ollama", "model": "big", "input": "1"},
        {"provider": "openai", "model": "*", "input": "0"},
    ]
    line = b'{"model":"%s","done":true,"prompt_eval_count":5,"eval_count":6}\n'
    async with sidecar(tmp_path, FakeClock(), providers=CONFIGURED, price=rows) as creto:
        for model, cost in ((b"llama3.2", 0), (b"big", 5000)):
            request = send(creto, "ollama.test", "/api/chat", b'{"model":"%s"}' % model)
            usage = creto.answer(request, line % model, media="application/x-ndjson")
            assert (usage.certainty, usage.cost_nano_usd) == ("exact", cost)
        prices = creto.meter._prices  # type: ignore[attr-defined]
        assert prices.price("openai", "gpt-4o", time.time_ns()).base.input > 0, "a price of its own comes first"


# Prices.
def test_each_kind_of_token_has_its_price() -> None:
    usd = {"input": "1", "output": "10", "cache_read": "0.1", "input_audio": "3", "cache_read_audio": "0.3", "output_image": "60", "input_image": "2"}
    price = PriceBook([price_row({"provider": "p", "model": "m", "prices": [{"usd": usd}]})]).price("p", "m", 0)
    assert price is not None
    tokens = {"input": 100, "cache_read": 30, "input_audio": 20, "cache_read_audio": 5, "input_image": 10, "output": 50, "output_image": 40}
    cost_in = (100 - 30 - 15 - 10) * 1000 + 25 * 100 + 5 * 300 + 15 * 3000 + 10 * 2000
    assert price.cost_nano(tokens) == cost_in + 10 * 10_000 + 40 * 60_000
    assert price.cost_nano({"input": 1, "cache_read": 9, "cache_read_audio": 9, "input_image": 9, "output": 0}) >= 0
    assert price.dearest(100, caches=False, audio=False) == (2 * 10**9, 60 * 10**9)


def test_imported_prices_of_google_bedrock_and_cohere_agree_with_their_source() -> None:
    genai = pytest.importorskip("genai_prices", reason="genai-prices is an optional dependency")
    document, _ = import_prices(["google", "aws", "cohere"])
    prices = PriceBook([price_row(row) for row in document["models"]])
    plain = ({"input": 300_000, "output": 12_345}, genai.Usage(input_tokens=300_000, output_tokens=12_345))
    cached = (
        {"input": 300_000, "output": 12_345, "cache_read": 70_001},
        genai.Usage(input_tokens=300_000, output_tokens=12_345, cache_read_tokens=70_001),
    )
    heard = (
        {"input": 9_000, "output": 1_000, "input_audio": 4_000},
        genai.Usage(input_tokens=9_000, output_tokens=1_000, input_audio_tokens=4_000),
    )
    drawn = (
        {"input": 9_000, "output": 3_000, "output_image": 2_580},
        genai.Usage(input_tokens=9_000, output_tokens=3_000, output_image_tokens=2_580),
    )
    for provider, theirs, model, usages in [
        ("google", "google", "gemini-2.5-pro", (plain, cached)),
        ("google", "google", "gemini-2.5-flash", (plain, cached, heard)),
        ("google-vertex", "google", "gemini-2.5-flash", (plain,)),
        ("google", "google", "gemini-2.5-flash-image", (plain, drawn)),
        ("google-vertex", "google", "claude-sonnet-4-5@20250929", (plain, cached)),
        ("bedrock", "aws", "us.anthropic.claude-sonnet-4-5-20250929-v1:0", (plain, cached)),
        ("bedrock", "aws", "arn:aws:bedrock:us-east-1:1:inference-profile/global.anthropic.claude-opus-4-5-v1:0", (plain,)),
        ("bedrock", "aws", "eu.amazon.nova-pro-v1:0", (plain, cached)),
        ("bedrock", "aws", "meta.llama3-3-70b-instruct-v1:0", (plain,)),
        ("cohere", "cohere", "command-a-03-2025", (plain,)),
    ]:
        found = prices.price(provider, model, time.time_ns())
        assert found is not None, model
        for tokens, usage in usages:
            reference = genai.calc_price(usage, model_ref=model, provider_id=theirs).total_price
            assert found.cost_nano(tokens) == int((reference * 10**9).quantize(Decimal(1), ROUND_HALF_UP)), model


def test_bundled_prices_bound_what_these_models_write() -> None:
    prices = bundled_prices(price_directories([]))
    for provider, model, limit in [
        ("google", "gemini-2.5-flash", 65_536), ("google-vertex", "gemini-2.0-flash-001", 8_192),
        ("bedrock", "anthropic.claude-haiku-4-5-20251001-v1:0", 64_000), ("bedrock", "amazon.nova-lite-v1:0", 10_000),
    ]:  # fmt: skip
        found = prices.price(provider, model, time.time_ns())
        assert found is not None and found.max_output == limit and found.context_window, model
    assert prices.price("ollama", "llama3.2", time.time_ns()) is None
