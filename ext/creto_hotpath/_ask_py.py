"""What a model request asks for, found in one look at its body. Plain-Python form.

Most bodies are plain: strict JSON, one object, every name spelled as the APIs spell it and only once. Of these each
parser finds the same, so one pass finds what policy and metering want to know. Whatever is not plain in this sense is
not refused here: ``plain`` gives None, and whoever asks reads the body with care and says what is wrong with it.
"""

from __future__ import annotations

import re

from creto_hotpath._ask_types import (
    BYTES_PER_TOKEN,
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_NAME,
    MAX_TOKENS,
    TARIFF_RATE,
    TARIFF_TOKENS,
    Ask,
)

_SPACE = re.compile(rb"[ \t\r\n]*")
# Surrogates only in pairs (RFC 8259 section 8.2). UTF-8 is not looked at: no name or value that counts may have any.
_STRING = re.compile(
    rb'"((?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u(?:[0-9A-Ca-cE-Fe-f][0-9A-Fa-f]{3}|[Dd][0-7][0-9A-Fa-f]{2}'
    rb'|[Dd][89ABab][0-9A-Fa-f]{2}\\u[Dd][C-Fc-f][0-9A-Fa-f]{2})))*)"'
)
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(rb"(?:0|[1-9][0-9]{0,9})(?![0-9.eE])")
_WORDS = (b"true", b"false", b"null")
_NAME = re.compile(rb"[a-z0-9_]+")
_MODEL = re.compile(rb"[ !#-\[\]-~]*")
_OPTIONS = re.compile(rb'\{[ \t\r\n]*"include_usage"[ \t\r\n]*:[ \t\r\n]*(true|false)[ \t\r\n]*\}')

_LIMITS = frozenset({b"max_tokens", b"max_completion_tokens", b"max_output_tokens"})
_COUNTS = frozenset({b"n", b"best_of"})
_TOOLS = frozenset({b"tools", b"functions"})
# They change the price or the input in ways that one look does not tell, or are for other APIs. A plain body is no
# JSON-RPC.
_NOT_PLAIN = frozenset(
    {b"prompt", b"service_tier", b"speed", b"previous_response_id", b"conversation", b"mcp_servers", b"container",
     b"max_tokens_to_sample", b"max_gen_len", b"generation_config", b"options", b"jsonrpc", b"method"}
)  # fmt: skip
_URL = (b"http:", b"https:", b"s3:", b"gs:")
_ELSEWHERE = (b"item_reference", b"web_search", b"web_fetch", b"file_search", b"code_", b"mcp", b"computer")


def plain(body: bytes) -> Ask | None:
    """What ``body`` asks for; None when it is not so plain that every parser finds the same."""
    try:
        return _Reader(body).ask()
    except _NotPlain:
        return None


class _NotPlain(Exception):
    pass


