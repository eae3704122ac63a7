"""Token usage in answers: both forms of the scanner, whole and cut at every byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath import _usage_py
from creto_hotpath._select import extensions_wanted
from creto_hotpath._usage_fields import openai_usage, usage_fields

FORMS: list[ModuleType] = [_usage_py]
if extensions_wanted():
    FORMS.append(import_module("creto_hotpath._usage_c"))

TWINS = [pytest.param(form, id=form.__name__.rpartition(".")[2]) for form in FORMS]
both = pytest.mark.parametrize("form", TWINS)

CHUNK = '"id":"chatcmpl-B","object":"chat.completion.chunk","created":1741569952,"model":"gpt-4o-mini-2024-07-18"'
FINGERPRINT = '"service_tier":"default","system_fingerprint":"fp_06737a9306"'
TEXTS = ["Hel", 'say "usage":null', "lo\\n\\n"]
USAGE = (
    '{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":3,'
    '"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":4,"audio_tokens":0}}'
)
COUNTED = {
    "input": 19, "output": 10, "total": 29, "cache_read": 3, "input_audio": 0, "reasoning": 4, "output_audio": 0,
}  # fmt: skip


def chat_stream(*, with_usage: bool, eol: str = "\n", first: bool = False) -> bytes:
    """A chat completion stream as api.openai.com sends it, with or without ``include_usage``."""
    null = '"usage":null' if with_usage else ""
    events = []
    for text in TEXTS:
        choices = json.dumps([{"index": 0, "delta": {"content": text}, "finish_reason": None}], separators=(",", ":"))
        members = [null, CHUNK, FINGERPRINT, f'"choices":{choices}'] if first else []
        members = members or [CHUNK, FINGERPRINT, f'"choices":{choices}', null, '"obfuscation":"aK3"']
        events.append("data: {" + ",".join(m for m in members if m) + "}")
    if with_usage:
        events.append("data: {" + f'{CHUNK},{FINGERPRINT},"choices":[],"usage":{USAGE}' + "}")
    events.append("data: [DONE]")
    return "".join(event + eol + eol for event in events).encode()


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in zip(edges, edges[1:], strict=False):
        yield data[start:end]


def scan(form: ModuleType, dialect: str, framing: str, parts: Iterator[bytes] | list[bytes], strip: bool = False) -> Any:
    scanner = form.UsageScanner(dialect, framing, strip)
    sent = [scanner.feed(part) for part in parts]
    sent.append(scanner.finish())
    out = b"".join(sent) if strip else None
    assert strip or not any(sent)
    return scanner.usage, scanner.model, scanner.final, scanner.last, out


@both
@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"])
def test_chat_stream_is_counted_wherever_the_network_cuts_it(form: ModuleType, eol: str) -> None:
    data = chat_stream(with_usage=True, eol=eol)
    expected = (COUNTED, "gpt-4o-mini-2024-07-18", True, True, None)
    for cut in range(len(data) + 1):
        assert scan(form, "openai", "events", [data[:cut], data[cut:]]) == expected
    assert scan(form, "openai", "events", [data[i : i + 1] for i in range(len(data))]) == expected


@both
@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("first", [False, True], ids=["member-last", "member-first"])
def test_client_that_did_not_ask_sees_exactly_the_stream_without_usage(form: ModuleType, eol: str, first: bool) -> None:
    asked = chat_stream(with_usage=True, eol=eol, first=first)
    plain = chat_stream(with_usage=False, eol=eol, first=first)
    for cut in range(len(asked) + 1):
        *_, out = scan(form, "openai", "events", [asked[:cut], asked[cut:]], strip=True)
        assert out == plain
    *_, out = scan(form, "openai", "events", [asked[i : i + 1] for i in range(len(asked))], strip=True)
    assert out == plain


@both
def test_stripping_leaves_a_stream_without_usage_alone(form: ModuleType) -> None:
    plain = chat_stream(with_usage=False)
    assert scan(form, "openai", "events", [plain], strip=True)[-1] == plain


@both
@pytest.mark.parametrize(
    ("event", "sent"),
    [
        ('data: {"usage": null, "choices": [1]}', 'data: {"choices": [1]}'),
        ('data: {"choices": [1], "usage": null, "x": 1}', 'data: {"choices": [1], "x": 1}'),
        ('data: {"usage":null}', "data: {}"),
        ('data: {"x":{"usage":null},"choices":[{"usage":null}]}', None),
        ('data: {"choices":[{"a":1}],"usage":{"prompt_tokens":1}}', None),  # sent without being asked: not ours
        ('data: {"choices":[],"prompt_filter":[1],"usage":null}', 'data: {"choices":[],"prompt_filter":[1]}'),
        ('data: {"choices":[ ],"usage":{"prompt_tokens":1}}', ""),
        (': note\nid: 7\ndata:{"choices":[],"usage":{"prompt_tokens":1}}', ""),
        ('data: {"choices":\ndata: [],"usage":{"prompt_tokens":1}}', ""),
        ('data: {"choices":[],"usage":{"prompt_tokens":1}}\ndata: more', None),
        ('data: {"choices":[],"usage":{"prompt_tokens":1}', None),
        ('data: {"choices":[],"usage":null]', None),
        ("data: nonsense", None),
        (": keep-alive", None),
        ("", None),
    ],
)  # fmt: skip
def test_only_the_extra_chunk_and_null_usage_are_removed(form: ModuleType, event: str, sent: str | None) -> None:
    around = 'data: {"choices":[{}]}\n\n'
    expected = around + (event + "\n\n" if sent is None else sent and sent + "\n\n") + around
    given = around + event + "\n\n" + around
    assert scan(form, "openai", "events", [given.encode()], strip=True)[-1] == expected.encode()


@both
def test_usage_chunk_at_the_end_without_a_blank_line_is_removed_too(form: ModuleType) -> None:
    data = b'data: {"choices":[1]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
    usage, _, _, _, out = scan(form, "openai", "events", [data], strip=True)
    assert usage == {"input": 1, "output": 2, "total": 3}
    assert out == b'data: {"choices":[1]}\n\n'


@both
def test_event_longer_than_may_be_held_passes_unchanged_and_is_still_counted(form: ModuleType) -> None:
    text = b"x" * (form.MAX_HELD + 10)
    data = b'data: {"pad":"' + text + b'","choices":[],"usage":{"prompt_tokens":1,"total_tokens":4}}\n\nrest: 1\n\n'
    for size in (len(data), 100_000, form.MAX_HELD):
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        usage, _, _, _, out = scan(form, "openai", "events", parts, strip=True)
        assert usage == {"input": 1, "output": 3, "total": 4}
        assert out == data


@both
def test_endless_line_is_passed_on_in_bounded_memory_and_leaves_usage_unknown(form: ModuleType) -> None:
    scanner = form.UsageScanner("openai", "events", True)
    scanner.feed(b'data: {"usage":{"prompt_tokens":')
    waiting = len(b'data: {"usage":{"prompt_tokens":')
    for _ in range(40):
        waiting += 65536 - len(scanner.feed(b"1" * 65536))
        assert waiting <= form.MAX_HELD
    assert scanner.usage is None


@both
def test_captured_value_that_is_too_long_leaves_usage_unknown(form: ModuleType) -> None:
    data = b'{"usage":{"x":"' + b"y" * form.MAX_CAPTURE + b'","prompt_tokens":1},"model":"m"}'
    for size in (len(data), 1000):
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        assert scan(form, "openai", "document", parts)[:2] == (None, "m")


@both
def test_document_nested_too_deeply_is_ignored(form: ModuleType) -> None:
    deep = b'{"usage":{"prompt_tokens":1},"x":' + b"[" * form.MAX_DEPTH + b"]" * form.MAX_DEPTH + b"}"
    assert scan(form, "openai", "document", [deep])[0] is None
    fits = b'{"usage":{"prompt_tokens":1},"x":' + b"[" * (form.MAX_DEPTH - 1) + b"]" * (form.MAX_DEPTH - 1) + b"}"
    assert scan(form, "openai", "document", [fits])[0] == {"input": 1}


ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-sonnet-4-5-20250929","id":"m",'
    b'"content":[],"usage":{"input_tokens":25,"cache_creation_input_tokens":100,"cache_read_input_tokens":7,'
    b'"cache_creation":{"ephemeral_5m_input_tokens":60,"ephemeral_1h_input_tokens":40},"output_tokens":1}}}\n\n'
    b'event: ping\ndata: {"type": "ping"}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
    b'"text":"\\"usage\\":{\\"output_tokens\\":9}"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":15,"cache_read_input_tokens":0,"server_tool_use":{"web_search_requests":2}}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)


@both
def test_anthropic_events_are_merged_field_by_field_and_a_zero_never_clobbers(form: ModuleType) -> None:
    expected = {
        "input": 132, "output": 15, "cache_read": 7, "cache_write": 100, "cache_write_1h": 40, "web_search": 2,
        "total": 147,
    }  # fmt: skip
    for cut in range(len(ANTHROPIC) + 1):
        usage, model, final, _, _ = scan(form, "anthropic", "events", [ANTHROPIC[:cut], ANTHROPIC[cut:]])
        assert (usage, model, final) == (expected, "claude-sonnet-4-5-20250929", True)


@both
def test_anthropic_stream_cut_before_its_last_word_is_not_final(form: ModuleType) -> None:
    cut = ANTHROPIC[: ANTHROPIC.index(b"event: message_delta")]
    usage, _, final, last, _ = scan(form, "anthropic", "events", [cut])
    assert usage is not None
    assert (usage["output"], final, last) == (1, False, False)


@both
def test_responses_stream_is_counted_from_its_completed_event(form: ModuleType) -> None:
    data = (
        b'event: response.created\ndata: {"type":"response.created","response":{"model":"gpt-5","usage":null}}\n\n'
        b'event: response.output_text.delta\ndata: {"delta":"{\\"usage\\":{}}"}\n\n'
        b'event: response.completed\ndata: {"type":"response.completed","response":{"model":"gpt-5-2025-08-07",'
        b'"output":[{"usage":{"input_tokens":1}}],"usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":4},'
        b'"output_tokens":87,"output_tokens_details":{"reasoning_tokens":64},"total_tokens":123}}}\n\n'
    )
    expected = {"input": 36, "output": 87, "total": 123, "cache_read": 4, "reasoning": 64}
    for cut in range(len(data) + 1):
        usage, model, final, _, _ = scan(form, "openai-responses", "events", [data[:cut], data[cut:]])
        assert (usage, model, final) == (expected, "gpt-5-2025-08-07", True)


@both
@pytest.mark.parametrize(
    ("dialect", "body", "expected"),
    [
        ("openai", {"usage": {"prompt_tokens": 8, "total_tokens": 8}}, {"input": 8, "output": 0, "total": 8}),
        ("openai", {"usage": {"total_tokens": 42}}, {"total": 42}),
        ("openai", {"usage": None}, None),
        ("openai", {"usage": {}}, None),
        ("openai", {"usage": []}, None),
        ("openai", {"usage": {"prompt_tokens": -1, "completion_tokens": 3}}, {"output": 3}),
        ("openai", {"usage": {"prompt_tokens": 10**10, "completion_tokens": True}}, None),
        ("openai", {"usage": {"prompt_tokens": 5.0, "completion_tokens": 1.5}}, {"input": 5}),
        ("openai", {"choices": [{"message": {"usage": {"prompt_tokens": 9}}}]}, None),
        ("openai", {"response": {"usage": {"prompt_tokens": 9}}}, None),
        ("openai-responses", {"usage": {"input_tokens": 3, "output_tokens": 4}}, {"input": 3, "output": 4, "total": 7}),
        ("anthropic", {"usage": {"input_tokens": 3, "output_tokens": 4}}, {"input": 3, "output": 4, "total": 7}),
        ("anthropic", {"message": {"usage": {"input_tokens": 3}}}, None),
    ],
)  # fmt: skip
def test_usage_of_a_json_answer(form: ModuleType, dialect: str, body: Any, expected: dict[str, int] | None) -> None:
    for indent in (None, 2):
        data = json.dumps(body, indent=indent).encode()
        assert scan(form, dialect, "document", [data])[0] == expected
        assert scan(form, dialect, "document", [data[i : i + 1] for i in range(len(data))])[0] == expected


@both
@pytest.mark.parametrize(
    "body",
    [
        b'{"usage":{"prompt_tokens":1}',
        b'{"usage":{"prompt_tokens":1}} trailing',
        b'{"usage":{"prompt_tokens":1}}{"usage":{"prompt_tokens":1}}',
        b'[{"usage":{"prompt_tokens":1}}]',
        b'{"usage":{"prompt_tokens":1]}',
        b'{"usage":{"prompt_tokens":' + b"9" * 5000 + b"}}",
        b'{"usage" {"prompt_tokens":1}}',
        b'{"us\\u0061ge":{"prompt_tokens":1}}',
        b"\x1f\x8b\x08\x00" + bytes(range(256)),
        b"",
    ],
)
def test_answer_that_is_not_one_object_leaves_usage_unknown(form: ModuleType, body: bytes) -> None:
    assert scan(form, "openai", "document", [body])[0] is None
    assert scan(form, "openai", "document", [body[i : i + 1] for i in range(len(body))])[0] is None


@both
def test_last_usage_of_an_openai_stream_wins_and_invalid_lines_are_ignored(form: ModuleType) -> None:
    data = (
        b'data: {"usage":{"total_tokens":1},"choices":[{}]}\n\ndata: {broken\n\ndata: nonsense\n'
        b'data: {"usage":{"total_tokens":2},"choices":[{}]}\n\ndata: {"usage":{"total_tokens":3}'
    )
    assert scan(form, "openai", "events", [data]) == ({"total": 2}, "", False, True, None)


def test_unknown_dialect_is_refused() -> None:
    for form in FORMS:
        with pytest.raises(ValueError, match="unknown dialect 'smoke'"):
            form.UsageScanner("smoke", "events")


names = st.sampled_from(["usage", "model", "choices", "message", "response", "x", "prompt_tokens"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
counts = st.none() | st.integers(-2, 2 * 10**9)
usages = st.dictionaries(
    st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"]), counts
)
documents = st.dictionaries(st.sampled_from(["model", "choices", "x", "message", "response"]), json_values).flatmap(
    lambda document: usages.map(lambda usage: {**document, "usage": usage})
)
noise = st.sampled_from(
    [b"data: ", b"data:{", b"\n", b"\r", b"\r\n", b'{"', b'"usage"', b":", b"null", b'{"prompt_tokens":1}', b",", b"}",
     b"]", b"[", b'"choices":[]', b'"model":"m"', b'"', b"\\", b" ", b'"response":{', b'"message":{', b"\xff", b"7"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(documents, st.lists(st.integers(0, 10_000), max_size=4), st.booleans())
def test_valid_json_is_read_as_a_json_parser_reads_it(document: dict[str, Any], cuts: list[int], spaced: bool) -> None:
    data = json.dumps(document, indent=1 if spaced else None, ensure_ascii=False).encode()
    expected = openai_usage(usage_fields(json.dumps(document["usage"]).encode())) or None
    model = document.get("model")
    for form in FORMS:
        usage, named, *_ = scan(form, "openai", "document", pieces(data, cuts))
        assert (usage, named) == (expected, model if isinstance(model, str) else "")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(noise, max_size=40).map(b"".join),
    st.lists(st.integers(0, 1000), max_size=5),
    st.sampled_from(["openai", "openai-responses", "anthropic"]),
    st.sampled_from(["document", "events"]),
    st.booleans(),
)
def test_twins_agree_on_anything_cut_anywhere(
    data: bytes, cuts: list[int], dialect: str, framing: str, strip: bool
) -> None:
    whole = scan(_usage_py, dialect, framing, [data], strip)
    for form in FORMS:
        assert scan(form, dialect, framing, [data], strip) == whole
        assert scan(form, dialect, framing, pieces(data, cuts), strip) == whole


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=5), st.sampled_from([None, 0, 2]))
def test_members_of_a_valid_object_are_found_where_they_are(document: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(document, indent=indent).encode()
    for form in FORMS:
        members = form.object_members(body)
        named = {json.loads(b'"' + name + b'"'): json.loads(body[start:end]) for name, _, start, end in members}
        assert named == document
        assert all(body[at : at + 1] == b'"' for _, at, _, _ in members)


@settings(max_examples=100, deadline=None)
@given(st.lists(noise, max_size=25).map(b"".join).map(lambda inner: b"{" + inner))
def test_twins_agree_on_the_members_of_anything(body: bytes) -> None:
    answers = []
    for form in FORMS:
        try:
            answers.append(form.object_members(body))
        except ValueError as error:
            answers.append(str(error))
    assert answers == answers[:1] * len(FORMS)


@both
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not a JSON object at byte 0"),
        (b"[1]", "not a JSON object at byte 0"),
        (b"{", "a member name is missing at byte 1"),
        (b'{"a"}', "a colon is missing at byte 4"),
        (b'{"a":}', "a value is missing at byte 5"),
        (b'{"a":1,}', "a member name is missing at byte 7"),
        (b'{"a":1 "b":2}', "a comma or closing brace is missing at byte 7"),
        (b'{"a":[}', "brackets do not match at byte 6"),
        (b'{"a":[1', "brackets are not closed, opened at byte 5"),
        (b'{"a":"x\\', "a string is not closed, opened at byte 5"),
        (b'{"a":1} {', "something follows the JSON object at byte 8"),
        (b'{"a":' + b"[" * 600 + b"]" * 600 + b"}", "nested too deeply at byte 517"),
    ],
)
def test_body_that_is_not_one_object_is_refused_with_the_place(form: ModuleType, body: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        form.object_members(body)
