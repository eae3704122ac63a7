"""The look at a model request: what it finds, what it leaves to others, and that it never finds what they would not."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from creto_hotpath.ask import Ask

from .conftest import FORMS

NOTHING = Ask(None, None, False, None, 1, None, False, False, False)
MESSAGES = [{"role": "user", "content": 'Say "hi" \\ \u00e4\U0001f600\n'}]


@pytest.fixture
def plain(form: Callable[[str], ModuleType]) -> Callable[[bytes], Any]:
    found: Callable[[bytes], Any] = form("ask").plain
    return found


def test_what_an_sdk_sends_is_plain(plain: Callable[[bytes], Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"]}}}] * 2
    body = {
        "model": "gpt-4o", "messages": MESSAGES, "max_tokens": 256, "max_completion_tokens": 9, "n": 2, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 1e-3, "tools": tools, "user": None,
    }  # fmt: skip
    expected = Ask("gpt-4o", True, True, 256, 2, 2, False, False, False)
    for ascii_only in (True, False):
        assert plain(json.dumps(body, ensure_ascii=ascii_only).encode()) == expected
        assert plain(json.dumps(body, ensure_ascii=ascii_only, indent=2).encode() + b"\r\n") == expected


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"{}", NOTHING),
        (b' {\t"a" : [ ] ,"b":{ } } ', NOTHING),
        (b'{"model":""}', NOTHING._replace(model="")),
        (b'{"max_tokens":0}', NOTHING._replace(limit=0)),
        (b'{"tools":[],"functions":[1,[2,3],{"a":[4,5]}]}', NOTHING._replace(tools=3)),
        (b'{"best_of":3,"n":0}', NOTHING._replace(choices=3)),
        (b'{"stream":false,"stream_options":{ "include_usage" : false }}', NOTHING._replace(stream=False)),
        (b'{"messages":[{"image_url":{"url":"https://x"}}]}', NOTHING._replace(refers=True)),
        (b'{"messages":[{"url":"data:image"},"url","http://x",{"content":"url\\":\\"http:"}]}', NOTHING),
        (b'{"a":{"file_id":"f"}}', NOTHING._replace(refers=True)),
        (b'{"a":[{"\\"file_id":"f"}]}', NOTHING._replace(refers=True)),
        (b'{"a":[{"my_file_id":"f","file_id":null}]}', NOTHING),
        (b'{"tools":[{"type":"web_search_preview"}]}', NOTHING._replace(tools=1, refers=True)),
        (b'{"tools":[{"type":"function","x":"mcp"}]}', NOTHING._replace(tools=1)),
        (b'{"a":[{"cache_control":{"type":"ephemeral"}}]}', NOTHING._replace(caches=True)),
        (b'{"modalities":["text","audio"]}', NOTHING._replace(audio=True)),
        (b'{"a":{"input_audio":{}}}', NOTHING._replace(audio=True)),
        (b'{"a":"my_audio"}', NOTHING),
        (b'{"a":"\\ud83d\\ude00"}', NOTHING),
        (b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", NOTHING),
    ],
)  # fmt: skip
def test_what_a_plain_body_says(plain: Callable[[bytes], Any], body: bytes, found: Ask) -> None:
    assert plain(body) == found


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"[]", b"null", b"{", b"{}x", b"{}{}", b"{,}", b'{"a":1,}', b'{"a"}', b'{"a":}', b"{'a':1}", b'{"a":[1,]}',
        b'{"a":[,]}', b'{"a":{"b"}}', b'{"a":{"b":1,}}', b'{"a":[1}}', b'{"a":{"b":1]}', b'{"a":01}', b'{"a":-}', b'{"a":1.}',
        b'{"a":+1}', b'{"a":.5}', b'{"a":1e}', b'{"a":NaN}', b'{"a":tru}', b'{"a":truex}', b'{"a":"\x01"}', b'{"a":"\\x"}',
        b'{"a":"\\u12g4"}', b'{"a":"\\ud800"}', b'{"a":"\\udc00"}', b'{"a":"\\ud800\\u0041"}', b'{"a":"', b'{"a":"\\', b'{"a":"\\u12',
        b"\xef\xbb\xbf{}", b"\x0b{}", b'{"a":1 2}',
        # spelled otherwise, twice, or with a meaning that takes more than a look
        b'{"Model":"x"}', b'{"model":"x","model":"x"}', b'{"m\\u006fdel":"x"}', '{"mod\u00e9l":"x"}'.encode(), b'{"":1}', b'{"top-p":1}',
        b'{"model":null}', b'{"model":"a\\u0062"}', b'{"model":["x"]}', '{"model":"\u00e9"}'.encode(), b'{"model":"' + b"x" * 129 + b'"}',
        b'{"stream":null}', b'{"stream":1}', b'{"stream":"true"}', b'{"stream_options":null}', b'{"stream_options":{}}',
        b'{"stream_options":{"include_usage":true,"x":1}}', b'{"stream_options":{"include_usage":1}}', b'{"max_tokens":null}',
        b'{"max_tokens":1.0}', b'{"max_tokens":1e3}', b'{"max_tokens":-1}', b'{"max_tokens":"5"}', b'{"max_tokens":1000000001}',
        b'{"max_tokens":99999999999999999999}', b'{"n":1000001}', b'{"n":007}', b'{"tools":{}}', b'{"tools":null}', b'{"prompt":"x"}',
        b'{"service_tier":"auto"}', b'{"speed":"fast"}', b'{"options":{}}', b'{"max_gen_len":1}', b'{"generation_config":{}}', b'{"container":null}', b'{"mcp_servers":[]}',
        b'{"conversation":"x"}', b'{"previous_response_id":"x"}', b'{"max_tokens_to_sample":5}', b'{"generationConfig":{}}',
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", b"{" + b",".join(b'"a%d":1' % i for i in range(49)) + b"}",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_others(plain: Callable[[bytes], Any], body: bytes) -> None:
    assert plain(body) is None


_words = st.sampled_from(
    ["model", "stream", "stream_options", "max_tokens", "n", "best_of", "tools", "functions", "url", "file_id", "type",
     "cache_control", "audio", "input_audio", "http://x", "web_search", "include_usage", '"audio', '"file_id', "\u00e4", "a"]
)  # fmt: skip
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | _words | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
_bodies = st.builds(
    lambda document, indent, ascii_only: json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass"
    ),
    st.dictionaries(_words, _values, max_size=8),
    st.sampled_from([None, 1]),
    st.booleans(),
)
_pieces = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"d83d", b"de00", b" ", b"\n", b"true", b"null", b"1",
                     b"-", b".", b"e", b'"model":', b'"url":', b'"max_tokens":', b"\x00", b"\xff", b"audio", b'"a":1']),
    max_size=24,
).map(b"".join)  # fmt: skip


@st.composite
def _broken(draw: st.DrawFn) -> bytes:
    body = draw(_bodies)
    at = draw(st.integers(0, len(body)))
    return body[:at] + draw(st.binary(max_size=3) | _pieces) + body[at + draw(st.integers(0, 3)) :]


@settings(max_examples=600, deadline=None)
@given(_bodies | _pieces | _pieces.map(lambda inside: b'{"a":' + inside + b"}") | _broken())
@example(b'{"a":"' + b"x" * 40 + b'\x80\x1f"}')
def test_all_forms_find_the_same_and_only_what_json_has(body: bytes) -> None:
    found, *others = (form("ask").plain(body) for form in FORMS)
    assert all(other == found for other in others)
    if found is None:
        return
    document = json.loads(body.decode("utf-8", "replace"))
    assert document.get("model") == found.model and document.get("stream") == found.stream
    limits = [document[name] for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in document]
    assert found.limit == (max(limits) if limits else None)
    offered = [document[name] for name in ("tools", "functions") if name in document]
    assert found.tools == (sum(map(len, offered)) if offered else None)
    assert found.choices == max(1, document.get("n", 1), document.get("best_of", 1))
    assert found.includes_usage == bool(document.get("stream_options", {}).get("include_usage"))
