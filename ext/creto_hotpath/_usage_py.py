"""Token usage of a model's answer, found while its bytes pass by.

An answer is watched by a small machine that knows JSON's brackets and strings and nothing else: it follows the
depth, compares the names of the outermost members, and keeps only the few bytes of ``usage`` and ``model``. Text that
a model writes is inside strings, so no prompt can make it look like usage. Between the brackets the grammar is not
checked: a document counts when brackets and strings balance and nothing but white space follows. An answer may be one
document, several in lines or in an array, or come in one of two kinds of stream.

Server-sent events (WHATWG HTML, "Interpreting an event stream"): lines end with LF, CR or CRLF and may be cut at any
byte by the network; each ``data`` line holds one document, or a part of one when an event spreads it over several.

Frames (AWS SDKs, "Amazon event stream"; ``application/vnd.amazon.eventstream``): lengths and a CRC-32 of them, headers,
a payload with one document, a CRC-32 of it all. A document counts when its frame ends and is intact. Bytes that are no
frame end the watching, and usage is then unknown.

Memory per scanner: at most ``MAX_CAPTURE`` for a captured value, of which there are seven at most, plus ``MAX_HELD``
when it rewrites. Time is linear in the bytes. This file is the specification; ``_usage_c`` is the same machine compiled
and answers the same.
"""

from __future__ import annotations

import json
import re
from zlib import crc32

from creto_hotpath._usage_fields import (
    CHECKSUM,
    FRAMINGS,
    GRAMMARS,
    MAX_FRAME,
    MAX_FRAME_HEADERS,
    MERGED,
    PRELUDE,
    Dialect,
    Framing,
    Grammar,
    counts_of,
    decoded_payload,
    is_last_word,
    usage_of,
)

# Longest value of a "usage" or "model" member that is kept. Real ones are below 1 KiB.
MAX_CAPTURE = 16 << 10
# Deeper nesting than this is nobody's answer; such a document is ignored, such a request body refused.
MAX_DEPTH = 512
# Longest event that is held back to be rewritten; a longer one passes unchanged.
MAX_HELD = 256 << 10
# Longer than every member name that is looked for, so that a cut name cannot match one.
_MAX_KEY = 40

_START, _INSIDE, _END, _BAD = range(4)
_NOTHING, _USAGE, _MODEL, _CHOICES, _WRAPPER, _LOOSE, _PAYLOAD = range(7)
# Of these the value is kept.
_CAPTURED = (_USAGE, _MODEL, _LOOSE, _PAYLOAD)
# Between the documents of an array: before its bracket, where one may begin, after one, after the closing bracket.
_OUTSIDE, _NEXT, _AFTER, _CLOSED = range(4)

_SPACE = b" \t\r\n"
_LF, _CR, _QUOTE, _COMMA, _COLON, _BACKSLASH = b'\n\r",:\\'
_OPEN_OBJECT, _OPEN_ARRAY, _CLOSE_OBJECT, _CLOSE_ARRAY = b"{[}]"

_PLAIN = re.compile(rb'[^"\\]*')
_LINE_END = re.compile(rb"[\r\n]")
_FIELD = b"data:"


