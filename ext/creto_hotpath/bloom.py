"""Keys that may be there, answered in one cache line; "no" is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._bloom_py import Bloom
else:
    Bloom = select("bloom").Bloom

__all__ = ["Bloom"]
