"""What a request asks of a model, as far as it decides what the answer may cost."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, TypeVar

import msgspec

from creto_hotpath.ask import TARIFF_TOKENS, Tariff
from creto_hotpath.ask import Ask as Plain
from creto_hotpath.usage import object_members
from creto_metering import native
from creto_metering.prices import Price
from creto_metering.providers import Endpoint

# A token is rarely shorter than two bytes, JSON around the text included: half the bytes bounds the tokens from above
# and needs no tokenizer (the rule TensorZero uses on characters).
BYTES_PER_TOKEN = 2

# What brings in text that is not in the body, so that only the context window bounds the input: addresses and ids of
# images and files, and tools that the provider runs itself.
# Each begins with a literal, which ``re`` looks for at the speed of memchr; one alternation takes several times longer.
_REFERENCES = (
    re.compile(rb'url"\s*:\s*"(?:https?|s3|gs):'),
    re.compile(rb'"file_id"\s*:\s*"'),
    re.compile(rb'"type"\s*:\s*"(?:item_reference|web_search|web_fetch|file_search|code_|mcp|computer)'),
)
_REFERRING_MEMBERS = frozenset({"previous_response_id", "conversation", "prompt", "mcp_servers", "container"})


class BadBody(ValueError):
    """The body is not what the endpoint takes; the text says where and never quotes it."""


class _Body(msgspec.Struct):
    model: str = ""
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    service_tier: str | None = None
    speed: str | None = None


class _NativeBody(msgspec.Struct):
    """model, stream: not where the path says so. service_tier: elsewhere an object, which changes no price here."""

    model: str = ""
    stream: bool | None = None
    service_tier: Any = None
    serviceTier: Any = None


_DECODER = msgspec.json.Decoder(_Body)
_NATIVE_DECODER = msgspec.json.Decoder(_NativeBody)
_Fields = TypeVar("_Fields", _Body, _NativeBody)


def estimate_tokens(size: int) -> int:
    """The most tokens that ``size`` bytes of text are expected to be."""
    return size // BYTES_PER_TOKEN


class Ask(NamedTuple):
    """model: as written. streams: the answer is an event stream. wants_usage: the client itself asked for usage in it.

    output_limit: tokens it allows per choice, None when it sets none. choices: answers it asks for. refers: part of its
    input is not in the body. when: what it says that changes the price. caches, audio: it may write to a prompt cache,
    may take or give sound.
    """

    endpoint: Endpoint
    size: int
    model: str
    streams: bool
    wants_usage: bool
    output_limit: int | None
    choices: int
    refers: bool
    caches: bool
    audio: bool
    when: dict[str, str]

    def input_ceiling(self, price: Price | None) -> int:
        """The most input tokens this can be: half its bytes, or all that the model can read at once."""
        window = price.context_window if price is not None else 0
        if not window:
            return estimate_tokens(self.size)
        return window if self.refers else min(window, estimate_tokens(self.size))

    def output_ceiling(self, price: Price | None, default: int) -> int:
        """The most output tokens: the limit it sets, else the model's, else ``default``; times its choices."""
        if self.endpoint.operation == "embedding":
            return 0
        limit = self.output_limit
        if limit is None and price is not None:
            limit = price.max_output or price.context_window
        return (limit or default) * self.choices if limit != 0 else 0

    def tariff(self, price: Price | None, default: int, cost: int) -> Tariff:
        """The ceilings of everything that asks for the same, whatever its size; ``cost`` nano-dollars without a price.

        Raises ValueError for more than a tariff counts with.
        """
        window = price.context_window if price is not None else 0
        tokens_out = self.output_ceiling(price, default)
        if price is None:
            return Tariff(tokens_out=tokens_out, cost=cost)
        tokens_in = self.input_ceiling(price)
        least, most = price.tier_of(tokens_in)
        return Tariff(
            window=window or None,
            all_of_it=self.refers and window > 0,
            tokens_out=tokens_out,
            rates=price.dearest(tokens_in, caches=self.caches, audio=self.audio),
            least=least,
            most=min(most, TARIFF_TOKENS),
        )


def plain_ask(endpoint: Endpoint, size: int, plain: Plain) -> Ask:
    """What ``parse_ask`` finds in a body of ``size`` bytes in which one look found ``plain``.

    endpoint: of a dialect that has the same words for the same things, as OpenAI's and Anthropic's; see ``is_plain``.
    """
    chat = endpoint.operation in ("chat", "completion")
    return Ask(
        endpoint,
        size,
        _model(endpoint, plain.model or ""),
        plain.stream is True,
        not _can_ask_for_usage(endpoint) or plain.includes_usage,
        plain.limit,
        plain.choices if chat else 1,
        plain.refers,
        plain.caches or endpoint.dialect != "anthropic",
        plain.audio,
        {},
    )


def parse_ask(endpoint: Endpoint, body: bytes) -> Ask:
    """What ``body`` asks for. Raises BadBody for anything that two parsers could read in two ways."""
    if endpoint.dialect in native.NATIVE:
        return _parse_native(endpoint, body)
    members = _members(body, "$")
    fields = _decoded(_DECODER, body)
    if (options := members.get("stream_options")) is not None and fields.stream_options is not None:
        _members(body[options[0] : options[1]], "$.stream_options")
    chat = endpoint.operation in ("chat", "completion")
    return Ask(
        endpoint=endpoint,
        size=len(body),
        model=_model(endpoint, fields.model),
        streams=bool(fields.stream),
        wants_usage=not _can_ask_for_usage(endpoint) or bool((fields.stream_options or {}).get("include_usage")),
        output_limit=_limit(fields),
        choices=_choices(fields) if chat else 1,
        refers=_refers(endpoint, members, body),
        caches=b'"cache_control"' in body or endpoint.dialect != "anthropic",
        audio=b'"audio"' in body or b'"input_audio"' in body,
        when=_price_facts(fields.service_tier, fields.speed),
    )


