"""Markdown as lines: paragraphs wrapped at the width of the project, and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 120


def prose(*sentences: str) -> Iterator[str]:
    """A paragraph of these sentences, and the empty line behind it."""
    yield from textwrap.wrap(" ".join(sentences), WIDTH, break_long_words=False, break_on_hyphens=False)
    yield ""


def bullets(items: Sequence[str]) -> Iterator[str]:
    """A list and the empty line behind it; nothing for no items."""
    for item in items:
        yield from textwrap.wrap(
            item, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    if items:
        yield ""


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table and the empty line behind it."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def spread(values: Sequence[float] | None) -> str:
    """Median and, in brackets, least and most; empty for what was not measured."""
    return f"{short(values[0])} ({short(values[1])}..{short(values[2])})" if values else ""


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
