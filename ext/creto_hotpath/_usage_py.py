"""Token usage of a model's answer, found while its bytes pass by.

An answer is watched by a small machine that knows JSON's brackets and strings and nothing else: it follows the
depth, compares the names of the outermost members, and keeps only the few bytes of ``usage`` and ``model``. Text that
a model writes is inside strings, so no prompt can make it look like usage. Between the brackets the grammar is not
checked: a document counts when brackets and strings balance and nothing but white space follows.

Server-sent events (WHATWG HTML, "Interpreting an event stream"): lines end with LF, CR or CRLF and may be cut at any
byte by the network; each ``data`` line holds one document, or a part of one when an event spreads it over several.

Memory per scanner: at most ``MAX_CAPTURE`` for a captured value, plus ``MAX_HELD`` when it rewrites. Time is linear in
the bytes. This file is the specification; ``_usage_c`` is the same machine compiled and answers the same.
"""

from __future__ import annotations

import json
import re
from typing import Literal, TypeAlias

from creto_hotpath._usage_fields import anthropic_counts, anthropic_usage, openai_usage, usage_fields

Dialect: TypeAlias = Literal["openai", "openai-responses", "anthropic"]

# Longest value of a "usage" or "model" member that is kept. Real ones are below 1 KiB.
MAX_CAPTURE = 16 << 10
# Deeper nesting than this is nobody's answer; such a document is ignored, such a request body refused.
MAX_DEPTH = 512
# Longest event that is held back to be rewritten; a longer one passes unchanged.
MAX_HELD = 256 << 10
# Longer than every member name that is looked for, so that a cut name cannot match one.
_MAX_KEY = 16

_WRAPPERS: dict[str, bytes] = {"openai": b"", "openai-responses": b"response", "anthropic": b"message"}

_START, _INSIDE, _END, _BAD = range(4)
_NOTHING, _USAGE, _MODEL, _CHOICES, _WRAPPER = range(5)

_SPACE = b" \t\r\n"
_LF, _CR, _QUOTE, _COMMA, _COLON, _BACKSLASH = b'\n\r",:\\'
_OPEN_OBJECT, _OPEN_ARRAY, _CLOSE_OBJECT, _CLOSE_ARRAY = b"{[}]"

_PLAIN = re.compile(rb'[^"\\]*')
_LINE_END = re.compile(rb"[\r\n]")
_FIELD = b"data:"