def is_plain(endpoint: Endpoint) -> bool:
    """Whether one look at a body can find what ``parse_ask`` would, and nothing in the head matters."""
    return endpoint.dialect not in native.NATIVE and endpoint.provider != "bedrock"


def _parse_native(endpoint: Endpoint, body: bytes) -> Ask:
    fields = _decoded(_NATIVE_DECODER, body)
    try:
        tokens, answers = native.limits(endpoint.dialect, body, _members)
    except BadBody:
        raise
    except ValueError as error:
        raise BadBody(str(error)) from None
    tiers = (fields.service_tier, fields.serviceTier)
    tier = next((word for word in tiers if isinstance(word, str)), None)
    return Ask(
        endpoint=endpoint,
        size=len(body),
        model=_model(endpoint, fields.model),
        streams=bool(fields.stream),
        wants_usage=True,  # their streams say it unasked
        output_limit=_largest(tokens),
        choices=_bounded(max(1, *answers) if answers else 1),
        refers=native.refers(endpoint.dialect, body),
        caches=native.caches(endpoint.dialect, body),
        audio=native.sounds(endpoint.dialect, body),
        when=_price_facts(tier, None),
    )


def _decoded(decoder: msgspec.json.Decoder[_Fields], body: bytes) -> _Fields:
    try:
        return decoder.decode(body)
    except UnicodeDecodeError:
        raise BadBody("text that is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadBody(str(error)) from None


def _model(endpoint: Endpoint, said: str) -> str:
    """In OpenAI's dialect the path may name a deployment, whose name is not its model's; elsewhere it decides."""
    if endpoint.dialect in ("openai", "openai-responses"):
        return said or endpoint.deployment
    return endpoint.deployment or said


def _can_ask_for_usage(endpoint: Endpoint) -> bool:
    """``stream_options`` is a word of completions in OpenAI's dialect."""
    return endpoint.dialect == "openai" and endpoint.operation in ("chat", "completion")


def with_usage_included(body: bytes) -> bytes:
    """``body`` with ``stream_options.include_usage`` true and every other byte kept. It has passed ``parse_ask``."""
    members = _members(body, "$")
    options = members.get("stream_options")
    if options is None:
        return _inserted(body, members, b'"stream_options":{"include_usage":true}')
    start, end = options
    value = body[start:end]
    if value == b"null":
        value = b"{}"
    inner = _members(value, "$.stream_options")
    if "include_usage" in inner:
        at, to = inner["include_usage"]
        value = value[:at] + b"true" + value[to:]
    else:
        value = _inserted(value, inner, b'"include_usage":true')
    return body[:start] + value + body[end:]


def _inserted(text: bytes, members: dict[str, tuple[int, int]], member: bytes) -> bytes:
    if not members:
        return b"{" + member + b"}"
    at = max(end for _, end in members.values())
    return text[:at] + b"," + member + text[at:]


def _members(text: bytes, where: str) -> dict[str, tuple[int, int]]:
    """Name -> (start, end) of its value. Names that differ only in case are the same to some servers: refused too."""
    try:
        members = object_members(text)
    except ValueError as error:
        raise BadBody(f"{where}: {error}") from None
    found: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for raw, at, start, end in members:
        try:
            name: str = json.loads((b'"' + raw + b'"').decode())
        except ValueError:
            raise BadBody(f"{where}: not a member name at byte {at}") from None
        if name.casefold() in seen:
            raise BadBody(f"{where}: a member name occurs for the second time at byte {at}")
        seen.add(name.casefold())
        found[name] = (start, end)
    return found


def _limit(fields: _Body) -> int | None:
    """The largest limit it names, since servers differ in which they obey. Negative ones mean none (llama.cpp)."""
    limits = [v for v in (fields.max_tokens, fields.max_completion_tokens, fields.max_output_tokens) if v is not None]
    return _largest([] if limits and min(limits) < 0 else limits)


def _largest(limits: list[int]) -> int | None:
    if any(limit > 10**9 for limit in limits):
        raise BadBody("a limit of more than 1000000000 output tokens")
    return max(limits, default=None)


def _choices(fields: _Body) -> int:
    return _bounded(max(1, fields.n or 1, fields.best_of or 1) * _prompts(bytes(fields.prompt)))


def _bounded(choices: int) -> int:
    if choices > 10**6:
        raise BadBody("more than 1000000 answers")
    return choices


def _price_facts(service_tier: str | None, speed: str | None) -> dict[str, str]:
    facts = (("service_tier", service_tier), ("speed", speed))
    # Prices are remembered by these words; a word longer than any real one has no price and is not kept.
    return {name: word for name, word in facts if word and len(word) <= 32}


def _prompts(raw: bytes) -> int:
    """Legacy completions take one prompt (text or token ids) or a list of them, and answer each."""
    if not raw.lstrip().startswith(b"["):
        return 1
    try:
        prompts = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadBody(f"$.prompt: {error}") from None
    return 1 if not prompts or isinstance(prompts[0], int) else len(prompts)


def _refers(endpoint: Endpoint, members: dict[str, tuple[int, int]], body: bytes) -> bool:
    # In a legacy completion "prompt" is the text itself, elsewhere the name of a stored one.
    named = _REFERRING_MEMBERS.intersection(members)
    if endpoint.operation == "completion":
        named -= {"prompt"}
    if any(body[slice(*members[name])] != b"null" for name in named):
        return True
    return any(reference.search(body) for reference in _REFERENCES)
