"""Journal records that are copied on without being taken apart. Plain-Python form.

A consumer of the journal wants some fields of each record as values, or the bytes of some in another order; hardly any
wants all of them. ``Records`` finds where the fields of each record are, and makes of them what it is asked for.

A ``Layout`` says what a usual record is: a msgpack array of known fields, each of its type and spelled as msgpack
spells it shortest, so that the bytes of a field may stand for its value. Every other record is *odd* and is left to
the caller; that it is odd says nothing about whether it is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import msgpack

from creto_hotpath._journal_file import ABBREVIATED, HEADER_BYTES, expand, refers, whole_frame
from creto_hotpath._journal_py import crc32c

MAX_FIELDS: Final = 64
MAX_MADE_OF: Final = 16
_KEY_BYTES: Final = 16
_FIXMAP: Final = 15
_FIXSTR: Final = 31
_ARRAY16: Final = 0xFFFF
_HIGHEST: Final = (1 << 63) - 1
_LOWEST: Final = -(1 << 63)

_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack


class Layout:
    """The fields of a usual record, one letter each, those of an array in an array in parentheses.

    ``k`` 16 bytes, ``b`` bytes, ``s`` text, ``n`` an integer from 0 to 2**63 - 1, ``i`` from -2**63, ``a`` an array of
    at most 65535 texts, ``m`` a map of at most 15 texts to such integers. Fields are numbered in the order of their
    letters. Raises ValueError.
    """

    def __init__(self, kinds: str) -> None:
        self.kinds = kinds
        # (letter, or the letters of a nested array) of each element of the record
        self.elements: list[str] = []
        rest = kinds
        while rest:
            nested, closed, after = rest[1:].partition(")") if rest[0] == "(" else (rest[0], ")", rest[1:])
            if not closed or not nested or len(nested) > _FIXMAP or not set(nested) <= set("kbsniam"):
                raise ValueError(f"not a layout: {kinds!r}")
            self.elements.append(nested if rest[0] == "(" else rest[0])
            rest = after
        self.nested = tuple(bool(mark) for mark in _nested(kinds))
        self.count = sum(map(len, self.elements))
        if not 1 <= self.count <= MAX_FIELDS:
            raise ValueError(f"a layout has 1 to {MAX_FIELDS} fields: {kinds!r}")

    def kind(self, field: int) -> str:
        """The letter of a field."""
        return "".join(self.elements)[field]

    def fields(self, payload: bytes) -> list[Any] | None:
        """The fields of a usual record, None for an odd one."""
        try:
            row = msgpack.unpackb(payload, raw=False, use_list=False)
        except (ValueError, msgpack.UnpackException):
            return None
        if type(row) is not tuple or len(row) != len(self.elements):
            return None
        found: list[Any] = []
        for element, value, nested in zip(self.elements, row, self.nested, strict=True):
            values = value if nested else (value,)
            if type(values) is not tuple or len(values) != len(element):
                return None
            if not all(map(_is, element, values)):
                return None
            found += values
        return found if _pack(row) == payload else None


def _nested(kinds: str) -> list[bool]:
    marks: list[bool] = []
    inside = False
    for letter in kinds:
        if letter == "(":
            marks.append(True)
            inside = True
        elif letter == ")":
            inside = False
        elif not inside:
            marks.append(False)
    return marks


def _is(kind: str, value: Any) -> bool:
    if kind == "k":
        return type(value) is bytes and len(value) == _KEY_BYTES
    if kind == "b":
        return type(value) is bytes
    if kind == "s":
        return type(value) is str
    if kind in "ni":
        return type(value) is int and (0 if kind == "n" else _LOWEST) <= value <= _HIGHEST
    if kind == "a":
        return type(value) is tuple and len(value) <= _ARRAY16 and all(type(item) is str for item in value)
    return (
        type(value) is dict
        and len(value) <= _FIXMAP
        and all(type(name) is str and _is("i", number) for name, number in value.items())
    )


class Made:
    """A value made of some fields by a function.

    width: the function gives a tuple of that many values, each of which is a column; 0: what it gives is one column.
    keep: what was made of some content is given again for the same, for a while; False where content hardly recurs.
    """

    __slots__ = ("fields", "function", "width")

    def __init__(
        self, fields: Sequence[int], function: Callable[..., Any], width: int = 0, keep: bool = True
    ) -> None:
        if not 1 <= len(fields) <= MAX_MADE_OF or width < 0:
            raise ValueError(f"a column is made of 1 to {MAX_MADE_OF} fields")
        self.fields = tuple(fields)
        self.function = function
        self.width = width

    def clear(self) -> None:
        """Forgets what the function gave."""


class Counts:
    """Some numbers of a map, each a column of its own, and one more column that a function makes of all the others.

    missing: what stands for a number that is not in the map. Raises ValueError for more names than a map may hold.
    """

    __slots__ = ("field", "function", "missing", "names")

    def __init__(
        self, field: int, names: Sequence[str], missing: Any, function: Callable[[dict[str, int]], Any]
    ) -> None:
        self.field = field
        self.names = tuple(names)
        if len(self.names) > _FIXMAP or any(len(name.encode()) > _FIXSTR for name in self.names):
            raise ValueError("at most 15 names of at most 31 bytes are looked for")
        self.missing = missing
        self.function = function

    def of(self, numbers: dict[str, int]) -> list[Any]:
        """The columns."""
        rest = {name: number for name, number in numbers.items() if name not in self.names}
        return [*(numbers.get(name, self.missing) for name in self.names), self.function(rest)]


Column: TypeAlias = "int | Made | Counts"
Part: TypeAlias = "bytes | int | Made | tuple[Made, int]"


class Records:
    """The records of the whole and sound frames in ``data`` from ``at`` on, ``limit`` of them at most.

    What begins at ``end`` is no such frame, or one too many. odd: which records are not of the layout. offset: of
    ``data`` in its segment, to which abbreviated records refer; earlier: gives the payload of a frame before ``data``.
    """

    def __init__(
        self,
        layout: Layout,
        data: bytes,
        at: int,
        limit: int,
        offset: int = 0,
        earlier: Callable[[int], bytes | None] | None = None,
    ) -> None:
        if not 0 <= at <= len(data):
            raise ValueError(f"there is no byte {at} in {len(data)}")
        self.layout = layout
        self._payloads: list[bytes] = []
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.end = at
        while len(self._payloads) < limit and (payload := whole_frame(data, self.end, crc32c)) is not None:
            size = HEADER_BYTES + len(payload)
            if payload[0] == ABBREVIATED:
                payload = _whole(data, self.end, payload, offset, earlier)
                if payload is None:
                    break
            self._payloads.append(payload)
            self._begins.append(self.end)
            self.end += size
            self._ends.append(self.end)
        self._fields = [layout.fields(payload) for payload in self._payloads]

    @property
    def odd(self) -> tuple[int, ...]:
        return tuple(at for at, fields in enumerate(self._fields) if fields is None)

    def __len__(self) -> int:
        return len(self._payloads)

    def payload(self, number: int) -> bytes:
        """The bytes of a record. Raises IndexError."""
        self._check(number)
        return self._payloads[number]

    def end_of(self, number: int) -> int:
        """Where the frame of a record ends in the data. Raises IndexError."""
        self._check(number)
        return self._ends[number]

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self._payloads):
            raise IndexError(f"there is no record {number} in {len(self._payloads)}")

    def cut(self, count: int) -> None:
        """Forgets all but the first ``count`` records, the last of which then ends at ``end``."""
        if not 0 <= count <= len(self._payloads):
            raise IndexError(f"there are not {count} records in {len(self._payloads)}")
        if count < len(self._payloads):
            self.end = self._begins[count]
        del self._payloads[count:], self._begins[count:], self._ends[count:], self._fields[count:]

    def column(self, field: int) -> list[Any]:
        """One field of each record, None for odd ones."""
        _check_fields(self.layout, (field,))
        return [None if fields is None else fields[field] for fields in self._fields]

    def rows(self, columns: Sequence[Column]) -> list[tuple[Any, ...] | None]:
        """For each record a tuple of the columns, None for odd ones. A column is a field, a ``Made`` or ``Counts``."""
        for column in columns:
            if isinstance(column, Counts):
                _check_fields(self.layout, (column.field,))
                if self.layout.kind(column.field) != "m":
                    raise ValueError("only in a map something can be counted")
                continue
            _check_fields(self.layout, column.fields if isinstance(column, Made) else (column,))
        return [None if fields is None else tuple(_row(fields, columns)) for fields in self._fields]

    def entries(self, parts: Sequence[Part]) -> list[bytes | None]:
        """For each record the joined parts, None for odd ones.

        A part is bytes as they stand; a field as it is in the record; a ``Made`` that gives bytes; or a ``Made`` that
        gives UTF-8 and a text field, which make one msgpack text of both.
        """
        for part in parts:
            self._check_part(part)
        return [None if fields is None else b"".join(_entry(fields, parts)) for fields in self._fields]

    def _check_part(self, part: Part) -> None:
        if isinstance(part, tuple):
            part, text = part
            _check_fields(self.layout, (text,))
            if self.layout.kind(text) != "s":
                raise ValueError("only to text something can be prefixed")
        if isinstance(part, Made):
            if part.width:
                raise ValueError("a part is one value")
            _check_fields(self.layout, part.fields)
        elif not isinstance(part, bytes):
            _check_fields(self.layout, (part,))


def _whole(
    data: bytes, at: int, payload: bytes, offset: int, earlier: Callable[[int], bytes | None] | None
) -> bytes | None:
    """What is abbreviated by the frame at ``at``; None when it refers to nothing that it fits."""
    of = int.from_bytes(payload[1:5], "little")
    if not refers(of, offset + at):
        return None
    if of >= offset:
        base = whole_frame(data, of - offset, crc32c)
    else:
        base = earlier(of) if earlier is not None else None
    return None if base is None or base[0] == ABBREVIATED else expand(base, payload)


def _check_fields(layout: Layout, fields: Sequence[int]) -> None:
    if any(not 0 <= field < layout.count for field in fields):
        raise ValueError(f"a record has {layout.count} fields, {fields!r} are not among them")


def _row(fields: list[Any], columns: Sequence[Column]) -> list[Any]:
    row: list[Any] = []
    for column in columns:
        if isinstance(column, Counts):
            row += column.of(fields[column.field])
            continue
        if not isinstance(column, Made):
            row.append(fields[column])
            continue
        value = column.function(*(fields[field] for field in column.fields))
        if column.width == 0:
            row.append(value)
        elif type(value) is tuple and len(value) == column.width:
            row += value
        else:
            raise TypeError(f"a made column of width {column.width} gave {type(value).__name__}")
    return row


def _entry(fields: list[Any], parts: Sequence[Part]) -> list[bytes]:
    return [
        part if isinstance(part, bytes)
        else _make(part, fields) if isinstance(part, Made)
        else _pack(_make(part[0], fields).decode() + fields[part[1]])
        if isinstance(part, tuple)
        else _pack(fields[part])
        for part in parts
    ]  # fmt: skip


def _make(made: Made, fields: list[Any]) -> bytes:
    value = made.function(*(fields[field] for field in made.fields))
    if not isinstance(value, bytes):
        raise TypeError(f"a made column of a part gives bytes, not {type(value).__name__}")
    return value
