"""Which requests make a model work: provider by host, operation and model by path, the rest from the body.

This is the only table of model providers; metering prices by it what policy decides by it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, unquote

import msgspec

from creto_hotpath.ask import Ask
from creto_hotpath.usage import Dialect
from creto_proxy.bodies import AmbiguousBody, members
from creto_proxy.model import Request
from creto_proxy.paths import readings
from creto_proxy.protocols.call import Call, Value, recorded

# Public hosts of model providers. "*.x" is any name below x.
HOSTS: Mapping[str, str] = {
    "api.openai.com": "openai",
    "eu.api.openai.com": "openai",
    "us.api.openai.com": "openai",
    "*.openai.azure.com": "azure",
    "*.services.ai.azure.com": "azure",
    "*.cognitiveservices.azure.com": "azure",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "google",
    "aiplatform.googleapis.com": "google-vertex",
    "api.mistral.ai": "mistral",
    "codestral.mistral.ai": "mistral",
    "api.cohere.com": "cohere",
    "api.cohere.ai": "cohere",
    "ollama.com": "ollama",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "x-ai",
    "api.cerebras.ai": "cerebras",
    "openrouter.ai": "openrouter",
    "api.together.xyz": "together",
    "api.fireworks.ai": "fireworks",
}
# Hosts with a region in the middle of their names.
_AWS = r"(?:vpce\.)?(?:amazonaws\.com(?:\.cn)?|api\.aws)\Z"
_REGIONAL: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:[a-z0-9-]+-aiplatform|aiplatform\.[a-z0-9-]+\.rep)\.googleapis\.com\Z"), "google-vertex"),
    (re.compile(r"(?:[a-z0-9-]+\.)?bedrock-(?:runtime(?:-fips)?|mantle)\.[a-z0-9-]+\." + _AWS), "bedrock"),
)

# How a path ends -> what it does, and how the usage in its answer is written (None: not in a way that is read here).
# The group "model" is the model; "stream" is there when the path itself asks for a stream.
_ENDINGS: tuple[tuple[str, str, Dialect | None], ...] = (
    (r"/deployments/(?P<model>[^/]+)/chat/completions", "chat", "openai"),
    (r"/deployments/(?P<model>[^/]+)/completions", "completion", "openai"),
    (r"/deployments/(?P<model>[^/]+)/embeddings", "embedding", "openai"),
    (r"/chat/completions", "chat", "openai"),
    (r"/completions", "completion", "openai"),
    (r"/embeddings", "embedding", "openai"),
    (r"/responses", "responses", "openai-responses"),
    (r"/v1/messages", "messages", "anthropic"),
    (r"/(?:models|tunedModels|endpoints)/(?P<model>[^/:]+):generateContent", "chat", "gemini"),
    (r"/(?:models|tunedModels|endpoints)/(?P<model>[^/:]+):(?P<stream>streamGenerateContent)", "chat", "gemini"),
    (r"/anthropic/models/(?P<model>[^/:]+):(?:rawPredict|(?P<stream>streamRawPredict))", "chat", "anthropic"),
    (r"/mistralai/models/(?P<model>[^/:]+):(?:rawPredict|(?P<stream>streamRawPredict))", "chat", "openai"),
    (r"/models/(?P<model>[^/:]+):(?:rawPredict|(?P<stream>streamRawPredict))", "chat", None),
    (r"/(?:models|endpoints)/(?P<model>[^/:]+):(?:predict|predictLongRunning)", "predict", None),
    (r"/models/(?P<model>[^/:]+):(?:embedContent|batchEmbedContents)", "embedding", "gemini"),
    (r"/models/(?P<model>[^/:]+):asyncBatchEmbedContent", "embedding", None),
    (r"/model/(?P<model>[^/]*embed[^/]*)/invoke", "embedding", "bedrock"),
    (r"/model/(?P<model>[^/]+)/(?:invoke|converse)", "chat", "bedrock"),
    (r"/model/(?P<model>[^/]+)/(?P<stream>invoke-with-response-stream|converse-stream)", "chat", "bedrock"),
    (r"/v[12]/chat", "chat", "cohere"),
    (r"/v[12]/embed", "embedding", "cohere"),
    (r"/v[12]/rerank", "rerank", None),
    (r"/api/chat", "chat", "ollama"),
    (r"/api/generate", "completion", "ollama"),
    (r"/api/embed(?:dings)?", "embedding", "ollama"),
)
_OPERATIONS = tuple((re.compile(ending + "$"), operation, dialect) for ending, operation, dialect in _ENDINGS)

# POSTs that use no model, so they cost nothing that would have to be reserved.
_FREE = re.compile(
    r"/(messages/count_tokens|responses/input_tokens|responses/[\w-]+/cancel|chat/completions/[\w-]+|moderations|files"
    r"|uploads|uploads/[\w-]+/(parts|complete|cancel)|conversations|conversations/[\w-]+(/items)?"
    r"|models/[^/:]+:countTokens|models/count-tokens:rawPredict|model/[^/]+/count-tokens|v1/tokenize|v1/detokenize|api/show)$"
)
_READS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
# Hosts and paths whose meaning is kept; agents meet few, and may make up many.
_REMEMBERED = 1024

# Names that limit the answer, by the object they stand in; the largest counts, since servers differ in which they obey.
_LIMITS: Mapping[str, tuple[str, ...]] = {
    "": ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample", "max_gen_len"),
    "generationConfig": ("maxOutputTokens", "max_output_tokens"),
    "generation_config": ("maxOutputTokens", "max_output_tokens"),
    "inferenceConfig": ("maxTokens", "max_new_tokens"),
    "textGenerationConfig": ("maxTokenCount",),
    "options": ("num_predict",),
}
_TOOLS: Mapping[str, tuple[str, ...]] = {"": ("tools", "functions"), "toolConfig": ("tools",)}
ATTRIBUTES = frozenset({"provider", "operation", "model", "stream", "max_tokens", "tools"})
_OUTER = frozenset({"model", "stream", *_LIMITS[""], *_TOOLS[""], *_LIMITS, *_TOOLS}) - {""}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request asks of a model provider, as far as its head says.

    operation: None when it is not known what it does. dialect: how the usage in its answer is written, None when that
    is not read. model: named by the path, "" when the body names it. streams: the path asks for a stream.
    """

    provider: str
    operation: str | None
    dialect: Dialect | None = None
    model: str = ""
    streams: bool = False


