"""What usage can be summed up by."""

from __future__ import annotations

from typing import Literal, TypeAlias

By: TypeAlias = Literal["agent", "chain", "caused", "model", "provider", "day", "org", "team", "host", "run"]
GROUPS: tuple[By, ...] = ("agent", "chain", "caused", "model", "provider", "day", "org", "team", "host", "run")