class _Document:
    """One JSON object, watched byte by byte; ``feed`` may be called with pieces of any size."""

    def __init__(self, wrapper: bytes) -> None:
        self._keys = {b"usage": _USAGE, b"model": _MODEL, b"choices": _CHOICES}
        self._wrapper = wrapper
        self.reset()

    def reset(self) -> None:
        self.phase = _START
        self.in_string = False
        self._escaped = False
        self._stack = bytearray()
        self._expect_key = False
        self._in_key = False
        self._key = bytearray()
        self._slot = _NOTHING  # what the member just named is
        self._armed = False  # its colon has been seen, its value comes next
        self._wrapped = False  # inside the wrapper object, at depth 2
        self._choices_open = False
        self._capturing = _NOTHING
        self._level = 0  # depth of the object whose member is captured
        self._captured = bytearray()
        self._key_at = 0
        self._comma_at = -1
        self._cut_is_open = False
        self.usage = b""
        self.usage_level = 0
        self.model = b""
        self.choices_empty = False
        # Bytes to remove so that ``usage: null`` is gone, as offsets into the event; empty when there is none.
        self.cut = (0, 0)

    def feed(self, data: bytes, start: int, end: int, shift: int) -> None:
        """Watches ``data[start:end]``; ``shift`` turns an index of ``data`` into an offset of the event."""
        mark = start
        i = start
        while i < end:
            if self.phase != _INSIDE:
                if data[i] in _SPACE:
                    i += 1
                    continue
                if self.phase != _START or data[i] != _OPEN_OBJECT:
                    self.phase = _BAD
                    return
                self.phase = _INSIDE
                self._stack.append(_OPEN_OBJECT)
                self._expect_key = True
                i += 1
            elif self.in_string:
                i = self._in_string(data, i, end)
                if not self.in_string and self._capturing and len(self._stack) == self._level:
                    self._keep(data, mark, i)
                    self._captured_whole(i + shift)
            else:
                c = data[i]
                if c not in _SPACE:
                    if self._armed:
                        mark = self._value_begins(c, i, mark)
                    elif self._choices_open:
                        self._choices_open = False
                        self.choices_empty = c == _CLOSE_ARRAY
                    if not self._structure(c, data, i, mark, shift):
                        self.phase = _BAD
                        return
                i += 1
        if self._capturing:
            self._keep(data, mark, end)

    def _in_string(self, data: bytes, i: int, end: int) -> int:
        """Index after what was consumed: the rest of the string, one escape, or one byte of a name."""
        if self._escaped:
            self._escaped = False
            return i + 1
        if not self._in_key:
            match = _PLAIN.match(data, i, end)
            assert match is not None  # the pattern matches the empty string
            i = match.end()
            if i == end:
                return i
        c = data[i]
        if c == _QUOTE:
            self.in_string = False
            if self._in_key:
                self._in_key = False
                self._slot = self._slot_of(bytes(self._key))
        elif c == _BACKSLASH:
            self._escaped = True
        if self._in_key and len(self._key) < _MAX_KEY:
            self._key.append(c)  # a backslash is kept too, so that an escaped name matches nothing
        return i + 1

    def _slot_of(self, key: bytes) -> int:
        slot = self._keys.get(key, _NOTHING)
        if len(self._stack) == 1:
            return _WRAPPER if self._wrapper and key == self._wrapper else slot
        return slot if slot != _CHOICES else _NOTHING

    def _value_begins(self, c: int, i: int, mark: int) -> int:
        self._armed = False
        if self._slot in (_USAGE, _MODEL):
            self._capturing = self._slot
            self._level = len(self._stack)
            self._captured.clear()
            return i
        if self._slot == _WRAPPER:
            self._wrapped = c == _OPEN_OBJECT
        elif self._slot == _CHOICES:
            self.choices_empty = False
            self._choices_open = c == _OPEN_ARRAY
        return mark

    def _structure(self, c: int, data: bytes, i: int, mark: int, shift: int) -> bool:
        """One byte outside strings; False when the brackets do not match."""
        stack = self._stack
        depth = len(stack)
        if c == _QUOTE:
            self.in_string = True
            if self._expect_key and (depth == 1 or (depth == 2 and self._wrapped)):
                self._in_key = True
                self._key.clear()
                if depth == 1:
                    self._key_begins(i + shift)
            self._expect_key = False
        elif c == _COLON:
            self._armed = self._slot != _NOTHING
        elif c == _COMMA:
            self._scalar_ends(data, i, mark, shift)
            self._slot = _NOTHING
            self._armed = False
            self._expect_key = stack[-1] == _OPEN_OBJECT
            if depth == 1:
                self._comma_at = i + shift
        elif c in (_OPEN_OBJECT, _OPEN_ARRAY):
            if depth == MAX_DEPTH:
                return False
            stack.append(c)
            self._slot = _NOTHING
            self._expect_key = c == _OPEN_OBJECT
        elif c in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            if (c == _CLOSE_OBJECT) != (stack[-1] == _OPEN_OBJECT):
                return False
            self._scalar_ends(data, i, mark, shift)
            stack.pop()
            self._closed(data, i, mark, shift)
        return True

    def _key_begins(self, at: int) -> None:
        if self._cut_is_open:
            self.cut = (self.cut[0], at)
            self._cut_is_open = False
        self._key_at = at

    def _closed(self, data: bytes, i: int, mark: int, shift: int) -> None:
        depth = len(self._stack)
        self._slot = _NOTHING
        self._armed = False
        self._expect_key = False
        if depth == 1:
            self._wrapped = False
        if self._capturing and depth == self._level:
            self._keep(data, mark, i + 1)
            self._captured_whole(i + 1 + shift)
        if depth == 0:
            self.phase = _END
            if self._cut_is_open:
                self.cut = (self.cut[0], i + shift)
                self._cut_is_open = False

    def _scalar_ends(self, data: bytes, i: int, mark: int, shift: int) -> None:
        if self._capturing and len(self._stack) == self._level:
            self._keep(data, mark, i)
            self._captured_whole(i + shift)

    def _keep(self, data: bytes, start: int, end: int) -> None:
        room = MAX_CAPTURE + 1 - len(self._captured)
        self._captured += data[start : min(end, start + room)]

    def _captured_whole(self, at: int) -> None:
        slot, raw = self._capturing, bytes(self._captured).strip(_SPACE)
        fits = len(self._captured) <= MAX_CAPTURE
        self._capturing = _NOTHING
        if slot == _MODEL:
            if fits and raw[:1] == b'"':
                self.model = raw
            return
        self.usage = raw if fits and raw[:1] == b"{" else b""
        self.usage_level = self._level
        self.cut = (0, 0)
        self._cut_is_open = False
        if raw == b"null" and self._level == 1:
            # The member goes with the comma before it; the first one goes with the comma after it.
            self._cut_is_open = self._comma_at < 0
            self.cut = (self._key_at, at) if self._cut_is_open else (self._comma_at, at)

    def line_ended(self) -> None:
        """The document goes on in the next data line of the event; the line end itself is white space."""
        if self._capturing and len(self._captured) <= MAX_CAPTURE:
            self._captured.append(_LF)