class _Reader:
    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0
        self.model: str | None = None
        self.stream: bool | None = None
        self.includes_usage = False
        self.limit: int | None = None
        self.choices = 1
        self.tools: int | None = None
        self.refers = self.caches = self.audio = False

    def ask(self) -> Ask:
        self._space()
        self._expect(b"{")
        seen: set[bytes] = set()
        self._space()
        if not self._skip(b"}"):
            while True:
                name = self._name()
                if not _NAME.fullmatch(name) or name in _NOT_PLAIN or name in seen or len(seen) == MAX_MEMBERS:
                    raise _NotPlain
                seen.add(name)
                self._member(name)
                self._space()
                if self._skip(b"}"):
                    break
                self._expect(b",")
                self._space()
        self._space()
        if self.at != len(self.body):
            raise _NotPlain
        return Ask(
            self.model, self.stream, self.includes_usage, self.limit, self.choices, self.tools, self.refers,
            self.caches, self.audio,
        )  # fmt: skip

    def _member(self, name: bytes) -> None:
        if name == b"model":
            text = self._string()
            if len(text) > MAX_NAME or not _MODEL.fullmatch(text):
                raise _NotPlain
            self.model = text.decode("ascii")
        elif name == b"stream":
            self.stream = self._truth()
        elif name == b"stream_options":
            options = _OPTIONS.match(self.body, self.at)
            if options is None:
                raise _NotPlain
            self.at = options.end()
            self.includes_usage = options[1] == b"true"
        elif name in _LIMITS:
            self.limit = max(self.limit or 0, self._whole(MAX_TOKENS))
        elif name in _COUNTS:
            self.choices = max(self.choices, self._whole(MAX_CHOICES))
        elif name in _TOOLS:
            if self.body[self.at : self.at + 1] != b"[":
                raise _NotPlain
            self.tools = (self.tools or 0) + self._value(name, 1)
        else:
            self._value(name, 1)

    def _truth(self) -> bool:
        for word, value in ((b"true", True), (b"false", False)):
            if self._skip(word):
                return value
        raise _NotPlain

    def _whole(self, most: int) -> int:
        match = _WHOLE.match(self.body, self.at)
        if match is None or int(match[0]) > most:
            raise _NotPlain
        self.at = match.end()
        return int(match[0])

    def _value(self, name: bytes, depth: int) -> int:
        """Passes a value of the member ``name`` (empty: of an array), ``depth`` brackets deep; how many elements it has
        when it is an array."""
        first = self.body[self.at : self.at + 1]
        if first == b'"':
            self._named(name, self._string())
        elif first == b"{":
            self._object(depth + 1)
        elif first == b"[":
            return self._array(depth + 1)
        elif not any(map(self._skip, _WORDS)):
            match = _NUMBER.match(self.body, self.at)
            if match is None:
                raise _NotPlain
            self.at = match.end()
        return 0

    def _object(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _NotPlain
        self._expect(b"{")
        self._space()
        if self._skip(b"}"):
            return
        while True:
            self._value(self._name(), depth)
            self._space()
            if self._skip(b"}"):
                return
            self._expect(b",")
            self._space()

    def _array(self, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise _NotPlain
        self._expect(b"[")
        self._space()
        if self._skip(b"]"):
            return 0
        elements = 0
        while True:
            self._value(b"", depth)
            elements += 1
            self._space()
            if self._skip(b"]"):
                return elements
            self._expect(b",")
            self._space()

    def _name(self) -> bytes:
        """A member's name and the colon behind it."""
        name = self._string()
        self._space()
        self._expect(b":")
        self._space()
        return name

    def _string(self) -> bytes:
        match = _STRING.match(self.body, self.at)
        if match is None:
            raise _NotPlain
        self.at = match.end()
        text: bytes = match[1]
        # An escaped quote inside may begin a name that others look for among the bytes: taken for one, to be safe.
        if text == b"cache_control" or text.endswith(b'"cache_control'):
            self.caches = True
        elif text in (b"audio", b"input_audio") or text.endswith((b'"audio', b'"input_audio')):
            self.audio = True
        return text

    def _named(self, name: bytes, text: bytes) -> None:
        """A string as the value of a member: does it name input that is not here?"""
        if name.endswith(b"url") and text.startswith(_URL):
            self.refers = True
        elif name == b"file_id" or name.endswith(b'"file_id'):
            self.refers = True
        elif (name == b"type" or name.endswith(b'"type')) and text.startswith(_ELSEWHERE):
            self.refers = True

    def _space(self) -> None:
        match = _SPACE.match(self.body, self.at)
        assert match is not None  # the pattern matches the empty string
        self.at = match.end()

    def _skip(self, text: bytes) -> bool:
        if not self.body.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def _expect(self, text: bytes) -> None:
        if not self._skip(text):
            raise _NotPlain


class Tariff:
    """The most that requests can use which ask for the same and differ in size only.

    window: input tokens the model takes at once, None when that is not known. all_of_it: every request may fill it.
    tokens_out: output tokens at most. rates: nano-dollars for a million tokens of input and of output, the dearest of
    their kind; None when there is no price, and ``cost`` nano-dollars are assumed. least, most: input tokens for which
    these rates hold. Raises ValueError for what it cannot count with.
    """

    __slots__ = ("all_of_it", "cost", "least", "most", "rates", "tokens_out", "window")

    def __init__(
        self,
        *,
        window: int | None = None,
        all_of_it: bool = False,
        tokens_out: int = 0,
        rates: tuple[int, int] | None = None,
        cost: int = 0,
        least: int = 0,
        most: int = TARIFF_TOKENS,
    ) -> None:
        if all_of_it and window is None:
            raise ValueError("what is not known cannot be filled")
        tokens = (window or 0, tokens_out, least, most)
        if not all(0 <= count <= TARIFF_TOKENS for count in tokens) or not all(
            0 <= rate <= TARIFF_RATE for rate in rates or ()
        ):
            raise ValueError("more than a tariff counts with")
        if not 0 <= cost < 2**60:
            raise ValueError("cost is out of range")
        self.window = window
        self.all_of_it = all_of_it
        self.tokens_out = tokens_out
        self.rates = rates
        self.cost = cost
        self.least = least
        self.most = most

    def amounts(self, size: int) -> tuple[int, int, int] | None:
        """Requests, tokens and nano-dollars of a request of that many bytes; None when other rates hold for it."""
        tokens = size // BYTES_PER_TOKEN
        if self.window is not None:
            tokens = self.window if self.all_of_it else min(self.window, tokens)
        if not self.least <= tokens <= self.most:
            return None
        cost = self.cost
        if self.rates is not None:
            cost = (tokens * self.rates[0] + self.tokens_out * self.rates[1] + 500_000) // 1_000_000
        return (1, tokens + self.tokens_out, cost)
