"""Token usage in the formats that Gemini, Bedrock, Cohere and Ollama have of their own: both forms of the scanner."""

from __future__ import annotations

import base64
import json
import zlib
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_hotpath import _usage_py
from creto_hotpath._usage_fields import MAX_COUNT, MAX_FRAME, MAX_FRAME_HEADERS, gemini_usage

from .test_usage import FORMS, both, pieces, scan

genai_prices = pytest.importorskip("genai_prices", reason="genai-prices is an oracle here")


def packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def everywhere(form: ModuleType, dialect: str, framing: str, data: bytes) -> Any:
    """(usage, model, final, last) of ``data``, the same wherever it is cut."""
    whole = scan(form, dialect, framing, [data])
    for cut in range(len(data)):
        assert scan(form, dialect, framing, [data[:cut], data[cut:]]) == whole
    assert scan(form, dialect, framing, [data[i : i + 1] for i in range(len(data))]) == whole
    return whole[:4]


# Gemini. "cached" is part of the prompt; thoughts and the prompts of tools are parts of neither prompt nor candidates.
GEMINI_USAGE = {
    "promptTokenCount": 1000,
    "cachedContentTokenCount": 600,
    "candidatesTokenCount": 40,
    "thoughtsTokenCount": 200,
    "toolUsePromptTokenCount": 50,
    "totalTokenCount": 1290,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 700}, {"modality": "AUDIO", "tokenCount": 300}],
    "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 500}, {"modality": "AUDIO", "tokenCount": 100}],
    "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 40}],
    "trafficType": "ON_DEMAND",
}
GEMINI_COUNTED = {
    "input": 1050, "output": 240, "total": 1290, "cache_read": 600, "reasoning": 200, "input_audio": 300,
    "cache_read_audio": 100,
}  # fmt: skip
SAYS = 'a "usageMetadata":{"promptTokenCount":9} [ } ]'


