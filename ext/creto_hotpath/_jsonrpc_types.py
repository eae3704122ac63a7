"""What scanning a JSON-RPC body gives, in both forms."""

from __future__ import annotations

from typing import NamedTuple

# Deeper documents, and batches with more messages, are not read: no client needs them.
MAX_DEPTH = 128
MAX_MESSAGES = 100


class NotJson(ValueError):
    """The bytes are not one JSON document in UTF-8 (RFC 8259), or nested deeper than ``MAX_DEPTH``.

    The text says where and never quotes the body.
    """


class Message(NamedTuple):
    """One JSON-RPC message: each member's value as it stands in the body, None when it is absent.

    Strings keep their quotes and escapes. Of an object or array only its first byte, ``b"{"`` or ``b"["``, is given.
    name, uri, task, meta: ``name``, ``uri``, ``taskId`` and ``_meta`` in ``params``. revision: the MCP revision in
    ``params._meta["io.modelcontextprotocol/protocolVersion"]``.
    """

    jsonrpc: bytes | None
    id: bytes | None
    method: bytes | None
    params: bytes | None
    result: bytes | None
    error: bytes | None
    name: bytes | None
    uri: bytes | None
    task: bytes | None
    meta: bytes | None
    revision: bytes | None


class Scan(NamedTuple):
    """A whole body. batch: it is an array.

    flaw: "" or why two parsers may read it differently, the first reason found: ``duplicate_member`` (in any object of
    the document), ``other_case`` (a name above, spelled in another case, which Go's and .NET's parsers take for it),
    ``not_an_object`` (something that is no message, also within a batch), ``empty_batch``, ``too_many_messages``. With
    a flaw ``messages`` holds the first value of each name, in whatever case it is written.
    """

    batch: bool
    messages: tuple[Message, ...]
    flaw: str


# The names that matter, by the object they stand in: the message, its params, their _meta. The order is Message's.
NAMES: tuple[tuple[str, ...], ...] = (
    ("jsonrpc", "id", "method", "params", "result", "error"),
    ("name", "uri", "taskId", "_meta"),
    ("io.modelcontextprotocol/protocolVersion",),
)
