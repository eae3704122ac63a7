"""Scans JSON-RPC bodies: checks the whole document, keeps only what says which method is called on what.

The plain-Python form and specification of ``_jsonrpc_c``. One pass, no tree: what is kept is a handful of slices per
message. Two parsers must find the same message in the same bytes, so whatever lets them differ is a flaw that the
caller refuses (RFC 8259 section 4 leaves repeated names open).
"""

from __future__ import annotations

import re

from creto_hotpath._jsonrpc_types import MAX_DEPTH, MAX_MESSAGES, NAMES, Message, NotJson, Scan

_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))")
_SPACE = re.compile(r"[ \t\n\r]*")
_LITERALS = ("true", "false", "null")
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# What the parsers that ignore case take for the same letter: besides ASCII, the long s and the Kelvin sign.
_FOLD = {**{code: code + 32 for code in range(0x41, 0x5B)}, 0x17F: 0x73, 0x212A: 0x6B}

# What an object or array is to the message it belongs to.
_ELSE, _BATCH, _MESSAGE, _PARAMS, _META = -2, -1, 0, 1, 2
# What may come next.
_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _NEXT, _DONE = range(6)

_PLACES = [(level, name) for level, names in enumerate(NAMES) for name in names]
_SLOTS = {place: slot for slot, place in enumerate(_PLACES)}
_FOLDED = {(level, name.translate(_FOLD)): slot for (level, name), slot in _SLOTS.items()}
_NOTHING = -1
_OPENS = {_SLOTS[_MESSAGE, "params"]: _PARAMS, _SLOTS[_PARAMS, "_meta"]: _META}


def scan(body: bytes) -> Scan:
    """The messages in ``body``. Raises NotJson. O(bytes), plus a sort of the names of each object."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 at byte {error.start}") from None
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._roles: list[int] = []
        self._closers: list[str] = []
        self._names: list[list[str]] = []
        self._slot = _NOTHING
        self._kept: list[bytes | None] = []
        self._messages: list[Message] = []
        self._batch = False
        self._flaw = ""

    def run(self) -> Scan:
        text, i, state = self._text, 0, _VALUE
        while True:
            space = _SPACE.match(text, i)
            i = space.end() if space else i
            if state == _DONE:
                break
            char = text[i : i + 1]
            if state in (_VALUE_OR_END, _KEY_OR_END) and char == self._closers[-1]:
                i, state = i + 1, self._close()
            elif state in (_KEY, _KEY_OR_END):
                i, state = self._key(i), _VALUE
            elif state == _NEXT:
                if char == self._closers[-1]:
                    i, state = i + 1, self._close()
                elif char == ",":
                    i, state = i + 1, _KEY if self._closers[-1] == "}" else _VALUE
                else:
                    raise self._broken(i)
            else:
                i, state = self._value(i, char)
        if i != len(text):
            raise self._broken(i)
        if self._batch and not self._messages:
            self._mark("empty_batch")
        return Scan(self._batch, tuple(self._messages), self._flaw)

    def _broken(self, i: int) -> NotJson:
        return NotJson(f"not JSON at byte {len(self._text[:i].encode())}")

    def _mark(self, flaw: str) -> None:
        self._flaw = self._flaw or flaw

    def _key(self, i: int) -> int:
        """Index of the value's place, after the colon."""
        match = _STRING.match(self._text, i)
        if match is None:
            raise self._broken(i)
        name = _unescaped(match[0][1:-1])
        self._names[-1].append(name)
        level = self._roles[-1]
        self._slot = _SLOTS.get((level, name), _NOTHING)
        if self._slot == _NOTHING:
            self._slot = _FOLDED.get((level, name.translate(_FOLD)), _NOTHING)
            if self._slot != _NOTHING:
                self._mark("other_case")
        space = _SPACE.match(self._text, match.end())
        colon = space.end() if space else match.end()
        if self._text[colon : colon + 1] != ":":
            raise self._broken(colon)
        return colon + 1

    def _value(self, i: int, char: str) -> tuple[int, int]:
        slot, self._slot = self._slot, _NOTHING
        if char in ("{", "["):
            self._open(i, char, slot)
            return i + 1, _KEY_OR_END if char == "{" else _VALUE_OR_END
        if char == '"':
            match = _STRING.match(self._text, i)
            end = match.end() if match else i
        else:
            end = next((i + len(word) for word in _LITERALS if self._text.startswith(word, i)), i)
            if end == i and (match := _NUMBER.match(self._text, i)):
                end = match.end()
        if end == i:
            raise self._broken(i)
        self._keep(slot, self._text[i:end].encode())
        if not self._roles or self._roles[-1] == _BATCH:
            self._mark("not_an_object")
        return end, _NEXT if self._roles else _DONE

    def _open(self, i: int, char: str, slot: int) -> None:
        if len(self._roles) == MAX_DEPTH:
            raise NotJson(f"nested too deeply at byte {len(self._text[:i].encode())}")
        self._keep(slot, char.encode())
        parent = self._roles[-1] if self._roles else _BATCH
        role = _ELSE
        if not self._roles and char == "[":
            role = _BATCH
            self._batch = True
        elif parent == _BATCH:
            if char == "{":
                role = _MESSAGE
                self._kept = [None] * len(_SLOTS)
            else:
                self._mark("not_an_object")
        elif char == "{":
            role = _OPENS.get(slot, _ELSE)
        self._roles.append(role)
        self._closers.append("}" if char == "{" else "]")
        self._names.append([])

    def _close(self) -> int:
        self._closers.pop()
        names = self._names.pop()
        if len(set(names)) != len(names):
            self._mark("duplicate_member")
        if self._roles.pop() == _MESSAGE:
            if len(self._messages) < MAX_MESSAGES:
                self._messages.append(Message(*self._kept))
            else:
                self._mark("too_many_messages")
        return _NEXT if self._roles else _DONE

    def _keep(self, slot: int, raw: bytes) -> None:
        """The first of several counts: there is a flaw then, and what was found is only for the refusal."""
        if slot != _NOTHING and self._kept[slot] is None:
            self._kept[slot] = raw


def _unescaped(raw: str) -> str:
    """The text of a JSON string; a pair of surrogates is one character, a lone one stays."""
    if "\\" not in raw:
        return raw
    text = _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else _SIMPLE.get(match[2], match[2]), raw)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
