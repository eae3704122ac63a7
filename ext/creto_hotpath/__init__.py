"""The compiled path: hashing, decisions, quotas, the journal, HTTP/1.1 relaying, token usage. Integers and bytes.

Every part is a compiled module with a Python twin that is its specification (see ``_select``). Compiled is the rule;
``CRETO_NO_EXTENSIONS=1`` picks the twins; a build that is missing is an ImportError that says what to do.

Every name below also stands in a small public module (``creto_hotpath.quota``, ``creto_hotpath.relay``, ...); here they
are looked up when first asked for, so that importing one part does not load the others. Nothing in this package
imports any other package of ours.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from creto_hotpath.admit import UNCHARGED, Admission, DecisionTable
    from creto_hotpath.bloom import Bloom
    from creto_hotpath.hashing import Hasher, hash128, seed_hash, siphash128
    from creto_hotpath.http1 import (
        BadMessage,
        BodyFramer,
        RequestHead,
        ResponseHead,
        parse_request,
        parse_response,
    )
    from creto_hotpath.journal import (
        Journal,
        JournalBusy,
        JournalCorrupt,
        JournalFull,
        crc32c,
        read_frames,
        recover,
        segments,
    )
    from creto_hotpath.quota import (
        CALENDAR,
        CONCURRENCY,
        FIXED,
        GCRA,
        NO_HOLD,
        TOTAL,
        QuotaBusy,
        QuotaFull,
        QuotaPath,
        QuotaState,
        QuotaTable,
        QuotaTableError,
    )
    from creto_hotpath.relay import Downstream, Exchange, Handler, Limits, Pool, Tunnel, Upstream
    from creto_hotpath.usage import UsageScanner

__all__ = [
    "CALENDAR",
    "CONCURRENCY",
    "FIXED",
    "GCRA",
    "NO_HOLD",
    "TOTAL",
    "UNCHARGED",
    "Admission",
    "BadMessage",
    "Bloom",
    "BodyFramer",
    "DecisionTable",
    "Downstream",
    "Exchange",
    "Handler",
    "Hasher",
    "Journal",
    "JournalBusy",
    "JournalCorrupt",
    "JournalFull",
    "Limits",
    "Pool",
    "QuotaBusy",
    "QuotaFull",
    "QuotaPath",
    "QuotaState",
    "QuotaTable",
    "QuotaTableError",
    "RequestHead",
    "ResponseHead",
    "Tunnel",
    "Upstream",
    "UsageScanner",
    "crc32c",
    "hash128",
    "parse_request",
    "parse_response",
    "read_frames",
    "recover",
    "seed_hash",
    "segments",
    "siphash128",
]

_MODULES = ("hashing", "bloom", "quota", "admit", "journal", "usage", "http1", "relay")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        found = import_module(f"{__name__}.{module}")
        if name in found.__all__:
            globals()[name] = getattr(found, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