class UsageScanner:
    """Watches one answer; ``usage`` is what it used, None as long as that is unknown (which is not zero).

    dialect: "openai" (chat completions, completions, embeddings), "openai-responses" or "anthropic" (messages).
    sse: the answer is an event stream, else one JSON document.
    strip_usage_chunk: ``feed`` and ``finish`` return the stream as a client sees it that did not ask for usage
    (``stream_options.include_usage``): without the extra event whose ``choices`` are empty and which carries a usage
    object, and without ``"usage": null`` members elsewhere; every other byte is kept. Events longer than ``MAX_HELD``
    and events that are not exactly one JSON object pass as they are. Only the "openai" dialect has such events.

    ``feed`` never raises, whatever the bytes.
    """

    def __init__(self, dialect: Dialect, sse: bool, strip_usage_chunk: bool = False) -> None:
        if dialect not in _WRAPPERS:
            raise ValueError(f"unknown dialect {dialect!r}")
        self.rewrites = strip_usage_chunk
        self.final = False
        self.last = False
        self._dialect = dialect
        self._sse = sse
        self._document = _Document(_WRAPPERS[dialect] if sse else b"")
        self._counts: dict[str, int] = {}
        self._model = b""
        # Event stream: where in a line, and what the current event has held so far.
        self._column = 0
        self._is_data = True  # the line so far is a prefix of "data:" or begins with it
        self._after_cr = False
        self._documents = 0
        self._odd = False
        self._is_usage_chunk = False
        self._cut = (0, 0)
        self._held = bytearray()
        self._too_long = False
        self._dropped = False

    @property
    def usage(self) -> dict[str, int] | None:
        """Tokens by kind, keys as far as reported: ``input`` (with everything read from or written to a cache),
        ``output``, ``cache_read``, ``cache_write``, ``cache_write_1h`` (part of cache_write), ``reasoning``,
        ``input_audio``, ``output_audio``, ``total``, and ``web_search`` (calls, not tokens). None: unknown."""
        if not self._counts:
            return None
        return anthropic_usage(self._counts) if self._dialect == "anthropic" else dict(self._counts)

    @property
    def model(self) -> str:
        """Name of the model that answered, "" when it was not named."""
        if not self._model:
            return ""
        try:
            name = json.loads(self._model)
        except ValueError:
            return ""
        return name if isinstance(name, str) else ""

    def feed(self, data: bytes) -> bytes | None:
        """Watches the next bytes of the answer. Returns what to send instead when rewriting, else None."""
        if self._sse:
            return self._feed_stream(data)
        self._document.feed(data, 0, len(data), 0)
        if self._document.phase == _END and not self.final:
            self._count()
        elif self._document.phase == _BAD:
            self._counts, self._model, self.final = {}, b"", False
        return data if self.rewrites else None

    def finish(self) -> bytes | None:
        """The answer is complete. Returns what is still to be sent when rewriting, else None."""
        out = bytearray()
        if self._sse:
            if self._column:
                self._end_line()
            self._end_event(b"", 0, 0, out)
        return bytes(out) if self.rewrites else None

    def _feed_stream(self, data: bytes) -> bytes | None:
        out = bytearray()
        i = event = 0
        size = len(data)
        while i < size:
            if self._after_cr:
                self._after_cr = False
                if data[i] == _LF:
                    if event == i and not self._held:
                        # It completes the event before, so it goes where that went.
                        if not self._dropped:
                            out.append(_LF)
                        event = i + 1
                    i += 1
                    continue
            match = _LINE_END.search(data, i)
            end = match.start() if match else size
            if end > i:
                self._dropped = False
                self._feed_line(data, i, end, len(self._held) - event)
            if match is None:
                break
            i = end + 1
            self._after_cr = data[end] == _CR
            if self._column:
                self._end_line()
            else:
                self._end_event(data, event, i, out)
                event = i
        if self.rewrites:
            self._hold(data, event, size, out)
            return bytes(out)
        return None

    def _feed_line(self, data: bytes, start: int, end: int, shift: int) -> None:
        while self._is_data and self._column < len(_FIELD) and start < end:
            self._is_data = data[start] == _FIELD[self._column]
            self._column += 1
            start += 1
        if start < end:
            self._column += 1  # only "not at the start of the line" matters from here on
            if self._is_data:
                self._document.feed(data, start, end, shift)

    def _end_line(self) -> None:
        document = self._document
        if self._is_data and self._column >= len(_FIELD):
            if document.phase == _INSIDE and not document.in_string:
                document.line_ended()
            elif document.phase == _END:
                self._count()
                self._documents += 1
                self._is_usage_chunk = document.choices_empty and bool(document.usage)
                self._cut = document.cut
                document.reset()
            else:
                self._odd = True
                document.reset()
        self._column = 0
        self._is_data = True

    def _end_event(self, data: bytes, start: int, end: int, out: bytearray) -> None:
        """The event, begun in what is held, ends with ``data[start:end]``: decides what of it is sent."""
        self._dropped = False
        if self.rewrites:
            self._hold(data, start, end, out)
            if self._documents == 1 and not self._odd and not self._too_long:
                self._dropped = self._is_usage_chunk
                del self._held[self._cut[0] : self._cut[1]]
            if not self._dropped:
                out += self._held
            self._held.clear()
        self._document.reset()
        self._documents = 0
        self._odd = self._too_long = self._is_usage_chunk = False

    def _hold(self, data: bytes, start: int, end: int, out: bytearray) -> None:
        self._held += data[start:end]
        if self._too_long or len(self._held) > MAX_HELD:
            self._too_long = True
            out += self._held
            self._held.clear()

    def _count(self) -> None:
        """Takes over what the complete document says."""
        document = self._document
        if document.model:
            self._model = document.model
        fields = usage_fields(document.usage)
        found = anthropic_counts(fields) if self._dialect == "anthropic" else openai_usage(fields)
        self.last = bool(found)
        if not found:
            return
        if self._dialect == "anthropic":
            for name, count in found.items():
                if count or name not in self._counts:
                    self._counts[name] = count
        else:
            self._counts = found
        self.final = self.final or self._is_last_word()

    def _is_last_word(self) -> bool:
        if not self._sse or self._dialect == "openai-responses":
            return True
        if self._dialect == "anthropic":
            return self._document.usage_level == 1
        return self._document.choices_empty


