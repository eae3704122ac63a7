"""What a model request asks for, where its body is plain, and what it may use; compiled unless told otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._ask_types import TARIFF_TOKENS, Ask

if TYPE_CHECKING:
    from creto_hotpath._ask_py import Tariff, plain
else:
    from creto_hotpath._select import select

    _ask = select("ask")
    Tariff = _ask.Tariff
    plain = _ask.plain

__all__ = ["TARIFF_TOKENS", "Ask", "Tariff", "plain"]