class Providers:
    """Finds the endpoint of a request. Hosts given in the configuration come before the public ones."""

    def __init__(self, configured: Mapping[str, str] | None = None) -> None:
        hosts = {**HOSTS, **(configured or {})}
        self._exact = {host: provider for host, provider in hosts.items() if not host.startswith("*.")}
        self._below = tuple((host[1:], provider) for host, provider in hosts.items() if host.startswith("*."))
        # The provider behind a host, None for a host without models.
        self.provider = lru_cache(_REMEMBERED)(self._provider)

    def _provider(self, host: str) -> str | None:
        found = self._exact.get(host)
        if found is None:
            found = next((provider for suffix, provider in self._below if host.endswith(suffix)), None)
        if found is None:
            found = next((provider for pattern, provider in _REGIONAL if pattern.match(host)), None)
        return found

    def endpoint(self, *, kind: str, method: str, host: str, path: str, upgrade: bool) -> Endpoint | None:
        """What the request asks for, None when it uses no model.

        A tunnel, a WebSocket or a path that is not known, on the host of a model provider, may well use a model, but
        how much of it cannot be seen: its operation is None.
        """
        provider = self.provider(host)
        if provider is None:
            return None
        if kind != "http" or upgrade:
            return Endpoint(provider, None)
        if method in _READS:
            return None
        return _posted(provider, path) if method == "POST" else Endpoint(provider, None)

    def of(self, request: Request) -> Endpoint | None:
        """The endpoint of a request under whichever reading of its path is one."""
        upgrade = request.headers.get("upgrade") is not None
        if self.provider(request.host) is None:
            return None
        found: list[Endpoint | None] = []
        for path in readings(request.path):
            found.append(
                self.endpoint(kind=request.kind, method=request.method, host=request.host, path=path, upgrade=upgrade)
            )
            if found[-1] is not None and found[-1].operation is not None:
                return found[-1]
        return next(filter(None, found), None)