def object_members(body: bytes) -> list[tuple[bytes, int, int, int]]:
    """``(name, start, value start, value end)`` of the outermost members of a JSON object, in order.

    name: the bytes between the quotes, escapes not resolved. start: of the name's opening quote. Offsets allow one
    member to be replaced with every other byte kept. Only brackets, strings and the outermost punctuation are
    checked. Raises ValueError naming the offset.
    """
    members: list[tuple[bytes, int, int, int]] = []
    size = len(body)
    i = _skip_space(body, 0)
    if i == size or body[i] != _OPEN_OBJECT:
        raise ValueError(f"not a JSON object at byte {i}")
    i = _skip_space(body, i + 1)
    closed = i < size and body[i] == _CLOSE_OBJECT
    while not closed:
        if i == size or body[i] != _QUOTE:
            raise ValueError(f"a member name is missing at byte {i}")
        start = i
        i = _skip_string(body, i)
        name = body[start + 1 : i - 1]
        i = _skip_space(body, i)
        if i == size or body[i] != _COLON:
            raise ValueError(f"a colon is missing at byte {i}")
        value = _skip_space(body, i + 1)
        end = _skip_value(body, value)
        members.append((name, start, value, end))
        i = _skip_space(body, end)
        if i < size and body[i] == _COMMA:
            i = _skip_space(body, i + 1)
        elif i < size and body[i] == _CLOSE_OBJECT:
            closed = True
        else:
            raise ValueError(f"a comma or closing brace is missing at byte {i}")
    i = _skip_space(body, i + 1)
    if i != size:
        raise ValueError(f"something follows the JSON object at byte {i}")
    return members


def _skip_space(body: bytes, i: int) -> int:
    while i < len(body) and body[i] in _SPACE:
        i += 1
    return i


def _skip_string(body: bytes, i: int) -> int:
    """Index after the string that begins at ``i``."""
    start = i
    i += 1
    while True:
        match = _PLAIN.match(body, i)
        assert match is not None  # the pattern matches the empty string
        i = match.end()
        if i >= len(body):
            raise ValueError(f"a string is not closed, opened at byte {start}")
        if body[i] == _QUOTE:
            return i + 1
        i += 2


def _skip_value(body: bytes, i: int) -> int:
    """Index after the value that begins at ``i``: a string, brackets that balance, or a run of other bytes."""
    start, size = i, len(body)
    stack = bytearray()
    while i < size:
        c = body[i]
        if c == _QUOTE:
            i = _skip_string(body, i)
            if not stack:
                return i
        elif c in (_OPEN_OBJECT, _OPEN_ARRAY):
            if len(stack) == MAX_DEPTH:
                raise ValueError(f"nested too deeply at byte {i}")
            stack.append(c)
            i += 1
        elif c in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            if not stack:
                break
            if (c == _CLOSE_OBJECT) != (stack.pop() == _OPEN_OBJECT):
                raise ValueError(f"brackets do not match at byte {i}")
            i += 1
            if not stack:
                return i
        elif not stack and (c == _COMMA or c == _COLON or c in _SPACE):
            break
        else:
            i += 1
    if stack:
        raise ValueError(f"brackets are not closed, opened at byte {start}")
    if i == start:
        raise ValueError(f"a value is missing at byte {i}")
    return i