def gemini_chunks() -> list[dict[str, Any]]:
    text = {"candidates": [{"content": {"parts": [{"text": SAYS}], "role": "model"}, "index": 0}]}
    early = {**text, "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 3, "totalTokenCount": 1003}}
    last = {"candidates": [{"content": {"parts": [{"text": ""}]}, "finishReason": "STOP"}], "usageMetadata": GEMINI_USAGE}
    return [{**chunk, "modelVersion": "gemini-2.5-flash"} for chunk in (early, text, last)]


@both
@pytest.mark.parametrize("indent", [None, 2])
def test_gemini_answers_in_one_document(form: ModuleType, indent: int | None) -> None:
    data = json.dumps(gemini_chunks()[-1], indent=indent).encode()
    assert everywhere(form, "gemini", "document", data) == (GEMINI_COUNTED, "gemini-2.5-flash", True, True)


@both
def test_gemini_streams_an_array_of_documents(form: ModuleType) -> None:
    data = b"[" + b"\n,\r\n".join(packed(chunk) for chunk in gemini_chunks()) + b"]\n"
    assert everywhere(form, "gemini", "document", data) == (GEMINI_COUNTED, "gemini-2.5-flash", False, True)


@both
def test_gemini_streams_events(form: ModuleType) -> None:
    data = b"".join(b"data: " + packed(chunk) + b"\r\n\r\n" for chunk in gemini_chunks())
    assert everywhere(form, "gemini", "events", data) == (GEMINI_COUNTED, "gemini-2.5-flash", False, True)


@both
@pytest.mark.parametrize(
    "data",
    [
        b'[{"usageMetadata":{"promptTokenCount":1}}',  # cut off
        b'[{"usageMetadata":{"promptTokenCount":1}},',
        b'[{"usageMetadata":{"promptTokenCount":1}},{"a":',
        b'[{"usageMetadata":{"promptTokenCount":1}},{"a":1}]',  # not in the last
    ],
)
def test_an_array_without_its_end_is_not_the_last_word(form: ModuleType, data: bytes) -> None:
    usage, _, final, last = everywhere(form, "gemini", "document", data)
    assert (usage, final, last) == ({"input": 1}, False, False)


@both
@pytest.mark.parametrize(
    "data",
    [
        b'[{"usageMetadata":{"promptTokenCount":1}}]]',
        b'[{"usageMetadata":{"promptTokenCount":1}}{}]',
        b'[{"usageMetadata":{"promptTokenCount":1}},,{}]',
        b'[{"usageMetadata":{"promptTokenCount":1}},]',
        b'[,{"usageMetadata":{"promptTokenCount":1}}]',
        b'[{"usageMetadata":{"promptTokenCount":1}}]{}',
        b'[{"usageMetadata":{"promptTokenCount":1}},[1]]',
        b'[[{"usageMetadata":{"promptTokenCount":1}}]]',
        b'[{"usageMetadata":{"promptTokenCount":1]}]',
        b"[]",
        b"[ ] ",
        b"[",
        b'{"usageMetadata":{"promptTokenCount":1}}[]',
        b"[" + b'{"a":' * 600,
    ],
)
def test_an_array_that_is_none_leaves_usage_unknown(form: ModuleType, data: bytes) -> None:
    usage, model, final, last = everywhere(form, "gemini", "document", data)
    assert (usage, model, final, last) == (None, "", False, False)


@both
def test_only_gemini_has_arrays(form: ModuleType) -> None:
    assert scan(form, "openai", "document", [b'[{"usage":{"prompt_tokens":1}}]'])[0] is None


@both
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        # Google leaves out counts of nothing: a blocked prompt has no candidates.
        ({"promptTokenCount": 7, "totalTokenCount": 7}, {"input": 7, "output": 0, "total": 7}),
        ({"promptTokenCount": 7}, {"input": 7}),  # embeddings
        ({"promptTokenCount": 7, "totalTokenCount": 30}, {"input": 7, "output": 23, "total": 30}),
        ({"candidatesTokenCount": 5, "totalTokenCount": 9}, {"input": 4, "output": 5, "total": 9}),
        ({"trafficType": "ON_DEMAND"}, None),
        ({"promptTokenCount": -1, "candidatesTokenCount": 1.5}, None),
        ({"promptTokenCount": "7", "candidatesTokenCount": True}, None),
        ({"promptTokenCount": 10**10, "thoughtsTokenCount": 2.0}, {"output": 2, "reasoning": 2}),
        ({"promptTokenCount": MAX_COUNT, "toolUsePromptTokenCount": MAX_COUNT}, {"input": MAX_COUNT}),
        (
            {"promptTokenCount": 9, "promptTokensDetails": [{"modality": "AUDIO"}, 7, None, {"modality": [], "tokenCount": 1}]},
            {"input": 9},
        ),
        (
            {"promptTokenCount": 9, "promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 2}, {"modality": "DOCUMENT", "tokenCount": 3}]},
            {"input": 9, "input_image": 5},
        ),
        ({"promptTokenCount": 9, "promptTokensDetails": {"modality": "AUDIO", "tokenCount": 1}}, {"input": 9}),
        ([{"promptTokenCount": 9}], None),
    ],
)
def test_usage_metadata_of_gemini(form: ModuleType, usage: Any, counted: dict[str, int] | None) -> None:
    assert everywhere(form, "gemini", "document", packed({"usageMetadata": usage}))[0] == counted


# Bedrock. The frames are built here, and once by a second implementation below.
def frame(payload: bytes, headers: bytes = b"") -> bytes:
    prelude = (len(payload) + len(headers) + 16).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    text = prelude + zlib.crc32(prelude).to_bytes(4, "big") + headers + payload
    return text + zlib.crc32(text).to_bytes(4, "big")


def named(event: str) -> bytes:
    def header(name: bytes, value: bytes) -> bytes:
        return bytes((len(name),)) + name + b"\x07" + len(value).to_bytes(2, "big") + value

    return header(b":event-type", event.encode()) + header(b":content-type", b"application/json") + header(b":message-type", b"event")


