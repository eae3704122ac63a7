"""What ``Replay`` gives the consumers of the journal: a sequence of outcomes that are made only when looked at.

Most of what is derived from a record needs a few of its fields, or their bytes in another order. ``Batch.rows`` and
``Batch.entries`` make that of all records at once without an ``Outcome`` of each; a consumer that only knows sequences
of outcomes needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, overload

from creto_hotpath.records import Column, Counts, Layout, Made, Part, Records
from creto_proxy.model import Outcome, Usage

__all__ = ["FIELD", "LAYOUT", "Batch", "Column", "Counts", "Made", "Part"]

# By the type that ``Outcome`` and ``Usage`` declare; the id is 16 bytes, and time does not run before 1970.
_LETTERS: Final = {
    "bytes": "b", "str": "s", "int": "i", "tuple[str, ...]": "a", "Certainty": "s", "dict[str, int]": "m",
}  # fmt: skip
_NARROWER: Final = {"id": "k", "at_unix_ns": "n"}


def _letters(of: type, narrower: Mapping[str, str] = _NARROWER) -> str:
    return "".join(
        f"({_letters(Usage)})" if each.type == "Usage" else narrower.get(each.name) or _LETTERS[str(each.type)]
        for each in fields(of)
    )


def _names(of: type, prefix: str = "") -> list[str]:
    return [
        name
        for each in fields(of)
        for name in (_names(Usage, "usage.") if each.type == "Usage" else [f"{prefix}{each.name}"])
    ]


LAYOUT: Final = Layout(_letters(Outcome))
# The number of each field of an outcome, those of its usage as "usage.model" and so on.
FIELD: Final[Mapping[str, int]] = {name: number for number, name in enumerate(_names(Outcome))}


class Batch(Sequence[Outcome]):
    """Consecutive outcomes of one journal segment."""

    def __init__(self, records: Records, decode: Callable[[bytes], Outcome]) -> None:
        """Cuts ``records`` before the first one that is none; ``damage`` says what is wrong with that."""
        self._records = records
        self._decode = decode
        self.damage = ""
        self._outcomes: list[Outcome] | None = None
        # What is spelled otherwise than usual: written by an earlier version, or not by us.
        self._odd: dict[int, Outcome] = {}
        for number in records.odd:
            try:
                self._odd[number] = decode(records.payload(number))
            except ValueError as error:
                self.damage = str(error)
                records.cut(number)
                break

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, number: int) -> Outcome: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Outcome]: ...
    def __getitem__(self, number: int | slice) -> Outcome | Sequence[Outcome]:
        # Consumers come one after the other: what one has looked at the next need not make again.
        if self._outcomes is None:
            payload = self._records.payload
            self._outcomes = [self._odd.get(at) or self._decode(payload(at)) for at in range(len(self._records))]
        return self._outcomes[number]

    def column(self, name: str) -> list[Any]:
        """One field of every outcome."""
        values = self._records.column(FIELD[name])
        for number, outcome in self._odd.items():
            values[number] = _field(outcome, name)
        return values

    def rows(
        self, columns: Sequence[Column], other: Callable[[Outcome], tuple[Any, ...]]
    ) -> list[tuple[Any, ...]]:
        """``columns`` of every outcome, by the numbers of ``FIELD``; ``other`` gives the row of one spelled otherwise.

        See ``creto_hotpath.records.Records.rows``.
        """
        rows = self._records.rows(columns)
        for number, outcome in self._odd.items():
            rows[number] = other(outcome)
        return rows  # type: ignore[return-value]  # each None has been replaced

    def entries(self, parts: Sequence[Part], other: Callable[[Outcome], bytes]) -> list[bytes]:
        """The joined ``parts`` of every outcome; ``other`` gives those of one that is spelled otherwise.

        See ``creto_hotpath.records.Records.entries``.
        """
        entries = self._records.entries(parts)
        for number, outcome in self._odd.items():
            entries[number] = other(outcome)
        return entries  # type: ignore[return-value]  # each None has been replaced


def _field(outcome: Outcome, name: str) -> Any:
    value: Any = outcome
    for part in name.split("."):
        value = getattr(value, part)
    return value
