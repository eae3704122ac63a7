"""What agents remember (see ``port``); embedded: not configured."""

from __future__ import annotations

from creto_platform.memory.embedded import NoMemory
from creto_platform.memory.port import Memory, MemoryRefused, MemoryUnavailable, RecallError, Recollection

__all__ = ["Memory", "MemoryRefused", "MemoryUnavailable", "NoMemory", "RecallError", "Recollection"]