CONVERSE_USAGE = {
    "inputTokens": 10,
    "outputTokens": 20,
    "totalTokens": 150,
    "cacheReadInputTokens": 100,
    "cacheWriteInputTokens": 20,
    "cacheDetails": [{"ttl": "1h", "inputTokens": 15}, {"ttl": "5m", "inputTokens": 5}],
}
CONVERSE_COUNTED = {"input": 130, "output": 20, "cache_read": 100, "cache_write": 20, "cache_write_1h": 15, "total": 150}
CONVERSE_STREAM = [
    ("messageStart", {"role": "assistant", "p": "abc"}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": '"usage":{"inputTokens":7}', "usage": {"inputTokens": 9}}}),
    ("messageStop", {"stopReason": "end_turn"}),
    ("metadata", {"usage": CONVERSE_USAGE, "metrics": {"latencyMs": 3}, "p": "ab"}),
]


@both
def test_converse(form: ModuleType) -> None:
    body = {"output": {"message": {"content": [{"text": SAYS}]}}, "stopReason": "end_turn", "usage": CONVERSE_USAGE}
    assert everywhere(form, "bedrock", "document", packed(body)) == (CONVERSE_COUNTED, "", True, True)


@both
def test_converse_stream(form: ModuleType) -> None:
    data = b"".join(frame(packed(event), named(name)) for name, event in CONVERSE_STREAM)
    assert everywhere(form, "bedrock", "frames", data) == (CONVERSE_COUNTED, "", True, True)
    cut = data[: -len(frame(packed(CONVERSE_STREAM[-1][1]), named("metadata")))]
    assert scan(form, "bedrock", "frames", [cut])[:4] == (None, "", False, False)
    assert scan(form, "bedrock", "frames", [data[:-1]])[0] is None, "a frame counts when its checksum was seen"


def chunk(document: Any) -> bytes:
    text = base64.b64encode(packed(document)).decode()
    return frame(packed({"bytes": text, "p": "abcdefgh"}), named("chunk"))


METRICS = {"inputTokenCount": 10, "outputTokenCount": 20, "invocationLatency": 900, "firstByteLatency": 300}
CLAUDE = [
    {"type": "message_start", "message": {"model": "claude-x", "usage": {"input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100, "cache_creation": {"ephemeral_1h_input_tokens": 15, "ephemeral_5m_input_tokens": 5}, "output_tokens": 1}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": SAYS}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
    {"type": "message_stop", "amazon-bedrock-invocationMetrics": METRICS},
]
LLAMA = [
    {"generation": "Hi", "prompt_token_count": 10, "generation_token_count": 1, "stop_reason": None},
    {"generation": "", "prompt_token_count": None, "generation_token_count": 20, "stop_reason": "stop", "amazon-bedrock-invocationMetrics": METRICS},
]
NOVA = [
    {"contentBlockDelta": {"delta": {"text": "Hi"}}},
    {"metadata": {"usage": {"inputTokens": 10, "outputTokens": 20, "cacheReadInputTokenCount": 100, "cacheWriteInputTokenCount": 20}}, "amazon-bedrock-invocationMetrics": METRICS},
]
TITAN = [
    {"outputText": "Hi", "index": 0, "totalOutputTextTokenCount": None},
    {"outputText": "", "inputTextTokenCount": 10, "amazon-bedrock-invocationMetrics": METRICS},
]
PLAIN = {"input": 10, "output": 20, "total": 30}


@both
@pytest.mark.parametrize(
    ("events", "counted"),
    [(CLAUDE, CONVERSE_COUNTED), (LLAMA, PLAIN), (NOVA, {**PLAIN, "input": 130, "cache_read": 100, "cache_write": 20, "total": 150}), (TITAN, PLAIN)],
    ids=["claude", "llama", "nova", "titan"],
)
def test_invoke_model_with_response_stream(form: ModuleType, events: list[Any], counted: dict[str, int]) -> None:
    data = b"".join(map(chunk, events))
    assert everywhere(form, "bedrock", "frames", data) == (counted, "", True, True)
    assert scan(form, "bedrock", "frames", [b"".join(map(chunk, events[:-1]))])[2] is False


@both
@pytest.mark.parametrize(
    ("body", "counted"),
    [
        ({"model": "claude", "usage": {"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 5}}, {**PLAIN, "input": 15, "cache_read": 5, "total": 35}),
        ({"output": {}, "usage": {"inputTokens": 10, "outputTokens": 20, "totalTokens": 30}}, PLAIN),
        ({"usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30, "prompt_tokens_details": {"cached_tokens": 4}}}, {**PLAIN, "cache_read": 4}),
        ({"generation": "x", "prompt_token_count": 10, "generation_token_count": 20}, PLAIN),
        ({"embedding": [0.5], "inputTextTokenCount": 10}, {"input": 10}),
        ({"outputs": [{"text": "x"}]}, None),
        ({"usage": {"inputTokens": -10, "outputTokens": "20"}}, None),
        ({"usage": {"inputTokens": 10, "outputTokens": 20, "cacheDetails": [{"ttl": 1}, {"ttl": "1h", "inputTokens": -1}, 3]}}, PLAIN),
        ({"usage": {"inputTokens": 10, "outputTokens": 20, "cacheDetails": "1h"}}, PLAIN),
    ],
)
def test_answers_of_the_models_themselves(form: ModuleType, body: Any, counted: dict[str, int] | None) -> None:
    assert everywhere(form, "bedrock", "document", packed(body))[0] == counted


GOOD = frame(packed({"usage": {"inputTokens": 1, "outputTokens": 2}}), named("metadata"))


def with_crc(prelude: bytes) -> bytes:
    return prelude + zlib.crc32(prelude).to_bytes(4, "big")


@both
@pytest.mark.parametrize(
    "bad",
    [
        GOOD[:-1] + bytes((GOOD[-1] ^ 1,)),
        GOOD[:20] + bytes((GOOD[20] ^ 1,)) + GOOD[21:],
        bytes((GOOD[0] ^ 1,)) + GOOD[1:],
        with_crc((15).to_bytes(4, "big") + bytes(4)) + bytes(20),
        with_crc((16).to_bytes(4, "big") + (1).to_bytes(4, "big")) + bytes(20),
        with_crc((MAX_FRAME + 1).to_bytes(4, "big") + bytes(4)) + bytes(20),
        with_crc(b"\xff\xff\xff\xff" + bytes(4)) + bytes(20),
        with_crc((MAX_FRAME).to_bytes(4, "big") + (MAX_FRAME_HEADERS + 1).to_bytes(4, "big")) + bytes(20),
        b'{"usage":{"inputTokens":1}}' * 2,
    ],
)
def test_what_is_no_frame_ends_the_watching(form: ModuleType, bad: bytes) -> None:
    assert everywhere(form, "bedrock", "frames", bad + GOOD)[0] is None
    assert everywhere(form, "bedrock", "frames", GOOD + bad + GOOD) == (None, "", False, False)


@both
def test_frames_without_usage_and_odd_payloads_are_passed_over(form: ModuleType) -> None:
    payloads = (
        b"", b"no json", b"[]", b"{", b'{"bytes":7}', b'{"bytes":"%%"}', b'{"bytes":"e30"}', b'{"bytes":"e30="}', b'{"bytes":"\\u00e9"}',
        b'{"bytes":"' + base64.b64encode(b"\xff\xfe") + b'"}', b'{"bytes":"' + b"A" * 20_000 + b'"}', b"[" * 2000,
    )  # fmt: skip
    data = b"".join(frame(payload) for payload in payloads)
    assert scan(form, "bedrock", "frames", [data + GOOD])[0] == {"input": 1, "output": 2, "total": 3}
    assert scan(form, "bedrock", "frames", [data])[0] is None


@both
def test_frames_agree_with_those_of_botocore(form: ModuleType) -> None:
    eventstream = pytest.importorskip("botocore.eventstream", reason="botocore is not installed")
    data = b"".join(frame(packed(event), named(name)) for name, event in CONVERSE_STREAM)
    buffer = eventstream.EventStreamBuffer()
    buffer.add_data(data)
    messages = list(buffer)
    assert [(m.headers[":event-type"], json.loads(m.payload)) for m in messages] == CONVERSE_STREAM
    buffer.add_data(GOOD[:-1] + bytes((GOOD[-1] ^ 1,)))
    with pytest.raises(eventstream.ChecksumMismatch):
        next(buffer)


# Cohere: what is billed is what is paid; ``tokens`` has what Cohere adds to a prompt, too.
BILLED = {"billed_units": {"input_tokens": 10, "output_tokens": 20}, "tokens": {"input_tokens": 500, "output_tokens": 20}}
COHERE_2: list[dict[str, Any]] = [
    {"type": "message-start", "id": "x", "delta": {"message": {"role": "assistant", "usage": {"tokens": {"input_tokens": 3}}}}},
    {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": SAYS}}}},
    {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": {**BILLED, "cached_tokens": 4}}},
]
COHERE_1: list[dict[str, Any]] = [
    {"event_type": "stream-start", "generation_id": "x", "is_finished": False},
    {"event_type": "text-generation", "text": SAYS, "is_finished": False},
    {"event_type": "stream-end", "is_finished": True, "finish_reason": "COMPLETE", "response": {"text": "x", "meta": {"api_version": {"version": "1"}, **BILLED}}},
]


@both
def test_cohere_answers(form: ModuleType) -> None:
    second = packed({"id": "x", "message": {"content": [{"text": SAYS}]}, "usage": BILLED})
    first = packed({"text": SAYS, "meta": {"api_version": {"version": "1"}, **BILLED}})
    for data in (first, second):
        assert everywhere(form, "cohere", "document", data) == (PLAIN, "", True, True)


@both
def test_cohere_streams(form: ModuleType) -> None:
    events = b"".join(f"event: {event['type']}\n".encode() + b"data: " + packed(event) + b"\n\n" for event in COHERE_2) + b"data: [DONE]\n\n"
    assert everywhere(form, "cohere", "events", events) == ({**PLAIN, "cache_read": 4}, "", True, True)
    lines = b"".join(packed(event) + b"\n" for event in COHERE_1)
    assert everywhere(form, "cohere", "lines", lines) == (PLAIN, "", True, True)


@both
@pytest.mark.parametrize(
    ("body", "counted"),
    [
        ({"embeddings": {}, "meta": {"billed_units": {"input_tokens": 3}}}, {"input": 3}),
        ({"embeddings": {}, "meta": {"billed_units": {"images": 1}}}, None),
        ({"results": [], "meta": {"billed_units": {"search_units": 1}}}, None),
        ({"usage": {"tokens": {"input_tokens": 5.0, "output_tokens": 6}}}, {"input": 5, "output": 6, "total": 11}),
        ({"usage": {"billed_units": {"input_tokens": 5, "output_tokens": 6}, "cached_tokens": 99}}, {"input": 5, "output": 6, "cache_read": 5, "total": 11}),
        ({"meta": {"billed_units": None, "tokens": []}}, None),
        ({"meta": "x"}, None),
    ],
)
def test_usage_of_cohere(form: ModuleType, body: Any, counted: dict[str, int] | None) -> None:
    assert everywhere(form, "cohere", "document", packed(body))[0] == counted


# Ollama: the counts stand in the document itself.
DONE = {"model": "llama3.2", "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": ""}, "done_reason": "stop", "done": True, "total_duration": 9, "prompt_eval_count": 10, "eval_count": 20}
PART = {"model": "llama3.2", "message": {"role": "assistant", "content": 'so "eval_count":7,', "eval_count": 8}, "done": False}


@both
def test_ollama(form: ModuleType) -> None:
    stream = b"".join(packed(line) + b"\n" for line in (PART, PART, DONE))
    assert everywhere(form, "ollama", "lines", stream) == (PLAIN, "llama3.2", True, True)
    assert everywhere(form, "ollama", "document", packed(DONE)) == (PLAIN, "llama3.2", True, True)
    assert everywhere(form, "ollama", "lines", packed(PART) + b"\n") == (None, "llama3.2", False, False)
    embedded = {"model": "e", "embeddings": [[0.5]], "total_duration": 1, "prompt_eval_count": 8}
    assert everywhere(form, "ollama", "document", packed(embedded)) == ({"input": 8}, "e", True, True)


@both
@pytest.mark.parametrize(
    ("stream", "usage", "final", "last"),
    [
        (packed(DONE) + packed(DONE)[:9], PLAIN, True, False),
        (packed({**DONE, "done": "true"}), PLAIN, False, True),
        (packed({**DONE, "eval_count": -1}), {"input": 10}, True, True),
        (packed({**DONE, "eval_count": {"a": 1}, "prompt_eval_count": 1e400}), None, False, False),
        (packed(DONE) + b"\nno json\n", None, False, False),
        (packed(DONE) + b",\n" + packed(DONE), None, False, False),
        (b"[" + packed(DONE) + b"]", None, False, False),
    ],
)
def test_odd_lines_of_ollama(form: ModuleType, stream: bytes, usage: dict[str, int] | None, final: bool, last: bool) -> None:
    found = everywhere(form, "ollama", "lines", stream)
    assert (found[0], *found[2:]) == (usage, final, last)


@both
def test_reasoning_that_only_the_total_has_is_output(form: ModuleType) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115, "completion_tokens_details": {"reasoning_tokens": 100}}
    found = {"input": 10, "output": 105, "total": 115, "reasoning": 100}
    assert everywhere(form, "openai", "document", packed({"usage": usage}))[0] == found


def test_unknown_framing_is_refused() -> None:
    for form in FORMS:
        with pytest.raises(ValueError, match="unknown framing 'smoke'"):
            form.UsageScanner("openai", "smoke")


DIALECTS = st.sampled_from(["openai", "anthropic", "gemini", "bedrock", "cohere", "ollama"])
FRAMINGS = st.sampled_from(["document", "events", "lines", "frames"])
bits = st.sampled_from(
    [b"[", b"]", b"{", b"}", b",", b" ", b"\n", b'"usageMetadata":', b'{"promptTokenCount":3}', b'"usage":', b'{"inputTokens":4}', b'{"bytes":"e30="}',
     b'"bytes":"', b'"', b"\\", b'"meta":{"billed_units":{"input_tokens":1}}', b'"delta":{', b'"prompt_eval_count":', b"7", b'"done":true',
     b'"modelVersion":"m"', b'{"usageMetadata":{"totalTokenCount":9}}', b'{"eval_count":1,"done":true}', b"data: ", GOOD, GOOD[:13], chunk(CLAUDE[3]), frame(b"{"),
     b'"amazon-bedrock-invocationMetrics":{"inputTokenCount":2}', b"\xff"]
)  # fmt: skip


@given(st.lists(bits, max_size=30).map(b"".join), st.lists(st.integers(0, 3000), max_size=5), DIALECTS, FRAMINGS)
def test_twins_agree_on_anything_cut_anywhere(data: bytes, cuts: list[int], dialect: str, framing: str) -> None:
    whole = scan(_usage_py, dialect, framing, [data])
    usage = whole[0]
    assert usage is None or all(type(count) is int and count >= 0 for count in usage.values())
    for form in FORMS:
        assert scan(form, dialect, framing, [data]) == whole
        assert scan(form, dialect, framing, pieces(data, cuts)) == whole


@given(st.binary(max_size=60), st.lists(st.binary(max_size=40), max_size=4), st.lists(st.integers(0, 500), max_size=4))
def test_frames_of_anything_are_read_by_both_alike(headers: bytes, payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(frame(payload, headers) for payload in payloads) + GOOD
    for form in FORMS:
        assert scan(form, "bedrock", "frames", pieces(data, cuts))[0] == {"input": 1, "output": 2, "total": 3}


sizes = st.integers(0, 10_000)
modal = st.dictionaries(st.sampled_from(["TEXT", "AUDIO", "IMAGE", "VIDEO"]), st.integers(1, 50), max_size=4)


def rows(by: dict[str, int]) -> list[dict[str, Any]]:
    return [{"modality": name, "tokenCount": count} for name, count in by.items()]


@given(modal, modal, sizes, sizes, sizes)
def test_gemini_is_counted_as_genai_prices_counts_it(prompt: dict[str, int], out: dict[str, int], thoughts: int, tools: int, cached: int) -> None:
    prompt_size, out_size = sum(prompt.values()), sum(out.values())
    cached = min(cached, prompt_size)
    fields = {
        "promptTokenCount": prompt_size,
        "candidatesTokenCount": out_size,
        "thoughtsTokenCount": thoughts,
        "toolUsePromptTokenCount": tools,
        "cachedContentTokenCount": cached,
        "totalTokenCount": prompt_size + out_size + thoughts + tools,
        "promptTokensDetails": rows(prompt),
        "candidatesTokensDetails": rows(out),
    }
    found = genai_prices.extract_usage({"modelVersion": "gemini-2.5-flash", "usageMetadata": fields}, provider_id="google").usage
    ours = gemini_usage(fields)
    assert (ours["input"], ours["output"], ours["cache_read"]) == (found.input_tokens, found.output_tokens, found.cache_read_tokens or 0)
    assert ours.get("input_audio", 0) == (found.input_audio_tokens or 0)
