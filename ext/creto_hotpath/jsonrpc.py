"""Which JSON-RPC messages a body holds, found without building its tree; compiled unless the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._jsonrpc_types import MAX_DEPTH, MAX_MESSAGES, Message, NotJson, Scan

if TYPE_CHECKING:
    from creto_hotpath._jsonrpc_py import scan
else:
    from creto_hotpath._select import select

    scan = select("jsonrpc").scan

__all__ = ["MAX_DEPTH", "MAX_MESSAGES", "Message", "NotJson", "Scan", "scan"]