class _Document:
    """One JSON object, watched byte by byte; ``feed`` may be called with pieces of any size."""

    def __init__(self, grammar: Grammar, wrapped: bool) -> None:
        self._inner = dict.fromkeys(grammar.usage, _USAGE)
        if grammar.model:
            self._inner[grammar.model] = _MODEL
        self._outer = {**self._inner, b"choices": _CHOICES, **dict.fromkeys(grammar.loose, _LOOSE)}
        if grammar.payload:
            self._outer[grammar.payload] = _PAYLOAD
        if wrapped:
            self._outer |= dict.fromkeys(grammar.wrappers, _WRAPPER)
        self.reset()

    def reset(self) -> None:
        self.phase = _START
        self.in_string = False
        self._escaped = False
        self._stack = bytearray()
        self._expect_key = False
        self._in_key = False
        self._key = bytearray()
        self._name = b""  # of the member that is captured
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
        self.loose: dict[bytes, bytes] = {}
        self.payload = b""
        self.choices_empty = False
        # Bytes to remove so that ``usage: null`` is gone, as offsets into the event; empty when there is none.
        self.cut = (0, 0)

    def feed(self, data: bytes, start: int, end: int, shift: int, *, one: bool = False) -> int:
        """Watches ``data[start:end]``; ``shift`` turns an index of ``data`` into an offset of the event.

        Returns the index where it stopped: ``end``, or, when ``one``, after the last byte of the document.
        """
        mark = start
        i = start
        while i < end:
            if self.phase != _INSIDE:
                if data[i] in _SPACE:
                    i += 1
                    continue
                if self.phase != _START or data[i] != _OPEN_OBJECT:
                    self.phase = _BAD
                    return end
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
                        return end
                i += 1
                if one and self.phase == _END:
                    return i
        if self._capturing:
            self._keep(data, mark, end)
        return end

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
        return (self._outer if len(self._stack) == 1 else self._inner).get(key, _NOTHING)

    def _value_begins(self, c: int, i: int, mark: int) -> int:
        self._armed = False
        if self._slot in _CAPTURED:
            self._capturing = self._slot
            self._name = bytes(self._key)
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
        if slot == _LOOSE:
            self.loose[self._name] = raw if fits else b""
            return
        if slot == _PAYLOAD:
            self.payload = raw if fits and raw[:1] == b'"' else b""
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

    dialect: "openai" (chat completions, completions, embeddings), "openai-responses", "anthropic" (messages), "gemini",
    "bedrock", "cohere" or "ollama".
    framing: "document" (one JSON document; in the "gemini" dialect also an array of them, which is its stream),
    "events" (server-sent), "lines" (one document each) or "frames" (of AWS).
    strip_usage_chunk: ``feed`` and ``finish`` return the stream as a client sees it that did not ask for usage
    (``stream_options.include_usage``): without the extra event whose ``choices`` are empty and which carries a usage
    object, and without ``"usage": null`` members elsewhere; every other byte is kept. Events longer than ``MAX_HELD``
    and events that are not exactly one JSON object pass as they are. Only the "openai" dialect has such events.

    ``feed`` never raises, whatever the bytes.
    """

    def __init__(self, dialect: Dialect, framing: Framing, strip_usage_chunk: bool = False) -> None:
        if dialect not in GRAMMARS:
            raise ValueError(f"unknown dialect {dialect!r}")
        if framing not in FRAMINGS:
            raise ValueError(f"unknown framing {framing!r}")
        self.rewrites = strip_usage_chunk
        self.final = False
        self.last = False
        self._dialect = dialect
        self._framing = framing
        self._document = _Document(GRAMMARS[dialect], framing != "document")
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
        # Lines and arrays: what may come between the documents. Whatever cannot be read ends the watching.
        self._between = _NEXT if framing == "lines" else _OUTSIDE
        self._ended = False
        # Frames: the prelude as far as it is here, then the place in the frame and where its parts end.
        self._prelude = bytearray()
        self._at = self._payload_at = self._checksum_at = 0
        self._crc = 0
        self._checksum = bytearray()

    @property
    def usage(self) -> dict[str, int] | None:
        """Tokens by kind, keys as far as reported: ``input`` (with everything read from or written to a cache),
        ``output``, ``cache_read``, ``cache_write``, ``cache_write_1h`` (part of cache_write), ``reasoning``,
        ``input_audio``, ``output_audio``, the same for ``image`` and ``video``, ``cache_read_audio`` (part of both
        cache_read and input_audio; so for image and video), ``total``, and ``web_search`` (calls, not tokens). None:
        unknown."""
        return usage_of(self._dialect, self._counts) if self._counts else None

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
        if self._framing == "events":
            return self._feed_stream(data)
        if self._framing == "frames":
            self._feed_frames(data)
        elif self._framing == "lines" or self._between != _OUTSIDE or self._is_array(data):
            self._feed_sequence(data)
        else:
            self._feed_document(data)
        return data if self.rewrites else None

    def finish(self) -> bytes | None:
        """The answer is complete. Returns what is still to be sent when rewriting, else None."""
        out = bytearray()
        if self._framing == "events":
            if self._column:
                self._end_line()
            self._end_event(b"", 0, 0, out)
        elif self._document.phase == _INSIDE or self._prelude:
            self.last = False  # cut off
        elif self._framing == "document" and self._between in (_NEXT, _AFTER):
            self.last = False
        return bytes(out) if self.rewrites else None

    def _feed_document(self, data: bytes) -> None:
        self._document.feed(data, 0, len(data), 0)
        if self._document.phase == _END and not self.final:
            self._count()
        elif self._document.phase == _BAD:
            self._counts, self._model, self.final, self.last = {}, b"", False, False

    def _give_up(self) -> None:
        self._ended = True
        self._counts, self._model, self.final, self.last = {}, b"", False, False

    # Several documents, one after the other.

    def _is_array(self, data: bytes) -> bool:
        if self._dialect != "gemini" or self._document.phase != _START:
            return False
        return data.lstrip(_SPACE)[:1] == b"["

    def _feed_sequence(self, data: bytes) -> None:
        document = self._document
        i, size = 0, len(data)
        while i < size and not self._ended:
            if document.phase == _START:
                c = data[i]
                if c in _SPACE:
                    i += 1
                    continue
                if self._framing != "lines" and self._goes_between(c):
                    i += 1
                    continue
                if self._between != _NEXT:
                    return self._give_up()
            i = document.feed(data, i, size, 0, one=True)
            if document.phase == _END:
                self._count()
                document.reset()
                if self._framing != "lines":
                    self._between = _AFTER
                    self._documents = 1
            elif document.phase == _BAD:
                return self._give_up()

    def _goes_between(self, c: int) -> bool:
        """Takes the bracket or comma of an array where one may be."""
        if c == _OPEN_ARRAY and self._between == _OUTSIDE:
            self._between = _NEXT
        elif c == _COMMA and self._between == _AFTER:
            self._between = _NEXT
        elif c == _CLOSE_ARRAY and (self._between == _AFTER or (self._between == _NEXT and not self._documents)):
            self._between = _CLOSED
        else:
            return False
        return True

    # Frames.

    def _feed_frames(self, data: bytes) -> None:
        i, size = 0, len(data)
        while i < size and not self._ended:
            if len(self._prelude) < PRELUDE:
                end = min(size, i + PRELUDE - len(self._prelude))
                self._prelude += data[i:end]
                if len(self._prelude) == PRELUDE:
                    self._begin_frame()
            elif self._at < self._checksum_at:
                stop = self._payload_at if self._at < self._payload_at else self._checksum_at
                end = min(size, i + stop - self._at)
                self._crc = crc32(data[i:end], self._crc)
                if self._at >= self._payload_at:
                    self._document.feed(data, i, end, 0)
                self._at += end - i
            else:
                end = min(size, i + CHECKSUM - len(self._checksum))
                self._checksum += data[i:end]
                if len(self._checksum) == CHECKSUM:
                    self._end_frame()
            i = end

    def _begin_frame(self) -> None:
        total, headers, checksum = (int.from_bytes(self._prelude[at : at + 4], "big") for at in (0, 4, 8))
        self._at = PRELUDE
        self._payload_at = PRELUDE + headers
        self._checksum_at = total - CHECKSUM
        if crc32(self._prelude[:8]) != checksum or headers > MAX_FRAME_HEADERS or total > MAX_FRAME:
            return self._give_up()
        if self._payload_at > self._checksum_at:
            return self._give_up()
        self._crc = crc32(self._prelude)

    def _end_frame(self) -> None:
        document = self._document
        if int.from_bytes(self._checksum, "big") != self._crc:
            return self._give_up()
        if document.phase == _END:
            self._count()
            inner = decoded_payload(document.payload)
            if inner:
                document.reset()
                document.feed(inner, 0, len(inner), 0)
                if document.phase == _END:
                    self._count(inner=True)
        document.reset()
        self._prelude.clear()
        self._checksum.clear()

    # Server-sent events.

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

    def _count(self, *, inner: bool = False) -> None:
        """Takes over what the complete document says. inner: it was inside another."""
        document = self._document
        if document.model:
            self._model = document.model
        found = counts_of(self._dialect, document.usage, document.loose)
        self.last = bool(found)
        if not found:
            return
        if self._dialect in MERGED:
            for name, count in found.items():
                if count or name not in self._counts:
                    self._counts[name] = count
        else:
            self._counts = found
        level = document.usage_level
        if self._framing == "document" and self._between == _OUTSIDE:
            self.final = True
        elif is_last_word(
            self._dialect, document.loose, level=level, choices_empty=document.choices_empty, inner=inner
        ):
            self.final = True


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
