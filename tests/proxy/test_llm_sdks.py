"""The providers' own SDKs through creto, on real sockets: unchanged answers, and what they used in the journal."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from creto_proxy.audit import outcomes
from creto_proxy.model import Outcome, Usage
from creto_proxy.service import Service

from .sdk_lab import in_front

PROVIDERS = {"gemini": "google", "bedrock": "bedrock", "cohere": "cohere", "ollama": "ollama", "vllm": "openai"}
CONFIG = """
[common]
state_dir = "{directory}/state"
owner = "alice"
[policy]
dir = "{directory}/policies"
[limits]
drain_s = 0
[plugins]
disabled = ["oversight"]
[egress]
allow = [{hosts}]
[protocols.llm]
{providers}
[egress.resolve]
{pins}
{routes}
"""


@dataclass
class Answer:
    """pieces: of the body, each written by itself."""

    content_type: str
    pieces: list[bytes]
    fields: tuple[tuple[str, str], ...] = ()


class Lab:
    """One creto with a route to each provider, behind all of which is one server that answers ``answer``."""

    def __init__(self, service: Service, port: int, received: list[tuple[str, Any]], answers: list[Answer]) -> None:
        self._service = service
        self._port = port
        self._answers = answers
        self._before = 0
        self.received = received

    def url(self, provider: str) -> str:
        return f"http://127.0.0.1:{self._port}/{provider}"

    def answers(self, content_type: str, *pieces: bytes, fields: tuple[tuple[str, str], ...] = ()) -> None:
        self._answers[:] = [Answer(content_type, list(pieces), fields)]
        self._before = len(self._outcomes())

    def usage(self) -> Usage:
        """Of the request that was answered; clients may have what they want before its answer ends."""
        deadline = time.monotonic() + 60
        while len(found := self._outcomes()) == self._before:
            assert time.monotonic() < deadline, "nothing was recorded"
            time.sleep(0.01)
        return found[-1].usage

    def _outcomes(self) -> list[Outcome]:
        return list(outcomes(self._service.state / "journal", "sdk"))


def origin(received: list[tuple[str, Any]], answers: list[Answer]) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            received.append((self.path, json.loads(body)))
            answer = answers[0]
            self.send_response(200)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Transfer-Encoding", "chunked")
            for name, value in answer.fields:
                self.send_header(name, value)
            self.end_headers()
            for piece in answer.pieces:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: object) -> None:
            return None

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("sdks")
    received, answers = list[tuple[str, Any]](), list[Answer]()
    server = origin(received, answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with in_front(_written(directory, server.server_address[1])) as (service, port):
            yield Lab(service, port, received, answers)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _written(directory: Path, upstream: int) -> Path:
    (directory / "policies").mkdir()
    (directory / "policies" / "all.cedar").write_text('@id("all") permit (principal, action, resource);')
    file = directory / "creto.toml"
    file.write_text(
        CONFIG.format(
            directory=directory,
            hosts=", ".join(f'"{name}.test:80"' for name in PROVIDERS),
            providers="\n".join(f'"{name}.test" = "{provider}"' for name, provider in PROVIDERS.items()),
            pins="\n".join(f'"{name}.test" = "127.0.0.1:{upstream}"' for name in PROVIDERS),
            routes="\n".join(f'[[reverse]]\nname = "{name}"\nupstream = "http://{name}.test"' for name in PROVIDERS),
        )
    )
    return file


# Gemini.
METADATA = {
    "promptTokenCount": 12, "cachedContentTokenCount": 4, "candidatesTokenCount": 3, "thoughtsTokenCount": 20, "totalTokenCount": 35,
}  # fmt: skip


def gemini_chunks() -> list[dict[str, Any]]:
    content = {"parts": [{"text": "Hel"}], "role": "model"}
    early = {"promptTokenCount": 12, "totalTokenCount": 12}
    return [
        {"candidates": [{"content": content}], "modelVersion": "gemini-2.5-flash", "usageMetadata": early},
        {"candidates": [{"content": content, "finishReason": "STOP"}], "modelVersion": "gemini-2.5-flash", "usageMetadata": METADATA},
    ]


@pytest.fixture
def gemini(lab: Lab) -> Iterator[Any]:
    genai = pytest.importorskip("google.genai", reason="google-genai is not installed")
    with genai.Client(api_key="k", http_options={"base_url": lab.url("gemini")}) as client:
        yield client


def check_gemini(usage: Usage) -> None:
    assert (usage.certainty, usage.provider, usage.model) == ("exact", "google", "gemini-2.5-flash")
    assert usage.tokens == {"input": 12, "output": 23, "total": 35, "cache_read": 4, "reasoning": 20}
    # 0.30, 0.03 and 2.50 USD per million tokens.
    assert usage.cost_nano_usd == 8 * 300 + 4 * 30 + 23 * 2500


def test_gemini_sdk(lab: Lab, gemini: Any) -> None:
    lab.answers("application/json; charset=UTF-8", json.dumps(gemini_chunks()[-1], indent=2).encode())
    answer = gemini.models.generate_content(model="gemini-2.5-flash", contents="hi", config={"max_output_tokens": 50})
    assert (answer.usage_metadata.thoughts_token_count, answer.text) == (20, "Hel")
    check_gemini(lab.usage())


def test_gemini_sdk_streams(lab: Lab, gemini: Any) -> None:
    lab.answers("text/event-stream", *(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n" for chunk in gemini_chunks()))
    chunks = list(gemini.models.generate_content_stream(model="gemini-2.5-flash", contents="hi"))
    assert lab.received[-1][0].endswith(":streamGenerateContent?alt=sse")
    assert [chunk.text for chunk in chunks] == ["Hel", "Hel"]
    check_gemini(lab.usage())


def test_gemini_streams_an_array_to_those_who_ask_for_no_events(lab: Lab) -> None:
    httpx = pytest.importorskip("httpx")
    parts = [json.dumps(chunk).encode() for chunk in gemini_chunks()]
    lab.answers("application/json", b"[" + parts[0], b",\r\n", parts[1][:50], parts[1][50:] + b"\n]")
    answer = httpx.post(lab.url("gemini") + "/v1beta/models/gemini-2.5-flash:streamGenerateContent", json={"contents": []})
    assert answer.json() == gemini_chunks()
    check_gemini(lab.usage())


def test_gemini_sdk_counts_tokens_for_nothing(lab: Lab, gemini: Any) -> None:
    lab.answers("application/json", b'{"totalTokens":7}')
    assert gemini.models.count_tokens(model="gemini-2.5-flash", contents="hi").total_tokens == 7
    assert lab.usage() == Usage()


# Bedrock.
MODEL = "us.anthropic.claude-haiku-4-5-20251001-v1:0"


@pytest.fixture
def bedrock(lab: Lab) -> Iterator[Any]:
    session = pytest.importorskip("botocore.session", reason="botocore is not installed")
    client = session.Session().create_client(
        "bedrock-runtime", region_name="us-east-1", endpoint_url=lab.url("bedrock"), aws_access_key_id="k", aws_secret_access_key="s"
    )
    yield client
    client.close()


def frame(event: str, payload: Any) -> bytes:
    names = {":event-type": event, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(bytes((len(k),)) + k.encode() + b"\x07" + len(v).to_bytes(2, "big") + v.encode() for k, v in names.items())
    body = json.dumps(payload).encode()
    prelude = (len(body) + len(headers) + 16).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    text = prelude + zlib.crc32(prelude).to_bytes(4, "big") + headers + body
    return text + zlib.crc32(text).to_bytes(4, "big")


CONVERSE_USAGE = {"inputTokens": 10, "outputTokens": 20, "totalTokens": 130, "cacheReadInputTokens": 100}


def check_bedrock(usage: Usage, *, cached: int) -> None:
    assert (usage.certainty, usage.provider, usage.model) == ("exact", "bedrock", MODEL)
    assert (usage.tokens["input"], usage.tokens["output"], usage.tokens.get("cache_read", 0)) == (10 + cached, 20, cached)
    # 1.10, 0.11 and 5.50 USD per million tokens.
    assert usage.cost_nano_usd == 10 * 1100 + cached * 110 + 20 * 5500


def converse(client: Any, operation: str = "converse") -> Any:
    messages = [{"role": "user", "content": [{"text": "hi"}]}]
    return getattr(client, operation)(modelId=MODEL, messages=messages, inferenceConfig={"maxTokens": 50})


def test_bedrock_sdk_converses(lab: Lab, bedrock: Any) -> None:
    message = {"role": "assistant", "content": [{"text": "Hello"}]}
    body = {"output": {"message": message}, "stopReason": "end_turn", "usage": CONVERSE_USAGE, "metrics": {"latencyMs": 1}}
    lab.answers("application/json", json.dumps(body).encode())
    assert converse(bedrock)["usage"]["cacheReadInputTokens"] == 100
    assert "%3A0/converse" in lab.received[-1][0]
    check_bedrock(lab.usage(), cached=100)


def test_bedrock_sdk_converses_in_a_stream(lab: Lab, bedrock: Any) -> None:
    events = [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Hello"}, "p": "abc"}),
        ("messageStop", {"stopReason": "end_turn"}),
        ("metadata", {"usage": CONVERSE_USAGE, "metrics": {"latencyMs": 1}}),
    ]
    data = b"".join(frame(name, payload) for name, payload in events)
    lab.answers("application/vnd.amazon.eventstream", data[:7], data[7:150], data[150:])
    seen = list(converse(bedrock, "converse_stream")["stream"])
    assert [next(iter(event)) for event in seen] == [name for name, _ in events]
    check_bedrock(lab.usage(), cached=100)


def test_bedrock_sdk_invokes(lab: Lab, bedrock: Any) -> None:
    counts = (("X-Amzn-Bedrock-Input-Token-Count", "10"), ("X-Amzn-Bedrock-Output-Token-Count", "20"))
    lab.answers("application/json", b'{"outputs":[{"text":"Hello"}]}', fields=counts)
    answer = bedrock.invoke_model(modelId=MODEL, body=json.dumps({"prompt": "hi", "max_tokens": 50}))
    assert json.loads(answer["body"].read())["outputs"][0]["text"] == "Hello"
    check_bedrock(lab.usage(), cached=0)


def test_bedrock_sdk_invokes_in_a_stream(lab: Lab, bedrock: Any) -> None:
    metrics = {"inputTokenCount": 10, "outputTokenCount": 20, "invocationLatency": 9, "firstByteLatency": 3}
    documents = [{"type": "message_delta", "usage": {"output_tokens": 20}}, {"type": "message_stop", "amazon-bedrock-invocationMetrics": metrics}]
    lab.answers(
        "application/vnd.amazon.eventstream",
        *(frame("chunk", {"bytes": base64.b64encode(json.dumps(each).encode()).decode()}) for each in documents),
    )
    answer = bedrock.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps({"messages": [], "max_tokens": 50}))
    assert [json.loads(event["chunk"]["bytes"]) for event in answer["body"]] == documents
    check_bedrock(lab.usage(), cached=0)


def test_a_broken_frame_reaches_the_sdk_as_it_is_and_leaves_usage_unknown(lab: Lab, bedrock: Any) -> None:
    eventstream = pytest.importorskip("botocore.eventstream")
    good = frame("metadata", {"usage": CONVERSE_USAGE, "metrics": {"latencyMs": 1}})
    lab.answers("application/vnd.amazon.eventstream", good[:-1] + bytes((good[-1] ^ 1,)))
    stream = converse(bedrock, "converse_stream")["stream"]
    with pytest.raises(eventstream.ChecksumMismatch):
        list(stream)
    stream.close()
    assert lab.usage().certainty == "unknown"


# Ollama.
@pytest.fixture
def ollama(lab: Lab) -> Iterator[Any]:
    module = pytest.importorskip("ollama", reason="ollama is not installed")
    client = module.Client(host=lab.url("ollama"))
    yield client
    client._client.close()


def ollama_line(text: str, *, done: bool) -> bytes:
    counts = {"done_reason": "stop", "prompt_eval_count": 11, "eval_count": 7} if done else {}
    return json.dumps({"model": "llama3.2", "message": {"role": "assistant", "content": text}, "done": done, **counts}).encode() + b"\n"


def check_ollama(usage: Usage) -> None:
    assert (usage.certainty, usage.provider, usage.model) == ("estimated", "ollama", "llama3.2")
    assert usage.tokens == {"input": 11, "output": 7, "total": 18}


def test_ollama_sdk(lab: Lab, ollama: Any) -> None:
    lab.answers("application/json; charset=utf-8", ollama_line("Hello", done=True))
    assert ollama.chat(model="llama3.2", messages=[{"role": "user", "content": "hi"}]).eval_count == 7
    check_ollama(lab.usage())


def test_ollama_sdk_streams(lab: Lab, ollama: Any) -> None:
    lab.answers("application/x-ndjson", ollama_line("Hel", done=False), ollama_line("lo", done=False)[:9], ollama_line("lo", done=False)[9:] + ollama_line("", done=True))
    parts = list(ollama.chat(model="llama3.2", messages=[{"role": "user", "content": "hi"}], stream=True, options={"num_predict": 9}))
    assert "".join(part.message.content or "" for part in parts) == "Hello"
    check_ollama(lab.usage())


def test_ollama_sdk_embeds(lab: Lab, ollama: Any) -> None:
    lab.answers("application/json", b'{"model":"e","embeddings":[[0.5]],"prompt_eval_count":4}')
    assert ollama.embed(model="e", input="hi").embeddings == [[0.5]]
    assert lab.usage().tokens == {"input": 4}


# Cohere, whose SDK brings more than a test is worth, and vLLM.
def test_cohere_streams_events(lab: Lab) -> None:
    httpx = pytest.importorskip("httpx")
    billed = {"billed_units": {"input_tokens": 10, "output_tokens": 20}, "tokens": {"input_tokens": 500, "output_tokens": 20}}
    events = [{"type": "content-delta", "delta": {"message": {}}}, {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": billed}}]
    lab.answers("text/event-stream", *(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in events))
    body = {"model": "command-a-03-2025", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(lab.url("cohere") + "/v2/chat", json=body).text.count("event: ") == 2
    assert lab.received[-1][1] == body, "nothing is added to it"
    usage = lab.usage()
    assert (usage.certainty, usage.tokens["input"], usage.cost_nano_usd) == ("exact", 10, 10 * 2500 + 20 * 10_000)


def test_vllm_is_asked_for_usage_that_its_client_does_not_see(lab: Lab) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "qwen"}
    text = {**head, "choices": [{"index": 0, "delta": {"content": "Hello"}}]}
    counts = {**head, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
    lab.answers("text/event-stream", *(b"data: " + json.dumps(each).encode() + b"\n\n" for each in (text, counts)), b"data: [DONE]\n\n")
    with openai.OpenAI(api_key="k", base_url=lab.url("vllm") + "/v1") as client:
        stream = client.chat.completions.create(model="qwen", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=5)
        assert [chunk.usage for chunk in stream] == [None]
    assert lab.received[-1][1]["stream_options"] == {"include_usage": True}
    assert (lab.usage().certainty, lab.usage().tokens["total"]) == ("estimated", 12), "nobody says what it costs"
