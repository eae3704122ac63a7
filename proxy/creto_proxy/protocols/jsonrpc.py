"""JSON-RPC 2.0 bodies, read so strictly that every server must find the same calls in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from creto_hotpath.jsonrpc import Message, NotJson, scan
from creto_proxy.errors import Refused
from creto_proxy.model import Decision, Verdict

# Reasons of refusals, and the JSON-RPC error code that each has besides its HTTP status (JSON-RPC 2.0 section 5.1; MCP
# 2026-07-28, "Error codes"): what is wrong with the message, as a server would say it.
MALFORMED, AMBIGUOUS, BATCH, MISMATCH = "rpc_malformed", "rpc_ambiguous", "rpc_batch", "rpc_header_mismatch"
CODES = {MALFORMED: -32600, AMBIGUOUS: -32600, BATCH: -32600, MISMATCH: -32020}

_WHY = {
    "duplicate_member": "an object in it has the same name twice",
    "other_case": "a name in it is spelled in another case",
    "not_an_object": "it holds something that is no message",
    "empty_batch": "it is an empty batch",
    "too_many_messages": "it is a batch of more than 100 messages",
}


@dataclass(frozen=True, slots=True)
class Rpc:
    """One message. method: None for an answer. id: as it stands in the body, None for a notification.

    name, uri, task, revision: what its params say, None where they do not say it in a string.
    """

    method: str | None
    id: bytes | None
    answers: bool
    name: str | None
    uri: str | None
    task: str | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class Body:
    """The messages of one body in order; batch: they stand in an array. flaw: why it must not be sent, or ""."""

    batch: bool
    messages: tuple[Rpc, ...]
    flaw: str


def read(body: bytes, methods: frozenset[str] = frozenset()) -> Body | None:
    """What ``body`` says, None when it is no JSON-RPC at all: it neither claims to be nor calls one of ``methods``.

    Raises NotJson when it is not even strict JSON.
    """
    found = scan(body)
    if not any(_looks(message, found.flaw, methods) for message in found.messages):
        return None
    if found.flaw:
        return Body(found.batch, (), _WHY[found.flaw])
    try:
        return Body(found.batch, tuple(map(_decoded, found.messages)), "")
    except ValueError as error:
        return Body(found.batch, (), str(error))


def _looks(message: Message, flaw: str, methods: frozenset[str]) -> bool:
    """Whether some server may take it for a call: not all of them ask for ``jsonrpc`` first."""
    if message.jsonrpc is not None:
        return True
    if message.method is None:
        return False
    try:
        return flaw == "duplicate_member" or _string(message.method) in methods
    except ValueError:
        return False


def _decoded(message: Message) -> Rpc:
    """Raises ValueError saying what is wrong with it."""
    method = _string(message.method)
    answers = message.result is not None or message.error is not None
    if message.jsonrpc != b'"2.0"' and _string(message.jsonrpc) != "2.0":
        raise ValueError('a message in it does not say "jsonrpc": "2.0"')
    if (method is None) == (not answers):
        raise ValueError("a message in it is neither a call nor an answer")
    if message.id is not None and message.id[:1] in (b"{", b"[", b"t", b"f"):
        raise ValueError("an id in it is neither text nor a number")
    return Rpc(
        method,
        message.id,
        answers,
        _string(message.name),
        _string(message.uri),
        _string(message.task),
        _string(message.revision),
    )


def _string(raw: bytes | None) -> str | None:
    """Raises ValueError for text that is none: half of a surrogate pair."""
    if raw is None or raw[:1] != b'"':
        return None
    try:
        return str(msgspec.json.decode(raw, type=str))
    except (msgspec.DecodeError, UnicodeError):
        raise ValueError("a name in it has half of a surrogate pair") from None


def said(body: bytes | None) -> Body | None:
    """As ``read``, and None for what is not JSON: what an answer can be given to."""
    try:
        return read(body) if body else None
    except NotJson:
        return None


def errors(found: Body, code: int, message: str, data: dict[str, Any]) -> bytes:
    """The answer that refuses ``found``: one error for each call in it, with the call's id, in an array where the calls
    came in one. Without a call that expects an answer, and where it cannot be told, one error without an id."""
    error = {"code": code, "message": message, "data": data}
    ids = [each.id for each in found.messages if each.id is not None and not each.answers]
    if found.flaw or not ids:
        return msgspec.json.encode({"jsonrpc": "2.0", "id": None, "error": error})
    answers = [{"jsonrpc": "2.0", "id": msgspec.Raw(each), "error": error} for each in ids]
    return msgspec.json.encode(answers if found.batch else answers[0])


def refused(reason: str, detail: str) -> Refused:
    return Refused(Decision(Verdict.DENY, reason, detail, status=400))