@lru_cache(_REMEMBERED)
def _posted(provider: str, path: str) -> Endpoint | None:
    if _FREE.search(path):
        return None
    for pattern, operation, dialect in _OPERATIONS:
        if match := pattern.search(path):
            parts = match.groupdict()
            return Endpoint(provider, operation, dialect, unquote(parts.get("model") or ""), bool(parts.get("stream")))
    return Endpoint(provider, None)


def call(endpoint: Endpoint, request: Request, body: bytes | None, wanted: Collection[str]) -> Call:
    """What ``request`` asks of a model, with those attributes of ``wanted`` that it says. body: None when it says none.

    Raises AmbiguousBody when servers may read the body differently, ValueError when it is not JSON.
    """
    attributes: dict[str, Value] = {"provider": endpoint.provider, "operation": endpoint.operation or "other"}
    if endpoint.streams:
        attributes["stream"] = True
    if body and not _is_form(request):
        plain = request.ask
        attributes |= _parameters(body, endpoint) if plain is None else _asked(plain, endpoint)
    elif endpoint.operation is None and (named := parse_qs(request.query).get("model")):
        if len(set(named)) > 1:
            raise AmbiguousBody("the query names several models")
        attributes["model"] = named[0]  # a WebSocket of the realtime APIs
    if endpoint.model:
        attributes["model"] = endpoint.model
    model = attributes.get("model")
    resource = recorded("model", model) if isinstance(model, str) else f"llm:{attributes['operation']}"
    return Call("llmCall", resource, tuple((name, value) for name, value in attributes.items() if name in wanted))


def _is_form(request: Request) -> bool:
    return (request.headers.get("content-type") or "").strip().lower().startswith("multipart/")


def _asked(plain: Ask, endpoint: Endpoint) -> dict[str, Value]:
    """What ``_parameters`` finds in a body in which one look found ``plain``."""
    stream = True if plain.stream is None and endpoint.provider == "ollama" else plain.stream
    said = (("model", plain.model), ("stream", stream), ("max_tokens", plain.limit), ("tools", plain.tools))
    return {name: value for name, value in said if value is not None}


def _parameters(body: bytes, endpoint: Endpoint) -> dict[str, Value]:
    outer = members(body, _OUTER)
    found: dict[str, Value] = {}
    model = _plain(outer.get("model"))
    if isinstance(model, str):
        found["model"] = model
    stream = _plain(outer.get("stream"))
    if isinstance(stream, bool):
        found["stream"] = stream
    elif endpoint.provider == "ollama" and "stream" not in outer:
        found["stream"] = True  # its own API streams unless told not to
    limits = [_plain(raw) for raw in _inner(outer, _LIMITS)]
    numbers = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool)]
    if numbers and max(map(abs, numbers)) < 2**63:
        found["max_tokens"] = max(numbers)
    tools = [_length(raw) for raw in _inner(outer, _TOOLS)]
    if tools:
        found["tools"] = sum(tools)
    return found


def _inner(outer: Mapping[str, bytes], names: Mapping[str, Iterable[str]]) -> Iterable[bytes]:
    for parent, wanted in names.items():
        inside = outer if not parent else {}
        if parent and outer.get(parent, b"")[:1] == b"{":
            inside = members(outer[parent], wanted)
        yield from (inside[name] for name in wanted if name in inside)


def _plain(raw: bytes | None) -> Any:
    return None if raw is None or raw[:1] in (b"{", b"[") else msgspec.json.decode(raw)


def _length(raw: bytes) -> int:
    return len(msgspec.json.decode(raw, type=list[msgspec.Raw])) if raw[:1] == b"[" else 0
