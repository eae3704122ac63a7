"""What every fuzz target asks of a parser: it answers or it refuses, the same way in every form and for every cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from creto_hotpath._select import extensions_wanted

# Every cut of a message this short is tried; of a longer one, this many.
ALL_CUTS = 256


def forms(part: str) -> list[ModuleType]:
    """The plain-Python twin of a compiled module, which says what is right, then the compiled module."""
    twin = import_module(f"creto_hotpath._{part}_py")
    return [twin, import_module(f"creto_hotpath._{part}_c")] if extensions_wanted() else [twin]


def answer(call: Callable[..., Any], *args: Any, refusals: type[Exception] | tuple[type[Exception], ...]) -> Any:
    """What a call gives, or the text of its refusal. Whatever else it raises is the defect that is looked for."""
    try:
        return call(*args)
    except refusals as error:
        return f"{type(error).__name__}: {error}"


def same(answers: list[Any], *context: Any) -> Any:
    """The one answer that all give. AssertionError when they differ."""
    for other in answers[1:]:
        assert other == answers[0], (answers[0], other, *context)
    return answers[0]


def sizes(data: bytes) -> Iterator[int]:
    """Where to cut ``data``: everywhere, or at evenly spread places, the ends included."""
    step = max(1, len(data) // ALL_CUTS)
    yield from range(0, len(data), step)
    yield len(data)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """``data`` whole, byte by byte, and in two pieces at each of ``sizes``."""
    yield [data]
    yield pieces(data, 1)
    for at in sizes(data):
        yield [data[:at], data[at:]]


def prefixes_agree(said: Callable[[bytes], Any], data: bytes, silence: Any = None) -> None:
    """Every prefix is answered with silence, and from some length on with the answer of the whole."""
    whole = said(data)
    spoken = False
    for size in sizes(data):
        early = said(data[:size])
        if early != silence or spoken:
            assert early == whole, (size, early, whole)
            spoken = True
